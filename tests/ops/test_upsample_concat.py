import pytest
import torch

from pspnet_fast import testing
from pspnet_fast.functional import upsample_concat
from pspnet_fast.geometry import bilinear_tap, is_channels_last

OP = "upsample_concat"
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # size of x, R, bins, order
    ((2, 3, 4, 7), 5, (2, 3), None),
    ((1, 2, 3, 1), 17, (4, 1), (1, -1, 0)),  # bins larger than the map, one column, x in the middle, levels reversed
    ((2, 5, 12, 12), 4, (1, 2, 3, 6), None),
    ((1, 19, 13, 20), 17, (1, 2, 3, 6), (0, 1, 2, 3, -1)),  # x last, channels past a vector
    ((2, 3, 16, 9), 33, (1, 2, 4, 8), (-1, 3, 2, 1, 0)),  # levels reversed
    ((1, 4, 7, 5), 8, (3,), (0,)),  # x left out
    ((2, 4, 3, 4), 3, (6, 3, 2, 1), None),  # bins larger than the map
    ((1, 1, 1, 9), 1, (1, 2, 6), (1, -1, 0, 2)),  # one row, x in the middle
    ((1, 2, 5, 1), 5, (2, 2), None),
]


def inputs(size, reduced, bins, dtype=torch.float32, memory_format=torch.contiguous_format):
    x = torch.randn(size).to(dtype).contiguous(memory_format=memory_format)
    return x, torch.randn(size[0], sum(b * b for b in bins), reduced).to(dtype)


def cotangent_of(x, reduced, bins, order, memory_format):
    channels = len(bins) * reduced + (x.shape[1] if order is None or -1 in order else 0)
    grad = torch.randn(x.shape[0], channels, *x.shape[2:]).to(x.dtype)
    return grad.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=2))
def test_accuracy(backend, case, dtype, memory_format, align_corners):
    size, reduced, bins, order = case
    x, pyramid = inputs(size, reduced, bins, dtype, memory_format)
    cotangent = cotangent_of(x, reduced, bins, order, memory_format)
    with_x = order is None or -1 in order
    results = testing.assert_as_accurate(
        lambda p: upsample_concat(x.to(p.device), p, bins, align_corners, order),
        lambda p: testing.plain_upsample_concat(x.to(p.dtype), p, bins, align_corners, order),
        [pyramid],
        backend,
        cotangent,
    )
    assert is_channels_last(results[0]) == is_channels_last(x)
    if with_x:
        leaf = x.to(testing.device(backend)).requires_grad_()
        with testing.use_backend(backend):
            out = upsample_concat(leaf, pyramid.to(leaf.device), bins, align_corners, order)
            (dx,) = torch.autograd.grad(out, leaf, cotangent.to(leaf.device))
        start = reduced * (order or (-1,)).index(-1)
        assert torch.equal(dx.cpu(), cotangent[:, start : start + size[1]])
        assert torch.equal(out[:, start : start + size[1]].cpu(), x)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and([CASES[i] for i in (0, 3, 4, 5)], OP, interpret=1))
def test_in_place(backend, case, dtype, memory_format):
    """The levels as forward writes them, and nothing else; the gradients of forward."""
    size, reduced, bins, order = case
    there = testing.device(backend)
    x, pyramid = (t.to(there) for t in inputs(size, reduced, bins, dtype, memory_format))
    cotangent = cotangent_of(x, reduced, bins, order, memory_format).to(there)
    x_first = reduced * order.index(-1) if order and -1 in order else 0
    channels = size[1] if order is None or -1 in order else 0
    with testing.use_backend(backend):
        leaf = pyramid.clone().requires_grad_()
        expected = upsample_concat(x, leaf, bins, True, order)
        (d_expected,) = torch.autograd.grad(expected, leaf, cotangent)
        for beside in (x, torch.full_like(x, torch.nan)):  # what stands in x's channels is nobody's business
            room = torch.full_like(expected, torch.nan)
            room.narrow(1, x_first, channels).copy_(beside[:, :channels])
            with torch.no_grad():
                out = upsample_concat(room, pyramid, bins, True, order, in_place=True)
            assert out is room
            kept = out.narrow(1, x_first, channels)
            assert torch.equal(kept.nan_to_num(), beside[:, :channels].nan_to_num())
            kept.zero_()
            others = expected.detach().clone()
            others.narrow(1, x_first, channels).zero_()
            assert torch.equal(out, others)

        room = torch.full_like(expected, torch.nan)
        room.narrow(1, x_first, channels).copy_(x[:, :channels])
        before = room.requires_grad_()
        leaf = pyramid.clone().requires_grad_()
        out = upsample_concat(before.clone(memory_format=torch.preserve_format), leaf, bins, True, order, in_place=True)
        assert torch.equal(out, expected)
        d_before, d_leaf = torch.autograd.grad(out, [before, leaf], cotangent)
    assert torch.equal(d_leaf, d_expected)
    assert torch.equal(d_before.narrow(1, x_first, channels), cotangent.narrow(1, x_first, channels))


WIDE = [  # beyond what CUDA keeps of a map in one block's shared memory, or of a gradient's plane
    ((1, 1, 3, 4100), 2, (60, 1), None),
    ((1, 2, 40, 1030), 1, (3, 6), None),
    ((1, 1, 2, 16000), 1, (7,), (0,)),
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("backend", "case"), [p for p in testing.backends_and(WIDE, OP, interpret=0) if p.values[0] != "reference"]
)
def test_wide_maps(backend, case, memory_format):
    size, reduced, bins, order = case
    x, pyramid = inputs(size, reduced, bins, memory_format=memory_format)
    testing.assert_as_accurate(
        lambda p: upsample_concat(x.to(p.device), p, bins, True, order),
        lambda p: testing.plain_upsample_concat(x.to(p.dtype), p, bins, True, order),
        [pyramid],
        backend,
        cotangent_of(x, reduced, bins, order, memory_format),
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_more_levels_than_a_launch_takes(backend, memory_format):
    bins = (1, 2, 1, 1, 2, 1, 1, 1, 1, 2)
    x, pyramid = inputs((1, 2, 4, 5), 3, bins, memory_format=memory_format)
    testing.assert_as_accurate(
        lambda p: upsample_concat(x.to(p.device), p, bins),
        lambda p: testing.plain_upsample_concat(x.to(p.dtype), p, bins),
        [pyramid],
        backend,
        cotangent_of(x, 3, bins, None, memory_format),
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_kernels_agree_in_any_order(dtype, memory_format):
    cases = [((2, 8, 13, 20), 16, (1, 2, 3, 6), None), ((1, 3, 61, 33), 5, (1, 6), (0, -1, 1))]
    tensors = []
    for size, reduced, bins, order in cases:
        x, pyramid = inputs(size, reduced, bins, dtype, memory_format)
        tensors.append((x, pyramid.requires_grad_(), bins, order, cotangent_of(x, reduced, bins, order, memory_format)))

    def run():
        results = []
        for x, pyramid, bins, order, cotangent in tensors:
            out = upsample_concat(x, pyramid, bins, True, order)
            results += [out.detach(), *torch.autograd.grad(out, pyramid, cotangent)]
            with torch.no_grad():
                results.append(upsample_concat(torch.zeros_like(out), pyramid, bins, False, order, in_place=True))
        return results

    testing.assert_same_in_any_order(OP, run)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend, memory_format):
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    x, pyramid = inputs((2, 5, 13, 9), 3, (1, 2, 3, 6), torch.float64, memory_format)
    testing.assert_as_accurate(
        lambda x, p: upsample_concat(x, p),
        lambda x, p: testing.plain_upsample_concat(x, p, (1, 2, 3, 6)),
        [x, pyramid],
        backend,
        cotangent_of(x, 3, (1, 2, 3, 6), None, memory_format),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_gradient_of_ones_does_not_saturate(backend, dtype):
    """A 1x1 level collects one from each of 3600 pixels. Summed in 16 bits, bfloat16 sticks at 256 and float16 at 2048."""
    x, pyramid = inputs((1, 1, 60, 60), 2, (1, 2), dtype)
    leaf = pyramid.to(testing.device(backend)).requires_grad_()
    with testing.use_backend(backend):
        (grad,) = torch.autograd.grad(upsample_concat(x.to(leaf.device), leaf, (1, 2)).sum(), leaf)
    assert torch.equal(
        grad.cpu(), torch.tensor([3600.0, 900.0, 900.0, 900.0, 900.0], dtype=dtype)[None, :, None].expand(1, 5, 2)
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_no_images(backend, memory_format):
    x, pyramid = (t.to(testing.device(backend)) for t in inputs((0, 3, 6, 5), 2, (1, 2), memory_format=memory_format))
    pyramid.requires_grad_()
    with testing.use_backend(backend):
        out = upsample_concat(x, pyramid, (1, 2))
        assert out.shape == (0, 7, 6, 5)
        assert torch.autograd.grad(out.sum(), pyramid)[0].shape == pyramid.shape


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_any_strides(backend):
    """X a strided view, the pyramid a transposed one, an unaligned offset, the gradient expanded."""
    base = torch.randn(2, 5, 8, 6, device=testing.device(backend))
    pyramid = torch.randn(2, 6, 5, device=testing.device(backend)).transpose(1, 2).requires_grad_()
    exact = pyramid.detach().double().requires_grad_()
    for x in (base[:, 1:4, 2:, ::2], base.transpose(2, 3), base.flatten()[1:181].view(2, 3, 5, 6)):
        plain, truth = (testing.plain_upsample_concat(x.to(p.dtype), p, (1, 2)) for p in (pyramid, exact))
        plain_grad, truth_grad = (torch.autograd.grad(y.sum(), p)[0] for y, p in ((plain, pyramid), (truth, exact)))
        with testing.use_backend(backend):
            out = upsample_concat(x, pyramid, (1, 2))
            (grad,) = torch.autograd.grad(out.sum(), pyramid)
        testing.assert_within(out, plain, truth)
        testing.assert_within(grad, plain_grad, truth_grad)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_nan_and_inf_stay_in_their_cells(backend, align_corners, memory_format):
    """Where a pixel lies on a cell exactly, torch's rounded coordinate may take a neighbour in, or not: left out here."""
    (height, width), bins = (6, 8), (1, 2, 3)
    x, pyramid = inputs((1, 2, height, width), 18, bins, memory_format=memory_format)
    pyramid[0, 9, 3], pyramid[0, 7, 16], pyramid[0, 3, 17], pyramid[0, 0, 1] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.nan,
    )
    with testing.use_backend(backend):
        ours = upsample_concat(*(t.to(testing.device(backend)) for t in (x, pyramid)), bins, align_corners).cpu()
    plain = testing.plain_upsample_concat(x, pyramid, bins, align_corners)
    for k, b in enumerate(bins):
        on_cell = [
            torch.tensor([bilinear_tap(i, size, b, align_corners)[2] == 0 and b > 1 for i in range(size)])
            for size in (height, width)
        ]
        between = ~(on_cell[0][:, None] | on_cell[1][None, :])
        block = slice(2 + k * 18, 2 + (k + 1) * 18)
        for kind in (torch.isnan, torch.isinf):
            assert torch.equal(kind(ours[:, block])[..., between], kind(plain[:, block])[..., between])
    assert not ours[:, :2].isnan().any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize(("backend", "size"), testing.backends_and([(3, 3), (3, 7), (8, 3), (3, 24)], OP, interpret=3))
def test_a_neighbours_nan_is_not_spread_where_a_size_stays(backend, size, align_corners, memory_format):
    """A cell of three by three, and a pixel of its gradient: NaN where plain PyTorch's is, along the other axis."""
    x, pyramid = inputs((1, 4, *size), 20, (3,), memory_format=memory_format)
    pyramid[0, 4, 3] = torch.nan
    grad = torch.randn(1, 24, *size).contiguous(memory_format=memory_format)
    grad[0, 7, 1, 1] = torch.nan
    results = []
    for function in (upsample_concat, testing.plain_upsample_concat):
        there = testing.device(backend) if function is upsample_concat else "cpu"
        with testing.use_backend(backend if function is upsample_concat else None):
            leaf = pyramid.to(there).requires_grad_()
            out = function(x.to(there), leaf, (3,), align_corners)
            results.append([t.isnan().cpu() for t in (out, *torch.autograd.grad(out, leaf, grad.to(there)))])
    (ours, our_grad), (plain, plain_grad) = results
    kept = [0 if size[0] == 3 else slice(None), 0 if size[1] == 3 else slice(None)]
    assert ours.any()
    assert our_grad.any()
    if size == (3, 3):
        assert torch.equal(ours, plain)
        assert torch.equal(our_grad, plain_grad)
    # Rows or columns beside the cell's, on the axis that stays, hold no NaN.
    assert not ours[..., kept[0], kept[1]].any()
    of_cells = our_grad.unflatten(1, (3, 3))
    assert not of_cells[:, kept[0], kept[1]].any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_repeats_bitwise(backend, memory_format):
    there = testing.device(backend)
    x, pyramid = (t.to(there) for t in inputs((2, 40, 5, 6), 24, (1, 3), memory_format=memory_format))
    pyramid.requires_grad_()
    cotangent = cotangent_of(x, 24, (1, 3), None, memory_format).to(there)
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with testing.use_backend(backend):
            out = upsample_concat(x, pyramid, (1, 3))
            runs.append((out.detach(), *torch.autograd.grad(out, pyramid, cotangent)))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_gradcheck():
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    pyramid = torch.randn(2, 14, 4, dtype=torch.float64, requires_grad=True)
    for align_corners, order in ((True, None), (False, (2, 0, -1, 1))):
        assert torch.autograd.gradcheck(
            lambda x, p, a=align_corners, o=order: upsample_concat(x, p, (1, 2, 3), a, o), (x, pyramid)
        )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_opcheck(memory_format):
    x, pyramid = inputs((2, 3, 7, 6), 4, (1, 2, 3), memory_format=memory_format)
    arguments = (x.requires_grad_(), pyramid.requires_grad_(), [1, 2, 3], [-1, 0, 1, 2], True)
    torch.library.opcheck(torch.ops.pspnet_fast.upsample_concat.default, arguments)
    grad = torch.randn(2, 15, 7, 6).contiguous(memory_format=memory_format)
    torch.library.opcheck(
        torch.ops.pspnet_fast.upsample_concat_backward.default, (grad, 3, [1, 2, 3], [-1, 0, 1, 2], True)
    )
    room = torch.zeros(2, 15, 7, 6).contiguous(memory_format=memory_format)
    arguments = (room, pyramid.detach(), [1, 2, 3], [-1, 0, 1, 2], True)
    torch.library.opcheck(torch.ops.pspnet_fast.upsample_concat_fill.default, arguments)


def test_autocast_takes_the_wider_dtype():
    x, pyramid = torch.randn(1, 2, 5, 5), torch.randn(1, 5, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert upsample_concat(x, pyramid, (1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "pyramid", "options", "error", "words"),
    [
        (torch.zeros(2, 2), torch.zeros(1, 5, 3), {}, ValueError, r"x must be 4-D"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 3), {}, ValueError, r"pyramid must be 3-D \(N, S, C\), got \(1, 3\)"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 6, 3), {}, ValueError, r"must have 5 cells for bins \(1, 2\), got 6"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(1, 5, 3), {}, ValueError, "one batch size, got 2 and 1"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 3).half(), {}, TypeError, "one dtype"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 3, device="meta"), {}, ValueError, "one device, got cpu and meta"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 3), {"order": (-1, 0)}, ValueError, r"order .* got \(-1, 0\)"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 3), {"order": (-1, 0, 1, 1)}, ValueError, "order"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 3), {"order": (-1, 0, 1, 2)}, ValueError, "order"),
        (torch.zeros(1, 2, 4, 4).int(), torch.zeros(1, 5, 3), {}, TypeError, "got int32"),
        (torch.zeros(1, 6, 4, 4), torch.zeros(1, 5, 3), {"in_place": True}, ValueError, r"B\*R = 6 more, got 6"),
        (torch.zeros(1, 8, 4, 4), torch.zeros(1, 5, 3), {"in_place": True, "order": (1, 0)}, ValueError, "got 8"),
        (torch.zeros(1, 8, 4, 8)[..., ::2], torch.zeros(1, 5, 3), {"in_place": True}, ValueError, "x must be dense"),
        (torch.zeros(1, 8, 4, 4), torch.zeros(1, 5, 3).half(), {"in_place": True}, TypeError, "one dtype"),
    ],
)
def test_bad_input(x, pyramid, options, error, words):
    with pytest.raises(error, match=f"^upsample_concat: .*{words}"):
        upsample_concat(x, pyramid, (1, 2), **options)
