"""The ImageNet networks that take long beside golden values of an independent PyTorch implementation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.compare import assert_close, assert_evaluation_close, assert_summary_close, flat_variables, nest
from golden.inputs import (
    IMAGENET_CLASSES,
    IMAGENET_RESNETS,
    LARGE_NETWORKS,
    make_imagenet_training_batch,
    open_relus,
)
from paths import TESTS

from resnet_jax.models import create_model

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTS / "golden" / "imagenet.npz") as file:
        return dict(file)


SLOW = ("resnet152", "vgg19")


@pytest.mark.parametrize("key", [pytest.param(key, marks=[pytest.mark.slow] * (key in SLOW)) for key in LARGE_NETWORKS])
def test_evaluation(golden, key):
    assert_evaluation_close(golden, key)


def test_resnet50_training_step(golden):
    name, options = IMAGENET_RESNETS["resnet50"]
    model = create_model(name, num_classes=IMAGENET_CLASSES, dtype=jnp.float64, bn_group_size=None, **options)
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
