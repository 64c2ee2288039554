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

from pspnet_fast import PSPNet, testing
from pspnet_fast.data.normalisation import MEAN, STD
from pspnet_fast.predict import (
    PROTOCOLS,
    PictureError,
    Protocol,
    predict_labels,
    predict_probabilities,
    read_picture,
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


def test_a_picture_is_not_enlarged_without_end():
    """Those that are larger already are shown as they are, or smaller."""
    own = PROTOCOLS["whole"]
    assert scaled_size(300, 2**14, 2.0, own) == (600, 2**15)
    assert scaled_size(300, 2**15 + 2**14, 1.0, own) == (300, 2**15 + 2**14)
    for kind in ("semseg", "caffe"):
        assert scaled_size(8, 2**15, 1.0, Protocol(base_size=2**15, kind=kind))[1] == 2**15 + (kind == "caffe")
    with pytest.raises(ValueError, match=r"^Protocol: the long side .* at most 32768, got 3 times 16384$"):
        scaled_size(300, 2**14, 3.0, own)
    with pytest.raises(ValueError, match="got 100 times 400"):
        predict_labels(Stub(), torch.zeros(3, 2, 400), Protocol(base_size=None, scales=(100.0,)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "matlab"}, "kind must be one of semseg, caffe, got 'matlab'"),
        ({"crop": 0}, "crop must be from 1 to 8192, got 0"),
        ({"crop": 10**9}, "crop must be from 1 to 8192, got 1000000000"),
        ({"base_size": 0}, "base_size must be from 1 to 32768, got 0"),
        ({"base_size": 10**9}, "base_size must be from 1 to 32768, got 1000000000"),
        ({"batch_size": 0}, "batch_size must be from 1 to 1024, got 0"),
        ({"batch_size": 10**9}, "batch_size must be from 1 to 1024, got 1000000000"),
        ({"scales": ()}, r"scales must be from 0\.01 to 100, and one at least, got \[\]"),
        ({"scales": (1.0, 0.0)}, r"scales must be from 0\.01 to 100, and one at least, got \[1\.0, 0\.0\]"),
        ({"scales": (1.0, math.nan)}, r"scales must be from .*, got \[1\.0, nan\]"),
        ({"scales": (math.inf,)}, r"scales must be from .*, got \[inf\]"),
        ({"scales": (1.0, 1e9)}, r"scales must be from .*, got \[1\.0, 1000000000\.0\]"),
        ({"scales": (1.0, 70.0)}, "scales times the base size must be at most 32768 pixels, got 70 times 512"),
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


def plain(net, pixels, protocol):
    """The protocol in plain PyTorch, of whole pictures: (K, H, W). The network's logits are upsampled to its windows first."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    image, (height, width) = (pixels.float() - mean) / std, pixels.shape[1:]
    caffe, total = protocol.kind == "caffe", 0

    def logits(crop):
        coarse = net.coarse_logits(crop) if isinstance(net, PSPNet) else net(crop)
        aligned = isinstance(net, PSPNet) and net.align_corners
        return F.interpolate(coarse, crop.shape[2:], mode="bilinear", align_corners=aligned)[0]

    def bilinear(x, *size):
        return F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0]

    for scale in protocol.scales:
        long_side = round(scale * (protocol.base_size or max(height, width))) + caffe
        new_h, new_w = (max(1, round(long_side / max(height, width) * side)) for side in (height, width))
        crop_h, crop_w = (protocol.crop, protocol.crop) if protocol.crop else (new_h, new_w)
        pad_h, pad_w = max(crop_h - new_h, 0), max(crop_w - new_w, 0)
        top, left = (0, 0) if caffe else (pad_h // 2, pad_w // 2)
        padded = F.pad(bilinear(image, new_h, new_w), (left, pad_w - left, top, pad_h - top))
        sums = counts = 0
        for h in windows(padded.shape[1], crop_h):
            for w in windows(padded.shape[2], crop_w):
                crop = padded[None, :, h : h + crop_h, w : w + crop_w]
                score = logits(crop)
                if protocol.flip and caffe:
                    score = (score + logits(crop.flip(3)).flip(2)).softmax(0)
                elif protocol.flip:
                    score = (score.softmax(0) + logits(crop.flip(3)).flip(2).softmax(0)) / 2
                else:
                    score = score.softmax(0)
                around = (w, padded.shape[2] - w - crop_w, h, padded.shape[1] - h - crop_h)
                sums = sums + F.pad(score, around)
                counts = counts + F.pad(torch.ones(crop_h, crop_w), around)
        total = total + bilinear((sums / counts)[:, top : top + new_h, left : left + new_w], height, width)
    return total / len(protocol.scales)


def assert_labels(labels, expected, clear=1e-5, share=0.99):
    """Those of the largest probability, wherever rounding cannot decide; many, and of several classes."""
    best = expected.topk(2, 0).values
    certain = best[0] - best[1] > clear
    assert certain.float().mean() > share
    assert len(labels.unique()) >= 3
    assert torch.equal(labels[certain], expected.argmax(0)[certain])


# Rows in a band, for pictures of 31 rows: one larger than the picture, as large, two, three, a last band of one row, many.
BANDS = {40: 1, 31: 1, 16: 2, 11: 3, 15: 3, 10: 4, 6: 6, 1: 31}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [17, None])
@pytest.mark.parametrize("kind", ["semseg", "caffe"])
@pytest.mark.parametrize(
    ("base_size", "scales"),
    [(None, (1.0,)), (30, (1.0,)), (44, (1.0,)), (43, (1.0,)), (60, (1.0,)), (44, (0.5, 1.0, 1.5)), (43, (1.0, 0.7))],
    ids=str,
)
def test_labels_come_in_bands_of_rows(monkeypatch, base_size, scales, kind, crop, flip):
    """The plain protocol's, however many bands: pictures that are shrunk, enlarged, and of the very size (base size 44, or
    Caffe's 43, which is a longer side by one).
    """
    net = Stub().eval()
    pixels = F.interpolate(torch.rand(1, 3, 5, 7) * 255, (31, 44), mode="bilinear")[0]
    protocol = Protocol(crop, base_size, scales, flip, batch_size=3, kind=kind)
    expected = plain(net, pixels, protocol)
    heights, argmax = [], torch.argmax
    monkeypatch.setattr(torch, "argmax", lambda some, *a, **k: heights.append(some.shape[1]) or argmax(some, *a, **k))
    for rows, count in BANDS.items():
        band = rows * 44 * 4
        torch.testing.assert_close(predict_probabilities(net, pixels, protocol, band=band), expected, atol=2e-6, rtol=0)
        heights.clear()
        assert_labels(predict_labels(net, pixels, protocol, band=band), expected)
        if heights or crop is not None or scales != (1.0,):  # else one window is the picture, and there are no bands
            assert len(heights) == count
            assert (max(heights), sum(heights)) == (min(rows, 31), 31)


@pytest.mark.parametrize("size", [(3, 44), (44, 3), (1, 30), (30, 1)], ids=str)
@pytest.mark.parametrize("base_size", [29, 30, 31, 43, 44, 45])
def test_bands_where_one_side_keeps_its_size(size, base_size):
    """A side of 3 stays 3 at scales about 1, and the other does not."""
    net, pixels = Stub().eval(), torch.rand(3, *size) * 255
    protocol = Protocol(17, base_size, flip=True)
    expected = plain(net, pixels, protocol)
    for rows in (1, 2, size[0] - 1, size[0]):
        found = predict_probabilities(net, pixels, protocol, band=4 * size[1] * rows)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


class Shallow(nn.Module):
    """A convolution, whose logits are an eighth of the picture's size."""

    def __init__(self, classes=4):
        super().__init__()
        self.first = nn.Conv2d(3, classes, 9, stride=8, padding=4)

    def forward(self, x):
        return self.first(x)


def test_bands_of_a_larger_scale_hold_no_more():
    """A small picture at forty times its size: a band is what its scale has room for, and not half a gigabyte."""
    net, pixels = Shallow(150).eval(), torch.rand(3, 20, 30) * 255
    protocol = Protocol(crop=200, base_size=1200, batch_size=1)
    shown = 3 * 800 * 1200 * 4  # bytes of the enlarged picture
    needed = testing.peak_memory(lambda: predict_labels(net, pixels, protocol, band=2**17), "cpu")
    assert needed < 5 * shown < 150 * 800 * 1200


def smooth_picture(height, width, cells=9):
    """Blobs of colour, with noise on them, uint8."""
    blobs = F.interpolate(torch.rand(1, 3, cells, cells) * 255, (height, width), mode="bilinear")[0]
    return (blobs + 20 * torch.randn(3, height, width)).clamp(0, 255).to(torch.uint8)


def telling(classes, layers=18, width=8):
    """A PSPNet of random weights that names many classes."""
    net = PSPNet(layers=layers, width=width, classes=classes, aux=False).eval()
    nn.init.normal_(net.cls[4].weight, std=0.3)
    return net


@pytest.mark.parametrize(
    ("size", "classes", "protocol"),
    [
        ((480, 640), 150, Protocol()),
        ((512, 512), 150, Protocol()),
        ((512, 512), 150, Protocol(flip=True, kind="caffe")),
        ((384, 512), 150, Protocol(scales=(0.5, 1.0, 1.5), batch_size=9)),
        ((480, 640), 150, Protocol(crop=None, base_size=None, flip=True, batch_size=1)),
        ((1024, 2048), 19, Protocol(crop=713, base_size=2048, batch_size=1)),
    ],
    ids=str,
)
def test_pictures_of_real_sizes(size, classes, protocol):
    net, pixels = telling(classes), smooth_picture(*size)
    with torch.inference_mode():
        expected = plain(net, pixels, protocol)
    assert_labels(predict_labels(net, pixels, protocol), expected, clear=1e-6, share=0.98)


@pytest.mark.parametrize(
    "protocol", [Protocol(batch_size=1), Protocol(crop=1500, base_size=None, batch_size=1)], ids=str
)
def test_a_photograph_of_twelve_megapixels(protocol):
    net, pixels = Shallow().eval(), smooth_picture(3000, 4000, cells=30)
    nn.init.normal_(net.first.weight, std=0.1)
    with torch.inference_mode():
        expected = plain(net, pixels, protocol)
    assert_labels(predict_labels(net, pixels, protocol), expected, share=0.98)


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
    labels = predict_labels(net, pixels, Protocol(crop=33, base_size=50, scales=(1.0,)))
    assert labels.unique().tolist() == [3]


@pytest.mark.parametrize("crop", [129, 257, None])
def test_labels_build_neither_logits_nor_probabilities_at_the_pictures_size(crop):
    net, pixels = shrinking(150), torch.rand(3, 257, 257) * 255
    protocol = Protocol(crop, base_size=None)
    whole = 150 * 257 * 257 * 4
    assert testing.peak_memory(lambda: predict_labels(net, pixels, protocol, band=2**20), "cpu") < 0.4 * whole
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
    with pytest.raises(ImportError, match=r"needs Pillow.*pip install --no-build-isolation '\.\[predict\]'"):
        importlib.import_module(module)


def test_files_that_are_no_pictures(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png", "absent.png", "."):
        with pytest.raises(PictureError, match=str(tmp_path / name).rstrip(".")):
            read_picture(tmp_path / name)
