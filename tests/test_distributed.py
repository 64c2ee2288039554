import os
import socket
import weakref

import pytest
import torch
import torch.distributed as dist

from pspnet_fast.distributed import processes


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
