"""What may be opened, and how large: nothing is guessed, waited for, or allocated on a header's word."""

import contextlib
import os
import re
import socket
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from making import OddError, chunk, encoded, noise, png, tiff, write
from PIL import Image, ImageFile

from pspnet_fast.data import images
from pspnet_fast.data.images import read_indices, read_picture


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


def test_scans_of_a_jpeg_are_bounded(tmp_path):
    whole = encoded(noise(16, 16), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    scan = whole[last:-2]
    assert read_picture(write(tmp_path, whole[:-2] + scan * 300 + whole[-2:]), OddError).shape == (16, 16, 3)
    with pytest.raises(OddError, match="must have at most 500 scans"):
        read_picture(write(tmp_path, whole[:-2] + scan * 600 + whole[-2:]), OddError)


def test_files_are_opened_in_one_place():
    """Elsewhere nothing decodes a picture; charts read back what Matplotlib drew, as PNG."""
    folder = Path(images.__file__).parents[1]
    opening = re.compile(r"Image\.open\((?!drawn, formats=\(\"PNG\",\)\))|imread|imdecode|ImageFile\.Parser")
    assert [path.name for path in sorted(folder.rglob("*.py")) if opening.search(path.read_text())] == ["images.py"]
