"""From the bytes of an image file to RGB pixels, of which only those that are needed are computed."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from resnet_jax.errors import reason

# An image that is not compressed: this, height and width as 32-bit numbers, then its RGB bytes.
_RAW_MAGIC = b"RGB8"
_RAW_HEADER = struct.Struct("<4sII")
# What is read, in Pillow's words, by what a file's name ends in. Pillow's other formats may start other programs.
FORMATS = {
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_MOST_PIXELS = 89_478_485  # where Pillow warns of a bomb; the largest photograph of ImageNet has 61 million
_MOST_RATIO = 100  # of the sides; with its shorter side resized to 256, a line of pixels would fill the memory


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


def open_image(data: bytes) -> Image.Image:
    """Read the header of an image: format, mode and size are known, pixels are not decoded yet.

    Raises:
      BrokenImageError: no image of a format that is read, or one that claims to be enormous.
    """
    try:
        if data.startswith(_RAW_MAGIC):
            _, height, width = _RAW_HEADER.unpack_from(data)
            _check_size(width, height)
            return Image.frombuffer("RGB", (width, height), data[_RAW_HEADER.size :], "raw", "RGB", 0, 1)
        image = Image.open(io.BytesIO(data), formats=list(FORMATS.values()))
        _check_size(*image.size)
        return image
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError("no image" if data else "the file is empty") from error
    except Exception as error:  # Pillow's readers raise what they please for a damaged file
        raise BrokenImageError(reason(error)) from error


def _check_size(width: int, height: int) -> None:
    """Check a size that nothing was allocated for yet."""
    if width < 1 or height < 1:
        raise BrokenImageError(f"{width}x{height} pixels")
    if width * height > _MOST_PIXELS:
        raise BrokenImageError(f"{width}x{height} pixels are more than {_MOST_PIXELS:,}")
    if max(width, height) > _MOST_RATIO * min(width, height):
        raise BrokenImageError(f"{width}x{height} pixels: one side is more than {_MOST_RATIO} times the other")


def decode(data: bytes) -> np.ndarray:
    """Return RGB uint8 [H, W, 3]; grey and CMYK are converted.

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

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    try:
        if at_least:
            image.draft("RGB", at_least)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except Exception as error:  # Pillow's readers raise what they please for a damaged file
        raise BrokenImageError(reason(error)) from error
