"""What PyTorch's users get of an export, and we of their files: logits, of networks that are not ours."""

import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from torch_networks import cifar_resnet, import_torchvision

import resnet_jax
from resnet_jax.cli.commands import main
from resnet_jax.config import Config, ModelConfig
from resnet_jax.convert.weights_in import import_weights
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.models import abstract_variables, build_model
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import create_train_state

SIDE = {"cifar": 32, "imagenet": 64}


def make_workdir(path, **options):
    """Make a work directory with random weights, in which every channel counts."""
    config, random = Config(model=ModelConfig(**options)), np.random.default_rng(0)
    shape = (SIDE[config.model.family],) * 2 + (3,)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return random.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        return random.uniform(0.5, 1, leaf.shape) if name in ("scale", "var") else random.normal(0, 0.3, leaf.shape)

    shapes = abstract_variables(build_model(config.model, 10), shape)
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float32), jax.tree.map_with_path(draw, shapes))
    state = create_train_state(build_optimizer(config.optim, build_schedule(config.optim, 1)), variables)
    preprocessing = Preprocessing(random.random(shape, np.float32), np.array([0.2, 0.3, 0.4], np.float32))
    create_workdir(path, config, Inputs(shape, tuple("abcdefghij"), preprocessing), state)


def logits_of(source, images):
    model, variables, origin = resnet_jax.load(source)
    return np.asarray(model.apply(variables, resnet_jax.preprocess(images, origin), train=False))


def make_images(side):
    return np.random.RandomState(1).randint(0, 256, (4, side, side, 3)).astype(np.uint8)


def described(file):
    with safetensors.safe_open(file, framework="numpy") as opened:
        return json.loads(opened.metadata()["resnet_jax"])


def in_pytorch(torch, network, file, images):
    """Return the logits that a user of PyTorch gets, who normalizes as the metadata say, in float64."""
    inputs = described(file)["inputs"]
    normalized = (images / 255 - np.array(inputs["mean"])) / np.array(inputs["std"])
    tensors = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(file).items()}
    network.load_state_dict(tensors, strict=True)
    with torch.inference_mode():
        return network.double().eval()(torch.from_numpy(normalized.transpose(0, 3, 1, 2))).numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("zero_channels", ["end", "both"])
@pytest.mark.parametrize("depth", [20, 56])
def test_option_a_in_pytorchs_names_is_pytorchs_network(tmp_path, depth, zero_channels):
    torch = pytest.importorskip("torch")
    make_workdir(tmp_path / "run", depth=depth, zero_channels=zero_channels)
    images = make_images(32)
    expected = logits_of(tmp_path / "run", images)
    for names in ("torch", "resnet_jax"):
        file, again = tmp_path / f"{names}.safetensors", tmp_path / names
        arguments = ["--format", "safetensors", "--out", str(file), "--names", names]
        assert main(["export", str(tmp_path / "run"), *arguments]) == 0
        assert main(["import", str(file), "--out", str(again)]) == 0
        assert_close(logits_of(again, images), expected)
        trained_as = "both" if names == "torch" else zero_channels
        assert resnet_jax.load(again).origin.config.model.zero_channels == trained_as
    assert_close(in_pytorch(torch, cifar_resnet(depth), tmp_path / "torch.safetensors", images), expected)
    assert_close(logits_of(tmp_path / "resnet_jax.safetensors", images), expected)


def test_pytorchs_network_of_56_layers_imported_and_exported_again(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network, images = cifar_resnet(56), make_images(32)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1)
    torch.save(network.state_dict(), tmp_path / "network.pth")
    import_weights(tmp_path / "network.pth", "resnet56", tmp_path / "run")
    normalized = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        expected = network.double()(torch.from_numpy(normalized.transpose(0, 3, 1, 2))).numpy()
    assert_close(logits_of(tmp_path / "run", images), expected)
    file = tmp_path / "again.safetensors"
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(file)]) == 0
    assert_close(in_pytorch(torch, cifar_resnet(56), file, images), expected)


IMAGENET = {
    "as theirs": ({"depth": 18, "shortcut": "B", "pool_padding": "torch"}, ""),
    "the authors'": ({"depth": 50, "shortcut": "B"}, "a max pool without padding, as Caffe's and the stride"),
    "option A": ({"depth": 18, "shortcut": "A"}, "shortcuts of option A and a max pool"),
    "option C": ({"depth": 18, "shortcut": "C", "pool_padding": "torch"}, "shortcuts of option C."),
    "plain": ({"depth": 18, "shortcut": "none"}, "no shortcuts and a max pool"),
}


@pytest.mark.parametrize(("options", "differences"), IMAGENET.values(), ids=IMAGENET)
def test_the_lines_of_an_export_make_torchvisions_network_ours(tmp_path, capsys, monkeypatch, options, differences):
    torchvision = import_torchvision(monkeypatch)
    import torch

    make_workdir(tmp_path / "run", family="imagenet", **options)
    file, images = tmp_path / "out.safetensors", make_images(64)
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(file)]) == 0
    network = torchvision.models.get_model(f"resnet{options['depth']}", num_classes=10)
    explanation = described(file).get("pytorch", "")
    assert differences in explanation
    assert explanation in capsys.readouterr().out
    _, _, lines = explanation.partition("\n\n")
    exec(lines, {"net": network})  # noqa: S102 (they are our own)
    assert_close(in_pytorch(torch, network, file, images), logits_of(tmp_path / "run", images))


@pytest.mark.parametrize("shortcut", ["none", "B", "C"])
def test_the_lines_for_the_cifar_networks(tmp_path, shortcut):
    torch = pytest.importorskip("torch")
    from torch import nn

    class Block(nn.Module):
        """As the well-known CIFAR ResNet has it: its shortcut is a module."""

        def __init__(self, block):
            super().__init__()
            self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
            self.shortcut = nn.Sequential()

        def forward(self, x):
            return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))

    make_workdir(tmp_path / "run", depth=14, shortcut=shortcut)
    file, images = tmp_path / "out.safetensors", make_images(32)
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(file)]) == 0
    network = cifar_resnet(14)
    for stage in (network.layer1, network.layer2, network.layer3):
        for i, block in enumerate(stage):
            stage[i] = Block(block)
    exec(described(file)["pytorch"].partition("\n\n")[2], {"net": network})  # noqa: S102 (they are our own)
    assert_close(in_pytorch(torch, network, file, images), logits_of(tmp_path / "run", images))
