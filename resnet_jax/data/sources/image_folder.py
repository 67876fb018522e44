"""Images in a folder for each class and in folders inside it; each is read only when it is asked for."""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from resnet_jax.data.decode import FORMATS, BrokenImageError
from resnet_jax.data.sources.label_file import FILE_NAMES, find_label_file, read_labels
from resnet_jax.data.sources.names import Names
from resnet_jax.data.splits import classes_without, decoded_images
from resnet_jax.data.types import LabelledImages, StreamedDataset
from resnet_jax.errors import UserError, reason

VAL_NAMES = ("val", "valid", "validation", "test")  # of the folder of images to test on; the first that is there


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Image files and their labels: EncodedImages."""

    root: Path  # the folder of the split
    names: Names  # paths below it
    labels: np.ndarray  # [N] int32

    @classmethod
    def of(cls, root: Path, entries: Iterable[tuple[int, str]]) -> ImageFolder:
        """Make an index of (label, path below `root`) pairs, in their order; none of the pairs is kept."""
        blob, offsets, labels = bytearray(), array("q", [0]), array("i")
        for label, name in entries:
            blob += os.fsencode(name)
            offsets.append(len(blob))
            labels.append(label)
        names = Names(np.frombuffer(blob, np.uint8), np.frombuffer(offsets, np.int64))
        return cls(root, names, np.frombuffer(labels, np.int32))

    def __len__(self) -> int:
        return len(self.labels)

    def id(self, index: int) -> str:
        """Return the path below the folder of the split."""
        return self.names.text(index)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return a file's content and its label.

        Raises:
          BrokenImageError: it cannot be read.
        """
        try:
            return (self.root / os.fsdecode(self.names[index])).read_bytes(), int(self.labels[index])
        except OSError as error:
            raise BrokenImageError(reason(error)) from error


def load_image_folder(name: str, data_dir: str | Path) -> StreamedDataset:
    """List the images DATA_DIR/train/CLASS/FILE and those to test on, as list_val() does.

    Raises:
      UserError: a folder is not there or holds no images, val/ has not the classes of train/, or a label file is wrong.
    """
    root = Path(data_dir).expanduser()
    train, class_names = list_train(root)
    test = list_val(root, class_names)
    return StreamedDataset(name, root, train, test, class_names, untested=classes_without(test, class_names))


def load_test_folder(name: str, data_dir: str | Path) -> LabelledImages:
    """List the images to test on; train/ need not be there, and then the classes are those of val/.

    A class without images counts as one all the same, so that a part of the images can be tested on.

    Raises:
      UserError: no such folder, no image in it, classes that train/ has not, or a wrong label file.
    """
    root = Path(data_dir).expanduser()
    images, class_names = _list_val(root, _class_folders(root / "train") or None)
    return decoded_images(name, images, class_names)


def list_train(data_dir: Path) -> tuple[ImageFolder, tuple[str, ...]]:
    """List DATA_DIR/train/CLASS/FILE, class by class; return the images and the classes, which are sorted by name.

    Raises:
      UserError: no such folder, or a class without images.
    """
    root = data_dir / "train"
    if not root.is_dir():
        split = f"; for {data_dir}/CLASS/FILE: python -m resnet_jax data split {data_dir} OUT"
        raise UserError(f"no folder {root}: the data folder must hold train/CLASS/FILE and val/CLASS/FILE{split}")
    return list_classes(root)


def list_classes(root: Path) -> tuple[ImageFolder, tuple[str, ...]]:
    """List ROOT/CLASS/FILE as list_train() does.

    Raises:
      UserError: no such folder, or a class without images.
    """
    class_names = _class_folders(root)
    if not class_names:
        raise UserError(f"no images in {root}: expected {root}/CLASS/FILE")
    images = ImageFolder.of(root, _nested(root, class_names))
    _check_classes_present(images, class_names)
    return images, tuple(class_names)


def list_val(data_dir: Path, class_names: Sequence[str]) -> ImageFolder:
    """List DATA_DIR/val/CLASS/FILE, or DATA_DIR/val/FILE with the labels of one of label_file.FILE_NAMES.

    A class may have no images there: its errors are not known then.

    Raises:
      UserError: no such folder, classes that are not those of train/, or a wrong label file.
    """
    return _list_val(data_dir, class_names)[0]


def val_folder(data_dir: Path) -> Path:
    """Return DATA_DIR/val, or the folder that has its place under another name."""
    return next((data_dir / name for name in VAL_NAMES if (data_dir / name).is_dir()), data_dir / VAL_NAMES[0])


def _list_val(data_dir: Path, class_names: Sequence[str] | None) -> tuple[ImageFolder, tuple[str, ...]]:
    """List the images of val/; without `class_names` they are found there."""
    root = val_folder(data_dir)
    if not root.is_dir():
        raise UserError(f"no folder {root}: --data.dir must name the folder that holds val/CLASS/FILE")
    folders = _class_folders(root)
    if not folders:
        return _list_flat(data_dir, class_names)
    class_names = tuple(folders if class_names is None else class_names)
    unknown = sorted(set(folders) - set(class_names))
    if unknown:
        raise UserError(f"{root / unknown[0]}: there is no such class in {data_dir / 'train'} ({len(unknown)} in all)")
    images = ImageFolder.of(root, _nested(root, class_names))
    if not len(images):
        raise UserError(f"no images in {root}: expected {root}/CLASS/FILE")
    return images, class_names


def _list_flat(data_dir: Path, class_names: Sequence[str] | None) -> tuple[ImageFolder, tuple[str, ...]]:
    """List the images right in val/, with labels from a file."""
    root = val_folder(data_dir)
    files = sorted(entry.name for entry in _entries(root) if _is_image(entry))
    if not files:
        raise UserError(f"no images in {root}: expected {root}/CLASS/FILE")
    path = find_label_file(data_dir)
    if path is None:
        raise UserError(
            f"{root} holds images without folders of classes: put their labels into {data_dir / FILE_NAMES[0]} as lines"
            f" FILE LABEL, or copy Kaggle's {FILE_NAMES[-1]} into {data_dir}"
        )
    labels, class_names = read_labels(path, root, files, class_names)
    return ImageFolder.of(root, zip(labels, files, strict=True)), class_names


def _class_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in `root`."""
    folders, loose = [], []
    for entry in _entries(root):
        if _is_folder(entry):
            folders.append(entry.name)
        elif _is_image(entry):
            loose.append(entry.name)
    if folders and loose:
        raise UserError(
            f"{root / min(loose)} lies beside the folders of the classes ({len(loose)} such images):"
            " move it into the one it belongs to"
        )
    return sorted(folders)


def _nested(root: Path, class_names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield (label, CLASS/FILE or CLASS/FOLDER/FILE) of all images, sorted; a class that has no folder has none."""
    for label, name in enumerate(class_names):
        for file in sorted(path for path, entry in _below(root / name) if _is_image(entry)):
            yield label, f"{name}/{file}"


def _below(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield what is in a folder and in those inside it, but for folders: paths below it, and entries.

    Links are followed, but not to a folder that holds this one, or that was seen before.
    """
    real = os.path.realpath(folder)
    seen = {real, *map(str, Path(real).parents)}
    folders = [("", folder)]
    while folders:
        prefix, path = folders.pop()
        inside = []
        for entry in _entries(path):
            if _is_folder(entry):
                inside.append(entry)
            else:
                yield prefix + entry.name, entry
        for entry in sorted(inside, key=lambda entry: entry.name):  # so that of two links to a folder the first counts
            real = os.path.realpath(entry.path)
            if real not in seen:
                seen.add(real)
                folders.append((f"{prefix}{entry.name}/", Path(entry.path)))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return files as they are, and in the place of folders all images inside them, sorted.

    Raises:
      UserError: there is no such file, or no image in a folder.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(name for name, entry in _below(path) if _is_image(entry))
            if not inside:
                raise UserError(f"no images in {path} (files that end in {' '.join(sorted(FORMATS))})")
            found += [path / name for name in inside]
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"no file or folder {path}")
    return found


def ignored_files(root: Path, class_names: Sequence[str]) -> dict[str, int]:
    """Count files in the folders of classes that are no images, by what their names end in, the most first."""
    names = (path for name in class_names for path, entry in _below(root / name) if not _is_image(entry))
    counts = Counter(os.path.splitext(name)[1].lower() or "without an ending" for name in names)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _check_classes_present(images: ImageFolder, class_names: Sequence[str]) -> None:
    if missing := classes_without(images, class_names):
        folder = images.root / missing[0]
        more = f" and of {len(missing) - 1} more classes" if len(missing) > 1 else ""
        others = any(True for _ in _below(folder))
        instead = f" (its files are none of {' '.join(sorted(FORMATS))})" if others else ""
        raise UserError(
            f"no images of the class {missing[0]}{more} in {images.root}{instead}: delete the folder if"
            " there is no such class"
        )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder but for hidden files such as .DS_Store; nothing if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"cannot list {folder}: {reason(error)}") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    # Not is_file(): an image that is a broken link is to be reported, not left out.
    return os.path.splitext(entry.name)[1].lower() in FORMATS and not _is_folder(entry)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
