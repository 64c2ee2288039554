import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pspnet_fast import PPM, testing
from pspnet_fast.functional import pyramid_pool
from pspnet_fast.nn.levels import reduce_levels
from pspnet_fast.nn.reading import Level

BINS = (1, 2, 3, 6)


def convolution(bias=False):
    return nn.Conv2d(16, 6, 1, bias=bias)


def norm(**options):
    made = nn.BatchNorm2d(6, **options)
    nn.init.uniform_(made.running_var, 0.5, 2)
    nn.init.uniform_(made.running_mean, -1, 1)
    if made.affine:
        nn.init.uniform_(made.weight, 0.5, 2)
        nn.init.uniform_(made.bias, -1, 1)
    return made


def frozen():
    """Its statistics stay, whatever mode the rest is in."""
    made = norm()
    made.train = lambda mode=True: made
    return made.eval()


MIXTURES = {
    "smp": lambda: [Level(convolution(bias=k == 0), None if k == 0 else norm(), nn.ReLU()) for k in range(4)],
    "no norm, no activation": lambda: [Level(convolution(), None, None) for _ in BINS],
    "biases alone": lambda: [Level(convolution(bias=k % 2 == 0), None, nn.ReLU()) for k in range(4)],
    "a bias before the norm": lambda: [Level(convolution(bias=True), norm(), nn.ReLU()) for _ in BINS],
    "two eps": lambda: [Level(convolution(), norm(eps=1e-5 if k < 2 else 0.1), nn.ReLU()) for k in range(4)],
    "not all affine": lambda: [Level(convolution(), norm(affine=k % 2 == 0), nn.ReLU()) for k in range(4)],
    "no running statistics": lambda: [
        Level(convolution(), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU()) for _ in BINS
    ],
    "one frozen": lambda: [Level(convolution(), frozen() if k == 1 else norm(), nn.ReLU()) for k in range(4)],
    "other activations": lambda: [
        Level(convolution(), norm(), None if k == 1 else nn.LeakyReLU(0.1) if k == 2 else nn.ReLU()) for k in range(4)
    ],
    "another norm": lambda: [
        Level(convolution(), nn.GroupNorm(2, 6) if k == 3 else norm(), nn.ReLU()) for k in range(4)
    ],
}


class Levels(nn.Module):
    """The pooled and reduced pyramid (N, S, R): by `reduce_levels`, or by the layers one after another."""

    def __init__(self, levels, plain):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(m for m in level if m is not None) for level in levels)
        self.levels, self.plain = levels, plain

    def forward(self, x):
        if not self.plain:
            return reduce_levels(pyramid_pool(x, BINS), BINS, self.levels)
        cells = []
        for bins, level in zip(BINS, self.levels, strict=True):
            y = F.adaptive_avg_pool2d(x, bins)
            for module in level:
                y = y if module is None else module(y)
            cells.append(y.flatten(2).transpose(1, 2))
        return torch.cat(cells, 1)


def run(module, x):
    """Cells, the gradients of x and of all parameters, the running statistics."""
    module, x = copy.deepcopy(module).to(x.dtype), x.detach().requires_grad_()
    y = module(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *module.parameters()], cotangent)
    return [y, *grads, *(buffer for buffer in module.buffers() if buffer.is_floating_point())]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_levels_of_unlike_kinds(mixture, training):
    levels = MIXTURES[mixture]()
    ours, plain = (Levels(levels, plain).train(training) for plain in (False, True))
    batches = [torch.randn(8, 16, 13, 10) for _ in range(8)]
    results = [
        [run(ours, x) for x in batches],
        *([run(plain, x.to(d)) for x in batches] for d in (torch.float32, torch.float64)),
    ]
    for parts in zip(*(map(torch.stack, zip(*each, strict=True)) for each in results), strict=True):
        testing.assert_within(*parts)


def test_neighbours_of_one_kind_are_one_call(monkeypatch):
    from pspnet_fast.nn import levels as module

    calls = []
    for name in ("pyramid_project", "pyramid_norm"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, op=op, name=name, **k: (calls.append(name), op(*a, **k))[1])
    levels = MIXTURES["smp"]()
    Levels(levels, plain=False).train()(torch.randn(2, 16, 13, 10))
    assert calls == ["pyramid_project", "pyramid_project", "pyramid_norm"]


def test_bin_1_without_a_norm():
    """One image is enough to train on, and the keys are the convolution's."""
    ppm = PPM(16, 6, bin1_norm=False).train()
    assert [key for key in ppm.state_dict() if key.endswith(".1.bias")] == ["features.0.1.bias"]
    assert not any(key.startswith("features.0.2") for key in ppm.state_dict())
    x = torch.randn(1, 16, 13, 10)
    out = ppm(x)
    conv = ppm.features[0][1]
    expected = conv(x.mean((2, 3), keepdim=True)).relu().expand(1, 6, 13, 10)
    torch.testing.assert_close(out[:, 16:22], expected)
    assert ppm.features[1][2].num_batches_tracked == 1
