"""Links of data folders are followed only inside them, and what is no file is not waited for."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from image_files import CLASSES, encoded, write, write_folder
from paths import TESTS

from resnet_jax.data import cifar10, load_dataset, load_test_images
from resnet_jax.data.decode import BrokenImageError
from resnet_jax.data.inside import check_inside, read_file
from resnet_jax.data.sources.image_folder import load_image_folder
from resnet_jax.data.tools.check import check
from resnet_jax.data.tools.pack import PackOptions, pack
from resnet_jax.data.tools.statistics import compute_statistics, load_statistics, save_statistics
from resnet_jax.errors import UserError

PREPARED = TESTS / "fixtures" / "tfds"


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """Waiting for the other end of a pipe would last for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of images."""
    return write_folder(tmp_path / "data")


@pytest.fixture
def elsewhere(tmp_path: pathlib.Path) -> pathlib.Path:
    """Another one, outside of it; its name begins with that of the other."""
    return write_folder(tmp_path / "data_of_others")


def replace(path: pathlib.Path, target: pathlib.Path | str) -> None:
    """Put a link to `target` into the place of what is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def refused(path: pathlib.Path, target: pathlib.Path, root: pathlib.Path, load: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith(f"{path} leads to {target}, outside of {root}, and links of a data folder are followed")
    assert "put a copy or hard links there instead" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["train", "val", "train/bee", "val/bee", "train/bee/1.jpeg", "val/bee/0.jpeg"])
@pytest.mark.parametrize("relative", [False, True])
def test_links_to_outside(name: str, relative: bool, root: pathlib.Path, elsewhere: pathlib.Path) -> None:
    target = elsewhere / name
    replace(root / name, os.path.relpath(target, (root / name).parent) if relative else target)
    for load in (load_dataset, lambda _, folder: check(folder)):
        refused(root / name, target, root, functools.partial(load, "folder", root))
    if name.startswith("val"):
        refused(root / name, target, root, lambda: load_test_images("folder", root))


def test_links_to_outside_by_other_links(root: pathlib.Path, elsewhere: pathlib.Path) -> None:
    """What counts is where it ends; a link inside to a link to outside leads outside."""
    (root / "hop").symlink_to(elsewhere)
    replace(root / "train/bee/1.jpeg", "../../hop/train/bee/1.jpeg")
    refused(root / "train/bee/1.jpeg", elsewhere / "train/bee/1.jpeg", root, lambda: load_dataset("folder", root))
    replace(root / "train/bee/1.jpeg", elsewhere / "not there.jpeg")  # a broken one, too
    refused(root / "train/bee/1.jpeg", elsewhere / "not there.jpeg", root, lambda: load_dataset("folder", root))


def test_flat_folder(root: pathlib.Path, elsewhere: pathlib.Path) -> None:
    shutil.rmtree(root / "val")
    write(root, {"val/1.png": encoded("1"), "val.txt": b"1.png bee\n"})
    load = functools.partial(load_test_images, "folder", root)
    assert load().labels.tolist() == [1]
    replace(root / "val/1.png", write(elsewhere, {"1.png": b""}) / "1.png")
    refused(root / "val/1.png", elsewhere / "1.png", root, load)
    replace(root / "val/1.png", root / "train/bee/1.jpeg")
    replace(root / "val.txt", write(elsewhere, {"labels": b"1.png bee\n"}) / "labels")
    refused(root / "val.txt", elsewhere / "labels", root, load)


def test_links_inside_are_followed(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    content = (root / "train/bee/1.jpeg").read_bytes()
    (root / "pool").mkdir()
    shutil.move(root / "train/bee/1.jpeg", root / "pool/x")
    (root / "train/bee/1.jpeg").symlink_to("../../pool/x")
    shutil.move(root / "train/cow", root / "pool/cow")
    (root / "train/cow").symlink_to(root / "pool/cow")
    (root / "train/notes").symlink_to("/etc/hostname")  # nothing that is read
    train = load_image_folder("folder", root).train
    assert train.read(3) == (content, 1)
    assert len(train) == 6
    # The folder itself may be a link, by any name.
    (tmp_path / "link").symlink_to(root)
    assert load_image_folder("folder", tmp_path / "link").train.read(3) == (content, 1)
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        assert load_image_folder("folder", "link/../data/.").train.read(3) == (content, 1)
    finally:
        os.chdir(here)
    check_inside("/etc", pathlib.Path("/"))


def test_cycles(root: pathlib.Path) -> None:
    (root / "train/bee/self.jpeg").symlink_to("self.jpeg")
    (root / "train/bee/up.jpeg").symlink_to("..")  # a folder
    (root / "train/loop").symlink_to("loop")
    (root / "train/ping").symlink_to("pong")
    (root / "train/pong").symlink_to("ping")
    (root / "train/cow/again").symlink_to("../..")
    train = load_image_folder("folder", root).train
    names = [train.id(index) for index in range(len(train))]
    assert [name for name in names if name.startswith("bee")] == ["bee/0.jpeg", "bee/1.jpeg", "bee/self.jpeg"]
    assert len(names) == 7
    with pytest.raises(BrokenImageError, match="Too many levels of symbolic links"):
        train.read(names.index("bee/self.jpeg"))


def test_pipes_sockets_and_devices(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "train/bee/pipe.jpg")
    monkeypatch.chdir(root)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("train/bee/socket.png")
        report = check(root).splits["train"]
        reasons = {finding.id: finding.detail for finding in report.unreadable}
        assert reasons["bee/pipe.jpg"] == "not a regular file"
        assert set(reasons) == {"bee/pipe.jpg", "bee/socket.png"}
    with pytest.raises(OSError, match="not a regular file"):
        read_file("/dev/zero")
    with pytest.raises(OSError, match="not a regular file|Is a directory"):
        read_file(root)
    # Training names it, counts it and goes on: one broken image, not a run that waits.
    statistics = compute_statistics(load_image_folder("folder", root).train, 16, workers=0)
    assert statistics.broken == 2


def pack_into(folder: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    pack(root, folder, PackOptions())
    return folder


SHARD, INDEX = "train-00000-of-00001.array_record", "train.index.npz"


@pytest.mark.parametrize("name", [SHARD, INDEX, "manifest.json", "statistics.npz"])
def test_packed(name: str, root: pathlib.Path, elsewhere: pathlib.Path, tmp_path: pathlib.Path) -> None:
    packed = pack_into(tmp_path / "packed", root)
    save_statistics(compute_statistics(load_dataset("folder", packed).train, 16, workers=0), packed)  # type: ignore

    def load() -> object:
        return load_statistics(load_dataset("folder", packed), packed)  # type: ignore

    load()
    shutil.copy(packed / name, elsewhere / name)
    replace(packed / name, elsewhere / name)
    refused(packed / name, elsewhere / name, packed, load)
    shutil.move(elsewhere / name, packed / "moved")
    replace(packed / name, "moved")
    load()
    if name != "manifest.json":  # without it nothing is packed
        (packed / name).unlink()
        os.mkfifo(packed / name)
        with pytest.raises(UserError, match=r"not a regular file|0 bytes"):
            load()


@pytest.mark.parametrize("name", ["../data/train/bee/1.jpeg", "{root}/train/bee/1.jpeg", "x/../y", "..", ""])
@pytest.mark.parametrize("field", ["file", "index_file"])
def test_a_manifest_names_only_files_beside_it(
    name: str, field: str, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    packed = pack_into(tmp_path / "packed", root)
    content = json.loads((packed / "manifest.json").read_text())
    train = content["splits"]["train"]
    (train if field == "index_file" else train["shards"][0])[field] = name.format(root=root)
    (packed / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="manifest.json: not a manifest .*is no file name"):
        load_dataset("folder", packed)


def test_cifar10(elsewhere: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", 2)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    write(elsewhere / "cifar", dict.fromkeys(names, bytes(2 * 3073)))
    data = tmp_path / "cifar"
    data.mkdir()
    load = functools.partial(load_dataset, "cifar10", data)
    (data / "cifar-10-batches-bin").symlink_to(elsewhere / "cifar")
    refused(data / "cifar-10-batches-bin", elsewhere / "cifar", data, load)
    replace(data / "cifar-10-batches-bin", "real")
    shutil.copytree(elsewhere / "cifar", data / "real")
    load()
    replace(data / "real/test_batch.bin", elsewhere / "cifar/test_batch.bin")
    path = data / "cifar-10-batches-bin/test_batch.bin"
    refused(path, elsewhere / "cifar/test_batch.bin", data, load)
    shutil.rmtree(data / "real")
    (data / "cifar-10-batches-bin").unlink()
    (data / "cifar-10-binary.tar.gz").symlink_to(write(elsewhere, {"x.tar.gz": b""}) / "x.tar.gz")
    refused(data / "cifar-10-binary.tar.gz", elsewhere / "x.tar.gz", data, load)


@pytest.fixture
def tfds(tmp_path: pathlib.Path) -> pathlib.Path:
    pytest.importorskip("tensorflow_datasets")
    return pathlib.Path(shutil.copytree(PREPARED / "tiny", tmp_path / "data" / "tiny")) / "1.0.0"


TFDS_SHARD = "tiny-train.array_record-00000-of-00001"


@pytest.mark.parametrize("name", ["", "features.json", "dataset_info.json", TFDS_SHARD])
def test_tfds(name: str, tfds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    load = functools.partial(load_dataset, "tfds:tiny", tmp_path / "data")
    load()
    target = tmp_path / "outside" / (name or "all")
    target.parent.mkdir()
    shutil.move(tfds / name, target)
    (tfds / name).symlink_to(target)
    refused(tfds / name, target, tmp_path / "data", load)
    if name:
        (tfds / name).unlink()
        os.mkfifo(tfds / name)
        with pytest.raises(UserError, match="not a regular file"):
            load()


def change_json(path: pathlib.Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("template", ["../{SPLIT}-x", "/tmp/{SPLIT}-x", "sub/{SPLIT}-x"])
def test_tfds_shards_lie_in_its_folder(template: str, tfds: pathlib.Path, tmp_path: pathlib.Path) -> None:
    change_json(tfds / "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    with pytest.raises(UserError, match=r"1\.0\.0: dataset_info\.json leads to .*train-x, outside of that folder"):
        load_dataset("tfds:tiny", tmp_path / "data")


def features_of(name: str) -> list[Callable[[dict[str, Any]], object]]:
    """Return ways to have TFDS import the module of a class."""
    nested = {"type": name, "content": {}}
    own = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    return [
        lambda top: top.update(pythonClassName=name),
        lambda top: (top.pop("pythonClassName"), top.update(python_class_name=name)),
        lambda top: top["featuresDict"]["features"]["label"].update(pythonClassName=name),
        lambda top: top.update(type=name, content={}),
        lambda top: top.update(type=own, content={"image": nested}),
        lambda top: (
            top.pop("featuresDict"),
            top.update(jsonFeature={"json": json.dumps({"image": nested})}),
        ),
    ]


@pytest.mark.parametrize("number", range(len(features_of(""))))
def test_tfds_imports_nothing_that_a_folder_names(
    number: int, tfds: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "executed"
    module = f"hostile_features_{number}"
    write(tmp_path / "path", {f"{module}.py": f"open({str(mark)!r}, 'w')".encode()})
    monkeypatch.syspath_prepend(tmp_path / "path")
    change_json(tfds / "features.json", features_of(f"{module}.Image")[number])
    with pytest.raises(UserError, match=rf"features\.json: refused the class {module}\.Image: it is not of TensorFlow"):
        load_dataset("tfds:tiny", tmp_path / "data")
    assert not mark.exists()
    import tensorflow_datasets

    with contextlib.suppress(Exception):  # the attack is a real one
        tensorflow_datasets.builder_from_directory(str(tfds))
    assert mark.exists()


def test_listing_resolves_only_links(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million images must not cost a million look-ups."""
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in CLASSES for i in range(1000)]
    write(tmp_path, dict.fromkeys(names, b""))
    (tmp_path / "train/bee/link.png").symlink_to("1.png")
    calls = []
    realpath = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: calls.append(path) or realpath(path))
    began = time.perf_counter()
    train = load_image_folder("folder", tmp_path).train
    print(f"{1e6 * (time.perf_counter() - began) / 6000:.2f} us an image")
    assert len(train) == 3001
    assert len(calls) == 2 * 3  # train, val and the link, each with the folder that it must be in
    assert np.bincount(train.labels).tolist() == [1000, 1001, 1000]
