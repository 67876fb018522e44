"""Small networks of all kinds, for the exporters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import Config
from resnet_jax.data.augment import normalize
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.inference.load import Origin, Trained
from resnet_jax.models import ResNet, cifar_resnet, create_model


class Network(NamedTuple):
    """A network, and its float32 logits [N, K] for uint8 images [N, H, W, 3], of 1 and of 7 images."""

    trained: Trained
    images: list[np.ndarray]
    logits: list[np.ndarray]


def make_network(model: Any, height: int, width: int) -> Network:
    """Make a network whose weights and running statistics all matter; the mean is per pixel."""
    shape = (height, width, 3)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        match path[-1].key:
            case "kernel":
                values = rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
            case "scale" | "var":
                values = rng.uniform(0.5, 1.5, leaf.shape)
            case _:
                values = rng.normal(0, 0.3, leaf.shape)
        return values.astype(np.float32)

    variables = jax.tree.map_with_path(draw, shapes)
    preprocessing = Preprocessing(rng.random(shape, np.float32), np.array([0.2, 0.3, 0.4], np.float32))
    images = [rng.integers(0, 256, (count, *shape), np.uint8) for count in (1, 7)]
    apply = jax.jit(lambda x: model.clone(dtype=jnp.float32).apply(variables, x, train=False))
    logits = [np.asarray(apply(normalize(x, *preprocessing))) for x in images]
    inputs = Inputs(shape, tuple(map(str, range(logits[0].shape[1]))), preprocessing)
    return Network(Trained(model, variables, Origin(Config(), 0, inputs)), images, logits)


def bottlenecks(**options: Any) -> ResNet:
    """The ImageNet network of 50 layers cut down to two stages, a block each, and few filters."""
    return create_model("resnet50", num_classes=10, **options).clone(blocks=(1, 1), filters=(8, 16))


NETWORKS = {
    "cifar_A": lambda: make_network(cifar_resnet(8, num_classes=7, zero_channels="both"), 32, 32),
    "cifar_B_bfloat16": lambda: make_network(cifar_resnet(8, num_classes=7, shortcut="B", dtype=jnp.bfloat16), 32, 28),
    "bottleneck_caffe": lambda: make_network(bottlenecks(), 64, 64),
    "bottleneck_torch": lambda: make_network(bottlenecks(stride_on="3x3", pool_padding="torch"), 63, 50),
}


@pytest.fixture(scope="session", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]()


@pytest.fixture(scope="session")
def cifar_network() -> Network:
    return NETWORKS["cifar_A"]()
