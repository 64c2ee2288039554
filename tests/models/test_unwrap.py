"""State dicts in the shapes that people save."""

import logging
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pspnet_fast.models import CheckpointError, ResNet
from pspnet_fast.models.checkpoint import bare_state_dict, fitted, unwrapped


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(stem=nn.Conv2d(3, 4, 1), head=nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    )


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


STATE, OTHER = net().state_dict(), net(1).state_dict()
OPTIMISER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


FORMS = {
    "plain": lambda s: s,
    "ddp": lambda s: prefixed(s, "module."),
    "compiled ddp": lambda s: prefixed(s, "_orig_mod.module."),
    "inner compile": lambda s: {name.replace("head.", "head._orig_mod."): tensor for name, tensor in s.items()},
    "fsdp": lambda s: {
        f"_fsdp_wrapped_module.{name.replace('head.', 'head._fsdp_wrapped_module.')}": t for name, t in s.items()
    },
    "fsdp of checkpointed": lambda s: prefixed(s, "_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "deepspeed": lambda s: prefixed(s, "_forward_module."),
    "semseg": lambda s: {"epoch": 3, "state_dict": prefixed(s, "module."), "optimizer": OPTIMISER},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": OPTIMISER, "loss": 0.5},
    "model_state": lambda s: {"model_state": s, "optimizer_state": OPTIMISER},
    "net": lambda s: {"net": s, "acc": 0.5, "epoch": 3},
    "network": lambda s: {"network": s},
    "inside of two": lambda s: {"checkpoint": {"model": {"state_dict": s}}},
    "a name of its own": lambda s: {"segmentor": s, "optimizer": OPTIMISER, "epoch": 3},
    "settings under model": lambda s: {"model": {"name": "pspnet"}, "model_state": s},
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **prefixed(s, "module.")},
    "averaged, wrapped": lambda s: {"model_ema": {"n_averaged": torch.tensor(7), **prefixed(s, "module.")}},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    given = FORMS[form](STATE)
    names = list(given)
    assert same(bare_state_dict(given), STATE)
    assert list(given) == names


def test_the_metadata_has_the_same_names():
    """BatchNorm's version stands there."""
    model = AveragedModel(net())
    bare = bare_state_dict(model.state_dict())
    assert same(bare, STATE)
    assert bare._metadata["head.0"] == STATE._metadata["head.0"] == {"version": 2}
    compiled = torch.compile(net()).state_dict()
    assert bare_state_dict(compiled)._metadata == STATE._metadata


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema", "ema", "ema_state_dict"])
def test_the_choice_of_averages_is_said(name, caplog):
    content = {"state_dict": STATE, name: OTHER}
    with caplog.at_level(logging.WARNING):
        assert same(bare_state_dict(content), STATE)
        assert "the weights under 'state_dict'; there are averages, too: --ema" in caplog.text
        caplog.clear()
        assert same(bare_state_dict(content, ema=True), OTHER)
        assert f"the averages, under {name!r}" in caplog.text
        caplog.clear()
        assert same(bare_state_dict({"state_dict": STATE}), STATE)
    assert not caplog.text


def test_averages_alone():
    for content in ({"ema": OTHER}, {"n_averaged": torch.tensor(3), **prefixed(OTHER, "module.")}):
        inside = unwrapped(content)
        assert same(inside.state, OTHER)
        assert inside.averaged
        assert len(inside.found) == 1


def test_mmengine_exchanges_them():
    content = {"meta": {"mmengine_version": "0.10"}, "state_dict": OTHER, "ema_state_dict": prefixed(STATE, "module.")}
    for ema in (False, True):
        inside = unwrapped(content, ema)
        assert same(inside.state, OTHER)
        assert inside.averaged
        assert inside.found == ("the averages, under 'state_dict'; there are other weights, too",)


def test_what_cannot_be_unwrapped():
    with pytest.raises(CheckpointError, match="two tensors have one name"):
        bare_state_dict({"a.weight": torch.zeros(1), "_orig_mod.a.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="maps names to tensors, got dict under 'a'"):
        bare_state_dict({"a": {"x": torch.zeros(1)}, "b": {"x": torch.zeros(1)}})
    for key, word in ((1, "1"), (None, "NoneType"), ((1, 2), "tuple")):
        with pytest.raises(CheckpointError, match=f"got a tensor under {word}, which is no name"):
            bare_state_dict({"state_dict": {key: torch.zeros(1), "a": torch.zeros(1)}})
    circle = {}
    circle["model"] = circle
    with pytest.raises(CheckpointError, match="maps names to tensors, got dict under 'model'"):
        bare_state_dict(circle)


def test_a_common_part_is_left_out_when_loading():
    """Lightning's "model.", any other, and two of them; not where a name is the network's with it."""
    source = ResNet(18, width=4)
    state = source.state_dict()
    for prefix in ("model.", "net.", "model.backbone."):
        target = ResNet(18, width=4)
        target.load_state_dict({"state_dict": prefixed(state, prefix), "pytorch-lightning_version": "2.4"})
        assert same(target.state_dict(), state)
    with pytest.raises(CheckpointError, match=r"unexpected: x\.y\.weight"):
        ResNet(18, width=4).load_state_dict({"x.y.weight": torch.zeros(1)})
    stage = {name: tensor for name, tensor in state.items() if name.startswith("layer1.0.")}
    with pytest.raises(CheckpointError, match=r"loaded\n  \d+ missing: conv1\.weight"):
        ResNet(18, width=4).load_state_dict(stage)


def test_nothing_is_made_that_does_not_fit():
    """Settings of a network of gigabytes, and a file without them."""
    made = []

    def build():
        made.append(torch.get_default_device().type)
        return ResNet(18, width=2000)

    with pytest.raises(CheckpointError, match="nothing was loaded"):
        fitted(build, ResNet(18, width=4).state_dict())
    assert made == ["meta"]
    with pytest.raises(CheckpointError, match="there is no network of the settings"):
        fitted(lambda: ResNet(18, width=2**30), {})
    state = ResNet(18, width=4).state_dict()
    assert same(fitted(lambda: ResNet(18, width=4), {"model": state}).state_dict(), state)
