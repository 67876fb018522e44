"""The backend that JAX runs on: whether it is the one that was asked for, and how it shares a card."""

from __future__ import annotations

import logging
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from resnet_jax.errors import UserError

_DRIVER = Path("/proc/driver/nvidia")
_MEMORY_SETTINGS = (  # of JAX, all about how much of a GPU's memory it takes in advance
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def share_the_card() -> None:
    """Take a GPU's memory as it is needed, so that a program works beside a training; call it before JAX computes.

    JAX otherwise takes three quarters of it in advance, as it does for a training. What the user has set stays.
    """
    if not any(name in os.environ for name in _MEMORY_SETTINGS):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def require(backend: str) -> None:
    """Raise a UserError if JAX runs on another backend; see RunConfig.require."""
    found = jax.default_backend()
    if backend not in ("any", found):
        raise UserError(f"--run.require {backend}: JAX {jax.__version__} runs on a {found} here{_way_to_cuda()}")


def leave_to_unused_card() -> None:
    """Keep JAX from saying, without a way out, what unused_card() says; call it before JAX computes."""
    if _DRIVER.exists():  # under WSL 2, say, there is a card without it, and JAX's word stays
        logging.getLogger("jax._src.xla_bridge").addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return "a CUDA-enabled jaxlib is not installed" not in record.getMessage()


def unused_card() -> str | None:
    """Tell of an NVIDIA card that JAX does not use, unless JAX_PLATFORMS asks for that."""
    if jax.default_backend() != "cpu" or "JAX_PLATFORMS" in os.environ or not _DRIVER.exists():
        return None
    return f"this machine has an NVIDIA card, and JAX runs on the CPU{_way_to_cuda()}"


def _way_to_cuda() -> str:
    if not _DRIVER.exists() or jax.default_backend() == "gpu":
        return ""
    return f"; JAX for the card: pip install 'jax[cuda13]=={jax.__version__}' (or cuda12, for older drivers)"


def driver() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    try:
        text = (_DRIVER / "version").read_text()
    except OSError:
        return None
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else None


def versions() -> dict[str, Any]:
    """Name what computes."""
    named = {"python": platform.python_version()}
    named |= {package: version(package) for package in ("jax", "jaxlib", "flax", "optax")}
    if jax.default_backend() == "gpu" and (of_card := driver()):
        named["driver"] = of_card
    return named
