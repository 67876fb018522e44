"""One HTML page about a run: curves, errors, confusions, the worst mistakes, configuration, environment."""

from __future__ import annotations

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
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

import resnet_jax
from resnet_jax.config import Config
from resnet_jax.evaluate import Evaluation
from resnet_jax.files import atomic_write
from resnet_jax.paper.analysis.mistakes import (
    MOST_ROWS,
    confusion_matrix,
    count_confusions,
    errors_by_class,
    most_frequent_confusions,
    worst_mistakes,
)
from resnet_jax.paper.networks import network_name
from resnet_jax.run.curves import draw_curves
from resnet_jax.run.records import read_records, with_fields
from resnet_jax.run.workdir import load_config, read_source

Record = dict[str, Any]

_EVALUATED = ("time", "loss", "error", "images")
_NEEDED = {  # fields of the records that are shown
    "start": ("time",),
    "train": (*_EVALUATED, "learning_rate", "images_per_second"),
    "validation": _EVALUATED,
    "test": _EVALUATED,
}
_FIGURE6 = (
    "Dashed: training, on augmented images, averaged between log points. Bold: test, as in the paper's Fig. 6. Dotted:"
    " validation, where there is one. Thin vertical lines: the learning rate changed."
)
_PROTOCOLS = {"single": "single view", "10crop": "10 crops", "multiscale": "multiple scales"}


def write_report(workdir: Path, evaluation: Evaluation, path: Path) -> None:
    """Write the page, which needs no other file and no network.

    Args:
      workdir: of a run or an import.
      evaluation: of its weights, and of no other network.
      path: of the page; an existing file is replaced at once or not at all.

    Raises:
      UserError: no work directory, or the page cannot be written.
    """
    config, records = load_config(workdir), with_fields(read_records(workdir), _NEEDED)
    confusions = count_confusions(evaluation)
    source = read_source(workdir)
    network = network_name(config.model)
    write_page(
        path,
        "report.html.jinja",
        config,
        records,
        name=workdir.resolve().name,
        network=f"{network}, shortcut {config.model.shortcut}" if network.startswith("ResNet") else network,
        data=evaluation.test.name,
        source=source,
        step=evaluation.step,
        cards=_cards(records, evaluation),
        curves=_curves(records),
        curves_note=_FIGURE6,
        classes=errors_by_class(evaluation),
        num_classes=len(evaluation.test.class_names),
        matrix=confusion_matrix(confusions, evaluation.test.class_names) if len(confusions) <= MOST_ROWS else None,
        confusions=most_frequent_confusions(confusions, evaluation.test.class_names),
        mistakes=worst_mistakes(evaluation),
    )


def write_page(
    path: Path, template: str, config: Config, records: list[Record], *, step: int, source: str | None, **values: Any
) -> None:
    """Fill a template with values, and with what every page has: progress, configuration, environment.

    Raises:
      UserError: it cannot be written.
    """
    shown = ("model", "data", *(("detection",) if config.detects else ()), *(() if source else ("optim", "run")))
    page = _template(template).render(
        **values,
        source=source,
        progress=_progress(records, config.run.steps, step),
        last_date=_date(records[-1]["time"]) if records else None,
        config=_config_groups(config, shown),
        sessions=_sessions(records),
        versions=_versions(),
    )
    with atomic_write(path) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))  # a file name may hold what is not UTF-8


def _template(name: str) -> Any:
    files = resources.files(__package__)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files.joinpath(name).read_text("utf-8")),
    )
    environment.filters |= {"percent": percent, "thousands": "{:,}".format}
    return environment.get_template(name)


def percent(value: float) -> str:
    """Write a number in %, with two digits; only what is exactly 0 or 100 looks so."""
    if 0 < value < 0.005:
        return "<0.01 %"
    if 99.995 <= value < 100:
        return ">99.99 %"
    return f"{value:.2f} %"


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _progress(records: list[Record], planned: int, step: int) -> str:
    """Return "1,000 of 64,000 steps"; a run that was made longer has done more than config.json says."""
    done = max([step, *(record["step"] for record in records)])
    return f"{done:,} of {planned:,} steps" if done <= planned else f"{done:,} steps"


def _cards(records: list[Record], evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Return (what, value with unit, remark) for the numbers at the top."""
    protocol = _PROTOCOLS[evaluation.protocol]
    num_classes = len(evaluation.test.class_names)
    seen = f"{protocol}, after step {evaluation.step:,}" if evaluation.step else protocol
    cards = [("test error", percent(evaluation.top1_error), seen)]
    if num_classes > MOST_ROWS:
        cards.append(("top-5 test error", percent(evaluation.top5_error), f"{protocol}, {num_classes:,} classes"))
    cards += [
        ("test loss", f"{evaluation.loss:.4f} nats", "mean cross-entropy"),
        ("test images", f"{evaluation.count:,}", f"{num_classes:,} classes"),
    ]
    if train := [record for record in records if record["kind"] == "train"]:
        last = train[-1]
        average = f"average of {last['images']:,} augmented images up to step {last['step']:,}"
        cards += [("training error", percent(last["error"]), average), *cards_of_time(records, train)]
    return cards


def cards_of_time(records: list[Record], train: list[Record]) -> list[tuple[str, str, str]]:
    """Return (what, value with unit, remark) for speed and time of training."""
    spans = [session[-1]["time"] - session[0]["time"] for session in _split_sessions(records)]
    speed = median(record["images_per_second"] for record in train)
    sessions = f"{len(spans)} session{'s' * (len(spans) > 1)}"
    return [
        ("training speed", f"{speed:,.0f} images/s", f"median of {len(train):,} log records"),
        ("training time", _duration(sum(spans)), f"{sessions}; with evaluations, without compiling"),
    ]


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
            curves.append((label, to_svg(figure, quantity)))
    return curves


def _draw_learning_rate(axes: Axes, points: list[tuple[int, float]]) -> None:
    rates = [rate for _, rate in points]
    axes.plot(*zip(*points, strict=True), drawstyle="steps-pre", marker="o" if len(points) < 3 else None)
    axes.set(xlabel="step", yscale="log", xlim=(0, None), ylim=(min(rates) / 4, max(rates) * 4))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def to_svg(figure: Figure, prefix: str) -> Markup:
    """Return an <svg> element whose ids begin with `prefix`, so that several fit in one document."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # HTML has no place for an XML declaration and a document type
    # Its only texts are the names of the axes and of the curves.
    return Markup(re.sub(r'\bid="|url\(#|href="#', lambda match: f"{match[0]}{prefix}-", svg))  # noqa: S704


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
