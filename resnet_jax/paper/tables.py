"""Tables 2 to 6: test errors, ours beside the paper's."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from resnet_jax.paper.artefact import Artefact, Command
from resnet_jax.paper.commands import evaluation_command, missing_commands
from resnet_jax.paper.items import ENSEMBLE, OTHER_ENSEMBLES, TABLES, Table
from resnet_jax.paper.networks import NETWORKS, Network, is_imagenet
from resnet_jax.paper.runs import Result, Runs, date_of

_RUN_COLUMNS = ("runs", "steps", "device", "date")
_HOW_TO_READ = (
    "Ours is the error of the last step that was tested, never of the best one. Several seeds are given as best (mean"
    " ± standard deviation, n-1)."
)


def make_results(name: str, runs: Runs) -> Artefact:
    """Fill Table 2, 3, 4 or 6 from runs."""
    table = TABLES[name]
    rows: list[tuple[str, ...]] = []
    notes, commands = [_HOW_TO_READ], []
    for labels, paper, network_name in table.lines:
        ours: list[tuple[str, ...]] = []
        if network_name:
            network = NETWORKS[network_name]
            ours = _our_cells(network, runs, table)
            notes += _differences(network, runs)
            commands += missing_commands(network, runs, protocol=table.protocol)
            if len(labels) < len(table.labels):
                labels = (*labels, f"{network.parameters:,}")
        for cells in ours or [("",) * (len(table.errors) + len(_RUN_COLUMNS))]:
            errors = itertools.chain(*zip(paper, cells, strict=False))
            rows.append((*labels, *errors, *cells[len(table.errors) :]))
    numbers = (f"{error}, {whose}" for error in table.errors for whose in ("paper", "ours"))
    return Artefact(name, table.title, (*table.labels, *numbers, *_RUN_COLUMNS), rows, notes, commands)


def _our_cells(network: Network, runs: Runs, table: Table) -> list[tuple[str, ...]]:
    """Return the cells of each group of runs that have done the same steps; finished ones first, imports last."""
    groups: dict[tuple[str | None, int], list[Result]] = {}
    for run in runs.of(network):
        if result := run.result(table.protocol):
            groups.setdefault((run.source, result.step), []).append(result)
    rows = []
    for (source, step), results in groups.items():
        top5 = [result.top5_error for result in results if result.top5_error is not None]
        errors = [
            _summary([result.top1_error for result in results]),
            _summary(top5) if len(top5) == len(results) else "",
        ]
        done = f"{step:,}" if step >= network.steps else f"{step:,} of {network.steps:,}"
        if source is not None:
            done = f"imported from {source}, not trained here"
        devices = ", ".join(sorted({result.device for result in results}))
        date = date_of(max(result.time for result in results))
        rows.append((*errors[: len(table.errors)], str(len(results)), done, devices, date))
    return rows


def _summary(errors: list[float]) -> str:
    """Format errors in %: one as it is, several as the paper does."""
    if len(errors) == 1:
        return f"{errors[0]:.2f}"
    return f"{min(errors):.2f} ({statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f})"


def _differences(network: Network, runs: Runs) -> list[str]:
    return [
        f"{run.workdir} was imported and differs from the paper's network: {difference}."
        for run in runs.of(network)
        if run.source is not None and (difference := network.difference(run.config.model))
    ]


def make_table5(runs: Runs) -> Artefact:
    """Fill Table 5 from the ensembles that eval.py has tested."""
    rows: list[tuple[str, ...]] = [(method, error, "", "", "", "") for method, error in OTHER_ENSEMBLES.items()]
    ensembles = [record for record in runs.ensembles() if is_imagenet(record["data"])]
    for record in sorted(ensembles, key=lambda record: record["top5_error"]):
        names = ", ".join(Path(member["workdir"]).name for member in record["members"])
        described = f"{len(record['members'])}: {names}"
        error, date = f"{record['top5_error']:.2f}", date_of(record["time"])
        rows.append((*ENSEMBLE, error, described, record["protocol"], date))
    commands: list[Command] = []
    if not ensembles:
        rows.append((*ENSEMBLE, "", "", "", ""))
        networks = [
            network for network in NETWORKS.values() if network.label.startswith("ResNet") and not network.is_cifar
        ]
        members = [run for network in networks for run in runs.of(network) if run.finished]
        if len(members) > 1:
            commands.append(evaluation_command(members, "multiscale", runs))
        else:
            commands += (command for network in networks for command in missing_commands(network, runs))
    return Artefact(
        "table5",
        "Table 5: top-5 error (%) of ensembles on ImageNet",
        ("method", "top-5 error, paper (test)", "top-5 error, ours (validation)", "networks", "protocol", "date"),
        rows,
        [
            "The paper's numbers are of the test set, whose labels are not public; ours are of the validation set. The"
            " paper combines six networks of different depth and names only that two have 152 layers."
        ],
        commands,
    )
