"""PASCAL VOC and sets in its layout: Annotations/ID.xml, JPEGImages/ID.jpg, ImageSets/Main/SET.txt."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnet_jax.data.annotated import AnnotatedDataset, Annotation
from resnet_jax.data.decode import FORMATS, BrokenImageError, open_image
from resnet_jax.errors import UserError, did_you_mean, printable, reason

# In the order of the development kit, and of the paper's Table 10.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SETS_FOLDER = Path("ImageSets") / "Main"


@dataclasses.dataclass(frozen=True)
class VocImages:
    """Images of one or more sets: annotated.AnnotatedImages."""

    paths: tuple[Path, ...]
    annotations: tuple[Annotation, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def id(self, index: int) -> str:
        return self.paths[index].stem

    def read(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise BrokenImageError(reason(error)) from error


def load_voc(data_dir: str | Path, train_sets: Sequence[str], test_sets: Sequence[str]) -> AnnotatedDataset:
    """Load sets of VOC, or in its layout.

    The classes are the twenty of VOC where no others are found, else those of the training images, by name.

    Args:
      data_dir: holds VOC2007 and the like, itself or in VOCdevkit, or the folders of one set.
      train_sets, test_sets: such as "2007_trainval", or "trainval" of the folder itself; several are joined.

    Raises:
      UserError: a folder, set, image or annotation that is not there, or no objects.
    """
    root = Path(data_dir).expanduser()
    found = {name: _read_sets(root, sets) for name, sets in (("train", train_sets), ("test", test_sets))}
    names = {name for of_set in found["train"] for name in of_set.names}
    if not names:
        raise UserError(f"{root}: there is no object in the sets {', '.join(train_sets)}")
    class_names = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    problems: list[str] = []
    splits = {}
    for split, images in found.items():
        kept = [image for image in images if image.size is not None]
        problems += [f"{image.path.stem}: {problem}" for image in images for problem in image.problems]
        unknown = sorted({name for image in kept for name in image.names} - set(class_names))
        if unknown:
            raise UserError(
                f"{root}: the class {printable(unknown[0])} of the {split} images is none of the training images"
            )
        if not kept:
            raise UserError(f"{root}: none of the {split} images has an annotation that can be read")
        splits[split] = VocImages(
            tuple(image.path for image in kept), tuple(image.annotation(class_names) for image in kept)
        )
    return AnnotatedDataset("voc", splits["train"], splits["test"], class_names, tuple(problems))


@dataclasses.dataclass(frozen=True)
class VocImage:
    """An image of a set, with the names of its objects.

    Attributes:
      path: of the image.
      size: height and width; None if its annotation cannot be read.
      boxes: [n, 4] float32, from 0 on.
      names: of the classes.
      difficult: of each object.
      problems: in words.
    """

    path: Path
    size: tuple[int, int] | None
    boxes: np.ndarray
    names: tuple[str, ...] = ()
    difficult: tuple[bool, ...] = ()
    problems: tuple[str, ...] = ()

    def annotation(self, class_names: Sequence[str]) -> Annotation:
        height, width = self.size or (0, 0)
        classes = np.array([class_names.index(name) for name in self.names], np.int32)
        return Annotation(height, width, self.boxes, classes, np.array(self.difficult, bool), self.problems)


def _read_sets(root: Path, sets: Sequence[str]) -> list[VocImage]:
    if not sets:
        raise UserError("no set is named: --data.train-sets and --data.test-sets")
    images = [image for name in sets for image in read_set(root, name)]
    paths = [image.path for image in images]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{root}: the image {twice.name} is in the sets {', '.join(sets)} more than once")
    return images


def read_set(root: Path, name: str) -> list[VocImage]:
    """Read one set, such as "2007_trainval".

    Raises:
      UserError: see load_voc().
    """
    year, _, rest = name.rpartition("_")
    of_year = re.fullmatch(r"\d{4}", year) is not None
    set_name = rest if of_year else name
    places = [root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"] if of_year else [root]
    if of_year and root.name == f"VOC{year}":
        places.append(root)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None or not (folder / SETS_FOLDER).is_dir():
        at = folder or places[0]
        raise UserError(
            f"{at} has no {SETS_FOLDER}, whose files SET.txt list the images of a set, a name without .jpg on each"
            " line: check --data.dir, or write such files; --data.train-sets and --data.test-sets name them"
        )
    list_file = folder / SETS_FOLDER / f"{set_name}.txt"
    try:
        ids = [line.split()[0] for line in list_file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        known = sorted(path.stem for path in (folder / SETS_FOLDER).glob("*.txt"))
        there = f"; there are {', '.join(known[:10])}" if known else ""
        raise UserError(
            f"cannot read the set {list_file}: {reason(error)}{there}{did_you_mean(set_name, known)}"
        ) from error
    if not ids:
        raise UserError(f"the set {list_file} is empty")
    for id in ids:
        if Path(id).name != id:
            raise UserError(f"{list_file}: {printable(id)[:80]} is no name of an image")
    annotated = (folder / "Annotations").is_dir()
    return [_read_image(folder, id, annotated=annotated) for id in ids]


def _read_image(folder: Path, id: str, *, annotated: bool) -> VocImage:
    images = folder / "JPEGImages"
    path = images / f"{id}.jpg"
    if not path.is_file():
        others = [images / f"{id}{ending}" for ending in FORMATS]
        path = next((other for other in others if other.is_file()), path)
    nothing = np.zeros((0, 4), np.float32)
    if not annotated:  # as the test images of VOC 2012 come
        try:
            image = open_image(path.read_bytes())
            return VocImage(path, (image.height, image.width), nothing)
        except (OSError, BrokenImageError) as error:
            return VocImage(path, None, nothing, problems=(f"cannot read the image: {reason(error)}",))
    try:
        tree = ElementTree.parse(folder / "Annotations" / f"{id}.xml")  # noqa: S314 (expat limits what entities expand to)
        size = int(tree.findtext("size/height", "")), int(tree.findtext("size/width", ""))
        if min(size) < 1:
            raise ValueError(f"a size of {size[1]}x{size[0]} pixels")
    except (OSError, ValueError, ElementTree.ParseError) as error:
        return VocImage(path, None, nothing, problems=(f"cannot read its annotation: {reason(error)}",))
    boxes, names, difficult, problems = [], [], [], []
    for number, element in enumerate(tree.findall("object"), 1):
        name = (element.findtext("name") or "").strip()
        try:
            box = _read_box(element, size)
            if not name:
                raise ValueError("it has no name")
        except ValueError as error:
            problems.append(f"object {number} ({printable(name)[:40]}): {reason(error)}")
            continue
        boxes.append(box)
        names.append(name)
        difficult.append((element.findtext("difficult") or "0").strip() == "1")
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return VocImage(path, size, array, tuple(names), tuple(difficult), tuple(problems))


def _read_box(element: ElementTree.Element, size: tuple[int, int]) -> list[float]:
    """Return a box from 0 on, its borders moved into the image.

    Raises:
      ValueError: it cannot be read, has no area, or lies outside.
    """
    texts = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x1, y1, x2, y2 = (float(text or "") - 1 for text in texts)
    except ValueError:
        raise ValueError(f"its box cannot be read: {' '.join(map(str, texts))[:80]}") from None
    if not np.isfinite([x1, y1, x2, y2]).all():
        raise ValueError("its box is not finite")
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"its box is empty: {' '.join(map(str, texts))[:80]}")
    height, width = size
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, width - 1.0), min(y2, height - 1.0)
    if x2 < x1 or y2 < y1:
        raise ValueError(f"its box lies outside the image: {' '.join(map(str, texts))[:80]}")
    return [x1, y1, x2, y2]
