"""`accelerate` against every family's structure (peers.py): the same results before and after, and nothing else changed.

Past 300 lines, because what users do with a model (copies, wrappers, hooks, conversions) is asked of one set of peers.
"""

import contextlib
import copy
import io
import logging
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import peers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from pspnet_fast import PPM, integrations, testing
from pspnet_fast.integrations import Family, Head, Layout, accelerate, features, leaves, pyramid_of, restore


def pair(name):
    """A peer as it is, and a copy of it that was accelerated."""
    plain = peers.make(name)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    return plain, ours


def run(model, arguments, dtype=torch.float32):
    """Outputs; in training also the gradients of features and parameters, and the running statistics."""
    model = copy.deepcopy(model).to(dtype)
    arguments = peers.to(arguments, dtype=dtype)
    inputs = [t.requires_grad_() for t in peers.tensors(arguments) if t.is_floating_point()]
    torch.manual_seed(0)
    out = [t for t in peers.tensors(model(*arguments)) if t.is_floating_point()]
    if not model.training:
        return [t.detach() for t in out]
    noise = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=noise, dtype=torch.float32).to(dtype) for t in out]
    wanted = [*inputs, *model.parameters()]
    grads = torch.autograd.grad(out, wanted, cotangents, allow_unused=True)
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return [*out, *(grad for grad in grads if grad is not None), *statistics]


# The largest error of a handful of numbers is luck: over many batches ours and plain PyTorch's are alike in the mean, and with
# few the one is now and then more than twice the other.
BATCHES = 24


def assert_as_accurate(plain, ours, batches):
    """Several batches together: one batch's largest error is noisy at the level of one cell."""
    results = (
        [run(ours, x) for x in batches],
        [run(plain, x) for x in batches],
        [run(plain, x, torch.float64) for x in batches],
    )
    for parts in zip(*(map(torch.stack, zip(*each, strict=True)) for each in results), strict=True):
        testing.assert_within(*parts)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", peers.ACCELERATED)
def test_the_same_results(name, training):
    plain, ours = pair(name)
    assert_as_accurate(plain.train(training), ours.train(training), [peers.inputs(name, 8) for _ in range(BATCHES)])


@pytest.mark.parametrize("name", peers.ACCELERATED)
def test_what_is_found(name):
    peer, model = peers.PEERS[name], peers.make(name)
    report = accelerate(model)
    assert {each.family for each in report.accelerated} == {peer.family}
    assert report.refused == []
    parts = {each.part: each.name for each in report.accelerated}
    assert parts.get("PPM", parts.get("head")) == peer.ppm
    if peer.head is not None and peer.head != peer.ppm:
        assert parts["head"] == peer.head
    assert all(f"{each.name or 'the model'} ({each.family}, {each.part})" in str(report) for each in report.accelerated)


@pytest.mark.parametrize("name", peers.REFUSED)
def test_what_differs_is_left_as_it_is(name):
    """Whatever is said of it, its outputs stay; where its structure is nearly known, the reason is told."""
    model, arguments = peers.make(name).eval(), peers.inputs(name)
    expected = peers.tensors(model(*arguments))
    report = accelerate(model)
    assert report.accelerated == []
    assert "the model is unchanged" in str(report)
    assert all(type(module).__mro__[1].__module__ != "pspnet_fast.integrations.forwards" for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(peers.tensors(model(*arguments)), expected, strict=True))
    if peers.PEERS[name].reason:
        assert [peers.PEERS[name].reason in each.reason for each in report.refused] == [True]
        assert report.refused[0].reason in str(report)
    else:
        assert report.refused == []
        assert report.near == {"meetps": ["the model"], "max": [], "aspp": ["convs.2"]}[name]


@pytest.mark.parametrize("name", peers.ACCELERATED)
def test_nothing_else_changes_and_restore_undoes_it(name):
    model = peers.make(name).eval()
    arguments, seen = peers.inputs(name), []
    expected = peers.tensors(model(*arguments))
    classes, state = [type(module) for module in model.modules()], model.state_dict()
    modules, parameters = [*model.modules()], [*model.named_parameters()]
    handle = model.register_forward_hook(lambda *_: seen.append("hook"))
    accelerate(model)
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    assert [*model.state_dict()] == [*state]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(model.named_parameters(), parameters, strict=True))
    model(*arguments)
    assert seen == ["hook"]
    handle.remove()
    assert restore(model) != []
    assert [type(module) for module in model.modules()] == classes
    assert all("_pspnet_fast" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(peers.tensors(model(*arguments)), expected, strict=True))
    assert restore(model) == []


def test_twice_is_once():
    model = peers.make("mmseg_psp")
    first = accelerate(model)
    classes = [type(module) for module in model.modules()]
    second = accelerate(model)
    assert second.accelerated == []
    assert {*second.already} == {*first.accelerated}
    assert "already accelerated: psp_modules (mmseg, PPM)" in str(second)
    assert [type(module) for module in model.modules()] == classes


def test_a_model_without_a_pyramid():
    report = accelerate(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))))
    assert str(report) == "no pyramid pooling module was accelerated, the model is unchanged\nnear misses: 1"


def test_our_own_is_no_stranger():
    report = accelerate(nn.Sequential(PPM(8, 2)))
    assert (report.accelerated, report.refused, report.near) == ([], [], [])


def test_two_in_one_model():
    model = nn.ModuleDict({"a": peers.make("semseg_ppm"), "b": peers.make("yassouali"), "c": peers.make("sum")})
    report = accelerate(model)
    assert [each.name for each in report.accelerated] == ["a", "b"]
    assert [each.name for each in report.refused] == ["c"]


# The head


@contextlib.contextmanager
def concatenations(channels):
    """Counts tensors of so many channels that `torch.cat` or `upsample_concat` make."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            out = function(*arguments, **(named or {}))
            made.extend(t for t in peers.tensors(out if isinstance(out, (tuple, list)) else [out]) if t.dim() == 4)
            return out

    with Watch():
        yield made
    made[:] = [t for t in made if t.shape[1] == channels and t.shape[2] > 6]


@pytest.mark.parametrize("name", [*peers.WITH_HEAD, "yassouali", "speedinghzl", "torchseg", "csail", "csail_deepsup"])
def test_the_head_never_builds_the_concatenation(name):
    plain, ours = pair(name)
    apart = copy.deepcopy(plain)
    report = accelerate(apart, head=False)
    assert "head" not in {each.part for each in report.accelerated if each.family != "CSAIL"}
    arguments, counts = peers.inputs(name), []
    for model in (plain, ours, apart):
        with torch.no_grad(), concatenations(32 + 4 * 8) as made:
            model.eval()(*arguments)
        counts.append(len(made) > 0)
    assert counts == [True, False, True]
    assert_as_accurate(plain.train(), apart.train(), [peers.inputs(name, 8) for _ in range(BATCHES)])


def test_the_pyramid_by_itself_still_gives_the_concatenation():
    """Outside of its head's forward, and to whoever hooks it."""
    plain, ours = pair("semseg")
    x = torch.randn(2, 32, 11, 13)
    torch.testing.assert_close(ours.eval().ppm(x), plain.eval().ppm(x))
    images, shapes = peers.inputs("semseg"), []
    hook = ours.ppm.register_forward_hook(lambda module, inputs, out: shapes.append(out.shape[1]))
    torch.testing.assert_close(ours(*images), plain(*images))
    hook.remove()
    hook = ours.cls.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[1]))
    torch.testing.assert_close(ours(*images), plain(*images))
    hook.remove()
    hook = ours.cls[0].register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[1]))
    torch.testing.assert_close(ours(*images), plain(*images))
    assert shapes == [64, 64, 64]


def test_hooks_inside_the_levels_are_called():
    plain, ours = pair("semseg_ppm")
    x, seen = torch.randn(2, 32, 11, 13), []
    for module in (ours.features[0], ours.features[1][0], ours.features[2][1], ours.features[3][2]):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
        handle.remove()
        ours(x)
    assert len(seen) == 4


# What users do with a model


@pytest.mark.parametrize("name", ["semseg", "smp", "mmseg_uper", "transformers", "csail", "speedinghzl"])
def test_copies_and_files(name):
    _, model = pair(name)
    arguments, file = peers.inputs(name), io.BytesIO()
    expected = peers.tensors(model.eval()(*arguments))
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(a) is type(b) for a, b in zip(other.modules(), model.modules(), strict=True)].count(False) == 0
        assert all(torch.equal(a, b) for a, b in zip(peers.tensors(other(*arguments)), expected, strict=True))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(peers.tensors(other(*arguments))[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(peers.tensors(model(*arguments)), expected, strict=True))


@pytest.mark.parametrize("name", ["semseg", "smp", "transformers"])
def test_weights_loaded_afterwards_count(name):
    _, ours = pair(name)
    other, arguments = peers.make(name).eval(), peers.inputs(name)
    ours.eval()(*arguments)
    ours.load_state_dict(other.state_dict())
    for a, b in zip(peers.tensors(ours(*arguments)), peers.tensors(other(*arguments)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["semseg", "smp", "mmseg_psp", "transformers", "csail"])
def test_conversion_to_synchronised_norms(name, before):
    """In one process; transformers' forward keeps the norms of its Python lists, before and after."""
    plain = peers.make(name)
    ours = copy.deepcopy(plain)
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    ours = convert(ours) if before else ours
    assert accelerate(ours).accelerated != []
    ours = ours if before else convert(ours)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in ours.modules())
    arguments = peers.inputs(name)
    for a, b in zip(peers.tensors(ours.eval()(*arguments)), peers.tensors(plain.eval()(*arguments)), strict=True):
        torch.testing.assert_close(a, b)


def test_transformers_python_lists_decide():
    """A child that is replaced changes nothing there, and so nothing here."""
    plain, ours = pair("transformers")
    for model in (plain, ours):
        block = model.psp_modules.blocks[0]
        block._modules["1"] = nn.Identity()
    arguments = peers.inputs("transformers")
    for a, b in zip(peers.tensors(ours.eval()(*arguments)), peers.tensors(plain.eval()(*arguments)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_replaced_afterwards_runs_as_its_own_forward(caplog):
    """A level that is no convolution any more."""
    plain, ours = pair("semseg_ppm")
    for model in (plain, ours):
        model.features[1] = nn.Sequential(nn.AdaptiveMaxPool2d(2), *model.features[1][1:])
    x = torch.randn(2, 32, 11, 13)
    with caplog.at_level(logging.DEBUG, logger="pspnet_fast"):
        assert torch.equal(ours.eval()(x), plain.eval()(x))
    assert "runs its own forward: level 1 does not begin with AdaptiveAvgPool2d" in caplog.text


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["semseg_ppm", "smp", "mmseg_psp", "yassouali"])
def test_autocast(name, training):
    plain, ours = pair(name)
    x, exact = peers.inputs(name, 4), []
    for model in (ours, plain):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            exact.append(peers.tensors(model.train(training)(*x))[0])
    reference = peers.tensors(plain.double()(*peers.to(x, dtype=torch.float64)))[0]
    ours, theirs = ((each.double() - reference).abs().mean() for each in exact)
    assert exact[0].dtype == exact[1].dtype
    assert ours <= 1.5 * theirs


def _process(rank, port, folder):
    """The gradients of one step under DistributedDataParallel: plain, accelerated before it, accelerated after it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = []
    for order in ("plain", "before", "after"):
        torch.manual_seed(0)
        model = peers.make("mmseg_psp")
        if order == "before":
            accelerate(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        if order == "after":
            assert len(accelerate(parallel).accelerated) == 2
        torch.manual_seed(rank)
        parallel(*peers.inputs("mmseg_psp", 4)).square().mean().backward()
        results.append([parameter.grad for parameter in model.parameters()])
        del parallel
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.start_processes(_process, (port, tmp_path), nprocs=2, start_method="fork", join=False)
    end = time.monotonic() + 120
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for each in context.processes:
                each.kill()
            pytest.fail("the processes were still running after 120 s")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    plain, *ours = first
    for grads in ours:
        for a, b in zip(grads, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["semseg", "mmseg_psp"])
def test_replicas_use_their_own_layers(name):
    """As nn.DataParallel makes them: a replica's head finds the replica's pyramid."""
    _, ours = pair(name)
    arguments = peers.inputs(name)
    replica = ours.eval()._replicate_for_data_parallel()
    for child, module in ours._modules.items():
        replica._modules[child] = copy.deepcopy(module)
    expected = copy.deepcopy(ours)
    ppm = {"semseg": "ppm", "mmseg_psp": "psp_modules"}[name]
    with torch.no_grad():
        for parameter in (*replica._modules[ppm].parameters(), *expected._modules[ppm].parameters()):
            parameter.zero_()
    got, wanted, other = (peers.tensors(model(*arguments))[0] for model in (replica, expected, ours))
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, other)


@pytest.mark.parametrize("name", ["semseg_ppm", "smp", "mmseg_psp", "csail", "yassouali"])
def test_compiles_to_one_graph(name):
    _, ours = pair(name)
    arguments = peers.inputs(name)
    expected = peers.tensors(ours.eval()(*arguments))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(peers.tensors(compiled(*arguments)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_other_random_numbers_are_left_alone():
    model = peers.make("semseg")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    accelerate(model)
    assert torch.equal(torch.rand(1), expected)


def test_a_forward_on_the_instance_is_left_alone():
    model = peers.make("semseg_ppm")
    model.forward = lambda x: x
    report = accelerate(model)
    assert report.accelerated == []
    assert report.refused[0].reason == "SemsegPPM is not called by its class's forward"


def test_a_file_is_read_by_a_process_that_has_only_torch_imported(tmp_path):
    """The pickle brings the library in."""
    _, model = pair("mmseg_psp")
    arguments = peers.inputs("mmseg_psp")
    torch.save((model.eval(), arguments, model(*arguments)), tmp_path / "model.pt")
    code = f"""
import sys, torch
sys.path.append({str(Path(__file__).parent)!r})
model, arguments, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert torch.equal(model(*arguments), expected)
assert type(model).__mro__[1].__name__ == "AcceleratedHead"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)


@pytest.mark.parametrize("name", ["semseg", "smp", "mmseg_psp", "csail", "yassouali"])
def test_dropout_drops_the_same_channels(name):
    plain = peers.make(name)
    for module in plain.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.5
    ours, arguments, outputs = copy.deepcopy(plain), peers.inputs(name, 4), []
    assert accelerate(ours).accelerated != []
    for model in (ours, plain):
        torch.manual_seed(3)
        outputs.append([t for t in peers.tensors(model.train()(*arguments)) if t.is_floating_point()])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["semseg_ppm", "speedinghzl_abn", "shared"])
def test_some_norms_frozen_and_one_norm_for_all(name):
    """Running statistics of norms in two modes, of a norm that is an activation too, and of one that sees every level."""
    plain, ours = pair(name)
    for model in (plain, ours):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        norms[-1].train(name == "shared")
    x = torch.randn(4, 32, 11, 13)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    for (key, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")


def test_parametrised_layers():
    """weight_norm in a level and on the head's convolution, after the model was accelerated."""
    plain, ours = pair("semseg")
    for model in (plain, ours):
        for layer in (model.ppm.features[1][1], model.cls[0]):
            nn.utils.parametrizations.weight_norm(layer)
            layer.parametrizations.weight.original0.data.mul_(2)
    images = peers.inputs("semseg")[0]
    torch.testing.assert_close(ours.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing():
    plain, ours = pair("mmseg_psp")
    (maps,) = peers.inputs("mmseg_psp", 4)
    grads = []
    for model in (ours, plain):
        out = torch.utils.checkpoint.checkpoint(model.train(), maps, use_reentrant=False)
        grads.append(torch.autograd.grad(out.square().mean(), [*model.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_a_running_head_keeps_is_its_thread_s_own():
    """While it runs in one thread, its pyramid gives another thread the levels."""
    plain, ours = pair("mmseg_psp")
    (maps,) = peers.inputs("mmseg_psp")
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(timeout=60)

    ours.eval().dropout.register_forward_hook(wait)
    thread = threading.Thread(target=ours, args=(maps,))
    thread.start()
    assert inside.wait(timeout=60)
    levels = ours.psp_modules(maps[-1])
    go_on.set()
    thread.join()
    for a, b in zip(levels, plain.eval().psp_modules(maps[-1]), strict=True):
        torch.testing.assert_close(a, b)


def test_the_trial_leaves_no_trace():
    """Modes of single modules, gradients, running statistics and hooks that nobody calls."""
    model, seen = peers.make("semseg"), []
    model.cls[1].eval()
    images, labels = peers.inputs("semseg")
    model(images, labels)[1].backward()
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    for module in (model, model.ppm, model.ppm.features[0][1]):
        module.register_forward_hook(lambda *_: seen.append("forward"))
        module.register_full_backward_hook(lambda *_: seen.append("backward"))
    assert accelerate(model).accelerated != []
    assert seen == []
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)


# A family of one's own


class Doubled(nn.Module):
    """No list, no known names, and x stands last."""

    def __init__(self):
        super().__init__()
        for b in (1, 3):
            setattr(self, f"branch{b}", nn.Sequential(nn.AdaptiveAvgPool2d(b), nn.Conv2d(8, 4, 1), nn.ReLU()))

    def forward(self, x):
        maps = [branch(x) for branch in (self.branch1, self.branch3)]
        return torch.cat([*(F.interpolate(y, x.shape[2:], mode="bilinear") for y in maps), x], 1)


class DoubledHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.context, self.project = Doubled(), nn.Conv2d(16, 5, 3, padding=1, bias=False)

    def forward(self, x):
        return self.project(self.context(x))


class DoubledFamily(Family):
    name = "doubled"

    def pyramid(self, module):
        return pyramid_of([leaves(module.branch1), leaves(module.branch3)]) if isinstance(module, Doubled) else None


class HeadOfDoubled(Head):
    name = "doubled"
    ppm = "context"
    layers = "project"

    def inputs(self, head, channels, size, batch):
        return (features(channels, size, batch),)


def test_a_family_of_ones_own():
    plain = DoubledHead()
    assert accelerate(copy.deepcopy(plain)).accelerated == []
    ours = copy.deepcopy(plain)
    report = accelerate(ours, families=[DoubledFamily(), HeadOfDoubled()])
    assert [(each.name, each.part) for each in report.accelerated] == [("context", "PPM"), ("", "head")]
    assert ours.context._pspnet_fast.layout == Layout("last", False)
    assert_as_accurate(plain, ours, [(torch.randn(4, 8, 11, 13),) for _ in range(8)])


def test_every_family_is_tried_on_a_peer():
    """None of the table is unreachable."""
    found = {peer.family for peer in peers.PEERS.values() if peer.ppm is not None} | {"CSAIL UPerNet"}
    assert {family.name for family in integrations.FAMILIES} | {head.name for head in integrations.HEADS} == found


# What a trial must not miss


class Between(nn.Module):
    """A head like semseg's, whose forward does something between the pyramid and the layers."""

    def __init__(self):
        super().__init__()
        self.ppm, self.cls, self.gain = peers.SemsegPPM(32, 8), peers.classifier(64, 8), nn.Parameter(torch.ones(1))

    def forward(self, x, y=None):
        return self.cls(self.between(self.ppm(x)))


class Asserting(Between):
    def between(self, x):
        assert x.shape[1] == 64
        return x


class Gated(Between):
    def between(self, x):
        return x * self.gain


class Keeping(Between):
    def between(self, x):
        self.kept = x
        return x


class HeadOfFeatures(Head):
    """semseg's, of features and not of images."""

    name = "of features"
    ppm = "ppm"
    layers = "cls"

    def inputs(self, head, channels, size, batch):
        return (features(channels, size, batch),)

    def random(self, head):
        return head.ppm, head.cls


@pytest.mark.parametrize("kind", [Asserting, Gated, Keeping])
def test_something_between_the_pyramid_and_the_layers(kind):
    """The pyramid is accelerated, the head is not, whatever the parameters between are worth now."""
    plain = peers.randomise(kind()).eval()
    ours = copy.deepcopy(plain)
    report = accelerate(ours, families=[HeadOfFeatures()])
    assert {each.part for each in report.accelerated} == {"PPM"}
    assert any(each.family == "of features" for each in report.refused)
    for model in (plain, ours):
        model.gain.data.fill_(3.0)
    x = torch.randn(2, 32, 11, 13)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)


class Beside(Between):
    """Its forward also calls a pyramid that is no part of the head."""

    def __init__(self):
        super().__init__()
        self.other = peers.SemsegPPM(32, 8)

    def forward(self, x, y=None):
        return self.cls(self.ppm(x)), self.other(x)


def test_another_pyramid_inside_a_head_s_forward():
    plain = peers.randomise(Beside()).eval()
    ours = copy.deepcopy(plain)
    report = accelerate(ours, families=[HeadOfFeatures()])
    assert {(each.name, each.part) for each in report.accelerated} == {("ppm", "PPM"), ("other", "PPM"), ("", "head")}
    x = torch.randn(2, 32, 11, 13)
    for a, b in zip(ours(x), plain(x), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_that_tell_nothing_are_not_relied_on():
    """Norms that start at zero, whose levels are zero for every align_corners."""
    plain = peers.make("zijundeng").eval()
    for norm in (module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)
    ours = copy.deepcopy(plain)
    assert accelerate(ours).accelerated
    trained = peers.make("zijundeng").state_dict()
    for model in (plain, ours):
        model.load_state_dict(trained)
    x = torch.randn(2, 32, 11, 13)
    torch.testing.assert_close(ours(x), plain(x))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got str"):
        accelerate("model")
    with pytest.raises(TypeError, match=r"accelerate: families must be instances of Family or Head, got <class"):
        accelerate(nn.Identity(), families=[Family])
