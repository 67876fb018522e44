"""Image-classification sets of TensorFlow Datasets (TFDS), read in ArrayRecord form without TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import resource
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.sources.shards import open_shard
from resnet_jax.data.types import AnyDataset, Dataset, Split, StreamedDataset
from resnet_jax.errors import UserError, did_you_mean, optional, reason

_AGAIN = "delete that folder and prepare it anew"
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?", re.ASCII)


def load_tfds(name: str, data_dir: str | Path) -> AnyDataset:
    """Return the TFDS set `name`, in memory if all its images are of one size; else they are read one by one.

    "validation" stands in for a "test" that is missing or, as ImageNet's, has no labels. A set already prepared at
    data_dir/NAME/[CONFIG/]VERSION is read as it is, without its builder code. If there is none it is prepared there,
    which needs TensorFlow.

    Args:
      name: "tfds:NAME[/CONFIG][:VERSION]" as in TFDS; without a version the newest prepared one is taken.
      data_dir: the folder TFDS knows as `data_dir`.

    Raises:
      UserError: an unknown set, one that cannot be prepared or read, or one without splits "train" and "test"
        (or "validation") of an "image" (uint8, 1 or 3 channels) and a "label".
    """
    folder, builder = open_prepared(name, data_dir, _check_features)
    with quiet():
        class_names = _check_features(name, builder.info.features)
        height, width, _ = builder.info.features["image"].shape  # None where they vary
        splits = {split: TfdsImages(folder, split, len(class_names)) for split in builder.info.splits}
        held_out = next((split for split in ("test", "validation") if split in splits and splits[split].labelled), None)
        if held_out is None or "train" not in splits:
            found = ", ".join(splits) or "none"
            raise UserError(f'{name}: needs splits "train" and "test" or "validation" with labels, found {found}')
        train, test = splits["train"], splits[held_out]
        if height is None or width is None:
            return StreamedDataset(name, folder, train, test, class_names)
        return Dataset(name, train.decode(height, width), test.decode(height, width), class_names)


def open_prepared(name: str, data_dir: str | Path, check: Callable[[str, Any], object]) -> tuple[Path, Any]:
    """Return the folder of a set, which is prepared if it is not yet, and its builder; all its files are there.

    Args:
      name, data_dir: see loadtfds_package().
      check: check(name, features) raises UserError if they are not what is needed, before a long download.
    """
    data_dir = Path(data_dir).expanduser()
    with quiet():
        folder = _find_prepared(name, data_dir) or _prepare(name, data_dir, check)
        with one_line(f"{folder}: not a prepared TFDS set"):
            builder = tfds_package().builder_from_directory(str(folder))
        _check_shards(folder, builder)
    return folder, builder


def open_source(folder: Path, split: str) -> Any:
    """Return the records of a split, by number; images are not decoded."""
    tfds = tfds_package()
    with contextlib.suppress(OSError, ValueError):  # as ImageNet has 1024 files, and the usual limit is 1024
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with quiet(), one_line(f"{folder}: could not be opened"):
        builder = tfds.builder_from_directory(str(folder))
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


class TfdsImages:
    """The encoded images of a split: EncodedImages. Each process opens the files when it first reads from them."""

    def __init__(self, folder: Path, split: str, num_classes: int):
        """Take the folder of a prepared set, and one of its splits."""
        self._folder, self._split, self._num_classes = folder, split, num_classes

    def __len__(self) -> int:
        return len(self._source)

    @property
    def labelled(self) -> bool:
        """Whether there are images, and labels other than the -1 of ImageNet's test images."""
        with contextlib.suppress(Exception):  # a damaged file is reported when it is read
            return self._source[0]["label"] >= 0
        return len(self) > 0

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int32; they are stored with the images, so that all these are read for them."""
        labels = np.empty(len(self), np.int32)
        for index in range(len(self)):
            with self._no_broken(index):
                labels[index] = self.read(index)[1]
        return labels

    def id(self, index: int) -> str:
        """Return the split and the number, as these images have no names."""
        return f"{self._split}/{index}"

    def read(self, index: int) -> tuple[bytes, int]:
        """Return an image's content and its label.

        Raises:
          BrokenImageError: it cannot be read, or its label is none of the classes.
        """
        try:
            record = self._source[index]
            content, label = record["image"], int(record["label"])
        except Exception as error:  # of array_record, protobuf, tfds: whatever a damaged file leads to
            raise BrokenImageError(reason(error)) from error
        if not 0 <= label < self._num_classes:
            raise BrokenImageError(f"its label {label} is outside 0..{self._num_classes - 1}")
        return content, label

    def decode(self, height: int, width: int) -> Split:
        """Decode all images, which are of one size, into memory."""
        images, labels = np.empty((len(self), height, width, 3), np.uint8), np.empty(len(self), np.int32)
        for index in range(len(self)):
            with self._no_broken(index):
                content, labels[index] = self.read(index)
                image = decode(content)
                if image.shape[:2] != (height, width):  # it could be broadcast by mistake
                    raise BrokenImageError(f"it is {image.shape[:2]} pixels large, not {(height, width)}")
                images[index] = image
        return Split(images, labels)

    def _no_broken(self, index: int) -> contextlib.AbstractContextManager[None]:
        return one_line(f"{self._folder}: cannot read the image {self.id(index)}")

    @functools.cached_property
    def _source(self) -> Any:
        return open_source(self._folder, self._split)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}


def _find_prepared(name: str, data_dir: Path) -> Path | None:
    """Return the folder of the prepared set, or None; needs no builder code."""
    match = _NAME.fullmatch(name.removeprefix("tfds:"))
    if not match:
        raise UserError(f"{name}: expected tfds:NAME[/CONFIG][:VERSION], such as tfds:mnist:3.0.1")
    root = data_dir / match["name"]
    infos = root.glob(f"{match['config'] or '**'}/{match['version'] or '*'}/dataset_info.json")
    folders = [info.parent for info in infos if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)]
    configs = sorted({folder.parent.name for folder in folders})
    if len(configs) > 1:
        raise UserError(f"{name}: {root} holds several configs, choose one (NAME/CONFIG): {', '.join(configs)}")
    return max(folders, key=lambda folder: tuple(map(int, folder.name.split("."))), default=None)


def _prepare(name: str, data_dir: Path, check: Callable[[str, Any], object]) -> Path:
    """Have TFDS download a set and write it as ArrayRecord; return its folder."""
    tfds = tfds_package()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a banner about TensorFlow
            builder = tfds.builder(name.removeprefix("tfds:"), data_dir=str(data_dir), file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        base = re.split("[/:]", name)[1]
        found = ", ".join(str(path.parent) for path in sorted(data_dir.glob(f"{base}/**/dataset_info.json")))
        known = tfds.list_builders(with_community_datasets=False)  # the community's list is on the network
        hint = f"; prepared there: {found}" if found else did_you_mean(base, known)
        raise UserError(f"{name}: not prepared in {data_dir}, and TFDS has no such set{hint}") from error
    except Exception as error:  # no such version or config; ImportError: of TensorFlow
        raise UserError(f"{name}: {reason(error)}") from error
    check(name, builder.info.features)  # before a long download
    if find_spec("tensorflow") is None:
        # TFDS itself would start to download, and miss TensorFlow only after that.
        raise UserError(
            f"{name} is not prepared in {data_dir}: preparing it needs TensorFlow (pip install tensorflow), or copy"
            f" {builder.data_dir} from where it is prepared"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # network, disk, manual downloads: each builder has its own
        raise UserError(f"{name}: could not be prepared in {data_dir} ({reason(error)})") from error
    return Path(builder.data_dir)


def _check_shards(folder: Path, builder: Any) -> None:
    """Check that all files can be opened and hold as many images as they should."""
    found = getattr(builder.info.file_format, "value", None)
    if found != "array_record":
        raise UserError(f"{folder}: prepared as {found}, needs array_record; {_AGAIN}, or choose another --data.dir")
    for split in builder.info.splits.values():
        for file in split.file_instructions:
            open_shard(Path(file.filename), file.examples_in_shard).close()


def _check_features(name: str, features: Any) -> tuple[str, ...]:
    """Return the class names, once it is clear that `features` are an image and a label."""
    kinds = tfds_package().features

    def feature(key: str, kind: type) -> Any:
        found = features[key] if isinstance(features, kinds.FeaturesDict) and key in features else None
        if not isinstance(found, kind):
            raise UserError(f'{name}: needs a feature "{key}" of type {kind.__name__}, found {found}')
        return found

    image = feature("image", kinds.Image)
    if image.np_dtype != np.uint8 or image.shape[2] not in (1, 3):
        raise UserError(f"{name}: needs uint8 images of 1 or 3 channels, found {image}")
    return tuple(feature("label", kinds.ClassLabel).names)


def tfds_package() -> Any:
    """Import TFDS, which is slow."""
    return optional("tensorflow_datasets", extra="tfds", package="tensorflow-datasets")


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a damaged file leads to in TFDS, protobuf or array_record into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({reason(error)}); {_AGAIN}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the hints that TFDS logs (OpenCV would be faster and the like) from the user."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
