"""ResNet-56 on CIFAR-10: the paper's Table 6 and Fig. 6 (middle)."""

from resnet_jax.config import Config
from resnet_jax.recipes import cifar10_recipe


def get_config() -> Config:
    return cifar10_recipe(depth=56)
