"""ResNet: the names, shapes, strides and dilations of the networks whose weights are to be loaded."""

import pytest
import torch
from torch import nn

from pspnet_fast.models import ResNet

DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    269: (3, 30, 48, 8),
}
# torchvision.models.resnet*, documented parameter counts with the 1000-class classifier.
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
SEMSEG_STEM = [(3, 64), (64, 64), (64, 128)]


def documented_shapes(layers, stem=None, classes=1000):
    """The entries of torchvision's state_dict, in order; of semseg's where `stem` lists its 3x3 convolutions."""
    entries = []

    def conv_and_norm(conv, norm, inputs, outputs, kernel):
        entries.append((f"{conv}.weight", (outputs, inputs, kernel, kernel)))
        entries.extend((f"{norm}.{name}", (outputs,)) for name in ("weight", "bias", "running_mean", "running_var"))
        entries.append((f"{norm}.num_batches_tracked", ()))

    if stem is None:
        conv_and_norm("conv1", "bn1", 3, 64, 7)
        inputs = 64
    else:
        for i, (stem_inputs, stem_outputs) in enumerate(stem, 1):
            conv_and_norm(f"conv{i}", f"bn{i}", stem_inputs, stem_outputs, 3)
        inputs = stem[-1][1]
    for stage, depth in enumerate(DEPTHS[layers], 1):
        width = 32 * 2**stage
        outputs = width if layers < 50 else 4 * width
        for block in range(depth):
            name = f"layer{stage}.{block}"
            if layers < 50:
                plan = [(inputs, width, 3), (width, width, 3)]
            else:
                plan = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
            for i, sizes in enumerate(plan, 1):
                conv_and_norm(f"{name}.conv{i}", f"{name}.bn{i}", *sizes)
            if block == 0 and (stage > 1 or inputs != outputs):
                conv_and_norm(f"{name}.downsample.0", f"{name}.downsample.1", inputs, outputs, 1)
            inputs = outputs
    if classes:
        entries.extend([("fc.weight", (classes, inputs)), ("fc.bias", (classes,))])
    return entries


def shapes(module):
    return [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


def on_meta(*args, **choices):
    with torch.device("meta"):
        return ResNet(*args, **choices)


def random_norms(module):
    """As if trained: norms that are neither the identity nor alike."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.7, 1.3)
            nn.init.uniform_(norm.weight, 0.7, 1.3)
            nn.init.uniform_(norm.bias, -0.2, 0.2)
    return module


@pytest.mark.parametrize("layers", PARAMETERS)
def test_names_and_shapes_are_torchvisions(layers):
    net = on_meta(layers, stem="plain", output_stride=32, classes=1000)
    assert shapes(net) == documented_shapes(layers)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[layers]


def test_resnet50_has_the_320_entries_of_torchvision():
    assert len(on_meta(50, stem="plain", classes=1000).state_dict()) == 320


@pytest.mark.parametrize("layers", DEPTHS)
def test_names_and_shapes_of_the_deep_stem_are_semsegs(layers):
    assert shapes(on_meta(layers, stem="deep", classes=1000)) == documented_shapes(layers, SEMSEG_STEM)


def test_v1c_stem_is_half_as_wide():
    assert shapes(on_meta(50, stem="v1c")) == documented_shapes(50, [(3, 32), (32, 32), (32, 64)], classes=None)


@pytest.mark.parametrize(("stem", "documented"), [("plain", None), ("deep", SEMSEG_STEM)])
def test_imagenet_weights_load_strictly(stem, documented):
    weights = {
        name: torch.rand(shape) if shape else torch.tensor(7) for name, shape in documented_shapes(18, documented)
    }
    classifier = ResNet(18, stem=stem, classes=1000)
    classifier.load_state_dict(weights, strict=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in classifier.state_dict().items())

    backbone = ResNet(18, stem=stem)
    assert backbone.load_state_dict(weights, strict=True).unexpected_keys == ["fc.weight", "fc.bias"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("layers", [18, 50])
@pytest.mark.parametrize("stem", ["plain", "deep", "v1c"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_feature_maps(layers, stem, output_stride):
    net = on_meta(layers, stem=stem, output_stride=output_stride)
    third, fourth = net(torch.empty(2, 3, 473, 200, device="meta"))
    expected = (472 // output_stride + 1, 199 // output_stride + 1)
    assert third.shape[2:] == (472 // min(output_stride, 16) + 1, 199 // min(output_stride, 16) + 1)
    assert fourth.shape == (2, net.channels[1], *expected)
    assert net.channels == ((256, 512) if layers == 18 else (1024, 2048))
    assert third.shape[1] == net.channels[0]


def three_by_three(net, stage):
    """(stride, dilation, padding) of every 3x3 convolution of a stage."""
    return [
        (m.stride[0], m.dilation[0], m.padding[0])
        for m in getattr(net, f"layer{stage}").modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]


@pytest.mark.parametrize(
    ("output_stride", "dilation", "third", "fourth"),
    [
        (8, "full", [(1, 2, 2)] * 6, [(1, 4, 4)] * 3),
        (8, "halved", [(1, 1, 1)] + [(1, 2, 2)] * 5, [(1, 2, 2)] + [(1, 4, 4)] * 2),
        (16, "full", [(2, 1, 1)] + [(1, 1, 1)] * 5, [(1, 2, 2)] * 3),
        (16, "halved", [(2, 1, 1)] + [(1, 1, 1)] * 5, [(1, 1, 1)] + [(1, 2, 2)] * 2),
        (32, "full", [(2, 1, 1)] + [(1, 1, 1)] * 5, [(2, 1, 1)] + [(1, 1, 1)] * 2),
    ],
)
def test_dilations_are_those_published(output_stride, dilation, third, fourth):
    net = on_meta(50, output_stride=output_stride, dilation=dilation)
    assert three_by_three(net, 2) == [(2, 1, 1)] + [(1, 1, 1)] * 3
    assert three_by_three(net, 3) == third
    assert three_by_three(net, 4) == fourth


@pytest.mark.parametrize(
    ("layers", "choices"),
    [
        (18, {"dilation": "halved"}),
        (50, {"dilation": "halved", "stride_in": "conv2"}),
        (50, {"dilation": "full", "stride_in": "conv1"}),
    ],
    ids=["basic block", "stride in the 3x3", "stride in the 1x1"],
)
def test_dilated_network_is_the_strided_one_evaluated_densely(layers, choices):
    strided = random_norms(ResNet(layers, output_stride=32, **choices)).eval()
    dilated = on_meta(layers, output_stride=8, **choices).eval()
    dilated.load_state_dict(strided.state_dict(), assign=True)
    x = torch.rand(1, 3, 65, 33)
    with torch.no_grad():
        coarse, fine = strided(x)[1], dilated(x)[1]
    assert coarse.shape[2:] == (3, 2)
    torch.testing.assert_close(fine[:, :, ::4, ::4], coarse, rtol=1e-4, atol=1e-5 * coarse.abs().max().item())


def test_stride_is_in_the_convolution_asked_for():
    for stride_in, other in (("conv1", "conv2"), ("conv2", "conv1")):
        block = on_meta(50, output_stride=32, stride_in=stride_in).layer3[0]
        assert getattr(block, stride_in).stride == (2, 2)
        assert getattr(block, other).stride == (1, 1)
        assert block.downsample[0].stride == (2, 2)


def test_conv_bias_gives_every_convolution_one():
    for conv_bias in (True, False):
        convs = [m for m in on_meta(50, conv_bias=conv_bias).modules() if isinstance(m, nn.Conv2d)]
        assert all((conv.bias is not None) == conv_bias for conv in convs)
    assert all(m.bias.eq(0).all() for m in ResNet(18, conv_bias=True).modules() if isinstance(m, nn.Conv2d))


def test_norm_layer_is_used_everywhere():
    net = on_meta(50, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert sum(isinstance(m, nn.GroupNorm) for m in net.modules()) == 3 + 16 * 3 + 4


def test_convolutions_start_kaiming_normal_by_fan_out():
    weight = ResNet(18).layer4[0].conv1.weight
    assert weight.shape == (512, 256, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_shared_stage_is_one_block_applied_again_and_again():
    shared = random_norms(ResNet(34, share_stage3=True)).eval()
    assert {name.split(".")[1] for name in shared.state_dict() if name.startswith("layer3.")} == {"0", "1"}
    weights = shared.state_dict()
    for k in range(2, 6):
        weights |= {n.replace("layer3.1.", f"layer3.{k}."): t for n, t in weights.items() if n.startswith("layer3.1.")}
    ordinary = on_meta(34).eval()
    ordinary.load_state_dict(weights, strict=True, assign=True)
    x = torch.rand(1, 3, 33, 41)
    maps, expected = shared(x), ordinary(x)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    maps[0].sum().backward()
    expected[0].sum().backward()
    gradient = sum(ordinary.layer3[k].conv1.weight.grad for k in range(1, 6))
    torch.testing.assert_close(
        shared.layer3[1].conv1.weight.grad, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()
    )


def test_shared_stage_of_resnet101_stands_for_22_blocks():
    shared, ordinary = on_meta(101, share_stage3=True), on_meta(101)
    block = sum(p.numel() for p in ordinary.layer3[1].parameters())
    assert shared.layer3.times == 22
    difference = sum(p.numel() for p in ordinary.parameters()) - sum(p.numel() for p in shared.parameters())
    assert difference == 21 * block


def test_classifier_is_the_mean_of_the_last_map_through_fc():
    net = ResNet(18, output_stride=32, classes=10).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = nn.functional.adaptive_avg_pool2d(net.features(x)[1], 1).flatten(1)
        torch.testing.assert_close(net(x), net.fc(pooled))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("layers", 77),
        ("stem", "wide"),
        ("output_stride", 4),
        ("dilation", "half"),
        ("stride_in", "conv3"),
        ("classes", 0),
    ],
)
def test_argument_outside_the_choices_is_named(argument, value):
    with pytest.raises(ValueError, match=rf"ResNet: {argument} must be .* got '?{value}'?$"):
        on_meta(**{argument: value})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"ResNet: x must be 4-D \(N, C, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "ResNet: x must be one of .* got uint8"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"ResNet: x must have 3 channels .* got \(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 0, 32), ValueError, r"ResNet: x must have at least one .* got \(1, 3, 0, 32\)"),
        ([1.0], TypeError, "ResNet: x must be a tensor, got list"),
    ],
)
def test_bad_image_is_named(x, error, message):
    with pytest.raises(error, match=message):
        on_meta(18)(x)


@pytest.mark.parametrize("layers", [18, 50])
@pytest.mark.parametrize("stem", ["deep", "v1c", "plain"])
def test_width_scales_every_channel_count(layers, stem):
    narrow, wide = (ResNet(layers, stem=stem, width=width).state_dict() for width in (16, 64))
    assert set(narrow) == set(wide)
    for name, tensor in wide.items():
        expected = [n if n in (1, 3, 7) else n // 4 for n in tensor.shape]
        assert [*narrow[name].shape] == expected, name


@pytest.mark.parametrize("width", [0, 3, -2])
def test_width_must_be_even(width):
    with pytest.raises(ValueError, match=f"^ResNet: width must be even and at least 2, got {width}$"):
        ResNet(18, width=width)
