"""A reader of damaged files works, or refuses them in one line that names them: for every file that users have."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
import re
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, write, write_folder

from resnet_jax.config import Config, ModelConfig, from_json, to_json
from resnet_jax.convert.caffe import message_classes, read_caffemodel, read_mean
from resnet_jax.convert.files import read_tensors
from resnet_jax.data import load_dataset, load_test_images
from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.sources import cifar10
from resnet_jax.data.tools.pack import PackOptions, pack
from resnet_jax.data.tools.statistics import Statistics, load_statistics, save_statistics
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import CommandError, printable
from resnet_jax.models import abstract_variables, build_model
from resnet_jax.paper.analysis.responses import Responses, read_responses
from resnet_jax.run.checkpoint import Checkpoints, restore
from resnet_jax.run.network_file import Description, own_names, read_description, read_own, to_metadata
from resnet_jax.run.records import read_evaluations, read_records
from resnet_jax.run.saved import verify
from resnet_jax.run.workdir import create_workdir, load_config, load_inputs
from resnet_jax.steps import TrainState

Files = dict[str, bytes]  # by their paths below a folder


class Reader(NamedTuple):
    """make(folder) writes valid files, read(folder) reads them and asserts what must hold; `damage` matches names."""

    name: str
    make: Callable[[pathlib.Path], object]
    read: Callable[[pathlib.Path], object]
    damage: str = ".*"


# --- damage

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:e-?\d+)?")
IN_PLACE_OF_A_NUMBER = (
    b"0", b"-1", b"1.5", b"1e308", b"1e999", b"NaN", b"Infinity", b"2147483648", b"9" * 400, b"9" * 5000, b"null",
    b"true", b'"x"', b"[]", b"[0]", b"{}", b"[" * 5000 + b"]" * 5000, b'"\\ud800"', b'"\\u001b[31m"', b"\xff",
    b"\xc2\xb2",
)  # fmt: skip
INTEGERS = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
STARTS = (b"", b"\0" * 64, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"P6 ", b"PK\x03\x04", b"RGB8",
          b"\x93NUMPY\x01\0", b"\xef\xbb\xbf", b"{", b"ImageId,PredictionString\n")  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with one to three faults, as disks, copies and editors make them."""
    for _ in range(draw(st.integers(1, 3))):
        end = len(content)
        at = draw(st.integers(0, min(end, 64)) | st.integers(0, end))  # headers as often as all the rest
        match draw(
            st.sampled_from(["flip", "cut", "repeat", "insert", "delete", "integer", "number", "number", "other"])
        ):
            case "flip" if at < end:
                content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
            case "cut":
                content = content[:at]
            case "repeat":
                content = content[:at] + content[draw(st.integers(0, at)) :]
            case "insert":
                content = content[:at] + draw(st.binary(min_size=1, max_size=40)) + content[at:]
            case "delete":
                content = content[:at] + content[at + draw(st.integers(1, 300)) :]
            case "integer":
                form = draw(st.sampled_from(["<B", "<H", ">H", "<I", ">I", "<Q"]))
                number = draw(st.sampled_from(INTEGERS)) % 256 ** struct.calcsize(form)
                content = content[:at] + struct.pack(form, number) + content[at + struct.calcsize(form) :]
            case "number" if found := list(NUMBER.finditer(content)):
                number = draw(st.sampled_from(found))
                content = (
                    content[: number.start()] + draw(st.sampled_from(IN_PLACE_OF_A_NUMBER)) + content[number.end() :]
                )
            case _:
                content = draw(st.sampled_from(STARTS)) + draw(st.binary(max_size=100))
    return content


# --- the files of a run


def make_run(folder: pathlib.Path) -> None:
    mean = np.random.default_rng(0).random((8, 8, 3), np.float32)
    inputs = Inputs((8, 8, 3), ("ant", "bee"), Preprocessing(mean, np.ones(3, np.float32)), np.eye(3, dtype=np.float32))
    create_workdir(folder / "run", Config(), inputs)
    start = {"python": "3.11", "jax": "0.10", "platform": "cpu", "device": "x", "devices": 2, "compile_seconds": 1.5}
    numbers = {"loss": 1.5, "error": 50.0, "images": 1000}
    rates = {"learning_rate": 0.1, "gradient_norm": 2.0, "images_per_second": 100.0}
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "time": 1.7e9, **start}]
    records += [{"kind": "train", "step": step, "time": 1.7e9 + step, **numbers, **rates} for step in (10, 20, 30)]
    records.append({"kind": "test", "step": 30, "time": 1.7e9 + 32, **numbers, "top5_error": 1.0})
    found = {"protocol": "10crop", "data": "cifar10", "count": 3, "top1_error": 8.5, "top5_error": 0.5, "loss": 0.3}
    members = [{"workdir": "runs/x", "step": step, "scales": [37]} for step in (5, 6)]
    evaluations = [{"time": 1.7e9, **start, **found, "members": members}] * 2
    for name, lines in (("metrics.jsonl", records), ("evaluations.jsonl", evaluations)):
        (folder / "run" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    responses = Responses(5, 100, ("stem_conv", "fc"), (1.0, 0.5))
    (folder / "run" / "responses.json").write_text(json.dumps(dataclasses.asdict(responses)))


def read_config(folder: pathlib.Path) -> None:
    config = load_config(folder / "run")
    assert from_json(to_json(config), "again") == config


def read_inputs(folder: pathlib.Path) -> None:
    inputs = load_inputs(folder / "run")
    mean, std = inputs.preprocessing
    assert inputs.class_names
    assert mean.shape in ((3,), inputs.image_shape)
    assert std.shape == (3,)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in (mean, std))
    assert (std > 0).all()


def read_logs(folder: pathlib.Path) -> None:
    for record in read_records(folder / "run"):
        assert isinstance(record["step"], int)
        if record["kind"] != "start":  # which may hold anything
            assert all(np.isfinite(value) for value in record.values() if isinstance(value, float))


def read_results(folder: pathlib.Path) -> None:
    for record in read_evaluations(folder / "run"):
        assert 0 <= record["top1_error"] <= 100
        assert record["members"]
    responses = read_responses(folder / "run")
    assert responses is None or all(np.isfinite(std) and std >= 0 for std in responses.stds)


def saved_state() -> TrainState:
    return TrainState(jnp.int32(7), {"kernel": jnp.arange(6.0).reshape(2, 3)}, {}, {"trace": jnp.ones(3)})


def make_checkpoint(folder: pathlib.Path) -> None:
    checkpoints = Checkpoints(folder / "run")
    checkpoints.save(saved_state())
    checkpoints.close()


def read_checkpoint(folder: pathlib.Path) -> None:
    """One that is taken for intact holds what was saved."""
    if verify(folder / "run", 7) is None:
        state = saved_state()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(np.testing.assert_array_equal, restore(folder / "run", abstract), state)


# --- images


FORMATS = {"jpeg": "RGB", "png": "P", "gif": "P", "webp": "RGB", "bmp": "RGB", "tiff": "L", "ppm": "RGB"}


def make_images(folder: pathlib.Path) -> None:
    write(folder, {f"{name}.{name}": encoded(name, mode=mode, format=name) for name, mode in FORMATS.items()})
    write(folder, {"raw.raw": b"RGB8" + struct.pack("<II", 4, 5) + bytes(60)})


def read_images(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        image = decode(path.read_bytes())
        assert (image.dtype, image.shape[2:]) == (np.uint8, (3,))


def make_packed(folder: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as source:
        pack(write_folder(pathlib.Path(source, "in")), folder / "packed", PackOptions(), workers=0)


def read_packed(folder: pathlib.Path) -> None:
    dataset = load_dataset("folder", folder / "packed")
    for images in (dataset.train, dataset.test):
        for index in range(len(images)):  # type: ignore[arg-type]
            content, label = images.read(index)  # type: ignore[union-attr]
            assert 0 <= label < len(dataset.class_names)
            assert decode(content).dtype == np.uint8


def make_labels(folder: pathlib.Path) -> None:
    write(folder, {**{f"val/{i}.png": b"" for i in range(4)}, "train/ant/1.png": b"", "train/bee/1.png": b""})
    write(folder, {"val.txt": b"0.png ant\n1.png bee\n2.png ant\n3.png 1\n"})


def make_kaggle_labels(folder: pathlib.Path) -> None:
    make_labels(folder)
    (folder / "val.txt").unlink()
    write(folder, {"LOC_val_solution.csv": b"ImageId,PredictionString\n0,ant 1 2 3 4\n1,bee\n2,ant\n3,bee\n"})


def read_labels(folder: pathlib.Path) -> None:
    images = load_test_images("folder", folder)
    assert len(images) == len(images.ids) == 4
    assert 0 <= images.labels.min() <= images.labels.max() < len(images.class_names)


def make_statistics(folder: pathlib.Path) -> None:
    write_folder(folder, train=1)
    mean = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    save_statistics(Statistics(mean, np.ones(3, np.float32), np.eye(3, dtype=np.float32), 3, 0), folder)


def read_statistics(folder: pathlib.Path) -> None:
    statistics = load_statistics(load_dataset("folder", folder), folder)  # type: ignore[arg-type]
    assert statistics.mean.shape[2:] == statistics.lighting.shape[1:] == (3,)


def make_cifar10(folder: pathlib.Path) -> None:
    records = np.random.default_rng(0).integers(0, 10, (2, 3073), np.uint8)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    write(folder, dict.fromkeys(names, records.tobytes()))


def read_cifar10(folder: pathlib.Path) -> None:
    dataset = load_dataset("cifar10", folder)
    labels = dataset.train.labels
    assert dataset.train.images.shape == (10, 32, 32, 3)  # type: ignore[union-attr]
    assert 0 <= labels.min() <= labels.max() < 10


# --- weights


def make_safetensors(folder: pathlib.Path) -> None:
    safetensors.numpy.save_file(
        {"conv1.weight": np.ones((2, 3), np.float32), "fc.bias": np.ones(2, np.float32)}, folder / "x.safetensors"
    )


def read_safetensors(folder: pathlib.Path) -> None:
    for array in read_tensors(folder / "x.safetensors").arrays.values():
        assert isinstance(array, np.ndarray)


def make_network_file(folder: pathlib.Path) -> None:
    preprocessing = Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32))
    config = Config(model=ModelConfig(depth=8))
    description = Description("resnet_jax", config, 5, Inputs((8, 8, 3), ("ant", "bee"), preprocessing))
    shapes = abstract_variables(build_model(config.model, 2), (8, 8, 3))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    safetensors.numpy.save_file(own_names(variables), folder / "x.safetensors", to_metadata(description))


def read_network_file(folder: pathlib.Path) -> None:
    """Its tensors fit the network that its metadata describe, whatever became of both."""
    file = folder / "x.safetensors"
    description = read_description(file)
    if description is None:
        return
    assert np.isfinite(description.inputs.preprocessing.mean).all()
    if description.names == "resnet_jax" and description.config.model.depth < 100:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read_own(file, description)))


def make_caffemodel(folder: pathlib.Path) -> None:
    net = message_classes()["NetParameter"]()

    def add(name: str, *blobs: np.ndarray) -> None:
        layer = net.layer.add(name=name.encode())
        for array in blobs:
            blob = layer.blobs.add(data=array.reshape(-1).tolist())
            blob.shape.dim.extend(array.shape)

    for name in (
        "conv1",
        *(f"{stage}a_branch{branch}" for stage in (2, 3, 4, 5) for branch in ("1", "2a", "2b", "2c")),
    ):
        stem = name == "conv1"
        add(name if stem else f"res{name}", np.ones((2, 3 if stem else 2, 1, 1)))
        add("bn_conv1" if stem else f"bn{name}", np.ones(2), np.ones(2), np.ones(1))
        add("scale_conv1" if stem else f"scale{name}", np.ones(2), np.ones(2))
    add("fc1000", np.ones((3, 2)), np.ones(3))
    (folder / "x.caffemodel").write_bytes(net.SerializeToString())


def read_caffe(folder: pathlib.Path) -> None:
    weights = read_caffemodel(folder / "x.caffemodel")
    assert all(array.dtype == np.float32 and array.size for array in weights.values())


def make_mean(folder: pathlib.Path) -> None:
    blob = message_classes()["BlobProto"](num=1, channels=3, height=4, width=5, data=[100.0] * 60)
    (folder / "x.binaryproto").write_bytes(blob.SerializeToString())


def read_mean_image(folder: pathlib.Path) -> None:
    mean = read_mean(folder / "x.binaryproto")
    assert (mean.dtype, mean.shape[2:]) == (np.float32, (3,))
    assert 0 <= mean.min() <= mean.max() <= 255


READERS = (
    Reader("config", make_run, read_config, r".*/config\.json"),
    Reader("inputs", make_run, read_inputs, r".*/(inputs\.json|preprocessing\.npz)"),
    Reader("records", make_run, read_logs, r".*/metrics\.jsonl"),
    Reader("results", make_run, read_results, r".*/(evaluations\.jsonl|responses\.json)"),
    Reader("checkpoint", make_checkpoint, read_checkpoint),
    Reader("image", make_images, read_images),
    Reader("packed", make_packed, read_packed),
    Reader("labels", make_labels, read_labels, r"val\.txt"),
    Reader("kaggle-labels", make_kaggle_labels, read_labels, r".*\.csv"),
    Reader("statistics", make_statistics, read_statistics, r"statistics\.npz"),
    Reader("cifar10", make_cifar10, read_cifar10),
    Reader("safetensors", make_safetensors, read_safetensors),
    Reader("network-file", make_network_file, read_network_file),
    Reader("caffemodel", make_caffemodel, read_caffe),
    Reader("mean-image", make_mean, read_mean_image),
)


@pytest.fixture(autouse=True, scope="module")
def limits() -> Iterator[None]:
    """Small files of CIFAR-10, and so little memory that a reader which believes a damaged size fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "RECORDS_PER_FILE", 2)
        yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@functools.cache
def valid_files(reader: Reader) -> Files:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        reader.make(folder)
        reader.read(folder)
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }


def read_or_refused(reader: Reader, files: Files) -> None:
    """Read files; they may be refused in one line that names them, or an image as broken, and nothing else."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            reader.read(write(pathlib.Path(temporary), files))
        except BrokenImageError:
            assert reader.name in ("image", "packed")
            return
        except CommandError as error:
            message = str(error)
        else:
            return
    assert temporary in message
    assert "\n" not in message
    assert len(printable(message)) < 3000


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # of Pillow, about metadata
def test_damaged_files_are_read_or_refused(reader: Reader, data: st.DataObject) -> None:
    files = valid_files(reader)
    name = data.draw(st.sampled_from([name for name in files if re.fullmatch(reader.damage, name)]))
    read_or_refused(reader, {**files, name: data.draw(damaged(files[name]))})


ARRAYS = st.sampled_from(
    [
        np.float32(1).reshape(()), np.zeros((0, 3), np.float32), np.ones(3), np.full(3, np.nan, np.float32),
        np.full((3, 3), np.inf, np.float32), np.zeros(3, np.float32), np.ones((3, 3), np.float16), np.ones(3, "S3"),
        np.ones(3, "U2"), np.ones(3, bool), np.ones((3, 3), np.complex64), np.array("2020", "M8[D]"), np.int64(-1),
        np.int64(2**62), np.ones(3, ">f4"), np.array([{"a": 1}], object), np.ones((4, 4, 3), np.float32),
    ]
)  # fmt: skip


@pytest.mark.parametrize("name", ["run/preprocessing.npz", "statistics.npz"])
@given(data=st.data())
def test_other_arrays_are_read_or_refused(name: str, data: st.DataObject) -> None:
    """In an archive that is whole: of another type or shape, not finite, missing."""
    reader = next(reader for reader in READERS if reader.name == ("inputs" if "run" in name else "statistics"))
    files = valid_files(reader)
    with np.load(io.BytesIO(files[name])) as loaded:
        arrays: dict[str, Any] = dict(loaded)
    field = data.draw(st.sampled_from(sorted(arrays)))
    if data.draw(st.booleans()) and data.draw(st.booleans()):
        del arrays[field]
    else:
        arrays[field] = data.draw(ARRAYS)
    file = io.BytesIO()
    np.savez(file, **arrays)
    read_or_refused(reader, {**files, name: file.getvalue()})


@given(
    st.binary(max_size=300),
    st.sampled_from(["png", "jpeg", "gif", "tiff"]),
    st.sampled_from([2**14, 2**16 - 1, 2**31 - 1]),
)
@settings(max_examples=20)
@pytest.mark.filterwarnings("ignore")
def test_an_image_that_claims_to_be_huge_is_broken(tail: bytes, name: str, side: int) -> None:
    """Before its pixels are asked for."""
    heads = {
        "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", side, side) + b"\x08\x02\0\0\0",
        "jpeg": b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", side % 2**16, side % 2**16) + b"\x03",
        "gif": b"GIF89a" + struct.pack("<HH", side % 2**16, side % 2**16) + b"\x80\0\0",
        "tiff": b"II*\0\x08\0\0\0",
    }
    with pytest.raises(BrokenImageError):
        decode(heads[name] + tail)


def test_the_properties_notice_a_reader_that_raises_anything_else() -> None:
    def broken(folder: pathlib.Path) -> None:
        json.loads((folder / "x.json").read_text())

    reader = Reader("broken", lambda folder: write(folder, {"x.json": b'{"a": 1}'}), broken)
    with pytest.raises(ValueError, match="JSON|Expecting|codec"):
        given(st.data())(lambda data: read_or_refused(reader, {"x.json": data.draw(damaged(b'{"a": 1}'))}))()
