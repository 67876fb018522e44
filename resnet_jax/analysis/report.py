"""One HTML page about a run: curves, errors, confusions, the worst mistakes, configuration, environment."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib.metadata
import io
import platform
import re
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

import resnet_jax
from resnet_jax.analysis.curves import draw_curves
from resnet_jax.config import Config, ModelConfig
from resnet_jax.errors import UserError
from resnet_jax.evaluate import Evaluation
from resnet_jax.logs import read_records
from resnet_jax.workdir import load_config

Record = dict[str, Any]

_MOST_ROWS = 20  # classes in a table, and confusions in a list
_MISTAKES = 24
_LARGEST_SIDE = 160  # of an embedded picture, in pixels
_PIXEL_ART_SIDE = 64  # up to here a picture is shown with its pixels as squares
_PROTOCOLS = {"single": "single view", "10crop": "10 crops", "multiscale": "multiple scales"}


def write_report(workdir: Path, evaluation: Evaluation, path: Path) -> Path:
    """Write the page, which needs no other file and no network.

    Args:
      workdir: of a run or an import.
      evaluation: of its weights, and of no other network.
      path: of the page; an existing file is replaced at once or not at all.

    Returns:
      `path`.

    Raises:
      UserError: no work directory, or the page cannot be written.
    """
    config, records = load_config(workdir), read_records(workdir)
    confusions = _count_confusions(evaluation)
    imported = not records and evaluation.step == 0
    page = _template().render(
        name=workdir.resolve().name,
        network=_network_name(config.model),
        data=evaluation.test.name,
        progress=None if imported else _progress(records, config.run.steps, evaluation.step),
        last_date=_date(records[-1]["time"]) if records else None,
        cards=_cards(records, evaluation),
        curves=_curves(records),
        classes=_classes(evaluation),
        num_classes=len(evaluation.test.class_names),
        matrix=_matrix(confusions, evaluation.test.class_names) if len(confusions) <= _MOST_ROWS else None,
        confusions=_most_frequent(confusions, evaluation.test.class_names),
        mistakes=_worst_mistakes(evaluation),
        config=_config_groups(config, ("model", "data") if imported else ("model", "data", "optim", "run")),
        sessions=_sessions(records),
        versions=_versions(),
    )
    partial = path.with_name(path.name + ".new")  # a reader never sees half a page
    try:
        partial.write_bytes(page.encode("utf-8", "replace"))  # a file name may hold what is not UTF-8
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "thousands": _thousands}
    return environment.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))


def _percent(value: float) -> str:
    """Write a number in %, with two digits; only what is exactly 0 or 100 looks so."""
    if 0 < value < 0.005:
        return "<0.01 %"
    if 99.995 <= value < 100:
        return ">99.99 %"
    return f"{value:.2f} %"


def _thousands(value: int) -> str:
    return f"{value:,}"


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _network_name(model: ModelConfig) -> str:
    if model.family == "vgg":
        return f"VGG-{model.depth}"
    return f"plain-{model.depth}" if model.shortcut == "none" else f"ResNet-{model.depth}, shortcut {model.shortcut}"


def _progress(records: list[Record], planned: int, step: int) -> str:
    """Return "1,000 of 64,000 steps"; a run that was made longer has done more than config.json says."""
    done = max([step, *(record["step"] for record in records)])
    return f"{done:,} of {planned:,} steps" if done <= planned else f"{done:,} steps"


def _cards(records: list[Record], evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Return (what, value with unit, remark) for the numbers at the top."""
    protocol = _PROTOCOLS[evaluation.protocol]
    num_classes = len(evaluation.test.class_names)
    seen = f"{protocol}, after step {evaluation.step:,}" if evaluation.step else protocol
    cards = [("test error", _percent(evaluation.top1_error), seen)]
    if num_classes > _MOST_ROWS:
        cards.append(("top-5 test error", _percent(evaluation.top5_error), f"{protocol}, {num_classes:,} classes"))
    cards += [
        ("test loss", f"{evaluation.loss:.4f} nats", "mean cross-entropy"),
        ("test images", f"{evaluation.count:,}", f"{num_classes:,} classes"),
    ]
    if train := [record for record in records if record["kind"] == "train"]:
        last, spans = train[-1], [session[-1]["time"] - session[0]["time"] for session in _split_sessions(records)]
        average = f"average of {last['images']:,} augmented images up to step {last['step']:,}"
        speed = median(record["images_per_second"] for record in train)
        sessions = f"{len(spans)} session{'s' * (len(spans) > 1)}"
        cards += [
            ("training error", _percent(last["error"]), average),
            ("training speed", f"{speed:,.0f} images/s", f"median of {len(train):,} log records"),
            ("training time", _duration(sum(spans)), f"{sessions}; with evaluations, without compiling"),
        ]
    return cards


def _split_sessions(records: list[Record]) -> list[list[Record]]:
    """Split the records before each "start"."""
    sessions: list[list[Record]] = []
    for record in records:
        if record["kind"] == "start" or not sessions:
            sessions.append([])
        sessions[-1].append(record)
    return sessions


def _curves(records: list[Record]) -> list[tuple[str, Markup]]:
    """Return (title, SVG) of error, loss and learning rate; nothing before the first log record."""
    train = [(record["step"], record["learning_rate"]) for record in records if record["kind"] == "train"]
    if not train:
        return []
    curves = []
    for quantity, label in (("error", "error (%)"), ("loss", "loss (nats)"), ("rate", "learning rate")):
        with matplotlib.rc_context({"svg.hashsalt": quantity, "font.size": 11}):
            # So narrow that a phone shows the text in its own size; a wide window has room for all three.
            figure = Figure(figsize=(5, 3.6), layout="constrained")
            axes = figure.add_subplot()
            if quantity == "rate":
                _draw_learning_rate(axes, train)
            else:
                draw_curves(axes, records, quantity)
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            curves.append((label, _to_svg(figure, quantity)))
    return curves


def _draw_learning_rate(axes: Axes, points: list[tuple[int, float]]) -> None:
    rates = [rate for _, rate in points]
    axes.plot(*zip(*points, strict=True), drawstyle="steps-pre", marker="o" if len(points) < 3 else None)
    axes.set(xlabel="step", yscale="log", xlim=(0, None), ylim=(min(rates) / 4, max(rates) * 4))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _to_svg(figure: Figure, prefix: str) -> Markup:
    """Return an <svg> element whose ids begin with `prefix`, so that several fit in one document."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # HTML has no place for an XML declaration and a document type
    return Markup(re.sub(r'\bid="|url\(#|href="#', lambda match: f"{match[0]}{prefix}-", svg))


def _count_confusions(evaluation: Evaluation) -> np.ndarray:
    """Count images by (true class, predicted class)."""
    num_classes = len(evaluation.test.class_names)
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (evaluation.test.labels, evaluation.probabilities.argmax(1)), 1)
    return counts


def _classes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return name, images, error in % (or None) and length of the bar in %: all classes, or the worst ones."""
    errors = np.asarray(evaluation.class_errors)
    order = np.arange(len(errors))
    if len(errors) > _MOST_ROWS:
        order = np.argsort(-np.nan_to_num(errors, nan=-1.0), kind="stable")[:_MOST_ROWS]
    counts = np.bincount(evaluation.test.labels, minlength=len(errors))
    largest = max([1e-9, *errors[~np.isnan(errors)]])
    return [
        {
            "name": evaluation.test.class_names[i],
            "images": int(counts[i]),
            "error": None if np.isnan(errors[i]) else float(errors[i]),
            "bar": 0.0 if np.isnan(errors[i]) else round(100 * float(errors[i]) / largest, 1),
        }
        for i in order
    ]


def _matrix(confusions: np.ndarray, class_names: tuple[str, ...]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return (true class, [(images, opacity)] by predicted class); the root makes rare confusions visible."""
    shares = confusions / np.maximum(confusions.sum(1, keepdims=True), 1)
    opacities = np.round(0.8 * np.sqrt(shares), 3).tolist()
    cells = [list(zip(*row, strict=True)) for row in zip(confusions.tolist(), opacities, strict=True)]
    return list(zip(class_names, cells, strict=True))


def _most_frequent(confusions: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the most frequent confusions, with their share of the true class in %."""
    off_diagonal = confusions * ~np.eye(len(confusions), dtype=bool)
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:_MOST_ROWS]
    pairs = [divmod(int(i), len(confusions)) for i in order]
    return [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "images": int(confusions[true, predicted]),
            "share": 100 * float(confusions[true, predicted] / confusions[true].sum()),
        }
        for true, predicted in pairs
        if off_diagonal[true, predicted]
    ]


def _worst_mistakes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the wrongly classified images whose wrong class has the highest probability."""
    test, probabilities = evaluation.test, evaluation.probabilities
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != test.labels)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:_MISTAKES]
    return [
        {
            "id": test.ids[i],
            "picture": _picture(test.images[i]),
            "true": test.class_names[test.labels[i]],
            "true_probability": 100 * float(probabilities[i, test.labels[i]]),
            "predicted": test.class_names[predicted[i]],
            "predicted_probability": 100 * float(probabilities[i, predicted[i]]),
        }
        for i in worst.tolist()
    ]


def _picture(pixels: np.ndarray) -> dict[str, Any]:
    """Return the PNG of RGB uint8 [H, W, 3] as a data URI; a large one is made smaller."""
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)  # leaves small ones alone
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"uri": uri, "width": image.width, "height": image.height, "pixels": max(image.size) <= _PIXEL_ART_SIDE}


def _config_groups(config: Config, names: tuple[str, ...]) -> dict[str, list[tuple[str, str, str | None]]]:
    """Return (field, value, default where the value is another) for each group."""
    groups = {}
    for name in names:
        values, defaults = (dataclasses.asdict(getattr(source, name)) for source in (config, Config()))
        groups[name] = [
            (field, _plain(value), None if value == defaults[field] else _plain(defaults[field]))
            for field, value in values.items()
        ]
    return groups


def _plain(value: Any) -> str:
    """Write a value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sessions(records: list[Record]) -> dict[str, list[str]]:
    """Return what the "start" records say: a list with an entry for each session by the name of the field."""
    starts = [record for record in records if record["kind"] == "start"]
    shown = [
        {
            "began": _date(record["time"]),
            "after step": f"{record['step']:,}",
            **{
                {"compile_seconds": "compile time (s)"}.get(name, name.replace("_", " ")): (
                    f"{value:,}" if isinstance(value, int) else str(value)
                )
                for name, value in record.items()
                if name not in ("kind", "step", "time")
            },
        }
        for record in starts
    ]
    names = dict.fromkeys(name for session in shown for name in session)
    return {name: [session.get(name, "") for session in shown] for name in names}


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "numpy", "matplotlib", "pillow", "jinja2")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"resnet_jax": resnet_jax.__version__, "python": platform.python_version(), **versions}
