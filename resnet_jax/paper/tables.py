"""Tables 2 to 6: test errors, ours beside the paper's."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from resnet_jax.data.views import ProtocolName
from resnet_jax.paper.artefact import Artefact, Command, cheapest_first
from resnet_jax.paper.commands import evaluation_command, missing_commands
from resnet_jax.paper.networks import NETWORKS, Network, is_imagenet
from resnet_jax.paper.runs import Result, Run, Runs

_RUN_COLUMNS = ("runs", "steps", "device", "date")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of a table of results: what the paper calls it, its errors in %, and the network if it is one of ours."""

    labels: tuple[str, ...]
    paper: tuple[str, ...]
    network: Network | None = None


@dataclasses.dataclass(frozen=True)
class _Results:
    """A table of test errors; `errors` names its columns of numbers, "top-1 error" or "top-5 error"."""

    title: str
    labels: tuple[str, ...]
    errors: tuple[str, ...]
    protocol: ProtocolName
    lines: Callable[[], list[_Line]]


def _table2() -> list[_Line]:
    paper = {18: ("27.94", "27.88"), 34: ("28.54", "25.03")}
    return [
        _Line((f"{depth} layers", kind), (error,), NETWORKS[f"imagenet_{name}"])
        for depth, errors in paper.items()
        for kind, error, name in (
            ("plain", errors[0], f"plain{depth}"),
            ("ResNet", errors[1], f"resnet{depth}" + ("A" if depth == 34 else "")),
        )
    ]


def _table3() -> list[_Line]:
    return [
        _Line(("VGG-16",), ("28.07", "9.33"), NETWORKS["imagenet_vgg16"]),
        _Line(("GoogLeNet",), ("", "9.15")),
        _Line(("PReLU-net",), ("24.27", "7.38")),
        _Line(("plain-34",), ("28.54", "10.02"), NETWORKS["imagenet_plain34"]),
        _Line(("ResNet-34 A",), ("25.03", "7.76"), NETWORKS["imagenet_resnet34A"]),
        _Line(("ResNet-34 B",), ("24.52", "7.46"), NETWORKS["imagenet_resnet34B"]),
        _Line(("ResNet-34 C",), ("24.19", "7.40"), NETWORKS["imagenet_resnet34C"]),
        _Line(("ResNet-50",), ("22.85", "6.71"), NETWORKS["imagenet_resnet50"]),
        _Line(("ResNet-101",), ("21.75", "6.05"), NETWORKS["imagenet_resnet101"]),
        _Line(("ResNet-152",), ("21.43", "5.71"), NETWORKS["imagenet_resnet152"]),
    ]


def _table4() -> list[_Line]:
    return [
        _Line(("VGG (ILSVRC'14)",), ("", "8.43 (test)")),
        _Line(("GoogLeNet (ILSVRC'14)",), ("", "7.89")),
        _Line(("VGG (v5)",), ("24.4", "7.1")),
        _Line(("PReLU-net",), ("21.59", "5.71")),
        _Line(("BN-inception",), ("21.99", "5.81")),
        _Line(("ResNet-34 B",), ("21.84", "5.71"), NETWORKS["imagenet_resnet34B"]),
        _Line(("ResNet-34 C",), ("21.53", "5.60"), NETWORKS["imagenet_resnet34C"]),
        _Line(("ResNet-50",), ("20.74", "5.25"), NETWORKS["imagenet_resnet50"]),
        _Line(("ResNet-101",), ("19.87", "4.60"), NETWORKS["imagenet_resnet101"]),
        _Line(("ResNet-152",), ("19.38", "4.49"), NETWORKS["imagenet_resnet152"]),
    ]


def _table6() -> list[_Line]:
    others = [
        ("Maxout", "", "", "9.38"),
        ("NIN", "", "", "8.81"),
        ("DSN", "", "", "8.22"),
        ("FitNet", "19", "2.5M", "8.39"),
        ("Highway", "19", "2.3M", "7.54 (7.72 ± 0.16)"),
        ("Highway", "32", "1.25M", "8.80"),
    ]
    ours = [
        (20, "0.27M", "8.75"),
        (32, "0.46M", "7.51"),
        (44, "0.66M", "7.17"),
        (56, "0.85M", "6.97"),
        (110, "1.7M", "6.43 (6.61 ± 0.16)"),
        (1202, "19.4M", "7.93"),
    ]
    lines = [_Line((method, layers, params, ""), (error,)) for method, layers, params, error in others]
    for depth, params, error in ours:
        network = NETWORKS[f"cifar10_resnet{depth}"]
        lines.append(_Line(("ResNet", str(depth), params, f"{network.parameters:,}"), (error,), network))
    return lines


_RESULTS = {
    "table2": _Results(
        "Table 2: top-1 error (%, 10-crop testing) on ImageNet validation; ResNets with option A",
        ("depth", "network"),
        ("top-1 error",),
        "10crop",
        _table2,
    ),
    "table3": _Results(
        "Table 3: error (%, 10-crop testing) on ImageNet validation",
        ("model",),
        ("top-1 error", "top-5 error"),
        "10crop",
        _table3,
    ),
    "table4": _Results(
        "Table 4: error (%) of single models on ImageNet validation (ours: fully convolutional, five scales, mirrored)",
        ("method",),
        ("top-1 error", "top-5 error"),
        "multiscale",
        _table4,
    ),
    "table6": _Results(
        "Table 6: error (%) on the CIFAR-10 test set",
        ("method", "layers", "parameters, paper", "parameters, ours"),
        ("error",),
        "single",
        _table6,
    ),
}


def make_results(name: str, runs: Runs, data_dir: str | None) -> Artefact:
    """Fill Table 2, 3, 4 or 6 from runs.

    Args:
      name: "table2", "table3", "table4" or "table6".
      runs: that were found.
      data_dir: where the data set is; only for the commands.
    """
    table = _RESULTS[name]
    rows: list[tuple[str, ...]] = []
    commands: list[Command] = []
    for line in table.lines():
        ours = _our_cells(line.network, runs, table) if line.network else []
        for cells in ours or [("",) * (len(table.errors) + len(_RUN_COLUMNS))]:
            errors = tuple(itertools.chain(*zip(line.paper, cells, strict=False)))
            rows.append((*line.labels, *errors, *cells[len(table.errors) :]))
        if line.network:
            commands += missing_commands(line.network, runs, data_dir, protocol=table.protocol)
    numbers = tuple(f"{error}, {whose}" for error in table.errors for whose in ("paper", "ours"))
    notes = [_HOW_TO_READ, *_notes(runs, [line.network for line in table.lines() if line.network])]
    return Artefact(name, table.title, (*table.labels, *numbers, *_RUN_COLUMNS), rows, notes, cheapest_first(commands))


_HOW_TO_READ = (
    "Ours is the error of the last step that was tested, never of the best one. Several seeds are given as best (mean"
    " ± standard deviation, n-1)."
)


def _our_cells(network: Network, runs: Runs, table: _Results) -> list[tuple[str, ...]]:
    """Return the cells of each group of runs that have done the same steps; finished ones first, imports last."""
    rows = []
    tested = [(run, run.result(table.protocol)) for run in runs.of(network)]
    by_group: dict[tuple[str | None, int], list[tuple[Run, Result]]] = {}
    for run, result in tested:
        if result:
            by_group.setdefault((run.source, result.step), []).append((run, result))
    for (source, step), members in by_group.items():
        results = [result for _, result in members]
        errors = [_summary([result.top1_error for result in results])]
        if len(table.errors) > 1:
            top5 = [result.top5_error for result in results if result.top5_error is not None]
            errors.append(_summary(top5) if len(top5) == len(results) else "")
        done = f"{step:,}" if step >= network.steps else f"{step:,} of {network.steps:,}"
        if source is not None:
            done = f"imported from {source}, not trained here"
        devices = ", ".join(sorted({result.device for result in results}))
        rows.append((*errors, str(len(members)), done, devices, max(result.date for result in results)))
    return rows


def _summary(errors: list[float]) -> str:
    """Format errors in %: one as it is, several as the paper does."""
    if len(errors) == 1:
        return f"{errors[0]:.2f}"
    return f"{min(errors):.2f} ({statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f})"


def _notes(runs: Runs, networks: list[Network]) -> list[str]:
    imported = [run for run in runs.found if run.source is not None and run.network in networks]
    return [
        *runs.left_out,
        *(
            f"{run.workdir} was imported and differs from the paper's network: {difference}."
            for run in imported
            if (difference := run.network.difference(run.config.model))
        ),
    ]


def make_table5(runs: Runs, data_dir: str | None) -> Artefact:
    """Fill Table 5 from the ensembles that eval.py has tested."""
    rows: list[tuple[str, ...]] = [
        ("VGG (ILSVRC'14)", "7.32", "", "", "", ""),
        ("GoogLeNet (ILSVRC'14)", "6.66", "", "", "", ""),
        ("VGG (v5)", "6.8", "", "", "", ""),
        ("PReLU-net", "4.94", "", "", "", ""),
        ("BN-inception", "4.82", "", "", "", ""),
    ]
    ensembles = [record for record in runs.ensembles() if is_imagenet(record["data"])]
    for record in sorted(ensembles, key=lambda record: record["top5_error"]):
        names = ", ".join(Path(member["workdir"]).name for member in record["members"])
        result = Result(record["top1_error"], record["top5_error"], 0, record["count"], record["time"], "")
        described = f"{len(record['members'])}: {names}"
        row = (f"{record['top5_error']:.2f}", described, record["protocol"], result.date)
        rows.append(("ResNet (ILSVRC'15)", "3.57", *row))
    commands = []
    if not ensembles:
        rows.append(("ResNet (ILSVRC'15)", "3.57", "", "", "", ""))
        networks = [
            network for network in NETWORKS.values() if network.label.startswith("ResNet") and not network.is_cifar
        ]
        members = [run for network in networks for run in runs.of(network) if run.finished]
        if len(members) > 1:
            commands.append(evaluation_command(members, "multiscale", data_dir))
        else:
            for network in networks:
                commands += missing_commands(network, runs, data_dir)
    return Artefact(
        "table5",
        "Table 5: top-5 error (%) of ensembles on ImageNet",
        ("method", "top-5 error, paper (test)", "top-5 error, ours (validation)", "networks", "protocol", "date"),
        rows,
        [
            "The paper's numbers are of the test set, whose labels are not public; ours are of the validation set. The"
            " paper combines six networks of different depth and names only that two have 152 layers.",
            *runs.left_out,
        ],
        cheapest_first(commands),
    )
