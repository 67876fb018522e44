"""The machine that is measured on, and the Markdown of what was measured."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from statistics import median
from typing import Any

_HEADER = """\
| case | peer | ms a step | lowest to highest | to ours | images/s | compile, s | memory, MiB |
|---|---|---:|---:|---:|---:|---:|---:|"""

_METHOD = """\
Every peer runs in a process of its own. The processes of a case are alive together, but one works at a time: in each
round every peer has its turn of about {seconds} s of steps, so that the noise of the machine hits all alike. The clock
is read when the device is idle, before and after; the first step of a turn is not timed. A step of training is forward,
backward and update (SGD, momentum 0.9, weight decay 1e-4). Milliseconds are medians over the rounds; "to ours" is a
peer's median divided by that of the first of ours: above 1, ours is faster.

- ours: the training step of `train.py`, many steps in one dispatch, with the shuffling, normalization and augmentation
  of uint8 images that live on the device, and with the metrics of every step. BN statistics are those of 64 images in
  the CIFAR networks. Inference is `evaluate`: it goes through a split and returns losses and errors.
- ours, one step a dispatch: the same program for one step at a time, which shuffles the epoch anew for each.
- plain Flax: nn.Conv, nn.BatchNorm and optax.sgd as in Flax's own examples, one jitted step a dispatch, state donated,
  one device.
- PyTorch: eager and `torch.compile` (default mode, or "reduce-overhead" for CUDA graphs), channels_last, autocast for
  bfloat16, on a GPU the fused SGD and TF32 in matrix products, otherwise its defaults.
- float32 on a GPU: XLA may round factors to TF32; whether PyTorch does is under Settings.
- The peers but ours get ready-made batches of random floats, another one each step, and pay nothing for their input.
- Compile: JAX's trace, lowering and compilation, or the first step of torch.compile; cold, without any cache. On a GPU
  the peers of a case compile at the same time.
- Memory: on the CPU the highest resident memory of the process (VmHWM), with libraries, data and compilation; on the
  GPU the highest use in the framework's allocator. One GPU, also where the host has several."""


def describe_machine() -> dict[str, Any]:
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


def render(measured: dict[str, Any]) -> str:
    """Return the report; see driver.main for the parts of `measured`."""
    rows, settings = table(measured["cases"])
    parts = ["# Benchmarks", describe(measured), rows, "## Settings", settings]
    return "\n\n".join([*parts, "## How it is measured", _METHOD.format(seconds=measured["seconds"])]) + "\n"


def table(cases: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """Return a table of all peers of all cases, and a list of their settings."""
    rows = [_HEADER]
    settings: dict[str, None] = {}  # each combination once
    for entry in cases:
        case, results = entry["case"], entry["peers"]
        ours = next((median(r["ms"]) for peer, r in results.items() if peer.startswith("ours") and r["ms"]), None)
        for peer, result in results.items():
            if text := ", ".join(f"{name} {value}" for name, value in result.get("settings", {}).items()):
                settings[f"- {peer}: {text}"] = None
            name = f"{case['network']} {case['mode']} {case['dtype']}, batch {case['batch_size']}"
            rows.append(f"| {name} | {peer} | {' | '.join(_cells(case, result, ours))} |")
    return "\n".join(rows), "\n".join(settings)


def number(value: float | None) -> str:
    """Write three significant digits, or all before the point; nothing for None."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _cells(case: dict[str, Any], result: dict[str, Any], ours: float | None) -> list[str]:
    ms, peak = result["ms"], result.get("peak_bytes")
    cells = [result.get("error", ""), "", "", ""]
    if ms:
        middle = median(ms)
        spread = f"{number(min(ms))} to {number(max(ms))}, {len(ms)} x {result['steps']} steps"
        cells = [number(middle), spread, number(ours and middle / ours), number(1000 * case["batch_size"] / middle)]
        cells[0] += f" ({result['error']})" if "error" in result else ""
    return [*cells, number(result.get("compile_seconds")), number(peak and peak / 2**20)]


def describe(measured: dict[str, Any]) -> str:
    """Return a list: machine, software, date and command."""
    machine = measured["machine"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    lines = [
        f"CPU: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"JAX runs on: {machine['platform']} ({machine['device']}); GPU: {machine['gpu'] or 'none'}",
        f"Software: {machine['os']}, Python {machine['python']}, {versions}",
        f"XLA_FLAGS: {machine['xla_flags'] or 'not set'}",
        f"Date: {measured['date']}; command: `{measured['command']}`",
    ]
    return "\n".join(f"- {line}" for line in lines)
