"""Devices: what has to be settled before JAX computes anything, how arrays lie on them, and what they are called."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_jax.config import Config
from resnet_jax.parallel.backend import leave_to_unused_card, share_the_card, versions


def configure(config: Config | None = None) -> None:
    """Set JAX up for a run of `config`; call it before anything is computed. What the user has set stays.

    - The cores of a CPU become devices, as many as the batch divides over, or all of them without a config (for a
      program that only tests): two devices of one core take less time than one of two (docs/performance.md).
    - A program that only tests takes a GPU's memory as it needs it, not in advance (backend.share_the_card).
    - Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/resnet_jax, so that a second
      start is fast; JAX_ENABLE_COMPILATION_CACHE=0 turns that off.
    """
    if config is None:
        share_the_card()
    else:
        leave_to_unused_card()
    if _setting("jax_compilation_cache_dir") is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "resnet_jax"))
    if _setting("jax_num_cpu_devices") < 0 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has computed something already: its devices stay
            devices = cpu_devices(config, cores()) if config else cores()
            jax.config.update("jax_num_cpu_devices", devices)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_devices(config: Config, most: int) -> int:
    """Return the devices of this process, `most` at most: they divide the batch, and its BN groups if it has several.

    A batch that is computed in parts has fewer groups at a time.
    """
    part, processes = config.data.batch_size // config.optim.accumulation_steps, config.hosts.processes or 1
    groups = part // (config.bn_group_size or part)
    units = part if groups == 1 else groups
    return max((n for n in range(1, most + 1) if units % (n * processes) == 0), default=1)


def make_shardings() -> tuple[NamedSharding, NamedSharding]:
    """Return how arrays lie on all devices: whole on each, and divided along their first axis."""
    # By process, so that each reads consecutive images: jax.make_mesh orders TPUs by where they are.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


def round_up(images: int) -> int:
    """Return the next multiple of the number of devices, for batches whose size changes no result."""
    return images + -images % jax.device_count()


def counts_steps() -> bool:
    """Tell whether the loop over steps has a fixed length: on accelerators, not on a CPU, whose steps take long."""
    return jax.default_backend() != "cpu"


# CUDA graphs of XLA also for convolutions and whole loops; the option replaces XLA's own list.
_COMMAND_BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION,WHILE"


def compiler_options() -> dict[str, str]:
    """Return the options of XLA that a loop of training steps is compiled with; what the user has set stays."""
    name = "xla_gpu_enable_command_buffer"
    if jax.default_backend() not in ("gpu", "cuda") or name in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {name: _COMMAND_BUFFERS}


def processor() -> str:
    """Return the name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux; platform.processor() knows nothing there
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "cpu"


def environment() -> dict[str, Any]:
    """Name versions and devices."""
    device = jax.devices()[0]
    return {
        **versions(),
        "platform": device.platform,
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
    }


def description() -> dict[str, Any]:
    """Return what the log of a run should say of how its programs are compiled."""
    enabled = _setting("jax_enable_compilation_cache")
    described = {"compilation_cache": _setting("jax_compilation_cache_dir") if enabled else "off"}
    if flags := os.environ.get("XLA_FLAGS"):
        described["XLA_FLAGS"] = flags
    if options := compiler_options():
        described["compiler_options"] = options
    return described


def _setting(name: str) -> Any:
    return getattr(jax.config, name)  # its attributes are unknown to type checkers
