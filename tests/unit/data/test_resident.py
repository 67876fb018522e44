"""Batches: a pure function of (seed, step) that sees every image once an epoch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import DataConfig
from resnet_jax.data import Dataset, Split
from resnet_jax.data.inputs import per_pixel_mean
from resnet_jax.data.resident import ResidentData, Sampler
from resnet_jax.data.types import Preprocessing
from resnet_jax.parallel.devices import make_shardings

PLAIN = Preprocessing(np.zeros(1, np.float32), np.ones(1, np.float32))


@partial(jax.jit, static_argnames=("most_steps", "batch_size", "num_images"))
def indices_on_device(key, step, *, most_steps, batch_size, num_images):
    sampler = Sampler(key, PLAIN, batch_size, num_images, padding=0, flip=False, most_steps=most_steps)
    orders = sampler.orders(sampler.first_epoch(step))
    return jax.vmap(lambda i: sampler.indices(step + i, orders))(jnp.arange(most_steps))


def indices_of(step, *, seed=0, most_steps=1, **sizes):
    """The batches of the steps step, ..., step + most_steps - 1."""
    return np.concatenate(indices_on_device(jax.random.key(seed), jnp.int32(step), most_steps=most_steps, **sizes))


def stream(steps, **options):
    return np.concatenate([indices_of(step, **options) for step in range(steps)])


@pytest.mark.parametrize(("batch_size", "num_images"), [(7, 23), (23, 23), (20, 21)])
def test_every_image_once_an_epoch_without_a_dropped_remainder(batch_size, num_images):
    order = stream(40, batch_size=batch_size, num_images=num_images)
    epochs = [order[start : start + num_images] for start in range(0, len(order) - num_images + 1, num_images)]
    assert len(epochs) >= 8
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_images))
    assert len({epoch.tobytes() for epoch in epochs}) == len(epochs)  # a new order in every epoch


def test_the_order_follows_from_seed_and_step_alone():
    order = stream(12, batch_size=7, num_images=23)
    late = indices_of(11, batch_size=7, num_images=23)  # nothing came before
    np.testing.assert_array_equal(order[77:], late)
    assert (order != stream(12, seed=1, batch_size=7, num_images=23)).any()


@pytest.mark.parametrize(("most_steps", "batch_size", "num_images"), [(3, 7, 23), (5, 7, 11)])
def test_the_order_is_the_same_however_many_steps_are_prepared_at_a_time(most_steps, batch_size, num_images):
    sizes = {"batch_size": batch_size, "num_images": num_images}
    order = stream(2 * most_steps, **sizes)
    for start in range(most_steps):
        together = indices_of(start, most_steps=most_steps, **sizes)
        np.testing.assert_array_equal(together, order[start * batch_size :][: most_steps * batch_size])


def test_the_last_step_of_the_paper_does_not_overflow():
    indices = indices_of(63_999, batch_size=128, num_images=50_000)
    assert len(set(np.asarray(indices).tolist())) > 120
    assert indices.min() >= 0
    assert indices.max() < 50_000


def test_the_order_is_that_of_the_runs_of_before():
    """A run goes on in the order it began with: that of jax.random.permutation, epoch by epoch, from the same keys."""
    key = jax.random.split(jax.random.key(3))[0]
    epochs = [jax.random.permutation(jax.random.fold_in(key, epoch), 23) for epoch in range(5)]
    order = stream(14, seed=3, batch_size=7, num_images=23)
    np.testing.assert_array_equal(order, np.concatenate(epochs)[: len(order)])


def make_data(split, *, most_steps=1, **config):
    replicated, by_image = make_shardings()
    dataset = Dataset("numbered", split, split, tuple("abcdefghij"))
    options = {"most_steps": most_steps, "replicated": replicated, "by_image": by_image}
    return ResidentData(dataset, DataConfig(**config), PLAIN, jax.random.key(0), **options)


def test_the_host_prepares_what_each_dispatch_draws_from():
    """From wherever a run goes on, whatever the dispatches are, also beyond the end of an epoch."""
    images, labels = make_split(10)
    data = make_data(Split(images, labels), most_steps=4, batch_size=8)
    for begin, counts in ((0, (4, 4, 1, 3)), (7, (2, 4))):
        data.begin(begin)
        step = begin
        for count in counts:
            _, orders, most = data.train_arrays(count)
            assert most == count
            for _ in range(count):
                expected = indices_of(step, batch_size=8, num_images=10)
                np.testing.assert_array_equal(data.sampler.indices(jnp.int32(step), orders), expected)
                step += 1


def make_split(count):
    images = np.random.RandomState(0).randint(0, 256, (count, 6, 6, 3)).astype(np.uint8)
    return jnp.array(images), jnp.arange(count)


def make_sample(preprocessing=PLAIN, **options):
    """A function of (split, step) alone."""
    sampler = Sampler(jax.random.key(0), preprocessing, **options)
    return jax.jit(lambda split, step: sampler.sample(split, step, sampler.orders(sampler.first_epoch(step))))


def test_labels_stay_with_their_images():
    split = make_split(40)
    sample = make_sample(batch_size=16, num_images=40, padding=0, flip=False)
    batch = sample(split, jnp.int32(3))
    np.testing.assert_allclose(batch.images, np.asarray(split[0])[batch.labels] / np.float32(255), rtol=1e-6)
    assert batch.mask.all()


def test_augmentation_changes_with_the_step_but_not_with_anything_else():
    split = (jnp.tile(make_split(1)[0], (8, 1, 1, 1)), jnp.zeros(8, jnp.int32))  # one image: only augmentation differs
    sample = make_sample(batch_size=8, num_images=8, padding=2, flip=True)
    first, again, later = (sample(split, jnp.int32(step)).images for step in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(later)).any()


def test_padding_is_zero_after_normalization():
    split = (jnp.full((8, 4, 4, 3), 255, jnp.uint8), jnp.zeros(8, jnp.int32))
    preprocessing = Preprocessing(np.full(3, 0.25, np.float32), np.ones(3, np.float32))
    sample = make_sample(preprocessing, batch_size=8, num_images=8, padding=2, flip=False)
    assert set(np.unique(sample(split, jnp.int32(0)).images.round(5))) == {0, 0.75}


@pytest.mark.parametrize("batch_size", [4, 10, 16])
def test_evaluation_sees_every_image_exactly_once(batch_size):
    split = make_split(10)
    data = make_data(Split(*split), batch_size=8, eval_batch_size=batch_size)
    batches = [jax.jit(data.to_eval_batch)(arrays) for arrays in data.eval_arrays("test")]
    labels = np.concatenate([batch.labels[batch.mask] for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(10))
    images = np.concatenate([batch.images[batch.mask] for batch in batches])
    np.testing.assert_allclose(images, np.asarray(split[0]) / np.float32(255), rtol=1e-6)


def test_per_pixel_mean():
    images = np.random.RandomState(0).randint(0, 256, (1000, 2, 2, 3)).astype(np.uint8)
    mean = per_pixel_mean(Split(images, np.zeros(1000, np.int32)))
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, images.astype(np.float64).mean(0) / 255, rtol=1e-6)
