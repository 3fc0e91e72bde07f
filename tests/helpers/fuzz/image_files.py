"""Sound images of every format that is read, and edits of their structure.

Damaged bytes rarely come past a checksum; so parts of the structure (PNG's chunks, JPEG's segments,
TIFF's entries, headers) are changed as well, with checksums that fit again.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import tifffile
from PIL import Image

from tests.helpers.fuzz.mutations import NUMBERS, mutate_bytes

PNG = b"\x89PNG\r\n\x1a\n"
SIZES = (0, 1, 2, 100, 5000, 30_000, 65_535, 100_000, 2**31 - 1, 2**32 - 1)
EXIF = 0x8769


def sound_images() -> dict[str, bytes]:
    """Make small images, by format and kind."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (19, 23, 3), dtype=np.uint8)
    rgb[4:12] //= 3
    gray, alpha = rgb[..., 0], rng.integers(0, 256, (19, 23), dtype=np.uint8)
    deep = rng.integers(0, 65536, (19, 23), dtype=np.uint16)
    colour = Image.fromarray(rgb)
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010E] = "an image"

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    def tiff(values: np.ndarray, **options: object) -> bytes:
        file = io.BytesIO()
        tifffile.imwrite(file, values, **options)
        return file.getvalue()

    found = {
        "png rgb": saved(colour, "PNG"),
        "png exif": saved(colour, "PNG", exif=turned),
        "png gray": saved(Image.fromarray(gray), "PNG"),
        "png 1": saved(Image.fromarray(gray).convert("1"), "PNG"),
        "png palette": saved(colour.quantize(40), "PNG"),
        "png palette clear": saved(colour.quantize(40), "PNG", transparency=3),
        "png rgba": saved(rgba, "PNG"),
        "png gray alpha": saved(rgba.convert("LA"), "PNG"),
        "png clear colour": saved(colour, "PNG", transparency=(1, 2, 3)),
        "png deep": saved(Image.fromarray(deep), "PNG"),
        "png deep rgb": _deep_png(np.dstack([deep, deep // 2, 65535 - deep])),
        "jpeg": saved(colour, "JPEG", quality=90),
        "jpeg progressive": saved(colour, "JPEG", progressive=True, exif=turned),
        "jpeg gray": saved(Image.fromarray(gray), "JPEG"),
        "jpeg cmyk": saved(colour.convert("CMYK"), "JPEG"),
        "bmp": saved(colour, "BMP"),
        "bmp gray": saved(Image.fromarray(gray), "BMP"),
        "bmp 1": saved(Image.fromarray(gray).convert("1"), "BMP"),
        "gif": saved(colour.quantize(16), "GIF"),
        "gif frames": saved(
            colour.quantize(9), "GIF", save_all=True, append_images=[colour.rotate(90).quantize(9)]
        ),
        "webp": saved(colour, "WEBP", quality=80, exif=turned),
        "webp lossless": saved(rgba, "WEBP", lossless=True),
        "ppm": saved(colour, "PPM"),
        "tga": saved(rgba, "TGA"),
        "tiff pillow": saved(colour, "TIFF", exif=turned),
        "tiff lzw": saved(colour, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": saved(colour, "TIFF", compression="jpeg"),
        "tiff gray": tiff(gray, photometric="minisblack"),
        "tiff white": tiff(gray, photometric="miniswhite"),
        "tiff deep": tiff(deep, photometric="minisblack"),
        "tiff deep white": tiff(deep, photometric="miniswhite", byteorder=">"),
        "tiff deep rgb": tiff(np.dstack([deep] * 3), photometric="rgb", compression="zlib"),
        "tiff tiles": tiff(rgb, photometric="rgb", tile=(16, 16)),
        "tiff planar": tiff(
            np.moveaxis(rgb, -1, 0).copy(), photometric="rgb", planarconfig="separate"
        ),
        "tiff big": tiff(rgb, photometric="rgb", bigtiff=True, byteorder=">"),
        "tiff signed": tiff((deep.astype(np.int32) - 32768).astype(np.int16)),
        "tiff pages": tiff(np.stack([deep, deep]), photometric="minisblack"),
    }
    for kind in ("AVIF", "JPEG2000"):
        try:
            found[kind.lower()] = saved(colour, kind)
        except (KeyError, OSError, ValueError):
            continue  # this Pillow was built without it
    return found


def _deep_png(values: np.ndarray) -> bytes:
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return _write_png(parts)


def _write_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [PNG]
    for kind, content in chunks:
        checksum = zlib.crc32(kind + content)
        parts.append(struct.pack(">I", len(content)) + kind + content)
        parts.append(struct.pack(">I", checksum))
    return b"".join(parts)


def _read_png(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def _edit_png(choose: random.Random, data: bytes) -> bytes:
    chunks = _read_png(data)
    if not chunks:
        return mutate_bytes(choose, data)
    at = choose.randrange(len(chunks))
    kind, content = chunks[at]
    how = choose.randrange(7)
    if how == 0:
        content = chunks[0][1]
        field = choose.randrange(7)
        if field < 2:  # width or height
            content = bytearray(content)
            content[4 * field : 4 * field + 4] = struct.pack(">I", choose.choice(SIZES))
        else:  # depth, colour type, compression, filter, interlace
            content = bytearray(content)
            content[6 + field] = choose.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        chunks[0] = (b"IHDR", bytes(content))
    elif how == 1:
        del chunks[at]
    elif how == 2:
        chunks.insert(choose.randrange(len(chunks) + 1), chunks[at])
    elif how == 3:
        chunks[at] = (kind, mutate_bytes(choose, content))
    elif how == 4 and kind == b"IDAT":  # other pixels, more or fewer than the header says
        raw = zlib.decompress(content)
        changed = choose.choice((raw[:-30], raw * 3, b"\5" + raw[1:], bytes(50_000_000)))
        chunks[at] = (kind, zlib.compress(changed, 9))
    elif how == 5:
        name = choose.choice((b"tRNS", b"PLTE", b"eXIf", b"zTXt", b"iCCP", b"acTL", b"fdAT"))
        content = choose.randbytes(choose.choice((0, 1, 6, 300)))
        if name in (b"zTXt", b"iCCP"):  # a bomb of text
            content = b"x\0\0" + zlib.compress(bytes(choose.choice((10, 30_000_000))))
        chunks.insert(choose.randint(1, len(chunks)), (name, content))
    else:
        chunks = choose.sample(chunks, len(chunks))
    return _write_png(chunks)


def _edit_jpeg(choose: random.Random, data: bytes) -> bytes:
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = struct.unpack(">H", data[at + 2 : at + 4])[0]
        segments.append(data[at : at + 2 + size])
        at += 2 + size
    rest = data[at:]
    if not segments:
        return mutate_bytes(choose, data)
    place = choose.randrange(len(segments))
    how = choose.randrange(6)
    if how == 0:
        del segments[place]
    elif how == 1:
        segments.insert(choose.randrange(len(segments) + 1), segments[place])
    elif how == 2:
        for index, segment in enumerate(segments):
            if 0xC0 <= segment[1] <= 0xC2:  # the frame's header
                size = struct.pack(">H", choose.choice(SIZES) % 65536)
                field = choose.choice((5, 7))
                segments[index] = segment[:field] + size + segment[field + 2 :]
    elif how == 3:
        content = mutate_bytes(choose, segments[place][4:])[:60_000]
        segments[place] = segments[place][:2] + struct.pack(">H", len(content) + 2) + content
    elif how == 4:
        exif = b"Exif\0\0" + choose.choice((b"II*\0", b"MM\0*", b"")) + choose.randbytes(40)
        segments.insert(0, b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
    else:
        segments = choose.sample(segments, len(segments))
    return data[:2] + b"".join(segments) + rest


def _edit_tiff(choose: random.Random, data: bytes) -> bytes:
    order = "<" if data[:1] == b"I" else ">"
    if data[2:4] not in (b"*\0", b"\0*"):
        return mutate_bytes(choose, data[:200]) + data[200:]
    start = struct.unpack(order + "I", data[4:8])[0]
    if start + 2 > len(data):
        return mutate_bytes(choose, data)
    count = struct.unpack(order + "H", data[start : start + 2])[0]
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2))):
        at = start + 2 + 12 * choose.randrange(max(1, count))
        if at + 12 > len(changed):
            break
        how = choose.randrange(4)
        if how == 0:
            changed[at : at + 2] = struct.pack(order + "H", choose.choice((0, 256, 258, 262, 274)))
        elif how == 1:
            changed[at + 2 : at + 4] = struct.pack(order + "H", choose.randrange(20))
        elif how == 2:
            changed[at + 4 : at + 8] = struct.pack(order + "I", choose.choice(NUMBERS) % 2**32)
        else:
            changed[at + 8 : at + 12] = struct.pack(order + "I", choose.choice(NUMBERS) % 2**32)
    return bytes(changed)


def _edit_head(choose: random.Random, data: bytes) -> bytes:
    """Change a number in the first bytes, where sizes and depths stand."""
    size, at = choose.choice((1, 2, 4)), choose.randrange(min(len(data), 60) + 1)
    value = choose.choice((*SIZES, *NUMBERS)) % 256**size
    new = value.to_bytes(size, choose.choice(("little", "big")))
    return data[:at] + new + data[at + size :]


_EDITS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "png": _edit_png,
    "jpeg": _edit_jpeg,
    "tiff": _edit_tiff,
}


def mutate_image(choose: random.Random, images: dict[str, bytes]) -> tuple[str, bytes]:
    """Take one of the images and damage it; return which, and its bytes."""
    name = choose.choice(list(images))
    data, kind = images[name], name.partition(" ")[0]
    how = choose.randrange(10)
    if how <= 4 and kind in _EDITS:
        return name, _EDITS[kind](choose, data)
    if how <= 6:
        return name, _edit_head(choose, data)
    same = [other for key, other in images.items() if key.startswith(kind)]
    return name, mutate_bytes(choose, data, same)
