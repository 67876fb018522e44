"""Images in arrays of two shapes: sizes, boxes, mirrored ones, and their order."""

import pickle

import numpy as np
import pytest
from voc_sets import make_set, write_image, write_set

from resnet_jax.data.annotated import Boxed, most_objects
from resnet_jax.data.buckets import Buckets, Reader, TrainBatches, evaluation_batches, resize
from resnet_jax.data.sources.voc import load_voc


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (600, 800)),  # most of VOC
        ((500, 375), (800, 600)),
        ((333, 500), (600, 901)),
        ((200, 500), (400, 1000)),  # the longer side decides
        ((500, 500), (600, 600)),
    ],
)
def test_sizes_are_those_of_the_published_program(size, expected):
    assert Buckets(600, 1000).size(*size) == expected


def reference_resize(pixels, scale, size):
    """Bilinear between pixel centres, the border repeated, in float64: as OpenCV's resize()."""
    axes = []
    for length, new in zip(pixels.shape[:2], size, strict=True):
        at = (np.arange(new) + 0.5) / scale - 0.5
        low = np.floor(at).astype(int)
        axes.append((np.clip(low, 0, length - 1), np.clip(low + 1, 0, length - 1), (at - low)))
    (top, bottom, y), (left, right, x) = axes
    pixels = pixels.astype(np.float64)
    rows = pixels[top] * (1 - y)[:, None, None] + pixels[bottom] * y[:, None, None]
    return rows[:, left] * (1 - x)[:, None] + rows[:, right] * x[:, None]


@pytest.mark.parametrize("scale", [0.37, 1.0, 1.6, 2.5])
def test_resizing_does_not_smooth(scale):
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)
    size = (round(45 * scale), round(61 * scale))
    found = resize(pixels, scale, size)
    assert np.abs(found - reference_resize(pixels, scale, size)).max() < 0.501  # rounded to whole numbers


@pytest.fixture
def images(tmp_path):
    return load_voc(make_set(tmp_path, 11, portrait=4), ("trainval",), ("test",)).train


def reader_of(images):
    return Reader(images, Buckets(72, 96), most_objects(images))


def test_a_mirrored_image_has_mirrored_boxes(tmp_path):
    write_image(tmp_path, "a", (72, 96), [("red", (11, 21, 40, 60), False)])
    images = load_voc(write_set(tmp_path, {"trainval": ["a"], "test": ["a"]}), ("trainval",), ("test",)).train
    plain, mirrored = (reader_of(images).row(0, 0, mirrored=mirrored) for mirrored in (False, True))
    np.testing.assert_array_equal(plain.boxes[0], [10, 20, 39, 59])
    np.testing.assert_array_equal(mirrored.boxes[0], [96 - 39 - 1, 20, 96 - 10 - 1, 59])
    np.testing.assert_array_equal(mirrored.images, plain.images[:, ::-1])
    x1, y1, x2, y2 = mirrored.boxes[0].astype(int)
    assert mirrored.images[y1 + 4 : y2 - 4, x1 + 4 : x2 - 4, 0].min() > 180  # red there
    assert mirrored.images[:, : x1 - 4, 0].max() < 160


def test_an_image_lies_in_the_upper_left_corner(images):
    row = Reader(images, Buckets(100, 200), 3).row(0, 5, mirrored=False)
    assert row.images.shape == (100, 200, 3)
    np.testing.assert_array_equal(row.sizes, [100, 133])
    assert row.images[:, 133:].max() == 0
    assert row.images[99, 132].min() > 0
    np.testing.assert_allclose(row.boxes[0], images.annotations[0].boxes[0] * (100 / 72), rtol=1e-6)
    assert (row.row, row.number) == (5, 0)
    np.testing.assert_array_equal(row.original, [72, 96])


def test_difficult_objects_are_not_trained_on(tmp_path):
    objects = [("red", (1, 1, 20, 20), True), ("green", (30, 30, 60, 60), False)]
    write_image(tmp_path, "a", (72, 96), objects)
    images = load_voc(write_set(tmp_path, {"trainval": ["a"], "test": ["a"]}), ("trainval",), ("test",)).train
    row = reader_of(images).row(0, 0, mirrored=False)
    np.testing.assert_array_equal(row.classes, [1])
    np.testing.assert_array_equal(row.boxes, [[29, 29, 59, 59]])


def batches_of(images, rows=range(2), seed=0, flip=True):
    return TrainBatches(reader_of(images), 2, rows, flip, seed)


def test_every_image_comes_once_as_it_is_and_once_mirrored_before_any_comes_again(images):
    batches = batches_of(images)
    stream = batches.stream(0)
    seen = {False: [], True: []}
    for step in range(11 * 2):
        batch = Boxed(*stream[step])
        upright = batch.images.shape[1] > batch.images.shape[2]
        assert upright == batches.upright(step)
        seen[upright] += list(batch.number)
    for upright, group in ((False, range(7)), (True, range(7, 11))):
        count = 2 * len(group)
        assert sorted(seen[upright][:count]) == sorted([*group, *group])
    assert [len(numbers) for numbers in seen.values()] == [28, 16]  # in proportion


def test_the_order_follows_from_seed_and_step(images):
    whole = batches_of(images).stream(0)
    later = pickle.loads(pickle.dumps(batches_of(images))).stream(5)
    np.testing.assert_array_equal(Boxed(*whole[7]).images, Boxed(*later[2]).images)
    other = batches_of(images, seed=1).stream(0)
    assert [Boxed(*whole[i]).number.tolist() for i in range(9)] != [Boxed(*other[i]).number.tolist() for i in range(9)]


def test_two_processes_read_the_two_halves_of_a_batch(images):
    whole, halves = batches_of(images).stream(0), [batches_of(images, range(i, i + 1)).stream(0) for i in (0, 1)]
    for step in range(5):
        for i, half in enumerate(halves):
            for one, other in zip(whole[step], half[step], strict=True):
                np.testing.assert_array_equal(one[i : i + 1], other)


def test_tests_see_every_image_once(images):
    stream = evaluation_batches(reader_of(images), 3, range(3))
    numbers = [number for i in range(len(stream)) for number in Boxed(*stream[i]).number]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, -1, -1, 7, 8, 9, 10, -1, -1]


def test_a_broken_image_is_replaced_in_training_and_left_out_in_tests(images):
    images.paths[3].write_bytes(b"\xff\xd8 no image")
    images.paths[5].write_bytes(images.paths[8].read_bytes())  # of another size than its annotation says
    stream = batches_of(images).stream(0)
    found = [Boxed(*stream[i]) for i in range(11)]
    assert {int(b) for batch in found for b in batch.broken} == {-1, 3, 5}
    assert not {3, 5} & {int(n) for batch in found for n in batch.number}
    tested = [Boxed(*batch) for batch in evaluation_batches(reader_of(images), 2, range(2))]
    assert {int(b) for batch in tested for b in batch.broken} == {-1, 3, 5}
    assert not {3, 5} & {int(n) for batch in tested for n in batch.number}
