"""A training that goes on from a snapshot: to the bit where all is as it was, and what differs is said."""

import logging
import os
import signal
import time
from importlib.util import find_spec

import pytest
import torch
import trainings
from trainings import LIMIT, assert_same, command, in_processes, largest_difference, weights

from pspnet_fast import snapshot, train
from pspnet_fast.config import ConfigError
from pspnet_fast.models.checkpoint import CheckpointError

needs_parser = pytest.mark.skipif(find_spec("jsonargparse") is None, reason="jsonargparse is not installed")
scenes, tiny = trainings.scenes, trainings.tiny  # fixtures


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_died_goes_on_to_the_bit(tiny, monkeypatch, workers):
    """Also with another number of workers; it dies between two snapshots."""
    recipe, whole = tiny("whole")
    train.train(recipe, whole)
    recipe, broken = tiny("broken", resume="auto", workers=workers)
    step = train._Training._step

    def dies(self, iteration, batches):
        if iteration == 5:
            raise KeyboardInterrupt
        return step(self, iteration, batches)

    with monkeypatch.context() as patch:
        patch.setattr(train._Training, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe, broken)
    assert snapshot.read(broken.output / snapshot.LAST)["iteration"] == 4
    train.train(recipe, broken)
    assert_same(weights(broken.output), weights(whole.output))
    states = (snapshot.read(each.output / snapshot.LAST)["optimizer"]["state"] for each in (broken, whole))
    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


@needs_parser
@pytest.mark.parametrize(
    ("number", "status", "send", "workers"),
    [(signal.SIGTERM, 143, os.kill, 0), (signal.SIGTERM, 143, os.killpg, 2), (signal.SIGKILL, -9, os.killpg, 0)],
    ids=["SIGTERM", "SIGTERM_with_workers", "SIGKILL"],
)
def test_a_signal_at_any_moment(tiny, tmp_path, number, status, send, workers):
    """In the middle of a run, to it alone or to its loader's workers, too; it goes on as the run that nobody disturbed."""
    options = {"iterations": 20, "checkpoint_every": 3, "validate_images": 1}
    recipe, whole = tiny("whole", **options)
    train.train(recipe, whole)
    recipe, run = tiny("disturbed", resume="auto", workers=workers, **options)
    process = command(recipe, run, tmp_path)
    while not (run.output / snapshot.PREVIOUS).exists() and process.poll() is None:
        time.sleep(0.01)
    send(process.pid, number)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == status, errors
    done = snapshot.latest(run.output)[1]["iteration"]
    assert 0 < done < 20
    train.train(recipe, run)
    assert_same(weights(run.output), weights(whole.output))


def test_another_number_of_processes_goes_on(tiny, caplog):
    options = {"dropout": 0.0, "validate_images": 2}
    recipe, whole = tiny("whole", **options)
    train.train(recipe, whole)
    _, half = tiny("run", iterations=6, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Stop, "__enter__", lambda self: setattr(self, "asked", True) or self)
        result = train.train(recipe, half)
    assert (result.iteration, result.finished) == (1, False)
    _, resumed = tiny("run", resume="auto", **options)
    in_processes(recipe, resumed)
    assert largest_difference(weights(resumed.output), weights(whole.output)) < 5e-4
    _, again = tiny("run", resume=str(resumed.output / snapshot.PREVIOUS), **options)
    with caplog.at_level(logging.WARNING):
        train.train(recipe, again)
    assert "processes 2 -> 1" in caplog.text
    assert "not to the bit" in caplog.text
    caplog.clear()
    _, finished = tiny("run", resume="auto", precision="bf16", **options)
    with caplog.at_level(logging.WARNING):
        result = train.train(recipe, finished)
    assert (result.iteration, result.finished, result.evaluation) == (6, True, None)
    assert "precision fp32 -> bf16" in caplog.text


def test_another_training(tiny):
    recipe, run = tiny(iterations=2, validate_images=1)
    train.train(recipe, run)
    for change, words in (
        ({"bins": (1, 3)}, r"bins \[1, 2\] instead of \[1, 3\]"),
        ({"layers": 34}, "layers 18 instead of 34"),
    ):
        recipe, other = tiny(iterations=4, resume="auto", **change)
        with pytest.raises(CheckpointError, match=f"last.pth: is a snapshot of another training: {words}$"):
            train.train(recipe, other)
    recipe, other = tiny(iterations=1, resume="auto")
    with pytest.raises(ConfigError, match="has 2 iterations, more than the 1 of this run"):
        train.train(recipe, other)


def test_a_damaged_snapshot_is_skipped(tiny, caplog):
    recipe, run = tiny(iterations=4, resume="auto", validate_images=1)
    train.train(recipe, run)
    expected = weights(run.output)
    path = run.output / snapshot.LAST
    path.write_bytes(path.read_bytes()[:-50])
    with caplog.at_level(logging.WARNING):
        train.train(recipe, run)
    assert "skipped a snapshot" in caplog.text
    assert_same(weights(run.output), expected)


def test_a_due_validation_of_the_snapshot_before(tiny, monkeypatch):
    """Its scores do not take the place of a damaged last.pth, and what is kept as skipped.pth is that, not a whole one."""
    recipe, run = tiny(resume="auto", validate_every=4, validate_images=1)

    def fails(*_, **__):
        raise ValueError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", fails)
        train.train(recipe, run)
    damaged = (run.output / snapshot.LAST).read_bytes()[:-50]
    (run.output / snapshot.LAST).write_bytes(damaged)
    assert snapshot.latest(run.output)[1]["validation_due"] is True
    result = train.train(recipe, run)
    assert [iteration for iteration, _ in result.scores] == [4, 6]
    assert (run.output / snapshot.SKIPPED).read_bytes() == damaged
    assert [snapshot.read(run.output / name)["iteration"] for name in (snapshot.PREVIOUS, snapshot.LAST)] == [4, 6]


def test_a_snapshot_of_another_folder_is_there_at_once(tiny):
    """Of a finished training, too: `saved` is true of the folder that this one writes into."""
    recipe, run = tiny("one", iterations=2, validate_images=1)
    train.train(recipe, run)
    last = run.output / snapshot.LAST
    recipe, run = tiny("two", iterations=2, validate_images=1, resume=str(last))
    result = train.train(recipe, run)
    assert (result.iteration, result.finished, result.evaluation) == (2, True, None)
    assert_same(weights(run.output), snapshot.read(last)["model"])


def test_what_bits_depend_on_is_said(tiny, monkeypatch, caplog):
    """The number of threads, the machine: a run that goes on with others is another to the bit."""
    threads = torch.get_num_threads()
    recipe, run = tiny(iterations=4, validate_images=1)
    train.train(recipe, run)
    content = dict(snapshot.read(run.output / snapshot.LAST))
    assert content["threads"] == threads
    recipe, again = tiny(iterations=4, validate_images=1, resume="auto")
    with caplog.at_level(logging.WARNING):
        train.train(recipe, again)
    assert "not to the bit" not in caplog.text
    torch.set_num_threads(threads + 1)
    try:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
        with caplog.at_level(logging.WARNING):
            train.train(recipe, again)
    finally:
        torch.set_num_threads(threads)
    changed = f"threads {threads} -> {threads + 1}, machine {content['machine']} -> CPU with ABACUS"
    assert f"not to the bit what it would have been without the break: {changed}" in caplog.text


def test_a_snapshot_of_an_older_version_goes_on(tiny):
    """It lacks what was not written then, and has the same weights in the end."""
    recipe, whole = tiny("whole", iterations=4, validate_images=1)
    train.train(recipe, whole)
    content = dict(snapshot.read(whole.output / snapshot.PREVIOUS))
    for key in (
        "version",
        "best",
        "losses",
        "scores",
        "validation_due",
        "run",
        "images",
        "processes",
        "threads",
        "machine",
    ):
        del content[key]
    del content["recipe"]["dilate_second"]
    _, run = tiny("run", iterations=4, validate_images=1, resume="auto")
    run.output.mkdir()
    torch.save(content, run.output / snapshot.LAST)
    train.train(recipe, run)
    assert_same(weights(run.output), weights(whole.output))


def test_a_scaled_loss_after_one_that_was_not(tiny):
    """And back: fp32 has no scale to save."""
    recipe, run = tiny(iterations=2, validate_images=1)
    train.train(recipe, run)
    for iterations, precision in ((4, "fp16"), (6, "fp32")):
        recipe, run = tiny(iterations=iterations, validate_images=1, precision=precision, resume="auto")
        assert train.train(recipe, run).finished
        assert bool(snapshot.read(run.output / snapshot.LAST)["scaler"]) == (precision == "fp16")
