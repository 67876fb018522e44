"""Plain-18 on ImageNet: the paper's Table 2 and Fig. 4 (left)."""

from resnet_jax.config import Config
from resnet_jax.recipes import imagenet_recipe


def get_config() -> Config:
    return imagenet_recipe(depth=18, shortcut="none")
