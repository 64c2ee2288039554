"""Odd files: what is read must be right, the rest is refused with a reason, and nothing large is allocated for a header."""

import base64
import contextlib
import io
import logging
import os
import socket
import struct
import sys
import threading
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from pspnet_fast.data import images
from pspnet_fast.data.images import read_indices, read_picture


class OddError(ValueError):
    """What the readers are told to raise here."""


@pytest.fixture(autouse=True)
def _say_again():
    images._say.cache_clear()


@pytest.fixture
def said(caplog):
    """The warnings of the reader."""
    caplog.set_level(logging.WARNING)
    return lambda: caplog.messages


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels, kind, **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed(samples, bits):
    """Rows (H, W * channels) of numbers, each in so many bits, behind a filter byte."""
    if bits == 16:
        rows = samples.astype(">u2").view(np.uint8).reshape(len(samples), -1)
    else:
        unpacked = (samples[..., None] >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(unpacked.reshape(len(samples), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in rows)


# First row and column, and the steps, of the seven passes of an interlaced PNG (section 8.2 of the specification).
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(samples, bits, colour_type=0, extra=b"", interlaced=False):
    """A PNG of numbers (H, W) or (H, W, channels)."""
    height, width = samples.shape[:2]
    parts = [samples[r::dr, c::dc] for r, c, dr, dc in ADAM7] if interlaced else [samples]
    rows = b"".join(packed(part.reshape(len(part), -1), bits) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(samples, bits, tags=(), order="<"):
    """An uncompressed TIFF of one channel; `tags` are (tag, value) of the type SHORT or, where large, LONG."""
    height, width = samples.shape
    kind = {8: "u1", 16: "u2", 32: "u4"}.get(bits)
    data = samples.astype(order + kind).tobytes() if kind else packed(samples, bits)
    if kind is None:
        line = 1 + -(-width * bits // 8)
        data = b"".join(data[i + 1 : i + line] for i in range(0, len(data), line))
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, 279: len(data), **dict(tags)}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    table = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(entries)) + table + b"\0\0\0\0" + data


def bmp(indices, bits, palette):
    """An uncompressed BMP of palette indices (H, W)."""
    width = indices.shape[1]
    line, padded = 1 + -(-width * bits // 8), -(-width * bits // 32) * 4
    raw = packed(indices[::-1], bits)
    rows = b"".join(raw[i + 1 : i + line].ljust(padded, b"\0") for i in range(0, len(raw), line))
    start = 14 + 40 + 4 * len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, len(indices), 1, bits, 0, 0, 0, 0, len(palette), 0)
    colours = b"".join(bytes([b, g, r, 0]) for r, g, b in palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + colours + rows


def write(folder, data, name="a.png"):
    (folder / name).write_bytes(data)
    return folder / name


# Labels


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
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
def test_labels_are_the_numbers_of_a_tiff(tmp_path, bits, order):
    numbers = np.random.default_rng(bits).integers(0, 2 ** min(bits, 31), (5, 11))
    if bits == 32 and order == ">":
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


# Where a file ends


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"comment": b"\xff\xd9" * 9}]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_ends_where_its_structure_does(tmp_path, options, channels):
    pixels = noise(40, 56, channels)
    exif = b"Exif\0\0" + encoded(pixels[::4, ::4], "JPEG")  # a thumbnail, itself a whole JPEG
    whole = encoded(pixels, "JPEG", exif=exif, **options)
    expected = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
    film = b"\0\0\0\x18ftypmp42" + np.random.default_rng(1).bytes(5000)
    for after in (b"", b"\n", b"\0" * 100, film, whole, whole[: len(whole) // 2], b"\xff\xda", b"\xff\xd8\xff\xe0"):
        path = write(tmp_path, whole + after, "a.jpg")
        for upright in (False, True):
            assert (read_picture(path, upright=upright) == expected).all()
    for length in [*range(0, len(whole), 97), *range(len(whole) - 9, len(whole))]:
        for after in (b"", bytes(len(whole) - length)):
            path = write(tmp_path, whole[:length] + after, "cut.jpg")
            for upright in (False, True):
                with pytest.raises(OddError, match=r"cut\.jpg: cannot be read as a picture: "):
                    read_picture(path, OddError, upright=upright)


@pytest.mark.parametrize("reader", [read_picture, read_indices])
def test_a_png_ends_where_its_structure_does(tmp_path, reader):
    pixels = noise(20, 24, 1)
    whole = encoded(pixels, "PNG")
    for after in (b"", b"\n", whole, whole[:50], noise(9, 9, 1).tobytes()):
        found = reader(write(tmp_path, whole + after), OddError)
        assert ((found[..., 0] if found.ndim == 3 else found) == pixels).all()
    for length in range(len(whole)):
        with pytest.raises(OddError, match=r"a\.png: cannot be read as"):
            reader(write(tmp_path, whole[:length]), OddError)


def test_changed_bytes_of_a_png_are_found(tmp_path):
    whole = encoded(noise(20, 24, 1), "PNG")
    for at in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 4
        with pytest.raises(OddError):
            read_indices(write(tmp_path, bytes(changed)), OddError)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("reader", [read_picture, read_indices])
def test_other_files_cut_short_are_refused(tmp_path, kind, reader):
    whole = encoded(Image.fromarray(noise(20, 24, 1)).convert("P"), kind)
    reader(write(tmp_path, whole), OddError)
    for length in range(0, len(whole) - 30, 11):
        with pytest.raises(OddError):
            reader(write(tmp_path, whole[:length]), OddError)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colour_type"), [(1, 0), (4, 3), (8, 0), (16, 0), (8, 2), (8, 4), (16, 6)])
def test_fewer_rows_than_the_header_says_are_refused(tmp_path, bits, colour_type, interlaced):
    """Pillow takes the missing ones as 0, which is a class."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    black = np.zeros((7, 5, channels), np.uint8)
    extra = chunk(b"PLTE", bytes(48)) if colour_type == 3 else b""
    whole = png(black, bits, colour_type, extra, interlaced)
    readers = [read_picture] if channels > 1 or bits == 16 else [read_picture, read_indices]
    for reader in readers:
        if bits == 16:
            continue  # black is refused
        assert not reader(write(tmp_path, whole), OddError).any()
    at = whole.index(b"IDAT") - 4
    length = int.from_bytes(whole[at : at + 4], "big")
    rows = zlib.decompress(whole[at + 8 : at + 8 + length])
    for lacking in (1, 1 + -(-5 * channels * bits // 8)):  # a byte, a row
        short = whole[:at] + chunk(b"IDAT", zlib.compress(rows[:-lacking])) + chunk(b"IEND", b"")
        for reader in readers:
            with pytest.raises(OddError, match="fewer pixels than its header says|truncated"):
                reader(write(tmp_path, short), OddError)


def test_the_first_picture_of_several(tmp_path, said):
    first, second = noise(16, 24), noise(16, 24, seed=1)
    for kind, options in (("MPO", {}), ("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(first, kind, save_all=True, append_images=[Image.fromarray(second)], **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (read_picture(write(tmp_path, data), OddError) == expected).all()
        if kind != "MPO":  # a telephone's second picture is its depth, or another exposure
            assert said()[-1] == f"{tmp_path / 'a.png'}: holds several pictures, the first is read"
            images._say.cache_clear()
    assert len(said()) == 4


ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYUGBIUFRT/"
    "yQALCAAQABABAREA/8wABgAQEAX/2gAIAQEAAD8A/wDn4Yz6JRhvnHJ443pEKB+JS8unVI20rrkP+mZ7LP/Z"
)


def test_an_arithmetic_coded_jpeg(tmp_path):
    """Made by libjpeg of a ramp, 10 a row and 5 a column; quality 90."""
    found = read_picture(write(tmp_path, ARITHMETIC, "a.jpg"), OddError)
    ramp = 10 * np.arange(16)[:, None] + 5 * np.arange(16)
    assert abs(found - ramp[..., None].astype(int)).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_where_it_is_asked_to(tmp_path, kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(noise(8, 16), kind, exif=exif)
    path = write(tmp_path, data)
    stored = Image.open(io.BytesIO(data))
    assert (read_picture(path) == np.asarray(stored)).all()
    assert (read_picture(path, upright=True) == np.asarray(ImageOps.exif_transpose(stored))).all()
    assert images.orientation(path) == turn


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_tiff(tmp_path, turn):
    numbers = noise(5, 9, 1)
    path = write(tmp_path, tiff(numbers, 8, [(274, turn)]), "a.tif")
    assert (read_picture(path, upright=True)[..., 0] == images._turned(numbers[..., None], turn)[..., 0]).all()
    if turn == 1:
        assert (read_picture(path)[..., 0] == numbers).all()
    else:  # Pillow gives no stored pixels
        with pytest.raises(OddError, match="Orientation turns: labels are drawn on the pixels as stored"):
            read_picture(path, OddError)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # what Pillow says of it
def test_exif_that_is_no_exif_does_no_harm(tmp_path, said):
    for exif in (b"Exif\0\0", b"Exif\0\0XX*\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        data = encoded(noise(8, 16), "JPEG", exif=exif)
        assert (
            read_picture(write(tmp_path, data), OddError, upright=True) == np.asarray(Image.open(io.BytesIO(data)))
        ).all()
    assert all("its EXIF data cannot be read" in sentence for sentence in said())


def test_without_opencv_the_pixels_are_the_same(tmp_path, monkeypatch):
    def read():
        return [read_picture(path) for path in paths]

    paths = []
    for i, options in enumerate(({}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"keep_rgb": True})):
        paths.append(write(tmp_path, encoded(noise(37, 53), "JPEG", **options), f"{i}.jpg"))
    paths.append(write(tmp_path, encoded(noise(37, 53, 1), "JPEG"), "grey.jpg"))
    fast = read()
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert all((a == b).all() for a, b in zip(fast, read(), strict=True))


# Numbers of other ranges and colours


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6], ids=["grey", "rgb", "grey and alpha", "rgb and alpha"])
def test_16_bit_pictures(tmp_path, said, colour_type):
    """Twelve bits in sixteen are refused, they would be black; fifteen are said; a full range is 256 values for one."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    numbers = np.random.default_rng(0).integers(0, 65536, (9, 8, channels))
    colours = channels - (channels % 2 == 0)
    numbers[..., colours:] = 65535

    def read(numbers):
        return read_picture(write(tmp_path, png(numbers, 16, colour_type)), OddError)

    assert (read(numbers) == np.broadcast_to(numbers[..., :colours] >> 8, (9, 8, 3))).all()
    assert said() == []
    numbers[..., :colours] >>= 1
    assert (read(numbers) == np.broadcast_to(numbers[..., :colours] >> 8, (9, 8, 3))).all()
    (sentence,) = said()
    assert "16-bit pixels are taken to go from 0 to 65535, and its largest is below 32768" in sentence
    numbers[..., :colours] >>= 3
    with pytest.raises(OddError, match="16-bit pixels that are all below 4096"):
        read(numbers)


def test_16_bit_tiffs(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 65536, (9, 8))
    for order in ("<", ">"):
        found = read_picture(write(tmp_path, tiff(numbers, 16, order=order)), OddError)
        assert (found == (numbers >> 8)[..., None]).all()
        with pytest.raises(OddError, match="16-bit pixels that are all below 4096"):
            read_picture(write(tmp_path, tiff(numbers >> 4, 16, order=order)), OddError)
    with pytest.raises(OddError, match="counts from white"):
        read_picture(write(tmp_path, tiff(numbers, 16, [(262, 0)])), OddError)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (lambda: noise(4, 4, 1).astype(np.int32), "whole numbers of 32 bits or with a sign, of no known range"),
        (lambda: noise(4, 4, 1).astype(np.float32), "floating-point pixels, of no known range"),
        (lambda: Image.frombytes("LAB", (4, 4), noise(4, 4).tobytes()), "LAB colours"),
    ],
)
def test_pictures_of_no_known_range_are_refused(tmp_path, pixels, words):
    path = write(tmp_path, encoded(pixels(), "TIFF"), "a.tif")
    with pytest.raises(OddError, match=f"a.tif: cannot be read as a picture: {words}"):
        read_picture(path, OddError)


def test_pictures_of_one_bit(tmp_path):
    bits = noise(9, 11, 1) > 128
    for kind in ("PNG", "TIFF", "BMP"):
        assert (read_picture(write(tmp_path, encoded(bits, kind)), OddError) == 255 * bits[..., None]).all()
    white = tiff(bits.astype(int), 1, [(262, 0)])  # counts from white
    assert (read_picture(write(tmp_path, white), OddError) == 255 * ~bits[..., None]).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_pixels_are_said(tmp_path, said, channels):
    pixels = noise(9, 11, channels)
    pixels[..., -1] = 255
    path = write(tmp_path, encoded(pixels, "PNG"))
    assert (read_picture(path, OddError) == pixels[..., : channels - 1]).all()
    assert said() == []
    pixels[:2, :3, -1] = (0, 1, 254)
    path = write(tmp_path, encoded(pixels, "PNG"))
    for _ in range(3):  # said once a file
        assert (read_picture(path, OddError) == pixels[..., : channels - 1]).all()
    assert said() == [f"{path}: 6 pixels are transparent, they are read in the colours stored under them"]


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (3, 1)])
def test_pictures_with_a_transparent_colour(tmp_path, said, colour_type, channels):
    numbers = np.arange(24 * channels).reshape(4, 6, channels)
    palette = noise(24, 3, 1)
    extra = chunk(b"PLTE", palette.tobytes()) if colour_type == 3 else b""
    extra += chunk(b"tRNS", b"\xff\0" if colour_type == 3 else struct.pack(f">{channels}H", *numbers[0, 1]))
    expected = palette[numbers[..., 0]] if colour_type == 3 else np.broadcast_to(numbers, (4, 6, 3))
    assert (read_picture(write(tmp_path, png(numbers, 8, colour_type, extra)), OddError) == expected).all()
    assert len(said()) == 1
    assert "1 pixels are transparent" in said()[0]


def test_cmyk(tmp_path):
    """Adobe's JPEGs store the complement, TIFF files do not; both are (1 - c) (1 - k)."""
    inks = np.broadcast_to(np.array([255, 128, 0, 0], np.uint8), (16, 16, 4))
    picture = Image.frombytes("CMYK", (16, 16), inks.tobytes())
    for kind in ("JPEG", "TIFF"):
        found = read_picture(write(tmp_path, encoded(picture, kind)), OddError)
        assert abs(found.astype(int) - (0, 127, 255)).max() <= 3
    data = encoded(picture, "JPEG")
    at = data.index(b"\xff\xee")
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    with pytest.raises(OddError, match="CMYK colours that do not say what they mean"):
        read_picture(write(tmp_path, data[:at] + data[at + 2 + length :]), OddError)


# What may be opened


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF or HEIC"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "AVIF or HEIC"),
        (b"DDS |\0\0\0" + bytes(120), "DDS"),
        (b"BLP2" + bytes(200), "BLP"),
        (b"P6 2 2 255 aaaaaaaaaaaa", "something else"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"", "an empty file"),
        (b"text", "something else"),
    ],
)
@pytest.mark.parametrize("reader", [read_picture, read_indices])
def test_formats_that_are_not_named_are_not_opened(tmp_path, reader, data, words):
    with pytest.raises(OddError, match=f"a.png: cannot be read as .*: must be .*, got .*{words}"):
        reader(write(tmp_path, data), OddError)


def test_no_program_is_started_and_pillow_is_not_asked_to_guess(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("guessed, or started a program")

    monkeypatch.setattr(Image, "open", never)
    monkeypatch.setattr("subprocess.Popen.__init__", never)
    for reader in (read_picture, read_indices):
        with pytest.raises(OddError, match="EPS"):
            reader(write(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), OddError)
    assert read_picture(write(tmp_path, encoded(noise(4, 4), "PNG"))).shape == (4, 4, 3)


def test_whatever_a_decoder_raises_names_the_file(tmp_path):
    broken = png(noise(4, 4, 1), 8, extra=chunk(b"iCCP", b"x\0"))  # IndexError in Pillow's reader of profiles
    for reader in (read_picture, read_indices):
        with pytest.raises(OddError, match=r"a\.png: cannot be read as .*: index out of range"):
            reader(write(tmp_path, broken), OddError)


@pytest.mark.parametrize("reader", [read_picture, read_indices])
@pytest.mark.filterwarnings("ignore")
def test_random_changes_end_in_one_error_or_a_picture(tmp_path, reader):
    """A little fuzzing: whatever the bytes are, the answer is an array or the error that was asked for."""
    random = np.random.default_rng(0)
    flat = Image.fromarray(noise(12, 16, 1)).convert("P")
    for kind in ("PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP"):
        whole = encoded(noise(12, 16) if kind in ("JPEG", "WEBP") else flat, kind)
        for _ in range(60):
            data = bytearray(whole)
            for at in random.integers(0, min(len(data), 200), 3):
                data[at] = random.integers(0, 256)
            with contextlib.suppress(OddError):  # anything else fails
                assert reader(write(tmp_path, bytes(data)), OddError, max_pixels=10**6).size > 0


def test_only_ordinary_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        folder = os.getcwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            listening.bind("socket.png")
        finally:
            os.chdir(folder)
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        for name, words in (
            ("pipe.png", "ordinary"),
            ("socket.png", "ordinary"),
            ("zero.png", "ordinary"),
            (".", "dir"),
        ):
            for reader in (read_picture, read_indices):
                caught = []

                def attempt(reader=reader, name=name, caught=caught):
                    try:
                        reader(tmp_path / name, OddError)
                    except OddError as error:
                        caught.append(str(error))

                thread = threading.Thread(target=attempt, daemon=True)
                thread.start()
                thread.join(10)
                assert not thread.is_alive(), "it waits"
                assert words in caught[0]
    with pytest.raises(OddError, match="absent.png: no such file"):
        read_picture(tmp_path / "absent.png", OddError)


# Sizes


def header_only(kind):
    """Files of few bytes that say they have 60000 x 60000 pixels."""
    side = 60000
    if kind == "PNG":
        ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")
    if kind == "JPEG":
        data = bytearray(encoded(noise(8, 8), "JPEG"))
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
        return bytes(data)
    if kind == "TIFF":
        return tiff(noise(8, 8, 1), 8, [(256, side), (257, side), (278, side)])
    if kind == "BMP":
        data = bytearray(encoded(noise(8, 8), "BMP"))
        data[18:26] = struct.pack("<ii", side, side)
        return bytes(data)
    if kind == "GIF":
        data = bytearray(encoded(Image.fromarray(noise(8, 8, 1)), "GIF"))
        data[6:10] = struct.pack("<HH", side, side)
        return bytes(data)
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("reader", [read_picture, read_indices])
def test_sizes_are_bounded_before_anything_is_allocated(tmp_path, monkeypatch, kind, reader):
    def never(*args, **kwargs):
        raise AssertionError("decodes")

    if kind == "JPEG" and reader is read_indices:
        pytest.skip("refused already")
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    monkeypatch.setattr(cv2, "imdecode", never)
    path = write(tmp_path, header_only(kind))
    tracemalloc.start()
    try:
        with pytest.raises(OddError, match=r"must have at most 100000000 pixels \(max_pixels\), got 60000x60000"):
            reader(path, OddError)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reader", [read_picture, read_indices])
def test_the_bound_of_sizes_is_exact_and_an_argument(tmp_path, reader):
    path = write(tmp_path, encoded(noise(8, 9, 1), "PNG"))
    assert reader(path, OddError, max_pixels=72).shape[:2] == (8, 9)
    with pytest.raises(OddError, match="at most 71 pixels .*, got 9x8"):
        reader(path, OddError, max_pixels=71)


def test_pillows_own_bound_is_not_met_first(tmp_path, monkeypatch):
    """`max_pixels` alone decides of the commonest formats: Pillow's `open` would warn above a size, and refuse twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for kind in ("PNG", "JPEG", "BMP"):
        assert read_picture(write(tmp_path, encoded(noise(8, 9), kind)), OddError).shape == (8, 9, 3)


def test_text_and_profiles_of_a_png_are_bounded(tmp_path):
    bomb = zlib.compress(bytes(2**27), 9)
    for extra in (
        chunk(b"zTXt", b"a\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + bomb),
        chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
    ):
        path = write(tmp_path, png(noise(4, 4, 1), 8, extra=extra))
        tracemalloc.start()
        try:
            with pytest.raises(OddError, match="too large|too much"):
                read_picture(path, OddError)
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()


def test_tiles_of_a_tiff_are_bounded(tmp_path):
    data = tiff(noise(16, 16, 1), 8, [(322, 60000), (323, 60000), (324, 8), (325, 256)])
    with pytest.raises(OddError, match="tiles must have at most"):
        read_picture(write(tmp_path, data), OddError)


def test_files_larger_than_their_pixels_can_be_are_not_read(tmp_path):
    path = write(tmp_path, encoded(noise(8, 9), "JPEG"), "a.jpg")
    with path.open("r+b") as file:
        file.truncate(2**40)  # a hole: no disk is used
    with pytest.raises(OddError, match="must be smaller than its 100000000 pixels can be, got 1099511627776 bytes"):
        read_picture(path, OddError)
