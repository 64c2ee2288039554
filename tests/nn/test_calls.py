"""What people do to modules inside a pyramid or its head is seen: results and calls of hooks are those of plain PyTorch."""

import copy
import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as of_all
from torch.nn.utils import parametrize

from pspnet_fast import PPM, PSPHead, PSPNet
from pspnet_fast.nn.plain_ppm import PlainPPM

BINS = (1, 2, 3, 6)


def randomised(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module


class PlainHead(nn.Module):
    """`PSPHead` of plain PyTorch: its keys and its children's names."""

    def __init__(self, head):
        super().__init__()
        self.ppm = plain_of(head.ppm)
        self.cls = copy.deepcopy(head.cls)

    def forward(self, x):
        return self.cls(self.ppm(x))


def plain_of(ppm):
    plain = PlainPPM(ppm.in_dim, ppm.features[0][1].out_channels, ppm.bins)
    plain.load_state_dict(ppm.state_dict())
    return plain


def pairs():
    """PPM and PSPHead, and each in plain PyTorch with the same weights."""
    ppm, head = randomised(PPM(12, 5, BINS)), randomised(PSPHead(12, 5, 8, 4, BINS, dropout=0.0))
    return {"PPM": (ppm, plain_of(ppm)), "PSPHead": (head, PlainHead(head))}


def pyramid_in(module):
    return module.ppm if hasattr(module, "ppm") else module


def outcome(module, x, seen=()):
    """Value, gradients and running statistics of one batch, and what `seen` grew by."""
    before, x = len(seen), x.detach().requires_grad_()
    module.zero_grad()
    out = module(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(cotangent.to(out.dtype))
    grads = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    buffers = {key: b.clone() for key, b in module.named_buffers()}
    return {"value": out.detach(), "x": x.grad, **grads, **buffers}, list(seen[before:])


def assert_same(ours, plain, x=None, seen=()):
    x = torch.randn(4, 12, 9, 11) if x is None else x
    for training in (False, True):
        (got, calls), (wanted, plain_calls) = (outcome(m.train(training), x, seen) for m in (ours, plain))
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                got[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
        assert calls == plain_calls
    with torch.no_grad():  # where a head's norm and activation are a part of its convolution
        first = len(seen)
        got = ours.eval()(x)
        middle = len(seen)
        torch.testing.assert_close(got, plain.eval()(x), rtol=1e-4, atol=1e-4)
        assert seen[first:middle] == seen[middle:]


# A child that is another module, or has another form


class Halved(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


class Called(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class Doubling(nn.Module):
    def forward(self, weight):
        return weight * 2


def _no_norm_bias(ppm):
    ppm.features[1][2].bias = None


def _weight_alone(ppm):
    """As a tool that prunes does it, which leaves the attributes as they were."""
    ppm.features[1][1].weight = nn.Parameter(ppm.features[1][1].weight.detach() * 2)


def _bigger_window(ppm):
    ppm.features[2][1].weight = nn.Parameter(torch.randn(5, 12, 3, 3))


def _hooked_identity(ppm):
    ppm.features[1][2] = nn.Identity()
    ppm.features[1][2].register_forward_hook(lambda module, inputs, out: out * 2)


class Widened(nn.Module):
    def forward(self, x):
        return x.double()


def _spectral_norm(ppm):
    nn.utils.spectral_norm(ppm.features[1][1])


def _weight_norm(ppm):
    nn.utils.parametrizations.weight_norm(ppm.features[1][1])
    with torch.no_grad():
        ppm.features[1][1].parametrizations.weight.original0.mul_(2)


CHILDREN = {
    "maximum pooling": lambda ppm: ppm.features[1].__setitem__(0, nn.AdaptiveMaxPool2d(2)),
    "another bin": lambda ppm: ppm.features[1].__setitem__(0, nn.AdaptiveAvgPool2d(4)),
    "output_size": lambda ppm: setattr(ppm.features[2][0], "output_size", 5),
    "not square": lambda ppm: setattr(ppm.features[2][0], "output_size", (2, 3)),
    "half given": lambda ppm: setattr(ppm.features[2][0], "output_size", (None, 3)),
    "fixed windows": lambda ppm: ppm.features[1].__setitem__(0, nn.AvgPool2d(3)),
    "identity for pooling": lambda ppm: ppm.features[1].__setitem__(0, nn.Identity()),
    "identity for norm": lambda ppm: ppm.features[1].__setitem__(2, nn.Identity()),
    "identity with a hook": _hooked_identity,
    "identity for activation": lambda ppm: ppm.features[1].__setitem__(3, nn.Identity()),
    "another activation": lambda ppm: ppm.features[1].__setitem__(3, nn.Hardswish()),
    "another norm": lambda ppm: ppm.features[1].__setitem__(2, nn.GroupNorm(5, 5)),
    "dropout": lambda ppm: ppm.features[1].append(nn.Dropout2d(0.0)),
    "a second convolution": lambda ppm: ppm.features[1].append(nn.Conv2d(5, 5, 3, padding=1)),
    "no activation": lambda ppm: ppm.features[1].__delitem__(3),
    "a forward of the level": lambda ppm: ppm.features.__setitem__(1, Halved(*ppm.features[1])),
    "a nested sequence": lambda ppm: ppm.features.__setitem__(
        1, nn.Sequential(ppm.features[1][0], nn.Sequential(*ppm.features[1][1:]))
    ),
    "a nested forward": lambda ppm: ppm.features.__setitem__(
        1, nn.Sequential(ppm.features[1][0], Halved(*ppm.features[1][1:]))
    ),
    "a wider window": _bigger_window,
    "a stride": lambda ppm: setattr(ppm.features[3][1], "stride", (2, 2)),
    "padding": lambda ppm: setattr(ppm.features[3][1], "padding", (1, 1)),
    "a norm without a bias": _no_norm_bias,
    "another weight": _weight_alone,
    "a class that is called in its own way": lambda ppm: ppm.features[1].__setitem__(1, Called(12, 5, 1)),
    "parametrised": lambda ppm: parametrize.register_parametrization(ppm.features[1][1], "weight", Doubling()),
    "parametrised norm": lambda ppm: parametrize.register_parametrization(ppm.features[1][2], "weight", Doubling()),
    "spectral norm": _spectral_norm,
    "weight norm": _weight_norm,
    "scripted level": lambda ppm: ppm.features.__setitem__(1, torch.jit.script(ppm.features[1])),
    "scripted convolution": lambda ppm: ppm.features[1].__setitem__(1, torch.jit.script(ppm.features[1][1])),
}
WIDTHS = {  # for the pyramid alone: the head's convolution takes as many channels as it took
    "a level less": lambda ppm: ppm.features.__delitem__(3),
    "a slice": lambda ppm: setattr(ppm, "features", ppm.features[1:3]),
    "no level": lambda ppm: setattr(ppm, "features", nn.ModuleList()),
    "a level more": lambda ppm: ppm.features.append(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(12, 5, 1))),
    "another order": lambda ppm: setattr(ppm, "features", ppm.features[::-1]),
    "another width": lambda ppm: ppm.features.__setitem__(
        1, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(12, 7, 1), nn.ReLU())
    ),
    "another width by modules": lambda ppm: ppm.features.__setitem__(
        3, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(12, 7, 1), nn.Hardswish())
    ),
    "identity for convolution": lambda ppm: ppm.features.__setitem__(
        1, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Identity(), nn.ReLU())
    ),
    "pooling alone": lambda ppm: ppm.features.__setitem__(1, nn.Sequential(nn.AdaptiveAvgPool2d(2))),
}


def changed(change, *modules):
    """The same change, with the same new weights."""
    for module in modules:
        torch.manual_seed(5)
        change(pyramid_in(module))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("change", CHILDREN)
@pytest.mark.parametrize("name", ["PPM", "PSPHead"])
def test_the_levels_are_what_the_modules_are(name, change):
    ours, plain = pairs()[name]
    changed(CHILDREN[change], ours, plain)
    assert_same(ours, plain)


def test_a_level_of_another_dtype():
    """The concatenation is then of the wider one."""
    ours, plain = pairs()["PPM"]
    changed(lambda ppm: ppm.features[1].__setitem__(3, Widened()), ours, plain)
    assert_same(ours, plain)
    assert ours(torch.randn(2, 12, 9, 11)).dtype == torch.float64


@pytest.mark.parametrize("change", WIDTHS)
@pytest.mark.parametrize("name", ["PPM", "PSPHead"])
def test_as_many_channels_as_the_levels_have(name, change):
    """The head's convolution, too, is then one of as many channels."""
    ours, plain = pairs()[name]
    changed(WIDTHS[change], ours, plain)
    if name == "PSPHead":
        channels = ours.ppm.eval()(torch.randn(1, 12, 9, 11)).shape[1]
        ours.cls[0] = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        plain.cls[0] = copy.deepcopy(ours.cls[0])
    assert_same(ours, plain)


def test_levels_that_the_kernels_compute_go_on_doing_so(caplog):
    """A level of another width beside three that fit each other; their order and another bin are nothing special."""
    ppm = pairs()["PPM"][0].eval()
    ppm.features[1][0] = nn.AdaptiveAvgPool2d(4)
    ppm.features[2][0].output_size = 5
    ppm.features = ppm.features[::-1]
    with caplog.at_level(logging.DEBUG, logger="pspnet_fast"):
        ppm(torch.randn(1, 12, 9, 11))
        assert caplog.text == ""
        ppm.features[1][0] = nn.AdaptiveMaxPool2d(4)
        ppm(torch.randn(1, 12, 9, 11))
    assert "level 1 does not begin with AdaptiveAvgPool2d" in caplog.text


def test_channels_that_cannot_be_are_one_sentence():
    ppm = pairs()["PPM"][0]
    with pytest.raises(ValueError, match=r"PPM: x must have in_dim = 12 channels, got \(2, 10, 9, 11\)"):
        ppm(torch.randn(2, 10, 9, 11))
    ppm.features[1][1] = nn.Conv2d(10, 5, 1, bias=False)
    with pytest.raises(ValueError, match=r"pyramid_project: .*10.*12|pyramid_project: .*12.*10"):
        ppm(torch.randn(2, 12, 9, 11))


# What is done to a module without changing what it is: every one is called where plain PyTorch calls it


def shape(value):
    return (
        tuple(value.shape) if isinstance(value, torch.Tensor) else [shape(each) for each in value if each is not None]
    )


def new_forward(module, *arguments, seen, label, **named):
    seen.append((label, shape(arguments)))
    return module._old_forward(*arguments, **named) * 1.5


def _replace_forward(module, seen, label):
    """As Hugging Face accelerate's `add_hook_to_module` does."""
    module._old_forward = module.forward
    module.forward = functools.update_wrapper(
        functools.partial(new_forward, module, seen=seen, label=label), module._old_forward
    )


def _forward_hook(module, seen, label):
    module.register_forward_hook(lambda _, inputs, out: seen.append((label, shape(inputs), shape(out))))


def _changing_hook(module, seen, label):
    module.register_forward_hook(lambda _, inputs, out: out * 1.5)


def _named_hook(module, seen, label):
    module.register_forward_hook(
        lambda _, inputs, named, out: seen.append((label, shape(inputs), named, shape(out))), with_kwargs=True
    )


def _pre_hook(module, seen, label):
    module.register_forward_pre_hook(lambda _, inputs: seen.append((label, shape(inputs))))


def _backward_hook(module, seen, label):
    module.register_full_backward_hook(lambda _, *grads: seen.append((label, shape(grads))))


def _backward_pre_hook(module, seen, label):
    module.register_full_backward_pre_hook(lambda _, grads: seen.append((label, shape(grads))))


def _compile(module, seen, label):
    module.compile(backend="eager")
    compiled = module._compiled_call_impl
    module._compiled_call_impl = lambda *arguments: (seen.append(label), compiled(*arguments))[1]


DONE = {
    "a forward hook": _forward_hook,
    "a hook that changes the output": _changing_hook,
    "a hook with names": _named_hook,
    "a forward pre-hook": _pre_hook,
    "a backward hook": _backward_hook,
    "a backward pre-hook": _backward_pre_hook,
    "another forward": _replace_forward,
    "compiled": _compile,
}
PLACES = ["", "features.1", "features.1.0", "features.1.1", "features.1.2", "features.1.3"]
PLACES_OF_HEAD = [
    "",
    "ppm",
    "ppm.features.1",
    "ppm.features.2.0",
    "ppm.features.0.1",
    "cls",
    "cls.0",
    "cls.1",
    "cls.2",
    "cls.4",
]


def without_writing_in_place(module):
    """Backward hooks refuse a ReLU that writes into what they watch, in plain PyTorch, too."""
    for relu in module.modules():
        if isinstance(relu, nn.ReLU):
            relu.inplace = False
    return module


@pytest.mark.parametrize(
    ("name", "place", "done"),
    [
        (name, place, done)
        for name, places in (("PPM", PLACES), ("PSPHead", PLACES_OF_HEAD))
        for place in places
        for done in DONE
        if place or done != "compiled"  # the whole: tests/models/test_compile.py
    ],
)
def test_a_module_that_must_be_called_is_called(name, place, done):
    seen = []
    ours, plain = (without_writing_in_place(module) for module in pairs()[name])
    for module in (ours, plain):
        DONE[done](module.get_submodule(place), seen, place)
    assert_same(ours, plain, seen=seen)
    assert seen or done == "a hook that changes the output"


@pytest.mark.parametrize("name", ["PPM", "PSPHead"])
@pytest.mark.parametrize(
    "register",
    [
        of_all.register_module_forward_hook,
        of_all.register_module_forward_pre_hook,
        of_all.register_module_full_backward_hook,
        of_all.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_for_all_modules(name, register):
    seen = []
    ours, plain = (without_writing_in_place(module) for module in pairs()[name])
    names = {id(child): key for module in (ours, plain) for key, child in module.named_modules() if key}
    handle = register(lambda module, *_: seen.append(names[id(module)]) if id(module) in names else None)
    try:
        assert_same(ours, plain, seen=seen)
    finally:
        handle.remove()
    prefix = "ppm." if name == "PSPHead" else ""
    assert {f"{prefix}features.{k}{i}" for k in range(4) for i in ("", ".0", ".1", ".2", ".3")} <= {*seen}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (nn.Conv2d, "forward"),
        (nn.AdaptiveAvgPool2d, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.ReLU, "forward"),
        (nn.Sequential, "forward"),
        (nn.Module, "__call__"),
    ],
)
@pytest.mark.parametrize("name", ["PPM", "PSPHead"])
def test_a_method_replaced_in_a_class(name, kind, method, monkeypatch):
    ours, plain = pairs()[name]
    old, seen = getattr(kind, method), []
    monkeypatch.setattr(kind, method, lambda self, x: (seen.append(type(self).__name__), old(self, x))[1])
    if kind is nn.Module:  # the module that is called first is not the same in both
        x = torch.randn(4, 12, 9, 11)
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
        assert seen.count("AdaptiveAvgPool2d") == 8
    else:
        assert_same(ours, plain, seen=seen)
        assert seen


@pytest.mark.parametrize(("kind", "method"), [(PPM, "forward"), (nn.Conv2d, "_conv_forward")], ids=["PPM", "Conv2d"])
def test_a_result_changed_in_a_class(kind, method, monkeypatch):
    head = randomised(PSPHead(12, 5, 8, 4, BINS)).eval()
    old, x = getattr(kind, method), torch.randn(2, 12, 9, 7)
    monkeypatch.setattr(kind, method, lambda self, *arguments: 2 * old(self, *arguments))
    with torch.no_grad():
        expected = PlainHead(head).eval()(x) if kind is nn.Conv2d else head.cls(head.ppm(x))
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


def test_the_convolution_that_is_replaced_inside_a_convolution():
    """What those do who want a picture to wrap around."""
    ours, plain = pairs()["PSPHead"]
    for module in (ours, plain):
        conv = module.cls[0]
        conv._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)
    assert_same(ours, plain)


def offload(network):
    """Weights that are on the CPU while their module runs, and else nowhere, as `cpu_offload` and `disk_offload` do it."""

    def run(module, *arguments, kept, **named):
        for key, value in kept.items():
            module._parameters[key] = nn.Parameter(value)
        out = module._old_forward(*arguments, **named)
        for key, value in kept.items():
            module._parameters[key] = nn.Parameter(value.to("meta"))
        return out

    for module in network.modules():
        if kept := {key: p.detach() for key, p in module.named_parameters(recurse=False)}:
            for key, value in kept.items():
                module._parameters[key] = nn.Parameter(value.to("meta"))
            module._old_forward = module.forward
            module.forward = functools.update_wrapper(functools.partial(run, module, kept=kept), module._old_forward)


@pytest.mark.parametrize("choices", [{}, {"head": "concat"}, {"use_ppm": False}, {"bin1_norm": False}], ids=str)
def test_weights_that_are_somewhere_else(choices):
    net = randomised(PSPNet(layers=18, width=8, classes=5, **choices)).eval()
    images = torch.randn(2, 3, 41, 49)
    with torch.no_grad():
        expected, labels = net(images), net.predict(images)
        offload(net)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
        assert (net.predict(images) != labels).float().mean() < 0.01
    assert all(parameter.is_meta for parameter in net.parameters())


def test_modules_without_data_tell_their_shapes():
    with torch.device("meta"):
        ppm, head = PPM(12, 5), PSPHead(12, 5, 8, 4)
        x = torch.empty(2, 12, 9, 11)
        assert ppm(x).shape == (2, 32, 9, 11)
        assert head(x).shape == (2, 4, 9, 11)
        ppm.features[1].append(nn.Dropout2d())
        assert ppm(x).shape == (2, 32, 9, 11)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
def test_observers_of_quantisation():
    """`prepare` hangs a hook and a child on every module that it measures."""
    ours, plain = pairs()["PPM"]
    for module in (ours.eval(), plain.eval()):
        module.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
        torch.ao.quantization.prepare(module, inplace=True)
    x = torch.randn(2, 12, 9, 11)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    measured = [
        [m for m in module.modules() if hasattr(m, "min_val") or hasattr(m, "histogram")] for module in (ours, plain)
    ]
    assert len(measured[0]) == len(measured[1]) > 0
    for a, b in zip(*measured, strict=True):
        torch.testing.assert_close(a.min_val, b.min_val, rtol=1e-4, atol=1e-4)


def test_lazy_layers():
    ours, plain = pairs()["PPM"]
    for module in (ours, plain):
        module.features[1][1] = nn.LazyConv2d(5, 1, bias=False)
    x = torch.randn(4, 12, 9, 11)
    ours.eval()(x)
    plain.eval()(x)
    assert ours.features[1][1].weight.shape == (5, 12, 1, 1)
    plain.load_state_dict(ours.state_dict())
    assert_same(ours, plain, x)


@pytest.mark.parametrize("change", ["maximum pooling", "another norm", "another width by modules"])
def test_what_is_called_compiles_to_one_graph_too(change):
    ours = pairs()["PPM" if change in WIDTHS else "PSPHead"][0]
    (CHILDREN | WIDTHS)[change](pyramid_in(ours))
    compiled = torch.compile(copy.deepcopy(ours).eval(), fullgraph=True, backend="eager")
    x = torch.randn(2, 12, 9, 11)
    torch.testing.assert_close(compiled(x), ours.eval()(x), rtol=1e-4, atol=1e-4)
