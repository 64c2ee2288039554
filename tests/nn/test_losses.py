import math

import pytest
import torch
import torch.nn.functional as F

import pspnet_fast
from pspnet_fast import UpsampleCrossEntropyLoss, testing

OP = "upsample_cross_entropy"


def inputs(classes=5):
    target = torch.randint(0, classes, (2, 9, 10))
    target[:, 4:6] = 255
    return 2 * torch.randn(2, classes, 2, 3), target


def mined(logits, target, threshold, least, weight=None):
    """Online hard example mining as the module states it, pixel by pixel."""
    upsampled = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)
    probabilities = upsampled.detach().softmax(1).gather(1, (target % 255)[:, None])[:, 0]
    ranked = probabilities[target != 255].sort().values
    limit = ranked[min(least, len(ranked)) - 1] if least else -math.inf
    kept = (target != 255) & ((probabilities < threshold) | (probabilities <= limit))
    losses = F.cross_entropy(upsampled, target, weight, ignore_index=255, reduction="none")
    weights = torch.ones_like(losses) if weight is None else weight[target % 255]
    return (losses * kept).sum() / (weights * kept).sum(), int(kept.sum())


MINING = [(0.3, 0, True), (0.01, 50, True), (1.0, 0, False), (0.1, 10**6, False)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("backend", "case"), testing.backends_and(MINING, OP, interpret=1))
def test_mining(backend, case, weighted):
    threshold, least, some = case
    logits, target = inputs()
    weight = torch.rand(5) + 0.1 if weighted else None
    expected, kept = mined(logits.requires_grad_(), target, threshold, least, weight)
    valid = int((target != 255).sum())
    assert least <= kept < valid if some else kept == valid
    leaf = logits.detach().to(testing.device(backend)).requires_grad_()
    loss_of = UpsampleCrossEntropyLoss(weight, ohem_threshold=threshold, ohem_min_kept=least).to(leaf.device)
    with testing.use_backend(backend):
        loss = loss_of(leaf, target.to(leaf.device))
        (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(grad.cpu(), torch.autograd.grad(expected, logits)[0])


def test_options_reach_the_loss():
    logits, target = inputs()
    target[target == 255] = 3
    weight = torch.rand(5)
    module = UpsampleCrossEntropyLoss(weight, 3, "sum", 0.2, align_corners=False)
    expected = testing.plain_upsample_cross_entropy(logits, target, weight, 3, "sum", 0.2, False)
    torch.testing.assert_close(module(logits, target), expected)
    assert list(module.state_dict()) == ["weight"]
    assert "ignore_index=3" in repr(module)


def test_mining_with_single_losses():
    logits, target = inputs()
    losses = UpsampleCrossEntropyLoss(reduction="none", ohem_threshold=0.2, ohem_min_kept=50)(logits, target)
    _, kept = mined(logits, target, 0.2, 50)
    assert losses.shape == target.shape
    assert int((losses != 0).sum()) == kept


def test_mining_keeps_a_loss_that_is_nan():
    logits, target = inputs()
    logits[0, 0, 1, 1] = torch.nan
    assert UpsampleCrossEntropyLoss(ohem_threshold=0.1, ohem_min_kept=1)(logits, target).isnan()


@pytest.mark.parametrize("classes", [5, 256, 300])
@pytest.mark.parametrize("ignore_index", [-256, -1, 0, 3, 255, 256, 300])
def test_mining_counts_the_same_pixels_of_bytes(classes, ignore_index):
    """Torch wraps an ignore_index, or a number of classes, that bytes cannot hold: 256 would be class 0."""
    logits, target = 2 * torch.randn(2, classes, 2, 3), torch.randint(0, min(classes, 256), (2, 9, 10))
    if 0 <= ignore_index < 256:
        target[:, 4:6] = ignore_index
    target[0, 0, :4] = torch.tensor([0, 1, 2, min(classes, 256) - 1])
    for least in (0, 50, 10**6):
        loss = UpsampleCrossEntropyLoss(ignore_index=ignore_index, ohem_threshold=0.3, ohem_min_kept=least)
        assert torch.equal(loss(logits, target.byte()), loss(logits, target))
        assert torch.equal(loss._hard_pixels(logits, target.byte(), 0.3), loss._hard_pixels(logits, target, 0.3))


def test_it_trains_a_network():
    net = pspnet_fast.PSPNet(layers=18, classes=3, criterion=UpsampleCrossEntropyLoss(), pretrained=False).train()
    output = net(torch.randn(2, 3, 33, 33), torch.randint(0, 3, (2, 33, 33)))
    output.main_loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ohem_threshold": 0.0}, "ohem_threshold must be in"),
        ({"ohem_threshold": 0.5, "ohem_min_kept": -1}, "ohem_min_kept"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=f"^UpsampleCrossEntropyLoss: {words}"):
        UpsampleCrossEntropyLoss(**options)
