"""`accelerate_losses`: other people's loops give what they gave, without the upsampled logits."""

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from pspnet_fast import testing
from pspnet_fast.integrations.losses import accelerate_losses

SIZE, AT = (2, 5, 4, 6), (17, 23)


class Largest(TorchDispatchMode):
    """The largest number of elements that a floating-point tensor of the block has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


def inputs(dtype=torch.float32, memory_format=torch.contiguous_format):
    target = torch.randint(SIZE[1], (SIZE[0], *AT))
    target[:, 2:5] = 255
    return torch.randn(SIZE).to(dtype).contiguous(memory_format=memory_format), target


def upsampled(x, align_corners=True):
    return F.interpolate(x, size=AT, mode="bilinear", align_corners=align_corners)


def with_gradient(function, x):
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    return out.detach(), gradient


def compare(function, x, on_the_kernels=True):
    """By the accuracy rule; bitwise where everything is PyTorch's. Returns the counts."""
    exact, plain = with_gradient(function, x.double()), with_gradient(function, x)
    with accelerate_losses() as used:
        ours = with_gradient(function, x)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert type(mine) is torch.Tensor
        assert mine.dtype == theirs.dtype
        if on_the_kernels:
            testing.assert_within(mine, theirs, truth)
        else:
            assert torch.equal(mine, theirs)
    return used


LOSSES = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"weighted": True},
    {"weighted": True, "label_smoothing": 0.2, "reduction": "sum"},
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_cross_entropy(options, align_corners, memory_format):
    x, target = inputs(memory_format=memory_format)
    options = dict(options)
    weight = torch.rand(SIZE[1]) + 0.1 if options.pop("weighted", False) else None

    def loss(x):
        given = None if weight is None else weight.to(x.dtype)
        return F.cross_entropy(upsampled(x, align_corners), target, given, ignore_index=255, **options)

    assert str(compare(loss, x)) == "losses 1, labels 0, materialised 0"


def test_modules():
    """`nn.Upsample` and `nn.CrossEntropyLoss`, whose index to ignore is -100, and the same by a scale factor."""
    x = torch.randn(SIZE)
    target = torch.randint(SIZE[1], (SIZE[0], 8 * SIZE[2], 8 * SIZE[3]))
    target[0, :9] = -100
    for scale in (8, 8.0, (8.0, 8.0)):
        upsample = nn.Upsample(scale_factor=scale, mode="bilinear")
        used = compare(lambda x, upsample=upsample: nn.CrossEntropyLoss()(upsample(x), target), x)
        assert (used.losses, used.materialised.total()) == (1, 0)


SCALES = [  # of 4 x 6; where the factor is not the ratio of the sizes PyTorch samples by the factor
    ({"scale_factor": 2.3, "align_corners": True}, True),
    ({"scale_factor": 2.3, "align_corners": False}, False),
    ({"scale_factor": 2.3, "align_corners": False, "recompute_scale_factor": True}, True),
    ({"scale_factor": 1.5}, True),
    ({"scale_factor": (2.5, 2.25)}, False),
    ({"size": 9}, True),
    ({"size": [9, 7]}, True),
    ({"size": (2, 3), "align_corners": False}, True),
    ({"size": AT, "antialias": True}, False),
    ({"size": AT, "mode": "bicubic"}, False),
]


@pytest.mark.parametrize(("call", "deferred"), SCALES, ids=str)
def test_which_calls_are_deferred(call, deferred):
    x = torch.randn(SIZE)
    call = {"mode": "bilinear", **call}
    target = torch.randint(SIZE[1], F.interpolate(x, **call)[:, 0].shape)
    used = compare(lambda x: F.cross_entropy(F.interpolate(x, **call), target), x, deferred)
    assert used.losses == deferred


def test_what_is_not_deferred_is_plain():
    with accelerate_losses() as used:
        assert type(F.interpolate(torch.rand(1, 2, 3, 4), size=5)) is torch.Tensor
        assert type(F.interpolate(torch.rand(1, 2, 3), size=5, mode="linear")) is torch.Tensor
        assert (
            F.interpolate(torch.ones(1, 2, 3, 4, dtype=torch.uint8), size=(5, 5), mode="bilinear").dtype == torch.uint8
        )
    assert str(used) == "losses 0, labels 0, materialised 0"


def softer(target):
    return F.one_hot(target.clamp(max=SIZE[1] - 1), SIZE[1]).movedim(3, 1)


UNKNOWN_LOSSES = {
    "probabilities": lambda y, t: F.cross_entropy(y, softer(t).to(y.dtype)),
    "old arguments": lambda y, t: F.cross_entropy(y, t.clamp(max=4), size_average=False),
    "weights that learn": lambda y, t: F.cross_entropy(
        y, softer(t).to(y.dtype), torch.arange(1.0, 6, requires_grad=True).to(y.dtype)
    ),
    "nll": lambda y, t: F.nll_loss(F.log_softmax(y, 1), t, ignore_index=255),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("loss", UNKNOWN_LOSSES.values(), ids=UNKNOWN_LOSSES)
def test_losses_the_op_does_not_know(loss):
    x, target = inputs()
    used = compare(lambda x: loss(upsampled(x), target), x, on_the_kernels=False)
    assert (used.losses, used.materialised.total()) == (0, 1)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda y, t: F.cross_entropy(y, t[:, 1:]), RuntimeError, "size mismatch"),
        (lambda y, t: F.cross_entropy(y, t.to(torch.uint8)), RuntimeError, "Long but found Byte"),
        (lambda y, t: F.cross_entropy(y, t, torch.ones(4)), RuntimeError, "weight tensor"),
        (lambda y, t: F.cross_entropy(y, t, torch.ones(5).double()), RuntimeError, "found Double"),
        (lambda y, t: F.cross_entropy(y, t, torch.ones(5, requires_grad=True)), RuntimeError, "'weight'"),
        (lambda y, t: F.cross_entropy(y, t, reduction="max"), ValueError, "max is not a valid value"),
        (lambda y, t: F.cross_entropy(y, t, label_smoothing=2.0), RuntimeError, "label_smoothing"),
        (lambda y, t: F.cross_entropy(y, t + 7), ValueError, "upsample_cross_entropy: target must be a class"),
        (lambda y, t: y.topk(7, 1), RuntimeError, "out of range"),
        (
            lambda y, t: F.interpolate(torch.rand(1, 2, 3, 4), size=(5, 0), mode="bilinear"),
            RuntimeError,
            "greater than",
        ),
        (lambda y, t: F.interpolate(torch.rand(1, 2, 3, 4), mode="bilinear"), ValueError, "should be defined"),
        (
            lambda y, t: F.interpolate(torch.rand(1, 2, 3, 4), size=(5, 5, 5), mode="bilinear"),
            ValueError,
            "same number of spatial",
        ),
        (lambda y, t: F.interpolate([1.0], size=5, mode="bilinear"), (TypeError, AttributeError), "list"),
    ],
)
def test_bad_input_is_pytorchs(loss, error, words):
    """And leaves the block."""
    x, target = inputs()
    with pytest.raises(error, match=words), accelerate_losses():
        loss(upsampled(x), target.clamp(max=4))
    assert not _get_current_function_mode_stack()
    assert type(upsampled(x)) is torch.Tensor


def test_nothing_of_full_size_is_built():
    x, target = inputs()
    largest = Largest()
    for block in (accelerate_losses(), None):
        leaf = x.clone().requires_grad_()
        with block or torch.no_grad(), largest:
            logits = upsampled(leaf)
            assert logits.shape == (*SIZE[:2], *AT)
            loss = F.cross_entropy(logits.contiguous().float(), target, ignore_index=255)
            _, labels = logits.max(1)
            if block:
                loss.backward()
        assert labels.shape == target.shape
        # In the block maps of one number per pixel are the largest; the second round shows that a full map would be seen.
        assert (largest.elements < SIZE[0] * SIZE[1] * AT[0] * AT[1]) == (block is not None)


LABELS = {
    "argmax": lambda y: y.argmax(1),
    "torch.argmax": lambda y: torch.argmax(input=y, dim=-3, keepdim=True),
    "max [1]": lambda y: y.max(1)[1],
    "torch.max": lambda y: torch.max(y, 1).indices,
    "unpacked": lambda y: next(labels for _, labels in [torch.max(y, 1, keepdim=True)]),
    "topk": lambda y: y.topk(1, dim=1)[1],
}


@pytest.mark.parametrize("labels_of", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("align_corners", [True, False])
def test_labels(labels_of, align_corners):
    x, _ = inputs()
    with accelerate_losses() as used:
        labels = labels_of(upsampled(x, align_corners))
    expected = labels_of(upsampled(x, align_corners))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, expected)
    assert str(used) == "losses 0, labels 1, materialised 0"


def test_the_pair_of_max():
    """Its values are deferred, have a gradient, and are those at the time of the call."""
    x, _ = inputs()
    used = compare(lambda x: upsampled(x).max(1).values.square(), x, on_the_kernels=False)
    assert str(used) == "losses 0, labels 1, materialised 1 (square 1)"
    with accelerate_losses():
        logits = upsampled(x)
        pair = logits.max(1)
        logits.zero_()
    plain = upsampled(x).max(1)
    assert isinstance(pair, torch.return_types.max)
    assert len(pair) == 2
    assert torch.equal(pair[0].cpu(), plain[0])
    assert pair.values.shape == plain.values.shape


@pytest.mark.parametrize(
    "reader", [lambda y: y.argmax(), lambda y: y.argmax(2), lambda y: y.max(), lambda y: y.max(2)[1]]
)
def test_other_maxima_are_pytorchs(reader):
    x, _ = inputs()
    with accelerate_losses() as used:
        assert torch.equal(reader(upsampled(x)), reader(upsampled(x) + 0))
    assert used.labels == 0


class Doubled(torch.autograd.Function):
    """Takes tensors as they are, below `__torch_function__`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        assert ctx.saved_tensors[0].shape == grad.shape
        return 2 * grad


class Same(Doubled):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x


def written(y):
    buffer = torch.zeros(y.shape, dtype=y.dtype)
    buffer[:] = y
    return buffer.add_(y)


def in_place(y):
    z = y.mul_(3)
    y += 1
    return y * z


def hooked(y):
    y.register_hook(lambda gradient: 3 * gradient)
    return y * y


def written_then_taken(y):
    """An autograd.Function is behind what was written, and behind the hooks."""
    y.mul_(3)
    y.register_hook(lambda gradient: 2 * gradient)
    y[:, 1] = 7 * y[:, 0]
    return Doubled.apply(y)


READERS = {
    "index": lambda y: y[:, 1:3, ::2],
    "arithmetic": lambda y: 1 - y * y,
    "softmax": lambda y: y.softmax(1),
    "cat": lambda y: torch.cat([y, 2 * y, y], 1),
    "stack": lambda y: torch.stack(tensors=(y, y)),
    "written into": written,
    "in place": in_place,
    "to": lambda y: y.to(torch.float64).to(y.dtype),
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "hook": hooked,
    "in place, then autograd.Function": written_then_taken,
    "interpolate": lambda y: F.interpolate(y, size=(5, 4), mode="bilinear") * 2,
    "autograd.Function": lambda y: Doubled.apply(y) + Same.apply(y),
    "checkpoint": lambda y: torch.utils.checkpoint.checkpoint(torch.exp, y, use_reentrant=False),
    "operator": torch.ops.aten.relu.default,
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_anything_else_is_pytorchs(reader, memory_format):
    x, _ = inputs(memory_format=memory_format)
    used = compare(lambda x: reader(upsampled(x)), x, on_the_kernels=False)
    assert used.materialised.total() >= 1


def test_readers_without_a_gradient():
    x, _ = inputs()
    plain = upsampled(x)
    with accelerate_losses() as used:
        assert repr(upsampled(x)) == repr(plain)
        assert torch.equal(upsampled(x).detach().cpu(), plain)
        assert (upsampled(x).numpy() == plain.numpy()).all()
        assert torch.equal(copy.deepcopy(upsampled(x)), plain)
        saved = io.BytesIO()
        torch.save(upsampled(x), saved)
        saved.seek(0)
        assert torch.equal(torch.load(saved, weights_only=True), plain)
        assert upsampled(x).stride() == plain.stride()
    assert used.materialised["__repr__"] == used.materialised["numpy"] == 1
    assert "numpy 1" in str(used)


def test_what_is_known_at_once():
    x = torch.randn(SIZE, dtype=torch.bfloat16, requires_grad=True)
    with accelerate_losses() as used:
        logits = upsampled(x)
        assert logits.shape == logits.size() == (*SIZE[:2], *AT)
        assert (logits.dim(), logits.ndim, logits.size(1), len(logits)) == (4, 4, 5, 2)
        assert (logits.dtype, logits.device, logits.requires_grad) == (torch.bfloat16, x.device, True)
        assert isinstance(logits, torch.Tensor)
        with torch.no_grad():
            assert not upsampled(x).requires_grad
        assert not upsampled(x.detach()).requires_grad
    assert used.materialised.total() == 0


def test_materialised_once():
    x, target = inputs()
    with accelerate_losses() as used:
        logits = upsampled(x)
        assert torch.equal(logits + 1, logits[:] + 1)
        logits.zero_()
        assert torch.equal(F.cross_entropy(logits, target, ignore_index=255).exp().round(), torch.tensor(5.0))
        assert (logits.argmax(1) == 0).all()
        logits.unsqueeze_(0)
        assert logits.dim() == 5
    assert str(used) == "losses 0, labels 0, materialised 1 (add 1)"


def test_the_small_logits_may_change():
    """In place, as PyTorch allows; in inference mode, where tensors have no version, too."""
    x, target = inputs()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), accelerate_losses() as used:
            small = x.clone()
            logits, expected = upsampled(small), F.cross_entropy(upsampled(x) + 0, target, ignore_index=255)
            small.zero_()
            torch.testing.assert_close(F.cross_entropy(logits, target, ignore_index=255), expected)
            assert torch.equal(logits.argmax(1), (upsampled(x) + 0).argmax(1))
        assert (used.losses, used.labels) == (1, 1)


def test_two_losses_add_their_gradients():
    x, target = inputs()
    hard = target.where(target < 2, 255)

    def losses(x):
        logits = upsampled(x)
        first, second = (
            F.cross_entropy(logits, target, ignore_index=255),
            F.cross_entropy(logits, hard, ignore_index=255),
        )
        return first + 0.3 * second

    assert compare(losses, x).losses == 2

    def mixed(x):  # a loss on the kernels, then one on what is materialised
        logits = upsampled(x)
        return F.cross_entropy(logits, target, ignore_index=255) + logits.square().mean()

    assert str(compare(mixed, x)) == "losses 1, labels 0, materialised 1 (square 1)"


def test_materialised_without_gradients_still_has_one():
    x, _ = inputs()

    def looked_at(x):
        logits = upsampled(x)
        with torch.no_grad():
            assert not (logits * 2).requires_grad
        return logits.sigmoid()

    compare(looked_at, x, on_the_kernels=False)


@pytest.mark.parametrize("where", ["in the loss", "everywhere", "nowhere"])
@pytest.mark.parametrize("convert", [lambda y: y, lambda y: y.float()], ids=["as it is", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, convert, where):
    x, target = inputs(dtype)
    weight = torch.tensor([0.5, 1.0, 1.25, 2.0, 0.75])  # exact in every dtype

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "everywhere"):
            logits = convert(upsampled(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "nowhere"):
            return F.cross_entropy(logits, target, weight.to(logits.dtype), ignore_index=255)

    assert str(compare(loss, x)) == "losses 1, labels 0, materialised 0"


def test_autocast_is_that_of_the_call():
    """PyTorch interpolates in the dtype of the logits then, and what is read later is no other number."""
    x, _ = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = upsampled(x)
        with accelerate_losses():
            logits = upsampled(x)
    assert torch.equal(logits[:], expected)
    assert logits.dtype == expected.dtype


class Segmenter(nn.Module):
    """As semseg's PSPNet ends: upsamples both logits, and in training returns labels and losses."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, stride=4)
        self.cls, self.aux = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)
        self.criterion = nn.CrossEntropyLoss(ignore_index=255)

    def forward(self, x, y=None):
        size, features = x.shape[2:], self.features(x).relu()
        logits = F.interpolate(self.cls(features), size=size, mode="bilinear", align_corners=True)
        if not self.training:
            return logits
        aux = F.interpolate(self.aux(features), size=size, mode="bilinear", align_corners=True)
        return logits.max(1)[1], self.criterion(logits, y), self.criterion(aux, y)


def step(net, x, y):
    prediction, main_loss, aux_loss = net(x, y)
    loss = main_loss + 0.4 * aux_loss
    net.zero_grad()
    loss.backward()
    return prediction, loss.detach(), [parameter.grad for parameter in net.parameters()]


def test_a_training_step_as_semsegs():
    net = Segmenter()
    x, y = torch.randn(2, 3, 33, 41), torch.randint(5, (2, 33, 41))
    y[0, :9] = 255
    exact, plain = step(copy.deepcopy(net).double(), x.double(), y), step(copy.deepcopy(net), x, y)
    with accelerate_losses() as used:
        prediction, loss, gradients = step(net, x, y)
    assert torch.equal(prediction, plain[0])
    testing.assert_within(loss, plain[1], exact[1])
    for triple in zip(gradients, plain[2], exact[2], strict=True):
        testing.assert_within(*triple)
    assert str(used) == "losses 2, labels 1, materialised 0"
    net.eval()
    with torch.no_grad(), accelerate_losses() as used:
        assert torch.equal(net(x).max(1)[1], net(x).softmax(1).max(1)[1])
    assert str(used) == "losses 0, labels 1, materialised 1 (softmax 1)"


def test_leaving_the_block():
    """What is deferred works on; what comes after is plain."""
    x, target = inputs()
    leaf = x.clone().requires_grad_()
    with accelerate_losses() as used:
        first, second = upsampled(leaf), upsampled(leaf)
    assert type(upsampled(leaf)) is torch.Tensor
    F.cross_entropy(first, target, ignore_index=255).backward()
    assert torch.equal(second * 1, upsampled(leaf))
    assert (used.losses, used.materialised) == (1, {"mul": 1})
    expected = torch.autograd.grad(F.cross_entropy(upsampled(leaf), target, ignore_index=255), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)


def test_blocks_nest_and_decorate():
    x, target = inputs()
    target = target.clamp(max=4)
    with accelerate_losses() as outer:
        with accelerate_losses() as inner:
            F.cross_entropy(upsampled(x), target)
            upsampled(x) + 1
        F.cross_entropy(upsampled(x), target)
    assert (outer.losses, outer.materialised.total()) == (1, 0)
    assert (inner.losses, inner.materialised.total()) == (1, 1)
    assert type(accelerate_losses()(upsampled)(x)) is not torch.Tensor
    assert type(upsampled(x)) is torch.Tensor


def test_another_thread_is_left_alone():
    x, _ = inputs()
    seen = []
    with accelerate_losses():
        thread = threading.Thread(target=lambda: seen.append(type(upsampled(x))))
        thread.start()
        thread.join()
    assert seen == [torch.Tensor]


def test_transforms_are_left_alone():
    x, target = inputs()
    target = target.clamp(max=4)

    def loss(x):
        return F.cross_entropy(upsampled(x), target)

    expected = torch.func.grad(loss)(x)
    with accelerate_losses() as used:
        assert torch.equal(torch.func.grad(loss)(x), expected)
        assert torch.equal(torch.func.vmap(upsampled)(x[None])[0], upsampled(x) + 0)
    assert used.losses == 0


class Upsampled(torch.autograd.Function):
    """Makes what is deferred, and has a gradient of its own."""

    @staticmethod
    def forward(ctx, x, write):
        y = upsampled(x)
        if write == "value":
            y.mul_(3)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad[:, :, :4, :6], None


@pytest.mark.parametrize("write", ["nothing", "value"])
def test_made_in_an_autograd_function(write):
    """As in a reentrant checkpoint: the gradient is the function's, and what is written later is behind it."""
    x, target = inputs()

    def whole(x):
        y = Upsampled.apply(x, write)
        loss = F.cross_entropy(y, target, ignore_index=255)
        y.mul_(2)
        return loss + Doubled.apply(y).square().sum()

    assert compare(whole, x, on_the_kernels=False).losses == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    """Of the interpolation alone."""
    x, target = inputs()
    gradients = []
    for block in (accelerate_losses(), torch.enable_grad()):
        leaf = x.clone().requires_grad_()
        with block:
            logits = torch.utils.checkpoint.checkpoint(upsampled, 2 * leaf, use_reentrant=reentrant)
            F.cross_entropy(logits, target, ignore_index=255).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_written_over_after_it_was_saved():
    """Is the error that it is with PyTorch."""
    x, _ = inputs()
    for block in (accelerate_losses(), torch.enable_grad()):
        with block:
            y = upsampled(x.clone().requires_grad_())
            out = Doubled.apply(y)
            y += 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


def second_derivative(function, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), leaf)[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction):
    """Of the loss they are PyTorch's to its accuracy; of what PyTorch computes they are its own."""
    x, target = inputs()

    def loss(x):
        return F.cross_entropy(upsampled(x), target, ignore_index=255, reduction=reduction)

    expected = second_derivative(loss, x.double())
    with accelerate_losses() as used:
        actual = second_derivative(loss, x)
    assert used.losses == 1
    largest = expected.abs().max().item()
    assert largest > 0
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * largest)
    for function in (lambda x: upsampled(x).exp(), lambda x: Doubled.apply(upsampled(x)).exp()):
        expected = second_derivative(function, x)
        with accelerate_losses():
            assert torch.equal(second_derivative(function, x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode(reduction):
    x, target = inputs()

    def tangent():
        with torch.autograd.forward_ad.dual_level():
            logits = upsampled(torch.autograd.forward_ad.make_dual(x, 2 - x))
            loss = F.cross_entropy(logits, target, ignore_index=255, reduction=reduction)
            return torch.autograd.forward_ad.unpack_dual(loss).tangent

    expected = tangent()
    with accelerate_losses() as used:
        assert torch.equal(tangent(), expected)
    assert used.losses == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is:DeprecationWarning")
def test_torch_jit_traces_plain_functions():
    x, _ = inputs()
    with accelerate_losses() as used:
        traced = torch.jit.trace(lambda x: upsampled(x).max(1)[1], x, check_trace=False)
    assert torch.equal(traced(2 - x), upsampled(2 - x).max(1)[1])
    assert used.labels == 0


def test_full_backward_hooks():
    """They pass every output through an autograd.Function: the gradient goes on to the small logits."""
    x, target = inputs()
    upsample, seen = nn.Upsample(AT, mode="bilinear", align_corners=True), []
    upsample.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0].shape))
    compare(lambda x: F.cross_entropy(upsample(x), target, ignore_index=255), x, on_the_kernels=False)
    assert seen == 3 * [(*SIZE[:2], *AT)]


def test_what_writes_below_torch_function_is_refused():
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunction():
                return x.mul_(2)

    x, _ = inputs()
    with accelerate_losses(), pytest.raises(RuntimeError, match=r"^accelerate_losses: aten.mul_.Tensor must not write"):
        InPlace.apply(upsampled(x))


# torch.compile


def whole(x, target):
    return F.cross_entropy(upsampled(x * 2), target, ignore_index=255)


def test_a_compiled_loop_is_left_alone():
    """One graph, the same numbers, and no recompiling from block to block."""
    x, target = inputs()
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    expected = with_gradient(lambda x: whole(x, target), x)
    with accelerate_losses() as used:
        first = with_gradient(lambda x: compiled(x, target), x)
    with accelerate_losses(), torch.compiler.set_stance("fail_on_recompile"):
        second = with_gradient(lambda x: compiled(x, target), x)
    for mine in (first, second):
        for ours, theirs in zip(mine, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert used.losses == 0


def test_a_compiled_network_and_a_loss_that_is_not():
    x, target = inputs()
    compiled = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    used = compare(lambda x: F.cross_entropy(upsampled(compiled(x)), target, ignore_index=255), x)
    assert used.losses == 1


def broken(x):
    y = x * 2
    for _ in range(2):
        torch._dynamo.graph_break()
        y = y.square().sigmoid()
    return y.sum(1)


@pytest.mark.parametrize("given", [lambda x: x, upsampled], ids=["plain", "deferred"])
def test_compiled_with_graph_breaks(given):
    """Where Dynamo compiled the handlers by themselves it took one function for another."""
    x, _ = inputs()
    compiled = torch.compile(broken, backend="eager")
    with accelerate_losses():
        result = compiled(given(x))
    torch.testing.assert_close(result, broken(given(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, looking at any input
def test_a_compiled_loss_breaks_its_graph():
    x, target = inputs()
    compiled = torch.compile(F.cross_entropy, backend="eager")
    used = compare(lambda x: compiled(upsampled(x), target, ignore_index=255), x)
    assert used.losses == 1
    torch.compiler.reset()
    whole_graph = torch.compile(F.cross_entropy, backend="eager", fullgraph=True)
    with accelerate_losses(), pytest.raises(torch._dynamo.exc.Unsupported, match="accelerate_losses: deferred logits"):
        whole_graph(upsampled(x), target, ignore_index=255)
