"""What the tests of this folder write: pictures of every kind, byte by byte where no library would, and small datasets."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from pspnet_fast.data.classes import CLASSES, Classes

HEIGHT, WIDTH = 6, 9
THREE = Classes(("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))


def write_picture(path, size=(HEIGHT, WIDTH), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_labels(path, values, palette=False):
    """Labels, row by row from `values`, repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))
    picture = Image.fromarray(labels)
    if palette:
        picture = Image.frombytes("P", (WIDTH, HEIGHT), labels.tobytes())
        picture.putpalette([channel for colour in CLASSES["voc2012"].colours for channel in colour])
    picture.save(path)
    return labels


def ade20k(root, part="training", names=("x1", "x2", "x3"), values=(0, 1, 150)):
    for name in names:
        write_picture(root / "images" / part / f"{name}.jpg")
        write_labels(root / "annotations" / part / f"{name}.png", values)
    return root


def voc2012(root, names, values=(0, 20, 255), palette=True, folder="SegmentationClass", split="train"):
    for name in names:
        write_picture(root / "JPEGImages" / f"{name}.jpg")
        write_labels(root / folder / f"{name}.png", values, palette)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def cityscapes(root, kinds=("labelIds",), split="train", values=None):
    for name in ("bonn/bonn_000000_000019", "ulm/ulm_000001_000019"):
        write_picture(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png")
        for kind in kinds:
            default = range(34) if kind == "labelIds" else [*range(19), 255]
            write_labels(root / "gtFine" / split / f"{name}_gtFine_{kind}.png", values or default)


def listed(root, text, values=(0, 2, 255)):
    write_picture(root / "p" / "a.jpg")
    write_labels(root / "l" / "a.png", values)
    (root / "list.txt").write_text(text)
    return root / "list.txt"


class OddError(ValueError):
    """What the readers are told to raise here."""


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
