"""The networks that the paper trains, and how."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from resnet_jax.config import Config, DataConfig, ModelConfig, difference, get_field
from resnet_jax.models import abstract_variables, build_model
from resnet_jax.paper.items import FLOPS
from resnet_jax.recipes import Shortcut, cifar10_recipe, imagenet_recipe

# What the paper leaves open: seeds, how products are rounded, and for ImageNet when exactly "the error plateaus"
# (Sec. 3.4).
_OPEN = {
    "cifar10": ("run.seed", "optim.precision"),
    "imagenet": ("run.seed", "optim.precision", "optim.boundaries", "optim.plateau_patience"),
}
# What measuring that takes: images that are held out.
_OPEN_WITH_PLATEAUS = ("optim.schedule", "data.validation_size", "data.split_seed")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the paper and its recipe.

    Attributes:
      name: of its configuration file and of the folder of its run.
      config: the paper's.
      seeds: how often the paper trains it.
    """

    name: str
    config: Config
    seeds: int = 1

    @property
    def label(self) -> str:
        """As the paper calls it."""
        name = network_name(self.config.model)
        return f"{name} {self.config.model.shortcut}" if name == "ResNet-34" else name

    @property
    def steps(self) -> int:
        return self.config.run.steps

    @property
    def is_cifar(self) -> bool:
        return self.config.data.name == "cifar10"

    @property
    def is_trained(self) -> bool:
        """Whether the paper trains it; it compares with VGG as others trained it."""
        return self.config.model.family != "vgg"

    @property
    def test_images(self) -> int:
        """CIFAR-10's test set, or ImageNet's validation set."""
        return 10_000 if self.is_cifar else 50_000

    @property
    def multiply_adds(self) -> float:
        """Of an image, about: the paper's for ImageNet, 15.3e9 of VGG-16, 2.04e6 a layer on CIFAR."""
        depth = self.config.model.depth
        return 2.04e6 * depth if self.is_cifar else 1e9 * (FLOPS | {16: 15.3})[depth]

    @functools.cached_property
    def parameters(self) -> int:
        """How many; nothing is computed for it."""
        config = dataclasses.replace(self.config.model, scan_blocks=self.config.model.family != "vgg")
        model = build_model(config, 10 if self.is_cifar else 1000)
        side = 32 if self.is_cifar else 224
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model, (side, side, 3))["params"]))

    def is_of(self, config: Config) -> bool:
        """Tell whether `config` has this network and data set, however it is trained."""
        ours, theirs = (
            (c.model.family, c.model.depth, c.model.shortcut, _data_set(c.data.name)) for c in (self.config, config)
        )
        return ours == theirs

    def difference(self, model: ModelConfig) -> str:
        """Say in what the layers of an imported network differ from the paper's; nothing if they do not."""
        matters = {
            "zero_channels": model.shortcut == "A",
            "stride_on": model.family == "imagenet" and model.depth >= 50,  # bottlenecks
            "pool_padding": model.family == "imagenet",
        }
        differing = [
            f"model.{name} is {getattr(model, name)}, not {getattr(self.config.model, name)}"
            for name, does in matters.items()
            if does and getattr(model, name) != getattr(self.config.model, name)
        ]
        return ", ".join(differing)

    def deviation(self, config: Config) -> str | None:
        """Name the first field in which a run is not the paper's experiment, or return None."""
        theirs = _replace(config, "data.name", _data_set(config.data.name))
        plateaus = not self.is_cifar and config.optim.schedule == "plateau"
        for field in (*_OPEN[self.config.data.name], *(_OPEN_WITH_PLATEAUS if plateaus else ())):
            theirs = _replace(theirs, field, get_field(self.config, field))
        return difference(theirs, self.config)


def network_name(model: ModelConfig) -> str:
    """Return "plain-20", "ResNet-50", "VGG-16" and so on."""
    kind = "VGG" if model.family == "vgg" else "plain" if model.shortcut == "none" else "ResNet"
    return f"{kind}-{model.depth}"


def is_imagenet(name: str) -> bool:
    """Tell whether a data set is ImageNet 2012, in folders or as that of TensorFlow Datasets in any version."""
    return name == "imagenet" or name.split(":")[:2] == ["tfds", "imagenet2012"]


def _data_set(name: str) -> str:
    return "imagenet" if is_imagenet(name) else name


def _replace(config: Config, field: str, value: Any) -> Config:
    group, name = field.split(".")
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


def _network(data: str, recipe: Callable[[int, Shortcut], Config], depth: int, shortcut: Shortcut) -> Network:
    kind = "plain" if shortcut == "none" else "resnet"
    option = shortcut if depth == 34 and kind == "resnet" else ""
    seeds = 5 if (depth, kind) == (110, "resnet") else 1  # Table 6
    return Network(f"{data}_{kind}{depth}{option}", recipe(depth, shortcut), seeds)


_cifar = functools.partial(_network, "cifar10", cifar10_recipe)
_imagenet = functools.partial(_network, "imagenet", imagenet_recipe)
_VGG16 = Network("imagenet_vgg16", Config(model=ModelConfig(family="vgg", depth=16), data=DataConfig(name="imagenet")))
NETWORKS = {
    network.name: network
    for network in (
        *(_cifar(depth, "none") for depth in (20, 32, 44, 56, 110)),
        *(_cifar(depth, "A") for depth in (20, 32, 44, 56, 110, 1202)),
        *(_imagenet(depth, "none") for depth in (18, 34)),
        *(_imagenet(depth, "A") for depth in (18, 34)),
        *(_imagenet(34, option) for option in ("B", "C")),
        *(_imagenet(depth, "B") for depth in (50, 101, 152)),
        _VGG16,
    )
}
