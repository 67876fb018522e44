"""Measure reading, decoding and cropping beside a plain loader: python -m benchmarks.input_pipeline DIR.

DIR holds train/CLASS/FILE and val/. Every row is measured in the same run, in turns, on the same files, which the
operating system keeps in memory. The plain loader is what Pillow and PyTorch's DataLoader give without further thought:
decode, resize the whole image, crop, mirror. Without PyTorch its end-to-end row is left out.
"""

from __future__ import annotations

import io
import random
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.driver import positive
from benchmarks.report import describe_machine
from resnet_jax.cli.arguments import ArgumentParser, run_command
from resnet_jax.data import load_dataset
from resnet_jax.data.augment import scale_window
from resnet_jax.data.decode import decode, decode_window, open_image
from resnet_jax.data.splits import Subset
from resnet_jax.data.streamed import training_batches
from resnet_jax.data.tools.pack import PackOptions, pack
from resnet_jax.data.types import EncodedImages
from resnet_jax.parallel.devices import cores

_SIZE, _SHORTER_SIDE = 224, (256, 480)  # Sec. 3.4
_LONG = 1_000_000  # images of an epoch, end to end
_WARM_UP = 2  # batches of each worker before the clock


class Row(NamedTuple):
    """One measurement.

    Attributes:
      name: what is measured.
      peer: name of the row of the plain loader that it is compared with.
      per_core: images/s and core, of each round.
    """

    name: str
    peer: str
    per_core: list[float]


def main(args: Sequence[str]) -> int:
    """Measure and print a table."""
    parser = ArgumentParser(prog="python -m benchmarks.input_pipeline", description=__doc__, allow_abbrev=False)
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder with train/CLASS/FILE and val/")
    parser.add_argument("--rounds", type=positive(int), default=5, help="turns of each row (default 5)")
    parser.add_argument("--seconds", type=positive(float), default=2.0, help="of each turn (default 2)")
    parser.add_argument("--batch-size", type=positive(int), default=32, help="images, end to end (default 32)")
    parser.add_argument("--workers", type=positive(int), help="processes, end to end (default: one a core)")
    options = parser.parse_args(args)
    workers = options.workers or cores()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
        rows = measure(options.dir, Path(temporary), options.rounds, options.seconds, options.batch_size, workers)
    machine = describe_machine()
    print(f"{machine['cores']} cores of {machine['cpu']}; end to end with {workers} worker processes;", end=" ")
    print(f"Python {machine['python']}; {shlex.join(['python', '-m', 'benchmarks.input_pipeline', *args])}\n")
    print(to_text(rows))
    return 0


def measure(source: Path, temporary: Path, rounds: int, seconds: float, batch_size: int, workers: int) -> list[Row]:
    """Measure every row in turns.

    Args:
      source: folder of images.
      temporary: folder for the packed ones.
      rounds: turns of each row.
      seconds: of each turn.
      batch_size: of the rows end to end.
      workers: processes of the rows end to end; the others are measured in this one.
    """
    folder: Any = load_dataset("folder", source).train
    packed: dict[str, Any] = {}
    for form in ("jpeg", "raw"):
        pack(source, temporary / form, PackOptions(format=form), workers=workers)
        packed[form] = load_dataset("folder", temporary / form).train
    opened, viewed, loaded = "plain: decode", "plain: decode, resize, crop", "end to end, plain"
    single: list[tuple[Row, Callable[[int], object]]] = [
        (Row(opened, opened, []), lambda index: np.asarray(_plain_open(folder, index))),
        (Row("decode", opened, []), lambda index: decode(folder.read(index)[0])),
        (Row(viewed, viewed, []), partial(plain_view, folder)),
        (Row("decode + jitter", viewed, []), partial(our_view, folder)),
        (Row("packed + jitter", viewed, []), partial(our_view, packed["jpeg"])),
        (Row("packed raw + jitter", viewed, []), partial(our_view, packed["raw"])),
    ]
    # As long as a large set, since an order is drawn faster over many images than over a few.
    long = np.tile(np.arange(len(folder)), -(-_LONG // len(folder)))
    sources = {"folder": folder, "packed": packed["jpeg"], "packed raw": packed["raw"]}
    loaders: list[tuple[Row, Callable[[], Any]]] = []
    if find_spec("torch"):
        plain = partial(_plain_batches, folder, batch_size, workers)
        loaders.append((Row(loaded, loaded, []), plain))
    for name, images in sources.items():
        ours = partial(_our_batches, Subset(images, long), batch_size, workers)
        loaders.append((Row(f"end to end, {name}", loaded, []), ours))
    for _ in range(rounds):
        for row, view in single:
            row.per_core.append(_images_per_second(view, len(folder), seconds))
        for row, begin in loaders:
            row.per_core.append(_batches_per_second(begin, seconds, workers) * batch_size / workers)
    return [row for row, _ in (*single, *loaders)]


def our_view(images: EncodedImages, index: int) -> np.ndarray:
    """Return our training view of an image, in this process."""
    rng = np.random.Generator(np.random.Philox(key=np.array([0, index], np.uint64)))
    image = open_image(images.read(index)[0])
    window, mirrored = scale_window(_SIZE, _SHORTER_SIDE)(rng, *image.size), rng.random() < 0.5
    return decode_window(image, window, _SIZE, mirrored=mirrored)


def _plain_open(images: EncodedImages, index: int) -> Image.Image:
    with Image.open(io.BytesIO(images.read(index)[0])) as image:
        return image.convert("RGB")


def plain_view(images: EncodedImages, index: int) -> np.ndarray:
    """Resize the whole image, crop it and mirror it, as torchvision's transforms do one after the other."""
    image = _plain_open(images, index)
    shorter = random.randint(*_SHORTER_SIDE)
    side = min(image.size)
    width, height = (length * shorter // side for length in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = random.randint(0, width - _SIZE), random.randint(0, height - _SIZE)
    image = image.crop((left, top, left + _SIZE, top + _SIZE))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


class _PlainDataset:
    """What PyTorch's DataLoader takes."""

    def __init__(self, images: EncodedImages):
        self._images = images

    def __len__(self) -> int:
        return _LONG

    def __getitem__(self, index: int) -> Any:
        return plain_view(self._images, index % len(self._images)), index


def _plain_batches(images: EncodedImages, batch_size: int, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    dataset: Any = _PlainDataset(images)
    yield from DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, prefetch_factor=2)


def _our_batches(images: EncodedImages, batch_size: int, workers: int) -> Iterator[Any]:
    window = scale_window(_SIZE, _SHORTER_SIDE)
    begin = partial(training_batches, images, window, size=_SIZE, flip=True, batch_size=batch_size, seed=0, step=0)
    with begin(workers=workers) as batches:
        yield from batches


def _images_per_second(view: Callable[[int], object], images: int, seconds: float) -> float:
    """Go through the images over and over; only whole passes count, since images differ in size."""
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        for index in range(images):
            view(index)
        done += images
    return done / elapsed


def _batches_per_second(begin: Callable[[], Any], seconds: float, workers: int) -> float:
    batches = begin()
    try:
        for _ in range(_WARM_UP * workers):
            next(batches)
        done, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            next(batches)
            done += 1
        return done / elapsed
    finally:
        batches.close()


def to_text(rows: list[Row]) -> str:
    """Return a Markdown table; ratios where the plain loader was measured, too."""
    medians = {row.name: statistics.median(row.per_core) for row in rows}
    lines = ["| | images/s and core | lowest to highest | to the plain loader |", "|---|---|---|---|"]
    for row in rows:
        low, high = min(row.per_core), max(row.per_core)
        ratio = f" {medians[row.name] / medians[row.peer]:.2f}" if row.name != row.peer and row.peer in medians else ""
        lines.append(f"| {row.name} | {medians[row.name]:,.0f} | {low:,.0f} to {high:,.0f} |{ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
