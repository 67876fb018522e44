"""Boxes drawn on images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#42d4f4",
    "#f032e6",
    "#bfef45",
    "#fabed4",
    "#469990",
)


def draw_boxes(
    image: np.ndarray | Image.Image, boxes: np.ndarray, classes: np.ndarray, texts: Iterable[str]
) -> Image.Image:
    """Return a copy of an image with boxes and a text at each; a class always has the same colour.

    Args:
      image: RGB uint8 [H, W, 3], or Pillow's.
      boxes: [M, 4] in its pixels.
      classes: [M] whole numbers.
      texts: one for each box.
    """
    drawn = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    drawn = drawn.copy()
    size = max(11, round(max(drawn.size) / 50))
    draw, font, line = ImageDraw.Draw(drawn), ImageFont.load_default(size), max(1, size // 7)
    # The best last, so that its text is on top.
    for (x1, y1, x2, y2), k, text in reversed(list(zip(boxes.tolist(), classes.tolist(), texts, strict=True))):
        colour = _COLOURS[int(k) % len(_COLOURS)]
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 4, bottom - top + 4
        x = min(max(0, x1), max(0, drawn.width - width))
        y = y1 - height if y1 >= height else min(y1, max(0, drawn.height - height))
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)
    return drawn
