"""A network learns 128 real CIFAR-10 images by heart."""

import dataclasses

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from resnet_jax.data import Split, load_dataset
from resnet_jax.data.inputs import describe_inputs
from resnet_jax.trainer import Trainer


def test_128_real_images_are_learned_to_below_1_percent_training_error(cifar10_dir):
    dataset = load_dataset("cifar10", cifar10_dir)
    few = Split(dataset.train.images[:128], dataset.train.labels[:128])
    dataset = dataclasses.replace(dataset, train=few, test=few)
    config = Config(
        model=ModelConfig(depth=8),
        data=DataConfig(batch_size=128, eval_batch_size=128, padding=0, flip=False),
        optim=OptimConfig(learning_rate=0.1, boundaries=(50,)),
    )
    trainer = Trainer(config, describe_inputs(config, dataset), dataset)
    state = trainer.initial_state()
    assert trainer.evaluate(state, "test").top1_error > 50
    state, report = trainer.train(state, 70)
    assert report.history.metrics.wrong["error"][69] < 0.01 * 128
    metrics = trainer.evaluate(state, "test")  # and by the running statistics
    assert metrics.images == 128
    assert metrics.top1_error < 1
