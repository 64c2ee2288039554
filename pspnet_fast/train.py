"""Train PSPNet by a recipe: one process, or any number of them under torchrun.

SGD with momentum, the "poly" learning rate, pyramid and classifiers at ten times the backbone's rate, cross entropy plus
`aux_weight` times the auxiliary head's (Zhao et al., CVPR 2017, sections 3.3 and 5.1; hszhao/semseg, tool/train.py).

A run is a function of its settings: the batch of an iteration, its augmentation and its dropout are seeded with (seed,
iteration), so a run that was killed and resumed ends with the weights of one that was not, to the bit on the same machine.
`pspnet-fast train` is its command line. Past 300 lines, because settings, step, validation and log are read as one loop.

A snapshot is saved before the validation at its iteration, and once more with the scores after it. The first says that the
validation is due, and a run that goes on from it begins with that: nothing that happens in a validation costs a training.
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
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import run_folder, snapshot
from .charts import learning_curve
from .config import LARGE, MANY, ConfigError, Recipe, check_between, dataset_of, plain, protocol_of
from .data.datasets import IGNORED, check_dataset, read_image
from .data.loader import Batch, Samples, Steps, batches, loader
from .determinism import determinism, seed_step
from .distributed import Processes, processes, together
from .evaluate import Evaluation, evaluate
from .extras import install
from .models.pspnet import TrainingOutput
from .nn.sync_batch_norm import convert_sync_batch_norm
from .placement import Precision, autocast, device_of, placed
from .predict import overlay, predict_labels, save, to_pixels
from .schedule import iterations_of, learning_rate, optimizer
from .schema import shown
from .signals import Left, Stop

try:
    from PIL import Image
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"training needs Pillow and tqdm ({error}): {install('train')}") from error

_LOG = logging.getLogger(__name__)

SHOWN = 4  # pictures of predictions
# Settings of a run that weights depend on to the bit.
_EXACT = ("seed", "precision", "channels_last", "compile", "accumulate", "clip_norm", "sync_bn", "deterministic")
# torch 2.13 has another name for it.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_SENDS_BUFFERS = "forward_sync_buffers" if _NEW_NAME else "broadcast_buffers"


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says at which iteration, and why."""


@dataclass(frozen=True)
class Run:
    """How a recipe is carried out.

    Args:
        output: folder of snapshots, log (train.log) and TensorBoard files: of this training alone.
        seed: of weights, order, augmentation and dropout.
        deterministic: refuse every operation that does not repeat to the bit, on a GPU too.
        resume: "auto" goes on from the newest whole snapshot in `output`, if there is one; or the path of a snapshot.
        checkpoint_every: iterations between snapshots; there is one before every validation, too.
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
        check_between(self, 1, MANY, "checkpoint_every", "validate_every", "validate_images", "log_every")
        check_between(self, 1, 2**16, "accumulate")
        check_between(self, 0, 512, "workers")
        check_between(self, 0, 2**63 - 1, "seed")
        if self.clip_norm is not None and not 0 < self.clip_norm <= LARGE:
            raise ConfigError(f"clip_norm must be positive and at most {LARGE}, got {shown(self.clip_norm)}")


class Result(NamedTuple):
    """What a run ends with.

    Attributes:
        iteration: steps done, in all.
        finished: whether that is all of them, with the validation at the end; else a signal ended the run.
        evaluation: the last validation, if there was one.
        losses: (iteration, loss) of every line of the log; the mean over the iterations since the last, without the auxiliary
            loss.
        scores: (iteration, mIoU) of every validation.
        failed: (iteration, reason) of every validation of this run that failed.
        signal: SIGTERM or SIGINT, where one ended the run.
    """

    iteration: int
    finished: bool
    evaluation: Evaluation | None
    losses: list[tuple[int, float]]
    scores: list[tuple[int, float]]
    failed: list[tuple[int, str]]
    signal: int | None


def train(recipe: Recipe, run: Run) -> Result:
    """Train, validate and write snapshots, until the last iteration or SIGTERM.

    Returns:
        How it went. `output` then holds last.pth, previous.pth, best.pth of the best validation, train.log and
        learning_curve.png. A validation that fails is logged, kept in the result, and ends nothing.

    Raises:
        ConfigError: settings that cannot work. DatasetError: data that is not as it must be. CheckpointError: a snapshot of
            another network, or damaged. SnapshotError: one cannot be written, or `output` is another training's.
            TrainingError: a loss is not finite. ProcessError: in the processes that did not fail, where one did.
    """
    device = device_of(run.device)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(processes(device))
        lines = _LOG  # only the first process writes a log
        with together(ours.world_size):  # before data and network: nothing can be kept where the folder is not right
            if ours.first:
                lines = stack.enter_context(run_folder.opened(run.output, run.resume))
        stack.enter_context(determinism(run.deterministic))
        return _Training(recipe, run, ours.device(device), ours, lines).run()


class _Training:
    def __init__(self, recipe: Recipe, run: Run, device: torch.device, ours: Processes, lines: logging.Logger) -> None:
        self.recipe, self.settings, self.device, self.ours, self.lines = recipe, run, device, ours, lines
        parts = ours.world_size * run.accumulate
        if recipe.batch_size % parts:
            raise ConfigError(
                f"batch_size must be a multiple of {ours.world_size} processes times accumulate = {run.accumulate}, "
                f"got {recipe.batch_size}"
            )
        self.data = dataset_of(recipe, "train", run.skip_corrupt)
        self.validation = dataset_of(recipe, "val", run.skip_corrupt)
        if run.validate_images is not None:
            self.validation = self.validation._replace(samples=self.validation.samples[: run.validate_images])
        with together(ours.world_size):
            if run.check_data and ours.first:
                for dataset in (self.data, self.validation):
                    check_dataset(dataset, max(1, run.workers))
        self.iterations = iterations_of(recipe, len(self.data.samples))
        if ours.first:
            for dataset in (self.data, self.validation):
                self._say("%s: %s", dataset.split, dataset.source)

        torch.manual_seed(run.seed)
        self.net = placed(recipe.network(), device, run.channels_last)
        self.optimizer = optimizer(self.net, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []
        self.failed: list[tuple[int, str]] = []
        self.evaluation: Evaluation | None = None
        self.first, self.best, self.due, self.skipped, self.elsewhere = 0, -math.inf, False, False, False
        self._resume()
        self.model = self._wrapped()
        self.board = self._open_board() if run.tensorboard and ours.first else None

    def _say(self, words: str, *values: object) -> None:
        """A line of train.log, and of the terminal where logging is set up to show such."""
        (_LOG if _LOG.isEnabledFor(logging.INFO) else self.lines).info(words, *values)

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
            self.skipped = bool(skipped)
            for sentence in skipped if self.ours.first else ():
                _LOG.warning("skipped a snapshot: %s", sentence)
        else:
            path = Path(wanted)
            content = snapshot.read(path)
        self.elsewhere = path.resolve() != (self.settings.output / snapshot.LAST).resolve()
        snapshot.check_same_training(content, self.recipe, path)
        self.net.load_state_dict(content["model"])
        snapshot.load_optimizer(content["optimizer"], self.optimizer, path)
        if content["scaler"]:  # empty where the run before had no scaled loss
            snapshot.load_scaler(content["scaler"], self.scaler, path)
        self.first, self.best = content["iteration"], content.get("best", -math.inf)
        self.due = content.get("validation_due", False)
        self.losses, self.scores = (
            [(int(i), float(v)) for i, v in content.get(key, ())] for key in ("losses", "scores")
        )
        if self.first > self.iterations:
            raise ConfigError(f"{path}: has {self.first} iterations, more than the {self.iterations} of this run")
        changed = snapshot.changes(content, self.recipe, self._circumstances())
        if self.ours.first:
            if changed:
                _LOG.warning("not to the bit what it would have been without the break: %s", ", ".join(changed))
            self._say("resumed from %s, iteration %d of %d", path, self.first, self.iterations)

    def run(self) -> Result:
        recipe, settings = self.recipe, self.settings
        samples = Samples(self.data, recipe.crop, recipe.augmentation, settings.seed, settings.skip_corrupt)
        steps = Steps(
            self.first, self.iterations, recipe.batch_size, settings.accumulate, self.ours.rank, self.ours.world_size
        )
        self.samples, self.steps = samples, steps
        shown, total = self.ours.first, self.iterations
        bar = tqdm(desc="train", total=total, initial=self.first, unit="it", disable=not shown, smoothing=0.1)
        done, pending, number = self.first, [], 0
        alone = self.ours.world_size == 1
        self.model.train()
        with contextlib.ExitStack() as stack:
            if self.board is not None:
                stack.callback(self.board.close)
            stop = self.stop = stack.enter_context(Stop(self.ours.first))
            stack.enter_context(contextlib.closing(bar))
            if self.elsewhere and (self.due or done == self.iterations):  # what is called saved is in this folder
                self._save(done)
            if self.due:  # before any worker starts
                number = self._validate(done)
            following = stack.enter_context(batches(loader(samples, steps, settings.workers, self.device)))
            self.since = time.perf_counter()
            for iteration in range(self.first, self.first if number else self.iterations):
                pending.append(self._step(iteration, following))
                done = iteration + 1
                bar.update()
                last = done == self.iterations
                self.due = last or (settings.validate_every is not None and done % settings.validate_every == 0)
                saves = self.due or done % settings.checkpoint_every == 0
                if saves or done % settings.log_every == 0 or (alone and stop.asked):
                    number = self._look(done, pending, stop, bar)
                    pending = []
                if saves or number:
                    self._save(done)
                if self.due and not number:
                    number = self._validate(done)
                if number:
                    break
        if self.ours.first:
            by = f", ended by {signal.Signals(number).name}" if number else ""
            self.lines.info("%d of %d iterations are done and saved%s", done, self.iterations, by)
            save(learning_curve(self.losses, self.scores), settings.output / "learning_curve.png")
        finished = done == self.iterations and not (self.due and number)
        return Result(done, finished, self.evaluation, self.losses, self.scores, self.failed, number or None)

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

    def _look(self, done: int, pending: Sequence[torch.Tensor], stop: Stop, bar: tqdm[Any]) -> int:
        """Log the steps since the last look. All processes come here together.

        Returns:
            The signal that asked any of them to stop, or 0.

        Raises:
            TrainingError: in every process, where a loss was not finite in any.
        """
        losses = torch.stack([*pending]) if pending else torch.zeros(0, 2, device=self.device)
        interrupted = stop.asked and stop.number == signal.SIGINT
        shared = torch.cat([losses.flatten(), losses.new_tensor([float(stop.asked), float(interrupted)])])
        if self.ours.world_size > 1:
            dist.all_reduce(shared)
        values = shared[:-2].view(-1, 2).double().cpu() / self.ours.world_size
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
            line = f"loss {main:.3f}, aux {aux:.3f}, lr {lr:.2g}, {rate:.1f} images/s"
            bar.set_postfix_str(line)
            self.lines.info("iteration %d: %s", done, line)
            if self.board is not None:
                for name, value in (("loss", main), ("aux_loss", aux), ("learning_rate", lr), ("images_per_s", rate)):
                    self.board.add_scalar(f"train/{name}", value, done)
        if not shared[-2]:
            return 0
        return signal.SIGINT if shared[-1] else signal.SIGTERM

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

    def _validate(self, done: int) -> int:
        """Score the network as it is after `done` iterations, of which last.pth is; it gets the scores, too.

        Returns:
            The signal that came meanwhile and ended it, or 0.
        """
        alone = self.ours.world_size == 1  # else the others would wait for this process
        self.net.eval()
        try:
            with self.stop.at_once() if alone else contextlib.nullcontext(), together(self.ours.world_size):
                found = self._evaluate()
                if self.board is not None:
                    self._show(self.board, found, done)
        except Left:
            return self.stop.number
        except Exception as error:  # of whatever kind: hours of training are worth more than one validation
            self.failed.append((done, f"{type(error).__name__}: {error}"))
            if self.ours.first:
                _LOG.error("iteration %d: the validation failed, the training is kept: %s", *self.failed[-1])
            return 0
        finally:
            self.net.train()
        self.evaluation, self.due = found, False
        scores = found.scores
        self.scores.append((done, scores.miou))
        better = scores.miou > self.best
        self.best = scores.miou if better else self.best
        with together(self.ours.world_size):
            if self.ours.first:
                self._say("iteration %d: mIoU %.4f, mAcc %.4f, aAcc %.4f", done, scores.miou, scores.macc, scores.aacc)
                if self.board is not None:
                    for name in ("miou", "macc", "aacc"):
                        self.board.add_scalar(f"validation/{name}", getattr(scores, name), done)
                if better:
                    snapshot.save(self._content(done), self.settings.output / snapshot.BEST)
                # In place of the one without scores; the one before it stays.
                snapshot.save(self._content(done), self.settings.output / snapshot.LAST)
        return 0

    def _evaluate(self) -> Evaluation:
        with autocast(self.device, self.settings.precision):
            return evaluate(
                self.net,
                self.validation,
                protocol_of(self.recipe),
                device=self.device,
                absent=self.recipe.absent,
                rank=self.ours.rank,
                world_size=self.ours.world_size,
                skip_corrupt=self.settings.skip_corrupt,
            )

    def _show(self, board: Any, found: Evaluation, done: int) -> None:
        """Predictions of the first images that were evaluated, coloured over the images, for TensorBoard."""
        for i, evaluated in enumerate(found.images[:SHOWN]):
            picture = Image.fromarray(read_image(evaluated.image))
            with autocast(self.device, self.settings.precision):
                labels = predict_labels(self.net, to_pixels(picture, self.device), protocol_of(self.recipe))
            drawn = np.asarray(overlay(picture, labels, self.validation.classes))
            board.add_image(f"predictions/{i}", drawn, done, dataformats="HWC")

    def _save(self, done: int) -> None:
        """All processes come here together, and end together where it fails."""
        with together(self.ours.world_size):
            if self.ours.first:
                last, previous = (self.settings.output / name for name in (snapshot.LAST, snapshot.PREVIOUS))
                if self.skipped and last.exists():  # or it would take the place of the one that this run goes on from
                    os.replace(last, self.settings.output / snapshot.SKIPPED)
                self.skipped = False
                snapshot.save(self._content(done), last, previous)

    def _content(self, done: int) -> dict[str, Any]:
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": done,
            "best": self.best,
            "losses": self.losses,
            "scores": self.scores,
            "validation_due": self.due,
            "recipe": plain(self.recipe),
            **self._circumstances(),
        }

    def _circumstances(self) -> dict[str, Any]:
        """What weights depend on to the bit, beside the recipe."""
        on_gpu = self.device.type == "cuda"
        capability = torch.backends.cpu.get_cpu_capability()
        return {
            "run": {name: getattr(self.settings, name) for name in _EXACT},
            "images": len(self.data.samples),
            "processes": self.ours.world_size,
            "threads": torch.get_num_threads(),
            "machine": torch.cuda.get_device_name(self.device) if on_gpu else f"CPU with {capability}",
            "torch": str(torch.__version__),
        }

    def _open_board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"tensorboard is not installed ({error}): {install('tensorboard')}") from error
        return SummaryWriter(str(self.settings.output), purge_step=self.first + 1)
