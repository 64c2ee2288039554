import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pspnet_fast import PPM, testing, use_backend
from pspnet_fast.backends import interpreted, ops
from pspnet_fast.nn.plain_ppm import PlainPPM

FORMATS = [torch.contiguous_format, torch.channels_last]


def pair(bins=(1, 2, 3, 6), in_dim=12, reduction_dim=5, **options):
    """Our module and the plain one with the same, not trivial, state."""
    plain = PlainPPM(in_dim, reduction_dim, bins, **options)
    for level in plain.features:
        norm = level[2]
        if isinstance(norm, nn.BatchNorm2d):
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
            if norm.running_mean is not None:
                nn.init.normal_(norm.running_mean, 0, 0.1)
                nn.init.uniform_(norm.running_var, 0.05, 0.2)
    ours = PPM(in_dim, reduction_dim, bins, **options)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def compare(ours, plain, x, backend, training):
    """Value, gradients and buffers by the accuracy rule, of several batches where kernels run at their own speed.

    Together, as one batch's largest error, of plain PyTorch too, is noisy at the level of one cell.
    """
    slow = {"triton": interpreted(), "cuda": testing.emulated()}.get(backend)
    runs = [
        _run(ours, plain, each, backend, training)
        for each in (x, *(torch.randn_like(x) for _ in range(0 if slow else 3)))
    ]
    for key in runs[0]["exact"]:
        of_ours, of_plain, exact = ([run[name][key] for run in runs] for name in ("ours", "plain", "exact"))
        if "num_batches" in key:
            assert of_ours == exact
        else:
            testing.assert_within(torch.stack(of_ours), torch.stack(of_plain), torch.stack(exact), key)
    return runs[0]["ours"]["value"]


def _run(ours, plain, x, backend, training):
    ours, plain = copy.deepcopy(ours), copy.deepcopy(plain)
    if training:
        testing.clear_of_kinks(plain.train(), x)  # rounding must not decide on which side of zero a level's value falls
        ours.load_state_dict(plain.state_dict())
    cotangent = torch.randn(plain.eval()(x).shape)
    runs = {}
    for name, module, dtype, where in (
        ("exact", plain, torch.float64, "cpu"),
        ("plain", plain, torch.float32, "cpu"),
        ("ours", ours, torch.float32, "cpu" if backend is None else testing.device(backend)),
    ):
        module = copy.deepcopy(module).to(where, dtype).train(training)
        leaf = x.to(where, dtype).requires_grad_()
        with use_backend(backend if name == "ours" else None):
            out = module(leaf)
            out.backward(cotangent.to(where, dtype))
        parameters = {f"gradient of {key}": p.grad for key, p in module.named_parameters()}
        runs[name] = {"value": out, "gradient of x": leaf.grad, **parameters, **dict(module.named_buffers())}
    return runs


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backend", testing.backends(*ops()))
def test_equals_plain(backend, training, memory_format):
    bins, size = ((1, 3), (2, 12, 5, 7)) if backend == "triton" and interpreted() else ((1, 2, 3, 6), (8, 12, 13, 10))
    x = torch.randn(size).contiguous(memory_format=memory_format)
    if len(x) == 2:
        # Bin 1's two values are y + d and y - d, normalised d / sqrt(d^2 + eps). Where d is much larger than the root of eps,
        # its gradient is what two large terms leave: noise, plain PyTorch's as anybody's. Here d is of the root's size.
        x = x / 50
    # Enough channels that the largest error of plain PyTorch says what its errors are like.
    out = compare(*pair(bins, reduction_dim=40), x, backend, training)
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "options",
    [
        {"align_corners": False},
        {"norm_layer": lambda c: nn.BatchNorm2d(c, affine=False)},
        {"norm_layer": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
        {"norm_layer": lambda c: without_statistics(c)},
        {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=None, eps=1e-3)},
        {"norm_layer": lambda c: nn.GroupNorm(1, c)},
        {"norm_layer": lambda c: nn.Identity()},
    ],
    ids=["centres", "no_affine", "no_running", "statistics_taken_away", "cumulative", "group_norm", "no_norm"],
)
def test_equals_plain_with(options, training):
    compare(*pair(reduction_dim=40, **options), torch.randn(8, 12, 9, 10), None, training)


def without_statistics(channels):
    """As people make a norm take the batch's: by taking its buffers away."""
    norm = nn.BatchNorm2d(channels)
    norm.running_mean = norm.running_var = None
    return norm


def test_state_dict_both_ways():
    ours, plain = pair()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert ours.state_dict()["features.2.1.weight"].shape == (5, 12, 1, 1)
    fresh = PlainPPM(12, 5)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 12, 8, 8)
    assert torch.equal(fresh.eval()(x), plain.eval()(x))


def test_running_statistics_over_several_batches():
    """momentum=None weighs every batch alike, and a loaded count goes on."""
    ours, plain = pair(norm_layer=lambda c: nn.BatchNorm2d(c, momentum=None))
    for _ in range(3):
        x = torch.randn(2, 12, 9, 7) * 3 + 1
        ours.train()(x)
        plain.train()(x)
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(ours.get_buffer(key), buffer)


def test_evaluation_sees_changed_weights():
    """Nothing folded is kept: load_state_dict, an update in place and .to() all show at once."""
    ours, _ = pair()
    x = torch.randn(2, 12, 8, 8)
    ours.eval()(x)
    other = pair()[1]
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(x), other.eval()(x))
    with torch.no_grad():
        for module in (ours, other):
            module.features[1][1].weight.mul_(2)
            module.features[2][2].running_var.add_(1)
    torch.testing.assert_close(ours(x), other(x))
    torch.testing.assert_close(ours.double()(x.double()), other.double()(x.double()))


def test_batch_of_one():
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"more than one value per channel.*bin 1.*batch of 2 or more"):
        ours.train()(torch.randn(1, 12, 8, 8))
    assert ours.eval()(torch.randn(1, 12, 8, 8)).shape == (1, 32, 8, 8)
    assert pair(bins=(2, 3))[0].train()(torch.randn(1, 12, 8, 8)).shape == (1, 22, 8, 8)


def test_copies_pickles_and_hooks():
    ours, plain = pair()
    x = torch.randn(2, 12, 8, 8)
    expected = ours.eval()(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), expected)
    seen = []
    handles = [ours.register_forward_hook(lambda *_: seen.append("module"))]
    handles.append(ours.features[1][1].register_forward_hook(lambda *_: seen.append("convolution")))
    torch.testing.assert_close(ours(x), plain.eval()(x))
    assert seen == ["convolution", "module"]
    for handle in handles:
        handle.remove()
    assert torch.equal(ours(x), expected)


def test_half_precision_and_memory_format():
    ours, plain = pair()
    x = torch.randn(2, 12, 8, 8)
    expected = plain.double().eval()(x.double())
    for dtype in (torch.float16, torch.bfloat16):
        out = copy.deepcopy(ours).to(dtype).eval()(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
        )
    out = ours.to(memory_format=torch.channels_last).eval()(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    testing.unavailable("pyramid_norm", "cpu") is not None, reason="the compiled extension is not built"
)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_memory_beyond_the_output(memory_format):
    """At evaluation on a 473 crop: the output and less than 5 MB. Plain PyTorch holds every upsampled level besides."""
    ours, plain = pair(in_dim=2048, reduction_dim=512)
    x = torch.randn(1, 2048, 60, 60).contiguous(memory_format=memory_format)
    output = 2 * x.nbytes
    with torch.inference_mode():
        peaks = [testing.peak_memory(lambda module=module: module.eval()(x), "cpu") for module in (ours, plain)]
    assert output <= peaks[0] < output + 5e6
    assert peaks[1] > output + 20e6


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast(training):
    ours, plain = pair()
    x = torch.randn(2, 12, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours.train(training)(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert ours.features[0][1].weight.grad.dtype == torch.float32
    expected = plain.train(training)(x.float())
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_mixed_modes():
    """Frozen statistics in some levels only."""
    ours, plain = pair()
    for module in (ours.train(), plain.train()):
        module.features[0][2].eval()
    x = torch.randn(2, 12, 8, 8)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.features[0][2].running_mean, plain.features[0][2].running_mean)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_to_one_graph(training):
    """aot_eager traces forward and backward without a C++ compiler's time."""
    ours, _ = pair()
    compiled = torch.compile(copy.deepcopy(ours).train(training), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 12, 9, 7, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    out, expected = compiled(x), ours.train(training)(again)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(out.shape)
    out.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
def test_inductor_compiles_to_one_graph(memory_format):
    """In NCHW the pooling pass begins the result, which a second op then writes to."""
    torch.compiler.reset()
    ours, _ = pair(in_dim=4, reduction_dim=2, bins=(1, 3))
    ours.eval()
    x = torch.randn(1, 4, 6, 5).contiguous(memory_format=memory_format)
    with torch.no_grad():
        compiled = torch.compile(lambda x: torch.relu(ours(x) - 0.1), fullgraph=True)
        torch.testing.assert_close(compiled(x), torch.relu(ours(x) - 0.1))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PPM(0, 4), "in_dim must be at least 1, got 0"),
        (lambda: PPM(4, 0), "reduction_dim must be at least 1, got 0"),
        (lambda: PPM(4, 2, ()), "bins must not be empty"),
        (lambda: PPM(4, 2)(torch.zeros(1, 3, 5, 5)), r"in_dim = 4 channels, got \(1, 3, 5, 5\)"),
        (lambda: PPM(4, 2)(torch.zeros(4, 5, 5)), r"must be 4-D \(N, C, H, W\), got \(4, 5, 5\)"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=f"^PPM: .*{words}"):
        build()


def _process(rank, world_size, store, state, batches, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    ours = PPM(12, 5)
    ours.load_state_dict(state)
    # torch's DDP takes SyncBatchNorm on CUDA only, and looks at it when it wraps: convert after that.
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.parallel.DistributedDataParallel(ours).train())
    assert isinstance(ours.features[0][2], nn.SyncBatchNorm)
    x = batches[rank].requires_grad_()
    out = model(x)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    gradients = {key: p.grad for key, p in ours.named_parameters()}
    torch.save((out.detach(), x.grad, gradients, dict(ours.named_buffers())), f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3)], ids=str)
def test_synchronised_norm_on_two_processes(tmp_path, sizes):
    """Two processes under DDP equal one with the joint batch, also where their batches differ (and one alone is too small)."""
    _, plain = pair()
    batches = [torch.randn(n, 12, 9, 7) for n in sizes]
    arguments = (2, tmp_path / "store", plain.state_dict(), batches, tmp_path / "result")
    mp.start_processes(_process, arguments, nprocs=2, start_method="fork")
    parts = [torch.load(tmp_path / f"result.{rank}") for rank in range(2)]

    joint = torch.cat(batches).requires_grad_()
    out = plain.train()(joint)
    weights = torch.cat([torch.arange(part[0].numel()).view_as(part[0]).cos() for part in parts])
    (out * weights).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), joint.grad, **close)
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(parts[0][2][key] * 2, parameter.grad, **close)  # DDP averages over the processes
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(parts[0][3][key], buffer, **close)
        assert torch.equal(parts[0][3][key], parts[1][3][key])
