"""paper --train: which commands run, in which order, and what the budget does to them."""

import dataclasses
import json
import textwrap

import pytest
from paths import ROOT

from resnet_jax.cli.arguments import parse_config
from resnet_jax.config import to_json
from resnet_jax.errors import CommandError, UserError
from resnet_jax.paper.artefact import Artefact, Command
from resnet_jax.paper.commands import fill, missing_commands
from resnet_jax.paper.networks import NETWORKS
from resnet_jax.paper.runs import find_runs


def artefact(*found):
    return Artefact("table6", "", (), [], [], sorted(found, key=lambda command: command.multiply_adds))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A train.py that notes its arguments; with "sleep" it waits for SIGTERM and then saves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(
        textwrap.dedent("""
        import json, signal, sys, time
        def note(*words):
            with open("log", "a") as file:
                file.write(json.dumps([*words, *sys.argv[1:]]) + "\\n")
        def stop(signum, frame):
            note("saved")
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        note("began")
        if "sleep" in sys.argv:
            time.sleep(60)
        sys.exit(1 if "fail" in sys.argv else 0)
        """)
    )
    return tmp_path


def log(folder):
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_cheapest_first_and_looked_at_anew(repository):
    small, large, import_file = (
        Command(("train.py", "small"), 1.0),
        Command(("train.py", "large"), 2.0),
        Command(("train.py", "FILE"), 0.0),  # needs what only the user has
    )
    said = []

    def make():
        done = log(repository) if (repository / "log").exists() else []
        return artefact(import_file, *(c for c in (large, small) if ["began", c.arguments[1]] not in done))

    fill(make, None, said.append)
    assert log(repository) == [["began", "small"], ["began", "large"]]
    assert said == ["$ python train.py small", "$ python train.py large"]


def test_what_does_not_fill_its_cell_is_not_run_for_ever(repository):
    fill(lambda: artefact(Command(("train.py", "a"), 1.0)), None, lambda line: None)
    assert log(repository) == [["began", "a"]]


def test_the_budget_stops_a_run_which_saves(repository):
    said = []
    fill(lambda: artefact(Command(("train.py", "sleep"), 1.0), Command(("train.py", "b"), 2.0)), 3 / 60, said.append)
    assert log(repository) == [["began", "sleep"], ["saved", "sleep"]]
    assert said[-1] == "the budget is spent; the same command again goes on"


def test_a_failure_ends_it(repository):
    with pytest.raises(CommandError, match="failed with exit code 1: python train.py fail") as caught:
        fill(lambda: artefact(Command(("train.py", "fail"), 1.0)), None, lambda line: None)
    assert caught.value.exit_code == 1


def test_without_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--train runs train.py, which is not here"):
        fill(lambda: artefact(), None, print)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("imagenet_resnet50", ""),
        ("imagenet_resnet50", "--data.name tfds:imagenet2012:5.1.0 --data.dir /large --optim.boundaries 200000 400000"
         " --optim.accumulation-steps 4 --model.remat --run.seed 3 --run.steps 70"),
        ("imagenet_resnet18", "--optim.schedule plateau --data.validation-size 50000 --optim.boundaries"
         " --run.steps-per-dispatch 5"),
        ("cifar10_resnet1202", "--model.no-remat"),
    ],
)  # fmt: skip
def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch, name, args):
    monkeypatch.chdir(ROOT)  # commands are meant from there
    begun = parse_config([f"configs/{name}.py", "--run.workdir", str(tmp_path / "begun"), *args.split()])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text(to_json(begun))
    runs = find_runs(tmp_path)
    assert runs.left_out == ()
    commands = missing_commands(NETWORKS[name], runs, seeds=begun.run.seed + 1)
    program, *arguments = commands[-1].arguments
    whole = dataclasses.replace(begun, run=dataclasses.replace(begun.run, steps=NETWORKS[name].steps))
    assert program == "train.py"
    assert parse_config(arguments) == whole
    moved = missing_commands(NETWORKS[name], find_runs(tmp_path, "elsewhere"), seeds=begun.run.seed + 1)[-1]
    assert parse_config(moved.arguments[1:]).data.dir == "elsewhere"
