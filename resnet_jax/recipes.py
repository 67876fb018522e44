"""How the paper trains: one recipe for each family of networks; configs/ has a file for each network."""

from __future__ import annotations

from typing import Literal

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig

Shortcut = Literal["none", "A", "B", "C"]


def cifar10_recipe(depth: int, shortcut: Shortcut = "A") -> Config:
    """Return the configuration of a network for CIFAR-10 (Sec. 4.2).

    Args:
      depth: 20, 32, 44, 56, 110, 1202 or another 6n+2.
      shortcut: option of Sec. 3.3; "none" is the plain net.
    """
    # 600 blocks: compiled as loops, and only their inputs kept for the backward pass.
    loops = depth == 1202
    optim = OptimConfig()
    if depth >= 110 and shortcut != "none":
        # 0.01 "until the training error is below 80% (about 400 iterations)"; --optim.warmup error measures it.
        optim = OptimConfig(warmup="steps", warmup_learning_rate=0.01, warmup_steps=400)
    return Config(model=ModelConfig(depth=depth, shortcut=shortcut, scan_blocks=loops, remat=loops), optim=optim)


def imagenet_recipe(depth: int, shortcut: Shortcut) -> Config:
    """Return the configuration of a network of Table 1 for ImageNet (Sec. 3.4).

    `--model.dtype bfloat16` is faster where the hardware has it, and `--optim.accumulation-steps 2` and more save
    memory; the first is another experiment than the paper's, which computed in float32, the second is not.

    Args:
      depth: 18, 34, 50, 101 or 152.
      shortcut: option of Sec. 3.3; "none" is the plain net.
    """
    return Config(
        # 256 images on 8 GPUs, each with its own BN statistics.
        model=ModelConfig(family="imagenet", depth=depth, shortcut=shortcut, bn_group_size=32),
        # "its shorter side randomly sampled in [256, 480]", "the standard color augmentation in [21]"
        data=DataConfig(name="imagenet", batch_size=256, eval_batch_size=256, shorter_side=(256, 480), lighting=0.1),
        # "starts from 0.1 and is divided by 10 when the error plateaus": it does after 30, 60 and 90 epochs of 5,005
        # steps; --optim.schedule plateau measures it instead.
        optim=OptimConfig(learning_rate=0.1, boundaries=(150_000, 300_000, 450_000), weight_decay=1e-4),
        # "for up to 60 x 10^4 iterations"
        run=RunConfig(steps=600_000, log_every=100, eval_every=5_000, save_every=5_000),
    )


def voc_recipe(family: Literal["imagenet", "vgg"], depth: int) -> Config:
    """Return the configuration of Faster R-CNN on PASCAL VOC 2007 and 2012 (Table 7, appendix A).

    Begin with a classifier: --init-from. The paper trains in four stages; both networks in each step is what its
    authors' later code does (--detection.schedule alternating is the paper's).

    Args:
      family: "imagenet" or "vgg".
      depth: 101 or 16.
    """
    # "the BN layers become linear activations with constant offsets and scales"; what is frozen below conv3_x is that
    # of the authors' later detector (R-FCN), as the paper does not say.
    trainable = ("conv3", "conv4", "conv5", "fc6", "fc7") if family == "vgg" else ("stage2", "stage3", "stage4")
    return Config(
        model=ModelConfig(
            family=family, depth=depth, shortcut="A" if family == "vgg" else "B", frozen_bn=family != "vgg"
        ),
        data=DataConfig(
            name="voc",
            train_sets=("2007_trainval", "2012_trainval"),
            test_sets=("2007_test",),
            batch_size=1,
            eval_batch_size=1,
        ),
        optim=OptimConfig(
            learning_rate=0.001,
            boundaries=(80_000,),
            weight_decay=5e-4,
            bias_factor=2.0,
            trainable=(*trainable, "head"),
        ),
        run=RunConfig(steps=110_000, log_every=100, eval_every=10_000, save_every=5_000),
    )
