"""Records, JSON and arrays of a work directory that a crash, a bad disk or somebody else has damaged."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from resnet_jax import files
from resnet_jax.config import Config
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.paper.analysis.responses import read_responses
from resnet_jax.run.records import read_evaluations, read_records, with_fields
from resnet_jax.run.workdir import create_workdir, load_config, load_inputs, read_source

GOOD: dict[str, Any] = {
    "kind": "train", "step": 10, "time": 1.7e9, "loss": 1.5, "error": 50.0, "images": 1280, "learning_rate": 0.1,
    "gradient_norm": 2.0, "images_per_second": 100.0,
}  # fmt: skip
NUMBERS = [None, "1", [], {}, True, float("nan"), float("inf"), 10**400]


def write(folder: pathlib.Path, *lines: object, name: str = "metrics.jsonl") -> None:
    content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / name).write_bytes(b"\n".join(content))


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b'{"kind": "train"', bytes(4096), b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b"1", b"null",
        b"[]",         b"9" * 5000, b'"text"', json.dumps(GOOD).encode("utf-16"), json.dumps(GOOD).encode() * 2,
    ],
)  # fmt: skip
def test_lines_that_are_no_records_are_left_out(tmp_path: pathlib.Path, line: bytes) -> None:
    write(tmp_path, GOOD, line, GOOD | {"step": 20})
    assert read_records(tmp_path) == [GOOD, GOOD | {"step": 20}]
    assert files.read_json_lines(tmp_path / "metrics.jsonl") == read_records(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("step", "time", "loss", "error", "images", "learning_rate") for value in NUMBERS),
        {"kind": "other"}, {"kind": []}, {"step": -1}, {"step": 2**31}, {"step": 1.5}, {"time": -1},
        {"time": 1e300}, {"error": 101}, {"error": -1}, {"loss": -1}, {"loss": 1e31}, {"images": 1.5},
        {"top5_error": 200.0},
    ],
)  # fmt: skip
def test_records_that_no_reader_could_use_are_left_out(tmp_path: pathlib.Path, change: dict[str, Any]) -> None:
    write(tmp_path, GOOD | change, GOOD)
    assert read_records(tmp_path) == [GOOD]


def test_further_fields_are_kept(tmp_path: pathlib.Path) -> None:
    write(tmp_path, GOOD | {"later": ["anything"]}, {"kind": "start", "step": 0, "jax": "0.10"})
    assert [record.get("later", record["kind"]) for record in read_records(tmp_path)] == [["anything"], "start"]


@pytest.mark.parametrize("name", ["kind", "step"])
def test_records_without_kind_or_step_are_left_out(tmp_path: pathlib.Path, name: str) -> None:
    write(tmp_path, {key: value for key, value in GOOD.items() if key != name}, GOOD)
    assert read_records(tmp_path) == [GOOD]


def test_readers_take_the_records_that_have_what_they_need() -> None:
    records = [GOOD, {"kind": "train", "step": 20}, {"kind": "test", "step": 20}]
    assert with_fields(records, {"train": ("loss", "error")}) == [GOOD, {"kind": "test", "step": 20}]


EVALUATION: dict[str, Any] = {
    "time": 1.7e9, "platform": "cpu", "device": "x", "devices": 2, "protocol": "10crop", "data": "cifar10",
    "members": [{"workdir": "runs/x", "step": 5, "scales": [37]}], "count": 10_000, "top1_error": 8.0,
    "top5_error": 0.5, "loss": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("count", "time", "top1_error", "devices") for value in NUMBERS),
        {"members": []}, {"members": [1]}, {"members": {}}, {"members": [{"step": 5, "scales": [37]}]},
        {"members": [{"workdir": "x", "step": 5, "scales": ["a"]}]}, {"protocol": "11crop"}, {"protocol": []},
        {"device": 5}, {"platform": None}, {"count": -1},
    ],
)  # fmt: skip
def test_evaluations_that_no_reader_could_use_are_left_out(tmp_path: pathlib.Path, change: dict[str, Any]) -> None:
    write(tmp_path, EVALUATION | change, EVALUATION, name="evaluations.jsonl")
    assert read_evaluations(tmp_path) == [EVALUATION]


def test_records_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    assert read_records(tmp_path) == []
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}/metrics.jsonl: not a regular file"):
        read_records(tmp_path)
    os.mkfifo(tmp_path / "evaluations.jsonl")  # nobody writes into it
    with pytest.raises(UserError, match="not a regular file"):
        read_evaluations(tmp_path)


BAD_JSON = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"[]", b"null", b"NaN"]


@pytest.mark.parametrize("content", BAD_JSON)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", load_config),
        ("inputs.json", load_inputs),
        ("import.json", read_source),
        ("responses.json", read_responses),
    ],
)
def test_json_that_is_none(
    workdir: pathlib.Path, name: str, read: Callable[[pathlib.Path], object], content: bytes
) -> None:
    (workdir / name).write_bytes(content)
    with pytest.raises(UserError, match=str(workdir)) as caught:
        read(workdir)
    assert "\n" not in str(caught.value)


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    preprocessing = Preprocessing(np.zeros((8, 6, 3), np.float32), np.ones(3, np.float32))
    inputs = Inputs((8, 6, 3), ("ant", "bee"), preprocessing, np.eye(3, dtype=np.float32))
    create_workdir(tmp_path / "run", Config(), inputs, source="a.th")
    return tmp_path / "run"


def test_inputs_are_read_back(workdir: pathlib.Path) -> None:
    inputs = load_inputs(workdir)
    assert (inputs.image_shape, inputs.class_names) == ((8, 6, 3), ("ant", "bee"))
    assert inputs.preprocessing.mean.shape == (8, 6, 3)
    np.testing.assert_array_equal(inputs.lighting, np.eye(3))
    assert read_source(workdir) == "a.th"


@pytest.mark.parametrize(
    "change",
    [
        {"image_shape": "abc"}, {"image_shape": [8, 6]}, {"image_shape": [8, 6, 3, 1]}, {"image_shape": [8.0, 6, 3]},
        {"image_shape": [0, 6, 3]}, {"image_shape": [-8, 6, 3]}, {"image_shape": [True, 6, 3]}, {"image_shape": 5},
        {"image_shape": [10**9, 6, 3]}, {"class_names": [1, 2]}, {"class_names": None},
        {"class_names": "ab"},
        {"image_shape": [9, 6, 3]},  # the mean has 8 rows
    ],
)  # fmt: skip
def test_inputs_that_are_none(workdir: pathlib.Path, change: dict[str, object]) -> None:
    described = json.loads((workdir / "inputs.json").read_text())
    (workdir / "inputs.json").write_text(json.dumps(described | change))
    with pytest.raises(UserError, match=f"cannot read inputs.json and preprocessing.npz in {workdir}: .*"):
        load_inputs(workdir)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": np.zeros(4, np.float32)}, {"mean": np.zeros((8, 6, 3))}, {"std": np.ones((1, 3), np.float32)},
        {"std": np.float32(1)}, {"lighting": np.eye(4, dtype=np.float32)}, {"mean": np.array(["a", "b", "c"])},
        {"std": np.array([1, 0, 1], np.float32)}, {"mean": np.full(3, np.nan, np.float32)},
        {"mean": np.array([1, {}, 3], object)},
    ],
)  # fmt: skip
def test_preprocessing_that_is_none(workdir: pathlib.Path, change: dict[str, np.ndarray]) -> None:
    with np.load(workdir / "preprocessing.npz") as arrays:
        np.savez(workdir / "preprocessing.npz", **{**arrays, **change})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"cannot read inputs.json and preprocessing.npz in {workdir}"):
        load_inputs(workdir)


@pytest.mark.parametrize("content", [b"", b"PK", b"garbage", b"\x80\x04K\x01.", b"\x93NUMPY\x01\x00"])
def test_what_is_no_archive_of_arrays(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged, or no \.npz file \("):
        files.read_arrays(tmp_path / "x.npz")


def test_archives_of_arrays_are_checked_and_nothing_is_unpickled(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.arange(1000))
    assert files.read_arrays(path)["x"].tolist() == list(range(1000))
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged, or no \.npz file \(Bad CRC-32"):
        files.read_arrays(path)
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        files.read_arrays(path)
    with pytest.raises(FileNotFoundError):
        files.read_arrays(tmp_path / "none.npz")
