"""How a training ends, and what is left then: every process of it has ended, and nothing is lost."""

import multiprocessing
import os
import signal
import subprocess
import time
from importlib.util import find_spec

import pytest
import torch
import trainings
from trainings import assert_same, command, in_one, in_processes, weights

from pspnet_fast import cli, snapshot, train
from pspnet_fast.config import plain
from pspnet_fast.data.datasets import DatasetError
from pspnet_fast.snapshot import BEST, LAST, PREVIOUS, SnapshotError

needs_parser = pytest.mark.skipif(find_spec("jsonargparse") is None, reason="jsonargparse is not installed")
scenes, tiny = trainings.scenes, trainings.tiny  # fixtures
SOON = 60  # seconds in which a process of a few seconds has ended, and one that hangs has not


def same_content(a, b):
    """Two snapshots, but for where they were written."""
    assert_same(a["model"], b["model"])
    keys = ("iteration", "best", "losses", "scores", "validation_due")
    assert {key: a[key] for key in keys} == {key: b[key] for key in keys}


def fails_at(monkeypatch, *iterations, error=None):
    """Validations fail, which are counted from 1."""
    real, seen = train.evaluate, []

    def evaluates(*args, **options):
        seen.append(None)
        if len(seen) in iterations:
            raise error or ValueError("images do not match")
        return real(*args, **options)

    monkeypatch.setattr(train, "evaluate", evaluates)


def test_a_failing_validation_costs_nothing(tiny, monkeypatch, caplog):
    """The training is saved and says so; resuming repeats the validation, and ends as one that did not fail."""
    recipe, whole = tiny("whole")
    train.train(recipe, whole)
    recipe, run = tiny("run", resume="auto")
    with monkeypatch.context() as patch:
        fails_at(patch, 1)
        result = train.train(recipe, run)
    assert (result.iteration, result.finished, result.evaluation) == (6, True, None)
    assert result.failed == [(6, "ValueError: images do not match")]
    assert "iteration 6: the validation failed, the training is kept: ValueError: images do not match" in caplog.text
    last = snapshot.read(run.output / LAST)
    assert (last["iteration"], last["validation_due"], last["scores"]) == (6, True, [])
    assert not (run.output / BEST).exists()
    assert_same(last["model"], weights(whole.output))
    result = train.train(recipe, run)
    assert (result.iteration, result.finished, result.failed) == (6, True, [])
    for name in (LAST, BEST, PREVIOUS):
        same_content(snapshot.read(run.output / name), snapshot.read(whole.output / name))


def test_a_validation_that_fails_in_the_middle(tiny, monkeypatch):
    recipe, whole = tiny("whole", validate_every=2, validate_images=1)
    expected = train.train(recipe, whole).scores
    recipe, run = tiny("run", validate_every=2, validate_images=1)
    fails_at(monkeypatch, 2, error=MemoryError())
    result = train.train(recipe, run)
    assert result.scores == [expected[0], expected[2]]
    assert [iteration for iteration, _ in result.failed] == [4]
    assert_same(weights(run.output), weights(whole.output))


@needs_parser
def test_a_failing_validation_is_status_1(tiny, monkeypatch, tmp_path, capsys):
    import yaml

    recipe, run = tiny(iterations=2)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**plain(recipe), **plain(run)}))
    fails_at(monkeypatch, 1)
    assert cli.main(["train", str(path)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "pspnet-fast train: all 2 iterations are done and saved, but 1 of the validations failed, the last at iteration 2: "
        "ValueError: images do not match; --resume auto repeats that of the end"
    )
    assert cli.main(["train", str(path), "--resume", "auto"]) == 0


def _fails_in_the_second(rank, world_size, port, recipe, run):
    import pspnet_fast.evaluate as evaluate

    def fails(*_):
        raise DatasetError("a.jpg: cannot be read")

    if rank == 1:
        evaluate.read_sample = fails
    done = []
    real = train.train
    train.train = lambda *args: done.append(real(*args))
    in_one(rank, world_size, port, recipe, run)
    (run.output / f"failed.{rank}").write_text(done[0].failed[0][1])


def test_a_validation_that_fails_in_one_of_two_processes(tiny):
    """Neither waits for the other."""
    recipe, run = tiny()
    in_processes(recipe, run, process=_fails_in_the_second)
    assert (run.output / "failed.1").read_text() == "DatasetError: a.jpg: cannot be read"
    assert (run.output / "failed.0").read_text() == "ProcessError: process 1: DatasetError: a.jpg: cannot be read"
    assert snapshot.read(run.output / LAST)["validation_due"] is True


def _cannot_save(rank, world_size, port, recipe, run):
    def fails(*_):
        raise SnapshotError("last.pth: cannot be written: No space left on device")

    if rank == 0:
        snapshot.save = fails
    try:
        in_one(rank, world_size, port, recipe, run)
    except (SnapshotError, RuntimeError) as error:
        (run.output / f"failed.{rank}").write_text(f"{type(error).__name__}: {error}")


def test_a_save_that_fails_ends_all_processes(tiny):
    recipe, run = tiny()
    in_processes(recipe, run, process=_cannot_save)
    words = "SnapshotError: last.pth: cannot be written: No space left on device"
    assert (run.output / "failed.0").read_text() == words
    assert (run.output / "failed.1").read_text() == f"ProcessError: process 0: {words}"


@pytest.mark.parametrize("moment", ["before the validation", "before best.pth", "before the scores are in last.pth"])
def test_killed_around_a_validation(tiny, monkeypatch, moment):
    """Weights, scores and best are those of a run that nobody disturbed."""
    options = {"validate_every": 2, "validate_images": 1}
    recipe, whole = tiny("whole", **options)
    expected = train.train(recipe, whole)
    recipe, run = tiny("run", resume="auto", **options)
    save = snapshot.save

    def dies(content, path, keep=None):
        if content["iteration"] == 2 and keep is None and path.name == (BEST if moment == "before best.pth" else LAST):
            raise KeyboardInterrupt
        save(content, path, keep)

    with monkeypatch.context() as patch:
        if moment == "before the validation":
            fails_at(patch, 1, error=KeyboardInterrupt())
        else:
            patch.setattr(snapshot, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe, run)
    last = snapshot.read(run.output / LAST)
    assert (last["iteration"], last["validation_due"]) == (2, True)
    result = train.train(recipe, run)
    assert result.scores == expected.scores
    for name in (LAST, PREVIOUS, BEST):
        same_content(snapshot.read(run.output / name), snapshot.read(whole.output / name))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_validation(tiny, monkeypatch, number):
    """It is left at once: it may last for hours, and what it scores is saved. Resuming begins with it."""
    recipe, whole = tiny("whole", validate_images=1)
    expected = train.train(recipe, whole).scores
    recipe, run = tiny("run", resume="auto", validate_images=1)

    def waits(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(SOON)
        raise AssertionError("nobody ended the validation")

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", waits)
        for _ in range(2):  # also in the validation that a resumed run begins with
            result = train.train(recipe, run)
            assert (result.iteration, result.finished, result.signal, result.failed) == (6, False, number, [])
            assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    result = train.train(recipe, run)
    assert (result.finished, result.scores) == (True, expected)


def test_a_signal_in_a_validation_between_two_snapshots(tiny, monkeypatch):
    """Nothing is lost by it: a validation has a snapshot before it, whatever `checkpoint_every` is."""
    options = {"checkpoint_every": 100, "validate_every": 3, "validate_images": 1}
    recipe, whole = tiny("whole", **options)
    expected = train.train(recipe, whole).scores
    recipe, run = tiny("run", resume="auto", **options)

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SOON)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert train.train(recipe, run).signal == signal.SIGTERM
    last = snapshot.read(run.output / LAST)
    assert (last["iteration"], last["validation_due"]) == (3, True)
    assert train.train(recipe, run).scores == expected
    assert_same(weights(run.output), weights(whole.output))


class _Stuck:
    """A worker that reads from where nothing comes, and knows no signal."""

    def __init__(self, read):
        self.read = read

    def __call__(self, sample, dataset):
        if multiprocessing.parent_process() is not None and "0000003" in sample.image.name:
            time.sleep(600)
        return self.read(sample, dataset)


def _killed_worker(self, iteration, batches):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(1)
    raise AssertionError("nobody noticed")


def _interrupted(self, iteration, batches):
    next(batches)
    raise KeyboardInterrupt


def _interrupted_while_they_wait(self, iteration, batches):
    time.sleep(1)
    raise KeyboardInterrupt


def _full(*_):
    raise SnapshotError("last.pth: cannot be written: No space left on device")


WAYS = {
    "a corrupt image": (None, DatasetError, r"scene_\d+.jpg"),
    "a loss that is not finite": (None, train.TrainingError, "the loss is not finite"),
    "a failing save": ((snapshot, "save", _full), SnapshotError, "No space left"),
    "Ctrl-C": ((train._Training, "_step", _interrupted), KeyboardInterrupt, None),
    "a killed worker": ((train._Training, "_step", _killed_worker), RuntimeError, "killed by signal"),
    "a stuck worker": ((train._Training, "_step", _interrupted_while_they_wait), KeyboardInterrupt, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_workers_end_with_the_training(tiny, scenes, tmp_path, monkeypatch, way):
    """However it ends, and though they know no SIGTERM."""
    import shutil

    from pspnet_fast.data import loader

    changes = {"base_lr": 1e30, "iterations": 20} if way == "a loss that is not finite" else {}
    if way == "a corrupt image":
        shutil.copytree(scenes, tmp_path / "data")
        image = tmp_path / "data" / "images" / "training" / "scene_00000003.jpg"
        image.write_bytes(image.read_bytes()[:200])
        changes = {"data": tmp_path / "data"}
    patch, error, words = WAYS[way]
    if patch is not None:
        monkeypatch.setattr(*patch)
    if way == "a stuck worker":
        monkeypatch.setattr(loader, "read_sample", _Stuck(loader.read_sample))
    before = {*multiprocessing.active_children()}
    recipe, run = tiny(workers=2, validate_images=1, **changes)
    start = time.monotonic()
    with pytest.raises(error, match=words) as raised:
        train.train(recipe, run)
    left = {*multiprocessing.active_children()} - before
    for worker in left:
        worker.kill()  # or this process would wait for them
    assert not left
    assert time.monotonic() - start < SOON
    assert "\n" not in str(raised.value).strip()


def ended(process):
    """What the command said, once it and all that it had started have ended."""
    try:
        _, said = process.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {SOON} s")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return said
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    return pytest.fail("its workers are still running")


@needs_parser
def test_the_command_ends_on_a_corrupt_image(tiny, scenes, tmp_path):
    import shutil

    shutil.copytree(scenes, tmp_path / "data")
    image = tmp_path / "data" / "images" / "training" / "scene_00000003.jpg"
    image.write_bytes(image.read_bytes()[:200])
    recipe, run = tiny(workers=1, data=tmp_path / "data", iterations=20)
    process = command(recipe, run, tmp_path)
    said = ended(process)
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith(f"pspnet-fast train: {image}: cannot be read")


@needs_parser
@pytest.mark.parametrize(("times", "status"), [(1, 130), (2, 130)])
def test_the_command_ends_by_ctrl_c(tiny, tmp_path, times, status):
    """Once: after the step, saved. Twice: at once. One line either way."""
    recipe, run = tiny(workers=2, iterations=100_000, validate_images=1)
    process = command(recipe, run, tmp_path)
    while not (run.output / LAST).exists() and process.poll() is None:
        time.sleep(0.01)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
    said = ended(process)
    assert process.returncode == status, said
    assert said.count("pspnet-fast train: ended by Ctrl-C") == 1
    assert "Traceback" not in said
    assert "SIGINT: ends after this step, once it is saved; a second one ends at once" in said
    assert torch.isfinite(weights(run.output)["cls.4.weight"]).all()
