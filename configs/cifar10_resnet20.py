"""ResNet-20 on CIFAR-10: the paper's Table 6 and Fig. 6 (middle)."""

from resnet_jax.config import Config, ModelConfig


def get_config() -> Config:
    return Config(model=ModelConfig(depth=20))
