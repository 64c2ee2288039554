"""Label files of every kind: the numbers that were stored, or refused with a reason."""

import struct

import numpy as np
import pytest
from making import HEIGHT, WIDTH, OddError, ade20k, bmp, chunk, encoded, noise, png, tiff, write
from PIL import Image

from pspnet_fast.data.datasets import DatasetError, find_dataset, looked_up, read_labels
from pspnet_fast.data.images import read_indices, read_picture


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour_type", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_labels_are_the_numbers_of_a_png(tmp_path, bits, colour_type, interlaced):
    if colour_type == 3 and bits == 16:
        pytest.skip("a palette has 256 colours at most")
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (13, 11))
    extra = chunk(b"PLTE", bytes(range(256)) * 3 if bits == 8 else bytes(3 * 2**bits)) if colour_type else b""
    path = write(tmp_path, png(numbers, bits, colour_type, extra, interlaced))
    assert (read_indices(path) == numbers).all()


@pytest.mark.parametrize(("colour_type", "bits"), [(0, 1), (0, 4), (0, 8), (0, 16), (3, 2), (3, 8)])
def test_transparent_labels_are_labels(tmp_path, colour_type, bits):
    numbers = np.random.default_rng(bits).integers(0, min(2**bits, 256), (5, 7))
    extra = chunk(b"PLTE", bytes(range(3 * min(2**bits, 85)))) if colour_type else b""
    numbers %= 4 if colour_type else 2**bits
    extra += chunk(b"tRNS", bytes([0, 255, 0]) if colour_type else struct.pack(">H", int(numbers[0, 0])))
    path = write(tmp_path, png(numbers, bits, colour_type, extra))
    assert (read_indices(path) == numbers).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16, 32])
def test_labels_are_the_numbers_of_a_tiff(tmp_path, bits, order):
    numbers = np.random.default_rng(bits).integers(0, 2 ** min(bits, 31), (5, 11))
    if bits in (12, 32) and order == ">":
        pytest.skip("Pillow does not read it")
    path = write(tmp_path, tiff(numbers, bits, order=order), "a.tif")
    assert (read_indices(path) == numbers).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", None])
def test_labels_in_a_compressed_tiff(tmp_path, compression):
    numbers = noise(9, 12, 1)
    path = write(tmp_path, encoded(numbers, "TIFF", compression=compression), "a.tif")
    assert (read_indices(path) == numbers).all()


def test_labels_of_signed_numbers(tmp_path):
    numbers = np.array([[0, -1, 70000]], np.int32)
    Image.fromarray(numbers).save(tmp_path / "a.tif")
    assert (read_indices(tmp_path / "a.tif") == numbers).all()


def test_labels_in_a_gif_are_indices(tmp_path):
    indices = np.random.default_rng(0).integers(0, 5, (6, 9), dtype=np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette([0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 255, 0, 9, 9, 9])
    picture.save(tmp_path / "a.gif", optimize=False)
    assert (read_indices(tmp_path / "a.gif") == indices).all()
    data = bytearray((tmp_path / "a.gif").read_bytes())
    data[6] += 1  # the canvas is wider than the picture on it
    with pytest.raises(OddError, match="GIF file whose picture does not fill it"):
        read_indices(write(tmp_path, bytes(data), "b.gif"), OddError)


COLOURS = [(7 * i % 256, 255 - i, i) for i in range(256)]
GREYS = [(i, i, i) for i in range(256)]


@pytest.mark.parametrize(
    ("bits", "palette"),
    [
        (1, COLOURS[:2]),
        (4, COLOURS[:16]),
        (8, COLOURS),
        (8, GREYS),
        (8, COLOURS[:2]),
        (1, [(0, 0, 0), (255, 255, 255)]),
    ],
)
def test_labels_in_a_bmp_are_indices(tmp_path, bits, palette):
    indices = np.random.default_rng(bits).integers(0, len(palette), (6, 9), dtype=np.uint8)
    path = write(tmp_path, bmp(indices, bits, palette), "a.bmp")
    assert (read_indices(path) == indices).all()
    assert (read_picture(path) == np.array(palette, np.uint8)[indices]).all()


@pytest.mark.parametrize(("bits", "palette"), [(8, [(0, 0, 0), (255, 255, 255)]), (4, GREYS[:16])])
def test_grey_bmps_that_pillow_misreads_are_refused(tmp_path, bits, palette):
    indices = np.random.default_rng(bits).integers(0, len(palette), (6, 9), dtype=np.uint8)
    path = write(tmp_path, bmp(indices, bits, palette), "a.bmp")
    for reader in (read_indices, read_picture):
        with pytest.raises(OddError, match=f"BMP file of {bits} bits"):
            reader(path, OddError)


def _cmyk():
    return Image.merge("CMYK", [Image.fromarray(noise(4, 4, 1, i)) for i in range(4)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: encoded(noise(8, 8, 1), "JPEG"), "must be PNG, TIFF, BMP or GIF, got JPEG, which does not keep"),
        (lambda: encoded(noise(8, 8), "WEBP"), "got WebP, which does not keep the numbers exactly"),
        (lambda: encoded(noise(8, 8), "WEBP", lossless=True), "got WebP"),
        (lambda: encoded(noise(8, 8, 1), "TIFF", compression="jpeg"), "compression jpeg, which may not keep"),
        (lambda: encoded(noise(8, 8), "PNG"), "one channel of whole numbers .*, got Pillow's mode RGB"),
        (lambda: encoded(noise(8, 8, 4), "PNG"), "got Pillow's mode RGBA"),
        (lambda: encoded(noise(8, 8, 2), "PNG"), "got Pillow's mode LA"),
        (lambda: encoded(noise(8, 8, 1).astype(np.float32), "TIFF"), "got Pillow's mode F"),
        (lambda: encoded(_cmyk(), "TIFF"), "got Pillow's mode CMYK|photometric"),
        (lambda: tiff(noise(8, 8, 1), 8, [(262, 0)]), "photometric interpretation 0"),
        (lambda: tiff(noise(8, 8, 1), 8, [(274, 6)]), "Orientation turns"),
        (
            lambda: encoded(noise(8, 8, 1), "TIFF", save_all=True, append_images=[Image.fromarray(noise(8, 8, 1, 1))]),
            "several pictures",
        ),
        (
            lambda: encoded(noise(8, 8, 1), "PNG", save_all=True, append_images=[Image.fromarray(noise(8, 8, 1, 1))]),
            "several pictures",
        ),
        (
            lambda: encoded(noise(8, 8, 1), "GIF", save_all=True, append_images=[Image.fromarray(noise(8, 8, 1, 1))]),
            "several pictures",
        ),
    ],
)
def test_labels_that_cannot_be_exact_are_refused(tmp_path, data, words):
    path = write(tmp_path, data())  # the name says .png: what it holds counts
    with pytest.raises(OddError, match=f"a.png: cannot be read as labels: .*{words}"):
        read_indices(path, OddError)


def test_labels_of_few_bits_are_not_scaled(tmp_path):
    """Pillow reads a grey PNG of four bits as 0, 17, .. 255."""
    ade20k(tmp_path)
    found = find_dataset("ade20k", tmp_path, "train")
    numbers = np.resize(np.arange(16), (HEIGHT, WIDTH))
    found.samples[0].labels.write_bytes(png(numbers, 4))
    assert (np.asarray(Image.open(found.samples[0].labels)) == 17 * numbers).all()
    assert (read_labels(found.samples[0].labels, found) == np.where(numbers == 0, 255, numbers - 1)).all()


def test_jpeg_labels_are_refused(tmp_path):
    ade20k(tmp_path)
    labels = tmp_path / "annotations" / "training" / "x1.png"
    Image.open(labels).save(labels, "JPEG")
    with pytest.raises(
        DatasetError, match=r"ade20k: .*x1\.png: cannot be read as labels: .*got JPEG, which does not keep"
    ):
        find_dataset("ade20k", tmp_path, "train")


def test_labels_of_16_bits_are_counted_as_they_are(tmp_path):
    ade20k(tmp_path)
    found = find_dataset("ade20k", tmp_path, "train")
    at = found.samples[0].labels
    numbers = np.resize(np.array([0, 1, 150], np.uint16), (HEIGHT, WIDTH))
    Image.fromarray(numbers).save(at)
    assert (read_labels(at, found) == np.resize([255, 0, 149], (HEIGHT, WIDTH))).all()
    numbers[0, :2] = 256, 257  # in eight bits 0 and 1
    Image.fromarray(numbers).save(at)
    with pytest.raises(DatasetError, match=r"labels must be 0 to 150, got 256 \(1 pixels\), 257 \(1 pixels\)"):
        read_labels(at, found)


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (0, 4)])
def test_looking_up_bytes(shape):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    table = np.random.default_rng(1).permutation(256).astype(np.uint8)
    for given in (values, values[:, ::-1]):
        for each in (table, table > 100):
            found = looked_up(given, each)
            assert found.dtype == each.dtype
            assert found.flags.writeable
            assert (found == each[given]).all()
