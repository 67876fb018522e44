"""What all tests share: the cache of compiled programs, the devices, real data, and what a run leaves out."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from paths import ROOT, SHARED, TESTS

# Programs are compiled once, for this run and the next ones; the processes that tests start share them.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Two devices for every test, whichever ran before it in its process.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

TIERS = ("unit", "system", "hardening")
UNPACK = SHARED / "data" / "cifar10" / "unpack.py"


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that holds the real cifar-10-batches-bin (185 MB), unpacked once per session."""
    if not UNPACK.is_file():
        pytest.skip("the real CIFAR-10 (../shared/data/cifar10) is not here")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, UNPACK, folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Let JAX compute in float64, as the golden values were."""
    import jax  # here, after the environment is set

    with jax.enable_x64(True):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what this run has left out."""
    reports = [report for kind in ("passed", "failed", "skipped") for report in terminalreporter.getreports(kind)]
    paths = {str((terminalreporter.config.rootpath / report.nodeid.split("::")[0]).parent) for report in reports}
    left_out = [tier for tier in TIERS if not any(path.startswith(str(TESTS / tier)) for path in paths)]
    notes = [f"tests/{tier}" for tier in left_out] + ["what is marked slow (-m slow)"]
    terminalreporter.write_line(f"not run: {', '.join(notes)}; make test-all runs all tiers")
