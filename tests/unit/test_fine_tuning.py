"""Fine-tuning: what is not trained stays bit for bit as it is, and factors multiply the rate of what they name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_runs import make_config, saved_state, tiny_dataset

from resnet_jax.config import OptimConfig
from resnet_jax.errors import UserError
from resnet_jax.models import create_model, freeze_all_but
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.training import train


@pytest.fixture(autouse=True, scope="module")
def dataset():
    with tiny_dataset():
        yield


def changed_parts(before, after):
    """Return the first and last names of the leaves that differ."""
    before, after = (flatten_dict({**state.params, "stats": state.batch_stats}, sep="/") for state in (before, after))
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("scan_blocks", [False, True])
@pytest.mark.parametrize("trainable", [("head",), ("stage3", "head"), ("stage1",)])
def test_other_parts_stay_as_they_are(tmp_path, trainable, scan_blocks):
    config = make_config(tmp_path / "run", optim={"trainable": trainable}, steps=4, eval_every=4, save_every=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=14, scan_blocks=scan_blocks))
    train(config)
    before, after = (saved_state(tmp_path / "run", config, step) for step in (2, 4))
    changed = changed_parts(before, after)
    of_part = {
        name.removeprefix("stats/").partition("_")[0].partition("/")[0].replace("fc", "head") for name in changed
    }
    assert of_part == set(trainable)
    everything = flatten_dict({**before.params, "stats": before.batch_stats}, sep="/")
    trained = [name for name in everything if name.removeprefix("stats/").startswith(tuple(trainable))]
    assert changed >= {name for name in trained if not name.startswith("stats") or "bn" in name}


def test_what_is_frozen_normalizes_as_in_testing():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 3)), jnp.float32)
    model = create_model("resnet8", num_classes=3)
    variables = jax.tree.map(lambda leaf: leaf + 0.3, dict(model.init(jax.random.key(0), images, train=False)))
    frozen = freeze_all_but(model, ("head",))
    found, updates = frozen.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(found, model.apply(variables, images, train=False))
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])

    def loss(params):
        return frozen.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])[0].sum()

    gradients = flatten_dict(jax.grad(loss)(variables["params"]), sep="/")
    assert {name for name, gradient in gradients.items() if np.any(gradient)} == {"fc/kernel", "fc/bias"}


@pytest.mark.parametrize("momentum_style", ["caffe", "torch"])
def test_factors_multiply_the_rate(momentum_style):
    """Two steps with momentum and decay, beside the arithmetic of a rate of its own for each parameter."""
    random = np.random.default_rng(0)
    names = [("fc", "kernel"), ("fc", "bias"), ("stem_bn", "bias"), ("stem_conv", "kernel")]
    factors = [3.0, 6.0, 2.0, 1.0]
    draw = lambda: {name: random.normal(size=3).astype(np.float32) for name in names}  # noqa: E731
    tree = lambda flat: {a: {b: jnp.asarray(v) for (c, b), v in flat.items() if c == a} for a, _ in flat}  # noqa: E731
    config = OptimConfig(head_factor=3.0, bias_factor=2.0, momentum_style=momentum_style, weight_decay=0.01)
    optimizer = build_optimizer(config, build_schedule(config, 10))
    start, gradients = draw(), [draw(), draw()]
    params, state = tree(start), optimizer.init(tree(start))
    velocity, expected = {name: np.zeros(3) for name in names}, dict(start)
    for gradient in gradients:
        updates, state = optimizer.update(tree(gradient), state, params, error=jnp.float32(50))
        params = jax.tree.map(lambda a, b: a + b, params, updates)
        for name, factor in zip(names, factors, strict=True):
            velocity[name] = 0.9 * velocity[name] + gradient[name] + 0.01 * expected[name]
            expected[name] = expected[name] - 0.1 * factor * velocity[name]
    for a, b in names:
        np.testing.assert_allclose(params[a][b], expected[a, b], rtol=1e-5, atol=1e-6)


def test_a_run_with_factors_is_another_run(tmp_path):
    plain, faster = (
        make_config(tmp_path / "a", steps=2),
        make_config(tmp_path / "b", optim={"head_factor": 10.0}, steps=2),
    )
    for config in (plain, faster):
        train(config)
    a, b = (saved_state(tmp_path / name, config) for name, config in (("a", plain), ("b", faster)))
    assert np.abs(a.params["fc"]["kernel"] - b.params["fc"]["kernel"]).max() > 1e-3


def test_a_part_that_is_none(tmp_path):
    config = make_config(tmp_path / "run", optim={"trainable": ("head", "stage4")})
    with pytest.raises(UserError, match="--optim.trainable stage4: choose all, or some of stem, stage1, .*, head"):
        train(config)
    assert not (tmp_path / "run").exists()
    vgg = freeze_all_but(create_model("vgg16"), ("fc7", "head"))
    mask = vgg.trainable({name: {"kernel": 0, "bias": 0} for name in ("conv1_2", "conv5_1", "fc6", "fc7", "fc8")})
    assert [name for name in mask if mask[name]["kernel"]] == ["fc7", "fc8"]
