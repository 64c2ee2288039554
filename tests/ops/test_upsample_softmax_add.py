import pytest
import torch

from pspnet_fast import testing
from pspnet_fast.functional import upsample_softmax_add

OP = "upsample_softmax_add"
CASES = [  # logits, size of a window, height and width of the total, corners
    ((2, 5, 3, 4), (9, 13), (12, 15), ((0, 0), (3, 2))),  # overlapping
    ((3, 19, 4, 3), (8, 10), (13, 11), ((-3, -4), (6, 5), (20, 2))),  # reaching outside, and one altogether
    ((1, 37, 5, 6), (5, 6), (5, 6), ((0, 0),)),  # equal
    ((2, 3, 1, 1), (17, 7), (20, 20), ((1, 2), (1, 2))),
    ((1, 150, 7, 9), (4, 5), (6, 6), ((-1, 3),)),  # smaller
    ((2, 1, 2, 40), (3, 35), (9, 40), ((5, 4), (0, 0))),
    ((1, 3, 2, 5), (2, 300), (3, 290), ((0, -7),)),  # wider than a block of pixels
    ((2, 6, 2, 9), (3, 300), (4, 290), ((1, -7), (0, 5))),  # wider, and overlapping
    ((1, 150, 2, 90), (3, 85), (3, 90), ((0, 3),)),  # more nodes than a block keeps
]


def run(backend, total, logits, *args, **options):
    there = testing.device(backend)
    total = total.clone().to(there)
    with testing.use_backend(backend), testing.poisoned_memory():
        assert upsample_softmax_add(total, logits.to(there), *args, **options) is total
    return total.cpu()


@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.channels_last),
        (torch.float16, torch.contiguous_format),
    ],
    ids=str,
)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=1))
def test_accuracy(backend, case, dtype, memory_format, align_corners):
    shape, size, extent, corners = case
    logits = (3 * torch.randn(shape)).to(dtype).contiguous(memory_format=memory_format)
    total = torch.rand(shape[1], *extent)
    for flip, weight in ((False, 1.0), (True, 0.25)):
        ours = run(backend, total, logits, corners, size, align_corners, flip, weight)
        plain, exact = total.clone(), total.double()
        testing.plain_upsample_softmax_add(plain, logits.float(), corners, size, align_corners, flip, weight)
        testing.plain_upsample_softmax_add(exact, logits.double(), corners, size, align_corners, flip, weight)
        testing.assert_within(ours, plain, exact)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend):
    """Values that float32 cannot tell apart, of probabilities that are."""
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    logits = 1e8 + torch.randn(1, 7, 3, 4, dtype=torch.float64)
    exact = torch.zeros(7, 9, 13, dtype=torch.float64)
    testing.plain_upsample_softmax_add(exact, logits, ((0, 0),), (9, 13))
    ours = run(backend, torch.zeros(7, 9, 13), logits, ((0, 0),), (9, 13))
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_large_values_nan_and_inf(backend):
    """Exponentials that underflow to nothing, a class of -Inf, and NaN and Inf, which spoil their pixels."""
    logits = 200 * torch.randint(-3, 4, (4, 20, 3, 4)).float()
    logits[0, :18] = -torch.inf
    logits[1, 5, 1, 1], logits[2, 6, 0, 2], logits[3, :, 2, 2] = torch.nan, torch.inf, -torch.inf
    corners = ((0, 0), (0, 16), (12, 0), (12, 16))
    expected = torch.zeros(20, 24, 32)
    testing.plain_upsample_softmax_add(expected, logits, corners, (12, 16), False)
    ours = run(backend, torch.zeros(20, 24, 32), logits, corners, (12, 16), False)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_no_windows_and_corners_in_a_tensor(backend):
    total, logits = torch.rand(3, 5, 6), torch.randn(2, 3, 2, 2)
    assert torch.equal(run(backend, total, logits[:0], (), (4, 4)), total)
    corners = [[1, 0], [0, 2]]
    assert torch.equal(
        run(backend, total, logits, torch.tensor(corners), (4, 4)), run(backend, total, logits, corners, (4, 4))
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_any_strides_and_repeats_bitwise(backend):
    """The reference is torch's softmax, whose bits depend on the number of threads."""
    base = torch.randn(2, 40, 6, 8)
    total, runs = torch.rand(4, 25, 19), []
    logits = base[:, 1:5, ::2, 2:]
    for threads, tensor in ((1, logits), (2, logits), (2, logits.contiguous())):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        runs.append(run(backend, total, tensor, ((0, 0), (5, 1)), (20, 18)))
        torch.set_num_threads(before)
    for again in runs[1:]:
        torch.testing.assert_close(runs[0], again, rtol=1e-6 if backend == "reference" else 0, atol=0)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_windows_are_added_in_their_order(backend):
    """Sums are rounded: three windows at once give the bits of one after another, and other bits than in another order."""
    total, logits = torch.rand(3, 9, 8), torch.randn(3, 3, 2, 2)
    corners = ((0, 0), (2, 1), (1, 2))
    together = run(backend, total, logits, corners, (6, 6))
    orders = []
    for order in ((0, 1, 2), (2, 1, 0)):
        out = total
        for m in order:
            out = run(backend, out, logits[m : m + 1], corners[m : m + 1], (6, 6))
        orders.append(out)
    assert torch.equal(together, orders[0])
    assert not torch.equal(together, orders[1])


@pytest.mark.parametrize("backend", testing.backends(OP))
@pytest.mark.parametrize("size", [(3, 4), (6, 4), (3, 8)], ids=str)
def test_a_neighbours_nan_is_not_spread_where_a_size_stays(backend, size):
    logits = torch.randn(1, 3, 3, 4)
    logits[0, 1, 1, 2] = torch.nan
    expected = testing.plain_upsample_softmax_add(torch.zeros(3, *size), logits, ((0, 0),), size, False)
    ours = run(backend, torch.zeros(3, *size), logits, ((0, 0),), size, False)
    assert torch.equal(ours.isnan(), expected.isnan())


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_corners_as_far_as_they_may_be(backend):
    """They add nothing, and no sum of theirs leaves its integers."""
    total, logits = torch.rand(3, 5, 6), torch.randn(4, 3, 2, 2)
    far = 2**30
    assert torch.equal(run(backend, total, logits, ((far, far), (-far, 0), (0, -far), (-far, far)), (4, 4)), total)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(weight):
    with pytest.raises(ValueError, match="^upsample_softmax_add: weight must be finite"):
        upsample_softmax_add(torch.zeros(3, 4, 4), torch.zeros(1, 3, 2, 2), ((0, 0),), (4, 4), weight=weight)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_a_negative_weight_takes_away(backend):
    total, logits = torch.rand(3, 5, 6), torch.randn(1, 3, 2, 2)
    added = run(backend, total, logits, ((0, 1),), (4, 4))
    torch.testing.assert_close(run(backend, added, logits, ((0, 1),), (4, 4), weight=-1.0), total)


def test_any_order():
    logits, total = torch.randn(3, 13, 3, 5), torch.rand(13, 12, 150)
    wide = torch.randn(3, 150, 2, 90)
    testing.assert_same_in_any_order(
        OP,
        lambda: [
            upsample_softmax_add(total.clone(), logits, ((0, 0), (2, 5), (4, -3)), (7, 140), flip=True),
            upsample_softmax_add(torch.zeros(150, 4, 90), wide, ((0, 0), (0, 2), (1, 1)), (2, 60)),
        ],
    )


def test_memory():
    """Never the upsampled logits: 75 MB here."""
    if reason := testing.unavailable(OP, "cpu"):
        pytest.skip(reason)
    logits, total = torch.randn(1, 100, 10, 10), torch.zeros(100, 433, 433)
    with testing.use_backend("cpu"):
        peak = testing.peak_memory(lambda: upsample_softmax_add(total, logits, ((0, 0),), (433, 433)), "cpu")
    assert peak < 3e6


def test_opcheck():
    arguments = (torch.rand(5, 9, 9), torch.randn(2, 5, 3, 4), [0, 0, 2, 1], [7, 8], True, False, 0.5)
    torch.library.opcheck(torch.ops.pspnet_fast.upsample_softmax_add.default, arguments)


@pytest.mark.parametrize(
    ("total", "corners", "size", "error", "words"),
    [
        (
            torch.zeros(3, 4, 4).double(),
            ((0, 0),),
            (4, 4),
            TypeError,
            "total must be a float32 tensor, got torch.float64",
        ),
        (torch.zeros(2, 4, 4), ((0, 0),), (4, 4), ValueError, r"with K = 3, got \(2, 4, 4\)"),
        (torch.zeros(3, 4, 4).transpose(1, 2), ((0, 0),), (4, 4), ValueError, r"contiguous, got strides \(16, 1, 4\)"),
        (torch.zeros(3, 4, 4, device="meta"), ((0, 0),), (4, 4), ValueError, "one device, got meta and cpu"),
        (torch.zeros(3, 4, 4), ((0, 0), (0, 0)), (4, 4), ValueError, r"corners must be 1 pairs \(top, left\)"),
        (torch.zeros(3, 4, 4), (0,), (4, 4), ValueError, r"corners must be 1 pairs \(top, left\)"),
        (torch.zeros(3, 4, 4), ((0, 0.5),), (4, 4), TypeError, "corners must be integers"),
        (torch.zeros(3, 4, 4), torch.zeros(1, 2), (4, 4), TypeError, "integers on the CPU, got torch.float32"),
        (torch.zeros(3, 4, 4), ((0, 0),), (4, 0), ValueError, "both positive"),
        (torch.zeros(3, 4, 4), ((0, 0),), (4, 2**40), ValueError, "size must be at most 16777216 x 16777216"),
        (torch.zeros(3, 4, 4), ((2**30 + 1, 0),), (4, 4), ValueError, "corners must lie within 1073741824"),
        (torch.zeros(3, 4, 4), ((0, -(2**63)),), (4, 4), ValueError, "corners must lie within 1073741824"),
    ],
)
def test_bad_input(total, corners, size, error, words):
    with pytest.raises(error, match=f"^upsample_softmax_add: .*{words}"):
        upsample_softmax_add(total, torch.zeros(1, 3, 2, 2), corners, size)
