"""A network applied fully convolutionally, to images of any size (Sec. 3.4, "as in [40, 12]")."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_jax.models.borders import Borders
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import POOLED_SIDE, VGG

Size = tuple[int, int]

_EXACT = jax.lax.Precision.HIGHEST  # a mean is not to be rounded to bfloat16 or TF32


def fully_convolutional_logits(
    model: ResNet | VGG, variables: Any, images: jax.Array, sizes: jax.Array | None, input_size: Size
) -> jax.Array:
    """Return the logits of whole images, averaged over all positions of the input in them.

    The last pool keeps the size that it has on an input of `input_size` (7x7 on 224x224) and slides over the
    feature map with stride 1; the fully-connected layers are applied at each of its positions. On an image of
    `input_size` that is what the network itself returns.

    Images of different sizes may share a batch: each lies in the upper left corner of its array, and what is beyond
    its size has no influence. Every convolution and pool sees there what it would see beyond the border.

    Args:
      model: a network with its last layers.
      variables: of the network.
      images: [N, H, W, 3], normalized.
      sizes: [N, 2] int32, (height, width) of each image; None if all fill their arrays.
      input_size: (height, width) in pixels; no image may be smaller.

    Returns:
      [N, num_classes] float32.
    """
    backbone = model.clone(backbone_only=True)

    def last_map(images: Any) -> Any:
        features: Any = backbone.apply(variables, images, train=False)
        return features[list(model.feature_strides)[-1]]

    if sizes is None:
        feature_map = last_map(images)
        extents = jnp.broadcast_to(jnp.array(feature_map.shape[1:3]), (len(images), 2))
    else:
        borders = Borders(images, sizes)
        with nn.intercept_methods(borders.respect):
            feature_map = last_map(images)
        extents = borders.of(feature_map)
        feature_map = borders.fill(feature_map, 0)
    feature_map = feature_map.astype(jnp.float32)  # [N, H', W', C]

    if isinstance(model, VGG):
        return _slide_vgg(variables["params"], feature_map, extents)
    small = jax.eval_shape(last_map, jax.ShapeDtypeStruct((1, *input_size, 3), jnp.float32))
    height, width = small.shape[1:3]
    rows = _window_weights(extents[:, 0], height, feature_map.shape[1])
    columns = _window_weights(extents[:, 1], width, feature_map.shape[2])
    # Pool and last layer are linear: the mean over the positions of the pool goes first.
    pooled = jnp.einsum("nhwc,nh,nw->nc", feature_map, rows, columns, precision=_EXACT)
    return _dense(variables["params"]["fc"], pooled)


def _window_weights(lengths: jax.Array, window: int, padded: int) -> jax.Array:
    """Return the share of each place in the mean over all positions of a sliding mean: [N, padded].

    Args:
      lengths: [N], places that there are.
      window: places in a mean.
      padded: length of the result.
    """
    place = jnp.arange(padded)
    positions = lengths[:, None] - window + 1
    first = jnp.maximum(place - window + 1, 0)
    last = jnp.minimum(place, positions - 1)
    return jnp.maximum(last - first + 1, 0) / (window * positions)


def _slide_vgg(params: Any, feature_map: jax.Array, extents: jax.Array) -> jax.Array:
    """Apply fc6 to every 7x7 window of a map [N, H', W', 512], then fc7 and fc8, and average."""
    height, width = (size - POOLED_SIDE + 1 for size in feature_map.shape[1:3])
    rows, columns = (jnp.arange(n)[:, None] + jnp.arange(POOLED_SIDE) for n in (height, width))
    x = feature_map[:, rows][:, :, :, columns]  # [N, height, 7, width, 7, C]
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), height, width, -1)
    for name in ("fc6", "fc7"):
        x = nn.relu(_dense(params[name], x))
    logits = _dense(params["fc8"], x)  # [N, height, width, num_classes]
    rows, columns = (
        (jnp.arange(n) < extents[:, i, None] - POOLED_SIDE + 1).astype(jnp.float32)
        for i, n in enumerate((height, width))
    )
    return (
        jnp.einsum("nhwk,nh,nw->nk", logits, rows, columns, precision=_EXACT) / (rows.sum(1) * columns.sum(1))[:, None]
    )


def _dense(params: Any, x: jax.Array) -> Any:
    return nn.Dense(params["kernel"].shape[-1]).apply({"params": params}, x)
