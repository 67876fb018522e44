"""Parameters as vectors: nothing is lost, and the optimizer does the same with them as with the tree."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config import OptimConfig
from resnet_jax.models import abstract_variables, cifar_resnet
from resnet_jax.optim import build_optimizer
from resnet_jax.vectors import Layout

RANDOM = np.random.RandomState(0)
VARIABLES = jax.tree.map(
    lambda leaf: jnp.array(RANDOM.normal(size=leaf.shape), jnp.float32),
    abstract_variables(cifar_resnet(8), (32, 32, 3)),
)
PARAMS = VARIABLES["params"]


def test_kernels_lie_apart_and_every_number_is_there():
    layout = Layout(PARAMS)
    vectors = layout.pack(PARAMS)
    kernels = [leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(PARAMS) if path[-1].key == "kernel"]
    assert len(kernels) == 8
    assert vectors["kernel"].shape == (sum(kernels),)
    assert vectors["other"].shape == (75_290 - sum(kernels),)  # of 75,290 parameters
    jax.tree.map(np.testing.assert_array_equal, layout.unpack(vectors), PARAMS)


def test_statistics_and_none_at_all():
    stats = Layout(VARIABLES["batch_stats"])
    vectors = stats.pack(VARIABLES["batch_stats"])
    assert {name: vector.shape for name, vector in vectors.items()} == {"other": (2 * (16 * 3 + 32 * 2 + 64 * 2),)}
    jax.tree.map(np.testing.assert_array_equal, stats.unpack(vectors), VARIABLES["batch_stats"])
    assert Layout({}).pack({}) == Layout({}).unpack({}) == {}  # VGG has no BN


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay_on": "kernels", "momentum_style": "torch"},
        {"weight_decay_on": "all", "warmup": "error", "warmup_error": 30.0},
        {"schedule": "plateau"},
    ],
    ids=["kernels", "warm-up", "plateau"],
)
def test_the_optimizer_does_the_same_with_vectors(options):
    config = OptimConfig(weight_decay=0.1, **{"boundaries": (), **options})
    optimizer = build_optimizer(config, optax.constant_schedule(config.learning_rate))
    layout, update = Layout(PARAMS), jax.jit(partial(optimizer.update, error=jnp.float32(50)))
    params, state = PARAMS, optimizer.init(PARAMS)
    vectors, packed = layout.pack(PARAMS), layout.pack_within(state)
    assert jax.tree.structure(packed) == jax.tree.structure(optimizer.init(vectors))
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: jnp.array(RANDOM.normal(size=leaf.shape), jnp.float32), PARAMS)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, packed = update(layout.pack(grads), packed, vectors)
        vectors = optax.apply_updates(vectors, updates)
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, layout.unpack(vectors), params)
    jax.tree.map(close, layout.unpack_within(packed), state)
