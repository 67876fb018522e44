"""What the device does in a training step: its kernels, summed up by kind."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

# The first that is found in a kernel's name is its kind. cuDNN and cuBLAS name their kernels after the algorithm
# (sm80_xmma_wgrad_implicit_gemm_..., nvjet_...), XLA after the kind of fusion and its last operation
# (input_reduce_fusion_12, loop_add_fusion).
_KINDS = (
    ("weight gradients", r"wgrad"),
    ("data gradients", r"dgrad"),
    (
        "cuDNN's conversions",
        r"nchwtonhwc|nhwctonchw|foldednhwc|converttensor|computeoffsets|cudnn.*(transpose|reorder)",
    ),
    (
        "forward convolutions and products",
        r"fprop|gemm|gemv|convol|conv[123]d|xmma|cutlass|nvjet|winograd|splitk|^dot\b|_dot_",
    ),
    ("other", r"scatter|gather|reduce.window|sort|rng"),
    ("XLA reductions", r"reduce|reduction"),
    ("copies", r"memcpy|memset|copy|transpose|slice|concatenate|bitcast"),
    ("elementwise", r"loop_|wrapped_|fusion|convert|elementwise"),
)
KINDS = (*(kind for kind, _ in _KINDS if kind != "other"), "other")


class Kernel(NamedTuple):
    """One run of a kernel, in ns."""

    name: str
    start: float
    duration: float


def kind_of(name: str) -> str:
    """Return which of KINDS a kernel is by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def summarize(kernels: Iterable[Kernel], steps: int, most: int = 40) -> dict[str, Any]:
    """Sum up what ran during some steps.

    Returns:
      Per step: "kernels", "busy_us" (when at least one ran) of "span_us" (from the first to the last), "kinds" (by
      kind: [us, kernels]) and "longest" ([name, us, kernels] of the names that took longest, `most` at most).
    """
    by_kind: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in KINDS}
    by_name: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    busy, end = 0.0, float("-inf")
    for name, start, duration in ordered:
        for sums in (by_kind[kind_of(name)], by_name[name]):
            sums[0] += duration / steps / 1000
            sums[1] += 1 / steps
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:most]
    return {
        "steps": steps,
        "kernels": len(ordered) / steps,
        "busy_us": busy / steps / 1000,
        "span_us": (end - ordered[0].start) / steps / 1000 if ordered else 0.0,
        "kinds": {kind: [round(us, 2), round(count, 2)] for kind, (us, count) in by_kind.items()},
        "longest": [[name[:160], round(us, 2), round(count, 2)] for name, (us, count) in longest],
    }


def profile(run: Callable[[], object], steps: int) -> dict[str, Any]:
    """Trace what makes so many steps and returns when they are done, and sum up the first device's kernels."""
    import jax  # the sums do without

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return summarize(_kernels(jax.profiler.ProfileData.from_file(str(path))), steps)


def _kernels(data: Any) -> list[Kernel]:
    """Return what ran on the first GPU, in the lines of its streams; without one, the operations of XLA on the CPU."""
    planes = {plane.name: plane for plane in data.planes}
    on_gpu = [name for name in planes if name.startswith("/device:GPU")]
    plane = planes[min(on_gpu) if on_gpu else "/host:CPU"]
    lines = [line for line in plane.lines if line.name.startswith("Stream" if on_gpu else "tf_XLA")]
    events = [Kernel(event.name, event.start_ns, event.duration_ns) for line in lines for event in line.events]
    return [event for event in events if on_gpu or re.fullmatch(r"[a-z][\w.\-]*", event.name)]
