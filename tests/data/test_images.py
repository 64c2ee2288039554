"""Odd pictures: what is read must be right, and the rest is refused with a reason."""

import base64
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from making import OddError, chunk, encoded, noise, png, tiff, write
from PIL import Image, ImageOps

from pspnet_fast.data import images
from pspnet_fast.data.images import read_indices, read_picture

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
    """Pillow takes the missing ones as 0, which is a class; of an interlaced one the last row may be there."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    pixels = np.full((7, 5, channels), interlaced, np.uint8)
    extra = chunk(b"PLTE", bytes(48)) if colour_type == 3 else b""
    whole = png(pixels, bits, colour_type, extra, interlaced)
    readers = [read_picture] if channels > 1 or bits == 16 else [read_picture, read_indices]
    for reader in readers:
        if bits == 16:
            continue  # so dark is refused
        assert reader(write(tmp_path, whole), OddError).shape[:2] == (7, 5)
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
    for kind in ("JPEG", "PNG", "WEBP"):
        for exif in (
            b"Exif\0\0",
            b"Exif\0\0XX*\0\x08\0\0\0",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0II*\0\x08\0\0\0\xff",
        ):
            data = encoded(noise(8, 16), kind, exif=exif)
            found = read_picture(write(tmp_path, data), OddError, upright=True)
            assert (found == np.asarray(Image.open(io.BytesIO(data)))).all()
    assert len(said()) >= 1
    assert all("its EXIF data cannot be read, it is taken as not turned: not a TIFF file" in each for each in said())


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
    found = read_picture(write(tmp_path, tiff(numbers >> 4, 12)), OddError)  # these say that they are twelve
    assert (found == (numbers >> 8)[..., None]).all()
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
