"""Trainings of seconds, in this process, in a process of their own, or in several."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.multiprocessing as mp
import yaml

from pspnet_fast import snapshot, train
from pspnet_fast.config import Recipe, plain
from pspnet_fast.data.scenes import write_scenes
from pspnet_fast.train import Run

LIMIT = 300  # seconds that processes of a few seconds may take
TINY = {"dataset": "scenes", "layers": 18, "width": 4, "stem": "v1c", "bins": (1, 2), "crop": 33, "base_size": 64}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 10, seed=1, width=64, height=48)
    return folder


@pytest.fixture
def tiny(scenes, tmp_path):
    """Settings of a run of seconds, changed by keywords."""

    def settings(output="run", **changes):
        recipe = {**TINY, "data": scenes, "batch_size": 4, "iterations": 6}
        run = {"output": tmp_path / output, "workers": 0, "log_every": 2, "checkpoint_every": 2, "device": "cpu"}
        for key, value in changes.items():
            (run if key in Run.__dataclass_fields__ else recipe)[key] = value
        return Recipe(**recipe), Run(**run)

    return settings


def weights(folder, name=snapshot.LAST):
    return snapshot.read(folder / name)["model"]


def assert_same(a, b):
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def command(recipe, run, folder, *more):
    """The run as a process of its own."""
    settings = {**plain(recipe), **plain(run)}
    path = folder / f"{run.output.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    line = [sys.executable, "-m", "pspnet_fast.cli", "train", str(path), *more]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def in_one(rank, world_size, port, recipe, run):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    train.train(recipe, run)


def in_processes(recipe, run, world_size=2, process=in_one):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.start_processes(
        process, (world_size, port, recipe, run), nprocs=world_size, start_method="fork", join=False
    )
    end = time.monotonic() + LIMIT
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for each in context.processes:
                each.kill()
            pytest.fail(f"processes {context.pids()} were still running after {LIMIT} s")


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a if a[name].is_floating_point())
