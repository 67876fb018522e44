"""Every convolution, pool and fully-connected layer of a network, read off the network itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models import Model
from resnet_jax.models.pool import AdaptiveAveragePool, GlobalAveragePool, MaxPool
from resnet_jax.paper.artefact import format_table

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer; shapes are without the batch, sizes in pixels.

    Attributes:
      name: path of the module, as in checkpoints.
      kind: "conv", "max_pool", "average_pool" or "dense".
      kernel, stride: (height, width); (1, 1) for dense layers.
      padding: ((top, bottom), (left, right)).
      in_features, out_features: channels.
      input_shape, output_shape: (H, W, C), or (C,) for dense layers.
      params: of the layer itself; BN's are counted in the totals only.
      multiply_adds: for one image; zero for pools, as in the paper.
    """

    name: str
    kind: str
    kernel: Pair
    stride: Pair
    padding: tuple[Pair, Pair]
    in_features: int
    out_features: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    params: int
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Layers in forward order and totals; `params` counts every parameter, BN's scale and bias too."""

    model: str
    params: int
    multiply_adds: int
    layers: tuple[Layer, ...]


def summarize(name: str, model: Model, image_size: int) -> Summary:
    """Trace the network on one image of image_size x image_size pixels; nothing is computed."""
    layers = []

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        kinds = (nn.Conv, nn.Dense, MaxPool, AdaptiveAveragePool, GlobalAveragePool)
        if isinstance(context.module, kinds) and context.method_name == "__call__":
            layers.append(_describe(context.module, args[0].shape[1:], output.shape[1:]))
        return output

    image = jnp.zeros((1, image_size, image_size, 3))
    with nn.intercept_methods(record):
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return Summary(name, params, sum(layer.multiply_adds for layer in layers), tuple(layers))


def _describe(module: Any, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> Layer:
    kernel: Any = (1, 1)
    stride: Any = (1, 1)
    padding: Any = ((0, 0), (0, 0))
    match module:
        case nn.Conv():
            kind, kernel, stride, padding = "conv", module.kernel_size, module.strides, module.padding
        case nn.Dense():
            kind = "dense"
        case MaxPool():
            kind, kernel, stride = "max_pool", (module.size, module.size), (module.stride, module.stride)
            padding = module.padding(*input_shape[:2])
        case GlobalAveragePool():
            kind, kernel, output_shape = "average_pool", input_shape[:2], (1, 1, input_shape[-1])
        case AdaptiveAveragePool():  # where its bins differ by a pixel, the sizes not dividing, the largest is given
            kind, height, width = "average_pool", *input_shape[:2]
            kernel = (-(-height // module.side), -(-width // module.side))
            stride = (max(height // module.side, 1), max(width // module.side, 1))
    weights = math.prod(kernel) * input_shape[-1] * output_shape[-1] if kind in ("conv", "dense") else 0
    return Layer(
        name="/".join(module.path),
        kind=kind,
        kernel=kernel,
        stride=stride,
        padding=padding,
        in_features=input_shape[-1],
        out_features=output_shape[-1],
        input_shape=input_shape,
        output_shape=output_shape,
        params=sum(leaf.size for leaf in jax.tree.leaves(module.variables)),
        multiply_adds=weights * math.prod(output_shape[:-1]),
    )


def to_table(summary: Summary) -> str:
    """Return the summary as text, a line a layer."""
    header = ("layer", "kind", "kernel", "stride", "padding", "input", "output", "parameters", "multiply-adds")
    rows = [header]
    for layer in summary.layers:
        (top, bottom), (left, right) = layer.padding
        padding = f"{top}" if top == bottom == left == right else f"{top},{bottom} {left},{right}"
        is_dense = layer.kind == "dense"
        rows.append(
            (
                layer.name,
                layer.kind.replace("_", " "),
                "" if is_dense else f"{layer.kernel[0]}x{layer.kernel[1]}",
                "" if is_dense else f"{layer.stride[0]}",
                "" if is_dense else padding,
                "x".join(map(str, layer.input_shape)),
                "x".join(map(str, layer.output_shape)),
                f"{layer.params:,}",
                f"{layer.multiply_adds:,}",
            )
        )
    table = format_table(rows, right=(7, 8))
    total = f"{summary.model}: {summary.params:,} parameters, {summary.multiply_adds:,} multiply-adds"
    return "\n".join([*table, "", f"{total} ({summary.multiply_adds / 1e9:.2f}e9)"])
