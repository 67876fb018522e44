"""The paper's networks are those of configs/."""

import dataclasses
from pathlib import Path

import pytest

from resnet_jax.command_line import load_config
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.paper.networks import NETWORKS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("cifar10_*.py")), ids=lambda path: path.stem)
def test_each_configuration_file_is_the_papers_recipe(path):
    config = load_config([str(path)])
    network = NETWORKS[path.stem]
    assert network.is_of(config)
    assert network.deviation(config) is None
    assert network.steps == config.run.steps == 64_000


def test_every_cifar_network_has_a_file():
    names = {path.stem for path in CONFIGS.glob("cifar10_*.py")}
    assert {name for name, network in NETWORKS.items() if network.is_cifar} == names


def test_parameters():
    exact = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
    assert {depth: NETWORKS[f"cifar10_resnet{depth}"].parameters for depth in exact} == exact


def test_what_makes_another_experiment():
    network = NETWORKS["cifar10_resnet20"]
    seeded = Config(run=RunConfig(seed=3, steps=1000, workdir="x"), data=DataConfig(dir="y"))
    assert network.deviation(seeded) is None
    for change, field in (
        ({"optim": OptimConfig(learning_rate=0.05)}, "optim.learning_rate is 0.05 there and 0.1 here"),
        ({"run": RunConfig(init_from="runs/x")}, "run.init_from"),
        ({"data": DataConfig(validation_size=5000)}, "data.validation_size"),
    ):
        assert field in network.deviation(dataclasses.replace(Config(), **change))
    assert not NETWORKS["cifar10_plain20"].is_of(Config())
    labels = {name: NETWORKS[name].label for name in ("cifar10_plain56", "imagenet_resnet34B", "imagenet_vgg16")}
    assert list(labels.values()) == ["plain-56", "ResNet-34 B", "VGG-16"]


def test_how_imported_layers_differ():
    torchvision = ModelConfig(family="imagenet", stride_on="3x3", pool_padding="torch", shortcut="B", depth=50)
    stride, pool = "model.stride_on is 3x3, not 1x1", "model.pool_padding is torch, not caffe"
    assert NETWORKS["imagenet_resnet50"].difference(torchvision) == f"{stride}, {pool}"
    basic = dataclasses.replace(torchvision, depth=34)
    assert NETWORKS["imagenet_resnet34B"].difference(basic) == pool  # without bottlenecks the stride is elsewhere
    authors = ModelConfig(family="imagenet", shortcut="B", depth=50)  # trained elsewhere: its BN groups do not matter
    assert NETWORKS["imagenet_resnet50"].difference(authors) == ""
    both = ModelConfig(zero_channels="both")
    assert NETWORKS["cifar10_resnet20"].difference(both) == "model.zero_channels is both, not end"
