"""TFDS: prepared sets are read exactly and without TensorFlow; everything else is one clear line."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from image_files import encoded
from paths import ROOT, TESTS

from resnet_jax.data import Dataset, StreamedDataset, load_test_images
from resnet_jax.data import load_dataset as load_any_dataset
from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.sources import tfds as tfds_source
from resnet_jax.data.sources.shards import write_shard
from resnet_jax.errors import UserError

pytest.importorskip("tensorflow_datasets")

FIXTURES = TESTS / "fixtures"
PREPARED = FIXTURES / "tfds"


def load_dataset(name: str, data_dir: pathlib.Path) -> Dataset:
    dataset = load_any_dataset(name, data_dir)
    assert isinstance(dataset, Dataset)  # all but the last tests are about sets in memory
    return dataset


def fixture_maker() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("make_tfds_fixture", FIXTURES / "make_tfds_fixture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made_up = fixture_maker().made_up


@pytest.mark.parametrize("name", ["tiny", "tiny:1.0.0"])
def test_reads_rgb(name: str) -> None:
    dataset = load_dataset(f"tfds:{name}", PREPARED)
    assert dataset.name == f"tfds:{name}"
    assert dataset.class_names == ("ant", "bee", "cow")
    for split, name in ((dataset.train, "train"), (dataset.test, "test")):
        images, labels = made_up(name)
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32


@pytest.mark.parametrize("name", ["tiny_grey", "tiny_grey/small", "tiny_grey/small:1.0.0"])
def test_reads_grey_and_validation(name: str) -> None:
    dataset = load_dataset(f"tfds:{name}", PREPARED)
    images, labels = made_up("validation", channels=1)
    np.testing.assert_array_equal(dataset.test.images, np.repeat(images, 3, axis=-1))
    np.testing.assert_array_equal(dataset.test.labels, labels)
    assert dataset.train.images.shape == (20, 8, 8, 3)


def test_reads_quietly_and_without_tensorflow() -> None:
    code = (
        "import sys; from resnet_jax.data import load_dataset\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"  # slow to import
        f"print(len(load_dataset('tfds:tiny', {str(PREPARED)!r}).train), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "20 False\n", "")


def test_takes_the_newest_version(tmp_path: pathlib.Path) -> None:
    for version in ("9.0.0", "10.0.0", "10.0.0.incomplete"):
        shutil.copytree(PREPARED / "tiny" / "1.0.0", tmp_path / "tiny" / version)
    assert tfds_source._find_prepared("tfds:tiny", tmp_path) == tmp_path / "tiny" / "10.0.0"
    assert tfds_source._find_prepared("tfds:tiny:9.0.0", tmp_path) == tmp_path / "tiny" / "9.0.0"
    assert tfds_source._find_prepared("tfds:tiny:8.0.0", tmp_path) is None


def test_several_configs(tmp_path: pathlib.Path) -> None:
    for config in ("large", "small"):
        shutil.copytree(PREPARED / "tiny_grey" / "small", tmp_path / "tiny_grey" / config)
    with pytest.raises(UserError, match=r"several configs, choose one .*: large, small"):
        load_dataset("tfds:tiny_grey", tmp_path)
    assert load_dataset("tfds:tiny_grey/large", tmp_path).image_shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifr10", "no such set; did you mean cifar10"),
        ("tiny:2.0.0", r"no such set; prepared there: .*tiny/1\.0\.0"),
        ("mnist", r"tfds:mnist is not prepared in .*/tfds: .*pip install tensorflow"),
        ("mnist:9.9.9", r"tfds:mnist:9\.9\.9: .*only: 3\.0\.1"),
        ("cifar10/xx", "tfds:cifar10/xx: .*BuilderConfig xx not found"),
        ("ag_news_subset", 'tfds:ag_news_subset: needs a feature "image" of type Image, found None'),
        ("imagenet2012", r"tfds:imagenet2012 is not prepared in .*/tfds: .*pip install tensorflow"),
        ("../tiny", "expected tfds:NAME"),
        ("", "expected tfds:NAME"),
    ],
)
def test_not_prepared(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfds_source, "find_spec", lambda name: None)  # as without TensorFlow
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(f"tfds:{name}", PREPARED)
    assert "\n" not in str(caught.value)
    assert not (PREPARED / name.split(":")[0] / "3.0.1").exists()


def test_prepares_with_tensorflow(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that prepares, with TFDS' part (download and write) played by a copy of the fixture."""
    import tensorflow_datasets as tfds

    def prepare(builder: Any) -> None:
        assert builder.info.file_format.value == "array_record"
        shutil.copytree(PREPARED / "tiny" / "1.0.0", builder.data_dir)

    monkeypatch.setattr(tfds_source, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    dataset = load_dataset("tfds:mnist", tmp_path)
    np.testing.assert_array_equal(dataset.train.images, made_up("train")[0])


def test_failing_to_prepare(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    def fail(builder: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tfds_source, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError, match=r"tfds:mnist: could not be prepared in .* \(no route to host\)"):
        load_dataset("tfds:mnist", tmp_path)


def edit_json(name: str, change: Callable[[Any], None]) -> Callable[[pathlib.Path], None]:
    def edit(folder: pathlib.Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def change_feature(key: str, **changes: Any) -> Callable[[pathlib.Path], None]:
    def change(content: Any) -> None:
        content["featuresDict"]["features"]["image"]["image"][key] = changes["to"]

    return edit_json("features.json", change)


def drop_label(content: Any) -> None:
    del content["featuresDict"]["features"]["label"]


def drop_test(content: Any) -> None:
    content["splits"] = content["splits"][:1]


def name_it_tfrecord(content: Any) -> None:
    content["fileFormat"] = "tfrecord"


def overwrite(name: str, content: bytes) -> Callable[[pathlib.Path], None]:
    def write(folder: pathlib.Path) -> None:
        (folder / name).write_bytes(content)

    return write


TRAIN = "tiny-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_feature("shape", to={"dimensions": ["8", "8", "4"]}), "1 or 3 channels"),
        (
            change_feature("shape", to={"dimensions": ["9", "9", "3"]}),
            r"1\.0\.0: cannot read the image train/0 \(it is \(8, 8\) pixels large, not \(9, 9\)\); delete",
        ),
        (edit_json("features.json", drop_label), 'needs a feature "label" of type ClassLabel, found None'),
        (edit_json("dataset_info.json", drop_test), '"test" or "validation" with labels, found train'),
        (edit_json("dataset_info.json", name_it_tfrecord), "1.0.0: prepared as tfrecord, needs array_record"),
        (overwrite("dataset_info.json", b"{"), "1.0.0: not a prepared TFDS set"),
        (overwrite("features.json", b"[]"), "1.0.0: not a prepared TFDS set"),
        (lambda folder: (folder / "features.json").unlink(), "1.0.0: not a prepared TFDS set"),
        (lambda folder: (folder / TRAIN).unlink(), rf"1.0.0/{TRAIN}: unreadable shard \(No such file"),
        (overwrite(TRAIN, b""), rf"1.0.0/{TRAIN}: unreadable shard \(0 of 20 images are found"),
    ],
)
def test_damaged(damage: Callable[[pathlib.Path], None], message: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "tiny" / "1.0.0"
    shutil.copytree(PREPARED / "tiny" / "1.0.0", folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_dataset("tfds:tiny", tmp_path)


# --- images that vary in size


def example(image: bytes, label: int) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    record = tf_example_pb2.Example()
    record.features.feature["image"].bytes_list.value.append(image)
    record.features.feature["label"].int64_list.value.append(label)
    record.features.feature["file_name"].bytes_list.value.append(b"as ImageNet has it")
    return record.SerializeToString()


LABELS = {"train": [2, 0, 1, 1, 0], "test": [1, 0, 2, 1], "validation": [0, 2, 1]}
IMAGES = {
    split: [encoded(f"{split}{i}", 10 + i, 20, format="PNG" if i == 1 else "JPEG") for i in range(len(labels))]
    for split, labels in LABELS.items()
}


def prepare(data_dir: pathlib.Path, splits: tuple[str, ...], labels: dict[str, list[int]] = LABELS) -> pathlib.Path:
    """Write the set "many" as TFDS prepares one, in shards of two images; return its folder."""
    folder = data_dir / "many" / "1.0.0"
    shutil.copytree(PREPARED / "tiny" / "1.0.0", folder, ignore=shutil.ignore_patterns("*array_record*"))
    change_feature("shape", to={"dimensions": ["-1", "-1", "3"]})(folder)
    infos = []
    for split in splits:
        records = [example(image, label) for image, label in zip(IMAGES[split], labels[split], strict=True)]
        shards = [records[i : i + 2] for i in range(0, len(records), 2)]
        for number, shard in enumerate(shards):
            write_shard(folder / f"many-{split}.array_record-{number:05}-of-{len(shards):05}", shard)
        lengths = [str(len(shard)) for shard in shards]
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append({"name": split, "shardLengths": lengths, "numBytes": "1", "filepathTemplate": template})
    edit_json("dataset_info.json", lambda info: info.update(name="many", splits=infos))(folder)
    return folder


def load_streamed(data_dir: pathlib.Path) -> StreamedDataset:
    dataset = load_any_dataset("tfds:many", data_dir)
    assert isinstance(dataset, StreamedDataset)
    return dataset


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_streams(tmp_path: pathlib.Path, held_out: str) -> None:
    folder = prepare(tmp_path, ("train", held_out))
    dataset = load_streamed(tmp_path)
    assert (dataset.name, dataset.folder, dataset.class_names) == ("tfds:many", folder, ("ant", "bee", "cow"))
    for images, split in ((dataset.train, "train"), (dataset.test, held_out)):
        expected = list(zip(IMAGES[split], LABELS[split], strict=True))
        for copy in (images, pickle.loads(pickle.dumps(images))):  # the files that are open cannot be pickled
            assert [copy.read(index) for index in range(len(copy))] == expected
            assert all(type(content) is bytes and type(label) is int for content, label in [copy.read(0)])
            assert copy.labels.tolist() == LABELS[split]
            assert copy.labels.dtype == np.int32
        assert len(pickle.dumps(images)) < 1000  # without what it has read for itself
    test = load_test_images("tfds:many", tmp_path)
    assert test.ids[:2] == (f"{held_out}/0", f"{held_out}/1")
    assert test.labels.tolist() == LABELS[held_out]
    np.testing.assert_array_equal(test.images[1], decode(IMAGES[held_out][1]))


def test_a_test_split_without_labels(tmp_path: pathlib.Path) -> None:
    """As in imagenet2012:5.1.0, where all are -1."""
    prepare(tmp_path, ("train", "test", "validation"), LABELS | {"test": [-1] * 4})
    assert load_streamed(tmp_path).test.labels.tolist() == LABELS["validation"]
    shutil.rmtree(tmp_path / "many")
    prepare(tmp_path, ("train", "test"), LABELS | {"test": [-1] * 4})
    with pytest.raises(
        UserError, match='needs splits "train" and "test" or "validation" with labels, found train, test'
    ):
        load_streamed(tmp_path)


def test_wrong_labels(tmp_path: pathlib.Path) -> None:
    prepare(tmp_path, ("train", "test"), LABELS | {"test": [0, 3, 1, 2]})
    test = load_streamed(tmp_path).test
    assert test.read(0) == (IMAGES["test"][0], 0)
    with pytest.raises(BrokenImageError, match=r"its label 3 is outside 0\.\.2"):
        test.read(1)
    with pytest.raises(
        UserError,
        match=r"many/1\.0\.0: cannot read the image test/1 \(its label 3 is outside",
    ):
        _ = test.labels


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_bytes(b"x" * 131072)])
def test_damaged_shard(tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], object]) -> None:
    shard = prepare(tmp_path, ("train", "test")) / "many-train.array_record-00001-of-00003"
    train = load_streamed(tmp_path).train
    damage(shard)
    with pytest.raises(UserError, match=f"{shard}: unreadable shard"):
        load_streamed(tmp_path)
    with pytest.raises(BrokenImageError):
        train.read(2)
    with pytest.raises(UserError, match=r"many/1\.0\.0: cannot read the image train/2 \("):
        _ = train.labels
    assert train.read(4) == (IMAGES["train"][4], 0)


def test_many_files(tmp_path: pathlib.Path) -> None:
    """The usual limit of open files is 1024, and so many files has ImageNet."""
    prepare(tmp_path, ("train", "test"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limits[1]), limits[1]))
        load_streamed(tmp_path).train.read(0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
