"""Fixtures that several test modules use."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from paths import SHARED

# Programs that several tests compile are compiled once; the processes that tests start share them.
_CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

UNPACK = SHARED / "data" / "cifar10" / "unpack.py"


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that holds the real cifar-10-batches-bin (185 MB), unpacked once per session."""
    if not UNPACK.is_file():
        pytest.skip("the real CIFAR-10 (../shared/data/cifar10) is not here")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, UNPACK, folder], check=True, stdout=subprocess.DEVNULL)
    return folder
