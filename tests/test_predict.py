import importlib
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pspnet_fast import PSPNet, predict, testing
from pspnet_fast.data.classes import CLASSES
from pspnet_fast.data.normalisation import MEAN, STD
from pspnet_fast.predict import (
    PROTOCOLS,
    PictureError,
    Protocol,
    colour,
    load_network,
    overlay,
    predict_labels,
    predict_probabilities,
    read_picture,
    save,
    scaled_size,
    windows,
)


class Stub(nn.Module):
    """Four classes whose logits depend on the pixel, on its left neighbour, and on where in the window it stands."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        place = torch.linspace(0, 1, x.shape[2], device=x.device)[:, None] + torch.linspace(0, 2, x.shape[3])[None]
        mixed = x + 0.5 * x.roll(1, 3)
        return torch.einsum("kc,nchw->nkhw", self.weight, mixed) + place * torch.arange(4.0)[:, None, None]


def resize(image, height, width):
    """Bilinear, half-pixel centres, edges repeated: what cv2.resize does to floats. image (h, w, c)."""
    for axis, size in ((0, height), (1, width)):
        length = image.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        lower = np.floor(at).astype(int)
        upper = np.minimum(lower + 1, length - 1)
        share = (at - lower).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        image = np.take(image, lower, axis) * (1 - share) + np.take(image, upper, axis) * share
    return image


def semseg(net, image, crop, base_size, scales, flip):
    """The protocol of semseg's test.py, restated plainly in NumPy with float64 accumulators. image (H, W, 3)."""
    height, width, _ = image.shape
    total = 0

    def network(window):
        x = torch.tensor(((window - MEAN) / STD).transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.no_grad():
            p = net(x).softmax(1)
            if flip:
                p = (p + net(x.flip(3)).softmax(1).flip(3)) / 2
        return p[0].numpy().transpose(1, 2, 0).astype(np.float64)

    for scale in scales:
        long_side = round(scale * base_size)
        new_h = long_side if height >= width else round(long_side / width * height)
        new_w = long_side if width >= height else round(long_side / height * width)
        scaled = resize(image, new_h, new_w)
        pad_h, pad_w = max(crop - new_h, 0), max(crop - new_w, 0)
        top, left = pad_h // 2, pad_w // 2
        padded = np.tile(np.array(MEAN), (new_h + pad_h, new_w + pad_w, 1))
        padded[top : top + new_h, left : left + new_w] = scaled
        stride = math.ceil(crop * 2 / 3)
        sums, counts = np.zeros((*padded.shape[:2], 4)), np.zeros((*padded.shape[:2], 1))
        for i in range(math.ceil((padded.shape[0] - crop) / stride) + 1):
            for j in range(math.ceil((padded.shape[1] - crop) / stride) + 1):
                h = min(i * stride + crop, padded.shape[0]) - crop
                w = min(j * stride + crop, padded.shape[1]) - crop
                sums[h : h + crop, w : w + crop] += network(padded[h : h + crop, w : w + crop])
                counts[h : h + crop, w : w + crop] += 1
        mean = (sums / counts)[top : top + new_h, left : left + new_w]
        total = total + resize(mean, height, width)
    return total / len(scales)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75)], ids=str)
@pytest.mark.parametrize("size", [(30, 44), (44, 30), (9, 40)], ids=str)
def test_sliding_windows_are_semsegs(size, scales, flip):
    net, image = Stub().eval(), np.random.default_rng(0).uniform(0, 255, (*size, 3)).astype(np.float32)
    expected = semseg(net, image.astype(np.float64), 17, 40, scales, flip)
    protocol = Protocol(crop=17, base_size=40, scales=scales, flip=flip, batch_size=3)
    ours = predict_probabilities(net, torch.tensor(image).permute(2, 0, 1), protocol)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=2e-5)
    assert max(shape[0] for shape in net.sizes) == 3  # windows were batched
    assert torch.equal(ours.argmax(0), torch.tensor(expected).argmax(2))


def caffe(net, image, crop, base_size, scales, flip):
    """The protocol of hszhao/PSPNet's evaluation/*.m, restated plainly in NumPy. image (H, W, 3)."""
    height, width, _ = image.shape
    total = 0

    def network(window):
        x = torch.tensor(((window - MEAN) / STD).transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.no_grad():
            score = net(x)
            if flip:
                score = score + net(x.flip(3)).flip(3)
        power = np.exp(score[0].numpy().transpose(1, 2, 0).astype(np.float64))
        return power / power.sum(2, keepdims=True)

    for scale in scales:
        long_side = round(base_size * scale) + 1
        new_h = long_side if height >= width else round(long_side / width * height)
        new_w = long_side if width >= height else round(long_side / height * width)
        scaled = resize(image, new_h, new_w)
        padded = np.tile(np.array(MEAN), (max(crop, new_h), max(crop, new_w), 1))
        padded[:new_h, :new_w] = scaled
        stride = math.ceil(crop * 2 / 3)
        sums, counts = np.zeros((*padded.shape[:2], 4)), np.zeros((*padded.shape[:2], 1))
        for i in range(math.ceil((padded.shape[0] - crop) / stride) + 1):
            for j in range(math.ceil((padded.shape[1] - crop) / stride) + 1):
                bottom, right = min(i * stride + crop, padded.shape[0]), min(j * stride + crop, padded.shape[1])
                sums[bottom - crop : bottom, right - crop : right] += network(
                    padded[bottom - crop : bottom, right - crop : right]
                )
                counts[bottom - crop : bottom, right - crop : right] += 1
        mean = resize((sums / counts)[:new_h, :new_w], height, width)
        total = total + mean / mean.sum(2, keepdims=True)
    return total / len(scales)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75)], ids=str)
@pytest.mark.parametrize("size", [(30, 44), (44, 30), (9, 40), (12, 16)], ids=str)
def test_caffes_protocol(size, scales, flip):
    net, image = Stub().eval(), np.random.default_rng(0).uniform(0, 255, (*size, 3)).astype(np.float32)
    base_size = 40 if max(size) > 17 else 15  # the last is smaller than one window
    expected = caffe(net, image.astype(np.float64), 17, base_size, scales, flip)
    protocol = Protocol(17, base_size, scales, flip, batch_size=3, kind="caffe")
    pixels = torch.tensor(image).permute(2, 0, 1)
    ours = predict_probabilities(net, pixels, protocol)
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=2e-5)
    assert torch.equal(ours.argmax(0), torch.tensor(expected).argmax(2))
    assert torch.equal(predict_labels(net, pixels, protocol), ours.argmax(0))
    other = predict_probabilities(net, pixels, protocol._replace(kind="semseg"))
    assert (other - ours).abs().max() > 1e-3  # the two protocols are told apart


@pytest.mark.parametrize("align_corners", [True, False])
def test_caffes_flip_sums_coarse_logits(align_corners):
    """Mirrored and summed while they are coarse: the same as of the network's whole logits."""
    torch.manual_seed(1)
    net, pixels = shrinking(4), F.interpolate(torch.rand(1, 3, 3, 4) * 255, (21, 31), mode="bilinear")[0]
    net.align_corners = align_corners
    nn.init.normal_(net.cls[4].weight)
    protocol = Protocol(17, 40, flip=True, kind="caffe")
    expected = predict_probabilities(nn.Sequential(net), pixels, protocol)
    torch.testing.assert_close(predict_probabilities(net, pixels, protocol), expected)


def test_sizes_at_a_scale():
    semseg_, caffe_ = PROTOCOLS["semseg"], PROTOCOLS["caffe"]
    assert scaled_size(512, 683, 0.75, semseg_) == (288, 384)
    assert scaled_size(683, 512, 0.75, caffe_) == (385, 289)
    assert scaled_size(300, 400, 1.0, PROTOCOLS["whole"]) == (300, 400)
    assert scaled_size(1, 1000, 1.0, semseg_) == (1, 512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "matlab"}, "kind must be one of semseg, caffe, got 'matlab'"),
        ({"crop": 0}, "crop must be at least 1, got 0"),
        ({"base_size": 0}, "base_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"scales": ()}, r"scales must be positive, and one at least, got \(\)"),
        ({"scales": (1.0, 0.0)}, r"scales must be positive, and one at least, got \(1\.0, 0\.0\)"),
    ],
)
def test_protocols_that_cannot_work(changes, words):
    with pytest.raises(ValueError, match=f"^Protocol: {words}"):
        predict_labels(Stub(), torch.zeros(3, 8, 8), Protocol()._replace(**changes))


def test_whole_pictures():
    net = Stub().eval()
    pixels = torch.rand(3, 20, 31) * 255
    ours = predict_probabilities(net, pixels, PROTOCOLS["whole"])
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    torch.testing.assert_close(ours, net(((pixels - mean) / std)[None]).softmax(1)[0].detach())
    assert {shape[2:] for shape in net.sizes} == {(20, 31)}


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.75)], ids=str)
def test_labels_come_in_bands_of_rows(monkeypatch, scales):
    """The same labels as of all probabilities at once, which are never all there."""
    net, pixels = Stub().eval(), torch.rand(3, 31, 44) * 255
    protocol = Protocol(crop=17, base_size=40, scales=scales)
    expected = predict_probabilities(net, pixels, protocol).argmax(0)
    monkeypatch.setattr(predict, "BAND", 4 * 44 * 7)
    rows, heights = predict._rows, []
    monkeypatch.setattr(
        predict, "_rows", lambda maps, some, *size: heights.append(len(some)) or rows(maps, some, *size)
    )
    assert torch.equal(predict_labels(net, pixels, protocol), expected)
    assert heights == [7, 7, 7, 7, 3]


class Shrink(nn.Module):
    """A backbone: its last map is an eighth of the image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, x):
        third = self.first(x).relu()
        return third, self.second(third).relu()


def shrinking(classes):
    return PSPNet(backbone=Shrink(), channels=(8, 12), bins=(1, 2), classes=classes, aux=False).eval()


@pytest.mark.parametrize("crop", [17, 33, None])
@pytest.mark.parametrize(("base_size", "flip"), [(None, False), (None, True), (40, False)])
def test_coarse_logits_of_a_pspnet(crop, base_size, flip):
    """As if the network's whole logits had been taken."""
    net, pixels = shrinking(4), F.interpolate(torch.rand(1, 3, 3, 4) * 255, (21, 31), mode="bilinear")[0]
    nn.init.normal_(net.cls[4].weight)
    nn.init.zeros_(net.cls[4].bias)
    protocol = Protocol(crop, base_size, flip=flip, batch_size=3)
    whole = nn.Sequential(net)
    expected = predict_probabilities(whole, pixels, protocol)
    torch.testing.assert_close(predict_probabilities(net, pixels, protocol), expected)
    best = expected.topk(2, 0).values
    clear = best[0] - best[1] > 1e-5
    assert clear.float().mean() > 0.99
    labels = expected.argmax(0)
    assert min((labels != labels.roll(1, axis)).sum() for axis in (0, 1)) > 20  # they tell where they are
    assert torch.equal(predict_labels(net, pixels, protocol)[clear], labels[clear])


class Rising(PSPNet):
    """Its logits are those of a PSPNet and a constant per class."""

    def forward(self, x, y=None):
        return super().forward(x) + 20 * torch.arange(4)[:, None, None]


@pytest.mark.parametrize("how", ["a hook", "another forward", "a class"])
def test_a_network_that_must_be_called_is_called(how):
    net = (Rising if how == "a class" else PSPNet)(layers=18, classes=4, width=4, bins=(1, 2)).eval()
    if how == "a hook":
        net.register_forward_hook(lambda module, inputs, out: out + 20 * torch.arange(4)[:, None, None])
    elif how == "another forward":
        net.forward = lambda x: torch.ones(len(x), 4, *x.shape[2:]).cumsum(1) * 20
    pixels = torch.rand(3, 40, 50) * 255
    labels = predict.predict_labels(net, pixels, Protocol(crop=33, base_size=50, scales=(1.0,)))
    assert labels.unique().tolist() == [3]


@pytest.mark.parametrize("crop", [129, 257, None])
def test_labels_build_neither_logits_nor_probabilities_at_the_pictures_size(crop, monkeypatch):
    monkeypatch.setattr(predict, "BAND", 2**20)
    net, pixels = shrinking(150), torch.rand(3, 257, 257) * 255
    protocol = Protocol(crop, base_size=None)
    whole = 150 * 257 * 257 * 4
    assert testing.peak_memory(lambda: predict_labels(net, pixels, protocol), "cpu") < 0.4 * whole
    assert testing.peak_memory(lambda: predict_probabilities(net, pixels, protocol), "cpu") >= whole


def test_windows_cover_an_axis():
    assert windows(473, 473) == [0]
    assert windows(474, 473) == [0, 1]
    assert windows(1000, 473) == [0, 316, 527]
    for size in range(17, 90):
        starts = windows(size, 17)
        assert starts[-1] + 17 == size
        assert all(0 < b - a <= 12 for a, b in pairwise(starts))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (3, 0, 8)], ids=str)
def test_pixels_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"predict: pixels must be \(3, H, W\), got"):
        predict_probabilities(Stub(), torch.zeros(shape), Protocol())


def test_read_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    assert (np.asarray(read_picture(tmp_path / "a.png")) == pixels).all()
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.quantize(8).save(tmp_path / "palette.png")
    for name in ("grey", "alpha", "palette"):
        assert read_picture(tmp_path / f"{name}.png").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: shown upright it is 6 wide, 9 high
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (6, 9)


def test_16_bit_pictures_keep_their_grey_levels(tmp_path):
    grey = np.arange(54, dtype=np.uint8).reshape(6, 9) * 4
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert (np.asarray(read_picture(tmp_path / "deep.png")) == grey[..., None]).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(PictureError, match=r"float\.tiff.*no known range"):
        read_picture(tmp_path / "float.tiff")


@pytest.mark.parametrize("module", ["pspnet_fast.predict", "pspnet_fast.data.picture"])
def test_a_missing_extra_is_named_with_its_command(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=r"needs Pillow.*pip install 'pspnet_fast\[predict\]'"):
        importlib.import_module(module)


def test_files_that_are_no_pictures(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png", "absent.png", "."):
        with pytest.raises(PictureError, match=str(tmp_path / name).rstrip(".")):
            read_picture(tmp_path / name)


def test_colours_and_legend():
    classes = CLASSES["voc2012"]
    labels = torch.zeros(120, 200, dtype=torch.uint8)
    labels[:, 150:] = 15
    picture = np.asarray(colour(labels, classes))
    assert tuple(picture[0, 0]) == (0, 0, 0)
    assert tuple(picture[0, 199]) == (192, 128, 128)
    shown = overlay(Image.new("RGB", (200, 120), "white"), labels, classes)
    assert shown.height == 120
    assert shown.width > 250
    legend = np.asarray(shown)[:, 200:].reshape(-1, 3)
    assert (legend == (192, 128, 128)).all(1).sum() > 50  # the swatch of "person"
    assert not (legend == classes.colours[2]).all(1).any()  # a class that is not there has none


def test_what_is_no_class_is_white():
    picture = np.asarray(colour(torch.tensor([[0, 255, 21]], dtype=torch.uint8), CLASSES["voc2012"]))
    assert picture.tolist() == [[[0, 0, 0], [255, 255, 255], [255, 255, 255]]]


def test_a_legend_longer_than_the_picture_says_how_many_are_left():
    labels = torch.arange(150, dtype=torch.uint8).repeat_interleave(20).view(50, 60)
    shown = overlay(Image.new("RGB", (60, 50), "white"), labels, CLASSES["ade20k"])
    swatches = {tuple(c) for c in np.asarray(shown)[:, 60:].reshape(-1, 3)} & set(CLASSES["ade20k"].colours)
    assert 2 <= len(swatches) < 10


def test_save_leaves_no_part_behind(tmp_path):
    save(Image.new("L", (4, 4)), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(PictureError, match="absent.*cannot be written"):
        save(Image.new("L", (4, 4)), tmp_path / "absent" / "a.png")


def test_load_network(tmp_path):
    state = PSPNet(layers=18, classes=21).state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pth")
    net = load_network(tmp_path / "a.pth", 18, 21)
    assert not net.training
    assert torch.equal(net.cls[4].weight, state["cls.4.weight"])
    with pytest.raises(ValueError, match=r"a\.pth: has 21 classes, and the dataset 150"):
        load_network(tmp_path / "a.pth", 18, 150)
    with pytest.raises(ValueError, match="does not fit"):
        load_network(tmp_path / "a.pth", 34, 21)
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "b.pth", 18, 21)
