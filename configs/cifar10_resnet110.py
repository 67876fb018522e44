"""ResNet-110 on CIFAR-10: the paper's Table 6 and Fig. 6 (right)."""

from resnet_jax.config import Config, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=110),
        # Sec. 4.2: 0.01 "until the training error is below 80% (about 400 iterations)"; "error" measures it.
        optim=OptimConfig(warmup="steps", warmup_learning_rate=0.01, warmup_steps=400),
    )
