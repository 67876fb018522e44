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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


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


def _describe(module: nn.Module, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> Layer:
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    has_bias = False
    if isinstance(module, nn.Conv):
        kind, has_bias = "conv", module.use_bias
        kernel = _pair(module.kernel_size)
        stride, padding = _pair(module.strides), module.padding  # type: ignore[assignment]
    elif isinstance(module, nn.Dense):
        kind, has_bias = "dense", module.use_bias
    elif isinstance(module, MaxPool):
        kind, kernel, stride = "max_pool", _pair(module.size), _pair(module.stride)
        padding = module.padding(input_shape[0], input_shape[1])
    elif isinstance(module, GlobalAveragePool):
        kind, kernel = "average_pool", (input_shape[0], input_shape[1])
        output_shape = (1, 1, input_shape[-1])
    else:  # the bins of an adaptive pool differ by a pixel where the sizes do not divide: the largest is given
        kind = "average_pool"
        kernel = _pair(tuple(-(-size // side) for size, side in zip(input_shape, output_shape, strict=True))[:2])
        stride = _pair(tuple(max(size // side, 1) for size, side in zip(input_shape, output_shape, strict=True))[:2])
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
        params=weights + (output_shape[-1] if has_bias else 0),
        multiply_adds=weights * math.prod(output_shape[:-1]),
    )


def _pair(value: Any) -> Pair:
    if value is None:
        return (1, 1)
    if isinstance(value, int):
        return (value, value)
    height, width = value
    return (height, width)


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    numbers = len(header) - 2  # the last two columns are right-aligned
    lines = [
        "  ".join(
            cell.rjust(width) if column >= numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    total = f"{summary.model}: {summary.params:,} parameters, {summary.multiply_adds:,} multiply-adds"
    return "\n".join([*lines, "", f"{total} ({summary.multiply_adds / 1e9:.2f}e9)"])
