"""Table 1, read off our networks, and Tables 2 to 6: test errors, ours beside the paper's."""

from __future__ import annotations

import functools
import itertools
import statistics
from pathlib import Path

from resnet_jax.models import create_model
from resnet_jax.paper.analysis.summary import Layer, Summary, summarize
from resnet_jax.paper.artefact import Artefact, Command
from resnet_jax.paper.commands import evaluation_command, missing_commands
from resnet_jax.paper.items import ENSEMBLE, FLOPS, OTHER_ENSEMBLES, TABLES, Table
from resnet_jax.paper.networks import NETWORKS, Network, is_imagenet
from resnet_jax.paper.runs import Result, Runs, date_of

_RUN_COLUMNS = ("runs", "steps", "device", "date")
_HOW_TO_READ = (
    "Ours is the error of the last step that was tested, never of the best one. Several seeds are given as best (mean"
    " ± standard deviation, n-1)."
)


def make_table1() -> Artefact:
    """Return the architectures, read off our networks, with the paper's FLOPs beside ours."""
    summaries = {depth: _summarize(depth) for depth in FLOPS}
    rows: list[tuple[str, ...]] = []
    for stage in range(1, 6):
        layers = [_of_stage(summary, stage) for summary in summaries.values()]
        side = layers[0][-1].output_shape[0]
        rows.append((f"conv{stage}" + ("_x" if stage > 1 else ""), f"{side}x{side}", *map(_describe_stage, layers)))
    ours = summaries.values()
    rows.append(("", "1x1", *(f"average pool, {summary.layers[-1].out_features}-d fc" for summary in ours)))
    rows.append(("FLOPs, paper", "", *(f"{flops}e9" for flops in FLOPS.values())))
    rows.append(("FLOPs, ours", "", *(f"{summary.multiply_adds:,}" for summary in ours)))
    rows.append(("parameters, ours", "", *(f"{summary.params:,}" for summary in ours)))
    columns = ("layer name", "output size", *(f"{depth}-layer" for depth in FLOPS))
    notes = [
        "Read off the networks of this package: shortcuts A with 18 and 34 layers, else B. FLOPs are multiply-adds of"
        " convolutions and fully-connected layers, projections included; docs/networks.md explains the differences."
    ]
    return Artefact("table1", "Table 1: architectures for ImageNet", columns, rows, notes, [])


@functools.cache
def _summarize(depth: int) -> Summary:
    name = f"resnet{depth}"
    return summarize(name, create_model(name, shortcut="A" if depth < 50 else "B"), 224)


def _of_stage(summary: Summary, stage: int) -> list[Layer]:
    """Return the layers of conv1 (stage 1), conv2_x (2) and so on; projections are not listed in the paper's table."""
    prefix = "stem" if stage == 1 else f"stage{stage - 1}_"
    layers = [layer for layer in summary.layers if layer.name.startswith(prefix) and "shortcut" not in layer.name]
    pool = [layer for layer in summary.layers if layer.kind == "max_pool"]
    return pool + layers if stage == 2 else layers


def _describe_stage(layers: list[Layer]) -> str:
    """Write layers as the paper does: [3x3, 64; 3x3, 64] x2."""
    if layers[0].kind == "conv" and "/" not in layers[0].name:
        return f"{layers[0].kernel[0]}x{layers[0].kernel[1]}, {layers[0].out_features}, stride {layers[0].stride[0]}"
    pool = ""
    if layers[0].kind == "max_pool":
        pool = f"{layers[0].kernel[0]}x{layers[0].kernel[1]} max pool, stride {layers[0].stride[0]}; "
        layers = layers[1:]
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        block = layer.name.split("/")[0]
        blocks.setdefault(block, []).append(f"{layer.kernel[0]}x{layer.kernel[1]}, {layer.out_features}")
    (kind,) = set(map(tuple, blocks.values()))  # all blocks of a stage are equal
    return f"{pool}[{'; '.join(kind)}] x{len(blocks)}"


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
