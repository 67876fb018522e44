"""The lines of a work directory's logs; those that are not sound are left out when they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Le, Lt, MinLen

from resnet_jax.files import read_json_lines

Record = dict[str, Any]
FILE_NAME, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"

Count = Annotated[int, Ge(0), Lt(2**53)]
Step = Annotated[int, Ge(0), Lt(2**31)]
Time = Annotated[float, Ge(0), Le(2.5e11)]  # seconds since 1970: dates end with the year 9999
Percent = Annotated[float, Ge(0), Le(100)]
Number = Annotated[float, Ge(0), Le(1e30)]  # beyond it sums and curves overflow


class _Sound(pydantic.BaseModel):
    """Further fields are allowed; a field with a default may be missing."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class RunRecord(_Sound):
    """A line of metrics.jsonl.

    "start": a process has begun or gone on after `step`; it has versions and devices. "train": averages over the
    steps since the record before it, up to `step`. "validation" and "test": evaluations after `step`.
    """

    kind: Literal["start", "train", "validation", "test"]
    step: Step
    time: Time = 0.0
    platform: str = ""
    device: str = ""
    devices: Annotated[int, Ge(1), Lt(2**31)] = 1
    loss: Number = 0.0
    """In nats."""
    error: Percent = 0.0
    """Wrongly classified images; those of "train" are augmented."""
    top5_error: Percent = 0.0
    images: Count = 0
    learning_rate: Number = 0.0
    """Of the last step."""
    gradient_norm: Number = 0.0
    images_per_second: Number = 0.0
    skipped: Count = 0
    """Images that could not be read."""
    rpn_class_loss: Number = 0.0
    """Of detection, of an image on average, as the next three."""
    rpn_box_loss: Number = 0.0
    region_class_loss: Number = 0.0
    region_box_loss: Number = 0.0
    mean_average_precision: Percent | None = None
    """At an IoU above 0.5; None where there are no objects."""
    average_precision: dict[str, Percent | None] = {}
    """Of each class."""
    recall: Percent | None = None
    average_recall: Percent | None = None


class _Member(_Sound):
    workdir: str
    step: Step
    scales: list[Annotated[int, Ge(1), Lt(2**16)]]


class EvaluationRecord(_Sound):
    """A line of evaluations.jsonl."""

    protocol: Literal["single", "10crop", "multiscale"]
    members: Annotated[list[_Member], MinLen(1)]
    time: Time
    data: str
    platform: str
    device: str
    devices: Annotated[int, Ge(1), Lt(2**31)]
    count: Count
    top1_error: Percent
    top5_error: Percent


def read_records(workdir: Path) -> list[Record]:
    """Return the records of metrics.jsonl in order; what is damaged is left out."""
    return [record for record in read_json_lines(workdir / FILE_NAME) if _is_sound(record, RunRecord)]


def read_evaluations(workdir: Path) -> list[Record]:
    """Return what evaluate.record() has written, in order; what is damaged is left out."""
    return [record for record in read_json_lines(workdir / EVALUATIONS) if _is_sound(record, EvaluationRecord)]


def _is_sound(record: Record, model: type[_Sound]) -> bool:
    try:
        model.model_validate(record)
    except pydantic.ValidationError:
        return False
    return True


def with_fields(records: Iterable[Record], fields: Mapping[str, Collection[str]]) -> list[Record]:
    """Return the records that have all the fields which `fields` names for their kind."""
    return [record for record in records if all(name in record for name in fields.get(record["kind"], ()))]
