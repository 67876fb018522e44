"""Decoding: every kind of image becomes RGB, and a window is what resizing and cropping would give."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data.decode import BrokenImageError, Window, decode, decode_window, encode_raw, open_image, upright
from resnet_jax.data.views import resize

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
    ("mode", "form"), [("RGB", "PNG"), ("L", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG")]
)
def test_every_mode_becomes_rgb(mode, form):
    image = Image.fromarray(smooth(30, 40))
    decoded = decode(encoded(image.convert(mode), form))
    assert (decoded.shape, decoded.dtype) == ((30, 40, 3), np.uint8)
    expected = np.asarray(image.convert(mode).convert("RGB"), np.float32)
    assert np.abs(decoded - expected).mean() < (6 if form == "JPEG" else 1e-6)


GREY = np.tile(np.arange(256, dtype=np.uint8), (8, 1))


def pgm(values, largest):
    return b"P5\n%d %d\n%d\n" % (*values.shape[::-1], largest) + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
        encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
        encoded(Image.fromarray(GREY.astype(np.uint16) * 16), "TIFF", tiffinfo={281: 4080}),  # 12 bits in 16
        pgm(GREY.astype(np.uint16) * 257, 65_535),
        pgm(GREY.astype(np.uint16) * 16, 4080),
    ],
)
def test_more_than_8_bits_are_scaled_by_their_range(data):
    np.testing.assert_array_equal(decode(data), np.repeat(GREY[:, :, None], 3, 2))


@pytest.mark.parametrize(("dtype", "words"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_numbers_without_a_range_are_refused(dtype, words):
    data = encoded(Image.fromarray(GREY.astype(dtype)), "TIFF")
    with pytest.raises(BrokenImageError, match=f"{words} numbers, for which no file says what is white"):
        decode(data)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_pixels_show_white(form, mode):
    pixels = np.full((4, 6, 4), (90, 90, 90, 255), np.uint8)
    pixels[:2, :, 3] = 0
    image = Image.fromarray(pixels)
    if mode == "P" and form == "PNG":
        image = image.quantize(4)
    elif mode == "LA" and form in ("PNG", "TIFF"):
        image = image.convert("LA")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(encoded(image, form, **({"lossless": True} if form == "WEBP" else {})))
    assert (decoded[:2] == 255).all()
    assert np.abs(decoded[2:].astype(int) - 90).max() <= 2
    half = np.full((4, 6, 4), (0, 0, 0, 51), np.uint8)  # a fifth of black
    assert (decode(encoded(Image.fromarray(half), "PNG")) == 204).all()


def test_a_colour_that_is_transparent_shows_white():
    image = Image.fromarray(np.repeat(np.uint8([[[10, 20, 30], [40, 50, 60]]]), 2, 0))
    decoded = decode(encoded(image, "PNG", transparency=(10, 20, 30)))
    assert decoded[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_nothing_but_its_end_is_read(progressive):
    whole = encoded(Image.fromarray(smooth(120, 160)), quality=95, progressive=progressive)
    assert whole.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(decode(whole[:-2]), decode(whole))
    marked = whole[:2] + b"\xff\xfe\x00\x06\xff\xd8\xff\xd9" + whole[2:]  # a comment with another image's end in it
    np.testing.assert_array_equal(decode(marked[:-2]), decode(whole))
    np.testing.assert_array_equal(decode(whole + b"more"), decode(whole))
    for share in (0.5, 0.8, 0.95):
        with pytest.raises(BrokenImageError):
            decode(whole[: int(share * len(whole))])


def test_images_are_turned_upright_where_that_is_asked_for():
    image, exif = smooth(40, 60), Image.Exif()
    for orientation, turned in {1: image, 3: image[::-1, ::-1], 6: np.rot90(image, -1), 8: np.rot90(image)}.items():
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(image), "PNG", exif=exif)
        np.testing.assert_array_equal(decode(data), image)
        np.testing.assert_array_equal(decode(upright(data)), turned)
        height, width, _ = turned.shape
        assert open_image(upright(data)).size == (width, height)
        window = decode_window(open_image(upright(data)), Window(4, 6, 32, 32), 32)
        np.testing.assert_array_equal(window, turned[6:38, 4:36])
    np.testing.assert_array_equal(decode(upright(encode_raw(image))), image)


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


def png(width, height):
    """A PNG file of a few bytes that claims to be of this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(9_460, 9_460), "9460x9460 pixels are more than 89,478,485"),
        (png(65_535, 65_535), "decompression bomb"),
        (png(1, 101), "1x101 pixels: one side is more than 100 times the other"),  # resized, it would fill the memory
        (png(60_000, 2), "60000x2 pixels: one side is more than 100 times the other"),
        (b"RGB8" + struct.pack("<II", 2**32 - 1, 2**32 - 1), "4294967295x4294967295 pixels are more"),
        (b"RGB8" + struct.pack("<II", 0, 5), "5x0 pixels"),
        (b"RGB8" + struct.pack("<II", 4, 5) + bytes(59), "not enough image data"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no image"),  # Ghostscript would run it
        (b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(40), "no image"),
    ],
)
def test_an_image_that_claims_too_much_is_broken_before_it_is_decoded(data, message):
    for read in (open_image, decode):
        with pytest.raises(BrokenImageError, match=message):
            read(data)


def test_a_narrow_image_is_none_that_claims_too_much():
    assert decode(encoded(Image.new("RGB", (100, 1)), "PNG")).shape == (1, 100, 3)
