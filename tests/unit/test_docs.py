"""The commands in the documentation are commands of this program."""

import re
import runpy
import shlex

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
            ["-m", "pytest"],
            ["-m", "reliability.crash"],
            ["-m", "reliability.fuzz"],
            ["-m", "reliability.long_run"],
        )


def test_there_are_commands_to_look_at():
    assert len(list(commands())) > 40
