"""The views of an image that a network is tested on: the whole of it, crops, or several scales (Sec. 3.4)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from PIL import Image

ProtocolName = Literal["single", "10crop", "multiscale"]

_INPUT = 224  # pixels that the paper's ImageNet networks take; its other sizes are in proportion to this
_CROP_FROM = 256  # shorter side that crops are cut from (Krizhevsky et al. 2012)
_SCALES = (224, 256, 384, 480, 640)  # shorter sides of multi-scale testing (Sec. 3.4)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a network is tested.

    The probabilities of an image are the mean of the softmax outputs of all its views. With `flipped`, each view
    counts twice, once mirrored.

    - single: the image itself if it has the size of the input (Sec. 4.2), else its centre crop.
    - 10crop: the four corners and the centre, and their mirror images (Krizhevsky et al. 2012).
    - multiscale: the whole image at every scale, and mirrored. The network is applied fully convolutionally: the
      last pool slides over the feature map, and the logits are averaged over its positions before the softmax.

    Attributes:
      name: one of the three.
      input_size: (height, width) that the network was trained on, in pixels.
      scales: the shorter sides that images are resized to, in pixels.
    """

    name: ProtocolName
    input_size: tuple[int, int]
    scales: tuple[int, ...]

    @property
    def flipped(self) -> bool:
        return self.name != "single"

    @property
    def fully_convolutional(self) -> bool:
        return self.name == "multiscale"


def make_protocol(name: ProtocolName, input_size: tuple[int, int], scales: tuple[int, ...] | None = None) -> Protocol:
    """Make a protocol with the paper's scales, in proportion to the input where that is not of 224 pixels.

    Args:
      name: "single", "10crop" or "multiscale".
      input_size: (height, width) of the network's input.
      scales: shorter sides, instead of the paper's: any number for "multiscale", else one, which crops are cut from.

    Raises:
      ValueError: a scale smaller than the input, or several where one is needed.
    """
    shorter = min(input_size)
    usual = _SCALES if name == "multiscale" else (_CROP_FROM,)
    scales = scales or tuple(round(scale * shorter / _INPUT) for scale in usual)
    if min(scales) < max(input_size):
        raise ValueError(f"a scale of {min(scales)} is smaller than the network's input of {max(input_size)} pixels")
    if name != "multiscale" and len(scales) > 1:
        raise ValueError(f"crops are cut from one scale; got {', '.join(map(str, scales))}")
    return Protocol(name, input_size, scales)


def views(image: np.ndarray, protocol: Protocol) -> list[np.ndarray]:
    """Return the views of an image [H, W, 3] uint8, all but the mirrored ones.

    They are [H', W', 3], of the input's size unless the protocol is fully convolutional.
    """
    if protocol.name == "multiscale":
        return [resize(image, scale) for scale in protocol.scales]
    height, width = protocol.input_size
    if protocol.name == "single" and image.shape[:2] == (height, width):
        return [image]
    image = resize(image, protocol.scales[0])
    bottom, right = image.shape[0] - height, image.shape[1] - width
    corners = [(bottom // 2, right // 2)]
    if protocol.name == "10crop":
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), *corners]
    return [image[top : top + height, left : left + width] for top, left in corners]


def resize(image: np.ndarray, shorter: int) -> np.ndarray:
    """Resize an image [H, W, 3] uint8 so that its shorter side is `shorter` pixels; the longer is rounded down.

    Bilinear with a filter as wide as a pixel of the result (Pillow), as torchvision does.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if side == shorter:
        return image
    size = (width * shorter // side, height * shorter // side)  # Pillow: (width, height)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
