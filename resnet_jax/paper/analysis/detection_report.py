"""One HTML page about a run of detection: average precision, precision over recall, the best and the worst images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from resnet_jax.data.decode import decode
from resnet_jax.data.draw import draw_boxes
from resnet_jax.detection.voc_metric import precision_recall
from resnet_jax.evaluate_detection import DetectionEvaluation
from resnet_jax.paper.analysis.report import cards_of_time, percent, to_svg, write_page
from resnet_jax.paper.networks import network_name
from resnet_jax.run.curves import draw_losses, draw_precisions
from resnet_jax.run.records import read_records
from resnet_jax.run.workdir import load_config

_PICTURES = 6  # in a gallery
_WIDEST = 480  # of an embedded picture, in pixels
_SHOWN_SCORE = 0.5  # boxes below it are not drawn and not counted
_METRICS = {"voc07": "The mean precision at 11 recalls (VOC 2007)", "voc12": "The area under the curve (VOC 2010 on)"}


def write_detection_report(workdir: Path, evaluation: DetectionEvaluation, path: Path) -> None:
    """Write the page, which needs no other file and no network.

    Raises:
      UserError: no work directory, or the page cannot be written.
    """
    config, records = load_config(workdir), read_records(workdir)
    score = evaluation.score
    train = [record for record in records if record["kind"] == "train" and "region_class_loss" in record]
    cards = [
        ("mean AP at IoU 0.5", percent(score.mean_average_precision), f"after step {evaluation.step:,}"),
        ("recall of proposals", percent(score.recall), "at an IoU of 0.5"),
        (
            "average recall",
            percent(score.average_recall),
            f"over IoUs to 0.95, {evaluation.config.test_proposals[1]} boxes",
        ),
        ("test images", f"{score.images:,}", f"{len(score.class_names):,} classes"),
    ]
    classes = [
        {"name": name, "objects": curve.objects, "precision": None if np.isnan(ap) else float(ap)}
        for name, curve, ap in zip(score.class_names, score.curves, score.average_precisions, strict=True)
    ]
    best, worst = _galleries(evaluation)
    note = f"Drawn is what has a score of at least {_SHOWN_SCORE}; an object counts as found at an IoU above 0.5."
    write_page(
        path,
        "detection.html.jinja",
        config,
        records,
        name=workdir.resolve().name,
        network=f"Faster R-CNN on {network_name(config.model)}",
        data=f"{config.data.name}, {', '.join(evaluation.sets)}",
        source=None,
        step=evaluation.step,
        cards=[*cards, *(cards_of_time(records, train) if train else [])],
        curves=_curves(records) if train else [],
        curves_note="Left: in tests. Right: the four losses. Thin vertical lines: the learning rate changed.",
        metric=_METRICS[evaluation.config.metric],
        classes=classes,
        precision_recall=_precision_recall(evaluation),
        galleries=[("Best images", note, best), ("Worst images", note, worst)],
    )


def _curves(records: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    curves = []
    for label, draw in (("average precision", draw_precisions), ("losses", draw_losses)):
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        draw(figure.add_subplot(), records)
        curves.append((label, to_svg(figure, label.replace(" ", "-"))))
    return curves


def _precision_recall(evaluation: DetectionEvaluation) -> Any:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in zip(evaluation.score.class_names, evaluation.score.curves, strict=True):
        if curve.objects and len(curve.recall):
            axes.plot(100 * curve.recall, 100 * curve.precision, label=name, linewidth=1.5)
    axes.set(xlabel="recall (%)", ylabel="precision (%)", xlim=(0, 100), ylim=(0, 101))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="lower left", fontsize=8)
    return to_svg(figure, "precision-recall")


def _galleries(evaluation: DetectionEvaluation) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return pictures of the images with the largest and the smallest share of right answers."""
    counted = []
    for number, found in evaluation.found.items():
        annotation = evaluation.images.annotations[number]
        shown = found.scores >= _SHOWN_SCORE
        right = 0
        for k in range(len(evaluation.score.class_names)):
            mine, objects = shown & (found.classes == k), annotation.classes == k
            curve = precision_recall(
                np.zeros(int(mine.sum()), int),
                found.scores[mine],
                found.boxes[mine],
                [annotation.boxes[objects]],
                [annotation.difficult[objects]],
            )
            right += round(float(curve.recall[-1]) * curve.objects) if curve.objects and len(curve.recall) else 0
        objects, boxes = int((~annotation.difficult).sum()), int(shown.sum())
        # Of all that is there or is said to be there (Jaccard): nothing found where nothing is, is right.
        share = right / (objects + boxes - right) if objects + boxes else 1.0
        counted.append((share, number, {"right": right, "objects": objects, "wrong": boxes - right}))
    counted.sort(key=lambda row: (row[0], row[1]))
    number = min(_PICTURES, -(-len(counted) // 2))
    worst = [_picture(evaluation, image, counts) for _, image, counts in counted[:number]]
    best = [_picture(evaluation, image, counts) for _, image, counts in reversed(counted[len(counted) - number :])]
    return best, worst


def _picture(evaluation: DetectionEvaluation, number: int, counts: dict[str, int]) -> dict[str, Any]:
    """Return the PNG of an image with its boxes as a data URI."""
    found = evaluation.found[number]
    shown = found.scores >= _SHOWN_SCORE
    names = evaluation.score.class_names
    texts = [f"{names[k]} {s:.2f}" for s, k in zip(found.scores[shown], found.classes[shown], strict=True)]
    picture = draw_boxes(decode(evaluation.images.read(number)), found.boxes[shown], found.classes[shown], texts)
    picture.thumbnail((_WIDEST, _WIDEST))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"id": evaluation.images.id(number), "uri": uri, "width": picture.width, "height": picture.height, **counts}
