"""The commands in the documentation are commands of this program."""

import json
import re
import runpy
import shlex
import statistics

import pytest
from paths import ROOT

from resnet_jax.cli.arguments import parse_config
from resnet_jax.cli.commands import make_parser


def commands():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r"\\\n\s*", "", path.read_text())  # lines that go on
        lines = re.findall(r"^    (.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]*)`", text)
        for line in lines:
            words = shlex.split(line, comments=True) if line.startswith((".venv/bin/python", "python ")) else []
            if words[1:]:
                yield pytest.param(words[1:], id=f"{path.name}: {' '.join(words[1:])}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_the_documentation_is_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[0] == "train.py":
        for name in ("NAME", "cifar10_NAME"):  # stands for any
            words = [word.replace(f"configs/{name}.py", "configs/cifar10_resnet20.py") for word in words]
        assert parse_config([word for word in words[1:] if word != "--help"])
    elif words[0] == "eval.py":
        assert runpy.run_path("eval.py")["make_parser"]().parse_args(words[1:])
    elif words[:2] == ["-m", "resnet_jax"]:
        if words[3:4] == ["NAME"]:
            words[3] = "table6" if words[2] == "paper" else "resnet20"
        assert make_parser().parse_args(words[2:])
    else:
        assert words[:2] in (
            ["-m", "pip"],
            ["-m", "benchmarks"],
            ["-m", "benchmarks.gpu"],
            ["-m", "benchmarks.input_pipeline"],
            ["-m", "benchmarks.learning"],
            ["-m", "benchmarks.exports"],
            ["-m", "benchmarks.detection"],
            ["-m", "pytest"],
            ["-m", "reliability.crash"],
            ["-m", "reliability.fuzz"],
            ["-m", "reliability.long_run"],
        )


def test_there_are_commands_to_look_at():
    assert len(list(commands())) > 40


def runs():
    """Return the errors of each run that is on record, by kind and step."""
    for folder in sorted((ROOT / "docs" / "runs").glob("cifar10_*")):
        errors = {"train": {}, "test": {}}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            if (record := json.loads(line))["kind"] in errors:
                errors[record["kind"]][record["step"]] = record["error"]
        yield folder.name.removeprefix("cifar10_").replace("plain", "plain-").replace("resnet", "ResNet-"), errors


def tables(path):
    """Return the tables of a page, as lists of the cells of their rows."""
    blocks = re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()] for block in blocks]


def test_the_errors_along_training_are_those_on_record():
    expected = dict(runs())
    (table,) = (t for t in tables(ROOT / "docs" / "results.md") if t[0][0] == "step" and t[-1][0] == "64,000")
    header, _, *rows = table
    for step, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            network, kind = column.rsplit(" ", 1)
            kind = {"training": "train"}.get(kind, kind)
            assert cell == f"{expected[network][kind][int(step.replace(',', ''))]:.2f}"


def test_the_spread_of_the_last_evaluations_is_that_on_record():
    (table,) = (t for t in tables(ROOT / "docs" / "results.md") if "last ten evaluations: range" in t[0])
    rows = []
    for network, errors in runs():
        test = errors["test"]
        last = [test[step] for step in sorted(test)][-10:]
        best = min(test, key=test.get)
        rows.append(
            [
                network,
                f"{test[64_000]:.2f}",
                f"{test[best]:.2f} (step {best:,})",
                f"{min(last):.2f} to {max(last):.2f}",
                f"{statistics.mean(last):.2f}",
                f"{statistics.stdev(last):.2f}",
            ]
        )
    assert table[2:] == rows


def test_the_responses_are_those_on_record():
    (table,) = (t for t in tables(ROOT / "docs" / "results.md") if t[0][:2] == ["network", "3x3 layers"])
    rows = []
    for (network, _), path in zip(runs(), sorted((ROOT / "docs" / "runs").glob("*/responses.json")), strict=True):
        stds = json.loads(path.read_text())["stds"]
        values = (statistics.mean(stds), statistics.median(stds), max(stds), min(stds))
        rows.append([network, str(len(stds)), *(f"{value:.3f}" for value in values)])
    assert table[2:] == rows


def test_the_first_steps_of_resnet56_are_those_on_record():
    (table,) = (t for t in tables(ROOT / "docs" / "results.md") if t[0][0] == "step" and "PyTorch" in t[0][-1])
    folder = ROOT / "docs" / "runs"
    files = [
        folder / "cifar10_resnet56" / "metrics.jsonl",
        folder / "first_2000_steps" / "resnet56_seed1.jsonl",
        folder / "first_2000_steps" / "pytorch_resnet56.jsonl",
    ]
    records = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    for step, *cells in table[2:]:
        kind, number = ("test", step.removeprefix("test, ")) if step.startswith("test") else ("train", step)
        at = int(number.replace(",", ""))
        assert cells == [
            f"{next(r['error'] for r in run if (r['kind'], r['step']) == (kind, at)):.2f}" for run in records
        ]
