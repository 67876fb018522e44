"""How products of float32 are computed: accelerators round the factors unless they are told not to.

These contexts count where a program is traced: every convolution and matrix product written down inside one keeps its
precision, and so do those of its derivative if the differentiation is inside, too.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from resnet_jax.config import Precision


def full_float32() -> contextlib.AbstractContextManager[Any]:
    """Return the context of all that tests a trained network: its numbers do not depend on the device.

    Without it the same weights make other errors on a GPU, whose products are TF32, than on a CPU. A network whose
    activations are bfloat16 still computes with these.
    """
    return jax.default_matmul_precision("highest")


def precision_of_training(precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a training step; "default" leaves to JAX what it does, and to its own setting."""
    return contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision)
