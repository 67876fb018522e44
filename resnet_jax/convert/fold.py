"""BN folded into the convolution before it, as inference programs want it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from resnet_jax.models import BatchNorm

_EPSILON = BatchNorm.epsilon


def fold_bn(variables: dict[str, Any]) -> dict[str, Any]:
    """Return the params of a network whose BN only adds its bias, for apply_folded(); computed in float64.

    The convolution before a BN gets its factors, and the BN the bias that remains: "conv1" and "bn1", "stem_conv" and
    "stem_bn".
    """

    def fold(params: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
        folded: dict[str, Any] = {}
        for name, leaves in params.items():
            norm = name.replace("conv", "bn")
            if "conv" in name and norm in stats:
                scale, bias, mean, var = (
                    np.asarray(values, np.float64)
                    for values in (params[norm]["scale"], params[norm]["bias"], stats[norm]["mean"], stats[norm]["var"])
                )
                factor = scale / np.sqrt(var + _EPSILON)
                folded[name] = {"kernel": (np.asarray(leaves["kernel"], np.float64) * factor).astype(np.float32)}
                folded[norm] = {"bias": (bias - mean * factor).astype(np.float32)}
            elif name in stats and "bn" not in name:  # a block
                folded[name] = fold(leaves, stats[name])
            elif name not in stats:
                folded[name] = leaves
        return folded

    return {"params": fold(variables["params"], variables.get("batch_stats", {}))}


def apply_folded(apply: Callable[[Any, Any], Any], folded: dict[str, Any], images: jax.Array) -> Any:
    """Return what apply(variables, images) does, a network's evaluation, of fold_bn(variables)."""

    def add_bias(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            return args[0] + context.module.get_variable("params", "bias")
        return call(*args, **kwargs)

    with nn.intercept_methods(add_bias):
        return apply(folded, images)
