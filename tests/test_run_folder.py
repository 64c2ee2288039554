import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
import trainings

from pspnet_fast import snapshot, train
from pspnet_fast.files import PART
from pspnet_fast.run_folder import LOCK, LOG, opened
from pspnet_fast.snapshot import BEST, LAST, PREVIOUS, SnapshotError

scenes, tiny = trainings.scenes, trainings.tiny  # fixtures


def enter(folder, resume=None):
    with opened(folder, resume):
        pass


@pytest.mark.parametrize(
    ("there", "resume", "words"),
    [
        (
            [LAST, BEST],
            None,
            "holds the snapshots of another training .last.pth, best.pth.: --resume auto goes on with it",
        ),
        ([PREVIOUS], None, "another training .previous.pth."),
        ([BEST], None, "another training .best.pth.: .* or give this one another folder .--output."),
        ([BEST], "auto", "holds best.pth and no last.pth to go on from: --resume .*best.pth goes on from that"),
        ([LAST], "elsewhere/last.pth", "holds .* than elsewhere/last.pth: --resume auto goes on with those"),
    ],
)
def test_a_folder_of_another_training_is_refused(tmp_path, monkeypatch, there, resume, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "elsewhere"):
        (tmp_path / folder).mkdir()
    for name in there:
        (tmp_path / "run" / name).write_text("of another")
    with pytest.raises(SnapshotError, match=words):
        enter(tmp_path / "run", resume)
    assert [(tmp_path / "run" / name).read_text() for name in there] == ["of another"] * len(there)


@pytest.mark.parametrize("resume", ["auto", "run/previous.pth", "../work/run/last.pth"])
def test_a_training_goes_on_in_its_own_folder(tmp_path, monkeypatch, resume):
    (tmp_path / "work" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "run" / LAST).write_text("of its own")
    enter(tmp_path / "work" / "run", resume)


def test_a_second_run_leaves_the_first_ones_results(tiny):
    """A finished training, then the same command: nothing of the first is replaced."""
    recipe, run = tiny(iterations=4, validate_images=1)
    train.train(recipe, run)
    before = {path.name: path.read_bytes() for path in run.output.iterdir() if path.name not in (LOCK, LOG)}
    with pytest.raises(SnapshotError, match="holds the snapshots of another training"):
        train.train(recipe, run)
    assert {path.name: path.read_bytes() for path in run.output.iterdir() if path.name not in (LOCK, LOG)} == before
    _, other = tiny("other", iterations=4, validate_images=1, resume=str(run.output / PREVIOUS))
    train.train(recipe, other)  # a snapshot of elsewhere, into a new folder
    with pytest.raises(SnapshotError, match="another training"):
        train.train(recipe, other)


def test_two_trainings_at_once(tmp_path):
    with opened(tmp_path, None):
        with pytest.raises(SnapshotError, match=f"another training writes into it now .process {os.getpid()} on "):
            enter(tmp_path)
        enter(tmp_path / "another")
    enter(tmp_path)


HOLDS = """
import os, sys, time
from pathlib import Path
from pspnet_fast.run_folder import opened
with opened(Path(sys.argv[1]), None):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_a_killed_training_holds_nothing(tmp_path):
    """Though a worker of its lives on for a while, which has all that was open when it was started."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(SnapshotError, match=f"process {process.pid} on "):
            enter(tmp_path)
        process.kill()
        process.wait()
        os.kill(child, 0)
        enter(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_what_a_killed_training_left_unfinished_is_removed(tmp_path):
    for name in (f"{PART}a1.pth", f"{PART}b2.png", f"{PART}c3.json", "other.pth", "x.part.pth"):
        (tmp_path / name).write_text("half")
    enter(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{PART}c3.json", "other.pth", "x.part.pth", LOCK, LOG}


def test_a_planted_lock_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(SnapshotError, match=f"{LOCK}: cannot be written"):
        enter(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "text"


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    with caplog.at_level(logging.WARNING):
        enter(tmp_path)
    assert "nothing keeps a second training out" in caplog.text


@pytest.mark.parametrize(
    ("output", "words"), [("file/run", "cannot be made: Not a directory"), ("file", "cannot be made")]
)
def test_a_folder_that_cannot_be_written_is_noticed_first(tiny, tmp_path, output, words):
    """Before data is looked for: there is none."""
    (tmp_path / "file").write_text("")
    recipe, run = tiny(output, data=None)
    with pytest.raises(SnapshotError, match=words):
        train.train(recipe, run)


def test_a_folder_without_permission(tiny, monkeypatch):
    def refuses(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pspnet_fast.files.tempfile.TemporaryFile", refuses)
    recipe, run = tiny(data=None)
    with pytest.raises(SnapshotError, match="last.pth: cannot be written: Permission denied"):
        train.train(recipe, run)


def test_the_log(tiny, caplog):
    """Everything that is logged, and losses; a run that goes on adds to it."""
    recipe, run = tiny(iterations=4, validate_every=2, validate_images=1)
    with caplog.at_level(logging.INFO):
        result = train.train(recipe, run)
    text = (run.output / LOG).read_text()
    for done, loss in result.losses:
        assert f" iteration {done}: loss {loss:.3f}, aux " in text
    for done, score in result.scores:
        assert f" iteration {done}: mIoU {score:.4f}, " in text
    assert f" train: 10 pictures of {recipe.data}/images/training" in text
    assert text.endswith(" 4 of 4 iterations are done and saved\n")
    assert "loss" not in "".join(record.message for record in caplog.records if record.name == train.__name__)
    recipe, more = tiny(iterations=6, resume="auto", validate_images=1, base_lr=1e30)
    with caplog.at_level(logging.INFO), pytest.raises(train.TrainingError):
        train.train(recipe, more)
    after = (run.output / LOG).read_text()
    assert after.startswith(text)
    assert " resumed from " in after[len(text) :]
    assert " not to the bit what it would have been without the break: " in after[len(text) :]
    assert " ended by TrainingError: iteration " in after.splitlines()[-1]
    assert not logging.getLogger("pspnet_fast").handlers


def test_the_log_where_the_terminal_shows_warnings_alone(tiny, caplog):
    """As from Python, where nobody has set up logging: the file has the scores all the same, and where it went on."""
    for iterations in (2, 4):
        recipe, run = tiny(iterations=iterations, validate_images=1, resume="auto")
        with caplog.at_level(logging.WARNING):
            result = train.train(recipe, run)
    text = (run.output / LOG).read_text()
    for done, score in result.scores:
        assert text.count(f" iteration {done}: mIoU {score:.4f}, ") == 1
    assert f" resumed from {run.output / LAST}, iteration 2 of 4\n" in text
    assert not [
        record for record in caplog.records if record.name == train.__name__ and record.levelno < logging.WARNING
    ]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    """Said once."""
    (tmp_path / LOG).symlink_to("/dev/full")
    with opened(tmp_path, None) as lines:
        lines.info("one")
        lines.info("two")
    assert capsys.readouterr().err.count("cannot be written: [Errno 28] No space left on device") == 1


WARNS = """
import logging, sys
from pathlib import Path
from pspnet_fast.run_folder import opened
with opened(Path(sys.argv[1]), None):
    logging.getLogger("pspnet_fast.train").warning("not to the bit")
"""


def test_warnings_reach_those_who_have_not_set_up_logging(tmp_path):
    done = subprocess.run([sys.executable, "-c", WARNS, tmp_path], capture_output=True, text=True, check=True)
    assert done.stderr == "not to the bit\n"
    assert (tmp_path / LOG).read_text().endswith(" not to the bit\n")


def test_a_skipped_snapshot_does_not_take_the_place_of_the_whole_one(tiny, monkeypatch):
    """Going on from previous.pth: what could not be read is kept under another name, and previous.pth until there are two."""
    recipe, run = tiny(iterations=4, validate_images=1)
    train.train(recipe, run)
    expected = snapshot.read(run.output / LAST)["model"]
    path = run.output / LAST
    damaged = path.read_bytes()[:-50]
    path.write_bytes(damaged)
    save, seen = snapshot.save, []

    def looks(content, path, keep=None):
        seen.append(snapshot.latest(run.output)[1]["iteration"])
        save(content, path, keep)

    monkeypatch.setattr(snapshot, "save", looks)
    recipe, again = tiny(iterations=4, resume="auto", validate_images=1)
    train.train(recipe, again)
    assert seen[0] == 2
    assert (run.output / snapshot.SKIPPED).read_bytes() == damaged
    assert snapshot.read(run.output / PREVIOUS)["iteration"] == 2
    assert all(torch.equal(value, expected[name]) for name, value in snapshot.read(path)["model"].items())
