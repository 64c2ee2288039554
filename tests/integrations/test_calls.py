"""What people do to modules of an accelerated model is seen: results and calls of hooks are those of the model as it was."""

import copy
import functools

import peers
import pytest
import torch
from torch import nn
from torch.nn.modules import module as of_all

from pspnet_fast.integrations import Pyramid, accelerate, csail, restore
from pspnet_fast.nn.reading import Level

FAMILIES = ["semseg", "smp", "smp_uper", "mmseg_psp", "transformers", "csail", "yassouali", "speedinghzl", "tramac"]


def pair(name):
    plain = peers.make(name).eval()
    ours = copy.deepcopy(plain)
    assert accelerate(ours).accelerated != []
    return plain, ours


def shape(value):
    return [tuple(tensor.shape) for tensor in peers.tensors(value)]


def _hook(module, seen):
    module.register_forward_hook(lambda _, inputs, out: seen.append((shape(inputs), shape(out))))


def _scaled(out):
    if isinstance(out, dict):
        return {key: value * 1.5 for key, value in out.items()}
    return [each * 1.5 for each in out] if isinstance(out, list) else out * 1.5


def _changing_hook(module, seen):
    module.register_forward_hook(lambda _, inputs, out: (seen.append(shape(inputs)), _scaled(out))[1])


def _another_forward(module, seen):
    """As Hugging Face accelerate puts it on a module."""

    def run(module, *arguments, **named):
        seen.append(shape(arguments))
        return _scaled(module._old_forward(*arguments, **named))

    module._old_forward = module.forward
    module.forward = functools.partial(run, module)


def _compiled(module, seen):
    module._compiled_call_impl = lambda *arguments: (seen.append(shape(arguments)), module._call_impl(*arguments))[1]


def _another_class(module, seen):
    """Of containers: a subclass, which does something else with what its children return."""
    old = type(module)

    def forward(self, *arguments, **named):
        seen.append(shape(arguments))
        return _scaled(old.forward(self, *arguments, **named))

    module.__class__ = type("Scaled", (old,), {"forward": forward})


def runs(model, arguments):
    torch.manual_seed(0)
    return peers.tensors(model(*arguments))


def assert_same(ours, plain, arguments):
    for a, b in zip(runs(ours, arguments), runs(plain, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("done", [_hook, _changing_hook, _another_forward, _compiled, _another_class])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_that_must_be_called_is_called(name, done):
    """Every module of the pyramid and its head, one after another: those that the plain model calls, and those it does not."""
    plain, ours = pair(name)
    arguments, counted = peers.inputs(name), 0
    for key, module in plain.named_modules():
        if not key or type(module).forward is nn.Module.forward or key.startswith(("layer", "aux", "encoder")):
            continue
        calls = []
        models = [copy.deepcopy(model) for model in (ours, plain)]
        for model in models:
            calls.append([])
            done(model.get_submodule(key), calls[-1])
        assert_same(*models, arguments)
        assert calls[0] == calls[1], key
        counted += len(calls[1]) > 0
    assert counted >= 4 * 4


@pytest.mark.parametrize("register", [of_all.register_module_forward_hook, of_all.register_module_forward_pre_hook])
@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_for_all_modules(name, register):
    plain, ours = pair(name)
    arguments, calls = peers.inputs(name), []
    for model in (ours, plain):
        names, seen = {id(module): key for key, module in model.named_modules()}, []
        handle = register(lambda module, *_, names=names, seen=seen: seen.append(names[id(module)]))
        try:
            runs(model, arguments)
        finally:
            handle.remove()
        calls.append(seen)
    assert calls[0] == calls[1]


def test_a_model_is_not_tried_where_it_would_not_be_accelerated():
    """Under hooks for all modules every layout would agree, and the first one would stay when the hooks are gone."""
    plain = peers.make("zijundeng").eval()
    ours, x = copy.deepcopy(plain), torch.randn(2, 32, 11, 13)
    handle = of_all.register_module_forward_hook(lambda *_: None)
    try:
        report = accelerate(ours)
    finally:
        handle.remove()
    assert report.accelerated == []
    assert "hooks that are registered for all modules" in report.refused[0].reason
    torch.testing.assert_close(ours(x), plain(x))
    assert accelerate(ours).accelerated != []
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


class ByHand(csail.Decoder):
    """A head of one's own that asks nothing of the modules it reads."""

    name = "by hand"

    def pyramid(self, head, ppm, of_ppm):
        levels = [Level(*[*layers][1:]) for layers in ppm._modules.values()] if isinstance(head, peers.CsailPPM) else []
        return Pyramid(peers.BINS, tuple(levels)) if levels else None


def test_a_head_is_not_tried_where_it_would_run_as_it_was():
    model = peers.make("csail").eval()
    handle = of_all.register_module_forward_hook(lambda *_: None)
    try:
        report = accelerate(model, families=[ByHand()])
    finally:
        handle.remove()
    assert report.accelerated == []
    (reason,) = (each.reason for each in report.refused if each.family == "by hand")
    assert reason == "its head: ppm: it would call the hooks that are registered for all modules"
    assert [each.family for each in accelerate(model, families=[ByHand()]).accelerated] == ["by hand"]


CHANGES = {
    "maximum pooling": lambda levels: levels[1].__setitem__(0, nn.AdaptiveMaxPool2d(2)),
    "another bin": lambda levels: setattr(levels[1][0], "output_size", 5),
    "a level less": lambda levels: levels.__delitem__(3),
    "another width": lambda levels: levels.__setitem__(1, peers.level(32, 3, 2)),
    "a convolution of a wider window": lambda levels: levels[3].__setitem__(1, nn.Conv2d(32, 8, 3)),
    "identity for norm": lambda levels: levels[1].__setitem__(2, nn.Identity()),
    "identity for activation": lambda levels: levels[1].__setitem__(3, nn.Identity()),
    "dropout": lambda levels: levels[1].append(nn.Dropout2d(0.0)),
    "another norm": lambda levels: levels[1].__setitem__(2, nn.GroupNorm(2, 8)),
    "a nested sequence": lambda levels: levels.__setitem__(
        1, nn.Sequential(levels[1][0], nn.Sequential(*levels[1][1:]))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_levels_are_what_the_modules_are(change):
    plain, ours = pair("semseg_ppm")
    for model in (plain, ours):
        torch.manual_seed(5)
        CHANGES[change](model.features)
        model.eval()
    x = torch.randn(2, 32, 11, 13)
    assert_same(ours, plain, (x,))
    assert_same(ours.train(), plain.train(), (x,))


@pytest.mark.parametrize("name", ["semseg", "csail", "mmseg_psp", "speedinghzl"])
def test_levels_of_other_sizes_than_were_pooled(name):
    """A stride in some levels: in the concatenation, in a list of levels, and before a convolution that needs neither."""
    plain, ours = pair(name)
    for model in (plain, ours):
        pooled = [
            m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 32 and m.kernel_size == (1, 1)
        ]
        pooled[-1].stride = (2, 2)
    assert_same(ours, plain, peers.inputs(name))
    if name == "mmseg_psp":
        assert_same(ours.psp_modules, plain.psp_modules, (torch.randn(2, 32, 11, 13),))


@pytest.mark.parametrize("name", ["semseg", "csail", "mmseg_psp"])
def test_who_kept_a_method_calls_the_restored_module(name):
    """As Hugging Face accelerate keeps a module's forward, and calls it whatever became of the module."""
    _, ours = pair(name)
    arguments = peers.inputs(name)
    for module in ours.modules():
        if "_pspnet_fast" in module.__dict__ and not isinstance(module, nn.ModuleList):
            _another_forward(module, [])
    changed = runs(ours, arguments)
    restore(ours)
    for a, b in zip(runs(ours, arguments), changed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_weights_that_are_somewhere_else_are_named():
    report = accelerate(peers.make("semseg").to("meta"))
    assert report.accelerated == []
    assert all("its weights are not here (device meta)" in each.reason for each in report.refused)


def test_files_of_before_the_tried_classes_were_kept():
    """Plans had four fields: such a module is accelerated as ever."""
    plain, ours = pair("semseg_ppm")
    plan = ours.__dict__["_pspnet_fast"]
    ours.__dict__["_pspnet_fast"] = type(plan)(*plan[:4])
    x = torch.randn(2, 32, 11, 13)
    assert_same(ours, plain, (x,))
