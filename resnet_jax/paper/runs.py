"""Find the runs below a folder, and which of the paper's networks each is."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from resnet_jax.config import Config
from resnet_jax.data.views import ProtocolName, make_protocol
from resnet_jax.errors import UserError
from resnet_jax.paper.networks import NETWORKS, Network
from resnet_jax.run.records import read_evaluations, read_records, with_fields
from resnet_jax.run.workdir import load_config, read_source

_NEEDED = {  # fields of the records that count
    "start": ("platform", "device", "devices"),
    "train": ("error",),
    "validation": ("error",),
    "test": ("error", "time"),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One number of one run: errors in %, the step of the checkpoint, when and on what it was measured.

    `top5_error` is None where only the top-1 error was recorded.
    """

    top1_error: float
    top5_error: float | None
    step: int
    time: float
    device: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A work directory that belongs to one of the paper's networks.

    Attributes:
      workdir: where it is.
      config: of the run.
      network: whose recipe it follows, or whose weights were imported.
      source: file that the weights were imported from; None if they were trained here.
      records: of metrics.jsonl.
      evaluations: of evaluations.jsonl, those on all test images.
    """

    workdir: Path
    config: Config
    network: Network
    source: str | None
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Steps done, as far as they are recorded."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def finished(self) -> bool:
        """Whether all of the paper's steps are done, here or by those who trained the imported weights."""
        return self.source is not None or self.step >= self.network.steps

    @property
    def device(self) -> str:
        """What the run was trained on."""
        starts = [record for record in self.records if record["kind"] == "start"]
        return describe_device(starts[-1]) if starts else ""

    def result(self, protocol: ProtocolName) -> Result | None:
        """Return the result of the last checkpoint tested by a protocol of the paper, or None."""
        results = [
            Result(
                record["top1_error"],
                record["top5_error"],
                record["members"][0]["step"],
                record["time"],
                describe_device(record) if self.source else self.device,
            )
            for record in self.evaluations
            if record["protocol"] == protocol and len(record["members"]) == 1 and self._has_the_papers_scales(record)
        ]
        if protocol == "single":
            results += [
                Result(record["error"], record.get("top5_error"), record["step"], record["time"], self.device)
                for record in self.records
                if record["kind"] == "test"
            ]
        return max(results, key=lambda result: (result.step, result.time), default=None)

    def _has_the_papers_scales(self, record: dict[str, Any]) -> bool:
        size = 32 if self.network.is_cifar else 224
        return tuple(record["members"][0]["scales"]) == make_protocol(record["protocol"], (size, size)).scales


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs below a folder.

    Attributes:
      root: the folder.
      data_dir: where the data set is, for the commands; None for where a run expects it.
      found: the runs of the paper's networks.
      left_out: a line for each work directory or evaluation that does not count: why.
    """

    root: Path
    data_dir: str | None
    found: tuple[Run, ...]
    left_out: tuple[str, ...]

    def of(self, network: Network) -> list[Run]:
        """Return the runs of a network; those that have come furthest first, imports last."""
        runs = [run for run in self.found if run.network is network]
        return sorted(runs, key=lambda run: (run.source is not None, -run.step, run.config.run.seed, run.workdir))

    def trained(self, network: Network) -> list[Run]:
        """Return those that were trained here."""
        return [run for run in self.of(network) if run.source is None]

    def ensembles(self) -> list[dict[str, Any]]:
        """Return the records of evaluations of several networks, each once."""
        records = [record for run in self.found for record in run.evaluations if len(record["members"]) > 1]
        unique = {(record["time"], str(record["members"])): record for record in records}
        return list(unique.values())


def find_runs(root: Path, data_dir: str | None = None) -> Runs:
    """Read every work directory below `root`.

    Raises:
      UserError: no such folder.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: --runs must name the folder that holds the work directories")
    found: dict[object, Run] = {}
    left_out: list[str] = []
    candidates: list[Run] = []
    for path in sorted(root.rglob("config.json")):
        if path.parent.name.endswith(".new"):
            continue  # being written
        try:
            candidates.append(_read(path.parent, left_out))
        except UserError as error:
            left_out.append(f"{path.parent} does not count: {error}")
    for run in sorted(candidates, key=lambda run: -run.step):
        key = run.workdir if run.source else (run.network, run.config.run.seed)
        first = found.setdefault(key, run)
        if first is not run:  # they would be no independent runs
            left_out.append(f"{run.workdir} does not count: {first.workdir} has the same seed")
    return Runs(root, data_dir, tuple(found.values()), tuple(left_out))


def _read(workdir: Path, left_out: list[str]) -> Run:
    """Return the run; evaluations that do not count are named in `left_out`.

    Raises:
      UserError: it is none of the paper's, or damaged.
    """
    config, source = load_config(workdir), read_source(workdir)
    network = next((network for network in NETWORKS.values() if network.is_of(config)), None)
    if network is None:
        model = config.model
        described = f"{model.family} {model.depth}, shortcut {model.shortcut}, on {config.data.name}"
        raise UserError(f"{described} is not in the paper")
    if source is None and (deviation := network.deviation(config)):
        raise UserError(f"not the paper's recipe: {deviation}")
    evaluations = []
    for record in read_evaluations(workdir):
        if record["count"] == network.test_images:
            evaluations.append(record)
        else:
            images = f"{record['count']:,} of {network.test_images:,} test images"
            left_out.append(f"an evaluation of {workdir} does not count: {images}")
    return Run(workdir, config, network, source, with_fields(read_records(workdir), _NEEDED), evaluations)


def describe_device(record: dict[str, Any]) -> str:
    """Name the devices of a record that holds environment()."""
    count = record["devices"]
    if record["platform"] == "cpu":
        return f"{count} core{'s' * (count > 1)} of {record['device']}"
    return f"{count} x {record['device']}" if count > 1 else record["device"]


def date_of(time: float) -> str:
    """Return the day of a time in seconds, as 2023-11-14."""
    return datetime.datetime.fromtimestamp(time).date().isoformat()
