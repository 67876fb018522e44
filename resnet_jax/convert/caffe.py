"""Read the authors' Caffe models (ResNet-50, 101 and 152) and the mean image that belongs to them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from resnet_jax.errors import UserError

MAX_BYTES = 1 << 29  # ResNet-152 has 241 MB; protobuf can need many times the size of a hostile file
MAX_LISTED = 100  # problems in one message

# The part of Caffe's caffe.proto that holds names and numbers; everything else in a file is skipped. A field is
# (number, type, how many). "layers" is how Caffe wrote layers before 2015; its `type` is an enum.
_SCHEMA = {
    "BlobShape": {"dim": (1, "int64", "repeated")},
    "BlobProto": {
        "num": (1, "int64", "optional"),  # the shape as Caffe wrote it before `shape`
        "channels": (2, "int64", "optional"),
        "height": (3, "int64", "optional"),
        "width": (4, "int64", "optional"),
        "data": (5, "float", "repeated"),
        "shape": (7, "BlobShape", "optional"),
        "double_data": (8, "double", "repeated"),
    },
    "LayerParameter": {
        "name": (1, "bytes", "optional"),  # a string; as bytes it may be anything
        "type": (2, "bytes", "optional"),
        "blobs": (7, "BlobProto", "repeated"),
    },
    "V1LayerParameter": {
        "name": (4, "bytes", "optional"),
        "type": (5, "int32", "optional"),
        "blobs": (6, "BlobProto", "repeated"),
    },
    "NetParameter": {
        "name": (1, "bytes", "optional"),
        "layers": (2, "V1LayerParameter", "repeated"),
        "layer": (100, "LayerParameter", "repeated"),
    },
}
_V1_TYPES = {4: "Convolution", 14: "InnerProduct"}

# res2a_branch2b and its bn2a_branch2b, scale2a_branch2b. Blocks are a, b, c, ... or, in long stages, a, b1, b2, ...
_BLOCK_LAYER = re.compile(r"(?:res|bn|scale)([2-5])([a-z]|b[1-9][0-9]{0,5})_branch(?:1|2[abc])")

Shape = tuple[int | None, ...]  # None: any length


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
      UserError: the file cannot be read, or its layers are not those of such a network; the line lists what is amiss.
    """
    net = _parse("NetParameter", path)
    layers: dict[str, Any] = {}
    problems: list[str] = []
    for layer in (layer for group in (net.layers, net.layer) for layer in group if layer.blobs):
        name = layer.name.decode(errors="replace")
        if name in layers:
            problems.append(f"two layers {name[:60]!r}")
        layers[name] = layer
    if not layers:
        raise UserError(f"{path}: no layer with weights in it; expected a .caffemodel")

    weights: dict[str, np.ndarray] = {}
    for caffe, conv, batch_norm in list(_convolutions(layers, problems)):  # a list: reading takes layers away
        weights |= _read_convolution(caffe, conv, batch_norm, layers, problems)
    fc = _take("fc1000", "InnerProduct", [(None, None), (None,)], layers, problems)
    if fc and len(fc[0]) != len(fc[1]):
        problems.append(f"fc1000: {len(fc[0])} rows of weights, {len(fc[1])} biases")
    problems += [f"unknown layer {name[:60]!r}" for name in layers]
    if problems:
        if len(problems) > MAX_LISTED:
            problems[MAX_LISTED:] = [f"and {len(problems) - MAX_LISTED:,} more"]
        raise UserError(f"{path}: not the layers of the authors' ResNet-50, 101 or 152: {'; '.join(problems)}")
    weights["conv1.weight"] = np.ascontiguousarray(weights["conv1.weight"][:, ::-1])  # Caffe's images are BGR
    return weights | {"fc.weight": fc[0], "fc.bias": fc[1]}


def read_mean(path: Path) -> np.ndarray:
    """Read a mean image such as the authors' `ResNet_mean.binaryproto`.

    Returns:
      float32 [H, W, 3], RGB, in pixel values from 0 to 255.

    Raises:
      UserError: the file cannot be read or is no such image.
    """
    blob = _parse("BlobProto", path)
    try:
        planes = _to_array(blob, (3, None, None))  # BGR
    except ValueError as error:
        raise UserError(f"{path}: not a mean image: {error}") from None
    if not (planes.min() >= 0 and planes.max() <= 255):  # not-a-number too
        raise UserError(f"{path}: values from {planes.min():g} to {planes.max():g} are no mean of pixels from 0 to 255")
    return np.ascontiguousarray(planes[::-1].transpose(1, 2, 0))


def _message_classes() -> dict[str, Any]:
    """Build protobuf's classes for `_SCHEMA`, in a pool of their own: Caffe's may be loaded beside them."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field_name, (number, type_name, label) in fields.items():
            field = message.field.add(name=field_name, number=number)
            field.label = types.Label.Value(f"LABEL_{label.upper()}")
            if type_name in _SCHEMA:
                field.type, field.type_name = types.TYPE_MESSAGE, f".caffe.{type_name}"
            else:
                field.type = types.Type.Value(f"TYPE_{type_name.upper()}")
                field.options.packed = label == "repeated"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}")) for name in _SCHEMA}


MESSAGES = _message_classes()


def _parse(message: str, path: Path) -> Any:
    """Read a file that is one `message`; protobuf checks all lengths in it before it allocates."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path}: {size:,} bytes are too many for a Caffe file; at most {MAX_BYTES:,}")
        return MESSAGES[message].FromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except DecodeError:
        raise UserError(f"{path}: not a binary file of Caffe, or damaged or cut short") from None


def _convolutions(layers: dict[str, Any], problems: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield what the names of a convolution's layers share in Caffe, and our names of it and of its BN."""
    yield "_conv1", "conv1", "bn1"
    for stage in (2, 3, 4, 5):
        blocks: dict[str, int] = {}
        for match in filter(None, map(_BLOCK_LAYER.fullmatch, layers)):
            if match[1] == str(stage):
                blocks[match[2]] = int(match[2][1:] or ord(match[2]) - ord("a"))
        if not blocks or sorted(blocks.values()) != list(range(len(blocks))):
            found = ", ".join(sorted(blocks, key=lambda block: blocks[block])[:MAX_LISTED]) or "none"
            problems.append(f"blocks of res{stage}: expected a, b, c, ... or a, b1, b2, ...; found {found}")
        for block, index in blocks.items():
            caffe, ours = f"{stage}{block}_branch", f"layer{stage - 1}.{index}"
            for number, branch in enumerate(("2a", "2b", "2c"), 1):
                yield caffe + branch, f"{ours}.conv{number}", f"{ours}.bn{number}"
            # The first block of a stage always has a projection: a bottleneck widens its input (Table 1, option B).
            if index == 0 or any(f"{kind}{caffe}1" in layers for kind in ("res", "bn", "scale")):
                yield caffe + "1", f"{ours}.downsample.0", f"{ours}.downsample.1"


def _read_convolution(
    caffe: str, conv: str, batch_norm: str, layers: dict[str, Any], problems: list[str]
) -> dict[str, np.ndarray]:
    """Take a convolution, its BatchNorm and its Scale out of `layers`; {} where something is amiss."""
    caffe_conv, channels = ("conv1", 3) if conv == "conv1" else (f"res{caffe}", None)
    kernel = _take(caffe_conv, "Convolution", [(None, channels, None, None), (None,)], layers, problems, optional=1)
    filters = len(kernel[0]) if kernel else None
    if len(kernel) == 2 and len(kernel[1]) != filters:
        problems.append(f"{caffe_conv}: {filters} filters, {len(kernel[1])} biases")
    statistics = _take(f"bn{caffe}", "BatchNorm", [(filters,), (filters,), (1,)], layers, problems)
    scale = _take(f"scale{caffe}", "Scale", [(filters,), (filters,)], layers, problems)
    if statistics and not (statistics[2] == 0 or 1e-30 < statistics[2] < 1e30):
        problems.append(f"bn{caffe}: a factor of {statistics[2][0]:g}")
    if problems:
        return {}
    mean, variance, (factor,) = statistics  # Caffe's moving sums, and the weight of their terms
    share = np.float32(1 / factor if factor else 0)  # as Caffe does it: without terms, mean and variance are 0
    mean, variance = mean * share, variance * share
    if len(kernel) == 2:
        mean = mean - kernel[1]  # of the convolution without its bias
    arrays = kernel[0], *scale, mean, variance
    parts = "weight", "bias", "running_mean", "running_var"
    return dict(zip((f"{conv}.weight", *(f"{batch_norm}.{part}" for part in parts)), arrays, strict=True))


def _take(
    name: str, kind: str, shapes: list[Shape], layers: dict[str, Any], problems: list[str], optional: int = 0
) -> list[np.ndarray]:
    """Take the blobs of a layer out of `layers`; [] and a problem where they are not a `kind`'s.

    Args:
      shapes: of its blobs, of which the last `optional` may be absent.
    """
    layer = layers.pop(name, None)
    if layer is None:
        problems.append(f"{name} is missing")
        return []
    found = layer.type.decode(errors="replace") if isinstance(layer.type, bytes) else _V1_TYPES.get(layer.type, "?")
    if found != kind:
        problems.append(f"{name} is of type {found[:60]!r}, not {kind}")
        return []
    if not len(shapes) - optional <= len(layer.blobs) <= len(shapes):
        problems.append(f"{name} has {len(layer.blobs):,} blobs, not {len(shapes) - optional}")
        return []
    arrays: list[np.ndarray] = []
    for number, (blob, shape) in enumerate(zip(layer.blobs, shapes, strict=False), 1):
        try:
            arrays.append(_to_array(blob, shape))
            if not np.isfinite(arrays[-1]).all():
                raise ValueError("numbers that are not finite")
        except ValueError as error:
            problems.append(f"{name}, blob {number}: {error}")
    return arrays if len(arrays) == len(layer.blobs) else []


def _to_array(blob: Any, expected: Shape) -> np.ndarray:
    """Convert a BlobProto to float32; Caffe's old shapes have 4 axes, the first ones of length 1."""
    if any(blob.HasField(axis) for axis in ("num", "channels", "height", "width")):
        shape = [blob.num, blob.channels, blob.height, blob.width]
    elif len(blob.shape.dim) > 4:
        raise ValueError(f"a shape of {len(blob.shape.dim):,} axes")
    else:
        shape = list(blob.shape.dim)
    while len(shape) > len(expected) and shape[0] == 1:
        del shape[0]
    same_rank = len(shape) == len(expected)
    if not same_rank or any(have < 1 or want not in (None, have) for have, want in zip(shape, expected, strict=True)):
        raise ValueError(f"shape {_times(shape)}, expected {_times(expected)}")
    values = blob.double_data or blob.data
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values):,} values for shape {_times(shape)}")
    with np.errstate(over="ignore"):  # doubles beyond float32
        array = np.array(values, np.float32).reshape(shape)
    return array


def _times(shape: list[int] | Shape) -> str:
    return "x".join("?" if length is None else str(length) for length in shape) or "none"
