import math

import pytest
import torch
import torch.nn.functional as F

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_norm
from pspnet_fast.geometry import levels

OP = "pyramid_norm"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # N, R, bins
    (2, 19, (1, 3)),
    (3, 1, (2, 4)),
    (4, 32, (1, 2, 3, 6)),
    (5, 70, (3,)),
    (40, 5, (2, 1, 2)),  # more rows than a CUDA thread keeps in registers, element by element
    (131, 16, (3,)),  # and in vectors
    (2, 3, (1, 2) * 9),  # more levels than a CUDA launch takes
]


def cells(n, reduced, bins, dtype=torch.float32):
    return (3 * torch.randn(n, sum(b * b for b in bins), reduced) + 1).to(dtype)


def affine(reduced, bins):
    return torch.rand(len(bins), reduced) + 0.5, torch.randn(len(bins), reduced)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=2))
def test_training(backend, case, dtype, relu):
    n, reduced, bins = case
    weight, bias = affine(reduced, bins)
    if dtype != torch.float32:  # plain PyTorch wants them in one dtype for float64, so keep them exact in this one
        weight, bias = weight.to(dtype).float(), bias.to(dtype).float()
    y = cells(n, reduced, bins, dtype)
    cotangent = None if relu else torch.randn(y.shape).to(dtype)
    testing.assert_as_accurate(
        lambda y: pyramid_norm(y, bins, weight=weight.to(y.device), bias=bias.to(y.device), training=True, relu=relu),
        lambda y: testing.plain_pyramid_norm(y, weight.to(y.dtype), bias.to(y.dtype), bins, relu),
        [y],
        backend,
        cotangent,
    )


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_gradients_of_weight_and_bias(backend, relu):
    """Biases far from zero, so that every dtype cuts the same elements."""
    bins, y = (1, 2, 3), cells(4, 24, (1, 2, 3))
    weight, bias = affine(24, bins)
    bias = torch.where(torch.arange(24) % 2 == 0, 20.0, -20.0).expand(3, 24) if relu else bias
    testing.assert_as_accurate(
        lambda y, w, b: pyramid_norm(y, bins, weight=w, bias=b, training=True, relu=relu),
        lambda y, w, b: testing.plain_pyramid_norm(y, w, b, bins, relu),
        [y, weight, bias.contiguous()],
        backend,
        torch.randn(y.shape),
    )


@pytest.mark.parametrize("momentum", [0.1, [0.1, 0.5, 1.0], 1.5], ids=str)
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_running_statistics(backend, momentum):
    bins, y = (1, 2, 3), cells(4, 24, (1, 2, 3)).to(testing.device(backend))
    ours = [[t.to(y.device) for t in torch.rand(3, 24)] for _ in range(2)]
    theirs = [[t.clone() for t in tensors] for tensors in ours]
    with testing.use_backend(backend):
        for _ in range(2):
            pyramid_norm(y, bins, ours[0], ours[1], training=True, momentum=momentum)
    for k, level in enumerate(levels(y, bins)):
        share = momentum if isinstance(momentum, float) else momentum[k]
        for _ in range(2):
            F.batch_norm(level.transpose(1, 2), theirs[0][k], theirs[1][k], training=True, momentum=share)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_running_statistics_of_another_dtype(backend):
    """Of a network in bfloat16, and strided: updated in place all the same, and rounded once."""
    bins, y = (1, 2), cells(4, 24, (1, 2)).to(testing.device(backend))
    base = torch.rand(2, 2, 24, 2, device=y.device).bfloat16()
    running, beside = [list(statistic[..., 0]) for statistic in base], base[..., 1].clone()
    exact = [[t.float().clone() for t in tensors] for tensors in running]
    with testing.use_backend(backend):
        pyramid_norm(y, bins, *running, training=True, momentum=0.25)
        pyramid_norm(y, bins, *exact, training=True, momentum=0.25)
    assert torch.equal(base[..., 0], torch.stack([torch.stack(tensors) for tensors in exact]).bfloat16())
    assert torch.equal(base[..., 1], beside)


@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_without_weight_or_bias(backend, missing):
    bins, y = (1, 2), cells(4, 24, (1, 2)).to(testing.device(backend)).requires_grad_()
    ones, zeros = torch.ones(2, 24, device=y.device), torch.zeros(2, 24, device=y.device)
    weight, bias = (t.to(y.device) for t in affine(24, bins))
    given = {"weight": {"bias": bias}, "bias": {"weight": weight}, "both": {}}[missing]
    with testing.use_backend(backend):
        ours = pyramid_norm(y, bins, training=True, **given)
        theirs = pyramid_norm(y, bins, training=True, **{"weight": ones, "bias": zeros, **given})
        assert torch.equal(ours, theirs)
        cotangent = torch.randn_like(ours)
        assert torch.equal(*(torch.autograd.grad(out, y, cotangent)[0] for out in (ours, theirs)))


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_training_in_one_op_equals_its_parts(backend):
    """What a process group's collective would stand between: statistics, norm, sums and gradient one by one."""
    bins, y = (1, 2, 3), cells(4, 24, (1, 2, 3)).to(testing.device(backend))
    weight, bias = (t.to(y.device) for t in affine(24, bins))
    grad = torch.randn_like(y)
    ops = torch.ops.pspnet_fast
    with testing.use_backend(backend):
        out, mean, invstd = ops.pyramid_norm_training(y, [*weight], [*bias], [], [], bins, [], 1e-5, True)
        plain_mean, var = ops.pyramid_norm_statistics(y, bins)
        dy, d_weight, d_bias = ops.pyramid_norm_training_backward(grad, y, out, mean, invstd, [*weight], bins, True)
        sums = ops.pyramid_norm_sums(grad, y, out, mean, invstd, bins, True)
        counts = torch.tensor([[4.0], [16.0], [36.0]], device=y.device)
        means = [total / counts for total in sums]
        torch.testing.assert_close(out, ops.pyramid_norm(y, mean, invstd, weight, bias, bins, True))
        plain_dy = ops.pyramid_norm_backward(grad, y, out, mean, invstd, weight, *means, bins, True)
    torch.testing.assert_close((mean, invstd), (plain_mean, torch.rsqrt(var + 1e-5)))
    torch.testing.assert_close((d_bias, d_weight), sums)
    torch.testing.assert_close(dy, plain_dy)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_evaluation(backend, dtype, relu):
    bins, y = (1, 2, 3, 6), cells(2, 19, (1, 2, 3, 6), dtype)
    mean, var = torch.randn(4, 19), torch.rand(4, 19) + 0.1
    weight, bias = (t.to(dtype).float() for t in affine(19, bins))

    def plain(y):
        out = []
        for k, level in enumerate(levels(y, bins)):
            parameters = (t[k].to(y.dtype) for t in (mean, var, weight, bias))
            out.append(F.batch_norm(level.transpose(1, 2), *parameters).transpose(1, 2))
        return F.relu(torch.cat(out, 1)) if relu else torch.cat(out, 1)

    def ours(y):
        there = [list(t.to(y.device)) for t in (mean, var, weight, bias)]
        return pyramid_norm(y, bins, *there, relu=relu)

    testing.assert_as_accurate(ours, plain, [y], backend, None if relu else torch.randn(y.shape).to(dtype))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend):
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    y = cells(2, 19, (1, 2, 3), torch.float64)
    weight, bias = (t.double() for t in affine(19, (1, 2, 3)))
    testing.assert_as_accurate(
        lambda y, w, b: pyramid_norm(y, (1, 2, 3), weight=w, bias=b, training=True),
        lambda y, w, b: testing.plain_pyramid_norm(y, w, b, (1, 2, 3)),
        [y, weight, bias],
        backend,
        torch.randn(y.shape),
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_variance_far_from_zero_mean(backend):
    """The difference of E[y^2] and E[y]^2 would lose every digit here."""
    y = cells(4, 16, (2,)) * 0.01 + 1000
    testing.assert_as_accurate(
        lambda y: pyramid_norm(y, (2,), training=True, relu=False),
        lambda y: testing.plain_pyramid_norm(
            y, *torch.tensor([[[1.0]], [[0.0]]]).expand(2, 1, 16).to(y.dtype), (2,), False
        ),
        [y],
        backend,
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_no_images(backend):
    y = cells(0, 4, (1, 2)).to(testing.device(backend)).requires_grad_()
    running = [torch.full((4,), 3.0, device=y.device) for _ in range(2)]
    with testing.use_backend(backend):
        out = pyramid_norm(y, (1, 2), running, running, training=True)
        assert out.shape == y.shape
        assert torch.autograd.grad(out.sum(), y)[0].shape == y.shape
        assert pyramid_norm(y, (1, 2), running, running).shape == y.shape
    assert torch.equal(running[0], torch.full_like(running[0], 3.0))


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_nan_and_inf_stay_in_their_channel(backend):
    y = cells(2, 18, (1, 2))
    y[0, 3, 5], y[1, 0, 17] = torch.nan, torch.inf
    ones, zeros = torch.ones(2, 18), torch.zeros(2, 18)
    with testing.use_backend(backend):
        ours = pyramid_norm(y.to(testing.device(backend)), (1, 2), training=True).cpu()
    plain = testing.plain_pyramid_norm(y, ones, zeros, (1, 2))
    assert torch.equal(ours.isnan(), plain.isnan())


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_repeats_bitwise(backend):
    y = cells(3, 40, (1, 2, 3)).to(testing.device(backend)).requires_grad_()
    cotangent = torch.randn(y.shape).to(y.device)
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with testing.use_backend(backend):
            out = pyramid_norm(y, (1, 2, 3), training=True)
            runs.append((out.detach(), *torch.autograd.grad(out, y, cotangent)))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("reduced", [40, 5])
def test_cuda_kernels_agree_in_any_order(reduced):
    bins = (1, 2, 6)
    y, (weight, bias) = cells(3, reduced, bins).requires_grad_(), affine(reduced, bins)
    cotangent, running = torch.randn(y.shape), torch.rand(2, 3, reduced)

    def run():
        mean, var = running.clone()
        out = pyramid_norm(y, bins, mean, var, weight, bias, training=True)
        (dy,) = torch.autograd.grad(out, y, cotangent)
        frozen = pyramid_norm(y, bins, mean, var, weight, bias)
        return [out.detach(), dy, mean, var, frozen.detach(), *torch.autograd.grad(frozen, y, cotangent)]

    testing.assert_same_in_any_order(OP, run)


def test_gradcheck():
    y = cells(3, 2, (1, 2), torch.float64).requires_grad_()
    weight, bias = (t.double().requires_grad_() for t in affine(2, (1, 2)))
    running = [torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda y, w, b: pyramid_norm(y, (1, 2), weight=w, bias=b, training=True), (y, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda y, w, b: pyramid_norm(y, (1, 2), running, running, weight=w, bias=b), (y, weight, bias)
    )


def test_opcheck():
    bins = [1, 2]
    y, (weight, bias) = cells(2, 3, bins), affine(3, bins)
    mean, invstd = torch.randn(2, 3), torch.rand(2, 3)
    grad, out = torch.randn(y.shape), torch.randn(y.shape)
    ops = torch.ops.pspnet_fast
    torch.library.opcheck(ops.pyramid_norm_statistics.default, (y, bins))
    leaves = [t.clone().requires_grad_() for t in (y, weight, bias)]
    torch.library.opcheck(ops.pyramid_norm.default, (leaves[0], mean, invstd, *leaves[1:], bins, True))
    torch.library.opcheck(ops.pyramid_norm_sums.default, (grad, y, out, mean, invstd, bins, True))
    backward = ops.pyramid_norm_backward.default
    torch.library.opcheck(backward, (grad, y, out, mean, invstd, weight, None, None, bins, True))
    torch.library.opcheck(backward, (grad, y, out, mean, invstd, weight, mean, invstd, bins, False))
    lists = [[*weight], [*bias], [*torch.randn(2, 3)], [*torch.rand(2, 3)]]
    torch.library.opcheck(ops.pyramid_norm_training.default, (y, *lists, bins, [0.1, 0.2], 1e-5, True))
    backward = ops.pyramid_norm_training_backward.default
    torch.library.opcheck(backward, (grad, y, out, mean, invstd, [*weight], bins, True))


STATISTICS = {"running_mean": [torch.zeros(3)] * 2, "running_var": [torch.ones(3)] * 2}


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_eps_0_at_evaluation(backend):
    """As torch takes it."""
    y, statistics = torch.randn(2, 5, 3), [torch.zeros(2, 3), torch.rand(2, 3) + 1]
    with testing.use_backend(backend):
        there = [t.to(testing.device(backend)) for t in (y, *statistics)]
        ours = pyramid_norm(there[0], (1, 2), there[1], there[2], eps=0, relu=False).cpu()
    exact = (y.double() / torch.repeat_interleave(statistics[1].double(), torch.tensor([1, 4]), 0).sqrt()).float()
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("y", "options", "error", "words"),
    [
        (torch.zeros(2, 5), {}, ValueError, r"y must be 3-D \(N, S, C\), got \(2, 5\)"),
        (torch.zeros(2, 6, 3), {}, ValueError, "must have 5 cells"),
        (torch.zeros(2, 5, 3).long(), {}, TypeError, "got int64"),
        (torch.zeros(1, 5, 3), {"training": True}, ValueError, "more than one value per channel.* batch of 2 or more"),
        (torch.zeros(2, 5, 3), {}, ValueError, "evaluation needs running_mean and running_var"),
        (
            torch.zeros(2, 5, 3),
            {"weight": [torch.zeros(3)]},
            ValueError,
            "weight must hold one tensor for each of the 2",
        ),
        (torch.zeros(2, 5, 3), {"bias": [torch.zeros(4)] * 2}, ValueError, r"bias\[0\] must be \(R,\) = \(3,\)"),
        (
            torch.zeros(2, 5, 3),
            {"eps": -1e-5, **STATISTICS},
            ValueError,
            "eps must be positive, or 0 at evaluation, got -1e-05",
        ),
        (torch.zeros(2, 5, 3), {"eps": math.nan, **STATISTICS}, ValueError, "eps must be positive"),
        (torch.zeros(2, 5, 3), {"eps": 0, "training": True}, ValueError, "eps must be positive"),
        (torch.zeros(2, 5, 3), {"eps": math.nan, "training": True}, ValueError, "eps must be positive"),
        (torch.zeros(2, 5, 3), {"momentum": [0.1]}, ValueError, "momentum must be one number or one for each of the 2"),
    ],
)
def test_bad_input(y, options, error, words):
    with pytest.raises(error, match=f"^pyramid_norm: .*{words}"):
        pyramid_norm(y, (1, 2), **options)
