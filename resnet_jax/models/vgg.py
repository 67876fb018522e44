"""VGG-16 and VGG-19 (Simonyan & Zisserman 2015, configurations D and E), the paper's references."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_jax.models.conv import ConvGeneralDilated, Fan, check_images, conv, he_init
from resnet_jax.models.pool import AdaptiveAveragePool, MaxPool

_FILTERS = (64, 128, 256, 512, 512)
_CONVS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
POOLED_SIDE = 7  # of the map that fc6 takes: 224 / 2^5


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with bias and a 2x2 max pool, then three fully-connected layers; no BN.

    With train=True the dropout of fc6 and fc7 needs a key: `model.apply(variables, images, train=True,
    rngs={"dropout": key})`. Images of another size than 224x224 are averaged to the 7x7 map that fc6 takes.

    Attributes:
      convs: convolutions in each stage.
      num_classes: width of fc8.
      dropout: share of the outputs of fc6 and fc7 that training drops (0.5 as published).
      frozen: of `parts`, those that training leaves as they are.
      init_fan: fan of the He initialization.
      backbone_only: leave out the fully-connected layers; calling the model then returns what features() does.
      last_pool: whether pool5 is there.
      begin: "fc6" takes the 7x7 map behind pool5; with backbone_only features() then has "fc7" alone.
      conv_general_dilated: jax.lax.conv_general_dilated, or that of models/cpu_conv.py or gpu_conv.py.
      dtype: of the activations. Parameters and logits are float32.
    """

    convs: tuple[int, ...]
    num_classes: int
    dropout: float = 0.5
    frozen: tuple[str, ...] = ()
    init_fan: Fan = "fan_in"
    backbone_only: bool = False
    last_pool: bool = True
    begin: Literal["conv1", "fc6"] = "conv1"
    conv_general_dilated: ConvGeneralDilated = jax.lax.conv_general_dilated
    dtype: DTypeLike = jnp.float32

    bn_group_size = None  # there is no BN

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels of the image to one step in each feature map, by name in forward order."""
        if self.begin == "fc6":
            return {}
        last = len(self.convs)
        return {f"conv{stage}": 2 ** (stage - (stage == last and not self.last_pool)) for stage in range(1, last + 1)}

    def cut(self) -> tuple[VGG, VGG]:
        """Return all up to conv5_3, which images go through once, and fc6 and fc7, through which regions of them go.

        RoI pooling stands in the place of pool5 (Girshick 2015). Variables of the whole fit both by their names.
        """
        whole = self.clone(backbone_only=True)
        return whole.clone(last_pool=False), whole.clone(begin="fc6")

    @property
    def parts(self) -> tuple[str, ...]:
        """What may be frozen: "conv1", ..., "conv5", "fc6", "fc7", and "head", which is fc8."""
        return (*(f"conv{stage}" for stage in range(1, len(self.convs) + 1)), "fc6", "fc7", "head")

    def trainable(self, params: Any) -> Any:
        """Return a tree like `params` of bools: False for what training leaves as it is."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[0].key.partition("_")[0].replace("fc8", "head") not in self.frozen, params
        )

    @nn.compact
    def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Return "conv1" to "conv5" [N, H', W', C], each after its pool, and "logits" [N, num_classes] float32.

        Args:
          images: [N, H, W, 3], normalized, from 32x32 up.
          train: whether fc6 and fc7 drop outputs.
        """
        check_images(images)
        make_conv = partial(
            conv,
            use_bias=True,
            init_fan=self.init_fan,
            dtype=self.dtype,
            conv_general_dilated=self.conv_general_dilated,
        )
        x = images.astype(self.dtype)
        outputs = {}
        for stage, (convs, filters) in enumerate(zip(self.convs, _FILTERS, strict=True), start=1):
            if self.begin == "fc6":
                break
            for number in range(1, convs + 1):
                x = nn.relu(make_conv(filters, 3, name=f"conv{stage}_{number}")(x))
            if stage < len(self.convs) or self.last_pool:
                x = MaxPool(2, 2, name=f"pool{stage}")(x)
            outputs[f"conv{stage}"] = x
        if self.backbone_only and self.begin != "fc6":
            return outputs
        if x.shape[1:3] != (POOLED_SIDE, POOLED_SIDE):
            x = AdaptiveAveragePool(POOLED_SIDE, name="pool")(x)
        x = x.reshape(x.shape[0], -1)  # [N, 7 * 7 * 512]; len() would refuse the symbolic N of an export
        for name in ("fc6", "fc7"):
            x = nn.relu(nn.Dense(4096, kernel_init=he_init(self.init_fan), dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if self.backbone_only:
            return {"fc7": x}
        head = nn.Dense(self.num_classes, kernel_init=he_init(self.init_fan), name="fc8")
        outputs["logits"] = head(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return outputs

    def __call__(self, images: jax.Array, *, train: bool) -> Any:
        """Map images [N, H, W, 3] to logits [N, num_classes] float32, or to features() if backbone_only."""
        outputs = self.features(images, train=train)
        return outputs if self.backbone_only else outputs["logits"]


def vgg(depth: int, *, num_classes: int = 1000, **options: Any) -> VGG:
    """Build VGG-16 or VGG-19.

    Raises:
      ValueError: another depth.
    """
    if depth not in _CONVS:
        raise ValueError(f"depth must be 16 or 19; got {depth}")
    return VGG(convs=_CONVS[depth], num_classes=num_classes, **options)
