"""What the figures of a GPU are held against: the targets of the project, and the bandwidth of the memory."""

from __future__ import annotations

from statistics import median
from typing import Any

_STEPS = 64_000  # of the paper's training on CIFAR-10
_SECONDS = {"resnet20": 40, "resnet110": 180}
_IMAGES_PER_SECOND = 5_000  # ResNet-50, bfloat16
_TIMES_TORCH_COMPILE = 1.2
_TABLE = ["| target | measured | met |", "| --- | ---: | ---: |"]


def target_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Return a table of the targets for training; one that was not measured says so."""
    rows = []
    for network, seconds in _SECONDS.items():
        found = [entry for entry in entries if _is(entry, network) and entry["case"]["batch_size"] == 128]
        for entry in found:
            target = f"{network} {entry['case']['dtype']}: {_STEPS:,} steps in at most {seconds} s"
            ms = _median(entry, "ours")
            measured = None if ms is None else ms * _STEPS / 1000
            text = None if measured is None else f"{measured:.1f} s (projected from {ms:.3f} ms a step)"
            rows.append(_row(target, text, measured is not None and measured <= seconds))
        for entry in entries:
            rate = entry["peers"].get("ours", {}).get("overall_images_per_second")
            if rate and entry["case"]["network"] == network:
                target = f"{network} {entry['case']['dtype']}, train.py: {_STEPS:,} steps in at most {seconds} s"
                whole = _STEPS * entry["case"]["batch_size"] / rate
                text = f"{whole:.1f} s (projected from {rate:,.0f} images/s with evaluations)"
                rows.append(_row(target, text, whole <= seconds))
        if not found:
            rows.append(_row(f"{network}: {_STEPS:,} steps in at most {seconds} s", None, False))
    resnet50 = [entry for entry in entries if _is(entry, "resnet50") and entry["case"]["dtype"] == "bfloat16"]
    ms, peer_ms = (_median(resnet50[0], peer) if resnet50 else None for peer in ("ours", "torch-compile"))
    rate = None if ms is None else 1000 * resnet50[0]["case"]["batch_size"] / ms
    text = None if rate is None else f"{rate:,.0f} images/s"
    target = f"resnet50 bfloat16: at least {_IMAGES_PER_SECOND:,} images/s"
    rows.append(_row(target, text, rate is not None and rate >= _IMAGES_PER_SECOND))
    times = None if ms is None or peer_ms is None else peer_ms / ms
    text = None if times is None else f"{times:.2f} x"
    target = f"resnet50 bfloat16: at least {_TIMES_TORCH_COMPILE} x as fast as torch.compile"
    rows.append(_row(target, text, times is not None and times >= _TIMES_TORCH_COMPILE))
    return _TABLE + rows


def _is(entry: dict[str, Any], network: str) -> bool:
    return entry["case"]["network"] == network and entry["case"]["kind"] == "train"


def _median(entry: dict[str, Any], peer: str) -> float | None:
    ms = entry["peers"].get(peer, {}).get("ms")
    return median(ms) if ms else None


def _row(target: str, measured: str | None, met: bool) -> str:
    return f"| {target} | {measured or 'not measured'} | {'' if measured is None else 'yes' if met else 'no'} |"


def roofline_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Return for each measured training step how its time compares with that of moving its bytes; [] for none."""
    rows = []
    for entry in entries:
        ms = _median(entry, "ours")
        measured = entry["peers"].get("ours", {}).get("roofline")
        if not measured or ms is None:
            continue
        case, bandwidth = entry["case"], measured["copy_bytes_per_second"]
        xla_ms, least_ms = (1000 * measured[name] / bandwidth for name in ("xla_bytes", "minimum_bytes"))
        rows.append(
            f"| {case['network']} {case['dtype']}, batch {case['batch_size']} | {bandwidth / 1e9:,.0f} | {ms:.2f}"
            f" | {measured['xla_bytes'] / 1e9:.2f} | {xla_ms:.2f} | {ms / xla_ms:.2f}"
            f" | {measured['minimum_bytes'] / 1e9:.2f} | {least_ms:.2f} | {ms / least_ms:.2f}"
            f" | {measured['flops'] / ms / 1e9:.1f} |"
        )
    if not rows:
        return []
    header = (
        "| training step of ours | copy bandwidth, GB/s | measured, ms | XLA: GB | XLA: ms | measured / XLA"
        " | minimum: GB | minimum: ms | measured / minimum | TFLOP/s |"
    )
    return [
        header,
        "| --- |" + " ---: |" * 9,
        *rows,
        "",
        "Copy bandwidth: bytes read and written together by an elementwise kernel on 1 GiB, measured on this device in"
        " this run. XLA: the bytes of the compiled program by XLA's cost analysis, plus operands and results of library"
        " calls, which it leaves out. Minimum: an analytic count for perfect fusion (benchmarks/roofline.py). Both are"
        " turned into ms at the copy bandwidth; the gap to the roofline is measured / XLA and measured / minimum.",
    ]
