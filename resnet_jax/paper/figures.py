"""Figures 1, 4, 6 and 7 of the paper, drawn from runs with the paper's axes."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_jax.paper.analysis.responses import Responses
from resnet_jax.paper.artefact import Artefact, Command, cheapest_first
from resnet_jax.paper.commands import missing_commands
from resnet_jax.paper.networks import NETWORKS, Network
from resnet_jax.paper.runs import Run, Runs

matplotlib.rcParams["svg.hashsalt"] = "resnet_jax"  # the same runs make the same files

Kind = Literal["train", "test"]
_DASHES: dict[Kind, dict[str, Any]] = {
    "train": {"linestyle": "--", "linewidth": 1},
    "test": {"linestyle": "-", "linewidth": 2},
}
_COLORS = {18: "C0", 20: "C0", 32: "C1", 34: "C3", 44: "C2", 56: "C3", 110: "black", 1202: "C4"}


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One pair of axes: which networks, which errors."""

    title: str
    networks: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("train", "test")
    ylabel: str = "error (%)"


@dataclasses.dataclass(frozen=True)
class _Curves:
    """A figure of training curves; the axes are the paper's, iterations in 1e4 and error in %."""

    title: str
    panels: tuple[_Panel, ...]
    iterations: float
    errors: tuple[float, float]


_CIFAR_DEPTHS = (20, 32, 44, 56)
_CURVES = {
    "figure1": _Curves(
        'Figure 1: training error (left) and test error (right) on CIFAR-10 of "plain" networks',
        (
            _Panel("", ("cifar10_plain20", "cifar10_plain56"), ("train",), "training error (%)"),
            _Panel("", ("cifar10_plain20", "cifar10_plain56"), ("test",), "test error (%)"),
        ),
        6.4,
        (0, 20),
    ),
    "figure4": _Curves(
        "Figure 4: training on ImageNet; dashed: training error, bold: validation error of the center crops",
        (
            _Panel("plain", ("imagenet_plain18", "imagenet_plain34")),
            _Panel("ResNet", ("imagenet_resnet18", "imagenet_resnet34A")),
        ),
        60,
        (20, 60),
    ),
    "figure6": _Curves(
        "Figure 6: training on CIFAR-10; dashed: training error, bold: test error",
        (
            _Panel("plain", tuple(f"cifar10_plain{depth}" for depth in _CIFAR_DEPTHS)),
            _Panel("ResNet", tuple(f"cifar10_resnet{depth}" for depth in (*_CIFAR_DEPTHS, 110))),
            _Panel("ResNet", ("cifar10_resnet110", "cifar10_resnet1202")),
        ),
        6.4,
        (0, 20),
    ),
}
_RUN_COLUMNS = ("steps", "training error, %", "test error, %", "seed", "device", "date")


def make_curves(name: str, runs: Runs, data_dir: str | None) -> Artefact:
    """Draw Figure 1, 4 or 6.

    Args:
      name: "figure1", "figure4" or "figure6".
      runs: that were found; imported ones have no curves.
      data_dir: where the data set is; only for the commands.
    """
    spec = _CURVES[name]
    networks = list(dict.fromkeys(NETWORKS[name] for panel in spec.panels for name in panel.networks))
    shown = [
        run for network in networks for run in runs.trained(network) if _points(run, "train") or _points(run, "test")
    ]
    finished = any(run.finished for run in shown)
    furthest = max((run.step for run in shown), default=0)
    figure = Figure(figsize=(4.6 * len(spec.panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(spec.panels), squeeze=False)[0], spec.panels, strict=True):
        _draw_panel(axes, panel, runs, unit=1 if shown and not finished else 10_000)
        axes.set(title=panel.title, ylabel=panel.ylabel)
        if shown and not finished:
            axes.set(xlabel="iter.", xlim=(0, furthest), ylim=(0, 100))
        else:  # the paper's axes, so that the two can be laid beside each other
            axes.set(xlabel="iter. (1e4)", xlim=(0, spec.iterations), ylim=spec.errors)
    notes = ["Training error is of augmented images, averaged between log points; test error of all test images."]
    if shown and not finished:
        caveat = f"the first {furthest:,} of {shown[0].network.steps:,} steps only: not the paper's axes, no result"
        figure.suptitle(caveat[0].upper() + caveat[1:], fontsize="medium")
        notes.append(f"No run is finished: {caveat}.")
    rows = [_run_row(run) for run in shown]
    commands = [
        command for network in networks for command in missing_commands(network, runs, data_dir, seeds=1, curves=True)
    ]
    points: list[tuple[str, ...]] = [("network", "workdir", "kind", "step", "error_percent")]
    for run in shown:
        for kind in ("train", "test"):
            points += [
                (run.network.label, str(run.workdir), kind, str(step), f"{error:.4f}")
                for step, error in _points(run, kind)
            ]
    return Artefact(
        name,
        spec.title,
        ("network", *_RUN_COLUMNS),
        rows or [("",) * (len(_RUN_COLUMNS) + 1)],
        [*notes, *runs.left_out],
        cheapest_first(commands),
        figure,
        points,
    )


def _draw_panel(axes: Axes, panel: _Panel, runs: Runs, *, unit: int) -> None:
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
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right")
    else:
        axes.text(0.5, 0.5, "no run", ha="center", color="0.5", transform=axes.transAxes)


def _points(run: Run, kind: str) -> list[tuple[int, float]]:
    """Return (step, error in %)."""
    return [(record["step"], record["error"]) for record in run.records if record["kind"] == kind]


def _run_row(run: Run) -> tuple[str, ...]:
    train, test = ([f"{error:.2f}" for _, error in _points(run, kind)] for kind in ("train", "test"))
    result = run.result("single")
    steps = f"{run.step:,} of {run.network.steps:,}"
    ends = (train[-1] if train else "", test[-1] if test else "")
    return (run.network.label, steps, *ends, str(run.config.run.seed), run.device, result.date if result else "")


_RESPONSES = ("cifar10_plain20", "cifar10_plain56", "cifar10_resnet20", "cifar10_resnet56", "cifar10_resnet110")


def make_figure7(runs: Runs, data_dir: str | None) -> Artefact:
    """Draw the standard deviations of layer responses: in order (top), and in descending order (bottom)."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    rows: list[tuple[str, ...]] = []
    measured: dict[Network, Responses] = {}
    commands: list[Command] = []
    points: list[tuple[str, ...]] = [("network", "workdir", "step", "layer", "index", "std")]
    for name in _RESPONSES:
        network = NETWORKS[name]
        commands += missing_commands(network, runs, data_dir, seeds=1, responses=True)
        run, responses = next(((run, run.responses) for run in runs.of(network) if run.responses), (None, None))
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
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
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
        [*_statements(measured), *runs.left_out],
        cheapest_first(commands),
        figure,
        points,
    )


def _statements(measured: dict[Network, Responses]) -> list[str]:
    """Check what the paper says of Fig. 7 on the networks that there are."""
    by_name = {network.name.removeprefix("cifar10_"): responses for network, responses in measured.items()}
    statements = []
    for smaller, larger, claim in (
        ("resnet20", "plain20", "ResNets have generally smaller responses than their plain counterparts"),
        ("resnet56", "plain56", "ResNets have generally smaller responses than their plain counterparts"),
        ("resnet56", "resnet20", "the deeper ResNet has smaller magnitudes of responses"),
        ("resnet110", "resnet56", "the deeper ResNet has smaller magnitudes of responses"),
    ):
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
