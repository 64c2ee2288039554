"""What only a GPU can show: graphs, streams, devices, large tensors, memory that runs out. Skipped without one."""

import pytest
import torch

from pspnet_fast import PPM, testing, use_backend
from pspnet_fast.backends import ops
from pspnet_fast.functional import pyramid_norm, pyramid_pool, pyramid_project, upsample_concat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

BINS = (1, 2, 3, 6)
FORMATS = [torch.contiguous_format, torch.channels_last]


def network_inputs(dtype=torch.bfloat16, memory_format=torch.contiguous_format, n=2, channels=256, size=(60, 61)):
    """Tensors of every op at sizes of a network, on the GPU."""
    x = torch.randn(n, channels, *size, device="cuda").to(dtype).contiguous(memory_format=memory_format)
    pyramid = torch.randn(n, 50, channels, device="cuda").to(dtype)
    weight = (torch.randn(4, 64, channels, device="cuda") / channels**0.5).to(dtype)
    return x, pyramid, weight


def every_op(x, pyramid, weight):
    """Values and gradients of every op, as one list."""
    leaves = [t.detach().requires_grad_() for t in (x, pyramid, weight)]
    pooled, room = pyramid_pool(leaves[0], BINS, reserve=(0, 4 * 64))
    reduced = pyramid_project(leaves[1], leaves[2], BINS, relu=False)
    normed = pyramid_norm(reduced, BINS, training=True)
    out = upsample_concat(room, normed, BINS, in_place=True)
    cotangents = (torch.ones_like(pooled), torch.linspace(-1, 1, out.shape[1], device=x.device).to(out)[:, None, None])
    total = (pooled * cotangents[0]).float().sum() + (out * cotangents[1]).float().sum()
    return [pooled.detach(), out.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", testing.backends(*ops()))
def test_ten_runs_are_bitwise_the_same(backend, dtype, memory_format):
    if backend == "cpu":
        pytest.skip("backend cpu runs on cpu tensors")
    inputs = network_inputs(dtype, memory_format)
    with use_backend(backend):
        first = every_op(*inputs)
        for _ in range(9):
            assert all(torch.equal(a, b) for a, b in zip(first, every_op(*inputs), strict=True))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replay_equals_eager(backend, memory_format):
    """Captured once, replayed on other values. Nothing on the way waits for the GPU."""
    if reason := next(filter(None, (testing.unavailable(op, backend) for op in ops())), None):
        pytest.skip(reason)
    inputs = network_inputs(memory_format=memory_format)
    with use_backend(backend):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            every_op(*inputs)  # compiles, and fills the caches
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.graph(graph):
                captured = every_op(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for tensor, other in zip(inputs, network_inputs(memory_format=memory_format), strict=True):
            tensor.copy_(other)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, every_op(*inputs), strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_current_stream_is_used(backend):
    """Work that is queued on a side stream behind a long wait sees what was written there before it, and only then."""
    if reason := testing.unavailable("pyramid_pool", backend):
        pytest.skip(reason)
    x = torch.zeros(1, 64, 60, 60, device="cuda")
    with use_backend(backend):
        pyramid_pool(x, BINS)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            torch.cuda._sleep(20_000_000)
            x.fill_(1)
            pyramid = pyramid_pool(x, BINS)
            done = torch.cuda.Event()
            done.record()
        done.synchronize()
    assert torch.equal(pyramid, torch.ones_like(pyramid))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_tensors_of_another_device_than_the_current_one(backend):
    inputs = network_inputs()
    with use_backend(backend):
        here = every_op(*inputs)
        there = every_op(*(t.to("cuda:1") for t in inputs))
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))


def test_tensors_on_two_devices():
    x, pyramid, weight = network_inputs()
    with pytest.raises(ValueError, match="upsample_concat: x and pyramid must be on one device, got cuda:0 and cpu"):
        upsample_concat(x, pyramid.cpu(), BINS)
    with pytest.raises(ValueError, match=r"pyramid_project: pyramid and weight\[0\] must be on one device"):
        pyramid_project(pyramid, weight.cpu(), BINS)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_elements_than_32_bits_count(backend, memory_format):
    """The last image of a batch whose features and concatenation pass 2^31 elements, against that image alone."""
    if reason := testing.unavailable("pyramid_pool", backend):
        pytest.skip(reason)
    n, channels, reduced, size = 17, 2048, 256, (256, 260)  # 2.3e9 elements in, 3.5e9 out
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("less than 30 GB of GPU memory are free")
    last = torch.randn(1, channels, *size, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    x = torch.zeros(n, channels, *size, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    x[-1:] = last
    pyramid = torch.randn(n, 50, reduced, device="cuda", dtype=torch.bfloat16)
    with use_backend(backend):
        pooled, room = pyramid_pool(x, BINS, reserve=(0, 4 * reduced))
        alone, room_alone = pyramid_pool(last, BINS, reserve=(0, 4 * reduced))
        assert torch.equal(pooled[-1:], alone)
        out = upsample_concat(room, pyramid, BINS, in_place=True)
        out_alone = upsample_concat(room_alone, pyramid[-1:], BINS, in_place=True)
        assert torch.equal(out[-1:], out_alone)
        del x
        backward = torch.ops.pspnet_fast.upsample_concat_backward
        order = list(range(-1, len(BINS)))
        d_pyramid = backward(out, channels, BINS, order, True)
        assert torch.equal(d_pyramid[-1:], backward(out_alone, channels, BINS, order, True))
        backward = torch.ops.pspnet_fast.pyramid_pool_backward
        channels_last = memory_format == torch.channels_last
        dx = backward(pooled, out[:, :channels], size, BINS, channels_last)
        assert torch.equal(dx[-1:], backward(alone, out_alone[:, :channels], size, BINS, channels_last))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_after_memory_ran_out_the_next_call_works(backend):
    if reason := next(filter(None, (testing.unavailable(op, backend) for op in ops())), None):
        pytest.skip(reason)
    x = torch.randn(2, 512, 60, 60, device="cuda")
    ppm = PPM(512, 128).cuda().eval()
    with use_backend(backend), torch.no_grad():
        expected = ppm(x)
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_allocated() + expected.nbytes // 2
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        try:
            with pytest.raises(torch.cuda.OutOfMemoryError):
                ppm(x)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.equal(ppm(x), expected)


def test_training_repeats_and_resumes_bitwise(tmp_path):
    """PSPNet with --deterministic: twice the same weights, and again the same where the run was resumed in its middle."""
    from pspnet_fast import snapshot
    from pspnet_fast.config import Recipe
    from pspnet_fast.data.scenes import write_scenes
    from pspnet_fast.train import Run, train

    write_scenes(tmp_path / "scenes", 8, width=128, height=96)
    recipe = Recipe(dataset="scenes", data=tmp_path / "scenes", layers=18, crop=97, batch_size=4, iterations=6)

    def weights(name, **options):
        run = Run(output=tmp_path / name, workers=1, checkpoint_every=3, deterministic=True, device="cuda", **options)
        train(recipe, run)
        return snapshot.read(run.output / snapshot.LAST)["model"]

    first = weights("first")
    for other in (weights("second"), weights("third", resume=str(tmp_path / "first" / snapshot.PREVIOUS))):
        assert all(torch.equal(other[key], tensor) for key, tensor in first.items())
