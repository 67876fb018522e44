"""A training step of detection: what it leaves alone, and that neither devices nor padding change it."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from voc_sets import make_set

from resnet_jax.config import Config, DataConfig, DetectionConfig, ModelConfig, OptimConfig
from resnet_jax.data.annotated import Boxed, most_objects
from resnet_jax.data.buckets import Buckets, Reader, stacked
from resnet_jax.data.sources.voc import load_voc
from resnet_jax.data.types import Preprocessing
from resnet_jax.detection_metrics import LOSSES
from resnet_jax.detection_steps import detection_gradients, find_in_images, to_batch
from resnet_jax.models.detector import build_detector
from resnet_jax.optim import build_optimizer
from resnet_jax.steps import TrainStep, create_train_state

CONFIG = Config(
    model=ModelConfig(family="imagenet", depth=18, width=0.0625, shortcut="B", frozen_bn=True),
    data=DataConfig(name="voc", batch_size=2),
    optim=OptimConfig(
        learning_rate=0.01, weight_decay=0.01, bias_factor=2.0, trainable=("stage2", "stage3", "stage4", "head")
    ),
    detection=DetectionConfig(
        shorter_side=72,
        longer_side=96,
        anchor_scales=(1.0, 2.0),
        rpn_filters=8,
        rpn_samples=32,
        train_proposals=(100, 30),
        test_proposals=(100, 20),
        min_size=4.0,
        regions=16,
        pooled_size=4,
        background_iou=(0.0, 0.5),
    ),
)
PREPROCESSING = Preprocessing(np.float32([0.5, 0.5, 0.5]), np.float32([0.25, 0.25, 0.25]))


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    images = load_voc(make_set(tmp_path_factory.mktemp("set"), 4, portrait=0), ("trainval",), ("test",)).train
    reader = Reader(images, Buckets(72, 96), most_objects(images))
    return Boxed(*stacked([reader.row(index, index, mirrored=False) for index in range(2)]))


@pytest.fixture(scope="module")
def model():
    return build_detector(CONFIG, 3)


@pytest.fixture(scope="module")
def gradients(model):
    compute = partial(detection_gradients, model=model, config=CONFIG.detection, filled=True)
    return jax.jit(lambda params, stats, batch, key: compute(params, stats, to_batch(batch, PREPROCESSING), key))


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(lambda key: model.init(key, np.zeros((1, 64, 64, 3), np.float32), train=False))(jax.random.key(0))


def some(batch, rows):
    return Boxed(*(array[rows] for array in batch))


def close(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_a_batch_is_the_mean_of_its_images_whatever_device_they_are_on(gradients, variables, batch):
    """Samples follow from the row in the whole batch: two devices with an image each do what one with both does."""
    key = jax.random.key(3)
    both = gradients(variables["params"], variables["batch_stats"], batch, key)
    alone = [gradients(variables["params"], variables["batch_stats"], some(batch, [i]), key) for i in range(2)]
    close(both.grads, jax.tree.map(lambda a, b: (a + b) / 2, *(one.grads for one in alone)))
    close(both.metrics, jax.tree.map(lambda a, b: a + b, *(one.metrics for one in alone)))


def test_frozen_parts_get_neither_gradient_nor_decay(gradients, model, variables, batch):
    optimizer = build_optimizer(CONFIG.optim, optax.constant_schedule(0.01), model.trainable)
    step = jax.jit(
        TrainStep(
            partial(detection_gradients, model=model, config=CONFIG.detection, filled=True),
            optimizer,
            optax.constant_schedule(0.01),
            jax.random.key(0),
        )
    )
    before = create_train_state(optimizer, variables)
    state = before
    for _ in range(3):
        state, report = step(state, to_batch(batch, PREPROCESSING))
    assert np.isfinite(report.metrics.mean_loss)
    for path, old in flatten_dict(before.params).items():
        new = flatten_dict(state.params)[path]
        frozen = "bn" in path[-2] or path[1].startswith(("stem", "stage1"))
        # What begins at 0 and has no gradient would stay as it is, so that kernels say more.
        if frozen:
            np.testing.assert_array_equal(new, old, err_msg=str(path))
        elif path[-1] == "kernel":
            assert (np.asarray(new) != np.asarray(old)).any(), path
    close(state.batch_stats, before.batch_stats)


def test_biases_have_their_own_rate(model, variables):
    updates = {}
    for factor in (1.0, 2.0):
        optim = dataclasses.replace(CONFIG.optim, bias_factor=factor)
        optimizer = build_optimizer(optim, optax.constant_schedule(0.01), model.trainable)
        ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), variables["params"])
        updates[factor], _ = optimizer.update(ones, optimizer.init(variables["params"]), variables["params"], error=0)
    for path, update in flatten_dict(updates[2.0]).items():
        times = 2 if path[-1] == "bias" and "bn" not in path[-2] else 1
        np.testing.assert_allclose(update, times * flatten_dict(updates[1.0])[path], rtol=1e-6)


def test_the_four_losses_begin_where_they_should(gradients, variables, batch):
    """Weights of nearly 0: two and four classes are equally likely."""
    metrics = gradients(variables["params"], variables["batch_stats"], batch, jax.random.key(0)).metrics
    values = metrics.values(3)
    assert values["rpn_class_loss"] == pytest.approx(np.log(2), rel=0.1)
    assert values["region_class_loss"] == pytest.approx(np.log(4), rel=0.1)
    assert values["loss"] == pytest.approx(sum(values[name] for name in LOSSES), rel=1e-6)
    assert values["regions"] == 16
    assert values["images"] == 2


def test_an_image_without_objects_trains(gradients, variables, batch):
    empty = batch._replace(classes=np.zeros_like(batch.classes), boxes=np.zeros_like(batch.boxes))
    found = gradients(variables["params"], variables["batch_stats"], empty, jax.random.key(0))
    assert found.metrics.positives == 0
    assert found.metrics.foreground == 0
    assert found.metrics.regions == 32
    assert found.metrics.losses["rpn_box_loss"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.grads))


def test_objects_are_found_in_pixels_of_the_original(model, variables, batch):
    """The same image at twice the scale, said to be the same original: boxes stay inside it, the best score first."""
    find = partial(find_in_images, model=model, preprocessing=PREPROCESSING, filled=False)
    detection = dataclasses.replace(CONFIG.detection, threshold=0.0)
    found = jax.jit(partial(find, config=detection))(variables, batch)
    boxes, scores = np.asarray(found.found.boxes), np.asarray(found.found.scores)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert boxes.min() >= 0
    assert (boxes[..., 2] <= 95).all()
    assert (boxes[..., 3] <= 71).all()
    assert set(np.unique(found.found.classes)) <= {0, 1, 2}
    larger = batch._replace(
        images=np.kron(batch.images, np.ones((1, 2, 2, 1), np.uint8)), sizes=2 * batch.sizes, scales=2 * batch.scales
    )
    found = jax.jit(partial(find, config=detection))(variables, larger)
    assert 60 < np.asarray(found.proposals)[np.asarray(found.ok)].max() <= 96
