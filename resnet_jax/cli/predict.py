"""python -m resnet_jax predict SOURCE IMAGE_OR_FOLDER..."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.errors import BrokenDataError, UserError, printable


def add_command(commands: Any) -> None:
    """Add `predict` to the sub-commands of an argument parser."""
    command = commands.add_parser("predict", help="the classes of images, with their probabilities")
    command.add_argument(
        "source", metavar="SOURCE", help="work directory, .safetensors file of export, or name of a published network"
    )
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help="folders with all inside them")
    command.add_argument("--top", type=int, default=5, metavar="N", help="how many classes; default: 5")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object an image, a line each")
    form.add_argument("--csv", action="store_true", help="print lines of image, rank, class, probability")
    command.add_argument(
        "--protocol",
        choices=("single", "10crop", "multiscale"),
        default="single",
        help="views of an image, as in eval.py; default: single",
    )
    command.add_argument("--step", type=int, metavar="N", help="checkpoint to use; default: the last")
    command.add_argument(
        "--batch-size", type=int, default=100, metavar="N", help="views computed at a time; default: 100"
    )
    command.set_defaults(run=_predict)


class Prediction(NamedTuple):
    """The likeliest classes of an image, and their probabilities."""

    image: str
    classes: list[str]
    probabilities: list[float]


def _predict(options: argparse.Namespace) -> int:
    if options.top < 1:
        raise UserError(f"--top must be at least 1; got {options.top}")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1; got {options.batch_size}")
    from resnet_jax.data.processes import make_progress
    from resnet_jax.data.sources.image_folder import find_images
    from resnet_jax.inference.load import load
    from resnet_jax.inference.predict import OpenedImages, probabilities, protocol_of
    from resnet_jax.parallel.devices import configure

    paths = find_images(options.images)
    configure()
    trained = load(options.source, step=options.step)
    protocol = protocol_of(trained, options.protocol)
    with make_progress() as progress:
        bar = progress.add_task("images", total=len(paths))
        opened = OpenedImages(paths, trained.origin.config.data.upright)
        images = _Counted(opened, lambda: progress.advance(bar))
        found = probabilities(trained, images, protocol, batch_size=options.batch_size)
    for index, why in sorted(found.unreadable.items()):
        print(printable(f"warning: cannot read {paths[index]}: {why}: left out"), file=sys.stderr)
    if len(found.unreadable) == len(paths):
        raise BrokenDataError("none of the images can be read")
    names = trained.origin.inputs.class_names
    best = [row.argsort(kind="stable")[::-1][: options.top] for row in found.values]
    _print(
        [
            Prediction(str(path), [names[i] for i in order], row[order].tolist())
            for number, (path, row, order) in enumerate(zip(paths, found.values, best, strict=True))
            if number not in found.unreadable
        ],
        options,
    )
    return 0


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Images, of which each counts when it is read."""

    images: Any
    advance: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> np.ndarray:
        self.advance()
        return self.images[index]


def _print(predictions: Iterable[Prediction], options: argparse.Namespace) -> None:
    if options.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "rank", "class", "probability"))
        for image, classes, values in predictions:
            writer.writerows((image, rank, *pair) for rank, pair in enumerate(zip(classes, values, strict=True), 1))
        return
    for image, classes, values in predictions:
        pairs = list(zip(classes, values, strict=True))
        if options.json:
            print(json.dumps({"image": image, "classes": [{"class": name, "probability": p} for name, p in pairs]}))
        else:
            print(printable(image))
            for name, probability in pairs:
                print(f"  {100 * probability:6.2f} %  {printable(name)}")
