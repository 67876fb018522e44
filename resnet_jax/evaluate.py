"""Test trained networks as the paper does: single view, 10-crop, multi-scale, and ensembles of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data import LabelledImages, load_test_images
from resnet_jax.data.inputs import check_classes
from resnet_jax.data.views import Protocol, ProtocolName
from resnet_jax.errors import BrokenDataError, DivergedError, UserError
from resnet_jax.files import append_line, atomic_write
from resnet_jax.inference.load import load, read_config
from resnet_jax.inference.predict import probabilities, protocol_of
from resnet_jax.metrics import Metrics, wrong_images
from resnet_jax.parallel.devices import environment
from resnet_jax.run.records import EVALUATIONS

_RECORDED = {"error": "top1_error"}  # what it is called there


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of an ensemble: its work directory, the step of its checkpoint, and how it was tested."""

    workdir: Path
    step: int
    protocol: Protocol


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The probabilities that one network, or several on average, give to the classes of every test image.

    Attributes:
      members: the networks; their softmax outputs are averaged (Sec. 4.1, Table 5).
      test: the images, but for unreadable ones.
      probabilities: [N, num_classes] float64.
      unreadable: images that could not be read, and why.
    """

    members: tuple[Member, ...]
    test: LabelledImages
    probabilities: np.ndarray
    unreadable: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Of the checkpoint of the first network."""
        return self.members[0].step

    @property
    def protocol(self) -> ProtocolName:
        return self.members[0].protocol.name

    @property
    def count(self) -> int:
        """Images."""
        return len(self.test)

    @functools.cached_property
    def metrics(self) -> Metrics:
        """Loss and errors, as sums by class in float64; the loss is -log of the probability of the class, in nats."""
        labels, classes = self.test.labels, self.probabilities.shape[1]
        of_class = self.probabilities[np.arange(self.count), labels]
        losses = -np.log(np.maximum(of_class, np.finfo(np.float64).tiny))
        wrong = wrong_images(self.probabilities, labels, np)
        return Metrics(
            loss=np.bincount(labels, losses, classes),
            wrong={name: np.bincount(labels, of_image, classes) for name, of_image in wrong.items()},
            count=np.bincount(labels, minlength=classes),
        )

    @property
    def loss(self) -> float:
        """In nats."""
        return self.metrics.mean_loss

    @property
    def top1_error(self) -> float:
        """In %."""
        return self.metrics.top1_error

    @property
    def top5_error(self) -> float:
        """In %."""
        return self.metrics.top5_error

    @property
    def class_errors(self) -> np.ndarray:
        """In % [num_classes]; NaN for a class without images."""
        return self.metrics.class_errors

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: errors in %, loss in nats; a class without images has error None."""
        errors = [None if np.isnan(error) else float(error) for error in self.class_errors]
        return {**self.summary(), "class_errors": dict(zip(self.test.class_names, errors, strict=True))}

    def summary(self) -> dict[str, Any]:
        """Return plain values, without those of each class."""
        members = [
            {"workdir": str(member.workdir), "step": member.step, "scales": list(member.protocol.scales)}
            for member in self.members
        ]
        return {
            "protocol": self.protocol,
            "members": members,
            "data": self.test.name,
            "count": self.count,
            **{_RECORDED.get(name, name): error for name, error in self.metrics.errors.items()},
            "loss": self.loss,
        }

    def save_predictions(self, path: Path) -> None:
        """Write ids, labels, class_names and probabilities (float32) as .npz, complete or not at all.

        Raises:
          UserError: it cannot be written.
        """
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                ids=np.array(self.test.ids),
                labels=self.test.labels,
                class_names=np.array(self.test.class_names),
                probabilities=self.probabilities.astype(np.float32),
            )


def evaluate(
    workdirs: Sequence[str | Path],
    *,
    protocol: ProtocolName = "single",
    scales: tuple[int, ...] | None = None,
    data_dir: str | None = None,
    step: int | None = None,
    batch_size: int | None = None,
    max_broken: float = 100.0,
) -> Evaluation:
    """Test the networks of work directories on every test image once, over all devices.

    Images that cannot be read are left out, as in the evaluations of a training.

    Args:
      workdirs: of runs or imports, or other sources of load(). The networks may differ in depth, input size and
        preprocessing.
      protocol: "single", "10crop" or "multiscale"; see views.Protocol for what is averaged.
      scales: see views.make_protocol.
      data_dir: where the data set is now, if not where it was.
      step: of the checkpoint, for a single work directory; None for the last one.
      batch_size: views computed at a time; None for the run's data.eval_batch_size.
      max_broken: images that may be left out, in % of all.

    Raises:
      UserError: no work directory, no such checkpoint, no data, other classes, or scales that do not fit.
      BrokenDataError: more images than that cannot be read, or none can.
      DivergedError: a network whose outputs are not finite.
    """
    if step is not None and len(workdirs) > 1:
        raise UserError(f"--step goes with one work directory; got {len(workdirs)}")
    folders = [Path(workdir) for workdir in workdirs]
    configs = [read_config(folder) for folder in folders]  # first: it tells a mistake at once
    if any(config.detects for config in configs):
        raise UserError("detection is tested with one work directory, by eval.py or evaluate_detection()")
    names = {config.data.name for config in configs}
    if len(names) > 1:
        raise UserError(f"networks of one ensemble need one data set; these are for {', '.join(sorted(names))}")
    data = configs[0].data
    test = load_test_images(data.name, data_dir or data.dir, upright=data.upright)
    members, total = [], np.zeros((len(test), len(test.class_names)))
    unreadable: dict[int, str] = {}
    for folder, config in zip(folders, configs, strict=True):
        trained = load(folder, step=step, scan_blocks=config.model.scan_blocks)
        of_member = protocol_of(trained, protocol, scales)
        check_classes(trained.origin.inputs, test)
        size = batch_size or config.data.eval_batch_size
        found = probabilities(trained, test.images, of_member, batch_size=size)
        unreadable |= found.unreadable
        _check_readable(unreadable, test, max_broken)
        total += found.values
        if not np.isfinite(np.delete(total, list(unreadable), 0)).all():  # errors like an untrained network's
            raise DivergedError(f"{folder}: the outputs of the network of step {trained.origin.step} are not finite")
        members.append(Member(folder, trained.origin.step, of_member))
    mean = np.delete(total, list(unreadable), 0) / len(members)
    named = tuple(f"{test.ids[index]}: {unreadable[index]}" for index in sorted(unreadable))
    return Evaluation(tuple(members), test.without(unreadable) if unreadable else test, mean, named)


def _check_readable(unreadable: dict[int, str], test: LabelledImages, max_broken: float) -> None:
    first = min(unreadable, default=0)
    if 100 * len(unreadable) > max_broken * len(test):
        raise BrokenDataError(
            f"cannot read {len(unreadable)} of {len(test)} test images, more than --max-broken {max_broken:g} %; the"
            f" first is {test.ids[first]}: {unreadable[first]}"
        )
    if len(unreadable) == len(test):
        raise BrokenDataError(f"none of the test images can be read; the first is {test.ids[0]}: {unreadable[0]}")


def record(evaluation: Evaluation) -> None:
    """Append an evaluation to evaluations.jsonl of each work directory, where the paper's tables look for it.

    A network that comes from a file has none.

    Raises:
      UserError: it cannot be written.
    """
    line = json.dumps({"time": round(time.time(), 3), **environment(), **evaluation.summary()})
    for member in evaluation.members:
        path = member.workdir / EVALUATIONS
        if not member.workdir.is_dir():
            continue
        try:
            with open(path, "ab", buffering=0, opener=_no_link) as file:
                append_line(file, line)
        except OSError as error:
            raise UserError(f"cannot record the evaluation in {path}: {os.strerror(error.errno or 0)}") from error


def _no_link(path: str, flags: int) -> int:
    # A work directory of others must not make this program write elsewhere, or wait for the other end of a pipe.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
