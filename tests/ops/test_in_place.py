"""What ops write in place: its version is counted, and what PyTorch would not write to is refused, before it is written."""

import contextlib

import pytest
import torch

from pspnet_fast import testing
from pspnet_fast.functional import pyramid_conv2d, pyramid_norm, pyramid_pool, upsample_concat, upsample_softmax_add
from pspnet_fast.ops import _define

BINS = (1, 2)


def convolve_onto(out, epilogue=False):
    pyramid, weight = torch.randn(out.shape[0], 5, 3), torch.randn(out.shape[1], 6, 3, 3)
    options = {"scale": torch.rand(out.shape[1]), "relu": True} if epilogue else {}
    return pyramid_conv2d(pyramid, weight, out.shape[2:], BINS, out=out, **options)


def fill(out):
    return upsample_concat(out, torch.randn(out.shape[0], 5, 1), BINS, in_place=True)


def add_probabilities(out):
    for i in range(len(out)):
        upsample_softmax_add(out[i], torch.randn(1, out.shape[1], 2, 2), [(0, 0)], out.shape[2:])
    return out


def update_statistics(out):
    """The running statistics are rows of what is written."""
    rows = [*out.flatten(0, 2)]
    pyramid_norm(torch.randn(2, 5, out.shape[3]), BINS, rows[:2], rows[2:4], training=True)
    return out


WRITERS = {
    "pyramid_conv2d": convolve_onto,
    "pyramid_conv2d with a norm": lambda out: convolve_onto(out, epilogue=True),
    "upsample_concat": fill,
    "upsample_softmax_add": add_probabilities,
    "pyramid_norm": update_statistics,
}
SIZE = (2, 4, 3, 5)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_was_saved_before_is_known_to_have_changed(mode, backend, writer):
    a = torch.rand(SIZE, requires_grad=True)
    y = a * 1
    loss = (y**2).sum()
    with mode(), testing.use_backend(backend):
        WRITERS[writer](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("writer", [name for name in WRITERS if "norm" not in name])
def test_in_grad_mode_as_well(writer):
    a = torch.rand(SIZE, requires_grad=True)
    y = a * 1
    loss = (y**2).sum()
    WRITERS[writer](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# PyTorch, of itself, when Dynamo looks at a tensor that is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("writer", ["pyramid_conv2d", "upsample_concat", "upsample_softmax_add"])
def test_in_a_compiled_function_as_well(writer):
    torch.compiler.reset()
    a = torch.rand(SIZE, requires_grad=True)
    y = a * 1
    loss = (y**2).sum()
    with torch.no_grad():
        torch.compile(WRITERS[writer], backend="aot_eager", fullgraph=True)(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    torch.compiler.reset()


@pytest.mark.parametrize("writer", WRITERS)
def test_inference_tensors_have_no_version(writer):
    with torch.inference_mode():
        y = torch.rand(SIZE)
        before = y.clone()
        WRITERS[writer](y)
        assert not torch.equal(y, before)


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "pyramid_conv2d with a norm"])
def test_a_leaf_that_requires_grad_is_left_alone(writer):
    """As PyTorch leaves it; without gradients it is written."""
    size = (1, *SIZE[1:])
    leaves = (
        [torch.rand(size[1:], requires_grad=True)] if "softmax" in writer else [torch.rand(size, requires_grad=True)]
    )
    if writer == "pyramid_norm":
        leaves = [torch.rand(3, requires_grad=True) for _ in range(4)]
    before = [leaf.detach().clone() for leaf in leaves]

    def write():
        if writer == "upsample_softmax_add":
            upsample_softmax_add(leaves[0], torch.randn(1, 4, 2, 2), [(0, 0)], SIZE[2:])
        elif writer == "pyramid_norm":
            pyramid_norm(torch.randn(2, 5, 3), BINS, leaves[:2], leaves[2:], training=True)
        else:
            WRITERS[writer](leaves[0])

    with pytest.raises(RuntimeError, match="is written in place and must not be a leaf that requires grad"):
        write()
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))
    with torch.no_grad():
        write()
    assert not any(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))


@pytest.mark.parametrize("writer", ["pyramid_conv2d", "upsample_concat"])
def test_an_inference_tensor_is_left_alone(writer):
    with torch.inference_mode():
        y = torch.zeros(SIZE)
    with pytest.raises(RuntimeError, match="must not be an inference tensor outside inference mode"):
        WRITERS[writer](y)
    assert not y.any()


@pytest.mark.parametrize("writer", ["pyramid_conv2d", "upsample_concat"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_view_is_written_through(writer, grad):
    """Its base sees the values, and in the graph what PyTorch's own ops would leave there."""
    a = torch.rand(3, *SIZE[1:], requires_grad=True)
    base = a * 1
    torch.manual_seed(1)
    with contextlib.nullcontext() if grad else torch.no_grad():
        WRITERS[writer](base[:2])
        torch.manual_seed(1)
        expected = WRITERS[writer](a.detach()[:2].clone())
    torch.testing.assert_close(base[:2], expected)
    if grad:
        (gradient,) = torch.autograd.grad(base.square().sum(), a)
        kept = torch.full_like(a, 1.0)
        if writer == "upsample_concat":
            kept[:2, 2:] = 0  # what stood in the levels' channels is gone
        torch.testing.assert_close(gradient, 2 * base.detach() * kept)


@pytest.mark.parametrize("in_one_place", [True, False])
def test_memory_that_is_read_is_not_written(in_one_place):
    storage = torch.rand(4 * 16 + 8)
    x = storage[: 3 * 16].view(1, 3, 4, 4)
    pyramid = storage[(40 if in_one_place else 48) :][:5].view(1, 5, 1)
    logits = storage[(45 if in_one_place else 48) :][:12].view(1, 3, 2, 2)
    raises = pytest.raises(ValueError, match="must not share memory with") if in_one_place else contextlib.nullcontext()
    with raises:
        upsample_concat(x, pyramid, (1, 2), order=(-1, 0, 1), in_place=True)
    with raises:
        upsample_softmax_add(x[0], logits, [(0, 0)], (4, 4))


def test_interleaved_views_of_one_storage_do_not_share_memory():
    both = torch.rand(5, 2)
    assert not _define._overlap(both[:, 0], both[:, 1])
    assert _define._overlap(both.view(-1)[:5], both.view(-1)[4:])
    assert not _define._overlap(both.view(-1)[:5], both.view(-1)[5:])


def test_expanded_targets_are_refused():
    with pytest.raises(ValueError, match="out must be dense"):
        convolve_onto(torch.zeros(1, 4, 3, 5).expand(SIZE))
    with pytest.raises(ValueError, match="x must be dense"):
        fill(torch.zeros(1, 4, 3, 5).expand(SIZE))
    with pytest.raises(ValueError, match="total must be contiguous"):
        upsample_softmax_add(torch.zeros(4, 1, 1).expand(4, 3, 5), torch.randn(1, 4, 2, 2), [(0, 0)], (3, 5))
    rows = [torch.zeros(1).expand(3) for _ in range(4)]
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        pyramid_norm(torch.randn(2, 5, 3), BINS, rows[:2], rows[2:], training=True)


@pytest.mark.parametrize("reserved", [True, False])
def test_the_gradient_of_what_a_level_covers_is_zero(reserved):
    """Of what `pyramid_pool` reserved it is never asked for, and its gradient is passed on as it is, without a copy."""
    x = torch.rand(1, 2, 4, 4, requires_grad=True)
    pyramid = torch.rand(1, 5, 1)
    out = pyramid_pool(x, BINS, reserve=(0, 2))[1] if reserved else torch.cat([x, x], 1)
    seen = []
    out.grad_fn.register_prehook(lambda gradients: seen.append(gradients[-1]))
    result = upsample_concat(out, pyramid, BINS, in_place=True)
    (gradient,) = torch.autograd.grad(result.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())
    assert seen[0][:, 2:].any() == reserved
