"""Plain-56 on CIFAR-10: the paper's Fig. 6 (left)."""

from resnet_jax.config import Config, ModelConfig


def get_config() -> Config:
    return Config(model=ModelConfig(depth=56, shortcut="none"))
