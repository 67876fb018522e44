"""Compare the ImageNet networks and VGG with golden values of an independent PyTorch implementation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.compare import assert_close, assert_summary_close, flat_variables, nest
from golden.inputs import (
    IMAGENET_CLASSES,
    IMAGENET_RESNETS,
    RESNET_IMAGE,
    VGG_IMAGE,
    VGGS,
    make_imagenet_images,
    make_imagenet_training_batch,
    open_relus,
)
from paths import TESTS

from resnet_jax.models import create_model

RESNET_OUTPUTS = ("conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x")
VGG_OUTPUTS = ("conv1", "conv2", "conv3", "conv4", "conv5")


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTS / "golden" / "imagenet.npz") as file:
        return dict(file)


@pytest.fixture(autouse=True)
def full_precision():
    # GPUs and TPUs otherwise multiply float32 with 10 or 8 bits of mantissa.
    with jax.default_matmul_precision("highest"):
        yield


def assert_evaluation_close(golden, key, model, image_shape, outputs):
    """Compare the names of all variables, then the logits and the named outputs in evaluation."""
    images = make_imagenet_images(image_shape)
    params, batch_stats = flat_variables(model, images)
    assert sorted(params) == str(golden[f"{key}/param_names"]).split()
    assert sorted(batch_stats) == str(golden[f"{key}/stats_names"]).split()

    @jax.jit
    def evaluate(variables):
        logits = model.apply(variables, images, train=False)
        return logits, model.apply(variables, images, train=False, method="features")

    logits, features = evaluate(nest(params, batch_stats))
    assert logits.dtype == jnp.float32
    norms, samples = golden[f"{key}/eval/norms"], golden[f"{key}/eval/samples"]
    for name, norm, values in zip(outputs, norms, samples, strict=True):  # the first that fails is where to look
        assert_summary_close(name, features[name], norm, values)
    assert_close("logits of features", features["logits"], golden[f"{key}/eval/logits"])
    assert_close("logits", logits, golden[f"{key}/eval/logits"])


@pytest.mark.parametrize("key", IMAGENET_RESNETS)
def test_resnet_evaluation(golden, key):
    name, options = IMAGENET_RESNETS[key]
    model = create_model(name, num_classes=IMAGENET_CLASSES, **options)
    assert_evaluation_close(golden, key, model, RESNET_IMAGE, RESNET_OUTPUTS)


@pytest.mark.parametrize("name", VGGS)
def test_vgg_evaluation(golden, name):
    model = create_model(name, num_classes=IMAGENET_CLASSES)
    assert_evaluation_close(golden, name, model, VGG_IMAGE, VGG_OUTPUTS)


@pytest.mark.parametrize(
    ("name", "key"), [("resnet34", "resnet34-B"), ("resnet50", "resnet50"), ("plain34", "plain34")]
)
def test_defaults_are_the_papers(name, key):
    _, options = IMAGENET_RESNETS[key]
    model = create_model(name)
    assert {option: getattr(model, option) for option in options} == options


def test_resnet50_training_step(golden):
    name, options = IMAGENET_RESNETS["resnet50"]
    model = create_model(name, num_classes=IMAGENET_CLASSES, bn_group_size=None, **options)
    images, labels = make_imagenet_training_batch()
    params, batch_stats = flat_variables(model, images)
    params = open_relus(params)

    def loss_fn(params):
        logits, _ = model.apply(nest(params, batch_stats), images, train=True, mutable=["batch_stats"])
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()
        return loss, logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    assert_close("logits", logits, golden["resnet50/train/logits"])
    assert_close("loss", loss, golden["resnet50/train/loss"])
    norms, samples = golden["resnet50/train/grad_norms"], golden["resnet50/train/grad_samples"]
    for name, norm, values in zip(sorted(grads), norms, samples, strict=True):
        assert_summary_close(f"gradient of {name}", grads[name], norm, values)
