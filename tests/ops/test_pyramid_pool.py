import pytest
import torch

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_pool

OP = "pyramid_pool"
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    ((2, 3, 4, 7), (1, 2)),  # the bins divide 4, and overlap in 7
    ((1, 17, 2, 1), (3, 1)),  # bins larger than the map, channels past a vector
    ((2, 5, 12, 12), (1, 2, 3, 6)),  # every bin divides
    ((1, 19, 13, 20), (1, 2, 3, 6)),  # windows overlap, not square, channels past a vector
    ((2, 3, 16, 9), (1, 2, 4, 8)),
    ((1, 33, 7, 5), (3,)),
    ((2, 4, 3, 4), (6, 3, 2, 1)),  # bins larger than the map
    ((1, 1, 1, 9), (1, 2, 6)),  # one row, one channel
    ((1, 17, 5, 1), (2, 2)),  # one column, a bin twice
]


def features(size, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.randn(size).to(dtype).contiguous(memory_format=memory_format)


def packed(size, bins, dtype=torch.float32):
    return torch.randn(size[0], sum(b * b for b in bins), size[1]).to(dtype)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=2))
def test_accuracy(backend, case, dtype, memory_format):
    size, bins = case
    x = features(size, dtype, memory_format)
    value, dx = testing.assert_as_accurate(
        lambda x: pyramid_pool(x, bins),
        lambda x: testing.plain_pyramid_pool(x, bins),
        [x],
        backend,
        packed(size, bins, dtype),
    )
    assert value.is_contiguous()
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend, memory_format):
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    size, bins = (2, 5, 13, 9), (1, 2, 3, 6)
    testing.assert_as_accurate(
        lambda x: pyramid_pool(x, bins),
        lambda x: testing.plain_pyramid_pool(x, bins),
        [features(size, torch.float64, memory_format)],
        backend,
        packed(size, bins, torch.float64),
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_returned_input_adds_its_gradient(backend, dtype, memory_format):
    """The x that comes back is used on, so its gradient (some channels of a wider one) joins the pyramid's."""
    size, bins = (2, 20, 5, 6), (1, 2, 3)
    x, more = features(size, dtype, memory_format), features((2, 7, 5, 6), dtype, memory_format)
    cotangent = torch.randn(2, 14 * 20 + 27 * 5 * 6).to(dtype)

    def join(pyramid, x):
        return torch.cat([pyramid.flatten(1), torch.cat([x, more.to(x)], 1).flatten(1)], 1)

    testing.assert_as_accurate(
        lambda x: join(*pyramid_pool(x, bins, return_input=True)),
        lambda x: join(testing.plain_pyramid_pool(x, bins), x),
        [x],
        backend,
        cotangent,
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_returned_input_alone(backend):
    x = features((1, 3, 6, 6)).to(testing.device(backend)).requires_grad_()
    with testing.use_backend(backend):
        pyramid, same = pyramid_pool(x, (1, 2), return_input=True)
        (alone,) = torch.autograd.grad(same.sum(), x, retain_graph=True)
        (pooled,) = torch.autograd.grad(pyramid.sum(), x)
    assert torch.equal(alone, torch.ones_like(x))
    assert torch.allclose(pooled.sum(), torch.tensor(15.0, device=x.device))


@pytest.mark.parametrize("backend", testing.backends(OP))
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_no_images(backend, memory_format):
    x = features((0, 3, 6, 6), memory_format=memory_format).to(testing.device(backend)).requires_grad_()
    with testing.use_backend(backend):
        pyramid = pyramid_pool(x)
        assert pyramid.shape == (0, 50, 3)
        assert torch.autograd.grad(pyramid.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_any_strides(backend):
    """Views that are neither dense NCHW nor channels_last, a storage offset, and an expanded gradient."""
    base = torch.randn(2, 5, 8, 6, device=testing.device(backend))
    views = [base[:, 1:4, 2:, ::2], base.transpose(2, 3), base[..., :1].expand(2, 5, 8, 3), base.flatten()[1:61]]
    views[-1] = views[-1].view(1, 2, 5, 6)
    for view in views:
        x, exact = view.detach().requires_grad_(), view.detach().double().requires_grad_()
        plain, truth = (testing.plain_pyramid_pool(t, (1, 3)) for t in (x, exact))
        plain_dx, truth_dx = (torch.autograd.grad(y.sum(), t)[0] for y, t in ((plain, x), (truth, exact)))
        with testing.use_backend(backend):
            pyramid = pyramid_pool(x, (1, 3))
            (dx,) = torch.autograd.grad(pyramid.sum(), x)
        testing.assert_within(pyramid, plain, truth)
        testing.assert_within(dx, plain_dx, truth_dx)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_nan_and_inf_stay_in_their_windows(backend, memory_format):
    bins = (1, 2, 3)
    x = features((1, 18, 5, 7), memory_format=memory_format)
    x[0, 3, 4, 6], x[0, 16, 0, 0], x[0, 17, 2, 3], x[0, 17, 2, 4] = torch.nan, torch.inf, torch.inf, -torch.inf
    with testing.use_backend(backend):
        ours = pyramid_pool(x.to(testing.device(backend)), bins).cpu()
    plain = testing.plain_pyramid_pool(x, bins)
    assert torch.equal(ours.isnan(), plain.isnan())
    assert torch.equal(ours.isinf(), plain.isinf())

    grad = packed(x.shape, bins)
    grad[0, 9, 3], grad[0, 2, 16] = torch.nan, torch.inf
    leaf = x.nan_to_num().to(testing.device(backend)).requires_grad_()
    with testing.use_backend(backend):
        (dx,) = torch.autograd.grad(pyramid_pool(leaf, bins), leaf, grad.to(leaf.device))
    (plain,) = torch.autograd.grad(testing.plain_pyramid_pool(leaf, bins), leaf, grad.to(leaf.device))
    assert torch.equal(dx.isnan(), plain.isnan())
    assert torch.equal(dx.isinf(), plain.isinf())


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_repeats_bitwise(backend, memory_format):
    x = features((2, 40, 5, 6), memory_format=memory_format).to(testing.device(backend)).requires_grad_()
    cotangent = packed(x.shape, (1, 3)).to(x.device)
    runs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with testing.use_backend(backend):
            pyramid = pyramid_pool(x, (1, 3))
            runs.append((pyramid.detach(), *torch.autograd.grad(pyramid, x, cotangent)))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_gradcheck():
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, (1, 2, 3)), x)
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, (1, 2, 3), return_input=True), x)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_opcheck(memory_format):
    x = features((2, 3, 7, 6), memory_format=memory_format).requires_grad_()
    torch.library.opcheck(torch.ops.pspnet_fast.pyramid_pool.default, (x, [1, 2, 3]))
    grad = packed(x.shape, (1, 2, 3))
    channels_last = memory_format == torch.channels_last
    torch.library.opcheck(
        torch.ops.pspnet_fast.pyramid_pool_backward.default, (grad, x.detach(), [7, 6], [1, 2, 3], channels_last)
    )


@pytest.mark.parametrize(
    ("x", "bins", "error", "words"),
    [
        (torch.zeros(3, 3), (1,), ValueError, r"x must be 4-D \(N, C, H, W\), got \(3, 3\)"),
        (torch.zeros(1, 3, 0, 3), (1,), ValueError, r"at least one channel, row and column, got \(1, 3, 0, 3\)"),
        (torch.zeros(1, 0, 3, 3), (1,), ValueError, "at least one channel"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (1,), TypeError, "got uint8"),
        (torch.zeros(1, 3, 4, 4), (), ValueError, "bins must not be empty"),
        (torch.zeros(1, 3, 4, 4), (1, 0), ValueError, r"bins must be positive, got \(1, 0\)"),
        (torch.zeros(1, 3, 4, 4), (1, 2.5), TypeError, r"bins must be integers, got \(1, 2.5\)"),
        (torch.zeros(1, 3, 4, 4), 6, TypeError, "sequence of integers"),
        ([[1.0]], (1,), TypeError, "x must be a tensor, got list"),
    ],
)
def test_bad_input(x, bins, error, words):
    with pytest.raises(error, match=f"^pyramid_pool: .*{words}"):
        pyramid_pool(x, bins)
