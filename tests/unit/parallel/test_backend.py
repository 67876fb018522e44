"""Which backend JAX takes, how much of a card, and what is said of it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from paths import ROOT

from resnet_jax.errors import UserError
from resnet_jax.parallel import backend

VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)\n"


@pytest.fixture
def card(tmp_path, monkeypatch):
    """The driver's folder of an NVIDIA card, which JAX may or may not use."""
    (tmp_path / "version").write_text(VERSION)
    monkeypatch.setattr(backend, "_DRIVER", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


def test_a_backend_that_is_required(monkeypatch):
    monkeypatch.setattr(backend, "_DRIVER", Path("nowhere"))
    backend.require("any")
    backend.require("cpu")
    with pytest.raises(UserError, match=r"^--run.require gpu: JAX [\d.]+ runs on a cpu here$"):
        backend.require("gpu")


@pytest.mark.usefixtures("card")
def test_a_card_that_is_not_used(monkeypatch):
    way = rf"JAX for the card: pip install 'jax\[cuda13\]=={jax.__version__}'"
    with pytest.raises(UserError, match=way):
        backend.require("gpu")
    said = backend.unused_card()
    assert said.startswith("this machine has an NVIDIA card, and JAX runs on the CPU; JAX for the card: pip ")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert backend.unused_card() is None  # the user has said so
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert backend.unused_card() is None
    assert backend.versions()["driver"] == "580.95.05"


@pytest.mark.usefixtures("card")
def test_jax_does_not_say_it_once_more(monkeypatch):
    log = logging.getLogger("jax._src.xla_bridge")
    monkeypatch.setattr(log, "filters", [])
    said = log.makeRecord(log.name, logging.WARNING, "", 0, "a CUDA-enabled jaxlib is not installed.", (), None)
    other = log.makeRecord(log.name, logging.WARNING, "", 0, "something else", (), None)
    for _ in range(2):
        backend.leave_to_unused_card()
    assert len(log.filters) == 1
    assert (bool(log.filter(said)), bool(log.filter(other))) == (False, True)
    monkeypatch.setattr(log, "filters", [])
    monkeypatch.setattr(backend, "_DRIVER", Path("nowhere"))
    backend.leave_to_unused_card()
    assert log.filter(said)  # nothing else would


def test_no_card_no_warning(monkeypatch):
    monkeypatch.setattr(backend, "_DRIVER", Path("nowhere"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert backend.unused_card() is None
    assert backend.driver() is None


@pytest.mark.parametrize(
    ("config", "variables", "expected"),
    [
        ("None", {}, "false"),
        ("Config()", {}, "None"),  # a training takes what JAX takes
        ("None", {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "true"),
        ("None", {"XLA_CLIENT_MEM_FRACTION": "0.3"}, "None"),
    ],
)
def test_a_program_that_only_tests_leaves_memory_to_others(config, variables, expected):
    script = (
        "import os; from resnet_jax.config import Config; from resnet_jax.parallel.devices import configure;"
        f" configure({config}); print(os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE'))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")} | variables
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == expected, result.stderr


@pytest.mark.parametrize(("cuda", "file"), [("yes", "requirements-cuda.txt"), ("no", "requirements.txt")])
def test_make_installs_jax_for_the_card(cuda, file):
    command = ["make", "--dry-run", "--always-make", f"CUDA={cuda}", ".venv/complete"]
    try:
        planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("make is not installed")
    assert f"--requirement {file}\n" in planned


def test_jax_for_the_card_is_the_jax_of_the_lock():
    (locked,) = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax==")]
    assert locked.replace("jax", "jax[cuda13]") in (ROOT / "requirements-cuda.txt").read_text().splitlines()
