"""The readers of images of many sizes: folders of image files, label files, packed sets, statistics."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
from pathlib import Path

import numpy as np

from reliability.fuzz import mutations
from reliability.fuzz.npz import damage_npz
from reliability.fuzz.pictures import damaged, make_pictures
from reliability.fuzz.reader import Damaged, Files, Reader
from resnet_jax.data import StreamedDataset, load_dataset, load_test_images
from resnet_jax.data.tools.check import check
from resnet_jax.data.decode import BrokenImageError, decode_window, open_image
from resnet_jax.data.types import EncodedImages
from resnet_jax.data.tools.pack import pack
from resnet_jax.data.tools.reencode import PackOptions, reencode
from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.data.tools.statistics import Statistics, load_statistics, save_statistics
from resnet_jax.data.augment import area_window, scale_window
from resnet_jax.errors import UserError
from resnet_jax.data.views import make_protocol, views


def _folder_files() -> Files:
    pictures = list(make_pictures().items())
    train = {f"train/{('ant', 'bee')[i % 2]}/{name}": content for i, (name, content) in enumerate(pictures)}
    return train | {"val/ant/a.jpg": pictures[0][1], "val/bee/b.png": pictures[4][1]}


def _damage_image(rng: random.Random, files: Files) -> Damaged:
    name = rng.choice(list(files))
    return {name: damaged(rng, files[name], list(files.values()))}


_WINDOWS = (area_window, scale_window(24, (28, 40)))
_PROTOCOLS = tuple(make_protocol(name, (24, 24)) for name in ("single", "10crop", "multiscale"))


def _read_image(images: EncodedImages, index: int, classes: int) -> None:
    """Read an image as training, packing and testing do."""
    rng = np.random.default_rng(0)
    content, label = images.read(index)
    assert 0 <= label < classes
    for window in _WINDOWS:
        image = open_image(content)
        crop = decode_window(image, window(rng, *image.size), 24, mirrored=True)
        assert (crop.shape, crop.dtype) == ((24, 24, 3), np.uint8)
    assert reencode(content, PackOptions(12, "raw")).startswith(b"RGB8")


def _read_streamed(folder: Path, names: frozenset[str]) -> None:
    dataset = load_dataset("folder", folder)
    assert isinstance(dataset, StreamedDataset)
    broken = ""
    for images, split in ((dataset.train, "train"), (dataset.test, "val")):
        changed = {name.removeprefix(f"{split}/") for name in names}
        for index in range(len(images)):
            if images.id(index) not in changed and names == {name for name in names if name.startswith(split)}:
                continue
            try:
                _read_image(images, index, len(dataset.class_names))
            except BrokenImageError as error:
                broken = str(error)
                continue
            if split == "val":
                image = load_test_images("folder", folder).images[index]
                for protocol in _PROTOCOLS:
                    assert all(view.dtype == np.uint8 and view.shape[2] == 3 for view in views(image, protocol))
    if broken:
        raise UserError(f"{folder}: {broken}")


def _packed_files() -> Files:
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "in"), Path(temporary, "out")
        for name, content in _folder_files().items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()):
            pack(source, out, PackOptions(), shard_images=8)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def _damage_packed(rng: random.Random, files: Files) -> Damaged:
    name = rng.choice([*files, "manifest.json", "manifest.json", "train.index.npz", "val.index.npz"])
    content = files[name]
    if name == "manifest.json":
        return {name: mutations.json_document(rng, content)}
    if name.endswith(".npz"):
        field = rng.choice(("blob", "offsets", "labels", "crc32"))
        content = damage_npz(rng, content, field)
    else:
        content = mutations.one_of(mutations.damage, mutations.splice(list(files.values())))(rng, content)
    if rng.random() < 0.2:
        return {name: content}
    manifest = json.loads(files["manifest.json"])  # sizes and check sums as if it were meant to be so
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        digest = sha256_of(Path(file.name))
    for split in manifest["splits"].values():
        if split["index_file"] == name:
            split["index_sha256"] = digest
        for shard in split["shards"]:
            if shard["file"] == name:
                shard.update(bytes=len(content), sha256=digest)
    return {name: content, "manifest.json": json.dumps(manifest).encode()}


def _label_files() -> Files:
    images = {f"val/{i}.png": b"" for i in range(4)} | {f"train/{name}/1.png": b"" for name in ("ant", "bee")}
    return images | {"val.txt": b"0.png ant\n1.png bee\n2.png ant\n3.png 1\n"}


def _damage_labels(rng: random.Random, files: Files) -> Damaged:
    kaggle = b"ImageId,PredictionString\n0,ant 1 2 3 4\n1,bee\n2,0\n3,1\n"
    numbered = b"0.png 0\n1.png 1\n2.png 5\n3.png 3\n"
    content = rng.choice((kaggle, files["val.txt"], numbered, numbered))
    kind = rng.random()
    if kind < 0.4:
        lines = content.split(b"\n")
        at = rng.randrange(len(lines))
        words = (
            b"999999999999", b"9" * 5000, b"-1", "²".encode(), "٣".encode(), b"\xff\xfe", b"\0", b"../0.png", b'"',
            b"1e3", b" ", b"\t", b"a" * 200_000, b'"' + b"\n" * 1000, b"0x1", b"\x1b[31m", b"1,2,3", b"4294967296",
        )  # fmt: skip
        lines[at] = lines[at].replace(rng.choice((b"0", b"1", b"ant", b"2", b"3", b" ", b"png")), rng.choice(words))
        content = b"\n".join(lines)
    else:
        content = mutations.damage_repeatedly(rng, content)
    name = "LOC_val_solution.csv" if content[:5] == b"Image" or rng.random() < 0.2 else "val.txt"
    gone = [name for name in files if name.startswith("train")] if rng.random() < 0.5 else []
    return {**dict.fromkeys(gone), "val.txt": None, name: content}


def _read_labels(folder: Path, names: frozenset[str]) -> None:
    images = load_test_images("folder", folder)
    assert len(images) == len(images.ids) == 4
    assert images.labels.dtype == np.int32
    assert 0 <= images.labels.min() <= images.labels.max() < len(images.class_names) <= 100_000
    load_dataset("folder", folder)


def _statistics_files() -> Files:
    with tempfile.TemporaryDirectory() as temporary:
        mean = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
        save_statistics(Statistics(mean, np.ones(3, np.float32), np.eye(3, dtype=np.float32), 1, 0), Path(temporary))
        return {"statistics.npz": Path(temporary, "statistics.npz").read_bytes()}


def _damage_statistics(rng: random.Random, files: Files) -> Damaged:
    (content,) = files.values()
    return {"statistics.npz": damage_npz(rng, content, rng.choice(Statistics._fields))}


def _read_statistics(folder: Path, names: frozenset[str]) -> None:
    statistics = load_statistics(StreamedDataset("folder", folder, [b""], [b""], ("a",)), folder)  # type: ignore
    assert statistics.mean.ndim == 3
    assert statistics.mean.shape[2] == 3
    assert statistics.lighting.shape == (3, 3)
    assert all(np.isfinite(array).all() and array.dtype == np.float32 for array in statistics[:3])


def _check_packed(folder: Path, names: frozenset[str]) -> None:
    report = check(folder)
    assert report.to_dict()
    assert report.to_text()
    _read_streamed(folder, frozenset())


_STREAMED = ("resnet_jax.data.decode", "resnet_jax.data.encoded", "resnet_jax.data.sources.image_folder")
_PACKED = ("resnet_jax.data.sources.packed", "resnet_jax.data.sources.shards", "resnet_jax.data.sources.names")
IMAGE_READERS = (
    Reader("image-folder", 2000, _STREAMED, _folder_files, _damage_image, _read_streamed),
    Reader("packed", 1200, _PACKED, _packed_files, _damage_packed, _check_packed),
    Reader("label-file", 800, ("resnet_jax.data.sources.label_file",), _label_files, _damage_labels, _read_labels),
    Reader(
        "statistics",
        400,
        ("resnet_jax.data.tools.statistics",),
        _statistics_files,
        _damage_statistics,
        _read_statistics,
    ),
)
