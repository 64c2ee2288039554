"""The command line: `pspnet-fast train`, `evaluate`, `predict`, `convert`, `export`, `scenes` and `doctor`."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from .data.classes import CLASSES, Classes
from .files import check_target
from .models.checkpoint import read_checkpoint
from .models.pspnet import PSPNet
from .protocol import BOUNDS, SCALES, Protocol, check_protocol
from .terminal import Formatter, printable, say

CROPS = {"ade20k": 473, "voc2012": 473, "cityscapes": 713}
BASE_SIZES = {"ade20k": 512, "voc2012": 512, "cityscapes": 2048}


INTERRUPTED, NOBODY_READS = 130, 141  # as a shell says of a program that SIGINT or SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 130 after Ctrl-C, 141 where the reader of its output has gone, else the command's.

    2 where its output cannot be written for another reason, such as a full disk; a closed one is written nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  until Python ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks ends nothing
    argv = sys.argv[1:] if argv is None else [*argv]
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        say(f"\npspnet-fast{_command(argv)}: interrupted", sys.stderr)
        return INTERRUPTED
    except OSError as error:  # commands name the files that they cannot read or write: this is what they print on
        gone = isinstance(error, BrokenPipeError)
        if not gone:
            with contextlib.suppress(OSError):
                say(f"pspnet-fast{_command(argv)}: its output cannot be written: {error.strerror or error}", sys.stderr)
        # What is still in the buffers would raise again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return NOBODY_READS if gone else 2


def _command(argv: Sequence[str]) -> str:
    """The command's name after a space, where the arguments begin with one."""
    return f" {argv[0]}" if argv and argv[0].isalpha() else ""


class _Parser(argparse.ArgumentParser):
    """Its sentences hold arguments as they were given, which a shell may have made of any file's name."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _run(argv: Sequence[str]) -> int:
    from . import __version__, convert, export

    parser = _Parser(prog="pspnet-fast", description="PSPNet on fast kernels.")
    parser.add_argument("--version", action="version", version=f"pspnet_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_predict_arguments(commands.add_parser("predict", help="label pictures"))
    commands.add_parser("train", add_help=False, help="train by a recipe, on one processor or, under torchrun, on many")
    commands.add_parser(
        "evaluate", add_help=False, help="mIoU, mAcc and aAcc of a trained network, by a recipe's protocol"
    )
    convert.add_arguments(
        commands.add_parser("convert", help="checkpoints of other libraries to ours, and ours to theirs")
    )
    export.add_arguments(commands.add_parser("export", help="a network as ONNX, torch.export or AOTInductor files"))
    _add_scenes_arguments(commands.add_parser("scenes", help="draw a dataset to try the rest on"))
    commands.add_parser("doctor", help="print versions, hardware and backends, for a bug report")
    if argv and argv[0] in ("train", "evaluate"):  # recipes have a parser of their own
        return (_train if argv[0] == "train" else _evaluate)(argv[1:])
    args = parser.parse_args(argv)
    if args.command == "doctor":
        print("\n".join(report()))
        return 0
    _log_to_the_terminal(logging.WARNING)
    runs = {"scenes": _scenes, "predict": _predict, "convert": convert.run, "export": export.run}
    return runs[args.command](args)


def _log_to_the_terminal(level: int = logging.INFO) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _train(argv: Sequence[str]) -> int:
    """Train; the exit status.

    0; 1 where a loss was not finite, or a validation failed of a training that is whole; 2 where nothing could start or go
    on; 130 and 143 where Ctrl-C or SIGTERM ended it, after saving.
    """
    _log_to_the_terminal()
    try:
        from . import arguments, train
    except ImportError as error:
        say(f"pspnet-fast train: {error}", sys.stderr)
        return 2
    try:
        recipe, run = arguments.parse("pspnet-fast train", argv, train.Run, "Train PSPNet by a recipe.")
        result = train.train(recipe, run)
    except (ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
        say(f"pspnet-fast train: {error or type(error).__name__}", sys.stderr)
        return 1 if isinstance(error, train.TrainingError) else 2
    except KeyboardInterrupt:
        say("pspnet-fast train: ended by Ctrl-C; --resume auto goes on from the last snapshot", sys.stderr)
        return 130
    if result.signal is not None and not result.finished:
        name = "Ctrl-C" if result.signal == signal.SIGINT else "SIGTERM"
        say(
            f"pspnet-fast train: ended by {name} after iteration {result.iteration}, which is saved; --resume auto goes on",
            sys.stderr,
        )
        return 128 + result.signal
    if result.failed:
        iteration, reason = result.failed[-1]
        say(
            f"pspnet-fast train: all {result.iteration} iterations are done and saved, but {len(result.failed)} of the "
            f"validations failed, the last at iteration {iteration}: {reason}; --resume auto repeats that of the end",
            sys.stderr,
        )
        return 1
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    """Exit status 0; 2 where nothing could start or go on, or what was found and printed cannot be written."""
    _log_to_the_terminal()
    try:
        from . import arguments, config, evaluate, placement
        from .data.datasets import check_dataset
        from .distributed import processes

        words = "Evaluate a trained network by a recipe's protocol."
        recipe, settings = arguments.parse("pspnet-fast evaluate", argv, arguments.Evaluating, words)
        if settings.json is not None:
            lists = [path for path in (recipe.train_list, recipe.val_list) if path is not None]
            check_target(settings.json, sources=[settings.weights, *map(Path, argv[:1]), *lists])
        protocol = config.protocol_of(recipe)._replace(batch_size=settings.windows)
        check_protocol(protocol, lambda name: "--windows" if name == "batch_size" else _option(name))
        net, recipe = config.trained_network(settings.weights, recipe)
        _check_channels(net, settings.weights)
        dataset = config.dataset_of(recipe, settings.split, settings.skip_corrupt)
        dataset = dataset._replace(samples=dataset.samples[: settings.images])
        device = placement.device_of(settings.device)
        found: list[evaluate.Evaluation] = []

        def report(result: evaluate.Evaluation) -> None:
            found.append(result)
            for sentence in result.skipped:
                say(f"pspnet-fast evaluate: skipped: {sentence}", sys.stderr)
            say(evaluate.table(result))
            sys.stdout.flush()

        with processes(device) as ours:
            if settings.check_data and ours.first:
                check_dataset(dataset, 4)
            device = ours.device(device)
            net = placement.placed(net, device, settings.channels_last)
            try:
                with placement.autocast(device, settings.precision):
                    evaluate.evaluate(
                        net,
                        dataset,
                        protocol,
                        device=device,
                        absent=recipe.absent,
                        output=settings.output,
                        predictions=settings.predictions,
                        skip_corrupt=settings.skip_corrupt,
                        progress=True,
                        rank=ours.rank,
                        world_size=ours.world_size,
                        report=report,
                    )
            finally:  # one file that cannot be written is no reason to lose the other
                if found and settings.json is not None:
                    evaluate.write_json(found[0], settings.json)
    except BrokenPipeError:  # nobody reads the table: no sentence will be read, either
        raise
    except (ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
        say(f"pspnet-fast evaluate: {error}", sys.stderr)
        return 2
    return 0


def _add_scenes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder, which gets ADE20K's layout")
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="training images, a million at most; a fifth as many validate (default 1000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes (default 0)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(192, 144), metavar=("WIDTH", "HEIGHT"), help="in pixels, from 48 to 2048"
    )


def _scenes(args: argparse.Namespace) -> int:
    try:
        from .data.scenes import write_scenes

        write_scenes(args.folder, args.images, args.seed, *args.size)
    except (ImportError, OSError, ValueError) as error:
        say(f"pspnet-fast scenes: {error}", sys.stderr)
        return 2
    say(f"{args.images} scenes to train on and {max(1, args.images // 5)} to validate, in {args.folder}")
    return 0


def _add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pictures",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="files of any format that is read, or folders of JPEG and PNG files",
    )
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint of PSPNet, ours or semseg's")
    weights.add_argument("--random-weights", action="store_true", help="an untrained network, to try the command")
    of_training = "; of a snapshot of a training, what it was trained with"
    dataset = f"names and colours of the classes (default ade20k{of_training})"
    parser.add_argument("--dataset", choices=sorted(CLASSES), help=dataset)
    parser.add_argument("--layers", type=int, default=50, help=f"depth of the ResNet (default 50{of_training})")

    def between(name: str) -> str:
        return "from {} to {}".format(*BOUNDS[name])

    crop = f"side of the sliding windows, {between('crop')} (default 473, cityscapes 713)"
    parser.add_argument("--crop", type=int, help=crop)
    parser.add_argument("--whole", action="store_true", help="show whole pictures, at their own size, without windows")
    base_size = f"long side at scale 1, {between('base_size')} (default 512, cityscapes 2048)"
    parser.add_argument("--base-size", type=int, help=base_size)
    scales = "averaged over, such as 0.5 1 1.5; from {:g} to {:g}".format(*SCALES)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help=scales)
    parser.add_argument("--flip", action="store_true", help="average with the mirrored picture")
    batch_size = f"windows at a time, {between('batch_size')} (default 4)"
    parser.add_argument("--batch-size", type=int, default=4, help=batch_size)
    parser.add_argument("--max-pixels", type=int, default=10**8, help="of a picture; larger ones fail (default 10**8)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ..."
    )


def _predict(args: argparse.Namespace) -> int:
    """Exit status 0; 1 where pictures failed (named, the rest is done); 2 where nothing could start.

    Of several processes the first alone prints what failed, and ends with 1: torchrun stops the others when one ends so, and
    must not stop the one that prints.
    """
    try:
        from . import predict
        from .distributed import processes

        _check_predict_arguments(args)
        with processes(torch.device(args.device)) as ours:
            args.device = ours.device(torch.device(args.device))
            paths = predict.pictures_of(args.pictures, args.output)
            predict.make_folder(args.output)
            net, classes, crop, base_size = _network(args)
            _check_channels(net, args.weights)
            protocol = _protocol(args, args.crop or crop, base_size)
            check_protocol(protocol, _option)
            if args.random_weights and ours.first:
                say("pspnet-fast predict: the network is untrained, its labels mean nothing", sys.stderr)
            failed = predict.predict_files(
                net,
                paths,
                args.output,
                classes,
                protocol,
                args.max_pixels,
                rank=ours.rank,
                world_size=ours.world_size,
            )
    except (ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
        say(f"pspnet-fast predict: {error}", sys.stderr)
        return 2
    if not ours.first:
        return 0
    for sentence in failed:
        say(f"pspnet-fast predict: {sentence}", sys.stderr)
    say(f"{len(paths) - len(failed)} of {len(paths)} pictures predicted, in {args.output}")
    return 1 if failed else 0


def _protocol(args: argparse.Namespace, crop: int | None, base_size: int | None) -> Protocol:
    return Protocol(
        crop=None if args.whole else crop,
        base_size=args.base_size or (None if args.whole else base_size),
        scales=tuple(args.scales),
        flip=args.flip,
        batch_size=args.batch_size,
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_channels(net: PSPNet, weights: Path | None) -> None:
    """ValueError where the first convolution takes something else than red, green and blue."""
    from . import predict

    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    predict.check_channels(first.in_channels, str(weights))


def _network(args: argparse.Namespace) -> tuple[PSPNet, Classes, int, int | None]:
    """What predicts: the network, its classes, and the sides of windows and pictures that suit it."""
    from . import predict

    content = None if args.weights is None else read_checkpoint(args.weights)
    if content is not None and "recipe" in content:
        from . import config

        net, recipe = config.snapshot_network(content, str(args.weights))
        classes = recipe.class_table()
        if args.dataset is not None and recipe.dataset == "list":  # as converted checkpoints say, which know no names
            named = CLASSES[args.dataset]
            if len(named.names) != len(classes.names):
                raise ValueError(
                    f"--dataset {args.dataset} has {len(named.names)} classes, {args.weights} {len(classes.names)}"
                )
            classes = named
        return net.to(args.device), classes, recipe.crop, recipe.base_size
    dataset = args.dataset or "ade20k"
    classes = CLASSES[dataset]
    torch.manual_seed(0)  # --random-weights gives the same noise every time
    net = predict.load_network(args.weights, args.layers, len(classes.names), content).to(args.device)
    return net, classes, CROPS[dataset], BASE_SIZES[dataset]


def _check_predict_arguments(args: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    given = Protocol(args.crop, args.base_size, tuple(args.scales), batch_size=args.batch_size)
    check_protocol(given, _option)
    if args.max_pixels < 1:
        raise ValueError(f"--max-pixels must be at least 1, got {args.max_pixels}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch {torch.__version__} finds no CUDA GPU here")


def report() -> Iterator[str]:
    """What `pspnet-fast doctor` prints: versions, what was built, the hardware, and which backend each op would take."""
    from importlib import metadata

    from . import __version__, backends

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    yield f"pspnet_fast  {__version__}"
    yield f"Python       {platform.python_version()} on {platform.platform()}"
    yield f"torch        {torch.__version__}, CUDA {torch.version.cuda or 'not compiled in'}"
    yield f"triton       {version('triton')}{', interpreted' if backends.interpreted() else ''}"
    yield f"numpy        {version('numpy')}"
    missing = backends.load_extension()
    if missing:
        yield f"extension    {missing}"
        capability = torch.backends.cpu.get_cpu_capability()
        yield f"CPU          {torch.get_num_threads()} threads, {capability}"
    else:
        native = torch.ops.pspnet_fast_native
        yield f"extension    built, CUDA code for {native.cuda_architectures() or 'no architecture'}"
        yield f"CPU          {torch.get_num_threads()} threads, kernels for {native.cpu_capability()}"
    devices = ["cpu"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield (
            f"GPU {i}        {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
        devices = ["cpu", "cuda"]
    for device in devices:
        yield f"\nOps on float32 {device} tensors"
        for op in backends.ops():
            yield backends.describe(op, torch.empty(1, 1, 1, 1, device=device))


if __name__ == "__main__":
    sys.exit(main())
