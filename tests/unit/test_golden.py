"""Compare depth-20 networks with golden values of an independent PyTorch implementation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden.compare import assert_close, assert_summary_close, flat_variables, nest
from golden.inputs import make_batch
from paths import TESTS

from resnet_jax.models import cifar_resnet, cpu_conv
from resnet_jax.models.stacking import stack_blocks, unstack_blocks

GROUP_SIZES = {"groups": 4, "whole": None}
# What makes training faster changes no number.
FAST = {"scan_blocks": True, "remat": True, "conv_general_dilated": cpu_conv.conv_general_dilated}
FORMS = {"plain": {}, "fast": FAST}
CASES = [("none", "groups"), ("A", "groups"), ("B", "groups"), ("C", "groups"), ("A", "whole")]
FORMS_OF_CASES = [(*case, "plain") for case in CASES] + [("C", "groups", "fast")]


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTS / "golden" / "cifar_resnet20.npz") as file:
        return dict(file)


def build(shortcut, **options):
    """Return (model, params, batch_stats) with the golden values' parameters, both flat {name: array}."""
    model = cifar_resnet(20, num_classes=10, shortcut=shortcut, dtype=jnp.float64, **options)
    images, _ = make_batch()
    return model, *flat_variables(model.clone(scan_blocks=False), images)


def assert_batch_stats_close(golden, prefix, old, new, running_variance):
    """Compare running statistics by what the step added to them, in which a wrong variance shows most."""
    bns = sorted(name.removesuffix("/mean") for name in old if name.endswith("/mean"))
    sizes = [old[f"{bn}/mean"].size for bn in bns]
    for kind, key in (("mean", "mean"), ("var", f"var_{running_variance}")):
        expected = np.split(golden[f"{prefix}/{key}"], np.cumsum(sizes)[:-1])
        for bn, value in zip(bns, expected, strict=True):
            name = f"{bn}/{kind}"
            kept = 0.9 * old[name].astype(np.float64)
            assert_close(name, new[name] - kept, value - kept)


@pytest.mark.parametrize("shortcut", ["none", "A", "B", "C"])
def test_names_are_the_checkpoint_format(golden, shortcut):
    _, params, batch_stats = build(shortcut)
    assert sorted(params) == golden[f"{shortcut}/param_names"].tolist()
    assert sorted(batch_stats) == golden[f"{shortcut}/stats_names"].tolist()


@pytest.mark.parametrize("shortcut", ["none", "A", "B", "C"])
def test_evaluation(golden, shortcut):
    model, *variables = build(shortcut)
    images, _ = make_batch()

    @jax.jit
    def evaluate(variables):
        logits = model.apply(variables, images, train=False)
        return logits, model.apply(variables, images, train=False, method="features")

    logits, features = evaluate(nest(*variables))
    assert logits.dtype == jnp.float64
    assert_close("logits", logits, golden[f"{shortcut}/eval/logits"])
    for stage in ("stage1", "stage2", "stage3"):
        prefix = f"{shortcut}/eval/{stage}"
        assert_summary_close(stage, features[stage], golden[f"{prefix}_norm"], golden[f"{prefix}_samples"])


@pytest.mark.parametrize(("shortcut", "groups", "form"), FORMS_OF_CASES)
def test_training_step(golden, shortcut, groups, form):
    options = {"bn_group_size": GROUP_SIZES[groups], "running_variance": "unbiased", "bn_decay": 0.9, **FORMS[form]}
    model, params, batch_stats = build(shortcut, **options)
    images, labels = make_batch()

    def loss_fn(params):
        variables = nest(params, batch_stats)
        variables = stack_blocks(variables) if model.scan_blocks else variables
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        log_probs = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_probs, labels[:, None], axis=1).mean()
        return loss, (logits, unstack_blocks(updates["batch_stats"]))

    (loss, (logits, updates)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    prefix = f"{shortcut}/{groups}"
    assert_close("logits", logits, golden[f"{prefix}/logits"])
    assert_close("loss", loss, golden[f"{prefix}/loss"])
    norms, samples = golden[f"{prefix}/grad_norms"], golden[f"{prefix}/grad_samples"]
    for name, norm, values in zip(golden[f"{shortcut}/param_names"], norms, samples, strict=True):
        assert_summary_close(f"gradient of {name}", grads[name], norm, values)
    assert_batch_stats_close(golden, prefix, batch_stats, flatten_dict(updates, sep="/"), "unbiased")


@pytest.mark.parametrize("groups", ["groups", "whole"])
def test_biased_running_variance(golden, groups):
    shortcut = "A"
    model, params, batch_stats = build(
        shortcut, bn_group_size=GROUP_SIZES[groups], running_variance="biased", bn_decay=0.9
    )
    images, _ = make_batch()
    train = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))
    _, updates = train(nest(params, batch_stats))
    new = flatten_dict(updates["batch_stats"], sep="/")
    assert_batch_stats_close(golden, f"{shortcut}/{groups}", batch_stats, new, "biased")


def test_float32_differs_by_its_rounding(golden):
    """Each of 20 layers sums up to 576 products; their errors add up like a random walk: sqrt(20 * 576) units.

    Gradients are left out: a rectifier whose input is a rounding error from 0 may turn on or off, which moves a whole
    share of the gradient of a small batch.
    """
    model, *variables = build("A", bn_group_size=GROUP_SIZES["groups"])
    images, _ = make_batch()
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs otherwise multiply with 10 or 8 bits of mantissa
        model = model.clone(dtype=jnp.float32)
        logits = model.apply(nest(*variables), jnp.float32(images), train=False)
        trained, _ = model.apply(nest(*variables), jnp.float32(images), train=True, mutable=["batch_stats"])
    assert logits.dtype == trained.dtype == jnp.float32
    bound = np.sqrt(20 * 576) * np.finfo(np.float32).eps
    assert_close("logits", logits, golden["A/eval/logits"], tolerance=bound)
    assert_close("logits in training", trained, golden["A/groups/logits"], tolerance=10 * bound)  # BN of 4 images
