"""ResNet-1202 on CIFAR-10: the paper's Table 6 and Fig. 6 (right)."""

from resnet_jax.config import Config, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        # 600 blocks: compiled as loops, and only their inputs kept for the backward pass.
        model=ModelConfig(depth=1202, scan_blocks=True, remat=True),
        # Sec. 4.2: "trained as described above", that is like ResNet-110, with its warm-up.
        optim=OptimConfig(warmup="steps", warmup_learning_rate=0.01, warmup_steps=400),
    )
