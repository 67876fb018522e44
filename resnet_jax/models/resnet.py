"""Plain and residual networks of the paper (Sec. 3.3, 4.2)."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_jax.models.blocks import BasicBlock, Shortcut, ZeroChannels
from resnet_jax.models.conv import Fan, conv, he_init
from resnet_jax.models.norm import BatchNorm, RunningVariance


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks, global average pooling and a fully-connected layer.

    Every stage but the first begins with stride 2. `train` has no default: it decides whether BN normalizes by
    the batch, and then `batch_stats` must be mutable:

        logits = model.apply(variables, images, train=False)
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

    Attributes:
      blocks: blocks in each stage.
      filters: filters of each stage; the stem has those of the first.
      num_classes: width of the last layer.
      shortcut: "none" makes the plain net; A, B, C are the options of Sec. 3.3.
      zero_channels: where option A puts its zero channels; see BasicBlock.
      bn_group_size: images that share BN statistics, None for the whole batch; the paper has 64 on CIFAR.
      bn_decay: share of the old value in the running statistics.
      running_variance: "unbiased" or "biased"; see BatchNorm.
      init_fan: fan of the He initialization.
      dtype: of the activations. Parameters, statistics and logits are float32.
    """

    blocks: tuple[int, ...]
    filters: tuple[int, ...]
    num_classes: int
    shortcut: Shortcut = "A"
    zero_channels: ZeroChannels = "end"
    bn_group_size: int | None = None
    bn_decay: float = 0.9
    running_variance: RunningVariance = "unbiased"
    init_fan: Fan = "fan_in"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Return the output of every part by name, in forward order.

        Args:
          images: [N, H, W, 3], normalized.
          train: see the class.

        Returns:
          "stem" and "stage1", "stage2", ... [N, H', W', C] in `dtype`; "pooled" [N, C] and "logits"
          [N, num_classes] in float32.
        """
        chex.assert_rank(images, 4)
        make_conv = partial(conv, init_fan=self.init_fan, dtype=self.dtype)
        make_norm = partial(
            BatchNorm,
            group_size=self.bn_group_size,
            decay=self.bn_decay,
            running_variance=self.running_variance,
            dtype=self.dtype,
        )
        x = make_conv(self.filters[0], 3, name="stem_conv")(images.astype(self.dtype))
        x = nn.relu(make_norm(name="stem_bn")(x, train=train))
        outputs = {"stem": x}
        for stage, (blocks, filters) in enumerate(zip(self.blocks, self.filters, strict=True), start=1):
            for block in range(1, blocks + 1):
                x = BasicBlock(
                    filters=filters,
                    stride=2 if stage > 1 and block == 1 else 1,
                    shortcut=self.shortcut,
                    zero_channels=self.zero_channels,
                    conv=make_conv,
                    norm=make_norm,
                    name=f"stage{stage}_block{block}",  # the checkpoint format: stable for ever
                )(x, train=train)
            outputs[f"stage{stage}"] = x
        x = x.astype(jnp.float32).mean((1, 2))  # [N, C]
        outputs["pooled"] = x
        outputs["logits"] = nn.Dense(self.num_classes, kernel_init=he_init(self.init_fan), name="fc")(x)
        return outputs

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Map images [N, H, W, 3] to logits [N, num_classes] float32."""
        return self.features(images, train=train)["logits"]


def cifar_resnet(depth: int, *, num_classes: int = 10, **options: Any) -> ResNet:
    """Build the network of Sec. 4.2 with `depth` = 6n+2 layers: 2n of 3x3 for each of 16, 32, 64 filters.

    Args:
      depth: 20, 32, 44, 56, 110, 1202, or any other 6n+2.
      num_classes: width of the last layer.
      **options: further attributes of ResNet; shortcut="none" makes the plain net.

    Raises:
      ValueError: depth is not 6n+2.
    """
    n, remainder = divmod(depth - 2, 6)
    if remainder or n < 1:
        raise ValueError(f"depth must be 6n+2: 20, 32, 44, 56, 110, 1202; got {depth}")
    return ResNet(blocks=(n, n, n), filters=(16, 32, 64), num_classes=num_classes, **options)
