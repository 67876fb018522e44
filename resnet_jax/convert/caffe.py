"""Read the authors' Caffe models (ResNet-50, 101 and 152) and the mean image that belongs to them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.errors import UserError, optional, reason

# The part of Caffe's caffe.proto that holds names and numbers; everything else in a file is skipped.
_SCHEMA = """
name: "caffe.proto" package: "caffe" syntax: "proto2"
message_type {
  name: "BlobShape"
  field { name: "dim" number: 1 type: TYPE_INT64 label: LABEL_REPEATED options { packed: true } }
}
message_type {
  name: "BlobProto"  # num to width: the shape as Caffe wrote it before it had `shape`
  field { name: "num" number: 1 type: TYPE_INT64 label: LABEL_OPTIONAL }
  field { name: "channels" number: 2 type: TYPE_INT64 label: LABEL_OPTIONAL }
  field { name: "height" number: 3 type: TYPE_INT64 label: LABEL_OPTIONAL }
  field { name: "width" number: 4 type: TYPE_INT64 label: LABEL_OPTIONAL }
  field { name: "data" number: 5 type: TYPE_FLOAT label: LABEL_REPEATED options { packed: true } }
  field { name: "shape" number: 7 type_name: ".caffe.BlobShape" type: TYPE_MESSAGE label: LABEL_OPTIONAL }
}
message_type {
  name: "LayerParameter"  # its name is a string; as bytes it may be anything
  field { name: "name" number: 1 type: TYPE_BYTES label: LABEL_OPTIONAL }
  field { name: "blobs" number: 7 type_name: ".caffe.BlobProto" type: TYPE_MESSAGE label: LABEL_REPEATED }
}
message_type {
  name: "NetParameter"
  field { name: "layer" number: 100 type_name: ".caffe.LayerParameter" type: TYPE_MESSAGE label: LABEL_REPEATED }
}
"""

# res2a_branch2b and its bn2a_branch2b, scale2a_branch2b. Blocks are a, b, c, ... or, in long stages, a, b1, b2, ...
_BLOCK_LAYER = re.compile(r"(?:res|bn|scale)([2-5])([a-z]|b[1-9][0-9]*)_branch(?:1|2[abc])")


def read_caffemodel(path: Path) -> dict[str, np.ndarray]:
    """Read the weights of a bottleneck ResNet as its authors published them.

    The names and layouts are those of torchvision's ResNets, the strides are not: here a block has its stride of 2 in
    the first 1x1 convolution (`layer2.0.conv1`). eps is 1e-5.

    Args:
      path: a `.caffemodel` with the layer names of ResNet-50, 101 or 152; the numbers of blocks are the file's.

    Returns:
      float32 arrays: `conv1.weight` [O, 3, H, W] for RGB input, `bn1.weight|bias|running_mean|running_var` [O],
      `layer1.0.conv1.weight` [O, I, H, W], ..., `layer1.0.downsample.0.weight`, `layer1.0.downsample.1.weight`, ...,
      `fc.weight` [classes, I], `fc.bias` [classes]. Convolutions have no bias: BN has taken it in.

    Raises:
      UserError: the file cannot be read, or its layers are not those of such a network; the line names the first that
        is amiss.
    """
    net = _parse("NetParameter", path)
    layers = {layer.name.decode(errors="replace"): layer for layer in net.layer if layer.blobs}
    if not layers:
        raise UserError(
            f"{path}: no layer with weights as Caffe writes them since 2015; expected a .caffemodel of the authors"
        )
    try:
        weights: dict[str, np.ndarray] = {}
        for caffe, conv, batch_norm in list(_convolutions(layers)):  # a list: reading takes layers away
            weights |= _read_convolution(caffe, conv, batch_norm, layers)
        weights["conv1.weight"] = np.ascontiguousarray(weights["conv1.weight"][:, ::-1])  # Caffe's images are BGR
        weights["fc.weight"], weights["fc.bias"] = _take("fc1000", (2, 1), layers)
        if layers:
            raise ValueError(f"unknown layer {next(iter(layers))!r}")
    except ValueError as error:
        raise UserError(f"{path}: not the layers of the authors' ResNet-50, 101 or 152: {reason(error)}") from None
    return weights


def read_mean(path: Path) -> np.ndarray:
    """Read a mean image such as the authors' `ResNet_mean.binaryproto`.

    Returns:
      float32 [H, W, 3], RGB, in pixel values from 0 to 255.

    Raises:
      UserError: the file cannot be read or is no such image.
    """
    blob = _parse("BlobProto", path)
    try:
        planes = _to_array(blob, 3)  # BGR
        if len(planes) != 3:
            raise ValueError(f"{len(planes)} planes")
        if not (planes.min() >= 0 and planes.max() <= 255):  # NaN compares False
            raise ValueError(f"values from {planes.min():g} to {planes.max():g}")
    except ValueError as error:
        raise UserError(f"{path}: not a mean image of pixels from 0 to 255: {reason(error)}") from None
    return np.ascontiguousarray(planes[::-1].transpose(1, 2, 0))


@functools.cache
def message_classes() -> dict[str, Any]:
    """Build protobuf's classes for `_SCHEMA`, in a pool of their own: Caffe's may be loaded beside them."""
    descriptor_pb2, descriptor_pool, message_factory, text_format = (
        optional(f"google.protobuf.{module}", extra="convert", package="protobuf")
        for module in ("descriptor_pb2", "descriptor_pool", "message_factory", "text_format")
    )
    file = text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}")) for name in names}


def _parse(message: str, path: Path) -> Any:
    """Read a file that is one `message`."""
    parser = message_classes()[message]
    try:
        return parser.FromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"{path}: not a binary file of Caffe, or damaged or cut short") from error


def _convolutions(layers: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what the names of a convolution's layers share in Caffe, and our names of it and of its BN.

    Raises:
      ValueError: a stage has not the blocks a, b, c, ... or a, b1, b2, ...
    """
    yield "_conv1", "conv1", "bn1"
    for stage in (2, 3, 4, 5):
        matches = filter(None, map(_BLOCK_LAYER.fullmatch, layers))
        blocks = {
            match[2]: int(match[2][1:] or ord(match[2]) - ord("a")) for match in matches if match[1] == str(stage)
        }
        if not blocks or sorted(blocks.values()) != list(range(len(blocks))):
            found = ", ".join(sorted(blocks, key=lambda block: blocks[block])) or "none"
            raise ValueError(f"blocks of res{stage}: expected a, b, c, ... or a, b1, b2, ...; found {found}")
        for block, index in blocks.items():
            caffe, ours = f"{stage}{block}_branch", f"layer{stage - 1}.{index}"
            for number, branch in enumerate(("2a", "2b", "2c"), 1):
                yield caffe + branch, f"{ours}.conv{number}", f"{ours}.bn{number}"
            # The first block of a stage always has a projection: a bottleneck widens its input (Table 1, option B).
            if index == 0:
                yield caffe + "1", f"{ours}.downsample.0", f"{ours}.downsample.1"


def _read_convolution(caffe: str, conv: str, batch_norm: str, layers: dict[str, Any]) -> dict[str, np.ndarray]:
    """Take a convolution, its BatchNorm and its Scale out of `layers`.

    Raises:
      ValueError: one is missing, or not what it should be.
    """
    kernel, *biases = _take("conv1" if conv == "conv1" else f"res{caffe}", (4, 1), layers, lacks=1)
    mean, variance, factor = _take(f"bn{caffe}", (1, 1, 1), layers)
    gamma, beta = _take(f"scale{caffe}", (1, 1), layers)
    # Caffe keeps moving sums, and the weight of their terms; without terms, mean and variance are 0 there.
    share = np.float32(1 / factor[0] if factor[0] else 0)
    mean, variance = mean * share, variance * share
    for bias in biases:
        mean = mean - bias  # of the convolution without its bias
    return {
        f"{conv}.weight": kernel,
        f"{batch_norm}.weight": gamma,
        f"{batch_norm}.bias": beta,
        f"{batch_norm}.running_mean": mean,
        f"{batch_norm}.running_var": variance,
    }


def _take(name: str, ranks: tuple[int, ...], layers: dict[str, Any], lacks: int = 0) -> list[np.ndarray]:
    """Take the blobs of a layer out of `layers`.

    Args:
      ranks: axes of each blob; the last `lacks` of them may be absent.

    Raises:
      ValueError: there is no such layer, or it has other blobs.
    """
    layer = layers.pop(name, None)
    if layer is None:
        raise ValueError(f"{name} is missing")
    if not len(ranks) - lacks <= len(layer.blobs) <= len(ranks):
        raise ValueError(f"{name} has {len(layer.blobs)} blobs, not {len(ranks) - lacks}")
    try:
        return [_to_array(blob, rank) for blob, rank in zip(layer.blobs, ranks, strict=False)]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _to_array(blob: Any, rank: int) -> np.ndarray:
    """Convert a BlobProto to float32; Caffe's old shapes have 4 axes, the first ones of length 1."""
    if any(blob.HasField(axis) for axis in ("num", "channels", "height", "width")):
        shape = [blob.num, blob.channels, blob.height, blob.width]
    else:
        shape = list(blob.shape.dim)
    while len(shape) > rank and shape[0] == 1:
        del shape[0]
    if len(shape) != rank or not all(length > 0 for length in shape):
        raise ValueError(f"a blob of shape {'x'.join(map(str, shape)) or 'none'}, expected {rank} axes")
    return np.array(blob.data, np.float32).reshape(shape)  # as many values, or a ValueError
