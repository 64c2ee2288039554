import pytest
import torch

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_conv2d
from pspnet_fast.geometry import bilinear_tap, is_channels_last

OP = "pyramid_conv2d"
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # N, R, O, size, bins, k, padding
    (1, 2, 3, (3, 4), (2, 1), 3, 1),  # of few blocks, for the interpreter
    (2, 3, 5, (4, 7), (2, 3), 3, 1),
    (2, 16, 34, (3, 1), (4, 1), 3, 1),  # bins larger than the map, one column
    (2, 8, 35, (12, 12), (1, 2, 3, 6), 3, 1),
    (1, 5, 33, (13, 20), (1, 2, 3, 6), 1, 0),
    (1, 4, 48, (9, 37), (6, 3, 2, 1), 3, 0),  # smaller than the map
    (2, 4, 3, (3, 4), (2, 2), 3, 2),  # larger than the map
    (1, 3, 8, (1, 9), (1, 2, 6), 1, 1),  # a border of zeros
]
CUDA_CASES = [
    (1, 2, 40, (5, 24), (1, 3), 3, 1),  # accesses of 16 bytes in either format, several tiles
    (1, 2, 3, (133, 2), (1, 6), 3, 1),  # rows of two and three chunks
    (1, 1, 2, (2, 3), (90,), 3, 1),  # bands of not even four rows fit into shared memory
]


def accuracy_cases():
    """Every backend, case and dtype, but for emulated and interpreted kernels 16-bit types with the first cases alone."""
    slow = {"triton": testing.interpreted(), "cuda": testing.emulated()}
    for parameter in testing.backends_and(CASES, OP, interpret=1):
        backend, case = parameter.values
        for dtype in DTYPES if case in CASES[:2] or not slow.get(backend) else DTYPES[:1]:
            yield pytest.param(backend, case, dtype, marks=parameter.marks, id=f"{parameter.id}-{dtype}")


def inputs(case, dtype=torch.float32):
    n, reduced, channels, _, bins, k, _ = case
    pyramid = torch.randn(n, sum(b * b for b in bins), reduced)
    return pyramid.to(dtype), torch.randn(channels, len(bins) * reduced, k, k).to(dtype)


def result_shape(case):
    n, _, channels, size, _, k, padding = case
    return n, channels, *(length + 2 * padding - k + 1 for length in size)


@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("backend", "case", "dtype"), [*accuracy_cases()])
def test_accuracy(backend, case, dtype, memory_format, align_corners):
    size, bins, padding = case[3], case[4], case[6]
    cotangent = torch.randn(result_shape(case)).to(dtype).contiguous(memory_format=memory_format)
    results = testing.assert_as_accurate(
        lambda p, w: pyramid_conv2d(p, w, size, bins, padding, align_corners, memory_format=memory_format),
        lambda p, w: testing.plain_pyramid_conv2d(p, w, size, bins, padding, align_corners),
        inputs(case, dtype),
        backend,
        cotangent,
    )
    assert is_channels_last(results[0]) == is_channels_last(cotangent)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_cuda_tiles(case, dtype, memory_format):
    if reason := testing.unavailable(OP, "cuda"):
        pytest.skip(reason)
    size, bins, padding = case[3], case[4], case[6]
    testing.assert_as_accurate(
        lambda p, w: pyramid_conv2d(p, w, size, bins, padding, memory_format=memory_format),
        lambda p, w: testing.plain_pyramid_conv2d(p, w, size, bins, padding),
        inputs(case, dtype),
        "cuda",
        torch.randn(result_shape(case)).to(dtype).contiguous(memory_format=memory_format),
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_cuda_in_any_order(memory_format):
    case = (1, 2, 40, (21, 11), (1, 3), 3, 1)
    pyramid, weight = (t.requires_grad_() for t in inputs(case))
    cotangent = torch.randn(result_shape(case)).contiguous(memory_format=memory_format)

    def run():
        out = pyramid_conv2d(pyramid, weight, (21, 11), (1, 3), memory_format=memory_format)
        return out.detach(), *torch.autograd.grad(out, (pyramid, weight), cotangent)

    testing.assert_same_in_any_order(OP, run)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("backend", "case", "dtype"), [*accuracy_cases()])
def test_onto_an_existing_tensor(backend, case, dtype, memory_format):
    """Added in place, and the gradients of all three go through."""
    size, bins, padding = case[3], case[4], case[6]
    first = torch.randn(result_shape(case)).to(dtype).contiguous(memory_format=memory_format)
    cotangent = torch.randn(result_shape(case)).to(dtype).contiguous(memory_format=memory_format)

    def ours(y, p, w):
        y = y.clone()
        out = pyramid_conv2d(p, w, size, bins, padding, out=y)
        assert out is y
        return out

    testing.assert_as_accurate(
        ours,
        lambda y, p, w: y + testing.plain_pyramid_conv2d(p, w, size, bins, padding),
        [first, *inputs(case, dtype)],
        backend,
        cotangent,
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_out", [True, False], ids=["onto", "alone"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_folded_norm(backend, with_out, dtype, memory_format):
    case = (1, 3, 19, (4, 6), (1, 2), 3, 1)
    scale, shift = torch.randn(19), torch.randn(19)
    first = torch.randn(result_shape(case)).to(dtype).contiguous(memory_format=memory_format)

    def ours(p, w):
        out = first.to(p.device, copy=True) if with_out else None
        factors = {"scale": scale.to(p.device), "shift": shift.to(p.device)}
        return pyramid_conv2d(p, w, (4, 6), (1, 2), out=out, relu=True, memory_format=memory_format, **factors)

    def plain(p, w):
        y = testing.plain_pyramid_conv2d(p, w, (4, 6), (1, 2))
        y = y + first.to(p.dtype) if with_out else y
        return torch.relu(y * scale.to(p.dtype)[:, None, None] + shift.to(p.dtype)[:, None, None])

    testing.assert_as_accurate(ours, plain, inputs(case, dtype), backend)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend, memory_format):
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    case = (2, 3, 13, (13, 9), (1, 2, 3, 6), 3, 1)
    testing.assert_as_accurate(
        lambda p, w: pyramid_conv2d(p, w, (13, 9), memory_format=memory_format),
        lambda p, w: testing.plain_pyramid_conv2d(p, w, (13, 9), (1, 2, 3, 6)),
        inputs(case, torch.float64),
        backend,
        torch.randn(result_shape(case), dtype=torch.float64).contiguous(memory_format=memory_format),
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_weight_is_a_slice(backend, memory_format):
    """The bottleneck's weight past the features' channels; the gradient arrives in the whole, an expanded one is read."""
    case = (2, 3, 5, (4, 6), (1, 2), 3, 1)
    pyramid, part = inputs(case)
    whole = torch.cat([torch.randn(5, 4, 3, 3), part], 1).contiguous(memory_format=memory_format)
    testing.assert_as_accurate(
        lambda p, w: pyramid_conv2d(p, w[:, 4:], (4, 6), (1, 2)),
        lambda p, w: testing.plain_pyramid_conv2d(p, w[:, 4:], (4, 6), (1, 2)),
        [pyramid, whole],
        backend,
        torch.randn(2, 5, 1, 1).expand(2, 5, 4, 6),
    )


@pytest.mark.parametrize("view", ["taps_swapped", "expanded", "channels_innermost"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_of_any_strides(view, dtype):
    """Of more output channels than are taken at once; its gradient, too."""
    pyramid, weight = inputs((1, 3, 70, (4, 5), (1, 2), 3, 1), dtype)
    view = {
        "taps_swapped": lambda w: w.transpose(2, 3),
        "expanded": lambda w: w[:, :1].expand(-1, 6, -1, -1),
        "channels_innermost": lambda w: w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }[view]
    testing.assert_as_accurate(
        lambda p, w: pyramid_conv2d(p, view(w), (4, 5), (1, 2)),
        lambda p, w: testing.plain_pyramid_conv2d(p, view(w), (4, 5), (1, 2)),
        [pyramid, weight],
        "cpu",
        torch.randn(1, 70, 4, 5).to(dtype),
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_no_images(backend, memory_format):
    pyramid, weight = (t.to(testing.device(backend)) for t in inputs((0, 3, 4, (5, 6), (1, 2), 3, 1)))
    pyramid.requires_grad_()
    with testing.use_backend(backend):
        out = pyramid_conv2d(pyramid, weight, (5, 6), (1, 2), memory_format=memory_format)
        assert out.shape == (0, 4, 5, 6)
        assert torch.autograd.grad(out.sum(), pyramid)[0].shape == pyramid.shape


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_nan_stays_in_its_cell(backend, align_corners, memory_format):
    """Where a pixel lies on a cell exactly, torch's rounded coordinate may take a neighbour in, or not: left out here."""
    size, bins = (6, 8), (3,)
    pyramid, weight = inputs((1, 2, 5, size, bins, 1, 0))
    pyramid[0, 0, 0] = torch.nan
    with testing.use_backend(backend):
        there = (t.to(testing.device(backend)) for t in (pyramid, weight))
        ours = pyramid_conv2d(*there, size, bins, 0, align_corners, memory_format=memory_format).cpu()
    plain = testing.plain_pyramid_conv2d(pyramid, weight, size, bins, 0, align_corners)
    on_cell = [torch.tensor([bilinear_tap(i, n, 3, align_corners)[2] == 0 for i in range(n)]) for n in size]
    between = ~(on_cell[0][:, None] | on_cell[1][None, :])
    assert torch.equal(ours.isnan()[..., between], plain.isnan()[..., between])
    assert plain.isnan().any()
    assert not plain.isnan().all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_a_neighbours_nan_is_not_spread_where_the_size_stays(backend, k, align_corners, memory_format):
    """Of a level as large as the map: NaN in a cell, and in a pixel of the gradient, reach as far as plain PyTorch's."""
    pyramid, weight = torch.randn(1, 9, 2), torch.randn(5, 2, k, k)
    pyramid[0, 5, 1] = torch.nan
    grad = torch.randn(1, 5, 3, 3).contiguous(memory_format=memory_format)
    grad[0, 3, 1, 2] = torch.nan
    results = []
    for function in (pyramid_conv2d, testing.plain_pyramid_conv2d):
        ours = function is pyramid_conv2d
        there = testing.device(backend) if ours else "cpu"
        with testing.use_backend(backend if ours else None):
            leaf = pyramid.to(there).requires_grad_()
            options = {"memory_format": memory_format} if ours else {}
            out = function(leaf, weight.to(there), (3, 3), (3,), k // 2, align_corners, **options)
            results.append([t.isnan().cpu() for t in (out, *torch.autograd.grad(out, leaf, grad.to(there)))])
    for mine, theirs in zip(*results, strict=True):
        assert theirs.any()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_repeats_bitwise(backend, memory_format):
    case = (1, 3, 20, (4, 5), (1, 2), 3, 1)
    pyramid, weight = (t.to(testing.device(backend)).requires_grad_() for t in inputs(case))
    cotangent = torch.randn(result_shape(case), device=pyramid.device).contiguous(memory_format=memory_format)
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with testing.use_backend(backend):
            out = pyramid_conv2d(pyramid, weight, (4, 5), (1, 2), memory_format=memory_format)
            runs.append((out.detach(), *torch.autograd.grad(out, (pyramid, weight), cotangent)))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck():
    pyramid, weight = (t.requires_grad_() for t in inputs((2, 2, 3, (4, 5), (1, 2), 3, 1), torch.float64))
    assert torch.autograd.gradcheck(lambda p, w: pyramid_conv2d(p, w, (4, 5), (1, 2)), (pyramid, weight))


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last):
    ops, geometry = torch.ops.pspnet_fast, ([4, 5], [1, 2], 3, 1, True)
    taps = torch.randn(2, 5, 9, 3, requires_grad=True)
    torch.library.opcheck(ops.pyramid_conv2d.default, (taps, *geometry, torch.float32, channels_last))
    pyramid, weight = (t.requires_grad_() for t in inputs((2, 4, 3, (4, 5), (1, 2), 3, 1)))
    if channels_last:
        weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(ops.pyramid_conv2d_taps.default, (pyramid, weight, [1, 2]))
    grad = torch.randn(2, 3, 4, 5)
    torch.library.opcheck(ops.pyramid_conv2d_backward.default, (grad, *geometry))
    update = (grad, taps.detach(), torch.randn(3), None, True, True, *geometry)
    torch.library.opcheck(ops.pyramid_conv2d_update.default, update)


@pytest.mark.parametrize("gradients", [True, False])
def test_compile(gradients):
    pyramid, weight = (t.requires_grad_(gradients) for t in inputs((2, 2, 3, (4, 5), (1, 2), 3, 1)))
    first = torch.randn(2, 3, 4, 5)
    torch.compiler.reset()

    def function(y, p, w):
        return pyramid_conv2d(p, w, (4, 5), (1, 2), out=y * 2).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    testing.assert_within(compiled(first, pyramid, weight), *[function(first, pyramid, weight)] * 2)
    if gradients:
        ours, eager = (
            torch.autograd.grad(f(first, pyramid, weight).sum(), (pyramid, weight)) for f in (compiled, function)
        )
        torch.testing.assert_close(ours, eager)


def test_autocast_casts_pyramid_and_weight():
    pyramid, weight = inputs((1, 2, 3, (4, 5), (1, 2), 3, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert pyramid_conv2d(pyramid, weight, (4, 5), (1, 2)).dtype == torch.bfloat16
        out = torch.zeros(1, 3, 4, 5, dtype=torch.bfloat16)
        assert pyramid_conv2d(pyramid, weight, (4, 5), (1, 2), out=out) is out


P, W = torch.zeros(1, 5, 3), torch.zeros(4, 6, 3, 3)


@pytest.mark.parametrize(
    ("pyramid", "weight", "options", "error", "words"),
    [
        (torch.zeros(5, 3), W, {}, ValueError, r"pyramid must be 3-D"),
        (torch.zeros(1, 6, 3), W, {}, ValueError, "must have 5 cells"),
        (P, torch.zeros(4, 6, 2, 2), {}, ValueError, r"k = 1 or 3 .* got \(4, 6, 2, 2\)"),
        (P, torch.zeros(4, 7, 3, 3), {}, ValueError, r"weight must be \(O, B\*R, k, k\) = \(4, 6, 3, 3\)"),
        (P, W.half(), {}, TypeError, "one dtype"),
        (P, W.to("meta"), {}, ValueError, "one device"),
        (P, W, {"size": (5,)}, ValueError, r"size must be \(H, W\)"),
        (P, W, {"size": (0, 5)}, ValueError, "at least 1 x 1"),
        (P, W, {"size": (2, 5), "padding": 0}, ValueError, "hold the kernel"),
        (P, W, {"padding": -1}, ValueError, "padding must not be negative and at most 16777216, got -1"),
        (P, W, {"padding": 2**62}, ValueError, "padding must not be negative and at most 16777216"),
        (P, W, {"size": (5, 2**62)}, ValueError, "size must be at most 16777216 x 16777216"),
        (P, W, {"out": torch.zeros(1, 4, 5, 5)}, ValueError, r"out must be .* = \(1, 4, 5, 6\)"),
        (P, W, {"out": torch.zeros(1, 4, 5, 12)[..., ::2]}, ValueError, "dense"),
        (P, W, {"out": torch.zeros(1, 4, 5, 6).half()}, TypeError, "one dtype"),
        (P, W, {"scale": torch.zeros(5)}, ValueError, r"scale must be \(O,\) = \(4,\)"),
        (P.clone().requires_grad_(), W, {"relu": True}, ValueError, "where gradients are wanted"),
    ],
)
def test_bad_input(pyramid, weight, options, error, words):
    with pytest.raises(error, match=f"^pyramid_conv2d: .*{words}"):
        pyramid_conv2d(pyramid, weight, **{"size": (5, 6), "bins": (1, 2), **options})
