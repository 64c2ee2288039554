import pytest
import torch

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_project

OP = "pyramid_project"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # N, C, R, bins
    (2, 64, 32, (1, 3)),
    (1, 37, 19, (2, 1)),  # nothing divides a vector or a tile
    (1, 1, 1, (3,)),
    (3, 5, 3, (1, 2, 3, 6)),
    (2, 130, 70, (2, 2)),
]


def inputs(n, channels, reduced, bins, dtype=torch.float32):
    pyramid = torch.randn(n, sum(b * b for b in bins), channels).to(dtype)
    weights = [(torch.randn(reduced, channels) / channels**0.5).to(dtype) for _ in bins]
    return pyramid, weights


def cotangent_of(pyramid, reduced):
    return torch.randn(*pyramid.shape[:2], reduced).to(pyramid.dtype)


@pytest.mark.parametrize("epilogue", ["none", "relu", "scale_shift_relu", "shift"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=3))
def test_accuracy(backend, case, dtype, epilogue):
    n, channels, reduced, bins = case
    pyramid, weights = inputs(n, channels, reduced, bins, dtype)
    options = {"relu": "relu" in epilogue}
    if "scale" in epilogue:
        options["scale"] = torch.rand(len(bins), reduced) + 0.5
    if "shift" in epilogue:
        options["shift"] = torch.randn(len(bins), reduced)

    def ours(pyramid, *weights):
        there = {key: value.to(pyramid.device) if key != "relu" else value for key, value in options.items()}
        return pyramid_project(pyramid, weights, bins, **there)

    testing.assert_as_accurate(
        ours,
        lambda pyramid, *weights: testing.plain_pyramid_project(pyramid, *weights, bins=bins, **options),
        [pyramid, *weights],
        backend,
        # Where the sign of the product decides, float64 and the dtype may disagree: gradients are compared without ReLU.
        None if options["relu"] else cotangent_of(pyramid, reduced),
    )


TILE_CASES = [  # N, C, R, bins
    (3, 300, 150, (1, 5)),  # several tiles of everything, the last ones ragged; channels split
    (3, 256, 128, (5, 1)),  # the same, aligned
    (1, 72, 328, (1, 2)),  # a long sum for the pyramid's gradient
    (13, 40, 24, (5,)),  # and for the weight's
    (2, 24, 8, (1,) * 19 + (2,)),  # more levels than one launch of CUDA takes
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "case"), [p for p in testing.backends_and(TILE_CASES, OP, interpret=0) if p.values[0] != "reference"]
)
def test_several_tiles(backend, case, dtype):
    """Of the kernels: the reference is PyTorch's own product, and has no tiles."""
    n, channels, reduced, bins = case
    pyramid, weights = inputs(n, channels, reduced, bins, dtype)
    testing.assert_as_accurate(
        lambda p, *w: pyramid_project(p, w, bins, relu=False),
        lambda p, *w: testing.plain_pyramid_project(p, *w, bins=bins, relu=False),
        [pyramid, *weights],
        backend,
        cotangent_of(pyramid, reduced),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [b for b in testing.backends(OP) if b.values[0] != "triton"])
def test_more_blocks_than_need_a_split(backend, dtype):
    """So many levels and reduced channels that each sum over the channels is one block's, of more tiles than it holds."""
    bins = (1,) * 19 + (2,)
    pyramid, weights = inputs(1, 332, 400, bins, dtype)
    options = {"scale": torch.rand(20, 400) + 0.5, "shift": torch.randn(20, 400)}

    def ours(pyramid, *weights):
        return pyramid_project(pyramid, weights, bins, **{k: v.to(pyramid.device) for k, v in options.items()})

    def plain(pyramid, *weights):
        return testing.plain_pyramid_project(pyramid, *weights, bins=bins, **options)

    testing.assert_as_accurate(ours, plain, [pyramid, *weights], backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_kernels_agree_in_any_order(dtype):
    pyramid, weights = inputs(2, 136, 72, (1, 2, 6), dtype)
    leaves = [t.requires_grad_() for t in (pyramid, *weights)]
    cotangent = cotangent_of(pyramid, 72)

    def run():
        y = pyramid_project(pyramid, weights, (1, 2, 6))
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

    testing.assert_same_in_any_order(OP, run)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_gradients_through_scale_shift_and_relu(backend):
    """Products far from zero, so that every dtype cuts the same ones."""
    pyramid, weights = inputs(2, 40, 6, (1, 2))
    scale, shift = torch.rand(2, 6) + 0.5, torch.tensor([[9.0] * 3 + [-9.0] * 3] * 2)
    testing.assert_as_accurate(
        lambda p, s, t, *w: pyramid_project(p, w, (1, 2), s, t),
        lambda p, s, t, *w: testing.plain_pyramid_project(p, *w, bins=(1, 2), scale=s, shift=t),
        [pyramid, scale, shift, *weights],
        backend,
        cotangent_of(pyramid, 6),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend):
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    pyramid, weights = inputs(2, 37, 19, (1, 2, 3), torch.float64)
    testing.assert_as_accurate(
        lambda p, *w: pyramid_project(p, w, (1, 2, 3), relu=False),
        lambda p, *w: testing.plain_pyramid_project(p, *w, bins=(1, 2, 3), relu=False),
        [pyramid, *weights],
        backend,
        cotangent_of(pyramid, 19),
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_no_images(backend):
    pyramid, weights = inputs(0, 8, 4, (1, 2))
    pyramid = pyramid.to(testing.device(backend)).requires_grad_()
    weights = [w.to(pyramid.device).requires_grad_() for w in weights]
    with testing.use_backend(backend):
        y = pyramid_project(pyramid, weights, (1, 2))
        assert y.shape == (0, 5, 4)
        grads = torch.autograd.grad(y.sum(), [pyramid, *weights])
    assert grads[0].shape == pyramid.shape
    assert all(torch.equal(g, torch.zeros_like(w)) for g, w in zip(grads[1:], weights, strict=True))


@pytest.mark.parametrize("channels", [11, 16])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_any_strides(backend, channels):
    """A pyramid that is a view at an odd offset, one stacked weight, and an expanded gradient."""
    pyramid, weights = inputs(2, channels, 6, (1, 2))
    base = torch.randn(2 * 5 * channels + 1)
    pyramid = base[1:].view(2, 5, channels).to(testing.device(backend)).requires_grad_()
    weight = torch.stack(weights, 2).to(pyramid.device).permute(2, 0, 1).requires_grad_()
    with testing.use_backend(backend):
        y = pyramid_project(pyramid, weight, (1, 2), relu=False)
        grads = torch.autograd.grad(y.sum(), [pyramid, weight])
    plain = testing.plain_pyramid_project(pyramid, *weight, bins=(1, 2), relu=False)
    torch.testing.assert_close(y, plain)
    for ours, theirs in zip(grads, torch.autograd.grad(plain.sum(), [pyramid, weight]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_nan_and_inf(backend):
    """A cell that is not finite touches its own row alone; ReLU keeps NaN."""
    pyramid, weights = inputs(2, 33, 17, (1, 2, 3))
    pyramid[0, 3, 5], pyramid[1, 9, 32] = torch.nan, torch.inf
    with testing.use_backend(backend):
        there = [t.to(testing.device(backend)) for t in (pyramid, *weights)]
        ours = pyramid_project(there[0], there[1:], (1, 2, 3)).cpu()
    plain = testing.plain_pyramid_project(pyramid, *weights, bins=(1, 2, 3))
    assert torch.equal(ours.isnan(), plain.isnan())
    assert torch.equal(ours.isinf(), plain.isinf())


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_repeats_bitwise(backend):
    pyramid, weights = inputs(2, 130, 70, (1, 2, 3))
    pyramid, *weights = (t.to(testing.device(backend)).requires_grad_() for t in (pyramid, *weights))
    cotangent = cotangent_of(pyramid, 70).to(pyramid.device)
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with testing.use_backend(backend):
            y = pyramid_project(pyramid, weights, (1, 2, 3))
            runs.append((y.detach(), *torch.autograd.grad(y, [pyramid, *weights], cotangent)))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck():
    pyramid, weights = inputs(2, 4, 3, (1, 2), torch.float64)
    scale, shift = torch.rand(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (pyramid, scale, shift, *weights)]
    assert torch.autograd.gradcheck(lambda p, s, t, *w: pyramid_project(p, w, (1, 2), s, t), leaves)
    assert torch.autograd.gradcheck(lambda p, s, t, *w: pyramid_project(p, w, (1, 2), relu=False), leaves)


def test_opcheck():
    pyramid, weights = inputs(2, 4, 3, (1, 2))
    leaves = [w.requires_grad_() for w in weights]
    scale, shift = torch.rand(2, 3).requires_grad_(), torch.randn(2, 3).requires_grad_()
    op = torch.ops.pspnet_fast.pyramid_project.default
    torch.library.opcheck(op, (pyramid.requires_grad_(), leaves, [1, 2], scale, shift, True))
    torch.library.opcheck(op, (pyramid, leaves, [1, 2], None, None, False))
    backward = torch.ops.pspnet_fast.pyramid_project_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 5, 3), pyramid.detach(), [w.detach() for w in weights], [1, 2]))


def test_autocast_casts_like_a_convolution():
    pyramid, weights = inputs(1, 8, 4, (1, 2))
    weights = [w.requires_grad_() for w in weights]
    with torch.autocast("cpu", torch.bfloat16):
        y = pyramid_project(pyramid, weights, (1, 2))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weights[0].grad.dtype == torch.float32


PYRAMID, WEIGHTS = torch.zeros(1, 5, 8), [torch.zeros(4, 8)] * 2


@pytest.mark.parametrize(
    ("pyramid", "weight", "options", "error", "words"),
    [
        (torch.zeros(5, 8), WEIGHTS, {}, ValueError, r"pyramid must be 3-D \(N, S, C\), got \(5, 8\)"),
        (torch.zeros(1, 6, 8), WEIGHTS, {}, ValueError, "must have 5 cells"),
        (PYRAMID, WEIGHTS[:1], {}, ValueError, "one matrix for each of the 2 bins, got 1"),
        (PYRAMID, [torch.zeros(4, 8), torch.zeros(4, 7)], {}, ValueError, r"weight\[1\] must be \(R, C\) = \(4, 8\)"),
        (PYRAMID, [torch.zeros(4, 8, 1, 1)] * 2, {}, ValueError, r"weight\[0\] must be 2-D"),
        (PYRAMID, [w.double() for w in WEIGHTS], {}, TypeError, "one dtype, got torch.float32 and torch.float64"),
        (PYRAMID, [w.to("meta") for w in WEIGHTS], {}, ValueError, "one device"),
        (PYRAMID, WEIGHTS, {"scale": torch.zeros(4)}, ValueError, r"scale must be \(B, R\) = \(2, 4\), got \(4,\)"),
        (PYRAMID, WEIGHTS, {"shift": torch.zeros(2, 5)}, ValueError, r"shift must be \(B, R\)"),
        (PYRAMID.int(), WEIGHTS, {}, TypeError, "got int32"),
    ],
)
def test_bad_input(pyramid, weight, options, error, words):
    with pytest.raises(error, match=f"^pyramid_project: .*{words}"):
        pyramid_project(pyramid, weight, (1, 2), **options)
