"""Train PSPNet by a recipe: one process, or any number of them under torchrun.

SGD with momentum, the "poly" learning rate, pyramid and classifiers at ten times the backbone's rate, cross entropy plus
`aux_weight` times the auxiliary head's (Zhao et al., CVPR 2017, sections 3.3 and 5.1; hszhao/semseg, tool/train.py).

A run is a function of its settings: the batch of an iteration, its augmentation and its dropout are seeded with (seed,
iteration), so a run that was killed and resumed ends with the weights of one that was not, to the bit on the same machine.
`pspnet-fast train` is its command line. Past 300 lines, because settings, step, validation and log are read as one loop.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import snapshot
from .charts import learning_curve
from .config import ConfigError, Recipe, check_at_least, dataset_of, differing_settings, plain, protocol_of, recipe_of
from .data.datasets import IGNORED, check_dataset, read_image
from .data.loader import Batch, Samples, Steps, loader
from .distributed import Processes, processes
from .evaluate import Evaluation, evaluate
from .models.checkpoint import CheckpointError
from .models.pspnet import PSPNet, TrainingOutput
from .nn.sync_batch_norm import convert_sync_batch_norm
from .placement import Precision, autocast, device_of, placed
from .predict import overlay, predict_labels, save, to_pixels

try:
    from PIL import Image
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"training needs Pillow and tqdm ({error}): pip install 'pspnet_fast[train]'") from error

_LOG = logging.getLogger(__name__)

SHOWN = 4  # pictures of predictions
# Settings of a run that weights depend on to the bit.
_EXACT = ("seed", "precision", "channels_last", "compile", "accumulate", "clip_norm", "sync_bn")
# torch 2.13 has another name for it.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_SENDS_BUFFERS = "forward_sync_buffers" if _NEW_NAME else "broadcast_buffers"


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says at which iteration, and why."""


@dataclass(frozen=True)
class Run:
    """How a recipe is carried out.

    Args:
        output: folder of snapshots, log and TensorBoard files.
        seed: of weights, order, augmentation and dropout.
        deterministic: refuse every operation that does not repeat to the bit, on a GPU too.
        resume: "auto" goes on from the newest whole snapshot in `output`, if there is one; or the path of a snapshot.
        checkpoint_every: iterations between snapshots.
        validate_every: iterations between validations; null validates at the end alone.
        validate_images: how many images a validation takes; null takes all.
        log_every: iterations between lines of the log; in several processes also between looks at SIGTERM.
        workers: processes that read and vary images, for each training process; 0 does it in the training process.
        precision: "fp32", or autocast to "bf16" or "fp16", the latter with a scaled loss.
        channels_last: memory format of images and weights.
        compile: whether torch.compile compiles the network.
        accumulate: micro-batches that a step of one process is cut into; batch statistics are then a micro-batch's.
        clip_norm: largest norm of all gradients together; null does not clip.
        sync_bn: whether batch norms take the statistics of all processes.
        tensorboard: whether TensorBoard files are written: losses, learning rate, mIoU, pictures of predictions.
        device: "cpu", "cuda" or "cuda:1"; null takes CUDA where it is.
        check_data: read every file of the data before training starts.
        skip_corrupt: where an image cannot be read, name it and take the next.
    """

    output: Path = Path("runs")
    seed: int = 0
    deterministic: bool = False
    resume: str | None = None
    checkpoint_every: int = 1000
    validate_every: int | None = None
    validate_images: int | None = None
    log_every: int = 10
    workers: int = 4
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    sync_bn: bool = True
    tensorboard: bool = False
    device: str | None = None
    check_data: bool = False
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "checkpoint_every", "validate_every", "validate_images", "log_every", "accumulate")
        check_at_least(self, 0, "workers", "seed")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be positive, got {self.clip_norm}")


class Result(NamedTuple):
    """What a run ends with.

    Attributes:
        iteration: steps done, in all.
        finished: whether that is all of them; else SIGTERM or SIGINT ended the run.
        evaluation: the last validation, if there was one.
        losses: (iteration, loss) of every line of the log; the mean over the iterations since the last, without the auxiliary
            loss.
        scores: (iteration, mIoU) of every validation.
    """

    iteration: int
    finished: bool
    evaluation: Evaluation | None
    losses: list[tuple[int, float]]
    scores: list[tuple[int, float]]


def learning_rate(recipe: Recipe, iteration: int, iterations: int) -> float:
    """base_lr * (1 - iteration / iterations) ** power, the backbone's rate in step `iteration`, counted from 0.

    Over the first `warmup` iterations it is multiplied with (iteration + 1) / warmup.
    """
    rising = min(1.0, (iteration + 1) / recipe.warmup) if recipe.warmup else 1.0
    return float(recipe.base_lr * (1 - iteration / iterations) ** recipe.power * rising)


def parameter_groups(net: PSPNet, recipe: Recipe) -> list[dict[str, Any]]:
    """The backbone's parameters, and the others with `factor` 10 (`head_lr_factor`)."""
    backbone = ("layer0.", "layer1.", "layer2.", "layer3.", "layer4.", "backbone.")
    named = [*net.named_parameters()]
    of_backbone = [p for name, p in named if name.startswith(backbone)]
    of_head = [p for name, p in named if not name.startswith(backbone)]
    return [{"params": of_backbone, "factor": 1.0}, {"params": of_head, "factor": recipe.head_lr_factor}]


def optimizer(net: PSPNet, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's, over `parameter_groups`."""
    groups, rate, decay = parameter_groups(net, recipe), recipe.base_lr, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=(recipe.momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, weight_decay=decay)


def iterations_of(recipe: Recipe, images: int) -> int:
    """Steps of the whole training; epochs are rounded up to whole batches.

    Raises:
        ConfigError: neither or both of iterations and epochs are given.
    """
    if (recipe.iterations is None) == (recipe.epochs is None):
        raise ConfigError(f"give iterations or epochs, got {recipe.iterations} and {recipe.epochs}")
    return recipe.iterations or math.ceil(cast(int, recipe.epochs) * images / recipe.batch_size)


def train(recipe: Recipe, run: Run) -> Result:
    """Train, validate and write snapshots, until the last iteration or SIGTERM.

    Returns:
        How it went. `output` then holds last.pth, previous.pth, best.pth of the best validation, and learning_curve.png.

    Raises:
        ConfigError: settings that cannot work. DatasetError: data that is not as it must be. CheckpointError: a snapshot of
            another network, or damaged. SnapshotError: one cannot be written. TrainingError: a loss is not finite.
    """
    device = device_of(run.device)
    with processes(device) as ours, _determinism(run.deterministic):
        return _Training(recipe, run, ours.device(device), ours).run()


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    tuned = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what nobody wrote (the tests fill memory with NaN), so it need not be filled.
    memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before[1], tuned


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """All of torch's chance in one step of one process, dropout above all: as good as saving every generator's state."""
    mixed = np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0] >> np.uint64(1)))


class _Stop:
    """SIGTERM and SIGINT ask for an end after the step; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: then whoever runs that one decides
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Training:
    def __init__(self, recipe: Recipe, run: Run, device: torch.device, ours: Processes) -> None:
        self.recipe, self.settings, self.device, self.ours = recipe, run, device, ours
        parts = ours.world_size * run.accumulate
        if recipe.batch_size % parts:
            raise ConfigError(
                f"batch_size must be a multiple of {ours.world_size} processes times accumulate = {run.accumulate}, "
                f"got {recipe.batch_size}"
            )
        self.data = dataset_of(recipe, "train")
        self.validation = dataset_of(recipe, "val")
        if run.validate_images is not None:
            self.validation = self.validation._replace(samples=self.validation.samples[: run.validate_images])
        if run.check_data and ours.first:
            for dataset in (self.data, self.validation):
                check_dataset(dataset, max(1, run.workers))
        self.iterations = iterations_of(recipe, len(self.data.samples))
        if ours.first:
            for dataset in (self.data, self.validation):
                _LOG.info("%s: %s", dataset.split, dataset.source)
            run.output.mkdir(parents=True, exist_ok=True)

        torch.manual_seed(run.seed)
        self.net = placed(recipe.network(), device, run.channels_last)
        self.optimizer = optimizer(self.net, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.first, self.best = 0, -math.inf
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []
        self.evaluation: Evaluation | None = None
        self._resume()
        self.model = self._wrapped()
        self.board = self._open_board() if run.tensorboard and ours.first else None

    def _wrapped(self) -> nn.Module:
        model: nn.Module = self.net
        self.parallel: DistributedDataParallel | None = None
        if self.ours.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # Synchronised norms have the same statistics everywhere; without, those of the first process are sent round.
            same = self.settings.sync_bn
            sends: dict[str, Any] = {_SENDS_BUFFERS: not same}
            model = self.parallel = DistributedDataParallel(model, ids, gradient_as_bucket_view=True, **sends)
            if same:
                convert_sync_batch_norm(self.net)
        if self.settings.compile:
            model = cast(nn.Module, torch.compile(model))
        return model

    def _resume(self) -> None:
        wanted = self.settings.resume
        if wanted is None:
            return
        if wanted == "auto":
            found = snapshot.latest(self.settings.output)
            if found is None:
                return
            path, content, skipped = found
            for sentence in skipped:
                _LOG.warning("skipped a snapshot: %s", sentence)
        else:
            path = Path(wanted)
            content = snapshot.read(path)
        differing = differing_settings(self.recipe, content["recipe"])
        saved = recipe_of(content["recipe"])
        if saved.optimizer != self.recipe.optimizer:
            differing.append(f"optimizer {saved.optimizer} instead of {self.recipe.optimizer}")
        if (saved.aux_weight > 0) != (self.recipe.aux_weight > 0):
            differing.append(f"aux_weight {saved.aux_weight} instead of {self.recipe.aux_weight}")
        if differing:
            raise CheckpointError(f"{path}: is a snapshot of another training: {', '.join(differing)}")
        self.net.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.first, self.best = content["iteration"], content["best"]
        self.losses, self.scores = ([(int(i), float(v)) for i, v in content[key]] for key in ("losses", "scores"))
        if self.first > self.iterations:
            raise ConfigError(f"{path}: has {self.first} iterations, more than the {self.iterations} of this run")
        changed = [
            f"{name} {before} -> {now}"
            for name, before, now in (
                ("processes", content["processes"], self.ours.world_size),
                ("torch", content["torch"], torch.__version__),
                ("training images", content["images"], len(self.data.samples)),
                *((name, content["run"][name], getattr(self.settings, name)) for name in _EXACT),
                *((name, content["recipe"][name], value) for name, value in plain(self.recipe).items()),
            )
            if before != now and name != "data"
        ]
        if self.ours.first:
            if changed:
                _LOG.warning("not to the bit what it would have been without the break: %s", ", ".join(changed))
            _LOG.info("resumed from %s, iteration %d of %d", path, self.first, self.iterations)

    def run(self) -> Result:
        recipe, settings = self.recipe, self.settings
        samples = Samples(self.data, recipe.crop, recipe.augmentation, settings.seed, settings.skip_corrupt)
        steps = Steps(
            self.first, self.iterations, recipe.batch_size, settings.accumulate, self.ours.rank, self.ours.world_size
        )
        self.samples, self.steps = samples, steps
        batches = iter(loader(samples, steps, settings.workers, self.device))
        bar = tqdm(
            total=self.iterations,
            initial=self.first,
            unit="it",
            disable=not self.ours.first,
            desc="train",
            smoothing=0.1,
        )
        done, pending = self.first, []
        self.model.train()
        with _Stop() as stop, contextlib.closing(bar):
            self.since = time.perf_counter()
            for iteration in range(self.first, self.iterations):
                pending.append(self._step(iteration, batches))
                done = iteration + 1
                bar.update()
                alone = self.ours.world_size == 1
                last = done == self.iterations
                saves = done % settings.checkpoint_every == 0 or last
                validates = last or (settings.validate_every is not None and done % settings.validate_every == 0)
                leaves = False
                if saves or validates or done % settings.log_every == 0 or (alone and stop.asked):
                    leaves = self._look(done, pending, stop.asked, bar)
                    pending = []
                if validates:
                    self._validate(done)
                if saves or leaves:
                    self._save(done)
                if leaves:
                    break
        if self.ours.first:
            save(learning_curve(self.losses, self.scores), settings.output / "learning_curve.png")
        if self.board is not None:
            self.board.close()
        return Result(done, done == self.iterations, self.evaluation, self.losses, self.scores)

    def _step(self, iteration: int, batches: Iterator[Batch]) -> torch.Tensor:
        """One step of the optimiser; the means of main and auxiliary loss, on the device: nothing waits for a GPU here."""
        seed_step(self.settings.seed, iteration, self.ours.rank)
        rate = learning_rate(self.recipe, iteration, self.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        parts = [self._to_device(next(batches)) for _ in range(self.settings.accumulate)]
        factors = self._factors([labels for _, labels in parts])
        losses = torch.zeros(2, device=self.device)
        for i, ((images, labels), factor) in enumerate(zip(parts, factors, strict=True)):
            waits = self.parallel is not None and i < len(parts) - 1
            with cast(DistributedDataParallel, self.parallel).no_sync() if waits else contextlib.nullcontext():
                with autocast(self.device, self.settings.precision):
                    out = cast(TrainingOutput, self.model(images, labels))
                main, aux = out.main_loss * factor, out.aux_loss * factor
                self.scaler.scale(main + self.recipe.aux_weight * aux).backward()
            losses += torch.stack([main.detach(), aux.detach()]).float()
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses

    def _to_device(self, batch: Batch) -> Batch:
        images, labels = (each.to(self.device, non_blocking=True) for each in batch)
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout), labels.long()

    def _factors(self, labels: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | float]:
        """What the loss of each micro-batch is multiplied with, so that the mean over processes is the whole batch's.

        The network's losses are sums, divided here by the pixels of all micro-batches of all processes that are not
        ignored: a mean of means would weigh a pixel more where its neighbours are ignored. With mining the losses are
        means, over pixels that are known only inside the loss: then it is their mean.
        """
        if self.recipe.ohem_threshold is not None:
            return [1 / len(labels)] * len(labels)
        pixels = torch.stack([(each != IGNORED).sum() for each in labels]).sum()
        if self.ours.world_size > 1:
            dist.all_reduce(pixels)
        return [self.ours.world_size / pixels.clamp(min=1)] * len(labels)  # where all are ignored, the loss is 0

    def _look(self, done: int, pending: Sequence[torch.Tensor], asked: bool, bar: tqdm[Any]) -> bool:
        """Log the steps since the last look; whether any process was asked to stop. Every process comes here together.

        Raises:
            TrainingError: in every process, where a loss was not finite in any.
        """
        losses = torch.stack([*pending]) if pending else torch.zeros(0, 2, device=self.device)
        shared = torch.cat([losses.flatten(), losses.new_tensor([float(asked)])])
        if self.ours.world_size > 1:
            dist.all_reduce(shared)
        values = shared[:-1].view(-1, 2).double().cpu() / self.ours.world_size
        broken = (~values.isfinite()).any(1).nonzero()
        if len(broken):
            self._report(done - len(pending) + int(broken[0]), losses[int(broken[0])])
        if len(values) and self.ours.first:
            main, aux = values.mean(0).tolist()
            now = time.perf_counter()
            rate = len(values) * self.recipe.batch_size / (now - self.since)
            self.since = now
            lr = learning_rate(self.recipe, done - 1, self.iterations)
            self.losses.append((done, main))
            bar.set_postfix_str(f"loss {main:.3f}, aux {aux:.3f}, lr {lr:.2g}, {rate:.1f} images/s")
            if self.board is not None:
                for name, value in (("loss", main), ("aux_loss", aux), ("learning_rate", lr), ("images_per_s", rate)):
                    self.board.add_scalar(f"train/{name}", value, done)
        return bool(shared[-1] > 0)

    def _report(self, iteration: int, own: torch.Tensor) -> None:
        """Raise for the first loss that is not finite, with the files of the batch where it is this process's."""
        if bool(own.isfinite().all()):
            raise TrainingError(f"iteration {iteration}: the loss of another process is not finite")
        files = [str(self.samples.files(p).image) for part in self.steps.of(iteration) for p in part]
        main, aux = own.tolist()
        raise TrainingError(
            f"iteration {iteration}: the loss is not finite (main {main}, auxiliary {aux}), images {', '.join(files)}. "
            f"The last snapshot in {self.settings.output} is from before"
        )

    def _validate(self, done: int) -> None:
        self.net.eval()
        with autocast(self.device, self.settings.precision):
            self.evaluation = evaluate(
                self.net,
                self.validation,
                protocol_of(self.recipe),
                device=self.device,
                absent=self.recipe.absent,
                rank=self.ours.rank,
                world_size=self.ours.world_size,
                skip_corrupt=self.settings.skip_corrupt,
            )
        self.net.train()
        scores = self.evaluation.scores
        self.scores.append((done, scores.miou))
        if not self.ours.first:
            return
        _LOG.info("iteration %d: mIoU %.4f, mAcc %.4f, aAcc %.4f", done, scores.miou, scores.macc, scores.aacc)
        if self.board is not None:
            for name in ("miou", "macc", "aacc"):
                self.board.add_scalar(f"validation/{name}", getattr(scores, name), done)
            self._show(self.board, done)
        if scores.miou > self.best:
            self.best = scores.miou
            snapshot.save(self._content(done), self.settings.output / snapshot.BEST)

    def _show(self, board: Any, done: int) -> None:
        """Predictions of the first images that were evaluated, coloured over the images, for TensorBoard."""
        self.net.eval()
        for i, evaluated in enumerate(cast(Evaluation, self.evaluation).images[:SHOWN]):
            picture = Image.fromarray(read_image(evaluated.image))
            with autocast(self.device, self.settings.precision):
                labels = predict_labels(self.net, to_pixels(picture, self.device), protocol_of(self.recipe))
            drawn = np.asarray(overlay(picture, labels, self.validation.classes))
            board.add_image(f"predictions/{i}", drawn, done, dataformats="HWC")
        self.net.train()

    def _save(self, done: int) -> None:
        if self.ours.first:
            output = self.settings.output
            snapshot.save(self._content(done), output / snapshot.LAST, output / snapshot.PREVIOUS)

    def _content(self, done: int) -> dict[str, Any]:
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": done,
            "best": self.best,
            "losses": self.losses,
            "scores": self.scores,
            "recipe": plain(self.recipe),
            "run": {name: getattr(self.settings, name) for name in _EXACT},
            "images": len(self.data.samples),
            "processes": self.ours.world_size,
            "torch": str(torch.__version__),
        }

    def _open_board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"tensorboard is not installed ({error}): pip install 'pspnet_fast[tensorboard]'"
            ) from error
        return SummaryWriter(str(self.settings.output), purge_step=self.first + 1)
