"""Plain-110 on CIFAR-10: above 60 % error and not displayed in the paper (Fig. 6, left)."""

from resnet_jax.config import Config
from resnet_jax.recipes import cifar10_recipe


def get_config() -> Config:
    return cifar10_recipe(depth=110, shortcut="none")
