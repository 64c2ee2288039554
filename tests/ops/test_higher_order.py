"""Derivatives beyond the first, forward mode and the transforms of torch.func: of every op, against plain PyTorch's own."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.testing._internal.distributed.fake_pg
from torch.autograd import forward_ad

from pspnet_fast import testing
from pspnet_fast.functional import (
    pyramid_conv2d,
    pyramid_norm,
    pyramid_pool,
    pyramid_project,
    upsample_argmax,
    upsample_concat,
    upsample_cross_entropy,
    upsample_softmax_add,
)

# PyTorch, of its own forward-mode rules, when they are loaded.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

BINS = (1, 2, 3)
CELLS = 14
SIZE = (7, 5)
TARGET = torch.tensor([[[0, 1, 255, 3], [2, 2, 1, 0], [255, 3, 0, 1]], [[3, 255, 2, 1], [0, 0, 1, 2], [1, 3, 255, 0]]])
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.7])
PIXEL_WEIGHT = torch.linspace(0, 2, 24).view(2, 3, 4)


class Case(NamedTuple):
    """An op, what it is in plain PyTorch, and the shapes of its tensors."""

    ops: tuple[str, ...]
    ours: Callable
    plain: Callable
    shapes: tuple[tuple[int, ...], ...]


def pool_and_pass(x):
    pyramid, x = pyramid_pool(x, BINS, return_input=True)
    return torch.cat([pyramid.flatten(1), x.flatten(1)], 1)


def pool_and_fill(x, pyramid):
    """The way of PPM: x copied by the pass that pools it, the levels written beside it."""
    pooled, out = pyramid_pool(x, BINS, reserve=(2 * len(BINS), 0))
    return upsample_concat(out, pooled[..., :2] * pyramid, BINS, order=(0, 1, 2, -1), in_place=True)


def plain_pool_and_fill(x, pyramid):
    pooled = testing.plain_pyramid_pool(x, BINS)
    return testing.plain_upsample_concat(x, pooled[..., :2] * pyramid, BINS, order=(0, 1, 2, -1))


def fill(x, pyramid):
    """Over channels that held something, and whose gradient ends there."""
    return upsample_concat(x * 2, pyramid, BINS, in_place=True)


def plain_fill(x, pyramid):
    return testing.plain_upsample_concat(2 * x[:, : x.shape[1] - 2 * len(BINS)], pyramid, BINS)


def matrices(weight):
    return weight.unbind(0)


def normalised(y, weight, bias, **options):
    statistics = [torch.linspace(low, low + 0.5, y.shape[2]).to(y) for low in (-0.2, 0.1, 0.9)]
    return pyramid_norm(y, BINS, statistics, [s.abs() + 0.5 for s in statistics], matrices(weight), matrices(bias))


def plain_normalised(y, weight, bias):
    out = []
    for k, low in enumerate((-0.2, 0.1, 0.9)):
        mean = torch.linspace(low, low + 0.5, y.shape[2]).to(y)
        level = testing.levels(y, BINS)[k].transpose(1, 2)
        out.append(F.batch_norm(level, mean, mean.abs() + 0.5, weight[k], bias[k]).relu().transpose(1, 2))
    return torch.cat(out, 1)


def cross_entropy(reduction):
    def ours(logits):
        wide = CLASS_WEIGHT.to(logits.dtype)
        return upsample_cross_entropy(logits, TARGET, wide, 255, reduction, 0.1, align_corners=False)

    def plain(logits):
        wide = CLASS_WEIGHT.to(logits.dtype)
        return testing.plain_upsample_cross_entropy(logits, TARGET, wide, 255, reduction, 0.1, align_corners=False)

    return Case(("upsample_cross_entropy",), ours, plain, ((2, 4, 2, 3),))


def plain_weighted_total(logits):
    return (testing.plain_upsample_cross_entropy(logits, TARGET, reduction="none") * PIXEL_WEIGHT).sum()


X, CELLS_OF_X, PYRAMID = (2, 3, *SIZE), (2, CELLS, 3), (2, CELLS, 2)
CASES = {
    "pyramid_pool": Case(
        ("pyramid_pool",), lambda x: pyramid_pool(x, BINS), lambda x: testing.plain_pyramid_pool(x, BINS), (X,)
    ),
    "pyramid_pool_and_x": Case(
        ("pyramid_pool",),
        pool_and_pass,
        lambda x: torch.cat([testing.plain_pyramid_pool(x, BINS).flatten(1), x.flatten(1)], 1),
        (X,),
    ),
    "pyramid_pool_reserve": Case(("pyramid_pool", "upsample_concat"), pool_and_fill, plain_pool_and_fill, (X, PYRAMID)),
    "upsample_concat": Case(
        ("upsample_concat",),
        lambda x, p: upsample_concat(x, p, BINS, order=(1, -1, 0, 2)),
        lambda x, p: testing.plain_upsample_concat(x, p, BINS, order=(1, -1, 0, 2)),
        (X, PYRAMID),
    ),
    "upsample_concat_without_x": Case(
        ("upsample_concat",),
        lambda p: upsample_concat(p.new_empty(X), p, BINS, False, order=(0, 2, 1)),
        lambda p: testing.plain_upsample_concat(p.new_empty(X), p, BINS, False, order=(0, 2, 1)),
        (PYRAMID,),
    ),
    "upsample_concat_in_place": Case(("upsample_concat",), fill, plain_fill, ((2, 3 + 6, *SIZE), PYRAMID)),
    "pyramid_conv2d": Case(
        ("pyramid_conv2d",),
        lambda p, w: pyramid_conv2d(p, w, SIZE, BINS),
        lambda p, w: testing.plain_pyramid_conv2d(p, w, SIZE, BINS),
        (PYRAMID, (4, 6, 3, 3)),
    ),
    "pyramid_conv2d_onto": Case(
        ("pyramid_conv2d",),
        lambda p, w, y: pyramid_conv2d(p, w, SIZE, BINS, 0, False, out=y * 2),
        lambda p, w, y: y * 2 + testing.plain_pyramid_conv2d(p, w, SIZE, BINS, 0, False),
        (PYRAMID, (4, 6, 1, 1), (2, 4, *SIZE)),
    ),
    "pyramid_project": Case(
        ("pyramid_project",),
        lambda p, w: pyramid_project(p, matrices(w), BINS, relu=False),
        lambda p, w: testing.plain_pyramid_project(p, *matrices(w), bins=BINS, relu=False),
        (CELLS_OF_X, (3, 2, 3)),
    ),
    "pyramid_project_scaled": Case(
        ("pyramid_project",),
        lambda p, w, scale, shift: pyramid_project(p, matrices(w), BINS, scale, shift),
        lambda p, w, scale, shift: testing.plain_pyramid_project(p, *matrices(w), bins=BINS, scale=scale, shift=shift),
        (CELLS_OF_X, (3, 2, 3), (3, 2), (3, 2)),
    ),
    "pyramid_norm": Case(("pyramid_norm",), normalised, plain_normalised, (PYRAMID, (3, 2), (3, 2))),
    "pyramid_norm_training": Case(
        ("pyramid_norm",),
        lambda y, w, b: pyramid_norm(y, BINS, None, None, matrices(w), matrices(b), training=True),
        lambda y, w, b: testing.plain_pyramid_norm(y, w, b, BINS),
        ((4, CELLS, 2), (3, 2), (3, 2)),
    ),
    "pyramid_norm_alone": Case(
        ("pyramid_norm",),
        lambda y: pyramid_norm(y, BINS, training=True, relu=False),
        lambda y: testing.plain_pyramid_norm(y, y.new_ones(3, 2), y.new_zeros(3, 2), BINS, relu=False),
        ((4, CELLS, 2),),
    ),
    **{f"upsample_cross_entropy_{reduction}": cross_entropy(reduction) for reduction in ("mean", "sum", "none")},
    "upsample_cross_entropy_pixel_weight": Case(
        ("upsample_cross_entropy",),
        lambda x: upsample_cross_entropy(x, TARGET, reduction="sum", pixel_weight=PIXEL_WEIGHT),
        plain_weighted_total,
        ((2, 4, 2, 3),),
    ),
}


def tensors_of(case, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in case.shapes]


def scalar(function):
    """Curved, so that linear ops have a second derivative, too."""
    return lambda *tensors: (function(*tensors) + 0.3).pow(3).sum()


def hessian_times_vectors(function, tensors, vectors, cotangent=None):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(scalar(function)(*leaves), leaves, cotangent, create_graph=True)
    return torch.autograd.grad(gradients, leaves, vectors)


def backends_of(name):
    return [pytest.param(*b.values, name, marks=b.marks) for b in testing.backends(*CASES[name].ops)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradgradcheck(backend, name):
    case = CASES[name]
    if reason := next(filter(None, (testing.unavailable(op, backend) for op in case.ops)), None):
        pytest.skip(reason)
    tensors = [tensor.requires_grad_() for tensor in tensors_of(case, torch.float64)]
    with testing.use_backend(backend):
        assert torch.autograd.gradgradcheck(case.ours, tensors)


@pytest.mark.parametrize(("backend", "name"), [each for name in CASES for each in backends_of(name)])
def test_second_derivatives(backend, name):
    case = CASES[name]
    tensors, vectors = tensors_of(case), tensors_of(case)
    exact = hessian_times_vectors(case.plain, [t.double() for t in tensors], [v.double() for v in vectors])
    device = testing.device(backend)
    with testing.use_backend(backend), testing.poisoned_memory():
        ours = hessian_times_vectors(case.ours, [t.to(device) for t in tensors], [v.to(device) for v in vectors])
    for mine, truth in zip(ours, exact, strict=True):
        largest = truth.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", [name for name in CASES if "norm" not in name and "entropy" not in name])
def test_linear_ops_are_differentiated_on_their_own_kernels(name, monkeypatch):
    """In a second and a third derivative, too."""
    from pspnet_fast import backends

    case, chosen, choose = CASES[name], set(), backends.choose

    def watch(op, direction, *args):
        found = choose(op, direction, *args)
        chosen.add(found[0])
        return found

    monkeypatch.setattr(backends, "choose", watch)
    results = []
    for function in (case.ours, case.plain):
        torch.manual_seed(1)
        leaves = [tensor.requires_grad_() for tensor in tensors_of(case, torch.float64)]
        value = scalar(scalar(function))(*leaves)
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(gradient.square().sum() for gradient in gradients)
        results.append(value)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=0)
    assert chosen == {"cpu"}


def dual(function, tensors, tangents):
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, tensors, tangents))
        return forward_ad.unpack_dual(out).tangent


def forward_over_reverse(function, tensors, tangents):
    return torch.func.jvp(torch.func.grad(scalar(function)), tuple(tensors), tuple(tangents))[1]


def dual_over_reverse(function, tensors, tangents):
    with forward_ad.dual_level():
        leaves = [forward_ad.make_dual(t.detach().requires_grad_(), v) for t, v in zip(tensors, tangents, strict=True)]
        (gradient,) = torch.autograd.grad(scalar(function)(*leaves), leaves[:1], create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent


def batched_backward(function, tensors, tangents):
    """Of a forward that no transform has seen: the rows of its Jacobian."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    cotangents = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    return torch.vmap(lambda g: torch.autograd.grad(out, leaves, g, retain_graph=True))(cotangents)


TRANSFORMS = {
    "forward mode": dual,
    "forward mode over reverse": dual_over_reverse,
    "jvp": lambda f, tensors, tangents: torch.func.jvp(f, tuple(tensors), tuple(tangents))[1],
    "vjp": lambda f, tensors, tangents: torch.func.vjp(scalar(f), *tensors)[1](torch.tensor(0.7).to(tensors[0])),
    "grad": lambda f, tensors, tangents: torch.func.grad(scalar(f))(*tensors),
    "jvp of grad": forward_over_reverse,
    "vmap": lambda f, tensors, tangents: torch.vmap(f)(*map(torch.stack, zip(tensors, tangents, strict=True))),
    "vmap of a last axis": lambda f, tensors, tangents: torch.vmap(f, -1)(
        *(torch.stack(pair, -1) for pair in zip(tensors, tangents, strict=True))
    ),
    "vmap of a backward": batched_backward,
    "vmap of grad": lambda f, tensors, tangents: torch.vmap(torch.func.grad(scalar(f)))(
        *map(torch.stack, zip(tensors, tangents, strict=True))
    ),
    "jacrev": lambda f, tensors, tangents: torch.func.jacrev(f)(*tensors),
    "jacfwd": lambda f, tensors, tangents: torch.func.jacfwd(f)(*tensors),
    "hessian": lambda f, tensors, tangents: torch.func.hessian(scalar(f))(*tensors),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CASES)
def test_transforms(name, transform):
    case = CASES[name]
    tensors, tangents = tensors_of(case, torch.float64), tensors_of(case, torch.float64)
    expected = TRANSFORMS[transform](case.plain, tensors, tangents)
    ours = TRANSFORMS[transform](case.ours, tensors, tangents)
    assert ours is not None
    torch.testing.assert_close(ours, expected)


def test_vmap_of_what_has_no_gradient():
    logits = torch.randn(3, 2, 4, 3, 3)
    labels = torch.vmap(lambda x: upsample_argmax(x, (5, 6), dtype=torch.int64))(logits)
    pair = torch.vmap(lambda x: upsample_argmax(x, (5, 6), confidence=True))(logits)
    totals = torch.vmap(lambda t, x: upsample_softmax_add(t, x, [(0, 0), (1, 2)], (3, 3)))(
        torch.zeros(3, 4, 5, 6), logits
    )
    for i, each in enumerate(logits):
        plain, confidence = testing.plain_upsample_argmax(each, (5, 6))
        assert torch.equal(labels[i], plain)
        assert torch.equal(pair[0][i], plain)
        torch.testing.assert_close(pair[1][i], confidence)
        total = testing.plain_upsample_softmax_add(torch.zeros(4, 5, 6), each, [(0, 0), (1, 2)], (3, 3))
        torch.testing.assert_close(totals[i], total)


def test_targets_under_vmap():
    """Their values cannot decide anything there, so one that is no class is ignored, as on a GPU; elsewhere it is an error."""
    logits, targets = torch.randn(3, 2, 4, 2, 3), torch.stack([TARGET] * 3)
    targets[1, 0, 0, 0] = 9
    losses = torch.vmap(torch.func.grad(upsample_cross_entropy))(logits, targets)
    targets[1, 0, 0, 0] = 255
    expected = torch.stack(
        [
            torch.func.grad(testing.plain_upsample_cross_entropy)(x, target)
            for x, target in zip(logits, targets, strict=True)
        ]
    )
    torch.testing.assert_close(losses, expected)
    targets[1, 0, 0, 0] = 9
    with pytest.raises(ValueError, match="target must be a class in .* got 9; 1 such pixels"):
        torch.func.grad(upsample_cross_entropy)(logits[1], targets[1])


def test_an_op_itself_refuses_forward_mode():
    """An exported program calls it: a derivative that is left out would be zero."""
    x = torch.randn(1, 2, 4, 4)
    op = torch.ops.pspnet_fast.pyramid_pool
    sentence = "^pyramid_pool: forward-mode derivatives must be taken of pspnet_fast.functional and its modules"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=sentence):
        op(forward_ad.make_dual(x, x), BINS)
    with pytest.raises(NotImplementedError, match=sentence):
        torch.func.jvp(lambda x: op(x, BINS), (x,), (x,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ignored_pixel_has_no_second_derivative(reduction):
    """Whatever its logits hold."""
    logits, target = torch.randn(1, 3, 2, 2), torch.tensor([[[255, 255, 255], [255, 255, 255], [2, 1, 0]]])
    vector, products = torch.randn(1, 3, 2, 2), []
    for value in (0.0, torch.inf):
        logits[0, :, 0, 1] = value
        leaf = logits.clone().requires_grad_()
        loss = upsample_cross_entropy(leaf, target, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        products += torch.autograd.grad(gradient, leaf, vector)
    torch.testing.assert_close(*products)


def test_second_derivatives_of_no_pixel_are_zero():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = upsample_cross_entropy(logits, torch.full((1, 3, 3), 255))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    (second,) = torch.autograd.grad(gradient.sum(), logits)
    assert torch.equal(second, torch.zeros_like(second))


def test_second_derivatives_of_no_images():
    y = torch.randn(0, CELLS, 2, requires_grad=True)
    weight = [torch.ones(2, requires_grad=True) for _ in BINS]
    out = pyramid_norm(y, BINS, weight=weight, training=True)
    gradients = torch.autograd.grad(out.sum(), [y, *weight], create_graph=True)
    assert [gradient.shape for gradient in gradients] == [y.shape, *(w.shape for w in weight)]
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_of_16_bits_have_their_dtype(name, dtype):
    case = CASES[name]
    tensors = tensors_of(case, dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(case.ours(*leaves).float().square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(gradient.float().sum() for gradient in gradients), leaves)
    assert [each.dtype for each in second] == [dtype] * len(leaves)
    assert all(each.isfinite().all() for each in second)


def test_with_a_process_group_a_norm_is_differentiated_once():
    """One sentence where it would take a second collective: never a derivative without the other processes' part."""
    store = torch.testing._internal.distributed.fake_pg.FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        group = dist.group.WORLD
        y = torch.rand(2, CELLS, 2, requires_grad=True)
        out = pyramid_norm(y, BINS, training=True, process_group=group)
        (gradient,) = torch.autograd.grad(out.sum(), y, create_graph=True)
        with pytest.raises(
            NotImplementedError, match="^pyramid_norm: with a process group it must be differentiated once"
        ):
            torch.autograd.grad(gradient.sum(), y)
        with pytest.raises(
            NotImplementedError, match="^pyramid_norm: with a process group the statistics are those of"
        ):
            torch.func.grad(lambda y: pyramid_norm(y, BINS, training=True, process_group=group).sum())(y)
    finally:
        dist.destroy_process_group()


def test_an_exported_program_has_second_derivatives():
    """Of the ops themselves."""

    class Concatenated(torch.nn.Module):
        def forward(self, x, weight):
            pyramid = pyramid_project(pyramid_pool(x, BINS), matrices(weight), BINS)
            return upsample_concat(x, pyramid, BINS)

    tensors = [torch.randn(X, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64)]
    vectors = [torch.randn_like(tensor) for tensor in tensors]
    exported = torch.export.export(Concatenated(), tuple(tensors)).module()
    torch.testing.assert_close(
        hessian_times_vectors(exported, tensors, vectors), hessian_times_vectors(Concatenated(), tensors, vectors)
    )


@pytest.mark.parametrize("name", ["pyramid_pool", "pyramid_conv2d_onto", "upsample_cross_entropy_mean"])
def test_transforms_in_compiled_functions(name):
    torch.compiler.reset()
    case = CASES[name]
    x = tensors_of(case, torch.float64)

    def gradient(function):
        return lambda *tensors: torch.func.grad(scalar(function))(*tensors)

    compiled = torch.compile(gradient(case.ours), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), gradient(case.plain)(*x))
    torch.compiler.reset()


def opcheck_cases():
    ops, size, geometry = torch.ops.pspnet_fast, [*SIZE], ([*SIZE], BINS, 3, 1, True)
    return {
        "pyramid_pool_concat": (ops.pyramid_pool_concat, [X], lambda x: (x, BINS, 3, 0)),  # nothing that is not filled
        "pyramid_pool_backward": (
            ops.pyramid_pool_backward,
            [CELLS_OF_X, X],
            lambda g, g_input: (g, g_input, size, BINS, False),
        ),
        "upsample_concat_backward": (
            ops.upsample_concat_backward,
            [(2, 9, *SIZE)],
            lambda g: (g, 3, BINS, (-1, 0, 1, 2), True),
        ),
        "pyramid_conv2d_backward": (ops.pyramid_conv2d_backward, [(2, 4, *SIZE)], lambda g: (g, *geometry)),
        "pyramid_conv2d_taps_backward": (
            ops.pyramid_conv2d_taps_backward,
            [(2, CELLS, 9, 4), PYRAMID, (4, 6, 3, 3)],
            lambda g, p, w: (g, p, w, BINS),
        ),
        "pyramid_project_backward": (
            ops.pyramid_project_backward,
            [PYRAMID, CELLS_OF_X, (3, 2, 3)],
            lambda g, p, w: (g, p, [*w.detach()], BINS),
        ),
    }


@pytest.mark.parametrize("name", opcheck_cases())
def test_opcheck(name):
    op, shapes, arguments = opcheck_cases()[name]
    torch.library.opcheck(op.default, arguments(*(torch.randn(shape, requires_grad=True) for shape in shapes)))
