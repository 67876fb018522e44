"""A tree of arrays as few vectors: what treats all parameters alike is then a few kernels, not a few for each array."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from chex import ArrayTree

_KERNEL = "kernel"


class Layout:
    """Where the arrays of a tree lie in its vectors: one for all kernels, one for all others.

    The vectors are {"kernel": [K], "other": [M]}, without one that would be empty. So an optimizer that tells
    parameters by their last name does the same with them as with the tree. Kernels of convolutions lie with their
    filters first: that is how a GPU's convolutions take them and make their gradients, and XLA copies none of them.
    """

    def __init__(self, tree: ArrayTree):
        """Take the names, shapes and dtypes of a tree of arrays, or of what stands for them; all of one dtype."""
        named, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        self._shapes = [leaf.shape for _, leaf in named]
        self._groups: dict[str, list[int]] = {}
        for number, (path, _) in enumerate(named):
            group = _KERNEL if getattr(path[-1], "key", None) == _KERNEL else "other"
            self._groups.setdefault(group, []).append(number)

    def pack(self, tree: ArrayTree) -> dict[str, jax.Array]:
        """Lay the arrays of a tree of this layout one behind the other."""
        leaves = jax.tree.leaves(tree)
        return {
            group: jnp.concatenate([_filters_first(leaves[number]).ravel() for number in numbers])
            for group, numbers in self._groups.items()
        }

    def unpack(self, vectors: dict[str, jax.Array]) -> Any:
        """Undo pack()."""
        leaves: list[Any] = [None] * len(self._shapes)
        for group, numbers in self._groups.items():
            start = 0
            for number in numbers:
                shape = self._shapes[number]
                size = math.prod(shape)
                vector = jax.lax.slice_in_dim(vectors[group], start, start + size)
                leaves[number] = _filters_last(vector, shape)
                start += size
        return jax.tree.unflatten(self._structure, leaves)

    def pack_within(self, tree: Any) -> Any:
        """Pack each tree of this layout that is part of another, such as the velocity in the state of an optimizer."""
        return self._replace(tree, self._structure, self.pack)

    def unpack_within(self, tree: Any) -> Any:
        """Undo pack_within()."""
        return self._replace(tree, jax.tree.structure(dict.fromkeys(self._groups, 0)), self.unpack)

    def _replace(self, tree: Any, structure: Any, convert: Any) -> Any:
        def has_it(node: Any) -> bool:
            return jax.tree.structure(node) == structure

        return jax.tree.map(lambda node: convert(node) if has_it(node) else node, tree, is_leaf=has_it)


def _filters_first(leaf: jax.Array) -> jax.Array:
    return jnp.moveaxis(leaf, -1, 0) if leaf.ndim == 4 else leaf


def _filters_last(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if len(shape) != 4:
        return numbers.reshape(shape)
    return jnp.moveaxis(numbers.reshape(shape[-1], *shape[:-1]), 0, -1)
