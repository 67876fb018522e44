"""Sums and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.data import LabelledImages
from resnet_jax.evaluate import Evaluation
from resnet_jax.metrics import ERRORS, Metrics, compute_metrics, shown_errors


def batch(count, seed=0, classes=4):
    random = np.random.RandomState(seed)
    logits = random.normal(size=(count, classes)).astype(np.float32)
    return logits, random.exponential(size=count).astype(np.float32), random.randint(0, classes, count)


def test_sums_by_class_against_numpy():
    logits, losses, labels = batch(50)
    mask = np.arange(50) < 37
    metrics = compute_metrics(jnp.array(logits), jnp.array(losses), jnp.array(labels), jnp.array(mask))
    wrong = logits.argmax(1) != labels
    for label in range(4):
        members = (labels == label) & mask
        assert metrics.count[label] == members.sum()
        assert metrics.wrong["error"][label] == (members & wrong).sum()
        assert metrics.loss[label] == pytest.approx(losses[members].sum(), rel=1e-5)
    assert metrics.images == 37
    assert metrics.top1_error == pytest.approx(100 * (wrong & mask).sum() / 37)
    assert metrics.mean_loss == pytest.approx(losses[mask].mean(), rel=1e-5)


def test_a_sum_over_ragged_batches_is_the_whole():
    logits, losses, labels = batch(50)
    whole = compute_metrics(jnp.array(logits), jnp.array(losses), jnp.array(labels), jnp.ones(50, bool))
    parts = [
        compute_metrics(*(jnp.array(x[a:b]) for x in (logits, losses, labels)), jnp.ones(b - a, bool))
        for a, b in ((0, 32), (32, 49), (49, 50))
    ]
    total = parts[0] + parts[1] + parts[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), total, whole)


def test_masked_images_do_not_count_even_if_their_loss_is_not_finite():
    logits, losses, labels = batch(4)
    losses[3] = np.nan
    mask = jnp.array([True, True, True, False])
    metrics = compute_metrics(jnp.array(logits), jnp.array(losses), jnp.array(labels), mask)
    assert np.isfinite(metrics.mean_loss)
    assert metrics.images == 3


def test_a_class_without_images_has_no_error():
    metrics = compute_metrics(jnp.eye(3), jnp.zeros(3), jnp.array([0, 1, 0]), jnp.ones(3, bool))
    np.testing.assert_array_equal(metrics.class_errors, [50, 0, np.nan])


def test_top5_errors_by_class_against_numpy():
    logits, losses, labels = batch(200, classes=12)
    mask = np.arange(200) < 180
    metrics = compute_metrics(jnp.array(logits), jnp.array(losses), jnp.array(labels), jnp.array(mask))
    wrong = np.array([label not in np.argsort(-row)[:5] for row, label in zip(logits, labels, strict=True)])
    for label in range(12):
        assert metrics.wrong["top5_error"][label] == ((labels == label) & mask & wrong).sum()
    assert metrics.top5_error == pytest.approx(100 * (wrong & mask).sum() / 180)
    assert 30 < metrics.top5_error < metrics.top1_error
    assert (metrics + metrics).wrong["top5_error"].sum() == 2 * (wrong & mask).sum()


def test_of_equal_logits_the_first_count_as_larger_as_in_the_tests_of_trained_networks():
    random = np.random.RandomState(0)
    logits = random.randint(0, 3, (60, 9)).astype(np.float32)  # most are equal to others
    labels = random.randint(0, 9, 60)
    metrics = compute_metrics(jnp.array(logits), jnp.zeros(60), jnp.array(labels), jnp.ones(60, bool))
    images = LabelledImages("random", (), labels, (), ())
    evaluation = Evaluation((), images, logits)
    assert metrics.top5_error == pytest.approx(evaluation.top5_error)
    assert metrics.top1_error == pytest.approx(evaluation.top1_error)
    equal = compute_metrics(jnp.zeros((3, 9)), jnp.zeros(3), jnp.array([4, 5, 8]), jnp.ones(3, bool))
    assert equal.wrong["top5_error"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1]


def test_with_five_classes_no_top5_error():
    logits, losses, labels = batch(50, classes=5)
    metrics = compute_metrics(jnp.array(logits), jnp.array(losses), jnp.array(labels), jnp.ones(50, bool))
    assert metrics.top5_error == 0 < metrics.top1_error


def test_images_are_counted_exactly_beyond_the_whole_numbers_of_float32():
    of_classes = np.full(1000, 2**24 - 1, np.float32)  # the sum of which float32 cannot hold
    metrics = Metrics(of_classes, {"error": of_classes, "top5_error": 0 * of_classes}, of_classes)
    assert metrics.images == 1000 * (2**24 - 1)
    assert metrics.errors == {"error": 100, "top5_error": 0}


def test_the_top5_error_is_shown_where_it_says_something():
    assert list(shown_errors(10)) == ["error"]
    assert list(shown_errors(11)) == list(ERRORS) == ["error", "top5_error"]
