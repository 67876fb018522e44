"""Packing: what is stored, that it is read as from the folder, going on after a kill, and every kind of damage."""

from __future__ import annotations

import concurrent.futures
import fcntl
import io
import json
import os
import pathlib
import pickle
import re
import resource
from collections.abc import Callable

import numpy as np
import pytest
from image_files import CLASSES, encoded, write, write_folder
from PIL import Image

from resnet_jax.cli.commands import main
from resnet_jax.data import StreamedDataset, load_dataset, load_test_images
from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.sources.image_folder import load_image_folder
from resnet_jax.data.sources.packed import load_packed
from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.data.tools import pack as pack_module
from resnet_jax.data.tools.pack import pack
from resnet_jax.data.tools.reencode import PackOptions, reencode
from resnet_jax.data.types import EncodedImages
from resnet_jax.data.views import resize
from resnet_jax.errors import UserError


def contents(images: EncodedImages) -> list[tuple[str, tuple[bytes, int]]]:
    return [(images.id(index), images.read(index)) for index in range(len(images))]


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is stored


@pytest.mark.parametrize(
    "content",
    [
        encoded("a", 60, 40),
        encoded("b", 100, 32),
        encoded("c", 8, 8),
        encoded("d", 32, 32) + b"behind the end",
    ],
)
def test_a_small_jpeg_is_kept(content: bytes) -> None:
    assert reencode(content, PackOptions(short_side=40)) == content


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (encoded("large", 70, 50), (56, 40)),
        (encoded("tall", 50, 71), (40, 56)),
        (encoded("png", 60, 40, format="PNG"), (60, 40)),
        (encoded("grey", 60, 40, "L"), (60, 40)),
        (encoded("cmyk", 60, 40, "CMYK"), (60, 40)),
        (encoded("palette", 20, 10, "P", "GIF"), (20, 10)),
        (encoded("large grey", 100, 80, "L", "PNG"), (50, 40)),
    ],
)
def test_others_are_converted(content: bytes, size: tuple[int, int]) -> None:
    expected = decode(content)
    if min(expected.shape[:2]) > 40:
        expected = resize(expected, 40)
    assert expected.shape == (size[1], size[0], 3)
    np.testing.assert_array_equal(decode(reencode(content, PackOptions(40, "raw"))), expected)
    for quality in (30, 95):
        packed = reencode(content, PackOptions(40, "jpeg", quality))
        image = Image.open(io.BytesIO(packed))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
        file = io.BytesIO()
        Image.fromarray(expected).save(file, "JPEG", quality=quality)
        assert packed == file.getvalue()


def test_raw_is_never_a_jpeg() -> None:
    content = encoded("a", 60, 40)
    packed = reencode(content, PackOptions(40, "raw"))
    assert len(packed) == 12 + 60 * 40 * 3
    np.testing.assert_array_equal(decode(packed), decode(content))


@pytest.mark.parametrize("content", [b"", b"no image", encoded("a", 60, 40)[:-200], encoded("b", 64, 64)[:300]])
def test_broken_images_are_not_packed(content: bytes) -> None:
    for how in ("jpeg", "raw"):
        with pytest.raises(BrokenImageError):
            reencode(content, PackOptions(short_side=480, format=how))


# --- read as from the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of 12 + 3 readable images, and two that are not."""
    root = write_folder(tmp_path_factory.mktemp("folder"), train=4)
    write(
        root / "train",
        {"bee/0.jpeg": b"", "cow/2.jpeg": encoded("cut", 50, 50)[:-100], "ant/1.jpeg": encoded("w", 90, 70)},
    )
    write(root / "train", {"ant/4.png": encoded("png", format="PNG"), "cow/3.jpeg": encoded("c", mode="CMYK")})
    return root


@pytest.fixture(scope="module")
def packed(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("packed") / "new" / "folder"
    pack(folder, out, PackOptions(short_side=40), shard_images=5)
    return out


@pytest.fixture
def copy(packed: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to damage."""
    return write(tmp_path / "copy", files(packed))


def test_reads_what_the_folder_holds(folder: pathlib.Path, packed: pathlib.Path) -> None:
    source, dataset = load_image_folder("imagenet", folder), load_dataset("imagenet", packed)
    assert isinstance(dataset, StreamedDataset)
    assert (dataset.name, dataset.folder, dataset.class_names) == ("imagenet", packed, CLASSES)
    for images, of in ((dataset.train, source.train), (dataset.test, source.test)):
        expected = [
            (id, (reencode(content, PackOptions(40)), label))
            for id, (content, label) in contents(of)
            if images is dataset.test or id not in ("bee/0.jpeg", "cow/2.jpeg")
        ]
        assert contents(images) == expected
        assert images.labels.tolist() == [label for _, (_, label) in expected]
        assert images.labels.dtype == np.int32
    assert sum(read in contents(source.train) for read in contents(dataset.train)) == 8  # byte for byte
    test = load_test_images("folder", packed)
    assert (test.ids, test.labels.tolist()) == (("ant/0.jpeg", "bee/0.jpeg", "cow/0.jpeg"), [0, 1, 2])
    np.testing.assert_array_equal(test.images[1], decode(encoded("val/bee/0.jpeg")))
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["options"] == {"short_side": 40, "format": "jpeg", "quality": 95}
    assert [shard["images"] for shard in manifest["splits"]["train"]["shards"]] == [5, 4, 2]
    assert [id for id, _ in manifest["splits"]["train"]["skipped"]] == ["bee/0.jpeg", "cow/2.jpeg"]
    assert manifest["splits"]["train"]["skipped"][0][1] == "the file is empty"
    assert set(files(packed)) == {
        "manifest.json", "train.index.npz", "val.index.npz", "val-00000-of-00001.array_record",
        *(f"train-0000{i}-of-00003.array_record" for i in range(3)),
    }  # fmt: skip


def test_other_processes_and_threads(packed: pathlib.Path) -> None:
    train = load_packed("folder", packed).train
    expected = contents(train)
    copy = pickle.loads(pickle.dumps(train))  # readers and locks cannot be pickled
    for images in (copy, pickle.loads(pickle.dumps(copy))):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            read = list(pool.map(images.read, list(range(len(expected))) * 50))
        assert read == [content for _, content in expected] * 50


def test_a_shard_without_images(tmp_path: pathlib.Path) -> None:
    """All images of the second shard are broken."""
    root = write_folder(tmp_path / "in")
    write(root / "train", {"bee/0.jpeg": b"", "bee/1.jpeg": b""})
    manifest, _ = pack(root, tmp_path / "out", PackOptions(), shard_images=2)
    assert [shard.images for shard in manifest.splits["train"].shards] == [2, 0, 2]
    train = load_packed("folder", tmp_path / "out").train
    assert [train.read(index) for index in range(4)] == [
        (encoded(f"train/{name}/{i}.jpeg"), label) for label, name in ((0, "ant"), (2, "cow")) for i in (0, 1)
    ]


# --- going on


def test_size_of_shards() -> None:
    for images, count, largest in ((1, 1, 1), (1024, 1, 1024), (50_000, 49, 1024), (1_281_167, 256, 5005)):
        tasks = pack_module._divide("train", images, None)
        assert [len(tasks), max(task.stop - task.start for task in tasks)] == [count, largest]
        assert [task.start for task in tasks[1:]] == [task.stop for task in tasks[:-1]]
        assert (tasks[0].start, tasks[-1].stop) == (0, images)


@pytest.mark.parametrize("after", range(0, 15, 3))
def test_interrupted(
    folder: pathlib.Path, packed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls = 0

    def interrupted(content: bytes, options: PackOptions) -> bytes:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return reencode(content, options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "reencode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, out, PackOptions(40), shard_images=5)
    shards = sorted(out.glob("*.array_record"))
    assert len(shards) == after // 5
    if after == 9:
        shards[0].write_bytes(shards[0].read_bytes()[:-1])  # cut short: it is written again
    if after == 12:
        (out / f"{shards[1].name}.json").write_text('{"bytes":')  # as a disk that was full leaves it
    pack(folder, out, PackOptions(40), shard_images=5)
    assert files(out) == files(packed)


def test_killed_before_the_end(folder: pathlib.Path, copy: pathlib.Path, packed: pathlib.Path) -> None:
    """The manifest is there, but what describes the shards is not deleted yet."""
    (copy / "plan.json").write_text("{}")
    (copy / "val-00000-of-00001.array_record.json").write_text("{}")
    _, complete = pack(folder, copy, PackOptions(40), shard_images=5)
    assert complete
    assert files(copy) == files(packed)


def test_packings_of_the_version_before(folder: pathlib.Path, copy: pathlib.Path, packed: pathlib.Path) -> None:
    """It wrote a CRC-32 of each image, too: beside the shards of a part, and into the index."""
    manifest = json.loads((copy / "manifest.json").read_text())
    index = dict(np.load(copy / "train.index.npz"))
    np.savez(copy / "train.index.npz", **index, crc32=np.zeros(11, np.uint32))
    manifest["splits"]["train"]["index_sha256"] = sha256_of(copy / "train.index.npz")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert contents(load_packed("folder", copy).train) == contents(load_packed("folder", packed).train)

    (copy / "manifest.json").unlink()
    sources = {"options": manifest["options"], "source": manifest["source"], "shards": [5, 10, 13, 3]}
    (copy / "plan.json").write_text(json.dumps(sources))
    first = manifest["splits"]["train"]["shards"][0]
    described = {"bytes": first["bytes"], "sha256": first["sha256"], "crc32": [0] * 5, "skipped": []}
    (copy / f"{first['file']}.json").write_text(json.dumps(described))
    written = (copy / first["file"]).stat().st_mtime_ns
    pack(folder, copy, PackOptions(40), shard_images=5)
    assert (copy / first["file"]).stat().st_mtime_ns == written
    assert files(copy) == files(packed)


# --- what cannot be packed


def test_not_the_same_packing(folder: pathlib.Path, copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def packing(source: pathlib.Path, out: pathlib.Path, options: PackOptions, message: str, shards: int = 5) -> None:
        before = files(out)
        with pytest.raises(UserError, match=message):
            pack(source, out, options, shard_images=shards)
        assert files(out) == before

    other = write_folder(tmp_path / "other")
    packing(folder, copy, PackOptions(41), f"{copy} holds a packing with other options: choose another")
    packing(other, copy, PackOptions(40), f"{copy} holds a packing of other images")
    packing(copy, copy, PackOptions(40), f"{copy} is packed already")
    packing(
        folder, write(tmp_path / "x", {"a": b"b"}), PackOptions(), "x holds other files: choose a folder that is empty"
    )
    begun = write(tmp_path / "y", {"plan.json": b"{"})
    packing(folder, begun, PackOptions(40), "cannot read .*/y/plan.json")
    write(begun, {"plan.json.new": b"{"})
    (begun / "plan.json").unlink()  # killed while it was written
    pack(folder, begun, PackOptions(40), shard_images=5)
    (begun / "manifest.json").unlink()
    plan = {"options": {"short_side": 40, "format": "jpeg", "quality": 95}, "source": {}, "shards": [5, 10, 13, 3]}
    write(begun, {"plan.json": json.dumps(plan).encode()})
    packing(folder, begun, PackOptions(40), f"{begun} holds a packing of other images")
    plan["source"] = json.loads((copy / "manifest.json").read_text())["source"]
    write(begun, {"plan.json": json.dumps(plan).encode()})
    packing(folder, begun, PackOptions(40), f"{begun} holds a packing in other shards", shards=6)
    pack(folder, begun, PackOptions(40), shard_images=5)
    assert files(begun) == files(copy)


def test_only_one_at_a_time(folder: pathlib.Path, copy: pathlib.Path) -> None:
    other = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"{copy}: another run is packing into this folder"):
            pack(folder, copy, PackOptions(40))
    finally:
        os.close(other)


def test_nothing_can_be_read(tmp_path: pathlib.Path) -> None:
    root = write_folder(tmp_path / "in")
    write(root, {f"val/{name}/0.jpeg": b"" for name in CLASSES})
    with pytest.raises(UserError, match=r"none of the 3 images in .*/in/val can be read: the file is empty"):
        pack(root, tmp_path / "out", PackOptions())
    assert not (tmp_path / "out/manifest.json").exists()


def test_disk_full(tmp_path: pathlib.Path) -> None:
    """A limit on the size of files stands in for the end of the disk."""
    root = write_folder(tmp_path / "in")
    random = np.random.RandomState(0).randint(0, 256, (256, 256, 3)).astype(np.uint8)
    Image.fromarray(random).save(root / "train/bee/0.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    shard = tmp_path / "out/train-00000-of-00001.array_record"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # Python ignores the signal, so it is an error
        with pytest.raises(UserError, match=f"^cannot write {shard}: File too large$"):
            pack(root, tmp_path / "out", PackOptions(format="raw"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert shard.name not in files(tmp_path / "out")
    assert "manifest.json" not in files(tmp_path / "out")
    _, complete = pack(root, tmp_path / "out", PackOptions(format="raw"))
    assert not complete
    assert len(load_packed("folder", tmp_path / "out").train) == 7


def test_no_folder_can_be_made(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder .*/file/out: Not a directory"):
        pack(folder, tmp_path / "file" / "out", PackOptions())


# --- damage

SHARD = "train-00001-of-00003.array_record"


def edit(change: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    def damage(folder: pathlib.Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return damage


def unpickle(folder: pathlib.Path) -> None:
    """Write an index that holds an object, and its checksum into the manifest."""
    with np.load(folder / "train.index.npz") as index:
        changed = {**index, "blob": np.array([{}], object)}
    np.savez(folder / "train.index.npz", **changed)
    checksum = sha256_of(folder / "train.index.npz")
    edit(lambda content: content["splits"]["train"].update(index_sha256=checksum))(folder)


def overwrite(name: str, content: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], object]:
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overwrite("manifest.json", lambda _: b"{"), r"{dir}/manifest.json: not a manifest of packed images"),
        (overwrite("manifest.json", lambda _: b"\xff"), r"{dir}/manifest.json: not a manifest of packed images"),
        (edit(lambda m: m.update(format="tar")), r"manifest.json: not a manifest .*format .*'resnet_jax packed"),
        (edit(lambda m: m.pop("class_names")), r"{dir}/manifest.json: not a manifest .*class_names"),
        (edit(lambda m: m["splits"].pop("val")), r"{dir}/manifest.json: not a manifest .*splits"),
        (edit(lambda m: m.update(class_names="ant")), r"{dir}/manifest.json: not a manifest .*class_names"),
        (edit(lambda m: m.update(class_names=["ant"])), r"{dir}/train.index.npz: labels outside the 1 classes"),
        (lambda folder: (folder / SHARD).unlink(), rf"{{dir}}/{SHARD}: unreadable shard \(No such file"),
        (overwrite(SHARD, lambda old: old[:-1]), rf"{{dir}}/{SHARD}: unreadable shard \(0 of 4 images are found"),
        (overwrite(SHARD, lambda old: bytes(len(old))), rf"{{dir}}/{SHARD}: unreadable shard \(0 of 4 images"),
        (lambda folder: (folder / "val.index.npz").unlink(), r"cannot read {dir}/val.index.npz: No such file"),
        (overwrite("val.index.npz", lambda old: old[:-1]), r"{dir}/val.index.npz: its SHA-256 is not that of manifest"),
        (unpickle, r"cannot read {dir}/train.index.npz: damaged, .*allow_pickle=False"),
    ],
)  # fmt: skip
def test_damaged(copy: pathlib.Path, damage: Callable[[pathlib.Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message.format(dir=copy)) as caught:
        load_dataset("imagenet", copy)
    assert "\n" not in str(caught.value)


def test_a_damaged_image(copy: pathlib.Path) -> None:
    """A look at the files does not find it; reading does, and the others are read."""
    expected = contents(load_packed("folder", copy).train)
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    content[content.index(expected[6][1][0]) + 30] ^= 1  # the second image of the second shard
    path.write_bytes(content)
    train = load_packed("folder", copy).train
    with pytest.raises(BrokenImageError, match="^Corrupted Riegeli/records file: chunk data hash mismatch") as caught:
        train.read(6)
    assert len(str(caught.value)) < 200
    assert [train.read(index) for index in (0, 5, 7, 10)] == [expected[index][1] for index in (0, 5, 7, 10)]


def test_a_shard_that_goes_away(copy: pathlib.Path) -> None:
    train = load_packed("folder", copy).train
    (copy / SHARD).unlink()
    for _ in range(2):
        with pytest.raises(BrokenImageError, match=rf"{SHARD}: unreadable shard \(No such file or directory\)"):
            train.read(5)


# --- the command


def test_command(
    folder: pathlib.Path, tmp_path: pathlib.Path, packed: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "pack", str(folder), str(tmp_path / "out"), "--short-side", "40", "--workers", "1"]
    for last in (f"packed {folder} into {tmp_path}/out", f"{tmp_path}/out was packed already"):
        assert main(arguments) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        lines = printed.out.splitlines()
        assert lines[0] == "left out train/bee/0.jpeg: the file is empty"
        assert re.match("left out train/cow/2.jpeg: image file is truncated", lines[1])
        assert lines[2:] == ["train: 11 images, 0.1 MB in 1 shard", "val: 3 images, 0.1 MB in 1 shard", last]
    assert contents(load_packed("x", tmp_path / "out").train) == contents(load_packed("x", packed).train)
    with pytest.raises(UserError, match="with other options"):
        main([*arguments, "--quality", "94"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--short-side", "31", "--short-side must be at least 32; got 31"),
        ("--quality", "0", "--quality must be between 1 and 100; got 0"),
        ("--quality", "101", "--quality must be between 1 and 100; got 101"),
        ("--workers", "0", "--workers must be at least 1; got 0"),
        ("--format", "png", "invalid choice: 'png'"),
    ],
)
def test_wrong_options(folder: pathlib.Path, tmp_path: pathlib.Path, option: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["data", "pack", str(folder), str(tmp_path / "out"), option, value])
    assert not (tmp_path / "out").exists()
