"""Batches of streamed images: a pure function of (seed, step), on any number of processes."""

import numpy as np
import pytest
from grain.sharding import ShardOptions
from image_files import Colours

from resnet_jax.data.augment import scale_window
from resnet_jax.data.streamed import evaluation_batches, training_batches
from resnet_jax.data.views import make_protocol
from resnet_jax.errors import UserError

SIZE = 16
WHOLE = ShardOptions(0, 1)


def batches(images, *, steps, step=0, workers=0, rows=WHOLE, seed=3, batch_size=8, flip=True):
    window = scale_window(SIZE, (16, 20))
    with training_batches(
        images,
        window,
        size=SIZE,
        flip=flip,
        batch_size=batch_size,
        seed=seed,
        step=step,
        rows=rows,
        workers=workers,
    ) as iterator:
        return [next(iterator) for _ in range(steps)]


def numbers(some):
    return np.concatenate([batch.images[:, 0, 0, 0] for batch in some])


def assert_equal(some, others):
    for a, b in zip(some, others, strict=True):
        for found, expected in zip(a, b, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_every_image_once_an_epoch_without_a_dropped_remainder():
    order = numbers(batches(Colours(21), steps=21)).reshape(-1, 21)
    assert (np.sort(order) == np.arange(21)).all()
    assert len({tuple(epoch) for epoch in order}) == 8  # another order each time
    labels = np.concatenate([batch.labels for batch in batches(Colours(21), steps=21)])
    np.testing.assert_array_equal(labels, order.ravel() % 7)


def test_shapes_and_types():
    (batch,) = batches(Colours(9), steps=1)
    assert (batch.images.shape, batch.images.dtype) == ((8, SIZE, SIZE, 3), np.uint8)
    assert (batch.labels.dtype, batch.broken.dtype, batch.mask.dtype) == (np.int32, np.int32, bool)
    assert batch.mask.all()
    assert (batch.broken == -1).all()


def test_a_later_start_goes_on_with_the_same_images():
    assert_equal(batches(Colours(21), steps=3, step=5), batches(Colours(21), steps=8)[5:])


def test_seeds_differ_in_order_and_crops():
    ours, others = batches(Colours(8), steps=1), batches(Colours(8), steps=1, seed=4)
    assert (numbers(ours) != numbers(others)).any()
    in_order = np.argsort(numbers(ours)), np.argsort(numbers(others))
    assert (ours[0].images[in_order[0]] != others[0].images[in_order[1]]).any()


def test_an_image_is_cropped_anew_in_each_epoch():
    every = np.concatenate([batch.images for batch in batches(Colours(8), steps=10)])
    views = {image.tobytes() for image in every if image[0, 0, 0] == 5}
    assert len(views) > 5  # of 10


def test_half_of_the_images_are_mirrored():
    def left_is_green(some):
        images = np.concatenate([batch.images for batch in some])
        return images[:, 0, 0, 1] > images[:, 0, -1, 1]

    assert left_is_green(batches(Colours(21), steps=10, flip=False)).all()
    assert 0.3 < left_is_green(batches(Colours(21), steps=20)).mean() < 0.7


@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_all_hosts_are_those_of_one(count):
    parts = [batches(Colours(21), steps=4, step=2, rows=ShardOptions(index, count)) for index in range(count)]
    together = [type(rows[0])(*map(np.concatenate, zip(*rows, strict=True))) for rows in zip(*parts, strict=True)]
    assert_equal(together, batches(Colours(21), steps=4, step=2))


def test_a_broken_image_is_replaced_by_the_next_and_named():
    some = batches(Colours(21, broken=(4, 5)), steps=21)
    order = numbers(some)
    assert (np.bincount(order, minlength=21) == [8] * 4 + [0, 0] + [24] + [8] * 14).all()
    broken = np.concatenate([batch.broken for batch in some])
    assert sorted(broken[broken >= 0]) == [4] * 8 + [5] * 8
    assert (order[broken >= 0] == 6).all()
    whole = numbers(batches(Colours(21), steps=21))
    np.testing.assert_array_equal(order[broken < 0], whole[broken < 0])  # the others stay where they were


def test_nothing_but_broken_images_is_an_error():
    with pytest.raises(UserError, match="100 training images in a row cannot be read"):
        batches(Colours(9, broken=tuple(range(9))), steps=1)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("images", [1, 15, 16, 17])
def test_evaluation_has_every_image_once(images, count):
    source = Colours(images, broken=(0,)) if images > 1 else Colours(images)
    found, shapes = [], set()
    for index in range(count):
        rows = ShardOptions(index, count)
        with evaluation_batches(
            source, make_protocol("single", (SIZE, SIZE)), batch_size=8, rows=rows, workers=0
        ) as iterator:
            some = list(iterator)
        assert len(some) == -(-images // 8)
        shapes |= {batch.images.shape for batch in some}
        found += [batch.images[batch.mask][:, 0, 0, 0] for batch in some]
        assert all((batch.labels[batch.mask] == batch.images[batch.mask][:, 0, 0, 0] % 7).all() for batch in some)
        broken = [batch.broken[batch.broken >= 0] for batch in some]
        assert np.concatenate(broken).tolist() == ([0] if images > 1 and index == 0 else [])
    assert shapes == {(8 // count, SIZE, SIZE, 3)}
    assert sorted(np.concatenate(found)) == list(range(1 if images > 1 else 0, images))
