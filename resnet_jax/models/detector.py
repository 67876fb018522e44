"""Faster R-CNN on one of the paper's networks (Sec. 4.3 and appendix A; Ren et al. 2015)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config, DetectionConfig
from resnet_jax.detection.anchors import base_anchors, grid_anchors
from resnet_jax.detection.roi import roi_pool
from resnet_jax.errors import UserError
from resnet_jax.models import build_model, freeze_all_but
from resnet_jax.models.backend import for_this_backend
from resnet_jax.models.borders import Borders
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.vgg import VGG

STRIDE = 16  # pixels of the image to one step of the map: of conv4_x, and of conv5_3 of VGG
SMALL_IMAGE = (64, 64, 3)  # to initialize with: no shape of a parameter depends on it
PARTS = ("trunk", "tail", "rpn_trunk")  # whose variables are those of the classifier
NEW_LAYERS = ("rpn", "scores", "deltas")  # what no classifier has


class OfImages(NamedTuple):
    """What the layers say that images go through once.

    Attributes:
      feature_map: [B, H, W, C], of stride 16.
      logits: [B, H * W * A, 2] float32, background and object of each anchor.
      deltas: [B, H * W * A, 4] float32, from the anchors to the objects.
    """

    feature_map: jax.Array
    logits: jax.Array
    deltas: jax.Array


class RPN(nn.Module):
    """Region proposal network: a 3x3 convolution and two siblings of 1x1.

    Attributes:
      filters: of the 3x3 convolution.
      anchors: at each position.
    """

    filters: int
    anchors: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x [B, H, W, C] to logits [B, H * W * A, 2] and deltas [B, H * W * A, 4], float32."""
        init = nn.initializers.normal(0.01)
        x = nn.relu(nn.Conv(self.filters, (3, 3), padding=1, kernel_init=init, dtype=x.dtype, name="conv")(x))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        logits = nn.Conv(2 * self.anchors, (1, 1), kernel_init=init, name="scores")(x)
        deltas = nn.Conv(4 * self.anchors, (1, 1), kernel_init=init, name="deltas")(x)
        return logits.reshape(len(x), -1, 2), deltas.reshape(len(x), -1, 4)


class Detector(nn.Module):
    """A trunk that images go through once, an RPN on its map, and a tail that pooled regions go through.

    The variables of trunk and tail are those of the classifier, cut in two: `params["trunk"]` has conv1 to conv4_x of a
    ResNet, `params["tail"]` conv5_x; of VGG conv1_1 to conv5_3, fc6 and fc7.

    Attributes:
      trunk, tail: of ResNet.cut() or VGG.cut().
      num_classes: of objects, background not counted.
      anchor_scales, anchor_ratios, rpn_filters: see DetectionConfig.
      pooled_size: bins to a side of a region; conv5_x has a stride of 2, so that 14 become 7.
      rpn_trunk: a trunk for the RPN alone, which alternating training begins with; None if it has none.
    """

    trunk: ResNet | VGG
    tail: ResNet | VGG
    num_classes: int
    anchor_scales: tuple[float, ...] = (8.0, 16.0, 32.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_filters: int = 512
    pooled_size: int = 14
    rpn_trunk: ResNet | VGG | None = None

    def setup(self) -> None:
        self.rpn = RPN(self.rpn_filters, len(self.anchor_scales) * len(self.anchor_ratios))
        self.scores = nn.Dense(self.num_classes + 1, kernel_init=nn.initializers.normal(0.01))
        self.deltas = nn.Dense(4 * (self.num_classes + 1), kernel_init=nn.initializers.normal(0.001))

    def of_images(self, images: jax.Array, sizes: jax.Array | None, *, train: bool, separate: bool = False) -> OfImages:
        """Apply trunk and RPN.

        Args:
          images: [B, H, W, 3], normalized.
          sizes: [B, 2] int32, height and width of each image, which lies in the upper left corner of its array; what is
            beyond has no influence. None if all fill their arrays.
          train: see ResNet.
          separate: whether the RPN takes the map of its own trunk.
        """
        if sizes is None:
            return self._of_images(images, train=train, separate=separate)
        borders = Borders(images, sizes)
        with nn.intercept_methods(borders.respect):
            found = self._of_images(images, train=train, separate=separate)
        return found._replace(feature_map=borders.fill(found.feature_map, 0))

    def _of_images(self, images: jax.Array, *, train: bool, separate: bool) -> OfImages:
        def last(trunk: Any) -> jax.Array:
            return list(trunk(images, train=train).values())[-1]

        feature_map = last(self.trunk)
        return OfImages(feature_map, *self.rpn(last(self.rpn_trunk) if separate else feature_map))

    def of_regions(self, feature_map: jax.Array, regions: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Pool regions and classify them.

        Args:
          feature_map: [B, H, W, C], of of_images().
          regions: [B, R, 4], in pixels of the images.
          train: see ResNet.

        Returns:
          logits [B, R, K + 1] and deltas [B, R, K + 1, 4], float32; class 0 is background.
        """
        pool = jax.vmap(lambda of_image, rois: roi_pool(of_image, rois, 1 / STRIDE, self.pooled_size))
        pooled = pool(feature_map, regions)  # [B, R, P, P, C]
        features: Any = self.tail(pooled.reshape(-1, *pooled.shape[2:]), train=train)
        x = list(features.values())[-1]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x.mean((1, 2)) if x.ndim == 4 else x  # [B * R, C]
        shape = (*regions.shape[:2], self.num_classes + 1)
        return self.scores(x).reshape(shape), self.deltas(x).reshape(*shape, 4)

    def __call__(self, images: jax.Array, *, train: bool) -> Any:
        """Apply all layers to images and one region of each: this is for initialization."""
        found = self.of_images(images, None, train=train, separate=self.rpn_trunk is not None)
        height, width = images.shape[1:3]
        whole = jnp.array([0, 0, width - 1, height - 1], jnp.float32)
        return found, self.of_regions(found.feature_map, jnp.tile(whole, (len(images), 1, 1)), train=train)

    @property
    def parts(self) -> tuple[str, ...]:
        """What may be frozen: those of the classifier; "head" are the layers that it has not, the RPN among them."""
        return self.trunk.parts

    def trainable(self, params: Any) -> Any:
        """Return a tree like `params` of bools: False for what training leaves as it is (frozen_bn, frozen)."""
        head = "head" not in self.trunk.frozen
        mask = {name: jax.tree.map(lambda _: head, params[name]) for name in NEW_LAYERS}
        return mask | {name: getattr(self, name).trainable(params[name]) for name in PARTS if name in params}

    def anchors(self, height: int, width: int) -> np.ndarray:
        """Return the anchors of a feature map [height * width * A, 4] float32, in the order of OfImages."""
        return grid_anchors(height, width, STRIDE, base_anchors(self.anchor_ratios, self.anchor_scales))


def make_detector(classifier: ResNet | VGG, num_classes: int, config: DetectionConfig) -> Detector:
    """Build a detector on a classifier of Table 1 or VGG.

    Args:
      classifier: its structure, dtype and what is frozen hold for trunk and tail; the BN groups of the tail are the
        regions of those of the trunk.
      num_classes: of objects.
      config: of the detection.
    """
    trunk, tail = classifier.cut()
    if isinstance(tail, ResNet) and tail.bn_group_size is not None:
        tail = tail.clone(bn_group_size=tail.bn_group_size * config.regions)
    return Detector(
        trunk,
        tail,
        num_classes,
        anchor_scales=config.anchor_scales,
        anchor_ratios=config.anchor_ratios,
        rpn_filters=config.rpn_filters,
        pooled_size=config.pooled_size or (7 if isinstance(classifier, VGG) else 14),
        rpn_trunk=trunk.clone() if config.schedule == "alternating" else None,
    )


def build_detector(config: Config, num_classes: int) -> Detector:
    """Build the configured detector.

    Raises:
      UserError: there is no such network, or none that a detector can stand on.
    """
    if config.model.family not in ("imagenet", "vgg"):  # whose maps have a stride of 16
        raise UserError(
            f"--model.family {config.model.family}: a detector needs a network for ImageNet: imagenet or vgg"
        )
    classifier = freeze_all_but(build_model(config.model, 0), config.optim.trainable)
    # Each device computes its own images: their convolutions are not spread over several.
    return make_detector(for_this_backend(classifier, parts=1), num_classes, config.detection)
