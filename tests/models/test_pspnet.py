"""PSPNet: the network that semseg publishes, its outputs in every mode, and the choices around it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pspnet_fast import testing
from pspnet_fast.models import PSPNet, TrainingLogits, TrainingOutput

SECOND_NETWORK = {
    "layers": 101,
    "dropout": 0.5,
    "stem": "plain",
    "output_stride": 32,
    "stride_in": "conv1",
    "conv_bias": True,
}


class Backbone(nn.Module):
    """Two convolutions; the last map is an eighth of the image."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, x):
        first = self.first(x).relu()
        return first, self.second(first).relu()


def tiny(**choices):
    settings = {"bins": (1, 2), "dropout": 0.0, "classes": 5, "backbone": Backbone(), "channels": (8, 12)}
    return PSPNet(**{**settings, **choices})


def on_meta(**choices):
    with torch.device("meta"):
        return PSPNet(**choices)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def plain_pspnet(w, x, stages, stride_in="conv2", shared=False, classifiers=("cls", "aux")):
    """The network written down again from its state_dict: (logits, auxiliary logits), not upsampled, in evaluation.

    `stages`: of each, its number of bottlenecks, its stride and its dilation.
    """

    def conv_norm(x, conv, norm, **geometry):
        x = F.conv2d(x, w[f"{conv}.weight"], w.get(f"{conv}.bias"), **geometry)
        mean, var, weight, bias = (w[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    for i, conv in enumerate(name for name in ("layer0.0", "layer0.3", "layer0.6") if f"{name}.weight" in w):
        padding = w[f"{conv}.weight"].shape[2] // 2
        x = conv_norm(x, conv, f"layer0.{3 * i + 1}", stride=2 if i == 0 else 1, padding=padding).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for stage, (depth, stage_stride, dilation) in enumerate(stages, 1):
        for block in range(depth):
            name = f"layer{stage}.{min(block, 1) if shared and stage == 3 else block}"
            stride = stage_stride if block == 0 else 1
            strides = (stride, 1) if stride_in == "conv1" else (1, stride)
            y = conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride=strides[0]).relu()
            y = conv_norm(
                y, f"{name}.conv2", f"{name}.bn2", stride=strides[1], padding=dilation, dilation=dilation
            ).relu()
            y = conv_norm(y, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
            x = (x + y).relu()
        maps.append(x)
    pyramid = [x]
    for k, b in enumerate((1, 2, 3, 6)):
        level = F.adaptive_avg_pool2d(x, b)
        level = conv_norm(level, f"ppm.features.{k}.1", f"ppm.features.{k}.2").relu()
        pyramid.append(F.interpolate(level, x.shape[2:], mode="bilinear", align_corners=True))
    heads = []
    for name, features in zip(classifiers, (torch.cat(pyramid, 1), maps[2]), strict=True):
        hidden = conv_norm(features, f"{name}.0", f"{name}.1", padding=1).relu()
        heads.append(F.conv2d(hidden, w[f"{name}.4.weight"], w[f"{name}.4.bias"]))
    return heads


def random_norms(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.7, 1.3)
    return module


# The published network


def test_entries_and_parameters_are_those_of_semsegs_pspnet50():
    net = on_meta(layers=50, classes=150)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert len(shapes) == 370
    assert parameters(net) == 49_180_908
    documented = {
        "layer0.0.weight": (64, 3, 3, 3),
        "layer0.3.weight": (64, 64, 3, 3),
        "layer0.6.weight": (128, 64, 3, 3),
        "layer0.7.running_var": (128,),
        "layer1.0.conv1.weight": (64, 128, 1, 1),
        "layer1.0.downsample.0.weight": (256, 128, 1, 1),
        "layer4.2.bn3.weight": (2048,),
        "ppm.features.0.1.weight": (512, 2048, 1, 1),
        "ppm.features.3.2.running_mean": (512,),
        "cls.0.weight": (512, 4096, 3, 3),
        "cls.4.weight": (150, 512, 1, 1),
        "cls.4.bias": (150,),
        "aux.0.weight": (256, 1024, 3, 3),
        "aux.4.weight": (150, 256, 1, 1),
    }
    assert documented.items() <= shapes.items()
    layer0 = {name.split(".")[1] for name in shapes if name.startswith("layer0.")}
    assert layer0 == {"0", "1", "3", "4", "6", "7"}


@pytest.mark.parametrize(
    ("layers", "channels"), [(18, (256, 512)), (34, (256, 512)), (152, (1024, 2048)), (269, (1024, 2048))]
)
def test_every_depth_has_heads_of_its_width(layers, channels):
    net = on_meta(layers=layers, classes=19)
    third, fourth = net.features(torch.empty(1, 3, 40, 57, device="meta"))
    assert (third.shape, fourth.shape) == ((1, channels[0], 5, 8), (1, channels[1], 5, 8))
    assert net.ppm.in_dim == channels[1]
    assert (net.cls[0].in_channels, net.cls[0].out_channels) == (2 * channels[1], channels[1] // 4)
    assert (net.aux[0].in_channels, net.aux[0].out_channels) == (channels[0], channels[0] // 4)


def test_forward_is_semsegs():
    net = random_norms(PSPNet(50, classes=7)).eval()
    stages = [(3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4)]
    for size in ((33, 33), (40, 57)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            plain, exact = (
                plain_pspnet({key: w.to(dtype) for key, w in net.state_dict().items()}, x.to(dtype), stages)[0]
                for dtype in (torch.float32, torch.float64)
            )
            assert plain.shape[2:] == tuple((s - 1) // 8 + 1 for s in size)
            expected = (F.interpolate(maps, size, mode="bilinear", align_corners=True) for maps in (plain, exact))
            testing.assert_within(net(x), *expected)


# Outputs


@pytest.mark.parametrize("choices", [{}, {"zoom_factor": 2}, {"align_corners": False}, {"use_ppm": False}], ids=str)
def test_predict_is_the_argmax_of_forward(choices):
    net, x = tiny(**choices).eval(), torch.randn(2, 3, 33, 41)
    logits = net(x)
    labels, confidence = net.predict(x, confidence=True)
    assert labels.dtype == torch.uint8
    assert torch.equal(net.predict(x), labels)
    best = logits.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear].long(), logits.argmax(1)[clear])
    torch.testing.assert_close(confidence, logits.softmax(1).amax(1))


def test_predict_builds_no_upsampled_logits():
    net, x = tiny(classes=150).eval(), torch.randn(1, 3, 257, 257)
    whole = 150 * 257 * 257 * 4
    with torch.no_grad():
        assert testing.peak_memory(lambda: net.predict(x), "cpu") < 0.1 * whole
        assert testing.peak_memory(lambda: net(x), "cpu") >= whole


def test_predict_is_for_evaluation():
    with pytest.raises(RuntimeError, match=r"^PSPNet: predict is for evaluation: call eval\(\) first"):
        tiny().train().predict(torch.zeros(1, 3, 33, 33))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_both_heads_agree(training):
    """Losses, gradients and running statistics, by the accuracy rule.

    Of many batches together: of six gradients of one batch, the largest error says little about what errors are like.
    """
    first = tiny(dropout=0.0).train(training)
    other = tiny(dropout=0.0, head="concat").train(training)
    other.load_state_dict(first.state_dict())
    batches = [(torch.randn(4, 3, 57, 65), torch.randint(5, (4, 57, 65))) for _ in range(16)]

    def step(net, dtype, x, y):
        net = copy.deepcopy(net).to(dtype)
        out = net(x.to(dtype), y)
        loss = out.main_loss + 0.4 * out.aux_loss if training else out.square().mean()
        grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        buffers = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
        return [loss, *(grad for grad in grads if grad is not None), *buffers]

    def steps(net, dtype):
        return [torch.stack(parts) for parts in zip(*(step(net, dtype, x, y) for x, y in batches), strict=True)]

    runs = steps(first, torch.float32), steps(other, torch.float32), steps(other, torch.float64)
    for parts in zip(*runs, strict=True):
        testing.assert_within(*parts)


@pytest.mark.parametrize("size", [(33, 41), (40, 57), (64, 64), (8, 9), (1, 1)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_evaluation_returns_logits_of_the_inputs_size(size, align_corners):
    net = tiny(align_corners=align_corners).eval()
    x = torch.randn(2, 3, *size)
    small = net.cls(net.ppm(net.features(x)[1]))
    expected = F.interpolate(small, size, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(net(x), expected)
    assert net.ppm.align_corners == align_corners
    assert torch.equal(net(x, torch.zeros(2, *size, dtype=torch.int64)), net(x))


@pytest.mark.parametrize(("zoom_factor", "size"), [(1, (5, 8)), (2, (9, 15)), (4, (17, 29)), (8, (33, 57))])
def test_zoom_factor_is_the_logits_size_in_eighths(zoom_factor, size):
    net = tiny(zoom_factor=zoom_factor)
    x = torch.randn(2, 3, 33, 57)
    labels = torch.randint(5, (2, 33, 57))
    assert net.eval()(x).shape == (2, 5, *size)
    assert net.train()(x, labels).prediction.shape == (2, *size)
    assert all(logits.shape == (2, 5, *size) for logits in net(x))


def test_an_empty_batch_passes():
    assert tiny().eval()(torch.zeros(0, 3, 33, 41)).shape == (0, 5, 33, 41)


def test_training_returns_prediction_and_both_losses_unweighted():
    net = tiny().train()
    x, labels = torch.randn(2, 3, 33, 41), torch.randint(5, (2, 33, 41))
    labels[0, :10] = 255
    with torch.no_grad():
        output = net(x, labels)
        logits, aux_logits = net(x)
    assert isinstance(output, TrainingOutput)
    prediction, main_loss, aux_loss = output
    assert torch.equal(prediction, logits.max(1)[1])
    torch.testing.assert_close(main_loss, F.cross_entropy(logits, labels, ignore_index=255))
    torch.testing.assert_close(aux_loss, F.cross_entropy(aux_logits, labels, ignore_index=255))


def test_auxiliary_logits_come_from_the_third_stage():
    net = tiny().train()
    x = torch.randn(2, 3, 33, 41)
    with torch.no_grad():
        output = net(x)
        expected = F.interpolate(net.aux(net.features(x)[0]), (33, 41), mode="bilinear", align_corners=True)
    assert isinstance(output, TrainingLogits)
    torch.testing.assert_close(output.aux_logits, expected)


def test_every_parameter_learns():
    net = tiny()
    _, main_loss, aux_loss = net(torch.randn(2, 3, 33, 41), torch.randint(5, (2, 33, 41)))
    (main_loss + 0.4 * aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_criterion_replaces_cross_entropy():
    net = tiny(criterion=nn.CrossEntropyLoss(ignore_index=0, reduction="sum"))
    x, labels = torch.randn(2, 3, 33, 41), torch.randint(5, (2, 33, 41))
    with torch.no_grad():
        _, main_loss, _ = net(x, labels)
        expected = F.cross_entropy(net(x)[0], labels, ignore_index=0, reduction="sum")
    torch.testing.assert_close(main_loss, expected)


class Recorder(nn.Module):
    def forward(self, logits, targets):
        self.targets = targets
        return logits.sum()


@pytest.mark.parametrize("zoom_factor", [1, 2, 4])
def test_labels_are_sampled_where_the_logits_lie_and_never_mixed(zoom_factor):
    net = tiny(criterion=Recorder(), zoom_factor=zoom_factor)
    labels = torch.tensor([0, 2, 4, 255])[torch.randint(4, (2, 33, 41))]
    net(torch.randn(2, 3, 33, 41), labels.to(torch.uint8))
    step = 8 // zoom_factor
    assert torch.equal(net.criterion.targets, labels[:, ::step, ::step])


@pytest.mark.parametrize("align_corners", [True, False])
def test_labels_of_any_size_are_sampled_where_a_linear_ramp_says(align_corners):
    net = tiny(criterion=Recorder(), zoom_factor=2, align_corners=align_corners)
    height, width = 39, 52
    net(torch.randn(2, 3, height, width), torch.arange(height * width).reshape(1, height, width).expand(2, -1, -1))
    ramp = torch.arange(height * width, dtype=torch.float64).reshape(1, 1, height, width)
    size = ((height - 1) // 4 + 1, (width - 1) // 4 + 1)
    rows, columns = net.criterion.targets[0] // width, net.criterion.targets[0] % width
    for found, axis in ((rows, ramp // width), (columns, ramp % width)):
        exact = F.interpolate(axis, size, mode="bilinear", align_corners=align_corners)[0, 0]
        assert (found - exact).abs().max() <= 0.5 + 1e-9


def test_labels_of_the_logits_size_are_taken_as_they_are():
    net = tiny(criterion=Recorder(), zoom_factor=1)
    labels = torch.randint(5, (2, 5, 6))
    net(torch.randn(2, 3, 33, 41), labels)
    assert torch.equal(net.criterion.targets, labels)


# The auxiliary head


def test_auxiliary_head_is_built_for_training_and_idle_in_evaluation():
    net = tiny().eval()
    calls = []
    net.aux.register_forward_hook(lambda *_: calls.append(1))
    net(torch.randn(2, 3, 33, 41))
    assert not calls
    net.train()(torch.randn(2, 3, 33, 41))
    assert calls == [1]


def test_without_auxiliary_head_its_loss_is_zero():
    net = tiny(aux=False)
    assert not any(name.startswith("aux.") for name in net.state_dict())
    x, labels = torch.randn(2, 3, 33, 41), torch.randint(5, (2, 33, 41))
    _, main_loss, aux_loss = net(x, labels)
    assert aux_loss == 0
    assert main_loss + 0.4 * aux_loss == main_loss
    assert net(x).aux_logits is None


# Choices


def test_without_ppm_the_classifier_reads_the_backbone():
    net = on_meta(layers=50, use_ppm=False).eval()
    assert not any(name.startswith("ppm.") for name in net.state_dict())
    assert net.cls[0].in_channels == 2048
    assert net(torch.empty(1, 3, 40, 57, device="meta")).shape == (1, 2, 40, 57)
    small = tiny(use_ppm=False).eval()
    x = torch.randn(1, 3, 33, 41)
    expected = F.interpolate(small.cls(small.features(x)[1]), (33, 41), mode="bilinear", align_corners=True)
    torch.testing.assert_close(small(x), expected)


@pytest.mark.parametrize(("bins", "channels"), [((1, 2, 4, 8), 4096), ((3,), 4096), ((1, 2, 3), 2048 + 3 * 682)])
def test_bins_share_the_channels(bins, channels):
    net = on_meta(layers=50, bins=bins)
    assert net.cls[0].in_channels == channels
    assert [level[1].out_channels for level in net.ppm.features] == [2048 // len(bins)] * len(bins)


def test_norm_layer_is_used_everywhere():
    net = on_meta(layers=18, norm_layer=lambda channels: nn.GroupNorm(4, channels))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_any_backbone_may_return_more_than_two_maps():
    class Four(Backbone):
        def forward(self, x):
            return [x, x, *super().forward(x)]

    net = tiny(backbone=Four()).eval()
    assert net(torch.randn(1, 3, 40, 57)).shape == (1, 5, 40, 57)
    assert "backbone.first.weight" in net.state_dict()


@pytest.mark.parametrize("shared", [False, True])
def test_second_network(shared):
    net = on_meta(**SECOND_NETWORK, classes=21, share_stage3=shared).eval()
    x = torch.empty(1, 3, 576, 576, device="meta")
    assert [tuple(features.shape) for features in net.features(x)] == [(1, 1024, 36, 36), (1, 2048, 18, 18)]
    assert [tuple(level[1].weight.shape) for level in net.ppm.features] == [(512, 2048, 1, 1)] * 4
    assert [level[0].output_size for level in net.ppm.features] == [1, 2, 3, 6]
    assert (net.cls[0].in_channels, net.cls[3].p) == (4096, 0.5)

    # torchvision's ResNet-101 less its classifier; as many biases as norms have channels; the pyramid; two classifiers.
    bottleneck = (1024 * 256 + 256) + (256 * 256 * 9 + 256) + (256 * 1024 + 1024) + 2 * (256 + 256 + 1024)
    backbone = (44_549_160 - 2_049_000) + 52_672 - (21 * bottleneck if shared else 0)
    ppm = 4 * (2048 * 512 + 2 * 512)
    heads = (4096 * 512 * 9 + 2 * 512 + 512 * 21 + 21) + (1024 * 256 * 9 + 2 * 256 + 256 * 21 + 21)
    assert parameters(net) == backbone + ppm + heads


def test_second_network_forward_applies_one_block_22_times():
    net = random_norms(PSPNet(**SECOND_NETWORK, share_stage3=True)).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        stages = [(3, 1, 1), (4, 2, 1), (23, 2, 1), (3, 2, 1)]
        plain = plain_pspnet(net.state_dict(), x, stages, stride_in="conv1", shared=True)[0]
        expected = F.interpolate(plain, (64, 96), mode="bilinear", align_corners=True)
        actual = net(x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# As any module


@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")  # dynamo, on itself
def test_compiles_to_one_graph():
    net = tiny()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x, labels = torch.randn(2, 3, 33, 41), torch.randint(5, (2, 33, 41))
    for actual, expected in zip(compiled(x, labels), net(x, labels), strict=True):
        torch.testing.assert_close(actual, expected)
    net.eval()
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_compute_the_same(duplicate):
    net = tiny().eval()
    x = torch.randn(1, 3, 33, 41)
    assert torch.equal(duplicate(net)(x), net(x))


def test_channels_last_and_bfloat16():
    net = tiny().eval()
    x = torch.randn(2, 3, 33, 41)
    expected = net(x)
    moved = copy.deepcopy(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x.contiguous(memory_format=torch.channels_last)), expected)
    half = net.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


# Bad input


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"layers": 77}, "layers must be one of 18, 34, 50, 101, 152, 269, got 77"),
        ({"output_stride": 4}, "output_stride must be one of 8, 16, 32, got 4"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"head": "other"}, "head must be .factorised. or .concat., got .other."),
        ({"zoom_factor": 3}, "zoom_factor must be 1, 2, 4 or 8, got 3"),
        ({"bins": ()}, "bins must not be empty"),
        ({"layers": 18, "bins": (1,) * 513}, "at most as many bins as channels = 512"),
        ({"channels": (8, 12)}, r"channels are those of a backbone, and none is given, got \(8, 12\)"),
        ({"backbone": nn.Identity()}, "channels must be the two channel counts .* got None"),
        (
            {"backbone": nn.Identity(), "channels": (8, 12), "stem": "v1c"},
            "stem is a choice of the ResNet .* got 'v1c'",
        ),
        ({"backbone": nn.Identity(), "channels": (8, 12), "layers": 18}, "layers is a choice of the ResNet .* got 18"),
    ],
)
def test_bad_argument_is_named(choices, message):
    with pytest.raises(ValueError, match=message):
        on_meta(**choices)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"PSPNet: x must be 4-D \(N, C, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "PSPNet: x must be one of .* got uint8"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"PSPNet: x must have 3 channels .* got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 0), ValueError, r"PSPNet: x must have at least one .* got \(1, 3, 32, 0\)"),
    ],
)
def test_bad_image_is_named(x, error, message):
    with pytest.raises(error, match=message):
        on_meta(layers=18)(x)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.zeros(2, 33, 41), TypeError, "PSPNet: targets must be integers, got torch.float32"),
        (torch.zeros(2, 1, 33, 41, dtype=torch.int64), ValueError, r"PSPNet: targets must be .* got \(2, 1, 33, 41\)"),
        (torch.zeros(2, 41, 33, dtype=torch.int64), ValueError, r"PSPNet: targets must be .* got \(2, 41, 33\)"),
        (torch.zeros(1, 33, 41, dtype=torch.int64), ValueError, r"PSPNet: targets must be .* got \(1, 33, 41\)"),
    ],
)
def test_bad_targets_are_named(targets, error, message):
    with pytest.raises(error, match=message):
        tiny()(torch.zeros(2, 3, 33, 41), targets)


class Returns(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, x):
        return self.returned


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (torch.zeros(1, 12, 4, 4), TypeError, "must return its last two feature maps, got Tensor"),
        ([torch.zeros(1, 12, 4, 4)], TypeError, "must return its last two feature maps, got list"),
        (
            [torch.zeros(1, 9, 4, 4), torch.zeros(1, 12, 4, 4)],
            ValueError,
            r"channels = \(8, 12\) .* got \(1, 9, 4, 4\)",
        ),
    ],
)
def test_bad_backbone_is_named(returned, error, message):
    with pytest.raises(error, match=f"PSPNet: backbone {message}|PSPNet: backbone .*{message}"):
        tiny(backbone=Returns(returned))(torch.zeros(1, 3, 33, 33))


def test_training_builds_no_upsampled_logits(monkeypatch):
    """The default loss and the prediction come from the logits at the features' size, and equal the plain ones."""
    ours = PSPNet(layers=18, classes=5, dropout=0.0).train()
    plain = copy.deepcopy(ours)
    plain.criterion = nn.CrossEntropyLoss(ignore_index=255)
    x, y = torch.randn(2, 3, 65, 57), torch.randint(0, 5, (2, 65, 57))
    y[:, :9] = 255
    expected = plain(x, y)
    (expected.main_loss + 0.4 * expected.aux_loss).backward()

    def no_resize(logits, size):
        raise AssertionError(f"logits upsampled to {size}")

    monkeypatch.setattr(ours, "_resize", no_resize)
    got = ours(x, y)
    (got.main_loss + 0.4 * got.aux_loss).backward()
    torch.testing.assert_close((got.main_loss, got.aux_loss), (expected.main_loss, expected.aux_loss))
    assert got.prediction.dtype == torch.int64
    assert (got.prediction == expected.prediction).float().mean() > 0.999  # but for two classes within rounding
    for mine, theirs in zip(ours.cls.parameters(), plain.cls.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "channels"),
    [({"pooling": "max"}, 64 + 64), ({"reduction": False}, 64 * 3), ({"pooling": "max", "reduction": False}, 64 * 3)],
)
def test_the_paper_s_ablations(options, channels):
    """Levels of half the channels where they are reduced, of all where not; they train, and predict what they compute."""
    net = PSPNet(layers=18, width=8, bins=(1, 2), classes=4, **options)
    assert net.cls[0].in_channels == channels
    x = torch.randn(2, 3, 33, 41)
    assert net(x, torch.randint(4, (2, 33, 41))).main_loss.isfinite()
    net.eval()
    with torch.no_grad():
        assert torch.equal(net.predict(x).long(), net(x).argmax(1))
