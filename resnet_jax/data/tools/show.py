"""A picture of what a detector is trained on, which shows most mistakes in boxes at a glance."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from resnet_jax.data.annotated import AnnotatedDataset, Boxed, most_objects
from resnet_jax.data.buckets import Buckets, Reader, TrainBatches
from resnet_jax.data.draw import draw_boxes

_WIDEST = 480  # of an image on the sheet, in pixels


def show_targets(dataset: AnnotatedDataset, buckets: Buckets, count: int, seed: int) -> Image.Image:
    """Draw the first images of training, as the network sees them, with the objects that it is trained on.

    Args:
      dataset: its training images are drawn.
      buckets: shapes of the arrays.
      count: of images.
      seed: of the order.
    """
    reader = Reader(dataset.train, buckets, most_objects(dataset.train))
    stream = TrainBatches(reader, 1, range(1), True, seed).stream(0)
    pictures = []
    for step in range(count):
        row = Boxed(*(array[0] for array in stream[step]))
        there = row.classes > 0
        texts = [dataset.class_names[k - 1] for k in row.classes[there]]
        height, width = row.sizes
        picture = draw_boxes(row.images[:height, :width], row.boxes[there], row.classes[there] - 1, texts)
        picture.thumbnail((_WIDEST, _WIDEST))
        pictures.append(picture)
    columns = math.ceil(math.sqrt(count))
    cell = np.max([picture.size for picture in pictures], 0) + 6
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (int(cell[0]) * columns + 6, int(cell[1]) * rows + 6), "white")
    for number, picture in enumerate(pictures):
        row_of, column = divmod(number, columns)
        sheet.paste(picture, (6 + column * int(cell[0]), 6 + row_of * int(cell[1])))
    return sheet
