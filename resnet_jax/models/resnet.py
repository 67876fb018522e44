"""Plain and residual networks of the paper (Table 1, Sec. 3.3, 4.2)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_jax.models.blocks import BasicBlock, Block, BottleneckBlock, Shortcut, StrideOn, ZeroChannels
from resnet_jax.models.conv import ConvGeneralDilated, Fan, check_images, conv, he_init
from resnet_jax.models.norm import BatchNorm, RunningVariance
from resnet_jax.models.pool import GlobalAveragePool, PoolPadding, stem_pool


class ResNet(nn.Module):
    """A stem, stages of blocks, global average pooling and a fully-connected layer.

    Every stage but the first begins with stride 2. `train` has no default: it decides whether BN normalizes by
    the batch, and then `batch_stats` must be mutable:

        logits = model.apply(variables, images, train=False)
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

    Attributes:
      stem: "cifar" is a 3x3 convolution; "imagenet" a 7x7 of stride 2 and a 3x3 max pool of stride 2.
      block: "basic" or "bottleneck".
      blocks: blocks in each stage.
      filters: filters of each stage; the stem has those of the first.
      num_classes: width of the last layer.
      shortcut: "none" makes the plain net; A, B, C are the options of Sec. 3.3.
      zero_channels: where option A puts its zero channels; see Block.
      stride_on: which convolution of a bottleneck subsamples; see BottleneckBlock.
      pool_padding: of the stem's max pool: "caffe" (none, rounded up) or "torch" (1 on each side).
      bn_group_size: images that share BN statistics, None for the whole batch; the paper has 64 on CIFAR and 32
        on ImageNet.
      bn_decay: share of the old value in the running statistics.
      running_variance: "unbiased" or "biased"; see BatchNorm.
      output_stride: the most pixels of the image to one step in a feature map: 8 or 16, as segmentation and detection
        want it, of the same weights. Stages that would subsample further have dilated convolutions instead, which see
        the same pixels around each step; None for as many as there are.
      frozen_bn: normalize by the running statistics also in training, and leave all of BN as it is.
      frozen: of `parts`, those that training leaves as they are, BN and its statistics too.
      init_fan: fan of the He initialization.
      backbone_only: leave out pooling and classification; calling the model then returns what features() does.
      begin, end: the first stage and the last one, counted from 1; what begins later takes the map [N, H, W, C] of the
        stage before, without the stem. `end` needs backbone_only. Variables have the names of the whole network.
      scan_blocks: make one loop of the equal blocks of a stage, all but the first, so that compilation does not
        take longer for a deeper network. Their variables are stacked under "stage1_blocks" and so on;
        stack_blocks() and unstack_blocks() convert them.
      remat: keep only the input of each block for the backward pass and compute the rest again.
      conv_general_dilated: jax.lax.conv_general_dilated, or that of models/cpu_conv.py or gpu_conv.py.
      dtype: of the activations. Parameters, statistics and logits are float32.
    """

    stem: Literal["cifar", "imagenet"]
    block: Literal["basic", "bottleneck"]
    blocks: tuple[int, ...]
    filters: tuple[int, ...]
    num_classes: int
    shortcut: Shortcut
    zero_channels: ZeroChannels = "end"
    stride_on: StrideOn = "1x1"
    pool_padding: PoolPadding = "caffe"
    bn_group_size: int | None = None
    bn_decay: float = 0.9
    running_variance: RunningVariance = "unbiased"
    output_stride: int | None = None
    frozen_bn: bool = False
    frozen: tuple[str, ...] = ()
    init_fan: Fan = "fan_in"
    backbone_only: bool = False
    begin: int = 1
    end: int | None = None
    scan_blocks: bool = False
    remat: bool = False
    conv_general_dilated: ConvGeneralDilated = jax.lax.conv_general_dilated
    dtype: DTypeLike = jnp.float32

    @property
    def feature_strides(self) -> dict[str, int]:
        """Pixels of the image to one step in each feature map, by name in forward order.

        Raises:
          ValueError: output_stride is none of them.
        """
        stem, first = (1, 1) if self.stem == "cifar" else (2, 4)
        stages = [first * 2**i for i in range(len(self.blocks))]
        if self.output_stride not in (None, *stages):
            raise ValueError(f"output_stride must be one of {', '.join(map(str, stages))}; got {self.output_stride}")
        most = self.output_stride or stages[-1]
        strides = {"stem" if self.stem == "cifar" else "conv1": stem} if self.begin == 1 else {}
        there = list(enumerate(stages))[self.begin - 1 : self.end]
        return strides | {self._stage_name(i): min(stride, most) for i, stride in there}

    def cut(self) -> tuple[ResNet, ResNet]:
        """Return all up to conv4_x, which images go through once, and conv5_x, through which regions of them go.

        For the networks of Table 1 (the paper's appendix A). Variables of the whole fit both by their names.
        """
        whole = self.clone(backbone_only=True)
        return whole.clone(end=3), whole.clone(begin=4)

    @property
    def parts(self) -> tuple[str, ...]:
        """What may be frozen: "stem", "stage1", "stage2", ..., "head"."""
        return ("stem", *(f"stage{stage}" for stage in range(1, len(self.blocks) + 1)), "head")

    def trainable(self, params: Any) -> Any:
        """Return a tree like `params` of bools: False for what training leaves as it is (frozen_bn, frozen)."""

        def of_leaf(path: Any, _: Any) -> bool:
            part = path[0].key.partition("_")[0].replace("fc", "head")
            is_bn = "bn" in jax.tree_util.keystr(path[-2:-1])
            return part not in self.frozen and not (self.frozen_bn and is_bn)

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    def _stage_name(self, index: int) -> str:
        """The paper's names for the ImageNet networks (Table 1); those for CIFAR have none there."""
        return f"stage{index + 1}" if self.stem == "cifar" else f"conv{index + 2}_x"

    @nn.compact
    def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Return the output of every part by name, in forward order.

        Args:
          images: [N, H, W, 3], normalized; from 32x32 up with the ImageNet stem.
          train: see the class.

        Returns:
          "stem" and "stage1", "stage2", ... (CIFAR) or "conv1" (before the pool) and "conv2_x", ... (ImageNet)
          [N, H', W', C] in `dtype`, of the strides in feature_strides; "pooled" [N, C] and "logits"
          [N, num_classes] in float32, unless backbone_only.
        """
        check_images(images)
        make_conv = partial(
            conv, init_fan=self.init_fan, dtype=self.dtype, conv_general_dilated=self.conv_general_dilated
        )

        def norm_of(part: str) -> Any:
            return partial(
                BatchNorm,
                group_size=self.bn_group_size,
                decay=self.bn_decay,
                running_variance=self.running_variance,
                frozen=self.frozen_bn or part in self.frozen,
                dtype=self.dtype,
            )

        def ended(part: str, x: jax.Array) -> jax.Array:
            """No gradient is needed where all that comes before is frozen."""
            before = self.parts[: self.parts.index(part) + 1]
            return jax.lax.stop_gradient(x) if set(before) <= set(self.frozen) else x

        make_block = BasicBlock if self.block == "basic" else partial(BottleneckBlock, stride_on=self.stride_on)
        names = iter(self.feature_strides)
        stage_strides = list(self.clone(begin=1, end=None).feature_strides.values())[1:]
        stages = list(enumerate(zip(self.blocks, self.filters, strict=True), start=1))

        x = images.astype(self.dtype)
        outputs = {}
        if self.begin == 1:
            size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
            x = make_conv(self.filters[0], size, stride=stride, name="stem_conv")(x)
            x = ended("stem", nn.relu(norm_of("stem")(name="stem_bn")(x, train=train)))
            outputs = {next(names): x}
            if self.stem == "imagenet":
                x = stem_pool(self.pool_padding)(x)
        dilation = 1
        for stage, (blocks, filters) in stages[self.begin - 1 : self.end]:
            subsamples = stage > 1 and stage_strides[stage - 1] > stage_strides[stage - 2]
            before, dilation = dilation, dilation * (1 if stage == 1 or subsamples else 2)
            make = partial(
                make_block,
                filters=filters,
                shortcut=self.shortcut,
                zero_channels=self.zero_channels,
                conv=make_conv,
                norm=norm_of(f"stage{stage}"),
            )
            # The names are the checkpoint format: stable for ever.
            first = make(stride=1 + subsamples, dilations=(before, dilation), name=f"stage{stage}_block1")
            x = self._apply(first, x, train=train)
            make = partial(make, stride=1, dilations=(dilation, dilation))
            if self.scan_blocks and blocks > 1:
                x = self._apply(make(name=f"stage{stage}_blocks"), x, train=train, times=blocks - 1)
            else:
                for block in range(2, blocks + 1):
                    x = self._apply(make(name=f"stage{stage}_block{block}"), x, train=train)
            x = ended(f"stage{stage}", x)
            outputs[next(names)] = x
        if not self.backbone_only:
            outputs["pooled"] = GlobalAveragePool(name="pool")(x)
            head = nn.Dense(self.num_classes, kernel_init=he_init(self.init_fan), name="fc")
            outputs["logits"] = head(outputs["pooled"])
        return outputs

    def _apply(self, block: Block, x: jax.Array, *, train: bool, times: int | None = None) -> jax.Array:
        """Apply a block, or with `times` so many blocks of stacked variables, one after the other."""

        def apply(block: Block, x: jax.Array) -> jax.Array:
            return block(x, train=train)

        if self.remat:
            apply = nn.remat(apply, prevent_cse=times is None)  # inside a loop nothing could undo it
        if times is None:
            return apply(block, x)
        scan = nn.scan(
            lambda block, x: (apply(block, x), None),
            variable_axes={"params": 0, "batch_stats": 0, "responses": 0},
            split_rngs={"params": True},
            length=times,
        )
        return scan(block, x)[0]

    def __call__(self, images: jax.Array, *, train: bool) -> Any:
        """Map images [N, H, W, 3] to logits [N, num_classes] float32, or to features() if backbone_only."""
        outputs = self.features(images, train=train)
        return outputs if self.backbone_only else outputs["logits"]


def cifar_resnet(depth: int, *, num_classes: int = 10, **options: Any) -> ResNet:
    """Build the network of Sec. 4.2 with `depth` = 6n+2 layers: 2n of 3x3 for each of 16, 32, 64 filters.

    Args:
      depth: 20, 32, 44, 56, 110, 1202, or any other 6n+2.
      num_classes: width of the last layer.
      **options: further attributes of ResNet; shortcut is "A" unless given, and "none" makes the plain net.

    Raises:
      ValueError: depth is not 6n+2.
    """
    n, remainder = divmod(depth - 2, 6)
    if remainder or n < 1:
        raise ValueError(f"depth must be 6n+2: 20, 32, 44, 56, 110, 1202; got {depth}")
    return ResNet(
        stem="cifar",
        block="basic",
        blocks=(n, n, n),
        filters=(16, 32, 64),
        num_classes=num_classes,
        **{"shortcut": "A", **options},
    )


IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}  # Table 1


def imagenet_resnet(depth: int, *, num_classes: int = 1000, **options: Any) -> ResNet:
    """Build a network of Table 1: basic blocks for 18 and 34 layers, bottlenecks for 50, 101 and 152.

    Args:
      depth: 18, 34, 50, 101 or 152.
      num_classes: width of the last layer.
      **options: further attributes of ResNet; shortcut is "B" unless given, and "none" makes the plain net.

    Raises:
      ValueError: another depth, or a plain net of bottlenecks, which the paper does not have.
    """
    if depth not in IMAGENET_BLOCKS:
        raise ValueError(f"depth must be one of 18, 34, 50, 101, 152; got {depth}")
    options = {"shortcut": "B", **options}
    block: Literal["basic", "bottleneck"] = "basic" if depth < 50 else "bottleneck"
    if options["shortcut"] == "none" and block == "bottleneck":
        raise ValueError(f"the plain nets have 18 or 34 layers; got {depth}")
    return ResNet(
        stem="imagenet",
        block=block,
        blocks=IMAGENET_BLOCKS[depth],
        filters=(64, 128, 256, 512),
        num_classes=num_classes,
        **options,
    )
