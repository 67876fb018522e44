"""python -m resnet_jax data check|show|split|pack|statistics ..."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from resnet_jax.errors import UserError, printable


def add_commands(commands: Any) -> None:
    """Add `data` and its sub-commands to those of an argument parser; `run` is the function of the chosen one."""
    parser = commands.add_parser("data", help="check, pack or measure the images to train on")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("check", help="decode every image and report what is there and what is wrong")
    command.add_argument(
        "dir", type=Path, metavar="DIR", help="folder with train/CLASS/FILE and val/, packed, or of VOC"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    _add_workers(command)
    command.set_defaults(run=_check)

    command = commands.add_parser(
        "show", help="draw what a detector is trained on: images as resized and mirrored, boxes"
    )
    command.add_argument("dir", type=Path, metavar="DIR", help="as --data.dir, in the layout of VOC")
    command.add_argument(
        "--sets",
        nargs="+",
        default=["2007_trainval"],
        metavar="SET",
        help="as --data.train-sets; default: 2007_trainval",
    )
    command.add_argument("--shorter-side", type=int, default=600, metavar="N", help="as in training; default: 600")
    command.add_argument("--longer-side", type=int, default=1000, metavar="N", help="as in training; default: 1000")
    command.add_argument(
        "--images", type=int, default=8, metavar="N", help="how many, the first of training; default: 8"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="as --run.seed; default: 0")
    command.add_argument("--out", type=Path, default=Path("targets.png"), metavar="FILE", help="default: targets.png")
    command.set_defaults(run=_show)

    command = commands.add_parser("pack", help="pack a folder of images into a few large files, once")
    command.add_argument("dir", type=Path, metavar="DIR", help="folder with train/CLASS/FILE and val/")
    command.add_argument("out", type=Path, metavar="OUT", help="folder to make, or to go on with")
    command.add_argument(
        "--short-side",
        type=int,
        default=480,
        metavar="N",
        help="resize larger images to this shorter side; default: 480",
    )
    command.add_argument(
        "--format", choices=("jpeg", "raw"), default="jpeg", help="raw pixels need no decoding; default: jpeg"
    )
    command.add_argument(
        "--quality", type=int, default=95, metavar="N", help="1 to 100, of JPEGs that are written anew; default: 95"
    )
    _add_upright(command)
    _add_workers(command)
    command.set_defaults(run=_pack)

    command = commands.add_parser("split", help="divide DIR/CLASS/FILE into images to train on and images to test on")
    command.add_argument("dir", type=Path, metavar="DIR", help="folder with a folder for each class")
    command.add_argument(
        "out", type=Path, metavar="OUT", help="folder to make, with train/CLASS/FILE and val/CLASS/FILE"
    )
    command.add_argument(
        "--test", type=float, default=10, metavar="PERCENT", help="of the images of each class, for val/; default: 10"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of which ones; default: 0")
    command.add_argument("--copy", action="store_true", help="copy the files; by default OUT holds links to them")
    command.set_defaults(run=_split)

    command = commands.add_parser("statistics", help="mean image and principal colours, stored beside the images")
    command.add_argument("dir", metavar="DIR", help="folder of the images as they are or packed; of TFDS its data_dir")
    command.add_argument(
        "--name", default="folder", metavar="NAME", help="as --data.name: imagenet, folder (default) or tfds:NAME"
    )
    command.add_argument(
        "--image-size", type=int, default=224, metavar="N", help="of the mean image, in pixels; default: 224"
    )
    _add_upright(command)
    _add_workers(command)
    command.set_defaults(run=_statistics)


def _add_upright(command: argparse.ArgumentParser) -> None:
    command.add_argument("--upright", action="store_true", help="turn images as their cameras marked them (EXIF)")


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")


def _workers(options: argparse.Namespace) -> int:
    from resnet_jax.parallel.devices import cores

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be at least 1; got {options.workers}")
    return options.workers or cores()


def _check(options: argparse.Namespace) -> int:
    from resnet_jax.data.tools.check import check
    from resnet_jax.data.tools.check_boxes import check_boxes, find_voc_sets

    if sets := find_voc_sets(options.dir):
        boxes = check_boxes(options.dir, sets, workers=_workers(options))
        print(json.dumps(boxes.to_dict()) if options.json else boxes.to_text())
        return 0 if boxes.sound else 1
    report = check(options.dir, workers=_workers(options))
    print(json.dumps(report.to_dict()) if options.json else report.to_text())
    return 0 if report.readable else 1


def _show(options: argparse.Namespace) -> int:
    if not 1 <= options.shorter_side <= options.longer_side:
        raise UserError(f"--shorter-side {options.shorter_side} must be from 1 to --longer-side {options.longer_side}")
    if not 1 <= options.images <= 100:
        raise UserError(f"--images must be from 1 to 100; got {options.images}")
    if not options.out.parent.is_dir():
        raise UserError(f"--out: there is no folder {options.out.parent}")
    from resnet_jax.data.buckets import Buckets
    from resnet_jax.data.sources.voc import load_voc
    from resnet_jax.data.tools.show import show_targets
    from resnet_jax.files import atomic_write

    dataset = load_voc(options.dir, options.sets, options.sets)
    buckets = Buckets(options.shorter_side, options.longer_side)
    sheet = show_targets(dataset, buckets, options.images, options.seed)
    with atomic_write(options.out) as partial:
        sheet.save(partial, format="PNG")
    print(f"drew {options.images} of {2 * len(dataset.train):,} images, as they are and mirrored, on {options.out}")
    return 0


def _pack(options: argparse.Namespace) -> int:
    if options.short_side < 32:
        raise UserError(f"--short-side must be at least 32; got {options.short_side}")
    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality must be between 1 and 100; got {options.quality}")
    from resnet_jax.data.tools.pack import pack
    from resnet_jax.data.tools.reencode import PackOptions

    how = PackOptions(options.short_side, options.format, options.quality, options.upright)
    manifest, complete = pack(options.dir, options.out, how, workers=_workers(options))
    for name, split in manifest.splits.items():
        for image, reason in split.skipped:
            print(printable(f"left out {name}/{image}: {reason}"))
        size = sum(shard.bytes for shard in split.shards) / 1e6
        files = f"{len(split.shards)} shard{'s' * (len(split.shards) > 1)}"
        print(f"{name}: {split.images:,} images, {size:,.1f} MB in {files}")
    print(f"{options.out} was packed already" if complete else f"packed {options.dir} into {options.out}")
    return 0


def _split(options: argparse.Namespace) -> int:
    if not 0 < options.test < 100:
        raise UserError(f"--test must be between 0 and 100; got {options.test:g}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be between 0 and {2**32 - 1}; got {options.seed}")
    from resnet_jax.data.tools.split import split_folder

    images = split_folder(options.dir, options.out, test_percent=options.test, seed=options.seed, copy=options.copy)
    print(f"{options.out}: {images['train']:,} images to train on, {images['val']:,} to test on")
    return 0


def _statistics(options: argparse.Namespace) -> int:
    if options.image_size < 1:
        raise UserError(f"--image-size must be at least 1; got {options.image_size}")
    workers = _workers(options)
    from resnet_jax.data import StreamedDataset, load_dataset
    from resnet_jax.data.tools.statistics import compute_statistics, save_statistics

    dataset = load_dataset(options.name, options.dir, upright=options.upright)
    if not isinstance(dataset, StreamedDataset):
        raise UserError(f"{options.name} is kept in memory, and its mean is computed when a run begins")
    statistics = compute_statistics(dataset.train, options.image_size, workers=workers)
    path = save_statistics(statistics, dataset.folder)
    broken = f", {statistics.broken:,} of them unreadable" if statistics.broken else ""
    mean = " ".join(f"{value:.4f}" for value in statistics.mean.mean((0, 1)))
    values = " ".join(f"{value:.4f}" for value in statistics.eigenvalues)
    print(f"{statistics.images:,} images{broken}: mean colour {mean}, eigenvalues of the colours {values}")
    print(f"wrote {path}")
    return 0
