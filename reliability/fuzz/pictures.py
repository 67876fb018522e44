"""Small image files of every kind that is read, and what is wrong with images in the wild and in attacks."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from reliability.fuzz.hostile import deflated_zeros
from reliability.fuzz.mutations import damage_repeatedly, splice

_SAVES: dict[str, tuple[str, dict[str, object]]] = {  # name of the file: mode, options of Image.save
    "rgb.jpg": ("RGB", {"quality": 90}),
    "progressive.jpeg": ("RGB", {"progressive": True}),
    "grey.JPEG": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "rgb.png": ("RGB", {}),
    "palette.png": ("P", {"transparency": 0}),
    "alpha.png": ("RGBA", {}),
    "deep.png": ("I;16", {}),
    "bits.png": ("1", {}),
    "palette.gif": ("P", {}),
    "rgb.webp": ("RGB", {}),
    "lossless.webp": ("RGBA", {"lossless": True}),
    "rgb.bmp": ("RGB", {}),
    "palette.bmp": ("P", {}),
    "rgb.ppm": ("RGB", {}),
    "raw.tif": ("RGB", {}),
    "lzw.tiff": ("RGB", {"compression": "tiff_lzw"}),
    "deflate.tiff": ("L", {"compression": "tiff_deflate"}),
}
_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM"}


def make_pictures(seed: int = 0) -> dict[str, bytes]:
    """Return an image file for each format and mode, 20 pixels wide and 16 high, by its name."""
    pixels = np.random.RandomState(seed).randint(0, 256, (3, 4, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((20, 16))
    files = {}
    for name, (mode, options) in _SAVES.items():
        file, suffix = io.BytesIO(), name.split(".")[-1].lower()
        converted = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        converted.save(file, _FORMATS.get(suffix, suffix.upper()), **options)
        files[name] = file.getvalue()
    frames = [image.convert("P"), image.rotate(90).convert("P")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return files | {"animated.gif": file.getvalue()}


_SIZES = (
    (0, 0), (0, 5), (1, 1), (65535, 65535), (30000, 30000), (20000, 20000), (13000, 13000), (1, 60000), (60000, 1),
    (16383, 16383), (2**31 - 1, 1), (2**31, 2**31), (2**32 - 1, 2**32 - 1), (2**32 - 1, 1),
)  # fmt: skip


def png(width: int, height: int, compressed: bytes, colour: int = 2, extra: bytes = b"") -> bytes:
    """Return a PNG file whose check sums are right whatever it claims."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", compressed) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _zlib_stream(raw: bytes) -> bytes:
    return b"\x78\x9c" + raw + bytes(4)


def bomb(rng: random.Random) -> bytes:
    """Return a small file that claims to be a large image, or is one."""
    width, height = rng.choice(_SIZES)
    raw = deflated_zeros(1 << 27)
    choices: list[Callable[[], bytes]] = [
        lambda: png(width, height, _zlib_stream(raw)),
        lambda: png(width, height, zlib.compress(bytes(100)), colour=rng.choice((0, 2, 3, 4, 6))),
        lambda: png(20, 16, _zlib_stream(raw)),
        lambda: png(9, 9, b"", extra=_chunk(b"zTXt", b"a\0\0" + _zlib_stream(raw))),
        lambda: png(9, 9, b"", extra=_chunk(b"iCCP", b"a\0\0" + _zlib_stream(raw))),
        lambda: b"GIF89a" + struct.pack("<HH", width % 65536, height % 65536) + b"\x80\0\0" + bytes(6) + b",",
        lambda: b"P6 %d %d 255\n" % (width, height) + bytes(60),
        lambda: b"P3 %d %d 255\n" % (width, height) + b"1 2 3 " * 20,
        lambda: b"P5 " + b"9" * 5000 + b" 1 255\n",
        lambda: b"RGB8" + struct.pack("<II", width % 2**32, height % 2**32) + bytes(60),
        lambda: _bmp(width, height, rng.choice((0, 1, 2, 3)), rng.choice((1, 4, 8, 24, 32))),
        lambda: _webp(width, height),
        lambda: _tiff(width % 2**32, height % 2**32, rng.choice((1, 5, 8, 32773))),
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) print\n",
        lambda: b"\x00\x00\x01\x00\x01\x00" + bytes(16) + rng.randbytes(40),  # .ico
        lambda: b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(40),  # .psd
        lambda: png(2, 50_000, zlib.compress(bytes(7 * 50_000))),
        lambda: png(50_000, 2, zlib.compress(bytes(150_001 * 2))),
    ]
    return rng.choice(choices)()


def _bmp(width: int, height: int, compression: int, bits: int) -> bytes:
    signed = [(size + 2**31) % 2**32 - 2**31 for size in (width, height)]
    header = struct.pack("<IiiHHIIiiII", 40, *signed, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + header + b"\x00\x02\xff\xff" * 25


def _webp(width: int, height: int) -> bytes:
    canvas = ((width - 1) % 2**24).to_bytes(3, "little") + ((height - 1) % 2**24).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    chunk += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", 24) + bytes(24)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def _tiff(width: int, height: int, compression: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, compression), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, 60))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(range(60))


def damaged(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Return a damaged image file."""
    kind = rng.random()
    if kind < 0.12:
        return bomb(rng)
    if kind < 0.22:
        return splice(others)(rng, content)
    changed = damage_repeatedly(rng, content)
    return _mend_png(changed) if rng.random() < 0.5 else changed


def _mend_png(content: bytes) -> bytes:
    """Make the check sums of a PNG file right, so that what it says is believed."""
    at, mended = 8, bytearray(content)
    while content.startswith(b"\x89PNG\r\n\x1a\n") and at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 8 + length
        if end + 4 > len(content):
            break
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(mended)
