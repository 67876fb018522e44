"""The readers of what a work directory holds: configuration, inputs, records, evaluations, responses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from reliability.fuzz import mutations
from reliability.fuzz.npz import damage_npz
from reliability.fuzz.reader import Damaged, Files, Reader
from resnet_jax.run.curves import draw_curves, plot_curves
from resnet_jax.paper.analysis.report import write_report
from resnet_jax.paper.analysis.responses import Responses, read_responses
from resnet_jax.config import Config, from_json, to_json
from resnet_jax.data import LabelledImages
from resnet_jax.data.types import Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.evaluate import Evaluation, Member, read_evaluations
from resnet_jax.models import build_model
from resnet_jax.optim import build_optimizer
from resnet_jax.run.logs import RunLog
from resnet_jax.run.records import read_records
from resnet_jax.paper.runs import find_runs
from resnet_jax.data.views import make_protocol
from resnet_jax.data.types import Inputs
from resnet_jax.run.workdir import check_workdir, create_workdir, load_config, load_inputs, read_source


def _config() -> Files:
    config = Config()
    mean = dataclasses.replace(config, data=dataclasses.replace(config.data, mean=(0.5, 0.4, 0.3)))
    return {"config.json": to_json(mean).encode()}


def _damage_config(rng: random.Random, files: Files) -> Damaged:
    return {"config.json": mutations.json_document(rng, files["config.json"])}


def _read_config(folder: Path, names: frozenset[str]) -> None:
    config = load_config(folder)
    assert from_json(to_json(config), "again") == config
    for group in dataclasses.asdict(config).values():
        for value in group.values():
            for number in value if isinstance(value, tuple) else (value,):
                assert not isinstance(number, float) or math.isfinite(number), number
                assert not isinstance(number, int) or abs(number) < 2**32, number
    check_workdir(folder, config)
    with contextlib.suppress(UserError):  # of options that do not go together, which are named in it
        build_model(config.model, 10)
        build_optimizer(config.optim, config.run.steps)


def _workdir() -> Files:
    rng = np.random.default_rng(0)
    preprocessing = Preprocessing(rng.random((8, 8, 3), np.float32), np.ones(3, np.float32))
    inputs = Inputs((8, 8, 3), ("ant", "bee"), preprocessing, np.eye(3, dtype=np.float32))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "run")
        create_workdir(path, Config(), inputs, source="resnet20.th")
        return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def _damage_workdir(rng: random.Random, files: Files) -> Damaged:
    name = rng.choice(("inputs.json", "inputs.json", "preprocessing.npz", "preprocessing.npz", "import.json"))
    if name.endswith(".npz"):
        return {name: damage_npz(rng, files[name], rng.choice(("mean", "std", "lighting")))}
    return {name: mutations.json_document(rng, files[name])}


def _read_workdir(folder: Path, names: frozenset[str]) -> None:
    read_source(folder)
    inputs = load_inputs(folder)
    height, width, channels = inputs.image_shape
    assert channels == 3
    assert all(type(side) is int and 0 < side < 2**16 for side in (height, width))
    assert inputs.class_names
    assert all(type(name) is str for name in inputs.class_names)
    mean, std = inputs.preprocessing
    assert mean.shape in ((3,), (height, width, 3))
    assert std.shape == (3,)
    for array in (mean, std) if inputs.lighting is None else (mean, std, inputs.lighting):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    assert (std > 0).all()
    assert inputs.lighting is None or inputs.lighting.shape == (3, 3)


_START = {"python": "3.11", "jax": "0.10", "platform": "cpu", "device": "x", "devices": 2, "compile_seconds": 1.5}


def _records() -> Files:
    numbers = {"loss": 1.5, "error": 50.0, "images": 1000}
    training = {"learning_rate": 0.1, "gradient_norm": 2.0, "images_per_second": 100.0}
    records: list[dict[str, object]] = [{"kind": "start", "step": 0, "time": 1.7e9, **_START}]
    for step in (10, 20, 30):
        rate = {"learning_rate": 1 / step}
        records.append({"kind": "train", "step": step, "time": 1.7e9 + step, **numbers, **training, **rate})
    records.append({"kind": "validation", "step": 30, "time": 1.7e9 + 31, **numbers, "top5_error": 1.0})
    records.append({"kind": "test", "step": 30, "time": 1.7e9 + 32, **numbers})
    return {"run/metrics.jsonl": _lines(records), "run/config.json": to_json(Config()).encode()}


def _lines(records: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _damage_records(rng: random.Random, files: Files) -> Damaged:
    return {"run/metrics.jsonl": mutations.json_lines(rng, files["run/metrics.jsonl"])}


def _evaluation(folder: Path) -> Evaluation:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    test = LabelledImages("cifar10", images, np.array([0, 1], np.int32), ("0", "1"), ("ant", "bee"))
    return Evaluation((Member(folder, 30, make_protocol("single", (8, 8))),), test, np.eye(2))


def _read_records(folder: Path, names: frozenset[str]) -> None:
    workdir = folder / "run"
    records = read_records(workdir)
    assert len(records) < 40
    for record in records:
        assert record["kind"] == "start" or all(isinstance(value, int | float | str) for value in record.values())
    for run in find_runs(folder).found:
        assert isinstance(run.step + run.finished, int)
        result = run.result("single")
        assert result is None or (result.date and f"{result.top1_error:.2f}" and run.device is not None)
    # What takes longer is done in a part of the cases, the same ones each time.
    choice = sum((workdir / "metrics.jsonl").read_bytes()) % 64
    if choice % 8 == 3:
        axes = Figure().add_subplot()
        for quantity in ("error", "loss"):
            draw_curves(axes, records, quantity)
    if choice == 0:
        plot_curves(workdir, "title")
    elif choice == 1:
        assert write_report(workdir, _evaluation(workdir), workdir / "report.html").stat().st_size
    elif choice == 2:
        with RunLog(workdir, step=20, steps=50):
            pass
        assert all(record["step"] <= 20 for record in read_records(workdir))
        shutil.rmtree(workdir / "tensorboard")


def _evaluations() -> Files:
    def line(images: int, protocol: str, steps: tuple[int, ...]) -> dict[str, object]:
        members = [{"workdir": "runs/x", "step": step, "scales": [37]} for step in steps]
        errors = {"top1_error": 8.5, "top5_error": 0.5, "loss": 0.3}
        found = {"protocol": protocol, "members": members, "data": "cifar10", "count": images, **errors}
        return {"time": 1.7e9, **_START, **found}

    records = [line(10_000, "single", (5,)), line(10_000, "10crop", (5, 6)), line(3, "multiscale", (5,))]
    responses = Responses(5, 100, ("stem_conv", "fc"), (1.0, 0.5))
    return {
        "run/evaluations.jsonl": _lines(records),
        "run/responses.json": (json.dumps(responses.to_dict(), indent=2) + "\n").encode(),
        "run/config.json": to_json(Config()).encode(),
    }


def _damage_evaluations(rng: random.Random, files: Files) -> Damaged:
    name = rng.choice(("run/evaluations.jsonl", "run/evaluations.jsonl", "run/responses.json"))
    damage = mutations.json_lines if name.endswith("l") else mutations.json_document
    return {name: damage(rng, files[name])}


def _read_evaluations(folder: Path, names: frozenset[str]) -> None:
    assert len(read_evaluations(folder / "run")) < 40
    runs = find_runs(folder)
    for run in runs.found:
        for protocol in ("single", "10crop", "multiscale"):
            result = run.result(protocol)
            assert result is None or (result.date and f"{result.top1_error:.2f}" and result.device is not None)
    assert len(runs.ensembles()) < 40
    responses = read_responses(folder / "run")
    assert responses is None or all(math.isfinite(std) and std >= 0 for std in responses.stds)


_LOGS = (
    "resnet_jax.files",
    "resnet_jax.run.logs",
    "resnet_jax.paper.analysis.curves",
    "resnet_jax.paper.analysis.report",
)
RUN_READERS = (
    Reader("config", 1500, ("resnet_jax.config",), _config, _damage_config, _read_config),
    Reader("inputs", 800, ("resnet_jax.run.workdir",), _workdir, _damage_workdir, _read_workdir),
    Reader("metrics", 900, (*_LOGS, "resnet_jax.paper.runs"), _records, _damage_records, _read_records),
    Reader(
        "evaluations",
        500,
        ("resnet_jax.files", "resnet_jax.evaluate", "resnet_jax.paper.runs"),
        _evaluations,
        _damage_evaluations,
        _read_evaluations,
    ),
)
