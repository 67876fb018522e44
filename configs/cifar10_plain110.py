"""Plain-110 on CIFAR-10: above 60 % error and not displayed in the paper (Fig. 6, left)."""

from resnet_jax.config import Config, ModelConfig


def get_config() -> Config:
    return Config(model=ModelConfig(depth=110, shortcut="none"))
