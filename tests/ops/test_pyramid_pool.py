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


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=1))
def test_reserve_copies(backend, case, dtype, memory_format):
    """The same pyramid to the bit, x to the bit among the reserved channels, and these not written."""
    size, bins = case
    x = features(size, dtype, memory_format).to(testing.device(backend))
    channels = size[1]
    with testing.use_backend(backend), testing.poisoned_memory(), torch.no_grad():
        alone = pyramid_pool(x, bins)
        for before, after in ((0, channels), (8, 0), (3, 2)):
            pyramid, out = pyramid_pool(x, bins, reserve=(before, after))
            assert torch.equal(pyramid, alone)
            assert out.shape == (size[0], before + channels + after, *size[2:])
            assert out.is_contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else memory_format)
            assert torch.equal(out[:, before : before + channels], x)
            assert out[:, :before].isnan().all()
            assert out[:, before + channels :].isnan().all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reserve", [(0, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_reserve_adds_its_gradient(backend, reserve, dtype, memory_format):
    """The gradient of x's channels, in the middle of a wider one, joins the pyramid's."""
    size, bins = (2, 16, 5, 6), (1, 2, 3)
    before = reserve[0]

    def join(pyramid, x):
        return torch.cat([pyramid.flatten(1), x.flatten(1)], 1)

    def ours(x):
        pyramid, out = pyramid_pool(x, bins, reserve=reserve)
        return join(pyramid, out[:, before : before + 16])

    testing.assert_as_accurate(
        ours,
        lambda x: join(testing.plain_pyramid_pool(x, bins), x),
        [features(size, dtype, memory_format)],
        backend,
        torch.randn(2, 14 * 16 + 16 * 5 * 6).to(dtype),
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_reserve_alone(backend):
    x = features((1, 3, 6, 6)).to(testing.device(backend)).requires_grad_()
    with testing.use_backend(backend):
        pyramid, out = pyramid_pool(x, (1, 2), reserve=(1, 2))
        (copied,) = torch.autograd.grad(out[:, 1:4].sum(), x, retain_graph=True)
        (pooled,) = torch.autograd.grad(pyramid.sum(), x)
    assert torch.equal(copied, torch.ones_like(x))
    assert torch.allclose(pooled.sum(), torch.tensor(15.0, device=x.device))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize(("channels", "first_channel"), [(5, 3), (2, 0), (3, -1), (3, 2**63 - 1), (2**62, 0)])
def test_concat_checks_its_channels(backend, channels, first_channel):
    """What the public function cannot ask for: x's channels outside the result's."""
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    x = features((1, 3, 4, 4)).to(testing.device(backend))
    with testing.use_backend(backend), pytest.raises(RuntimeError, match="pyramid_pool_concat: channels .* must lie"):
        torch.ops.pspnet_fast.pyramid_pool_concat(x, [1, 2], channels, first_channel)


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
        assert [t.shape for t in pyramid_pool(x, reserve=(1, 1))] == [(0, 50, 3), (0, 5, 6, 6)]


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


# Sizes and bins at the edges of what a kernel holds in its tables or in shared memory.
LARGE = [
    ((1, 2, 200, 150), (40, 70, 100)),  # more segments than a table holds
    ((2, 3, 5, 9), (*range(1, 7), 1, 2, 1, 3, 1, 1, 1, 2, 1, 1, 1)),  # more levels
    ((1, 1, 20, 13), (130,)),  # more windows
    ((2, 3, 97, 90), (1, 2, 3, 6)),  # a plane larger than a stage in float32, larger than a block's pixels
    ((1, 2, 130, 127), (1, 2, 3, 6)),  # in 16 bits as well; bands end within segments
    ((1, 1, 260, 128), (1, 2, 3, 6)),  # more bands than stages, copied by bulk stores
    ((1, 2, 2, 9000), (1, 2)),  # a row larger than a stage
    ((1, 2, 66000, 1), (1, 3)),  # more rows than 16 bits count
    ((1, 70, 3, 2), (1, 2)),  # more planes than are pooled at once
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(LARGE, OP, interpret=0))
def test_any_bins_and_sizes(backend, case, dtype, memory_format):
    size, bins = case
    testing.assert_as_accurate(
        lambda x: pyramid_pool(x, bins),
        lambda x: testing.plain_pyramid_pool(x, bins),
        [features(size, dtype, memory_format)],
        backend,
        packed(size, bins, dtype),
    )
    x = features(size, dtype, memory_format).to(testing.device(backend))
    with testing.use_backend(backend), testing.poisoned_memory(), torch.no_grad():
        pyramid, out = pyramid_pool(x, bins, reserve=(1, 2))
        assert torch.equal(pyramid, pyramid_pool(x, bins))
    assert torch.equal(out[:, 1:-2], x)
    assert out[:, :1].isnan().all()
    assert out[:, -2:].isnan().all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["cuda", "cpu", "reference"])
def test_many_levels(backend, memory_format):
    """More than the CUDA kernels take in one launch; of integers that any order sums exactly."""
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    bins = (1, 2) * 33
    x = torch.randint(-9, 9, (1, 2, 4, 3)).mul(12).float().contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randint(-9, 9, (1, 165, 2)).mul(12).float()
    plain = testing.plain_pyramid_pool(x, bins)
    leaf = x.detach().to(testing.device(backend)).requires_grad_()
    with testing.use_backend(backend):
        pyramid = pyramid_pool(leaf, bins)
        (dx,) = torch.autograd.grad(pyramid, leaf, grad.to(leaf.device))
    assert torch.equal(pyramid.cpu(), plain)
    assert torch.equal(dx.cpu(), torch.autograd.grad(plain, x, grad)[0])


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_any_alignment(backend, dtype, memory_format):
    """Planes of an odd size, pixels of an odd number of channels, and storage that starts anywhere."""
    bins = (1, 2, 3)
    few = backend == "triton"  # interpreted, a thousand times slower
    for channels, offset in ((3, 1),) if few else ((3, 1), (3, 8), (8, 3)):
        size = (2, channels, 13, 11)
        base = torch.randn(2 * channels * 13 * 11 + offset).to(dtype).to(testing.device(backend))[offset:]
        x = base.view(2, 13, 11, channels).movedim(3, 1) if memory_format == torch.channels_last else base.view(size)
        plain, exact = (testing.plain_pyramid_pool(t, bins) for t in (x, x.double()))
        with testing.use_backend(backend), testing.poisoned_memory(), torch.no_grad():
            for before in (1,) if few else (0, 1):
                pyramid, out = pyramid_pool(x, bins, reserve=(before, 8))
                assert torch.equal(out[:, before : before + channels], x)
                assert out[:, :before].isnan().all()
                assert out[:, before + channels :].isnan().all()
                testing.assert_within(pyramid, plain, exact)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_kernels_agree_in_any_order(dtype, memory_format):
    sizes = [((2, 9, 13, 20), (1, 2, 3, 6)), ((1, 2, 97, 90), (1, 2, 3, 6))]
    tensors = [(features(size, dtype, memory_format), bins, packed(size, bins, dtype)) for size, bins in sizes]

    def run():
        results = []
        for x, bins, grad in tensors:
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            pyramid, out = pyramid_pool(leaf, bins, reserve=(1, 3))
            copy = out[:, 1:-3]
            (dx,) = torch.autograd.grad([pyramid, copy], leaf, [grad, x.flip(2).contiguous()])
            results += [pyramid.detach(), copy.detach(), dx]
        return results

    testing.assert_same_in_any_order(OP, run)


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


def join_reserved(pyramid, out):
    return pyramid, out[:, 2:-1]


def test_gradcheck():
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, (1, 2, 3)), x)
    assert torch.autograd.gradcheck(lambda x: pyramid_pool(x, (1, 2, 3), return_input=True), x)
    assert torch.autograd.gradcheck(lambda x: join_reserved(*pyramid_pool(x, (1, 2, 3), reserve=(2, 1))), x)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_opcheck(memory_format):
    x = features((2, 3, 7, 6), memory_format=memory_format).requires_grad_()
    torch.library.opcheck(torch.ops.pspnet_fast.pyramid_pool.default, (x, [1, 2, 3]))
    with testing.poisoned_memory():
        concat = (x.detach(), [1, 2, 3], 3, 0)  # no channel that nobody writes: opcheck compares results
        torch.library.opcheck(torch.ops.pspnet_fast.pyramid_pool_concat.default, concat)
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
        (torch.zeros(1, 3, 4, 4), (4097,), ValueError, r"at most 16777216 cells, got \(4097,\)"),
        (torch.zeros(1, 3, 4, 4), (1, 4096), ValueError, "at most 16777216 cells"),
        (torch.zeros(1, 3, 4, 4), [2**32], ValueError, "at most 16777216 cells"),  # whose square is 0 in 64 bits
        (torch.zeros(1, 3, 4, 4), [1, 2**32], ValueError, "at most 16777216 cells"),
        (torch.zeros(1, 3, 4, 4), [2**100], ValueError, "at most 16777216 cells"),
        (torch.zeros(1, 3, 4, 4), 6, TypeError, "sequence of integers"),
        ([[1.0]], (1,), TypeError, "x must be a tensor, got list"),
    ],
)
def test_bad_input(x, bins, error, words):
    with pytest.raises(error, match=f"^pyramid_pool: .*{words}"):
        pyramid_pool(x, bins)


@pytest.mark.parametrize(
    ("reserve", "return_input"),
    [((-1, 2), False), ((0, -3), False), ((1, 1), True), ((2**62, 2**62), False)],
    ids=["before", "after", "both", "beyond"],
)
def test_bad_reserve(reserve, return_input):
    with pytest.raises(
        ValueError, match="^pyramid_pool: reserve must be two numbers of channels, without return_input"
    ):
        pyramid_pool(torch.zeros(1, 3, 4, 4), (1,), reserve=reserve, return_input=return_input)
