"""Figures 1, 4, 6 and 7 of the paper, drawn from runs with the paper's axes."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_jax.paper.analysis.responses import Responses, read_responses
from resnet_jax.paper.artefact import Artefact, Command
from resnet_jax.paper.commands import missing_commands
from resnet_jax.paper.items import CLAIMS, CURVES, RESPONSES, Kind, Panel
from resnet_jax.paper.networks import NETWORKS, Network
from resnet_jax.paper.runs import Run, Runs, date_of

_DASHES: dict[Kind, dict[str, Any]] = {
    "train": {"linestyle": "--", "linewidth": 1},
    "test": {"linestyle": "-", "linewidth": 2},
}
_COLORS = {18: "C0", 20: "C0", 32: "C1", 34: "C3", 44: "C2", 56: "C3", 110: "black", 1202: "C4"}
_COLUMNS = ("network", "steps", "training error, %", "test error, %", "seed", "device", "date")


def make_curves(name: str, runs: Runs) -> Artefact:
    """Draw Figure 1, 4 or 6; imported networks have no curves."""
    spec = CURVES[name]
    networks = list(dict.fromkeys(NETWORKS[name] for panel in spec.panels for name in panel.networks))
    shown = [
        run for network in networks for run in runs.trained(network) if _points(run, "train") or _points(run, "test")
    ]
    unfinished = bool(shown) and not any(run.finished for run in shown)
    furthest = max((run.step for run in shown), default=0)
    figure = Figure(figsize=(4.6 * len(spec.panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(spec.panels), squeeze=False)[0], spec.panels, strict=True):
        _draw_panel(axes, panel, runs, unit=1 if unfinished else 10_000)
        axes.set(title=panel.title, ylabel=panel.ylabel)
        if unfinished:
            axes.set(xlabel="iter.", xlim=(0, furthest), ylim=(0, 100))
        else:  # the paper's axes, so that the two can be laid beside each other
            axes.set(xlabel="iter. (1e4)", xlim=(0, spec.iterations), ylim=spec.errors)
    notes = ["Training error is of augmented images, averaged between log points; test error of all test images."]
    if unfinished:
        caveat = f"the first {furthest:,} of {shown[0].network.steps:,} steps only: not the paper's axes, no result"
        figure.suptitle(caveat[0].upper() + caveat[1:], fontsize="medium")
        notes.append(f"No run is finished: {caveat}.")
    rows = [_run_row(run) for run in shown] or [("",) * len(_COLUMNS)]
    points: list[tuple[str, ...]] = [("network", "workdir", "kind", "step", "error_percent")]
    points += [
        (run.network.label, str(run.workdir), kind, str(step), f"{error:.4f}")
        for run in shown
        for kind in _DASHES
        for step, error in _points(run, kind)
    ]
    commands = [command for network in networks for command in missing_commands(network, runs, seeds=1, curves=True)]
    return Artefact(name, spec.title, _COLUMNS, rows, notes, commands, figure, points)


def _draw_panel(axes: Axes, panel: Panel, runs: Runs, *, unit: int) -> None:
    for name in panel.networks:
        network = NETWORKS[name]
        for run, kind in itertools.product(runs.trained(network), panel.kinds):
            if points := [(step / unit, error) for step, error in _points(run, kind)]:
                # One entry a network in the legend: the bold line of its first run.
                first = run is runs.trained(network)[0] and kind == panel.kinds[-1]
                marker = "o" if len(points) == 1 else None
                label = network.label if first else None
                color = _COLORS[network.config.model.depth]
                axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, **_DASHES[kind])
    _style(axes)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right")
    else:
        axes.text(0.5, 0.5, "no run", ha="center", color="0.5", transform=axes.transAxes)


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _points(run: Run, kind: str) -> list[tuple[int, float]]:
    """Return (step, error in %)."""
    return [(record["step"], record["error"]) for record in run.records if record["kind"] == kind]


def _run_row(run: Run) -> tuple[str, ...]:
    train, test = ([f"{error:.2f}" for _, error in _points(run, kind)] for kind in ("train", "test"))
    result = run.result("single")
    steps = f"{run.step:,} of {run.network.steps:,}"
    ends = (train[-1] if train else "", test[-1] if test else "")
    date = date_of(result.time) if result else ""
    return (run.network.label, steps, *ends, str(run.config.run.seed), run.device, date)


def make_figure7(runs: Runs) -> Artefact:
    """Draw the standard deviations of layer responses: in order (top), and in descending order (bottom)."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    rows: list[tuple[str, ...]] = []
    measured: dict[Network, Responses] = {}
    commands: list[Command] = []
    points: list[tuple[str, ...]] = [("network", "workdir", "step", "layer", "index", "std")]
    for network in map(NETWORKS.__getitem__, RESPONSES):
        commands += missing_commands(network, runs, seeds=1, responses=True)
        found = ((run, read_responses(run.workdir)) for run in runs.of(network))
        run, responses = next(((run, responses) for run, responses in found if responses), (None, None))
        if run is None or responses is None:
            continue
        measured[network] = responses
        layers = range(1, len(responses.stds) + 1)
        plain = network.config.model.shortcut == "none"
        style = {
            "color": _COLORS[network.config.model.depth],
            "linestyle": "--" if plain else "-",
            "linewidth": 1.2 if plain else 2,
        }
        top.plot(layers, responses.stds, label=network.label, **style)
        bottom.plot(layers, responses.sorted_stds, label=network.label, **style)
        steps = f"{responses.step:,} of {network.steps:,}" if run.source is None else f"imported from {run.source}"
        stds = (f"{responses.mean_std:.3f}", f"{responses.sorted_stds[0]:.3f}", f"{responses.sorted_stds[-1]:.3f}")
        rows.append((network.label, steps, str(len(responses.stds)), *stds, f"{responses.images:,}"))
        points += [
            (network.label, str(run.workdir), str(responses.step), layer, str(index), f"{std:.6f}")
            for index, (layer, std) in enumerate(zip(responses.layers, responses.stds, strict=True), start=1)
        ]
    for axes, order in ((top, "original"), (bottom, "sorted by magnitude")):
        axes.set(xlabel=f"layer index ({order})", ylabel="std", xlim=(0, None), ylim=(0, None))
        _style(axes)
        if axes.lines:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the many lines
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    unfinished = [network for network, responses in measured.items() if 0 < responses.step < network.steps]
    if unfinished:
        furthest = max(measured[network].step for network in unfinished)
        figure.suptitle(f"Networks after {furthest:,} of 64,000 steps or fewer: no result", fontsize="medium")
    return Artefact(
        "figure7",
        "Figure 7: standard deviations of layer responses on CIFAR-10, after BN and before ReLU or addition",
        ("network", "steps", "3x3 layers", "mean std", "largest", "smallest", "test images"),
        rows or [("",) * 7],
        _statements(measured),
        commands,
        figure,
        points,
    )


def _statements(measured: dict[Network, Responses]) -> list[str]:
    """Check what the paper says of Fig. 7 on the networks that there are."""
    by_name = {network.name.removeprefix("cifar10_"): responses for network, responses in measured.items()}
    statements = []
    for smaller, larger, claim in CLAIMS:
        if smaller not in by_name or larger not in by_name:
            continue
        ours, theirs = by_name[smaller], by_name[larger]
        means, medians = (
            [function(r.stds) for r in (ours, theirs)] for function in (statistics.mean, statistics.median)
        )
        signs = {means[0] < means[1], medians[0] < medians[1]}
        numbers = f"mean over the layers {means[0]:.3f} ({smaller}), {means[1]:.3f} ({larger})"
        numbers += f", median {medians[0]:.3f}, {medians[1]:.3f}"
        if len(ours.stds) == len(theirs.stds):  # networks of one depth: layer by layer
            fewer = sum(a < b for a, b in zip(ours.stds, theirs.stds, strict=True))
            signs.add(2 * fewer > len(ours.stds))
            numbers += f"; smaller in {fewer} of {len(ours.stds)} layers"
        verdict = "holds in part" if len(signs) == 2 else "holds" if True in signs else "does not hold"
        statements.append(f'"{claim}" {verdict} here: {numbers}.')
    return statements
