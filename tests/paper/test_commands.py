"""paper --train: which commands run, in which order, and what the budget does to them."""

import json
import textwrap
import time

import pytest

from resnet_jax.errors import CommandError, UserError
from resnet_jax.paper.artefact import Artefact, Command
from resnet_jax.paper.commands import fill


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
    began = time.monotonic()
    fill(lambda: artefact(Command(("train.py", "sleep"), 1.0), Command(("train.py", "b"), 2.0)), 3 / 60, said.append)
    assert time.monotonic() - began < 30
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
