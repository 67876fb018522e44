"""How far a training step is from what the memory bandwidth of the device allows.

Two counts of the bytes that a step moves:

- XLA's: the cost analysis of the compiled program, that is operands and results of every kernel, and of the library
  calls (cuDNN, cuBLAS), which the cost analysis leaves at zero. What the program as compiled moves, caches aside.
- the analytic minimum: a program of perfect fusion. Forward, each convolution or fully-connected layer reads its input
  and writes its output; backward, it reads its input and the gradient of its output and writes the gradient of its
  input. BN in between needs sums over the gradient before it can go on, and so reads the output twice more. ReLU,
  pooling, addition and BN itself cost nothing. The optimizer reads and writes parameters and velocity in float32.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from resnet_jax import create_model
from resnet_jax.paper.analysis.summary import Summary, summarize

_COPY_BYTES = 2**30
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def measure(case: Case, step: Any) -> dict[str, Any]:
    """Return bytes, floating-point operations and bandwidth for the compiled training step of a case.

    Returns:
      xla_bytes, library_call_bytes: of the compiled program, the latter contained in the former.
      minimum_bytes: of a program of perfect fusion.
      flops: 6 for each multiply-add of the network and image: forward, and both gradients.
      copy_bytes_per_second: read and written together, measured now.
    """
    model = create_model(case.network, num_classes=case.num_classes)
    summary = summarize(case.network, model, case.image_size)
    calls = library_call_bytes(step.as_text())
    return {
        "xla_bytes": step.cost_analysis()["bytes accessed"] + calls,
        "library_call_bytes": calls,
        "minimum_bytes": minimum_bytes(summary, case),
        "flops": 6 * summary.multiply_adds * case.batch_size,
        "copy_bytes_per_second": copy_bandwidth(_COPY_BYTES),
    }


def minimum_bytes(summary: Summary, case: Case) -> int:
    """Return the analytic minimum of a training step; see the module."""
    elements = 0
    first = True
    for layer in summary.layers:
        if layer.kind not in ("conv", "dense"):
            continue
        inputs, outputs = math.prod(layer.input_shape), math.prod(layer.output_shape)
        has_bn = layer.kind == "conv" and case.family != "vgg"
        elements += (2 if first else 3) * inputs + (4 if has_bn else 2) * outputs  # images need no gradient
        first = False
    activations = elements * case.batch_size * jnp.dtype(case.dtype).itemsize
    return activations + 4 * 4 * summary.params


def library_call_bytes(hlo: str) -> int:
    """Return the bytes of operands and results of the custom calls in an optimized HLO text, scratch memory aside."""
    sizes: dict[str, int] = {}
    calls: list[tuple[str, str]] = []
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            name, shape, operation, rest = match.groups()
            if operation == "custom-call":
                shape = re.sub(r"\bu8\[\d*\]", "", shape)  # the library's scratch memory
                calls.append((name, rest.split(")", 1)[0]))
            sizes[name] = _bytes(shape)
    total = 0
    for name, operands in calls:
        names = re.findall(r"%([\w.\-]+)", operands)
        total += sizes[name] + sum(sizes.get(operand, 0) for operand in names)
    return total


def _bytes(shape: str) -> int:
    """Return the size of an HLO array or tuple, such as "(bf16[8,64]{1,0}, u8[0]{0})"."""
    total = 0
    for _, bits, dimensions in _SHAPE.findall(shape):
        total += math.prod(int(n) for n in dimensions.split(",") if n) * (int(bits) if bits else 8) // 8
    return total


def copy_bandwidth(size: int, repeats: int = 20) -> float:
    """Return bytes read and written per second while an array of `size` bytes is copied; the best of 5."""

    @jax.jit
    def copy(x: jax.Array) -> jax.Array:
        return -x  # a kernel of XLA's own, which must touch every byte; a plain copy could be elided

    x = jnp.ones(size // 4, jnp.float32)
    jax.block_until_ready(copy(x))
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        y = x
        for _ in range(repeats):
            y = copy(y)
        jax.block_until_ready(y)
        best = min(best, time.perf_counter() - began)
    return 2 * size * repeats / best
