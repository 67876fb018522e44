"""Plain-34 on ImageNet: the paper's Tables 2 and 3 and Fig. 4 (left)."""

from resnet_jax.config import Config
from resnet_jax.recipes import imagenet_recipe


def get_config() -> Config:
    return imagenet_recipe(depth=34, shortcut="none")
