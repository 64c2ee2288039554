import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pspnet_fast.nn.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm


def norm(**options):
    module = nn.BatchNorm2d(5, **options)
    if module.affine:
        nn.init.uniform_(module.weight, 0.5, 2)
        nn.init.normal_(module.bias)
    return module


def steps(module, batches, cotangents):
    """Two training steps: outputs, gradients of the last, and buffers."""
    for x, cotangent in zip(batches, cotangents, strict=True):
        x = x.requires_grad_()
        out = module(x)
        grads = torch.autograd.grad(out, [x, *module.parameters()], cotangent)
    return [out.detach(), *grads, *(buffer.double() for buffer in module.buffers())]


def _process(rank, store, module, batches, cotangents, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    module = convert_sync_batch_norm(module)
    assert type(module) is SyncBatchNorm
    torch.save(steps(module, batches[rank], cotangents[rank]), f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None, "eps": 1e-3}, {"track_running_stats": False}]
)
def test_two_processes_equal_one(tmp_path, options):
    """In float64, with batches of different sizes; channels_last the one, NCHW the other."""
    module = norm(**options).double()
    sizes = ((3, 5, 4, 6), (1, 5, 4, 6))
    batches = [[torch.randn(size).double() + i for i in range(2)] for size in sizes]
    batches[1] = [x.contiguous(memory_format=torch.channels_last) for x in batches[1]]
    cotangents = [[torch.randn(size).double() for _ in range(2)] for size in sizes]
    arguments = (tmp_path / "store", module, batches, cotangents, tmp_path / "result")
    mp.start_processes(_process, arguments, nprocs=2, start_method="fork")
    parts = [torch.load(tmp_path / f"result.{rank}") for rank in range(2)]

    joint = [[torch.cat(pair) for pair in zip(*side, strict=True)] for side in (batches, cotangents)]
    expected = steps(module, *joint)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), expected[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), expected[1])
    parameters = len([*module.parameters()])
    for i in range(2, 2 + parameters):
        torch.testing.assert_close(parts[0][i] + parts[1][i], expected[i])
    for i in range(2 + parameters, len(expected)):
        torch.testing.assert_close(parts[0][i], expected[i])
        assert torch.equal(parts[0][i], parts[1][i])


def test_conversion_keeps_tensors_and_keys():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), norm())
    before = dict(net.named_parameters())
    converted = convert_sync_batch_norm(net)
    assert type(converted[1]) is SyncBatchNorm
    assert all(p is before[name] for name, p in converted.named_parameters())
    assert set(converted.state_dict()) == set(net.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_one_process_is_a_batch_norm(training):
    module, x = norm().train(training), torch.randn(2, 5, 3, 3)
    expected = module(x)
    module = convert_sync_batch_norm(module)
    module.reset_running_stats()
    assert torch.equal(module(x), expected)
