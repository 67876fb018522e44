"""From the bytes of an image file to RGB pixels, of which only those that are needed are computed."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

# An image that is not compressed: this, height and width as 32-bit numbers, then its RGB bytes.
_RAW_MAGIC = b"RGB8"
_RAW_HEADER = struct.Struct("<4sII")


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
      BrokenImageError: no image that Pillow knows.
    """
    try:
        if data.startswith(_RAW_MAGIC):
            _, height, width = _RAW_HEADER.unpack_from(data)
            return Image.frombuffer("RGB", (width, height), data[_RAW_HEADER.size :], "raw", "RGB", 0, 1)
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BrokenImageError("no image" if data else "the file is empty") from error
    except Exception as error:  # Pillow's readers raise what they please for a damaged file
        raise BrokenImageError(str(error) or type(error).__name__) from error


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

    Args:
      image: of open_image().
      window: of it.
      size: height and width of the result in pixels.
      mirrored: whether the result is mirrored left to right.

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    width, height = image.size
    whole = (int(width * size / window.width), int(height * size / window.height))
    try:
        image.draft("RGB", whole)  # a JPEG only; not smaller than that
    except Exception as error:
        raise BrokenImageError(str(error) or type(error).__name__) from error
    image = to_rgb(image)
    x, y = image.width / width, image.height / height
    box = (
        window.left * x,
        window.top * y,
        min((window.left + window.width) * x, image.width),
        min((window.top + window.height) * y, image.height),
    )
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image.

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except Exception as error:  # Pillow's readers raise what they please for a damaged file
        raise BrokenImageError(str(error) or type(error).__name__) from error
