"""python -m resnet_jax detect WORKDIR IMAGE_OR_FOLDER..."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from resnet_jax.errors import BrokenDataError, UserError, printable


def add_command(commands: Any) -> None:
    """Add `detect` to the sub-commands of an argument parser."""
    command = commands.add_parser("detect", help="the objects in images: boxes drawn on copies, or as JSON")
    command.add_argument("workdir", metavar="WORKDIR", help="of a run of detection")
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER", help="folders with all inside them")
    command.add_argument(
        "--threshold", type=float, default=0.5, metavar="P", help="lowest score that is shown; default: 0.5"
    )
    command.add_argument(
        "--out", type=Path, default=Path("detections"), metavar="DIR", help="where pictures go; default: detections"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object an image, and draw nothing")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint to use; default: the last")
    command.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time; default: 1")
    command.set_defaults(run=_detect)


def _detect(options: argparse.Namespace) -> int:
    if not 0 <= options.threshold < 1:
        raise UserError(f"--threshold must be at least 0 and below 1; got {options.threshold:g}")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1; got {options.batch_size}")
    import dataclasses

    from resnet_jax.data.decode import decode
    from resnet_jax.data.draw import draw_boxes
    from resnet_jax.data.sources.image_folder import find_images
    from resnet_jax.files import atomic_write
    from resnet_jax.inference.detect import GivenImages, find_objects, to_plain
    from resnet_jax.inference.load import load
    from resnet_jax.parallel.devices import configure

    paths = find_images(options.images)
    configure()
    trained = load(options.workdir, step=options.step)
    given = GivenImages(paths)
    config = dataclasses.replace(trained.origin.config.detection, threshold=options.threshold)
    results = find_objects(trained, given, config=config, batch_size=options.batch_size)
    names = trained.origin.inputs.class_names
    if not options.json:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: cannot make the folder {options.out}: {error.strerror}") from error
    for number, path in enumerate(paths):
        if number not in results.found:
            why = given.unreadable.get(number, "it is damaged")
            print(printable(f"warning: cannot read {path}: {why}: left out"), file=sys.stderr)
            continue
        found = results.found[number]
        plain = to_plain(found, names)
        if options.json:
            print(json.dumps({"image": str(path), "objects": plain}))
            continue
        texts = [f"{one['class']} {one['score']:.2f}" for one in plain]
        target = options.out / f"{path.stem}.png"
        if target.exists() and target.resolve() == path.resolve():
            raise UserError(f"--out {options.out} would replace the image {path}: choose another folder")
        with atomic_write(target) as partial:
            draw_boxes(decode(path.read_bytes()), found.boxes, found.classes, texts).save(partial, format="PNG")
        print(printable(f"{path}: {len(plain)} objects, drawn on {target}"))
        for one in plain:
            box = " ".join(f"{x:.0f}" for x in one["box"])
            print(printable(f"  {100 * one['score']:6.2f} %  {one['class']}  {box}"))
    if not results.found:
        raise BrokenDataError("none of the images can be read")
    return 0
