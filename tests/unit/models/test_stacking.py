"""Blocks in a loop: the same network, the same numbers, the same checkpoints."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import ResNet, create_model
from resnet_jax.models import cpu_conv
from resnet_jax.models.stacking import init_variables, is_stacked, stack_blocks, unstack_blocks

SHAPE = (8, 8, 3)


def small(**options):
    """Two stages of which the loops have three blocks and one."""
    return ResNet("cifar", "basic", blocks=(4, 2), filters=(8, 16), num_classes=3, shortcut="A", **options)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def variables():
    """Initial variables, by block and stacked."""
    key = jax.random.key(3)
    return init_variables(small(), key, SHAPE), init_variables(small(scan_blocks=True), key, SHAPE)


def test_a_seed_gives_the_same_initial_weights_in_both_forms(variables):
    by_block, stacked = variables
    assert stacked["params"]["stage1_blocks"]["conv1"]["kernel"].shape == (3, 3, 3, 8, 8)
    assert_same_bits(stack_blocks(by_block), stacked)
    assert_same_bits(unstack_blocks(stacked), by_block)
    assert (is_stacked(by_block), is_stacked(stacked)) == (False, True)


def loss_and_gradient(model, variables, images):
    def loss(params):
        logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return (logits**2).mean(), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, grads, updates


@pytest.mark.parametrize(
    "options",
    [
        {"scan_blocks": True},
        {"scan_blocks": True, "remat": True, "conv_general_dilated": cpu_conv.conv_general_dilated},
        {"remat": True},
        {"conv_general_dilated": partial(cpu_conv.conv_general_dilated, parts=2)},
    ],
    ids=["scan", "scan+remat+cpu_conv", "remat", "cpu_conv"],
)
def test_no_form_changes_loss_gradients_or_statistics(variables, options):
    by_block, stacked = variables
    images = jax.random.normal(jax.random.key(0), (8, *SHAPE))
    expected = jax.jit(partial(loss_and_gradient, small(bn_group_size=4)))(by_block, images)
    model = small(bn_group_size=4, **options)
    scanned = model.scan_blocks
    actual = jax.jit(partial(loss_and_gradient, model))(stacked if scanned else by_block, images)
    for a, b in zip(jax.tree.leaves(unstack_blocks(actual)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))

    evaluate = jax.jit(partial(model.apply, train=False))
    logits = jax.jit(partial(small().apply, train=False))(by_block, images)
    np.testing.assert_allclose(evaluate(stacked if scanned else by_block, images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shortcut"), [("resnet50", "B"), ("resnet34", "C"), ("plain18", "none")])
def test_the_imagenet_networks_have_both_forms(name, shortcut):
    images = jnp.zeros((1, 64, 64, 3))
    forms = [create_model(name, shortcut=shortcut, scan_blocks=scan) for scan in (False, True)]
    by_block, stacked = (jax.eval_shape(partial(m.init, train=False), jax.random.key(0), images) for m in forms)
    assert jax.tree.map(jnp.shape, jax.eval_shape(stack_blocks, by_block)) == jax.tree.map(jnp.shape, stacked)
    assert jax.tree.map(jnp.shape, jax.eval_shape(unstack_blocks, stacked)) == jax.tree.map(jnp.shape, by_block)


def test_the_program_does_not_grow_with_depth():
    def operations(depth):
        model = create_model(f"resnet{depth}", scan_blocks=True)
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, *SHAPE)))
        return len(jax.jit(partial(model.apply, train=False)).lower(variables, jnp.zeros((1, *SHAPE))).as_text())

    assert operations(1202) < 1.1 * operations(20)
