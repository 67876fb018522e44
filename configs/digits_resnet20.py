"""ResNet-20 on scikit-learn's handwritten digits: no download, and some minutes on a CPU.

Not an experiment of the paper: the same network and recipe, shortened to 10 epochs of 1,437 images.
"""

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(depth=20),
        data=DataConfig(name="digits", batch_size=64, eval_batch_size=120, padding=2, flip=False),
        optim=OptimConfig(learning_rate=0.05, boundaries=(140, 190)),
        run=RunConfig(steps=220, log_every=10, eval_every=55, save_every=55),
    )
