"""Training steps of PSPNet-50 as `pspnet-fast train` runs them, with 2 loader workers, and in a bare loop over tensors.

What the stack adds to a step: reading, augmenting and sending images, schedule, log, progress bar. The bare loop has the same
network, loss and optimiser. Both take turns, some steps at a time; a step's time runs from one call of the optimiser to the
next.
"""

import statistics
import time
from itertools import pairwise

import pytest
import torch
from measuring import ROWS
from selection import whole_network

from pspnet_fast import train
from pspnet_fast.config import Recipe
from pspnet_fast.data.scenes import write_scenes
from pspnet_fast.placement import placed

STEPS = 6  # of a turn, the first is not counted
TURNS = 2
BATCH = 2
CROP = 473


@pytest.fixture
def calls(monkeypatch):
    """When SGD was called."""
    times, step = [], torch.optim.SGD.step

    def recorded(self, *rest):
        result = step(self, *rest)
        times.append(time.perf_counter())
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return times


@whole_network
def bench_training_stack(benchmark, calls, tmp_path):
    """The gate: both losses are those of a network that has begun to learn 11 classes, and the weights move."""
    write_scenes(tmp_path / "scenes", 8, width=683, height=512)
    recipe = Recipe(dataset="scenes", data=tmp_path / "scenes", batch_size=BATCH, iterations=STEPS, crop=CROP)
    run = train.Run(output=tmp_path / "run", workers=2, validate_images=1, device="cpu")
    net = placed(recipe.network(), torch.device("cpu"), channels_last=True)
    optimizer = train.optimizer(net, recipe)
    images = torch.randn(BATCH, 3, CROP, CROP).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(11, (BATCH, CROP, CROP))

    def bare():
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            out = net(images, labels)
            loss = (out.main_loss + recipe.aux_weight * out.aux_loss) / labels.numel()
            loss.backward()
            optimizer.step()
            losses.append(out.main_loss.item() / labels.numel())
        return losses

    def steps(function):
        calls.clear()
        result = function()
        return result, [after - before for before, after in pairwise(calls)]

    seconds, bare_seconds = [], []

    def turn():
        result, times = steps(lambda: train.train(recipe, run))
        assert 0.1 < result.losses[0][1] < 5.0
        seconds.extend(times)

    def before_each_turn():
        before = net.cls[4].weight.clone()
        losses, times = steps(bare)
        assert 0.1 < losses[0] < 5.0
        assert not torch.equal(net.cls[4].weight, before)
        bare_seconds.extend(times)

    benchmark.group = f"PSPNet-50, training step {BATCH}x3x{CROP}x{CROP}, channels_last, 2 workers"
    benchmark.pedantic(turn, setup=before_each_turn, rounds=TURNS)
    ours, bare_median = statistics.median(seconds), statistics.median(bare_seconds)
    benchmark.extra_info.update(
        {"stack, images/s": round(BATCH / ours, 3), "bare, images/s": round(BATCH / bare_median, 3)}
    )
    benchmark.extra_info["stack / bare, throughput"] = round(bare_median / ours, 3)
    for name, each in (("bare loop", bare_median), ("pspnet-fast train", ours)):
        row = {"work": "PSPNet-50 training step, 2 workers", "format": "channels_last", "provider": name}
        ROWS.append({**row, "ms": 1e3 * each, "ratio": bare_median / each, "baseline": "a bare loop"})
