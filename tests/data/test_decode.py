"""Decoding: every kind of image becomes RGB, and a window is what resizing and cropping would give."""

import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data.decode import BrokenImageError, Window, decode, decode_window, encode_raw, open_image
from resnet_jax.views import resize

RANDOM = np.random.RandomState(0)


def smooth(height, width):
    """A made-up photograph, RGB uint8 [H, W, 3]."""
    noise = RANDOM.randint(0, 256, (height // 16 + 2, width // 16 + 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "PNG"), ("L", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")]
)
def test_every_mode_becomes_rgb(mode, form):
    image = Image.fromarray(smooth(30, 40))
    decoded = decode(encoded(image.convert(mode), form))
    assert (decoded.shape, decoded.dtype) == ((30, 40, 3), np.uint8)
    expected = np.asarray(image.convert(mode).convert("RGB"), np.float32)
    assert np.abs(decoded - expected).mean() < (6 if form == "JPEG" else 1e-6)


def test_raw_bytes_are_the_image():
    image = smooth(20, 30)
    np.testing.assert_array_equal(decode(encode_raw(image)), image)
    window = decode_window(open_image(encode_raw(image)), Window(5, 2, 16, 16), 16)
    np.testing.assert_array_equal(window, image[2:18, 5:21])
    mirrored = decode_window(open_image(encode_raw(image)), Window(5, 2, 16, 16), 16, mirrored=True)
    np.testing.assert_array_equal(mirrored, window[:, ::-1])


@pytest.mark.parametrize("data", [b"", b"no image at all", encoded(Image.fromarray(smooth(64, 64)))[:700], b"RGB8\x05"])
def test_what_cannot_be_decoded_is_broken(data):
    with pytest.raises(BrokenImageError):
        decode(data)
    with pytest.raises(BrokenImageError):
        decode_window(open_image(data), Window(0, 0, 8, 8), 8)


def test_a_window_is_what_resizing_and_cropping_gives():
    image = smooth(375, 500)
    resized = resize(image, 300)  # 400 x 300
    x, y = 500 / 400, 375 / 300
    found = decode_window(Image.fromarray(image), Window(30 * x, 50 * y, 224 * x, 224 * y), 224)
    expected = resized[50:274, 30:254]
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size():
    image = smooth(900, 1200)
    data = encoded(Image.fromarray(image), quality=95)
    opened = open_image(data)
    found = decode_window(opened, Window(300, 150, 600, 600), 224)  # 2.7 times as large as needed
    assert opened.size == (600, 450)
    expected = decode_window(Image.fromarray(image), Window(300, 150, 600, 600), 224)
    assert np.abs(found.astype(int) - expected).mean() < 2
    opened = open_image(data)
    decode_window(opened, Window(0, 0, 440, 440), 224)  # half of it would be too small
    assert opened.size == (1200, 900)
