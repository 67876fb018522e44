"""The Markdown of a benchmark run."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.cases import PEERS
from benchmarks.targets import roofline_lines, target_lines

Entry = dict[str, Any]  # "name", "case" (fields of a Case), "peers" (results by peer)

_STARTS = {"first": "first start, empty compilation cache", "second": "second start, same cache"}
_COLUMNS = ("flax", "torch", "torch-compile")

_METHOD = """\
Every peer runs in a process of its own. The processes of a case are alive together, but one works at a time: in each
round every peer has its turn of about {round_seconds} s of steps, so that the noise of the machine hits all alike. The
clock is read when the device is idle, before and after; the first step of a turn is not timed. A step of training is
forward, backward and update (SGD, momentum 0.9, weight decay 1e-4); milliseconds are those of a round divided by its
steps. "x as fast" is the peer's median over the rounds divided by that of ours: above 1, ours is faster.

- ours: the training step of `train.py`, many steps in one dispatch, with the shuffling, normalization and augmentation
  of uint8 images that live on the device, and with the metrics of every step. BN statistics are those of 64 images in
  the CIFAR networks. Inference is `evaluate`: every dispatch goes through a split and returns losses and errors.
- ours, one step a dispatch: the same program for one step at a time, which shuffles the epoch anew for each.
- plain Flax: nn.Conv, nn.BatchNorm and optax.sgd as in Flax's own examples, one jitted step a dispatch, state donated,
  one device.
- PyTorch: eager and `torch.compile` (default mode), channels_last, autocast for bfloat16, otherwise its defaults.
- float32 on a GPU: XLA may round factors to TF32; whether PyTorch does is under Settings.
- The peers but ours get ready-made batches of random floats, another one each step, and pay nothing for their input.
- Compile: JAX's trace, lowering and compilation, or the first step of torch.compile; cold, without any cache. On a GPU
  the peers of a case compile at the same time.
- Peak memory: on the CPU the highest resident memory of the process (VmHWM), with libraries, data and compilation; on
  the GPU the highest use in the framework's allocator.
- Whole commands: images/s of the records of `metrics.jsonl` but the first, and of all steps with evaluations and
  checkpoints; the whole command also starts Python, reads the data and compiles.
- One GPU, also where the host has several.
- Empty cells: the peer does not take part in the case, or PyTorch is not installed."""


def render(run: dict[str, Any]) -> str:
    """Return the report of a run; see __main__ for its parts."""
    entries: list[Entry] = run["cases"]
    stepped = [entry for entry in entries if entry["case"]["kind"] in ("train", "inference")]
    parts = ["# Benchmarks", _machine(run)]
    if stepped:
        parts += ["## Side by side", _side_by_side(stepped), "## Every measurement", _measurements(stepped)]
    if any(entry["case"]["kind"] in ("train.py", "start") for entry in entries):
        parts += ["## Whole commands", _commands(entries)]
    if run["machine"]["platform"] == "gpu":
        parts += ["## Targets", "\n".join(target_lines(entries))]
    if roofline := roofline_lines(stepped):
        parts += ["## Memory-bandwidth roofline", "\n".join(roofline)]
    if settings := _settings(stepped):
        parts += ["## Settings", settings]
    parts += ["## How it is measured", _METHOD.format(round_seconds=run["round_seconds"])]
    return "\n\n".join(parts) + "\n"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    lines = [
        f"CPU: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"GPU: {machine['gpu'] or 'none'}",
        f"JAX runs on: {machine['platform']} ({machine['device']})",
        f"Software: {machine['os']}, Python {machine['python']}, {versions}",
        f"XLA_FLAGS: {machine['xla_flags'] or 'not set'}",
        f"Date: {run['date']}",
        f"Command: `{run['command']}`, {run['rounds']} rounds at most",
    ]
    return "\n".join(f"- {line}" for line in lines)


def number(value: float) -> str:
    """Write three significant digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def describe(case: dict[str, Any]) -> str:
    """Return for example "resnet20 train float32, batch 128"."""
    return f"{case['network']} {case['kind']} {case['dtype']}, batch {case['batch_size']}"


def _ms(result: dict[str, Any] | None) -> str:
    """Return the median, or why there is none."""
    if result is None or result["status"] == "not installed":
        return ""
    return number(median(result["ms"])) if result["ms"] else result["status"]


def _side_by_side(entries: list[Entry]) -> str:
    header = ["case", "ours: images/s", "ours: ms a step"] + [f"{PEERS[peer]}: ms a step" for peer in _COLUMNS]
    header += [f"ours x as fast as {PEERS[peer]}" for peer in _COLUMNS]
    rows = []
    for entry in entries:
        case, results = entry["case"], entry["peers"]
        ours = next(
            (peer for peer in results if peer.startswith("ours")), "ours"
        )  # the variant where it is the only one
        row = [describe(case) + (f" ({PEERS[ours].removeprefix('ours, ')})" if ours != "ours" else "")]
        own = results.get(ours, {"ms": [], "status": ""})
        row += [number(1000 * case["batch_size"] / median(own["ms"])) if own["ms"] else "", _ms(own)]
        row += [_ms(results.get(peer)) for peer in _COLUMNS]
        for peer in _COLUMNS:
            ms = results.get(peer, {"ms": []})["ms"]
            row.append(f"{median(ms) / median(own['ms']):.2f}" if ms and own["ms"] else "")
        rows.append(row)
    return _table(header, rows)


def _measurements(entries: list[Entry]) -> str:
    header = ["case", "peer", "rounds x steps", "ms a step: min", "median", "max", "images/s", "compile, s"]
    header += ["peak memory, MiB", "remark"]
    rows = []
    for entry in entries:
        for peer, result in entry["peers"].items():
            row, ms = [describe(entry["case"]), PEERS[peer]], result["ms"]
            if ms:
                row += [f"{len(ms)} x {result['steps']}", *map(number, (min(ms), median(ms), max(ms)))]
                row.append(number(1000 * entry["case"]["batch_size"] / median(ms)))
            else:
                row += [""] * 5
            seconds = result.get("compile_seconds")
            peak = result.get("peak_device_bytes") or result.get("peak_host_bytes")
            row += ["" if seconds is None else number(seconds), number(peak / 2**20) if peak else ""]
            remark = "one step, no warm-up" if entry["case"]["single_step"] else ""
            row.append(remark if result["status"] == "ok" else result["status"])
            rows.append(row)
    return _table(header, rows)


def _commands(entries: list[Entry]) -> str:
    header = [
        "command",
        "images/s: min",
        "median",
        "max",
        "with evaluations",
        "compile, s",
        "whole command, s",
        "remark",
    ]
    rows = []
    for entry in entries:
        case = entry["case"]
        if case["kind"] == "train.py":
            result = entry["peers"]["ours"]
            rates = result.get("images_per_second")
            row = [f"train.py configs/cifar10_{case['network']}.py"]
            row += [number(f(rates)) for f in (min, median, max)] if rates else [""] * 3
            row += _cells(result, "overall_images_per_second", "compile_seconds", "seconds")
            rows.append([*row, f"{result['steps']:,} steps" if result["status"] == "ok" else result["status"]])
        elif case["kind"] == "start":
            for name, start in _STARTS.items():
                result = entry["peers"].get(name) or entry["peers"]["ours"]  # which is there if it was not run
                remark = "to the end of the first step" if result["status"] == "ok" else result["status"]
                row = [f"{case['network']} training: {start}", *[""] * 4]
                rows.append([*row, *_cells(result, "compile_seconds", "seconds"), remark])
    return _table(header, rows)


def _cells(result: dict[str, Any], *names: str) -> list[str]:
    return [number(result[name]) if name in result else "" for name in names]


def _settings(entries: list[Entry]) -> str:
    """List what the peers report of themselves, each combination once."""
    lines: dict[str, None] = {}
    for entry in entries:
        for peer, result in entry["peers"].items():
            if settings := result.get("settings"):
                lines[f"- {PEERS[peer]}: " + ", ".join(f"{name} {value}" for name, value in settings.items())] = None
    return "\n".join(lines)
