import os
import socket
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pspnet_fast.distributed import ProcessError, processes, together


@pytest.fixture
def alone(monkeypatch):
    """The environment of torchrun, for one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))


def test_a_group_of_one(alone):
    with processes(torch.device("cpu")) as ours:
        assert tuple(ours) == (0, 0, 1)
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_without_torchrun_there_is_no_group():
    assert "RANK" not in os.environ
    with processes(torch.device("cpu")) as ours:
        assert tuple(ours) == (0, 0, 1)
        assert not dist.is_initialized()


@pytest.mark.parametrize("chained", [False, True])
def test_what_an_exception_holds_goes_before_the_group(alone, monkeypatch, chained):
    """A DistributedDataParallel that outlives its group can wait forever for the group's threads."""

    class Held:
        pass

    held = []

    def fails():
        thing = Held()
        held.append(weakref.ref(thing))
        raise ValueError("of the training")

    def fails_again():
        try:
            fails()
        except ValueError as error:
            raise KeyError("of the training") from error

    gone, destroy = [], dist.destroy_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (gone.append(held[0]() is None), destroy()))
    with pytest.raises((ValueError, KeyError), match="of the training"), processes(torch.device("cpu")):
        (fails_again if chained else fails)()
    assert gone == [True]
    assert not dist.is_initialized()


def test_exceptions_that_name_each_other_are_let_go(alone):
    """As torch's writer leaves them on a full disk."""
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__context__ = other, one
    with pytest.raises(ValueError, match="one"), processes(torch.device("cpu")):
        raise one
    assert not dist.is_initialized()


def test_alone_an_exception_is_only_itself():
    with pytest.raises(KeyError), together(1):
        raise KeyError


def _works(rank, world_size, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    said = []
    with processes(torch.device("cpu")) as ours:
        for failing in ((), (1,), (0, 1), ()):  # after a failure the group still works
            try:
                with together(ours.world_size):
                    if ours.rank in failing:
                        raise KeyError(f"of {ours.rank}")
                said.append("fine")
            except (KeyError, ProcessError) as error:
                said.append(f"{type(error).__name__}: {error}")
    (folder / str(rank)).write_text("\n".join(said))


def test_all_processes_fail_together(tmp_path):
    """Each with its own exception, or with another's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_works, (2, port, tmp_path), nprocs=2, start_method="fork")
    assert (tmp_path / "0").read_text().split("\n") == [
        *("fine", "ProcessError: process 1: KeyError: 'of 1'", "KeyError: 'of 0'", "fine")
    ]
    assert (tmp_path / "1").read_text().split("\n") == ["fine", "KeyError: 'of 1'", "KeyError: 'of 1'", "fine"]
