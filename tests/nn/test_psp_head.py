import copy
import io
import logging

import pytest
import torch
from torch import nn

from pspnet_fast import PSPHead, testing
from pspnet_fast.geometry import is_channels_last

FORMATS = [torch.contiguous_format, torch.channels_last]


def heads(kernel_size=3, training=True, **options):
    """The factorised and the concatenating head with the same parameters, without dropout."""
    factorised, concat = (
        PSPHead(24, 64, 40, 12, (1, 2, 3), 0.0, kernel_size, head=head, **options).train(training)
        for head in ("factorised", "concat")
    )
    for norm in (m for m in factorised.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    concat.load_state_dict(factorised.state_dict())
    return factorised, concat


def step(module, x):
    """Logits, the gradients of x and of all parameters, and the buffers afterwards."""
    module, x = copy.deepcopy(module).to(x.dtype), x.detach().requires_grad_()
    out = module(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, [x, *module.parameters()], cotangent)
    return [out, *grads, *(buffer for buffer in module.buffers() if buffer.is_floating_point())]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("kernel_size", "align_corners"), [(3, True), (1, False)])
def test_equals_the_concatenating_head(backend, kernel_size, align_corners, training, memory_format):
    """Of several batches together: one batch's largest error, of plain PyTorch too, is noisy at the level of one cell."""
    factorised, concat = heads(kernel_size, training, align_corners=align_corners)
    batches = [torch.randn(8, 24, 13, 10).contiguous(memory_format=memory_format) for _ in range(4)]
    factorised, concat = (m.to(memory_format=memory_format) for m in (factorised, concat))
    with testing.use_backend(backend):
        ours = [step(factorised, x) for x in batches]
    assert all(is_channels_last(run[0]) == is_channels_last(batches[0]) for run in ours)
    plain, exact = ([step(concat, x.to(dtype)) for x in batches] for dtype in (torch.float32, torch.float64))
    for parts in zip(*(map(torch.stack, zip(*runs, strict=True)) for runs in (ours, plain, exact)), strict=True):
        testing.assert_within(*parts)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_evaluation_without_gradients_folds_the_norm(memory_format):
    factorised, concat = heads(training=False)
    x = torch.randn(2, 24, 7, 10).contiguous(memory_format=memory_format)
    with torch.no_grad():
        testing.assert_within(factorised(x), concat(x), copy.deepcopy(concat).double()(x.double()))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            factorised(x)
    assert not [event.name for event in profile.events() if event.name == "aten::batch_norm"]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_the_gradient_of_x_is_added_up_by_the_pooling(memory_format):
    """Nothing else adds tensors of x's size: the convolution's gradient goes into the pooling's one kernel."""
    factorised, _ = heads()
    factorised, x = factorised.to(memory_format=memory_format), torch.randn(4, 24, 13, 10)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    out = factorised(x).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        out.backward()
    calls = [event for event in profile.events() if list(x.shape) in event.input_shapes]
    assert not [event.name for event in calls if event.name.startswith(("aten::add", "aten::cat", "aten::sum"))]
    assert sum(event.name == "pspnet_fast::pyramid_pool_backward" for event in profile.events()) == 1


def test_training_without_gradients_takes_the_batch_s_statistics():
    factorised, concat = heads()
    x = torch.randn(4, 24, 7, 10)
    wide = copy.deepcopy(concat).double()
    with torch.no_grad():
        testing.assert_within(factorised(x), concat(x), wide(x.double()))
    testing.assert_within(factorised.cls[1].running_mean, concat.cls[1].running_mean, wide.cls[1].running_mean)


def test_state_dict_keys():
    factorised, concat = heads()
    keys = set(factorised.state_dict())
    assert keys == set(concat.state_dict())
    assert {
        "ppm.features.0.1.weight",
        "ppm.features.2.2.running_var",
        "cls.0.weight",
        "cls.1.bias",
        "cls.4.bias",
    } <= keys
    assert factorised.cls[0].weight.shape == (40, 24 + 192, 3, 3)


def test_copies_and_pickles():
    factorised, _ = heads(training=False)
    x, file = torch.randn(2, 24, 5, 6), io.BytesIO()
    torch.save(factorised, file)
    file.seek(0)
    for other in (copy.deepcopy(factorised), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), factorised(x))


def test_sync_batch_norm():
    factorised, concat = heads(training=False)
    x = torch.randn(2, 24, 5, 6)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(factorised))
    assert isinstance(converted.cls[1], nn.SyncBatchNorm)
    with torch.no_grad():
        testing.assert_within(converted(x), concat(x), copy.deepcopy(concat).double()(x.double()))


def _hook(head):
    head.cls[0].register_forward_hook(lambda *_: None)


def _hook_on_ppm(head):
    head.ppm.register_forward_hook(lambda *_: None)


def _dilate(head):
    head.cls[0].dilation, head.cls[0].padding = (2, 2), (2, 2)


def _add_bias(head):
    head.cls[0].bias = nn.Parameter(torch.ones(40))


@pytest.mark.parametrize("change", [_hook, _hook_on_ppm, _dilate, _add_bias])
def test_what_it_does_not_compute_is_concatenated(change, caplog):
    factorised, concat = heads(training=False)
    for module in (factorised, concat):
        change(module)
    x = torch.randn(2, 24, 5, 6)
    with caplog.at_level(logging.DEBUG, logger="pspnet_fast.nn.psp_head"):
        assert torch.equal(factorised(x), concat(x))
    assert "upsampled and concatenated" in caplog.text


def test_autocast():
    factorised, concat = heads()
    x = torch.randn(2, 24, 6, 7)
    exact = copy.deepcopy(concat).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = factorised(x), concat(x)
    assert ours.dtype == plain.dtype
    testing.assert_within(ours, plain, exact)


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    factorised, _ = heads(training=training)
    compiled = torch.compile(copy.deepcopy(factorised), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 24, 6, 7)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), factorised(x))
    if training:
        factorised(x).sum().backward()
        compiled(x).sum().backward()
        for mine, theirs in zip(compiled.parameters(), factorised.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_size": 5}, "kernel_size must be 1 or 3, got 5"),
        ({"head": "other"}, "head must be 'factorised' or 'concat', got 'other'"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=f"^PSPHead: {words}"):
        PSPHead(**{"in_dim": 8, "reduction_dim": 3, "channels": 6, "classes": 4, **options})


def test_wrong_channels():
    with pytest.raises(ValueError, match="in_dim = 8 channels"):
        PSPHead(8, 3, 6, 4)(torch.zeros(1, 7, 4, 4))
