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
    lines test error. Of detection: average precision in tests, and the four losses in training. Thin vertical lines
    mark where the learning rate changed.
    """
    records = read_records(workdir)
    if any("region_class_loss" in record for record in records):
        figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_precisions(left, records)
        draw_losses(right, records)
        figure.suptitle(title, parse_math=False)
    else:
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
    _mark_rates(axes, records)
    axes.set(xlabel="step", xlim=(0, None), ylim=(0, None))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right")


def draw_precisions(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Draw the mean average precision of tests in %, and that of each class, up to 20, over steps."""
    tests = [
        record for record in records if record["kind"] == "test" and record.get("mean_average_precision") is not None
    ]
    names = list(dict.fromkeys(name for record in tests for name in record.get("average_precision", {})))
    for name in names if len(names) <= 20 else []:
        points = [
            (record["step"], record["average_precision"][name])
            for record in tests
            if record.get("average_precision", {}).get(name) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3, linewidth=1)
    if tests:
        means = [(record["step"], record["mean_average_precision"]) for record in tests]
        axes.plot(*zip(*means, strict=True), label="mean", marker="o", markersize=4, linewidth=2, color="black")
    _mark_rates(axes, records)
    axes.set(xlabel="step", ylabel="AP at IoU 0.5 (%)", xlim=(0, None), ylim=(0, 100))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="lower right", fontsize=8)


def draw_losses(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Draw the four losses of detection in training over steps."""
    for name in ("rpn_class_loss", "rpn_box_loss", "region_class_loss", "region_box_loss"):
        points = [(record["step"], record[name]) for record in records if record["kind"] == "train" and name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.removesuffix("_loss").replace("_", " "), linewidth=1.2)
    _mark_rates(axes, records)
    axes.set(xlabel="step", ylabel="training loss", xlim=(0, None), ylim=(0, None))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right", fontsize=8)


def _mark_rates(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Draw thin lines where the rate changed, by a factor and not little by little."""
    train = [record for record in with_fields(records, {"train": ["learning_rate"]}) if record["kind"] == "train"]
    for before, after in itertools.pairwise(train):
        low, high = sorted(record["learning_rate"] for record in (before, after))
        if high > 2 * low > 0:
            axes.axvline(before["step"], color="0.8", linewidth=0.8, zorder=0)
