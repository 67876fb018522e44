"""Plain-32 on CIFAR-10: the paper's Fig. 6 (left)."""

from resnet_jax.config import Config
from resnet_jax.recipes import cifar10_recipe


def get_config() -> Config:
    return cifar10_recipe(depth=32, shortcut="none")
