"""From the bytes of an image file to RGB pixels, of which only those that are needed are computed."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from resnet_jax.errors import reason

# An image that is not compressed: this, height and width as 32-bit numbers, then its RGB bytes.
_RAW_MAGIC = b"RGB8"
_RAW_HEADER = struct.Struct("<4sII")
_UPRIGHT_MAGIC = b"TURN"  # before a file whose image is to be turned upright
# What is read, in Pillow's words, by what a file's name ends in. Pillow's other formats may start other programs.
FORMATS = {
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_PILLOWS = sorted(set(FORMATS.values()))
_MOST_PIXELS = 89_478_485  # where Pillow warns of a bomb; the largest photograph of ImageNet has 61 million
_MOST_RATIO = 100  # of the sides; with its shorter side resized to 256, a line of pixels would fill the memory
_BEHIND = (255, 255, 255)  # the colour that shows through transparent pixels: white, as a page does
_ORIENTATION = 0x0112  # a tag of EXIF
_MAX_SAMPLE_VALUE, _BITS_PER_SAMPLE = 281, 258  # tags of TIFF
_START, _SCAN, _END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # markers of a JPEG


class BrokenImageError(Exception):
    """An image that cannot be read; the message says why."""


class Window(NamedTuple):
    """A rectangle of an image, in pixels of it; its borders may lie between pixels."""

    left: float
    top: float
    width: float
    height: float


def encode_raw(image: np.ndarray) -> bytes:
    """Return RGB uint8 [H, W, 3] as bytes that decode() takes."""
    height, width, _ = image.shape
    return _RAW_HEADER.pack(_RAW_MAGIC, height, width) + image.tobytes()


def upright(data: bytes) -> bytes:
    """Return a file's content marked, so that open_image() turns the image as its camera says (EXIF)."""
    return _UPRIGHT_MAGIC + data


def orientation(image: Image.Image) -> int:
    """Return how the camera was held, as EXIF counts it: 1 is upright, as is an image that does not say."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of damaged EXIF, which harms no pixels
        return 1


def open_image(data: bytes) -> Image.Image:
    """Read the header of an image: format, mode and size are known, pixels are not decoded yet.

    Raises:
      BrokenImageError: no image of a format that is read, or one that claims to be enormous.
    """
    if data.startswith(_UPRIGHT_MAGIC):
        image = open_image(data[len(_UPRIGHT_MAGIC) :])
        return image if orientation(image) == 1 else ImageOps.exif_transpose(to_rgb(image))
    try:
        if data.startswith(_RAW_MAGIC):
            _, height, width = _RAW_HEADER.unpack_from(data)
            _check_size(width, height)
            return Image.frombuffer("RGB", (width, height), data[_RAW_HEADER.size :], "raw", "RGB", 0, 1)
        image = Image.open(io.BytesIO(data), formats=_PILLOWS)
        _check_size(*image.size)
        # An end before the last scan is that of a thumbnail; what some programs write behind the end does not matter.
        if data.startswith(_START) and not data.endswith(_END) and data.rfind(_END) < data.rfind(_SCAN):
            return _with_its_end(image, data)
        return image
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError("no image" if data else "the file is empty") from error
    except Exception as error:  # Pillow's readers raise what they please for a damaged file
        raise BrokenImageError(reason(error)) from error


def _with_its_end(image: Image.Image, data: bytes) -> Image.Image:
    """Return a JPEG that lacks nothing but its end marker with it, any other as it is, which cannot be decoded then.

    In a whole one the decoder skips what is between the last pixel and the end; in one that is cut short these bytes
    become pixels.
    """
    whole, stuffed = (Image.open(io.BytesIO(data + more + _END), formats=["JPEG"]) for more in (b"", b"\x5a" * 64))
    return Image.open(io.BytesIO(data + _END), formats=["JPEG"]) if whole == stuffed else image


def _check_size(width: int, height: int) -> None:
    """Check a size that nothing was allocated for yet."""
    if width < 1 or height < 1:
        raise BrokenImageError(f"{width}x{height} pixels")
    if width * height > _MOST_PIXELS:
        raise BrokenImageError(f"{width}x{height} pixels are more than {_MOST_PIXELS:,}")
    if max(width, height) > _MOST_RATIO * min(width, height):
        raise BrokenImageError(f"{width}x{height} pixels: one side is more than {_MOST_RATIO} times the other")


def decode(data: bytes) -> np.ndarray:
    """Return RGB uint8 [H, W, 3] of to_rgb().

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    return np.asarray(to_rgb(open_image(data)))


def decode_window(image: Image.Image, window: Window, size: int, *, mirrored: bool = False) -> np.ndarray:
    """Resize a window of an image to RGB uint8 [size, size, 3].

    The result is what resizing the whole image and then cropping would give, but only the crop is computed, and where
    the image is at least twice as large as needed a JPEG is decoded at a half, a quarter or an eighth of its size.

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    width, height = image.size
    image = to_rgb(image, (int(width * size / window.width), int(height * size / window.height)))
    x, y = image.width / width, image.height / height
    box = (
        window.left * x,
        window.top * y,
        min((window.left + window.width) * x, image.width),
        min((window.top + window.height) * y, image.height),
    )
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def to_rgb(image: Image.Image, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image; a JPEG perhaps at a fraction of its size, but not smaller than `at_least` (width, height).

    Grey and CMYK are converted, more than 8 bits scaled by the range of their format; transparent pixels show
    white.

    Raises:
      BrokenImageError: it cannot be decoded, or its numbers have no range.
    """
    try:
        if at_least:
            image.draft("RGB", at_least)
        image.load()
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (*_BEHIND, 255)), image).convert("RGB")
        if image.mode.startswith(("I", "F")):
            white = _white(image)
            values = np.asarray(image).astype(np.float32) * (255 / white)
            image = Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's readers raise what they please for a damaged file
        raise BrokenImageError(reason(error)) from error


def _white(image: Image.Image) -> int:
    """Return the number that white has in an image of more than 8 bits.

    Raises:
      BrokenImageError: nothing says so, as of floating-point numbers.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if image.mode.startswith("I;16"):
        largest, bits = tags.get(_MAX_SAMPLE_VALUE, 0), tags.get(_BITS_PER_SAMPLE, 16)
        first = [int(value[0] if isinstance(value, tuple) else value) for value in (largest, bits)]
        return first[0] or 2 ** first[1] - 1
    if image.mode == "I" and image.format == "PPM":
        return 65_535  # Pillow has scaled it
    kind = "floating-point" if image.mode == "F" else "32-bit"
    raise BrokenImageError(f"{kind} numbers, for which no file says what is white: save it with 8 or 16 bits")
