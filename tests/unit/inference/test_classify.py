"""Prediction as users ask for it: images and files, in Python and on the command line."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from image_files import write
from PIL import Image

import resnet_jax
from resnet_jax.cli.commands import main
from resnet_jax.errors import BrokenDataError, UserError

IMAGES = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def trained():
    return resnet_jax.load("cifar10_resnet20")


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them deeper, a file that is none, and one that is not looked at."""
    write(tmp_path, {"b.jpg": b"no image", "notes.txt": b"", "deep/er/x.txt": b""})
    for name, image in zip(("a.png", "c.png", "deep/er/d.png"), IMAGES, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    return tmp_path


def expected(trained, images):
    model, variables, origin = trained
    logits = np.asarray(model.apply(variables, resnet_jax.preprocess(images, origin), train=False), np.float64)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def test_arrays_and_files_have_the_same_probabilities(trained, folder):
    found = resnet_jax.predict(trained, IMAGES)
    assert (found.shape, found.dtype) == ((3, 10), np.float64)
    np.testing.assert_allclose(found, expected(trained, IMAGES), rtol=1e-4, atol=1e-7)
    paths = [folder / "a.png", str(folder / "c.png"), IMAGES[2]]
    np.testing.assert_allclose(resnet_jax.predict(trained, paths, batch_size=2), found, rtol=1e-5, atol=1e-8)


def test_images_of_any_size_are_cropped_as_in_evaluation(trained):
    large = np.asarray(Image.fromarray(IMAGES[0]).resize((90, 74)))
    shown = np.asarray(Image.fromarray(large).resize((45, 37), Image.Resampling.BILINEAR))[2:34, 6:38]
    np.testing.assert_allclose(
        resnet_jax.predict(trained, [large]), expected(trained, shown[None]), rtol=1e-4, atol=1e-7
    )
    ten = resnet_jax.predict(trained, [large], protocol="10crop")
    assert np.abs(ten - resnet_jax.predict(trained, [large])).max() > 1e-3


def test_files_are_turned_upright_for_a_network_that_was_trained_so(trained, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(IMAGES[0]).save(tmp_path / "x.png", exif=exif)
    config = trained.origin.config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, upright=True))
    turning = trained._replace(origin=dataclasses.replace(trained.origin, config=config))
    for network, image in ((trained, IMAGES[0]), (turning, IMAGES[0][::-1, ::-1])):
        found = resnet_jax.predict(network, [tmp_path / "x.png"])
        np.testing.assert_allclose(found, expected(trained, image[None]), rtol=1e-4, atol=1e-7)


def test_what_cannot_be_classified_is_named(trained, folder):
    with pytest.raises(UserError, match=f"cannot read the image {folder}/b.jpg: no image"):
        resnet_jax.predict(trained, [folder / "a.png", folder / "b.jpg"])
    for wrong in (IMAGES.astype(np.float32), IMAGES[..., :1], IMAGES[0]):
        with pytest.raises(ValueError, match="expected RGB uint8 images"):
            resnet_jax.predict(trained, wrong)


def test_the_command_lists_the_likeliest_classes(trained, folder, capsys):
    assert main(["predict", "cifar10_resnet20", str(folder), str(folder / "a.png"), "--top", "3", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"warning: cannot read {folder}/b.jpg: no image: left out\n"
    lines = [json.loads(line) for line in printed.out.splitlines()]
    names = ["a.png", "c.png", "deep/er/d.png", "a.png"]
    assert [line["image"] for line in lines] == [f"{folder}/{name}" for name in names]
    probabilities = expected(trained, IMAGES)
    for line, row in zip(lines, probabilities[[0, 1, 2, 0]], strict=True):
        order = np.argsort(-row)[:3]
        assert [c["class"] for c in line["classes"]] == [trained.origin.inputs.class_names[i] for i in order]
        np.testing.assert_allclose([c["probability"] for c in line["classes"]], row[order], rtol=1e-3)


def test_text_and_csv(folder, capsys):
    assert main(["predict", "cifar10_resnet20", str(folder / "a.png"), "--top", "2", "--csv"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert [row[:3] for row in rows] == [
        ["image", "rank", "class", "probability"][:3],
        [f"{folder}/a.png", "1", "bird"],
        [f"{folder}/a.png", "2", rows[2][2]],
    ]
    assert main(["predict", "cifar10_resnet20", str(folder / "a.png"), "--top", "1"]) == 0
    assert capsys.readouterr().out == f"{folder}/a.png\n  {100 * float(rows[1][3]):6.2f} %  bird\n"


def test_mistakes_of_the_command(tmp_path, folder):
    for arguments, message in (
        (["nowhere", str(folder)], "nowhere is no work directory"),
        (["cifar10_resnet20", str(folder / "x.png")], f"no file or folder {folder}/x.png"),
        (["cifar10_resnet20", str(folder), "--top", "0"], "--top must be at least 1; got 0"),
    ):
        with pytest.raises(UserError, match=message):
            main(["predict", *arguments])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in .*/empty .files that end in .bmp"):
        main(["predict", "cifar10_resnet20", str(tmp_path / "empty")])
    with pytest.raises(BrokenDataError, match="none of the images can be read"):
        main(["predict", "cifar10_resnet20", str(folder / "b.jpg")])
