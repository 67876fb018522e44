"""Describe machine and versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any


def describe() -> dict[str, Any]:
    """Return names and numbers; "platform" is "gpu" where JAX finds one, else "cpu". JAX then holds the devices."""
    import jax

    from resnet_jax.parallel.devices import cores, processor

    device = jax.devices()[0]
    return {
        "platform": "gpu" if device.platform == "gpu" else "cpu",
        "device": device.device_kind,
        "cpu": processor(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": _gpu(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch", "numpy")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


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
