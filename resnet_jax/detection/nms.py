"""Non-maximum suppression, exactly the greedy one, without a loop over boxes.

Greedy suppression keeps a box unless a better one that is kept overlaps it. Begin with all, and compute that again from
what is kept until nothing changes: the i-th box is right after i passes at the latest, mostly after a few.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.detection.boxes import iou

_TILE = 256


def suppress(boxes: jax.Array, alive: jax.Array, threshold: float) -> jax.Array:
    """Return which boxes greedy suppression keeps: [N] bool.

    Args:
      boxes: [N, 4], the best first.
      alive: [N] bool, False for what is no box.
      threshold: a box is dropped if its IoU with a better one that is kept is above it.
    """
    order = jnp.arange(len(boxes))
    better = (iou(boxes, boxes) > threshold) & (order[:, None] < order)  # [i, j]: i would suppress j

    def again(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, _ = carry
        after = alive & ~(better & kept[:, None]).any(0)
        return after, (after != kept).any()

    return jax.lax.while_loop(lambda carry: carry[1], again, (alive, jnp.bool(True)))[0]


def first_kept(boxes: jax.Array, alive: jax.Array, threshold: float, most: int) -> tuple[jax.Array, jax.Array]:
    """Return the first `most` boxes that greedy suppression keeps: their indices [most] int32, and ok [most] bool.

    Tile by tile: settle some boxes, strike what they suppress, and stop when enough are kept. The memory is that of a
    tile times all boxes. Arguments: see suppress().
    """
    count = len(boxes)
    tiles = -(-count // _TILE)
    more = tiles * _TILE - count
    boxes, alive = jnp.pad(boxes, ((0, more), (0, 0))), jnp.pad(alive, (0, more))
    place = jnp.arange(len(boxes))

    def settle(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        tile, alive, kept_so_far = carry
        begin = tile * _TILE
        of_tile = jax.lax.dynamic_slice(boxes, (begin, 0), (_TILE, 4))
        kept = suppress(of_tile, jax.lax.dynamic_slice(alive, (begin,), (_TILE,)), threshold)
        struck = ((iou(of_tile, boxes) > threshold) & kept[:, None]).any(0)  # none of those kept before
        alive = jax.lax.dynamic_update_slice(alive & ~struck, kept, (begin,))
        return tile + 1, alive, kept_so_far + kept.sum()

    def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tile, _, kept_so_far = carry
        return (tile < tiles) & (kept_so_far < most)

    tile, kept, _ = jax.lax.while_loop(goes_on, settle, (jnp.int32(0), alive, jnp.int32(0)))
    kept = kept & (place < tile * _TILE)  # what is behind is not settled
    (index,) = jnp.nonzero(kept, size=most, fill_value=0)
    return index.astype(jnp.int32), jnp.arange(most) < kept.sum()
