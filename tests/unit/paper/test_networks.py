"""The paper's networks are those of configs/."""

import dataclasses

import pytest
from paths import ROOT

from resnet_jax.cli.arguments import parse_config
from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.paper.networks import NETWORKS, is_imagenet

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("cifar10_*.py")), ids=lambda path: path.stem)
def test_each_configuration_file_is_the_papers_recipe(path):
    config = parse_config([str(path)])
    network = NETWORKS[path.stem]
    assert dataclasses.replace(config, run=network.config.run) == network.config
    assert network.is_of(config)
    assert network.deviation(config) is None
    assert network.steps == config.run.steps == 64_000


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if not network.is_cifar])
def test_each_imagenet_network_that_is_trained_has_a_file_with_the_same_recipe(name):
    path, network = CONFIGS / f"{name}.py", NETWORKS[name]
    assert network.is_trained == path.is_file() == (name != "imagenet_vgg16")
    if network.is_trained:
        config = parse_config([str(path)])
        assert dataclasses.replace(config, run=network.config.run) == network.config
        assert [other.name for other in NETWORKS.values() if other.is_of(config)] == [name]
        assert network.deviation(config) is None
        assert network.steps == config.run.steps == 600_000


def test_every_cifar_network_has_a_file():
    names = {path.stem for path in CONFIGS.glob("cifar10_*.py")}
    assert {name for name, network in NETWORKS.items() if network.is_cifar} == names


def override(name, *args):
    return parse_config([str(CONFIGS / f"{name}.py"), *args])


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ("--run.seed 3 --optim.boundaries 150000 300000 --run.steps 450000", None),
        ("--data.name tfds:imagenet2012", None),
        ("--data.name tfds:imagenet2012:5.1.0 --data.workers 8 --data.max-broken 0", None),
        ("--optim.accumulation-steps 4 --model.remat --model.scan-blocks", None),
        ("--optim.schedule plateau --data.validation-size 50000 --data.split-seed 1 --optim.plateau-patience 3"
         " --run.eval-every 2000", None),
        ("--data.validation-size 50000", "data.validation_size is 50000 there and 0 here"),
        ("--optim.schedule cosine", "optim.schedule is cosine there and steps here"),
        ("--model.dtype bfloat16", "model.dtype is bfloat16 there"),
        ("--data.lighting 0", "data.lighting is 0.0 there and 0.1 here"),
        ("--data.crop area", "data.crop is area there"),
        ("--data.mean 0.485 0.456 0.406", "data.mean"),
        ("--optim.label-smoothing 0.1", "optim.label_smoothing"),
    ],
)  # fmt: skip
def test_what_the_paper_leaves_open_on_imagenet(args, field):
    network = NETWORKS["imagenet_resnet50"]
    config = override("imagenet_resnet50", *args.split())
    assert network.is_of(config)
    deviation = network.deviation(config)
    assert deviation is None if field is None else deviation.startswith(field)


def test_the_recipe_of_v15_is_no_run_of_the_paper():
    assert NETWORKS["imagenet_resnet50"].deviation(override("imagenet_resnet50_v15")) == (
        "model.stride_on is 3x3 there and 1x1 here"
    )


def test_names_of_imagenet():
    assert all(map(is_imagenet, ("imagenet", "tfds:imagenet2012", "tfds:imagenet2012:5.0.0")))
    others = ("folder", "cifar10", "tfds:imagenet2012_subset", "tfds:imagenet_resized/64x64", "imagenet2012")
    assert not any(map(is_imagenet, others))


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
