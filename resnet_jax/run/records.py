"""Which lines of a work directory's logs are sound: their fields are of the types and sizes that readers rely on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from resnet_jax.files import read_json_lines

Record = dict[str, Any]

_KINDS = ("start", "train", "validation", "test")
_MOST_STEPS = 2**31
_LATEST = 2.5e11  # seconds since 1970: dates end with the year 9999
_LARGEST = 1e30  # of all numbers that are recorded; beyond it sums and curves overflow
_PERCENT = ("error", "top5_error", "top1_error")
_WHOLE = ("images", "count")
_TEXTS = ("platform", "device", "data")


FILE_NAME = "metrics.jsonl"


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl in order; what is damaged is left out."""
    return [record for record in read_json_lines(workdir / FILE_NAME) if is_run_record(record)]


def is_run_record(record: Record) -> bool:
    """Tell whether a line of metrics.jsonl has a kind and a step, and its other fields are sound."""
    if record.get("kind") not in _KINDS or "step" not in record:
        return False
    if record["kind"] == "start":  # which also has whatever describes the environment
        return all(_is_sound(name, record[name]) for name in ("step", "time", "devices", *_TEXTS) if name in record)
    return all(_is_sound(name, value) for name, value in record.items() if name != "kind")


def with_fields(records: Iterable[Record], fields: Mapping[str, Collection[str]]) -> list[Record]:
    """Return the records that have all the fields which `fields` names for their kind."""
    return [record for record in records if all(name in record for name in fields.get(record["kind"], ()))]


def is_evaluation(record: Record) -> bool:
    """Tell whether a line of evaluations.jsonl is what evaluate.record() writes."""
    needed = ("time", "top1_error", "top5_error", "count", "devices", *_TEXTS)
    members = record.get("members")
    return (
        record.get("protocol") in ("single", "10crop", "multiscale")
        and all(_is_sound(name, record.get(name)) for name in needed)
        and isinstance(members, list)
        and bool(members)
        and all(map(_is_member, members))
    )


def _is_member(member: Any) -> bool:
    if not isinstance(member, dict) or not _is_sound("step", member.get("step")):
        return False
    scales = member.get("scales")
    is_scales = isinstance(scales, list) and all(type(scale) is int and 0 < scale < 2**16 for scale in scales)
    return is_scales and isinstance(member.get("workdir"), str)


def _is_sound(name: str, value: Any) -> bool:
    if name in _TEXTS:
        return isinstance(value, str)
    if not _is_number(value) or value < 0:  # nothing that is recorded is negative
        return False
    if name == "step":
        return type(value) is int and value < _MOST_STEPS
    if name == "devices":
        return type(value) is int and value > 0
    if name in _WHOLE:
        return type(value) is int
    return value <= {"time": _LATEST}.get(name, 100 if name in _PERCENT else _LARGEST)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST  # which not-a-number is not
