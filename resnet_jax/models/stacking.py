"""The two forms of a network's variables: by block, and stacked for a ResNet with scan_blocks=True."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.models.conv import he_init
from resnet_jax.models.resnet import ResNet

_BLOCK = re.compile(r"(stage\d+_block)(\d+)")
_BLOCKS = re.compile(r"(stage\d+_block)s")


def stack_blocks(tree: Any) -> Any:
    """Stack all blocks of each stage but the first: "stage1_block2", "stage1_block3", ... to "stage1_blocks".

    Args:
      tree: anything that holds variables by block: params, batch_stats, an optimizer's state, a TrainState.

    Returns:
      The same with one more leading dimension for the leaves of the stacked blocks, on the host if they were there.
    """
    return _convert(tree, _BLOCK, _stack)


def unstack_blocks(tree: Any) -> Any:
    """Undo stack_blocks(): the form of checkpoints, exports and of networks without scan_blocks."""
    return _convert(tree, _BLOCKS, _unstack)


def is_stacked(tree: Any) -> bool:
    """Tell whether a tree holds stacked blocks."""
    keys = (key for path, _ in jax.tree_util.tree_leaves_with_path(tree) for key in path)
    return any(_BLOCKS.fullmatch(str(getattr(key, "key", ""))) for key in keys)


def _convert(tree: Any, name: re.Pattern[str], convert: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    def by_block(node: Any) -> bool:
        return isinstance(node, dict) and any(name.fullmatch(str(key)) for key in node)

    return jax.tree.map(lambda node: convert(node) if by_block(node) else node, tree, is_leaf=by_block)


def _stack(variables: dict[str, Any]) -> dict[str, Any]:
    stacked: dict[str, Any] = {}
    stages: dict[str, dict[int, Any]] = {}
    for name, values in variables.items():
        match = _BLOCK.fullmatch(name)
        if match and int(match[2]) > 1:
            stages.setdefault(match[1] + "s", {})[int(match[2])] = values
        else:
            stacked[name] = values
    for name, blocks in stages.items():
        stacked[name] = jax.tree.map(_stack_leaves, *(blocks[number] for number in sorted(blocks)))
    return stacked


def _stack_leaves(*leaves: Any) -> Any:
    return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)


def _unstack(variables: dict[str, Any]) -> dict[str, Any]:
    unstacked: dict[str, Any] = {}
    for name, values in variables.items():
        match = _BLOCKS.fullmatch(name)
        if not match:
            unstacked[name] = values
            continue
        length = len(jax.tree.leaves(values)[0])
        for i in range(length):
            unstacked[f"{match[1]}{i + 2}"] = jax.tree.map(lambda leaf, i=i: leaf[i], values)
    return unstacked


class _Key(nn.Module):
    """Give the key from which the first parameter of the layer called `names` is initialized."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        if not self.names:
            return self.make_rng("params")
        return _Key(self.names[1:], name=self.names[0])()


def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> Any:
    """Initialize a network for images (H, W, C): the same values with scan_blocks as without.

    A loop over blocks would draw its kernels otherwise, so they are drawn again from the keys of the single blocks.
    """
    images = jnp.zeros((1, *image_shape))
    # It runs once: on a CPU, optimizing the program takes longer than running it.
    options: Any = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    variables = jax.jit(lambda key: model.init(key, images, train=False), compiler_options=options)(key)
    if not (isinstance(model, ResNet) and model.scan_blocks):
        return variables
    init = jax.vmap(he_init(model.init_fan), in_axes=(0, None))
    init = jax.jit(init, static_argnums=1, compiler_options=options)
    for name, layers in variables["params"].items():
        if not (match := _BLOCKS.fullmatch(name)):
            continue
        for layer, values in layers.items():
            if "kernel" in values:
                length, *shape = values["kernel"].shape
                same_layers = [(f"{match[1]}{i + 2}", layer) for i in range(length)]
                keys: list[Any] = [_Key(names).apply({}, rngs={"params": key}) for names in same_layers]
                values["kernel"] = init(jnp.stack(keys), tuple(shape))
    return variables
