"""Every picture and every label file is read here: for training, for evaluation and for prediction alike.

A file is known by what it holds, never by its ending, and nothing is decoded before it is known to be an ordinary file of a
format in `PICTURES` or `LABELS`, to be whole, and to be of a size that may be allocated. Decoders are named one by one:
Pillow's `open` tries all that it has, and one of them runs Ghostscript.

What a file does not say is refused, or assumed with a word (a warning, once a file): the range of 16-bit pixels, transparency,
further frames.

Past 300 lines, because what a format leaves unsaid is decided beside its reader, for pictures and labels together.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..extras import install

try:
    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        ImageFile,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )
except ImportError as error:
    raise ImportError(f"reading pictures needs Pillow ({error}): {install('predict')}") from error

_LOG = logging.getLogger(__name__)

MAX_PIXELS = 10**8
"""Pixels that a picture may have where nothing else is said: 100 megapixels, 300 MB in RGB."""

SUFFIXES = (".jpg", ".jpeg", ".png")
"""How pictures end that are looked for in a folder, in small letters."""

_FORMATS: dict[str, tuple[re.Pattern[bytes], type[ImageFile.ImageFile]]] = {
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
    "BMP": (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    "WebP": (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
}
PICTURES = tuple(_FORMATS)
LABELS = ("PNG", "TIFF", "BMP", "GIF")
"""Formats that give back the numbers that were put in."""

_STRANGERS = (
    ("EPS", re.compile(rb"%!PS|\xc5\xd0\xd3\xc6")),
    ("PDF", re.compile(rb"%PDF")),
    ("AVIF or HEIC", re.compile(rb"....ftyp(avi|hei|hev|mif)", re.DOTALL)),
    ("JPEG 2000", re.compile(rb"\0\0\0\x0cjP|\xff\x4f\xff\x51")),
    ("OpenEXR", re.compile(rb"v/1\x01")),
    ("a texture (DDS, BLP)", re.compile(rb"DDS |BLP[12]")),
    ("a Photoshop document", re.compile(rb"8BPS")),
    ("NumPy's numbers", re.compile(rb"\x93NUMPY")),
    ("a Git LFS pointer, not the file (git lfs pull fetches it)", re.compile(rb"version https://git-lfs")),
    ("text with markup, such as a web page", re.compile(rb"\s*<")),
)

# A marker of a JPEG: within the coded data a byte 255 is followed by 0 or by a restart marker, and may stand before others.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# First row and column, and the steps, of the passes of an interlaced PNG (section 8.2 of its specification).
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_SCANS = 500  # encoders write about ten; libjpeg-turbo's own fuzz tests stop there
_LOSSLESS_TIFF = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000)  # none, CCITT, LZW, deflate, packbits, LZMA, Zstandard
_ORIENTATION = 0x0112


class _RefusedError(Exception):
    """Why a file is not read."""


@lru_cache(maxsize=4096)
def _say(sentence: str) -> None:
    """A warning, once: training reads a file many times."""
    _LOG.warning(sentence)


@contextlib.contextmanager
def _reading(path: Path, what: str, error: Callable[[str], Exception]) -> Iterator[None]:
    """Whatever a decoder raises becomes one `error` that names the file: damaged ones end them in every possible way."""
    try:
        yield
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except _RefusedError as reason:
        raise error(f"{path}: cannot be read as {what}: {reason}") from None
    except Exception as reason:
        plain = isinstance(reason, (OSError, SyntaxError, ValueError)) and str(reason)
        raise error(
            f"{path}: cannot be read as {what}: {reason if plain else f'{type(reason).__name__} {reason}'.strip()}"
        ) from reason


def read_picture(
    path: Path, error: Callable[[str], Exception] = ValueError, *, upright: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """A picture in RGB, uint8 (H, W, 3).

    OpenCV, where it is installed, decodes the commonest JPEGs, as it is the faster; Pillow all else. (Data changed in the
    middle of a JPEG may be seen by no decoder: the format has no checksum.)

    Args:
        path: a regular file of a format in PICTURES. The first picture of several is read, and that is said.
        error: what to raise.
        upright: turn it as its EXIF orientation says; False gives the pixels as they are stored.
        max_pixels: height times width at most. (Twice Pillow's MAX_IMAGE_PIXELS bounds TIFF, GIF and WebP, too.)

    Raises:
        error: no such file, no picture, a truncated one, one of more pixels, or one whose numbers have no known range.
    """
    with _reading(path, "a picture", error):
        data = _content(path, PICTURES, max_pixels)
        file, bits = _header(data, max_pixels)
        if file.format == "PNG":
            _check_rows(file, data)
        turn = _turn(path, file, data) if upright or file.format == "TIFF" else 1
        if getattr(file, "is_animated", False):
            _say(f"{path}: holds several pictures, the first is read")
        if file.format == "TIFF" and turn != 1:  # Pillow turns it
            if not upright:
                raise _RefusedError(
                    "a TIFF file that its Orientation turns: labels are drawn on the pixels as stored, turn these"
                )
            turn = 1
        pixels = _fast(data, file) if file.format == "JPEG" and file.mode in ("L", "RGB") else None
        pixels = _rgb(path, file, bits) if pixels is None else pixels
        return np.ascontiguousarray(_turned(pixels, turn)) if upright else pixels


def read_indices(
    path: Path, error: Callable[[str], Exception] = ValueError, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The numbers that a label file holds, (H, W), integers: grey values or a palette's indices, as stored and not scaled.

    So a 4-bit PNG gives 0 to 15 and a mask of one bit 0 and 1. A palette's colours, transparent or not, do not matter.

    Args:
        path: a regular file of a format in LABELS; JPEG and WebP change numbers, and are refused.
        error: what to raise.
        max_pixels: height times width at most.

    Raises:
        error: no such file, another format, several channels, several pictures, or a truncated file.
    """
    with _reading(path, "labels", error):
        data = _content(path, LABELS, max_pixels)
        file, bits = _header(data, max_pixels)
        if getattr(file, "is_animated", False):
            raise _RefusedError("it holds several pictures, and labels must be one")
        if file.format == "TIFF":
            _check_label_tiff(file)
        if file.format == "GIF" and file.tile[0][1] != (0, 0, *file.size):
            raise _RefusedError("a GIF file whose picture does not fill it: the rest has no label")
        if file.mode not in ("1", "L", "P") and not (file.mode[0] == "I" and bits in (12, 16, 32)):
            raise _RefusedError(
                f"must be one channel of whole numbers or of a palette's indices, got Pillow's mode {file.mode}"
            )
        if file.format == "PNG":
            _check_rows(file, data)
        values: np.ndarray = np.array(file)
        if file.mode == "1":
            return values.astype(np.uint8)
        if file.mode == "L" and bits in (2, 4):
            values //= np.uint8(255 // (2**bits - 1))  # Pillow multiplies grey values by that
        return values


def orientation(path: Path, *, max_pixels: int = MAX_PIXELS) -> int:
    """The EXIF orientation of a picture, 1 to 8; 1, as it is stored, where it says none or cannot be read."""
    try:
        data = _content(path, PICTURES, max_pixels)
        return _turn(path, _header(data, max_pixels)[0], data)
    except Exception:  # whoever reads its pixels is told why
        return 1


def _content(path: Path, formats: tuple[str, ...], max_pixels: int) -> bytes:
    """The bytes of a whole file of one of the formats, without what follows its end."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise _RefusedError("is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise _RefusedError("is not an ordinary file")  # a pipe would be waited for, a device has no end
    with path.open("rb") as opened:
        head = opened.read(64)
        kind = _kind(head)
        if kind is None:
            stranger = next((name for name, begins in _STRANGERS if begins.match(head)), "something else")
            raise _RefusedError(f"must be {_or(formats)}, got {stranger if head else 'an empty file'}")
        if kind not in formats:
            reason = "which does not keep the numbers exactly: " if kind in ("JPEG", "WebP") else ""
            raise _RefusedError(f"must be {_or(formats)}, got {kind}, {reason}write labels without loss")
        if status.st_size > 16 * max_pixels + 2**26:
            raise _RefusedError(f"must be smaller than its {max_pixels} pixels can be, got {status.st_size} bytes")
        data = head + opened.read()
    if kind in ("JPEG", "PNG"):
        end = (_jpeg_end if kind == "JPEG" else _png_end)(data)
        return data if end == len(data) else data[:end]
    return data


def _kind(head: bytes) -> str | None:
    return next((name for name, (begins, _) in _FORMATS.items() if begins.match(head)), None)


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _jpeg_end(data: bytes) -> int:
    """Where a JPEG ends: after the end marker that follows its scans.

    Segments are skipped by their length, so a thumbnail in one ends nothing. Telephones append a film, and others anything.
    """
    at, scans = 2, 0
    while found := _MARKER.search(data, at):
        marker, at = data[found.start() + 1], found.end()
        if marker == 0xD9 and scans:
            return at
        if marker in (0xD8, 0xD9):
            raise _RefusedError("the JPEG is damaged: another begins, or it ends, before its pixels")
        if marker == 0x01:  # stands alone
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2:
            raise _RefusedError("the JPEG is damaged or truncated")
        scans += marker == 0xDA
        if scans > _SCANS:
            raise _RefusedError(f"must have at most {_SCANS} scans: a progressive JPEG takes time for each")
        at += length
    raise _RefusedError("the JPEG is truncated")


def _png_end(data: bytes) -> int:
    """Where a PNG ends: after its chunk IEND. The checksums of the chunks that hold the picture are verified."""
    view, at = memoryview(data), 8
    while True:
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if end > len(view):
            raise _RefusedError("the PNG is truncated")
        name = bytes(view[at + 4 : at + 8])
        if (name == b"IHDR") != (at == 8):
            raise _RefusedError("the PNG is damaged: it must have one header, at its beginning")
        # A small first letter says that the picture can do without the chunk.
        if not name[0] & 32 and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise _RefusedError(f"the PNG is damaged: chunk {name!r} does not have its checksum")
        if name == b"IEND":
            return end
        at = end


def _header(data: bytes, max_pixels: int) -> tuple[ImageFile.ImageFile, int]:
    """The file, opened but not decoded, and its bits a channel."""
    kind = _kind(data)
    assert kind is not None
    file = _FORMATS[kind][1](io.BytesIO(data))
    width, height = file.size
    if width < 1 or height < 1:
        raise _RefusedError(f"must have pixels, got {width}x{height}")
    if width * height > max_pixels:
        raise _RefusedError(f"must have at most {max_pixels} pixels (max_pixels), got {width}x{height}")
    if isinstance(file, PngImagePlugin.PngImageFile):
        return file, data[24]
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        if file.tag_v2.get(322, 1) * file.tag_v2.get(323, 1) > max_pixels:
            raise _RefusedError(f"a TIFF file's tiles must have at most {max_pixels} pixels (max_pixels)")
        return file, file.tag_v2.get(258, (1,))[0]
    if isinstance(file, BmpImagePlugin.BmpImageFile):
        _check_bmp(file, int.from_bytes(data[24:26] if data[14] == 12 else data[28:30], "little"))
    return file, 8


def _check_rows(file: ImageFile.ImageFile, data: bytes) -> None:
    """Pillow takes the rows that a PNG lacks as 0, which is a class; looked for where the last row is 0."""
    interlaced = data[28] != 0
    width, height = file.size
    file.load()
    if not interlaced and np.asarray(file.crop((0, height - 1, width, height))).any():
        return
    bits = data[24] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[data[25]]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(height - row) // down), -(-(width - column) // right)) for row, column, down, right in passes]
    expected = sum(rows * (1 + -(-columns * bits // 8)) for rows, columns in sizes if columns > 0)
    inflate, at, found = zlib.decompressobj(), 8, 0
    while at < len(data) and not inflate.eof:
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            part = data[at + 8 : at + 8 + length]
            while part and found < expected:
                found += len(inflate.decompress(part, 2**20))
                part = inflate.unconsumed_tail
        at += 12 + length
    if found < expected:
        raise _RefusedError("the PNG has fewer pixels than its header says")


def _check_bmp(file: ImageFile.ImageFile, bits: int) -> None:
    """Pillow reads black-and-white palettes by the number of their colours, whatever the bits of a pixel are."""
    code, _, _, arguments = file.tile[0]
    expected = {1: ("1", "P;1"), 4: ("P;4",), 8: ("L", "P")}.get(bits)
    if code == "raw" and expected is not None and isinstance(arguments, tuple) and arguments[0] not in expected:
        raise _RefusedError(f"a BMP file of {bits} bits a pixel with this grey palette cannot be read: write PNG")


def _check_label_tiff(file: ImageFile.ImageFile) -> None:
    assert isinstance(file, TiffImagePlugin.TiffImageFile)
    compression, photometric = file.tag_v2.get(259, 1), file.tag_v2.get(262, 0)
    if compression not in _LOSSLESS_TIFF:
        raise _RefusedError(
            f"a TIFF file with compression {file.info.get('compression', compression)}, which may not keep the numbers "
            "exactly: write labels without loss"
        )
    if photometric not in (1, 3):
        raise _RefusedError(
            f"a TIFF file of photometric interpretation {photometric}: labels must count from black or have a palette"
        )
    if file.tag_v2.get(_ORIENTATION, 1) != 1:
        raise _RefusedError("a TIFF file that its Orientation turns: turn its pixels")


def _turn(path: Path, file: ImageFile.ImageFile, data: bytes) -> int:
    if file.format == "PNG" and b"eXIf" not in data and b"Orientation" not in data:
        return 1  # getexif() would decode the pixels, as such chunks may stand behind them
    try:
        found = file.getexif().get(_ORIENTATION, 1)
    except Exception as reason:  # of the picture itself nothing is wrong
        _say(f"{path}: its EXIF data cannot be read, it is taken as not turned: {reason}")
        return 1
    return found if found in range(1, 9) else 1


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Pixels (H, W, 3) as EXIF's orientation 1 to 8 shows them (Exif 2.32, section 4.6.4): a mirror, then a rotation."""
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _fast(data: bytes, file: ImageFile.ImageFile) -> np.ndarray | None:
    """A JPEG by OpenCV, or None where that is not installed or cannot."""
    try:
        import cv2
    except ImportError:  # prediction does without it
        return None
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return found if found is not None and found.shape[1::-1] == file.size else None


def _rgb(path: Path, file: ImageFile.ImageFile, bits: int) -> np.ndarray:
    """RGB of every mode of Pillow that has a known range."""
    mode = file.mode
    if mode.startswith("I;16") or (mode == "I" and file.format == "PNG"):  # convert() would clip these at 255
        if isinstance(file, TiffImagePlugin.TiffImageFile) and file.tag_v2.get(262) == 0:
            raise _RefusedError("a TIFF file of 16 bits that counts from white")
        deep = np.asarray(file)
        if bits == 16:
            _check_range(path, int(deep.max()) >> 8)
        return np.repeat((deep >> (bits - 8)).astype(np.uint8)[..., None], 3, 2)
    if mode in ("I", "F"):
        kind = "whole numbers of 32 bits or with a sign" if mode == "I" else "floating-point pixels"
        raise _RefusedError(f"{kind}, of no known range: convert them to eight bits")
    if mode == "LAB":
        raise _RefusedError("LAB colours: convert them to RGB")
    if mode == "CMYK" and (bits != 8 or (file.format == "JPEG" and "adobe" not in file.info)):
        raise _RefusedError(
            "CMYK colours that do not say what they mean (no marker of Adobe's, or 16 bits): convert to RGB"
        )
    file.load()
    picture = file.convert("LA") if mode == "La" else file
    if picture.has_transparency_data:
        transparent = int((np.asarray(picture.convert("RGBA"))[..., 3] < 255).sum())
        if transparent:
            _say(f"{path}: {transparent} pixels are transparent, they are read in the colours stored under them")
    pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    if bits == 16:  # of which Pillow kept the upper eight
        _check_range(path, int(pixels.max()))
    return pixels


def _check_range(path: Path, largest: int) -> None:
    """What 16-bit pixels mean is 0 to 65535 by the formats; cameras and microscopes store fewer bits in them.

    Args:
        path: the file.
        largest: the upper eight bits of the largest number.
    """
    if largest < 16:
        raise _RefusedError(
            "16-bit pixels that are all below 4096 are black, or of another range: convert them to eight bits"
        )
    if largest < 128:
        _say(f"{path}: 16-bit pixels are taken to go from 0 to 65535, and its largest is below {256 * (largest + 1)}")
