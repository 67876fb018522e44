"""Test a detector on all test images: average precision by class, recall of the proposals, the devkit's files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from resnet_jax.config import DetectionConfig
from resnet_jax.data.annotated import AnnotatedImages
from resnet_jax.data.detection import load_annotated
from resnet_jax.data.inputs import check_classes
from resnet_jax.detection_metrics import Detections, DetectionScore, score
from resnet_jax.errors import BrokenDataError, UserError
from resnet_jax.files import atomic_write
from resnet_jax.inference.detect import find_objects
from resnet_jax.inference.load import load, read_config

MetricName = Literal["voc07", "voc12"]


@dataclasses.dataclass(frozen=True)
class DetectionEvaluation:
    """What a detector finds in all test images.

    Attributes:
      workdir: of the detector.
      step: of its checkpoint.
      config: how boxes were found.
      sets: the test sets.
      images: with annotations.
      found: by the number of the image.
      score: what it is worth.
      images_per_second: without compilation; NaN where there was one batch.
      unreadable: images left out.
    """

    workdir: Path
    step: int
    config: DetectionConfig
    sets: tuple[str, ...]
    images: AnnotatedImages
    found: dict[int, Detections]
    score: DetectionScore
    images_per_second: float
    unreadable: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: average precisions and recalls in %."""
        return {
            "workdir": str(self.workdir),
            "step": self.step,
            "sets": list(self.sets),
            "metric": self.config.metric,
            **self.score.values(0),
            "images_per_second": round(self.images_per_second, 2) if np.isfinite(self.images_per_second) else None,
            "threshold": self.config.threshold,
            "most": self.config.most,
            "proposals": self.config.test_proposals[1],
        }

    def to_lines(self) -> list[str]:
        """Return lines to read."""
        how = {"voc07": "11-point, VOC 2007", "voc12": "area under the curve, VOC 2010 on"}[self.config.metric]
        names, values = self.score.class_names, self.score.average_precisions
        width = max(map(len, names))
        lines = [
            f"step {self.step}: mean AP@.5 {self.score.mean_average_precision:.2f} % ({how}),"
            f" {self.score.images:,} images",
            *(
                f"  {name:{width}} " + ("no objects" if np.isnan(value) else f"{value:6.2f} %")
                for name, value in zip(names, values, strict=True)
            ),
            f"proposals: recall {self.score.recall:.2f} % at IoU 0.5, {self.score.average_recall:.2f} % on average over"
            f" 0.5 to 0.95 (AR at {self.config.test_proposals[1]})",
        ]
        if np.isfinite(self.images_per_second):
            lines.append(f"{self.images_per_second:.2f} images/s")
        return lines

    def write_results(self, folder: Path) -> list[Path]:
        """Write comp4_det_SET_CLASS.txt for each class, as the test server takes them: boxes from 1 on.

        Raises:
          UserError: they cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
        name = "+".join(self.sets).replace("/", "_") if len(self.sets) > 1 else self.sets[0].rpartition("_")[2]
        paths = []
        for k, class_name in enumerate(self.score.class_names):
            lines = []
            for number, found in sorted(self.found.items()):
                mine = found.classes == k
                lines += [
                    f"{self.images.id(number)} {s:.6f} {' '.join(f'{x + 1:.1f}' for x in box)}\n"
                    for s, box in zip(found.scores[mine], found.boxes[mine], strict=True)
                ]
            paths.append(folder / f"comp4_det_{name}_{class_name.replace('/', '_')}.txt")
            with atomic_write(paths[-1]) as partial:
                partial.write_text("".join(lines))
        return paths


def evaluate_detection(
    workdir: str | Path,
    *,
    data_dir: str | None = None,
    step: int | None = None,
    batch_size: int | None = None,
    metric: MetricName | None = None,
    max_broken: float = 100.0,
) -> DetectionEvaluation:
    """Find the objects in every test image once, over all devices, and compare them with the annotations.

    Args:
      workdir: of a run of detection.
      data_dir: where the data set is now, if not where it was.
      step: of the checkpoint; None for the last one.
      batch_size: images at a time; None for the run's data.eval_batch_size.
      metric: "voc07" or "voc12", see DetectionConfig; None for the run's.
      max_broken: images that may be left out, in % of all.

    Raises:
      UserError: no work directory, no such checkpoint, no data, other classes.
      BrokenDataError: more images than that cannot be read, or none can.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    dataset = load_annotated(config, data_dir)
    trained = load(workdir, step=step)
    check_classes(trained.origin.inputs, dataset)
    detection = dataclasses.replace(config.detection, metric=metric or config.detection.metric)
    results = find_objects(
        trained,
        dataset.test,
        config=detection,
        batch_size=batch_size or config.data.eval_batch_size,
        workers=config.data.workers,
    )
    broken = sorted(results.unreadable)
    if 100 * len(broken) > max_broken * len(dataset.test) or not results.found:
        raise BrokenDataError(
            f"cannot read {len(broken)} of {len(dataset.test)} test images; the first is {dataset.test.id(broken[0])}"
        )
    scored = score(
        dataset.test,
        dataset.class_names,
        results.found,
        results.proposals,
        eleven_point=detection.metric == "voc07",
    )
    speed = results.images / results.seconds if results.images else float("nan")
    names = tuple(dataset.test.id(number) for number in broken)
    return DetectionEvaluation(
        workdir,
        trained.origin.step,
        detection,
        config.data.test_sets,
        dataset.test,
        results.found,
        scored,
        speed,
        names,
    )
