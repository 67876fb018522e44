"""ResNet-50 on ImageNet: the paper's Tables 3 and 4."""

from resnet_jax.config import Config
from resnet_jax.recipes import imagenet_recipe


def get_config() -> Config:
    return imagenet_recipe(depth=50, shortcut="B")
