import pytest
import torch
import torch.nn.functional as F

from pspnet_fast import testing
from pspnet_fast.functional import upsample_argmax

OP = "upsample_argmax"
FORMATS = [torch.contiguous_format, torch.channels_last]
CASES = [  # size of the logits, size of the labels
    ((2, 5, 4, 3), (9, 17)),
    ((1, 19, 3, 7), (20, 49)),  # 8 pixels a cell and a last column of its own; a last row
    ((2, 37, 5, 6), (5, 6)),  # equal
    ((1, 9, 13, 11), (4, 7)),  # smaller
    ((1, 150, 4, 5), (25, 33)),
    ((3, 1, 4, 4), (9, 6)),  # one class
    ((1, 3, 1, 1), (11, 13)),
    ((1, 300, 2, 3), (7, 40)),  # labels past a byte
    ((1, 21, 9, 2), (1, 1)),
    ((1, 16, 3, 4), (70, 3)),  # long runs of rows, fewer columns
]


def there(backend, *tensors):
    return [t.to(testing.device(backend)) for t in tensors]


def run(backend, logits, *args, **options):
    with testing.use_backend(backend), testing.poisoned_memory():
        result = upsample_argmax(logits.to(testing.device(backend)), *args, **options)
    return tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()


@pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=2))
def test_labels_and_confidence(backend, case, dtype, memory_format, align_corners):
    """Labels where two classes are not within rounding of each other; confidence everywhere."""
    shape, size = case
    logits = (3 * torch.randn(shape)).to(dtype).contiguous(memory_format=memory_format)
    labels, confidence = run(backend, logits, size, align_corners, confidence=True)
    assert labels.dtype == (torch.uint8 if shape[1] <= 256 else torch.int64)
    assert torch.equal(labels, run(backend, logits, size, align_corners))
    maps = F.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)
    expected, exact = testing.plain_upsample_argmax(logits.double(), size, align_corners)
    best = maps.topk(min(2, shape[1]), 1).values
    clear = best[:, 0] - best[:, -1] > 8 * torch.finfo(torch.float32).eps * maps.abs().max()
    clear |= torch.tensor(shape[1] == 1)
    assert clear.float().mean() > (0.99 if dtype == torch.float32 else 0.8)
    assert torch.equal(labels[clear].long(), expected[clear])
    testing.assert_within(confidence, testing.plain_upsample_argmax(logits.float(), size, align_corners)[1], exact)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend, memory_format):
    """Two classes apart by less than float32 can tell."""
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    logits = torch.randn(1, 11, 5, 6, dtype=torch.float64)
    logits = torch.cat([logits, logits + 1e-12], 1).contiguous(memory_format=memory_format)
    labels, confidence = run(backend, logits, (17, 31), confidence=True)
    expected, exact = testing.plain_upsample_argmax(logits, (17, 31))
    assert torch.equal(labels.long(), expected)
    assert labels.min() >= 11
    testing.assert_within(confidence, exact.float(), exact)


EXACT_SIZES = [  # of maps on which 4 x 5 nodes are interpolated exactly: fractions are dyadic
    ((8, 10), False),
    ((16, 20), False),
    ((32, 40), False),
    ((4, 5), False),
    ((7, 9), True),
    ((25, 33), True),
    ((13, 5), True),
    ((4, 5), True),
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("backend", "size"), testing.backends_and(EXACT_SIZES, OP, interpret=1))
def test_exact_values_and_ties(backend, size, memory_format):
    """Small integers, interpolated without rounding: every label is torch's, the first of equals."""
    size, align_corners = size
    for classes, most in ((9, 2), (40, 3)):
        logits = torch.randint(-most, most + 1, (2, classes, 4, 5)).float().contiguous(memory_format=memory_format)
        maps = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
        assert ((maps == maps.amax(1, keepdim=True)).sum(1) > 1).float().mean() > 0.05, "too few ties"
        assert torch.equal(run(backend, logits, size, align_corners).long(), maps.argmax(1))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "size"), testing.backends_and(EXACT_SIZES[3:] + EXACT_SIZES[1:3], OP, interpret=1))
def test_nan_and_inf(backend, size, dtype, memory_format):
    """The first NaN is the largest; Inf times a fraction of zero is NaN, as in torch; a class of -Inf never wins."""
    size, align_corners = size
    logits = torch.randint(-3, 4, (3, 21, 4, 5)).float()
    logits[0, 7, 1, 2] = logits[0, 3, 2, 2] = logits[0, 20, 3, 4] = torch.nan
    logits[0, 11, 0, 0], logits[0, 12, 0, 1] = torch.inf, -torch.inf
    logits[1, :18] = -torch.inf
    logits[2, :, 1, 1] = -torch.inf
    logits = logits.to(dtype).contiguous(memory_format=memory_format)
    labels, confidence = run(backend, logits, size, align_corners, confidence=True)
    expected, exact = testing.plain_upsample_argmax(logits.float(), size, align_corners)
    assert torch.equal(labels.long(), expected)
    assert torch.equal(confidence.isnan(), exact.isnan())
    torch.testing.assert_close(confidence, exact, equal_nan=True)
    assert torch.equal(run(backend, logits, size, align_corners), labels)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_values_whose_difference_overflows(backend):
    logits = torch.tensor([-3e38, 3e38, 1e38, 2e38])[torch.randint(0, 4, (1, 5, 4, 5))]
    expected = F.interpolate(logits.double(), (25, 33), mode="bilinear", align_corners=True)
    best = expected.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1e33
    assert torch.equal(run(backend, logits, (25, 33))[clear].long(), expected.argmax(1)[clear])


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_dtypes_of_the_labels(backend):
    logits = torch.randn(1, 6, 3, 4)
    expected = F.interpolate(logits, (6, 11), mode="bilinear", align_corners=True).argmax(1)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        labels, confidence = run(backend, logits, (6, 11), confidence=True, dtype=dtype)
        assert labels.dtype == dtype
        assert confidence.dtype == torch.float32
        assert torch.equal(labels.long(), expected)
        assert torch.equal(run(backend, logits, (6, 11), dtype=dtype), labels)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_no_images(backend):
    labels, confidence = run(backend, torch.zeros(0, 3, 6, 5), (4, 7), confidence=True)
    assert labels.shape == confidence.shape == (0, 4, 7)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_any_strides(backend):
    base = torch.randint(-4, 5, (2, 9, 8, 6)).float()
    for logits in (base[:, 1:5, 2:, ::2], base.transpose(2, 3), base.flatten()[1:181].view(2, 3, 5, 6)):
        height, width = logits.shape[2:]
        size = (2 * height, 4 * width)
        expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
        assert torch.equal(run(backend, logits, size, False).long(), expected)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_repeats_bitwise(backend, memory_format):
    """For one and for two threads, between which the rows of a cell are parted.

    PyTorch's softmax, which the reference takes, rounds otherwise where its threads' shares end: not with two, then.
    """
    logits = torch.randn(1, 40, 3, 4).contiguous(memory_format=memory_format)
    runs = []
    for threads in (1, 1 if backend == "reference" else 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        runs.append(run(backend, logits, (30, 29), confidence=True))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("confidence", [False, True], ids=["labels", "confidence"])
def test_memory(confidence):
    """Never the upsampled logits: 75 MB here."""
    if reason := testing.unavailable(OP, "cpu"):
        pytest.skip(reason)
    logits = torch.randn(1, 100, 10, 10)
    with testing.use_backend("cpu"):
        peak = testing.peak_memory(lambda: upsample_argmax(logits, (433, 433), confidence=confidence), "cpu")
    assert peak < 3e6


def test_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels, confidence = upsample_argmax(logits, (8, 8), confidence=True)
    assert not labels.requires_grad
    assert not confidence.requires_grad


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_opcheck(memory_format):
    arguments = (torch.randn(2, 5, 3, 4).contiguous(memory_format=memory_format), [7, 9], True, torch.int32)
    torch.library.opcheck(torch.ops.pspnet_fast.upsample_argmax.default, arguments)
    torch.library.opcheck(torch.ops.pspnet_fast.upsample_argmax_confidence.default, arguments)


@pytest.mark.parametrize(
    ("logits", "size", "options", "error", "words"),
    [
        (torch.zeros(2, 2), (2, 2), {}, ValueError, r"logits must be 4-D \(N, K, H, W\), got \(2, 2\)"),
        (torch.zeros(1, 0, 2, 2), (2, 2), {}, ValueError, r"at least one class, row and column, got \(1, 0, 2, 2\)"),
        (torch.zeros(1, 2, 2, 2).int(), (2, 2), {}, TypeError, "got int32"),
        (torch.zeros(1, 2, 2, 2), 2, {}, TypeError, r"size must be two integers \(H, W\), got 2"),
        (torch.zeros(1, 2, 2, 2), (2, 2.5), {}, TypeError, "size must be integers"),
        (torch.zeros(1, 2, 2, 2), (2,), {}, ValueError, r"size must be \(H, W\), both positive, got \(2,\)"),
        (torch.zeros(1, 2, 2, 2), (0, 2), {}, ValueError, "both positive"),
        (
            torch.zeros(1, 2, 2, 2),
            (1, 2**24 + 1),
            {},
            ValueError,
            r"size must be at most 16777216 x 16777216, got \(1, 1677",
        ),
        (torch.zeros(1, 2, 2, 2), (2**63, 1), {}, ValueError, "size must be at most"),
        (torch.zeros(1, 2, 2, 2), (2, 2), {"dtype": torch.int16}, TypeError, "uint8, int32 or int64, got torch.int16"),
        (torch.zeros(1, 257, 2, 2), (2, 2), {"dtype": torch.uint8}, ValueError, "at most 256, got 257"),
    ],
)
def test_bad_input(logits, size, options, error, words):
    with pytest.raises(error, match=f"^upsample_argmax: .*{words}"):
        upsample_argmax(logits, size, **options)
