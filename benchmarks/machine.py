"""Describe machine and versions; a process of its own (python -m benchmarks.machine), so that no device stays held."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")


def describe() -> dict[str, Any]:
    """Return names and numbers; "platform" is "gpu" where JAX finds one, else "cpu"."""
    import jax

    from resnet_jax.parallel.devices import cores, processor

    device = jax.devices()[0]
    return {
        "platform": "gpu" if device.platform == "gpu" else "cpu",
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": processor(),
        "cores": cores(),
        "memory_gib": round(int((_first_value("/proc/meminfo", "MemTotal") or "0").split()[0]) / 2**20, 1),
        "gpu": _gpu(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _first_value(path: str, name: str) -> str:
    file = Path(path)
    for line in file.read_text().splitlines() if file.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    """Return name, driver and memory as nvidia-smi has them."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().replace("\n", "; ") or None


if __name__ == "__main__":
    print(json.dumps(describe()))
