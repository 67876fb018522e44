"""Views of an image beside slow, obvious references."""

import numpy as np
import pytest
from paths import SHARED
from PIL import Image

from resnet_jax.data.views import make_protocol, resize, views

SAMPLE = SHARED / "data" / "imagenet_sample" / "train"


def random_image(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def slow_resize(image, height, width):
    """A triangle filter as wide as a pixel of the result, one axis after the other, in float64."""

    def along_rows(values, length):
        scale = len(values) / length
        reach = max(scale, 1.0)
        rows = []
        for i in range(length):
            centre = (i + 0.5) * scale
            weights = np.array([max(0.0, 1 - abs(j + 0.5 - centre) / reach) for j in range(len(values))])
            rows.append(np.tensordot(weights / weights.sum(), values, 1))
        return np.array(rows)

    columns = along_rows(image.astype(np.float64).transpose(1, 0, 2), width).transpose(1, 0, 2)
    return along_rows(columns, height)


@pytest.mark.parametrize(
    ("height", "width", "shorter", "expected"),
    [(37, 53, 16, (16, 22)), (53, 37, 41, (58, 41)), (20, 20, 37, (37, 37)), (31, 90, 30, (30, 87))],
)
def test_resize_is_the_triangle_filter(height, width, shorter, expected):
    image = random_image(height, width)
    resized = resize(image, shorter)
    assert resized.shape == (*expected, 3)  # the longer side: 53 * 16 / 37 = 22.9, rounded down
    assert resized.dtype == np.uint8
    assert np.abs(slow_resize(image, *expected) - resized).max() < 1.01  # Pillow rounds twice


def test_an_image_of_the_right_size_stays_as_it_is():
    image = random_image(24, 40)
    assert resize(image, 24) is image
    (view,) = views(random_image(32, 32, 3), make_protocol("single", (32, 32)))
    np.testing.assert_array_equal(view, random_image(32, 32, 3))


@pytest.mark.parametrize("seed", range(4))
def test_five_crops_pixel_by_pixel(seed):
    random = np.random.RandomState(seed)
    input_size = tuple(random.randint(5, 12, 2))
    image = random_image(*random.randint(14, 30, 2), seed)
    protocol = make_protocol("10crop", input_size, (13,))
    crops = views(image, protocol)
    resized = resize(image, 13)
    down, across = resized.shape[0] - input_size[0], resized.shape[1] - input_size[1]
    starts = [(0, 0), (0, across), (down, 0), (down, across), (down // 2, across // 2)]
    assert len(crops) == 5  # and 5 mirror images, made on the device
    for crop, (top, left) in zip(crops, starts, strict=True):
        assert crop.shape == (*input_size, 3)
        for row in range(input_size[0]):
            for column in range(input_size[1]):
                assert crop[row, column].tolist() == resized[top + row, left + column].tolist()
    (centre,) = views(image, make_protocol("single", input_size, (13,)))
    np.testing.assert_array_equal(centre, crops[-1])


def test_the_papers_sizes():
    assert make_protocol("multiscale", (224, 224)).scales == (224, 256, 384, 480, 640)
    assert make_protocol("10crop", (224, 224)).scales == (256,)
    assert make_protocol("single", (224, 224)).scales == (256,)
    assert make_protocol("multiscale", (32, 32)).scales == (32, 37, 55, 69, 91)  # in proportion
    assert make_protocol("10crop", (32, 32)).scales == (37,)
    image = random_image(375, 500)
    assert [view.shape for view in views(image, make_protocol("multiscale", (224, 224)))] == [
        (224, 298, 3), (256, 341, 3), (384, 512, 3), (480, 640, 3), (640, 853, 3)
    ]  # fmt: skip


def test_scales_that_do_not_fit():
    with pytest.raises(ValueError, match="a scale of 200 is smaller than the network's input of 224"):
        make_protocol("multiscale", (224, 224), (256, 200))
    with pytest.raises(ValueError, match="crops are cut from one scale; got 256, 384"):
        make_protocol("10crop", (224, 224), (256, 384))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the ImageNet photographs (../shared/data) are not here")
def test_real_photographs():
    paths = sorted(SAMPLE.glob("*/*"))[::20]
    assert len(paths) == 5
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        height, width = image.shape[:2]
        crops = views(image, make_protocol("10crop", (224, 224)))
        assert [crop.shape for crop in crops] == [(224, 224, 3)] * 5
        long = 256 * max(height, width) // min(height, width)
        resized = np.asarray(
            Image.fromarray(image).resize((long, 256) if width >= height else (256, long), Image.Resampling.BILINEAR)
        )
        np.testing.assert_array_equal(crops[0], resized[:224, :224])
        np.testing.assert_array_equal(crops[3], resized[-224:, -224:])
        for view, scale in zip(
            views(image, make_protocol("multiscale", (224, 224))), (224, 256, 384, 480, 640), strict=True
        ):
            assert min(view.shape[:2]) == scale
            assert max(view.shape[:2]) == scale * max(height, width) // min(height, width)
