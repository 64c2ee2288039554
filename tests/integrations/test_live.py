"""`accelerate` against the libraries themselves, where they are installed (requirements/compare.txt), with random weights."""

import copy
from importlib.util import find_spec

import peers
import pytest
import torch
from torch import nn

from pspnet_fast import testing
from pspnet_fast.integrations import accelerate, restore


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed (requirements/compare.txt)")


needs_smp = needs("segmentation_models_pytorch")
needs_transformers = needs("transformers")


def smp_model(kind, encoder, **options):
    with peers.libraries():
        import segmentation_models_pytorch as smp
    return getattr(smp, kind)(encoder, encoder_weights=None, classes=5, **options)


def transformers_model():
    with peers.libraries():
        from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, num_labels=5
        )
    )


PSPNET = {"decoder.psp": "PPM", "decoder": "head"}
# How it is built, its family, and what is found in it.
MODELS = {
    "pspnet_resnet18": (lambda: smp_model("PSPNet", "resnet18", psp_dropout=0.0), "smp", PSPNET),
    "pspnet_resnet34": (lambda: smp_model("PSPNet", "resnet34", psp_dropout=0.0), "smp", PSPNET),
    "pspnet_resnet50": (lambda: smp_model("PSPNet", "resnet50", psp_dropout=0.0), "smp", PSPNET),
    "upernet_resnet18": (
        lambda: smp_model("UPerNet", "resnet18", decoder_channels=32),
        "smp UPerNet",
        {"decoder.psp": "PPM"},
    ),
    "transformers": (
        transformers_model,
        "transformers",
        {"decode_head.psp_modules": "PPM", "decode_head": "head"},
    ),
}


def parameters(*names):
    return [pytest.param(n, marks=needs_transformers if n == "transformers" else needs_smp) for n in names]


def make(name):
    """A model whose norms are far from the identity, and whose values stay of one size through a deep backbone."""
    model = peers.randomise(MODELS[name][0]())
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def assert_close(ours, plain):
    assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()


def logits_of(out):
    return out.logits if hasattr(out, "logits") else out


def accelerated_of(name, model):
    """The module that was accelerated: what stands before and after it only adds its own rounding."""
    path = {"transformers": "decode_head", "upernet_resnet18": "decoder.psp"}.get(name, "decoder")
    return model.get_submodule(path)


def arguments_of(name, model, image):
    """What that module gets in the model, in NCHW."""
    seen = []
    handle = accelerated_of(name, model).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(image)
    handle.remove()
    return [each.contiguous() for each in seen[0]] if isinstance(seen[0], (list, tuple)) else seen[0].contiguous()


def step(module, given, dtype):
    """Value; in training also the gradients of the last map and of every parameter, and the running statistics."""
    module = copy.deepcopy(module).to(dtype)
    given = [each.to(dtype) for each in given] if isinstance(given, list) else given.to(dtype)
    pooled = (given[-1] if isinstance(given, list) else given).requires_grad_()
    out = module(given)
    if not module.training:
        return [out.detach()]
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(out, [pooled, *module.parameters()], noise)
    return [out.detach(), *grads, *(buffer for buffer in module.buffers() if buffer.is_floating_point())]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", parameters("pspnet_resnet18", "pspnet_resnet50", "upernet_resnet18", "transformers"))
def test_the_same_results(name, training):
    """Of several batches together: one batch's largest error, of plain PyTorch too, is noisy at the level of one cell."""
    plain = make(name).train(training)
    ours, backbone = copy.deepcopy(plain), copy.deepcopy(plain)
    accelerate(ours)
    batches = [arguments_of(name, backbone, torch.randn(4, 3, 96, 96)) for _ in range(8)]
    runs = [
        [step(accelerated_of(name, model), given, dtype) for given in batches]
        for model, dtype in ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64))
    ]
    for i, parts in enumerate(zip(*(map(torch.stack, zip(*each, strict=True)) for each in runs), strict=True)):
        testing.assert_within(*parts, f"result {i}")


@pytest.mark.parametrize("name", parameters(*MODELS))
def test_what_is_found_and_restored(name):
    """Nothing but the classes of what is found changes, and they change back."""
    model, (_, family, parts) = make(name).eval(), MODELS[name]
    image = torch.randn(2, 3, 64, 96)
    classes, keys, own = [type(module) for module in model.modules()], [*model.state_dict()], [*model.parameters()]
    with torch.no_grad():
        expected = logits_of(model(image))
        report = accelerate(model)
        assert {each.name: each.part for each in report.accelerated} == parts
        assert {each.family for each in report.accelerated} == {family}
        assert report.refused == []
        assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
        assert [*model.state_dict()] == keys
        assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
        assert_close(logits_of(model(image)), expected)
        twice = accelerate(model)
        assert (twice.accelerated, {*twice.already}) == ([], {*report.accelerated})
        restore(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(logits_of(model(image)), expected)


@pytest.mark.parametrize("name", parameters("pspnet_resnet18", "upernet_resnet18", "transformers"))
def test_training_and_loading_elsewhere(name):
    """Loss, backward and optimiser of the whole model; its weights then go into a model that was never accelerated."""
    plain, image, labels = make(name).train(), torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96))
    ours = copy.deepcopy(plain)
    accelerate(ours)
    losses = []
    for model in (plain, ours):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            loss = nn.functional.cross_entropy(
                nn.functional.interpolate(logits_of(model(image)), labels.shape[1:], mode="bilinear"), labels
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    fresh = make(name)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        expected = logits_of(ours.eval()(image))
        assert_close(logits_of(fresh.eval()(image)), expected)


@needs_transformers
def test_save_pretrained(tmp_path):
    """What transformers writes of an accelerated model, it reads into a plain one."""
    model, image = make("transformers").eval(), torch.randn(1, 3, 64, 64)
    kind = type(model)
    accelerate(model)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert accelerate(again).already == []
    with torch.no_grad():
        assert torch.equal(again(image).logits, model(image).logits)
