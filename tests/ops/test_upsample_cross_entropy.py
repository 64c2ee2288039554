import math

import pytest
import torch

from pspnet_fast import testing
from pspnet_fast.functional import upsample_cross_entropy
from pspnet_fast.geometry import is_channels_last

OP = "upsample_cross_entropy"
FORMATS = [torch.contiguous_format, torch.channels_last]
CASES = [  # (N, K, h, w), (H, W), reduction, label smoothing, class weights, align_corners, scale of the logits
    ((1, 5, 3, 2), (6, 5), "mean", 0.0, False, True, 1.0),
    ((2, 19, 2, 3), (5, 7), "none", 0.1, True, False, 3.0),
    ((2, 3, 4, 4), (4, 4), "sum", 0.1, False, True, 1.0),  # as large as the logits
    ((1, 21, 9, 11), (4, 5), "mean", 0.2, True, True, 2.0),  # smaller
    ((2, 1, 3, 3), (8, 8), "none", 0.0, True, True, 1.0),  # one class
    ((1, 150, 6, 5), (41, 33), "mean", 0.0, True, True, 2.0),  # 8x
    ((1, 17, 1, 1), (37, 20), "sum", 0.0, False, False, 1.0),  # one cell, runs past a unit
    ((1, 37, 1, 4), (3, 70), "none", 1.0, True, True, 1.0),  # all of it smoothed
    ((1, 1000, 2, 2), (6, 5), "mean", 0.1, True, False, 1.0),
    ((1, 33, 5, 4), (17, 19), "none", 0.1, True, True, 300.0),  # far apart: the bound loses digits
    ((2, 8, 3, 5), (10, 9), "mean", 0.0, False, False, 1e4),
]


def inputs(size, at, weighted, scale=1.0, dtype=torch.float32, memory_format=torch.contiguous_format):
    logits = (scale * torch.randn(size)).to(dtype).contiguous(memory_format=memory_format)
    target = torch.randint(0, size[1], (size[0], *at))
    target[torch.rand(target.shape) < 0.2] = 255
    return logits, target, torch.rand(size[1]) + 0.1 if weighted else None


def wide(tensor, logits):
    """Weights as the function and plain PyTorch take them beside these logits."""
    return None if tensor is None else tensor.to(logits.device, torch.promote_types(logits.dtype, torch.float32))


def compare(case, backend, dtype, memory_format=torch.contiguous_format, target_dtype=torch.int64):
    size, at, reduction, smoothing, weighted, corners, scale = case
    logits, target, weight = inputs(size, at, weighted, scale, dtype, memory_format)
    if size[1] > 255:
        target[target == 255] = -1
    ignore = -1 if size[1] > 255 else 255
    cotangent = torch.randn(target.shape) if reduction == "none" else torch.tensor(0.7)
    return logits, testing.assert_as_accurate(
        lambda x: upsample_cross_entropy(
            x, target.to(x.device, target_dtype), wide(weight, x), ignore, reduction, smoothing, corners
        ),
        lambda x: testing.plain_upsample_cross_entropy(
            x, target, wide(weight, x), ignore, reduction, smoothing, corners
        ),
        [logits],
        backend,
        cotangent,
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(CASES, OP, interpret=2))
def test_accuracy(backend, case, dtype, memory_format):
    logits, (loss, gradient) = compare(case, backend, dtype, memory_format)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert is_channels_last(gradient) == is_channels_last(logits)


@pytest.mark.parametrize("case", CASES[:7], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_float64(backend, case):
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    _, (loss, _) = compare(case, backend, torch.float64)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_bytes_are_class_numbers(backend):
    compare(((1, 200, 2, 2), (4, 5), "mean", 0.0, True, True, 1.0), backend, torch.float32, target_dtype=torch.uint8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_pixel_weight(backend, reduction):
    logits, target, weight = inputs((2, 6, 2, 3), (5, 4), True)
    pixel_weight = torch.rand(target.shape)
    pixel_weight[:, 2:4] = 0

    def plain(x):
        losses = testing.plain_upsample_cross_entropy(x, target, wide(weight, x), reduction="none")
        losses, counts = losses * pixel_weight.to(x.dtype), torch.where(target == 255, 0, weight[target % 255])
        total = (counts * pixel_weight).double().sum().to(x.dtype)
        return {"mean": losses.sum() / total, "sum": losses.sum(), "none": losses}[reduction]

    testing.assert_as_accurate(
        lambda x: upsample_cross_entropy(
            x, target.to(x.device), wide(weight, x), reduction=reduction, pixel_weight=pixel_weight.to(x.device)
        ),
        plain,
        [logits],
        backend,
        torch.ones(target.shape) if reduction == "none" else torch.tensor(1.0),
    )


@pytest.mark.parametrize("backend", testing.backends(OP))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored(backend, reduction):
    """A mean over nothing is NaN and its gradient 0, as torch's; ignored pixels' logits do not matter."""
    logits = torch.full((1, 3, 2, 2), torch.nan, device=testing.device(backend), requires_grad=True)
    target = torch.full((1, 5, 5), 255, device=logits.device)
    with testing.use_backend(backend), testing.poisoned_memory():
        loss = upsample_cross_entropy(logits, target, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert (grad == 0).all()


KEPT_SIZES = [
    (3, 4),
    (3, 9),
    (7, 4),
    (3, 2),
]  # of 3 x 4 cells: both, the rows, the columns; the rows, the columns fewer


@pytest.mark.parametrize(("reduction", "align_corners"), [("mean", True), ("none", False)])
@pytest.mark.parametrize(("backend", "at"), testing.backends_and(KEPT_SIZES, OP, interpret=3))
def test_ignored_pixels_are_not_read_where_a_size_stays(backend, at, align_corners, reduction):
    """The row, column or pixel of a cell that is not finite is ignored: loss and gradient are those of any finite cell."""
    for memory_format in FORMATS:
        logits, target, _ = inputs((2, 9, 3, 4), at, False, memory_format=memory_format)
        target[:, :, :2] = target[:, :, :2].clamp(max=8)  # some pixels of every row and column count
        target[:, 1 if at[0] == 3 else slice(None), 2 if at[1] == 4 else slice(None)] = 255
        assert (target != 255).any()
        bad = logits.clone(memory_format=torch.preserve_format)
        bad[0, 4, 1, 2], bad[0, 5, 1, 2], bad[1, :, 1, 2] = math.inf, -math.inf, math.nan
        results = []
        for values in (logits, bad):
            leaf = values.to(testing.device(backend)).requires_grad_()
            with testing.use_backend(backend), testing.poisoned_memory():
                there = target.to(leaf.device)
                loss = upsample_cross_entropy(leaf, there, reduction=reduction, align_corners=align_corners)
                results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        for finite, mine in zip(*results, strict=True):
            assert finite.isfinite().all()
            assert torch.equal(mine, finite)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_one_pixels_loss_stays_in_its_cell_where_the_size_stays(backend):
    """A NaN that counts spoils its own pixel's loss, and its own cell's gradient."""
    logits = torch.randn(1, 5, 3, 4)
    logits[0, 2, 1, 2] = torch.nan
    target = torch.randint(0, 5, (1, 3, 4))
    leaf = logits.to(testing.device(backend)).requires_grad_()
    with testing.use_backend(backend):
        losses = upsample_cross_entropy(leaf, target.to(leaf.device), reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    only = torch.zeros(3, 4, dtype=torch.bool)
    only[1, 2] = True
    assert torch.equal(losses[0].isnan().cpu(), only)
    assert torch.equal(grad[0].isnan().any(0).cpu(), only)


BYTES = [(5, 256), (5, -256), *((k, i) for k in (5, 255, 256, 300) for i in (-100, -1, 0, 3, 255, 256, 300, 2**40))]


@pytest.mark.parametrize(("backend", "case"), testing.backends_and(BYTES, OP, interpret=2))
def test_bytes_and_an_ignore_index_that_they_cannot_hold(backend, case):
    """Torch wraps 256 to 0 where it compares bytes; here every dtype of the target means the same."""
    classes, ignore_index = case
    logits = torch.randn(1, classes, 2, 3, device=testing.device(backend))
    target = torch.randint(0, min(classes, 256), (1, 4, 6), device=logits.device)
    target[0, 0, :3] = torch.tensor([0, 1, min(classes, 256) - 1])
    if 0 <= ignore_index < 256:
        target[0, 1] = ignore_index
    with testing.use_backend(backend):
        for reduction in ("mean", "none"):
            of_long, of_bytes = (
                upsample_cross_entropy(logits, t, None, ignore_index, reduction, check_targets=True)
                for t in (target, target.byte())
            )
            assert torch.equal(of_long, of_bytes)
        if classes < 255 and ignore_index != 255:
            target[0, 2, 2] = 255
            for wrong in (target, target.byte()):
                with pytest.raises(ValueError, match="got 255; 1 such"):
                    upsample_cross_entropy(logits, wrong, None, ignore_index, check_targets=True)


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_no_images(backend):
    logits = torch.zeros(0, 3, 2, 2, device=testing.device(backend), requires_grad=True)
    target = torch.zeros(0, 5, 5, dtype=torch.int64, device=logits.device)
    with testing.use_backend(backend):
        for reduction in ("mean", "sum", "none"):
            loss = upsample_cross_entropy(logits, target, reduction=reduction)
            assert loss.shape == (target.shape if reduction == "none" else ())
            assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape
        assert upsample_cross_entropy(logits, target).isnan()


NOT_FINITE = [
    (math.nan, 0.1),
    (math.inf, 0.0),
    (-math.inf, 0.1),
    (3e38, 0.1),
    (-3e38, 0.1),
    (math.inf, 0.1),
    (-math.inf, 0.0),
]


@pytest.mark.parametrize(("backend", "case"), testing.backends_and(NOT_FINITE, OP, interpret=3))
def test_not_finite(backend, case):
    """Loss and gradient are NaN and infinite where plain PyTorch's are. (No pixel lies on a cell exactly.)"""
    value, smoothing = case
    logits, target, weight = inputs((1, 17, 3, 3), (5, 5), True)
    target = target.clamp(max=16)
    target[:, 3] = 4
    logits[0, 4, 1, 2] = value
    logits[0, :, 2, 0] = value
    results = []
    for function in (upsample_cross_entropy, testing.plain_upsample_cross_entropy):
        ours = function is upsample_cross_entropy
        leaf = logits.to(testing.device(backend) if ours else "cpu").requires_grad_()
        there = target.to(leaf.device)
        with testing.use_backend(backend if ours else None):
            loss = function(leaf, there, wide(weight, leaf), 255, "none", smoothing, False)
            results.append((loss.detach().cpu(), torch.autograd.grad(loss.sum(), leaf)[0].cpu()))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.isinf(), theirs.isinf())
        finite = theirs.isfinite() & (theirs.abs() < 1e30)
        assert torch.allclose(mine[finite], theirs[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", testing.backends(OP))
def test_any_strides(backend, reduction):
    base, target, _ = inputs((2, 6, 3, 4), (5, 4), False)
    target = target.transpose(1, 2).clamp(max=2)
    for logits in (base[:, 1:4, 1:, ::2], base[:, :3].transpose(2, 3), base.flatten()[1:73].view(2, 3, 4, 3)):
        cotangent = torch.randn(()).expand(target.shape) if reduction == "none" else torch.tensor(1.0)
        testing.assert_as_accurate(
            lambda x: upsample_cross_entropy(x, target.to(x.device), reduction=reduction),
            lambda x: testing.plain_upsample_cross_entropy(x, target, reduction=reduction),
            [logits],
            backend,
            cotangent,
        )


@pytest.mark.parametrize("backend", testing.backends(OP))
def test_a_target_that_is_no_class(backend):
    logits, target, _ = inputs((1, 4, 2, 3), (5, 6), False)
    target[0, 0, :3], target[0, 1, 0] = 7, -3
    logits, target = logits.to(testing.device(backend)), target.to(testing.device(backend))
    with testing.use_backend(backend):
        words = (
            r"^upsample_cross_entropy: target must be a class in \[0, 4\) or ignore_index = 255, got 7; 4 such pixels"
        )
        for reduction in ("mean", "none"):
            with pytest.raises(ValueError, match=words):
                upsample_cross_entropy(logits, target, reduction=reduction, check_targets=True)
        if logits.device.type == "cpu":
            with pytest.raises(ValueError, match=words):
                upsample_cross_entropy(logits, target)
        leaf = logits.clone().requires_grad_()
        ignored = torch.where((target == 7) | (target == -3), 255, target)
        for reduction in ("mean", "none"):
            unchecked = upsample_cross_entropy(leaf, target, reduction=reduction, check_targets=False)
            expected = upsample_cross_entropy(leaf, ignored, reduction=reduction)
            assert torch.equal(unchecked, expected)
            grads = [torch.autograd.grad(loss.sum(), leaf)[0] for loss in (unchecked, expected)]
            assert torch.equal(*grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", [b for b in testing.backends(OP) if b.values[0] != "reference"])
def test_memory(backend, reduction):
    """Nothing of size N*K*H*W: forward and backward take a small part of it."""
    size, at = ((1, 64, 2, 2), (9, 9)) if backend == "triton" else ((2, 64, 10, 10), (80, 80))
    logits, target, _ = inputs(size, at, False)
    leaf, target = logits.to(testing.device(backend)).requires_grad_(), target.to(testing.device(backend))

    def step():
        torch.autograd.grad(upsample_cross_entropy(leaf, target, reduction=reduction).sum(), leaf)

    with testing.use_backend(backend):
        step()
        taken = testing.peak_memory(step, leaf.device.type)
    upsampled = 4 * size[0] * size[1] * at[0] * at[1]
    assert 0 < taken < upsampled / 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", [b for b in testing.backends(OP) if b.values[0] != "reference"])
def test_repeats_to_the_bit(backend, reduction):
    """At every run and for every number of threads."""
    size, at = ((1, 5, 2, 2), (5, 5)) if backend == "triton" else ((2, 40, 12, 9), (96, 70))
    logits, target, weight = inputs(size, at, True)
    leaf, results, threads = logits.to(testing.device(backend)).requires_grad_(), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with testing.use_backend(backend):
                loss = upsample_cross_entropy(leaf, target.to(leaf.device), wide(weight, leaf), 255, reduction, 0.1)
                results.append((loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend, reduction):
    if reason := testing.unavailable(OP, backend):
        pytest.skip(reason)
    logits, target, weight = inputs((1, 3, 2, 3), (4, 5), True, dtype=torch.float64)
    with testing.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x: upsample_cross_entropy(x, target, weight, 255, reduction, 0.1), logits.requires_grad_()
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_opcheck(memory_format, weighted):
    logits, target, weight = inputs((2, 3, 4, 2), (5, 6), weighted, memory_format=memory_format)
    leaf, pixels = logits.requires_grad_(), torch.rand(target.shape) if weighted else None
    torch.library.opcheck(
        torch.ops.pspnet_fast.upsample_cross_entropy_losses.default, (leaf, target, weight, 255, 0.1, True, True)
    )
    torch.library.opcheck(
        torch.ops.pspnet_fast.upsample_cross_entropy_sums.default,
        (leaf, target, weight, pixels, 255, 0.1, True, True, True),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    """One graph, with the check of the targets in it."""
    logits, target, weight = inputs((1, 4, 3, 3), (7, 8), True)
    leaf = logits.requires_grad_()

    def loss_of(x, target):
        return upsample_cross_entropy(x, target, weight, 255, reduction, 0.1)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(leaf, target), loss_of(leaf, target)
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), leaf)[0] for y in (loss, expected)))
    target[0, 0, :4] = 9
    with pytest.raises(ValueError, match="got 9; 4 such pixels"):
        compiled(leaf, target)


def test_without_a_gradient_nothing_is_saved_for_one():
    logits, target, _ = inputs((1, 64, 10, 10), (20, 20), False)
    with torch.no_grad():
        expected = testing.plain_upsample_cross_entropy(logits, target)
        assert torch.allclose(upsample_cross_entropy(logits.requires_grad_(), target), expected)
    _, unscaled = torch.ops.pspnet_fast.upsample_cross_entropy_sums(
        logits.detach(), target, None, None, 255, 0.0, True, True, False
    )
    assert unscaled.numel() == 0


LOGITS, TARGET = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "words"),
    [
        (torch.zeros(3, 4, 4), TARGET, {}, ValueError, r"logits must be 4-D \(N, K, h, w\), got \(3, 4, 4\)"),
        (LOGITS.int(), TARGET, {}, TypeError, "logits must be one of .* got int32"),
        (LOGITS[:, :0], TARGET, {}, ValueError, "at least one class"),
        (LOGITS, TARGET[0], {}, ValueError, r"target must be 3-D \(N, H, W\), got \(6, 6\)"),
        (LOGITS, TARGET[:1], {}, ValueError, "one batch size, got 2 and 1"),
        (LOGITS, TARGET[:, :0], {}, ValueError, "target must have at least one row and column"),
        (LOGITS, TARGET.int(), {}, TypeError, "target must be int64 or uint8, got int32"),
        (LOGITS, TARGET.tolist(), {}, TypeError, "target must be a tensor, got list"),
        (LOGITS, TARGET.to("meta"), {}, ValueError, "one device, got cpu and meta"),
        (LOGITS, TARGET, {"weight": torch.ones(4)}, ValueError, r"weight must be \(K,\) = \(3,\), got \(4,\)"),
        (LOGITS, TARGET, {"weight": torch.ones(3).int()}, TypeError, "weight must be one of"),
        (LOGITS, TARGET, {"pixel_weight": torch.ones(2, 6, 5)}, ValueError, r"pixel_weight must be \(N, H, W\)"),
        (LOGITS, TARGET, {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        (LOGITS, TARGET.to(torch.int8), {}, TypeError, "target must be int64 or uint8, got int8"),
        (LOGITS, TARGET.to(torch.int16), {}, TypeError, "target must be int64 or uint8, got int16"),
        (LOGITS, TARGET.to(torch.int32), {}, TypeError, "target must be int64 or uint8, got int32"),
        (LOGITS, TARGET.bool(), {}, TypeError, "target must be int64 or uint8, got bool"),
        (LOGITS, TARGET, {"ignore_index": 2.5}, TypeError, "ignore_index must be an integer, got 2.5"),
        (LOGITS, TARGET, {"ignore_index": True}, TypeError, "ignore_index must be an integer"),
        (LOGITS, TARGET, {"ignore_index": 2**63}, ValueError, "ignore_index must fit into int64"),
        (LOGITS, TARGET, {"label_smoothing": math.nan}, ValueError, "label_smoothing"),
        (LOGITS, TARGET, {"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
    ],
)  # fmt: skip
def test_bad_input(logits, target, options, error, words):
    with pytest.raises(error, match=f"^upsample_cross_entropy: .*{words}"):
        upsample_cross_entropy(logits, target, **options)
