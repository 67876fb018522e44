"""Training curves like the paper's Fig. 6."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resnet_jax.files import atomic_write
from resnet_jax.run.records import read_records, with_fields

_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linestyle": "--", "linewidth": 1},
    "validation": {"linestyle": ":", "linewidth": 2},
    "test": {"linestyle": "-", "linewidth": 2},
}


def plot_curves(workdir: Path, title: str) -> Path:
    """Draw training and test error in % over steps from metrics.jsonl; write WORKDIR/curves.png.

    As in Fig. 6, dashed lines are training error (on augmented images, averaged between log points) and bold
    lines test error. Thin vertical lines mark where the learning rate changed.
    """
    records = read_records(workdir)
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, records, "error")
    axes.set_title(title, parse_math=False)  # a name may hold dollars
    axes.set(ylabel="error (%)")
    path = workdir / "curves.png"
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")
    return path


def draw_curves(axes: Axes, records: list[dict[str, Any]], quantity: str) -> None:
    """Draw the `quantity` ("error" or "loss") of training, validation and test records over steps."""
    for kind, style in _STYLES.items():
        points = [
            (record["step"], record[quantity])
            for record in with_fields(records, {kind: [quantity]})
            if record["kind"] == kind
        ]
        if points:
            marker = "o" if len(points) < 3 else None
            axes.plot(*zip(*points, strict=True), label=f"{kind} {quantity}", marker=marker, color="C0", **style)
    train = [record for record in with_fields(records, {"train": ["learning_rate"]}) if record["kind"] == "train"]
    for before, after in itertools.pairwise(train):
        if before["learning_rate"] != after["learning_rate"]:
            axes.axvline(before["step"], color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="step", xlim=(0, None), ylim=(0, None))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right")
