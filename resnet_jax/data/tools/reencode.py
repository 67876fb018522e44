"""What an image file becomes when it is packed: itself, if that can be."""

from __future__ import annotations

import dataclasses
import io
from typing import Literal

import numpy as np
from PIL import Image

from resnet_jax.data.decode import BrokenImageError, encode_raw, open_image, to_rgb, upright
from resnet_jax.data.views import resize


@dataclasses.dataclass(frozen=True)
class PackOptions:
    """How images are stored.

    Attributes:
      short_side: larger images are resized to this shorter side, in pixels.
      format: "jpeg", or "raw" pixels, which are five times as large and more, and need no decoding.
      quality: of the JPEG files that have to be written anew; those that need not are kept byte for byte.
      upright: whether images are turned as their cameras say (EXIF).
    """

    short_side: int = 480
    format: Literal["jpeg", "raw"] = "jpeg"
    quality: int = 95
    upright: bool = False


def reencode(content: bytes, options: PackOptions) -> bytes:
    """Return the content of an image file as it is packed; an RGB JPEG that is not too large is left as it is.

    Raises:
      BrokenImageError: it cannot be decoded.
    """
    image = open_image(upright(content) if options.upright else content)
    fits = min(image.size) <= options.short_side
    kept = fits and options.format == "jpeg" and image.format in ("JPEG", "MPO") and image.mode == "RGB"
    pixels = np.asarray(to_rgb(image))  # also of those that are kept: they may be damaged behind the header
    if kept:
        return content
    if not fits:
        pixels = resize(pixels, options.short_side)
    if options.format == "raw":
        return encode_raw(pixels)
    file = io.BytesIO()
    try:
        Image.fromarray(pixels).save(file, "JPEG", quality=options.quality)
    except (OSError, ValueError) as error:  # a side of more than 65,500 pixels
        raise BrokenImageError(f"cannot be written as JPEG: {error}") from error
    return file.getvalue()
