"""ResNet-56 on CIFAR-100 by the paper's recipe for CIFAR-10; the paper has no result on it."""

import dataclasses

from resnet_jax.config import Config
from resnet_jax.recipes import cifar10_recipe


def get_config() -> Config:
    config = cifar10_recipe(depth=56)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, name="cifar100"))
