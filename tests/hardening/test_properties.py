"""Properties of the readers: what was written is read back, and any bytes are either read or refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
import struct
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from resnet_jax import files
from resnet_jax.config import Config, ModelConfig, check_config, difference, from_json, to_json
from resnet_jax.convert.caffe import read_caffemodel, read_mean
from resnet_jax.convert.files import read_tensors, write_safetensors
from resnet_jax.data import load_dataset
from resnet_jax.data.decode import BrokenImageError, decode, encode_raw
from resnet_jax.data.sources import cifar10
from resnet_jax.data.sources.label_file import read_labels
from resnet_jax.data.sources.packed import load_packed
from resnet_jax.data.tools.pack import pack
from resnet_jax.data.tools.reencode import PackOptions, reencode
from resnet_jax.errors import UserError
from resnet_jax.evaluate import read_evaluations
from resnet_jax.run.records import read_records
from resnet_jax.run.workdir import load_config, load_inputs, read_source

# The same cases in every run, and no clock: how fast the machine is does not matter.
settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)
PROFILE = settings.get_profile("tests")


@pytest.fixture(autouse=True, scope="module")
def profile() -> Iterator[None]:
    """Use the profile in this module only."""
    before = settings.get_current_profile_name()
    settings.load_profile("tests")
    yield
    settings.load_profile(before)


@pytest.fixture(autouse=True)
def small_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", 2)
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:1/no-downloads")


def folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder: pytest's tmp_path is the same one for all examples of a test."""
    return tempfile.TemporaryDirectory(prefix="properties-")


def read_or_refused(read: Callable[..., Any], *args: Any, named: object) -> Any:
    """Return what read(*args) returns; None where it refuses it in a line that names `named`."""
    try:
        return read(*args)
    except UserError as error:
        message = str(error)
    assert str(named) in message
    assert "\n" not in message
    return None


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/\n\r\t "), min_size=1, max_size=20)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type of a configuration's field."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        inner = [argument for argument in get_args(hint) if argument is not ...]
        if len(inner) < len(get_args(hint)):
            return st.lists(values(inner[0]), max_size=5).map(tuple)
        return st.tuples(*map(values, inner))
    if args := [argument for argument in get_args(hint) if argument is not type(None)]:
        return st.none() | values(args[0])
    return {
        int: st.integers(0, 2**33),
        float: st.floats(0, 1.2) | st.floats(),
        bool: st.booleans(),
        str: st.text(max_size=20),
    }[hint]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A configuration with a few fields that are not the usual ones."""
    config = Config()
    for group in dataclasses.fields(Config):
        part = getattr(config, group.name)
        hints = get_type_hints(type(part))
        names = draw(st.lists(st.sampled_from(sorted(hints)), max_size=2, unique=True))
        part = dataclasses.replace(part, **{name: draw(values(hints[name])) for name in names})
        config = dataclasses.replace(config, **{group.name: part})
    return config


@given(configs())
@settings(PROFILE, max_examples=80)
def test_a_configuration_is_read_back_or_was_never_one(config: Config) -> None:
    try:
        check_config(config)
    except UserError:
        with pytest.raises(UserError, match="^here is not a configuration"):
            from_json(to_json(config), "here")
        return
    read = from_json(to_json(config), "here")
    assert read == config
    assert difference(read, config) is None
    assert to_json(read) == to_json(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.sampled_from([field.name for field in dataclasses.fields(ModelConfig)]),
    JSON,
    st.sampled_from([None, "model", "data", "run"]),
)
@settings(PROFILE, max_examples=80)
def test_any_json_is_a_configuration_or_refused(name: str, value: Any, group: str | None) -> None:
    document: Any = json.loads(to_json(Config()))
    if group is None:
        document = value
    elif group == "model":
        document["model"][name] = value
    else:
        document[group] = value
    config = read_or_refused(from_json, json.dumps(document), "here", named="here is not a configuration")
    if config is not None:
        check_config(config)


RECORD = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["train", "test", "validation"]),
        "step": st.integers(0, 64_000),
        "time": st.floats(0, 2e9),
        "loss": st.floats(0, 1e6),
        "error": st.floats(0, 100),
        "images": st.integers(0, 10**9),
        "learning_rate": st.floats(0, 10),
        "images_per_second": st.floats(0, 1e6),
    }
)


@given(st.lists(RECORD, max_size=6), st.data())
def test_records_before_any_cut_are_all_there_in_order(records: list[dict[str, Any]], data: st.DataObject) -> None:
    lines = [(json.dumps(record) + "\n").encode() for record in records]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    tail = data.draw(st.sampled_from([b"", b"\0" * 100, b"\xff\xfe", b"\n{", b"[" * 5000, b"\n" + b"9" * 5000]))
    whole = 0
    while whole < len(lines) and sum(map(len, lines[: whole + 1])) - 1 <= cut:  # its newline may be missing
        whole += 1
    partial = content[:cut]
    if tail and partial and not partial.endswith(b"\n"):
        partial = partial[: partial.rfind(b"\n") + 1]
        whole = partial.count(b"\n")
    with folder() as temporary:
        (pathlib.Path(temporary) / "metrics.jsonl").write_bytes(partial + tail)
        assert read_records(pathlib.Path(temporary)) == records[:whole]


@given(st.lists(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), max_size=6))
def test_any_lines_are_records_or_left_out(lines: list[bytes]) -> None:
    with folder() as temporary:
        path = pathlib.Path(temporary)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            (path / name).write_bytes(b"\n".join(lines))
        assert all(isinstance(record, dict) for record in files.read_records(path / "metrics.jsonl"))
        assert all(math.isfinite(record["step"]) for record in read_records(path))
        assert all(record["members"] for record in read_evaluations(path))


ARRAYS = st.tuples(
    st.sampled_from(["<f4", "<f8", "<i4", "<i8", "|u1", ">i2"]), st.lists(st.integers(0, 4), max_size=3)
).map(lambda drawn: np.arange(math.prod(drawn[1])).astype(drawn[0]).reshape(drawn[1]))


@given(st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_arrays_are_read_back(arrays: dict[str, np.ndarray]) -> None:
    assume("file" not in arrays and not any(name.endswith(".npy") for name in arrays))
    with folder() as temporary:
        path = pathlib.Path(temporary, "x.npz")
        np.savez(path, **arrays)  # type: ignore[arg-type]
        found = files.read_arrays(path)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].shape == array.shape
        fortran = {name: np.asfortranarray(array) for name, array in arrays.items()}
        np.savez(path, **fortran)  # type: ignore[arg-type]
        for name, array in files.read_arrays(path).items():
            np.testing.assert_array_equal(array, arrays[name])


TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__" and not name.startswith("module.")), ARRAYS, max_size=4
)


@given(TENSORS)
def test_safetensors_are_read_back(tensors: dict[str, np.ndarray]) -> None:
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    with folder() as temporary:
        path = pathlib.Path(temporary, "x.safetensors")
        write_safetensors(tensors, path)
        read = read_tensors(path)
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)


@given(st.dictionaries(NAMES, st.sampled_from(["ant", "bee", "cow"]), min_size=1, max_size=6), st.booleans())
def test_label_files_are_read_back(labels: dict[str, str], tabs: bool) -> None:
    classes = ("ant", "bee", "cow")
    lines = [f"{name}.png{chr(9) if tabs else ' '}{label}\n" for name, label in labels.items()]
    names = [f"{name}.png" for name in labels]
    assume(not any(name != name.strip() or name.startswith(("val/", "\ufeff")) for name in names))
    assume(all(len(line.splitlines()) == 1 for line in lines))
    with folder() as temporary:
        path = pathlib.Path(temporary, "val.txt")
        path.write_text("".join(lines), encoding="utf-8")
        numbers, found = read_labels(path, path.parent, names, classes)
    assert [found[number] for number in numbers] == list(labels.values())


@given(st.binary(max_size=60) | st.text("0123456789 apngt.\t\n,", max_size=60).map(str.encode), st.booleans())
def test_any_label_file_is_read_or_refused(content: bytes, kaggle: bool) -> None:
    with folder() as temporary:
        path = pathlib.Path(temporary, "LOC_val_solution.csv" if kaggle else "val.txt")
        path.write_bytes(b"ImageId,PredictionString\n" + content if kaggle else content)
        for classes in (("ant", "bee"), None):
            found = read_or_refused(read_labels, path, path.parent, ["a.png", "1.png"], classes, named=path)
            if found is not None:
                labels, names = found
                assert 0 <= min(labels) <= max(labels) < len(names)


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 255)), min_size=12, max_size=12))
def test_cifar10_records_are_read_back_or_refused(records: list[tuple[int, int]]) -> None:
    """Six files of two records: a label and a value of all pixels."""
    with folder() as temporary:
        names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
        for name, (first, second) in zip(names, zip(records[::2], records[1::2], strict=True), strict=True):
            content = b"".join(bytes([label]) + bytes([value]) * 3072 for label, value in (first, second))
            pathlib.Path(temporary, name).write_bytes(content)
        if any(label > 9 for label, _ in records):
            with pytest.raises(UserError, match="is outside 0..9"):
                load_dataset("cifar10", temporary)
            return
        dataset = load_dataset("cifar10", temporary)
    found = np.concatenate([dataset.train.labels, dataset.test.labels])  # type: ignore[union-attr]
    assert found.tolist() == [label for label, _ in records]
    assert dataset.train.images[:, 31, 5, 2].tolist() == [value for _, value in records[:10]]  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 255)), min_size=1, max_size=5))
@settings(PROFILE, max_examples=15)
def test_packed_images_are_read_back(sizes: list[tuple[int, int, int]]) -> None:
    from PIL import Image

    expected = []
    with folder() as temporary:
        source, out = pathlib.Path(temporary, "in"), pathlib.Path(temporary, "out")
        for split in ("train", "val"):
            (source / split / "ant").mkdir(parents=True)
            for number, (height, width, value) in enumerate(sizes):
                file = io.BytesIO()
                Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
                (source / split / "ant" / f"{number}.png").write_bytes(file.getvalue())
                expected.append(file.getvalue())
        pack(source, out, PackOptions(format="raw"), shard_images=2)
        images = load_packed("folder", out).train
        assert len(images) == len(sizes)
        for number, (height, width, value) in enumerate(sizes):
            content, label = images.read(number)
            assert (content, label) == (reencode(expected[number], PackOptions(format="raw")), 0)
            np.testing.assert_array_equal(decode(content), np.full((height, width, 3), value, np.uint8))


@given(st.integers(0, 5), st.integers(0, 5), st.binary(max_size=80))
def test_raw_images_are_decoded_or_broken(height: int, width: int, content: bytes) -> None:
    data = b"RGB8" + struct.pack("<II", height, width) + content
    try:
        image = decode(data)
    except BrokenImageError:
        assert len(content) < 3 * height * width or 0 in (height, width)
    else:
        assert image.shape == (height, width, 3)
        assert encode_raw(image) == data[: 12 + 3 * height * width]


STARTS = st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"P6 "])


@given(st.binary(max_size=300), STARTS)
@settings(PROFILE, max_examples=150)
@pytest.mark.filterwarnings("ignore")  # of Pillow, about metadata
def test_any_bytes_are_an_image_or_broken(content: bytes, start: bytes) -> None:
    try:
        image = decode(start + content)
    except BrokenImageError:
        return
    assert image.ndim == 3


@given(st.binary(max_size=100), st.sampled_from(["x.safetensors", "x.caffemodel", "x.binaryproto"]))
def test_any_bytes_are_weights_or_refused(content: bytes, name: str) -> None:
    read: Any = {"x.caffemodel": read_caffemodel, "x.binaryproto": read_mean}.get(name, read_tensors)
    with folder() as temporary:
        path = pathlib.Path(temporary, name)
        for written in (content, struct.pack("<Q", len(content)) + content):
            path.write_bytes(written)
            assert isinstance(read_or_refused(read, path, named=path), dict | np.ndarray | None)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_work_directory_or_refused(content: bytes) -> None:
    with folder() as temporary:
        path = pathlib.Path(temporary)
        for name in ("config.json", "inputs.json", "preprocessing.npz", "import.json"):
            (path / name).write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            load_inputs(path)
        for read in (load_config, read_source):
            read_or_refused(read, path, named=path)
