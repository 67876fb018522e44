"""Image-classification sets of TensorFlow Datasets (TFDS), read in ArrayRecord form without TensorFlow."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.sources.tfds_metadata import check_folder, check_shards
from resnet_jax.data.sources.tfds_records import AGAIN, BATCH, TfdsImages, one_line, open_records, quiet, unreadable
from resnet_jax.data.splits import make_split
from resnet_jax.data.types import AnyDataset, Dataset, Split, StreamedDataset
from resnet_jax.errors import UserError

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?", re.ASCII)


def load_tfds(name: str, data_dir: str | Path) -> AnyDataset:
    """Return the TFDS set `name`, in memory if all its images are of one size; else they are read one by one.

    "validation" stands in for a "test" that is missing or, as ImageNet's, has no labels. A set already prepared at
    data_dir/NAME/[CONFIG/]VERSION is read as it is, without its builder code. If there is none it is prepared there,
    which needs TensorFlow.

    Args:
      name: NAME[/CONFIG][:VERSION] as in TFDS; without a version the newest prepared one is taken.
      data_dir: the folder TFDS knows as `data_dir`.

    Raises:
      UserError: an unknown set, one that cannot be prepared or read, or one without splits "train" and "test"
        (or "validation") of an "image" (uint8, 1 or 3 channels) and a "label".
    """
    data_dir = Path(data_dir).expanduser()
    with quiet():
        try:
            import tensorflow_datasets as tfds  # slow to import
        except ImportError as error:
            raise UserError(f"tfds:{name}: needs pip install 'resnet_jax[tfds]' ({error})") from error
        folder = _find_prepared(name, data_dir) or _prepare(name, data_dir)
        check_folder(folder, data_dir)
        try:
            builder = tfds.builder_from_directory(str(folder))
            check_shards(builder)
        except UserError:
            raise
        except Exception as error:  # of protobuf, json, tfds: whatever a damaged file leads to
            raise UserError(f"{folder}: not a prepared TFDS set ({one_line(error)}); {AGAIN}") from error
        class_names = _check_features(name, builder.info.features)
        held_out = _held_out(builder)
        if held_out is None or "train" not in builder.info.splits:
            found = ", ".join(builder.info.splits) or "none"
            raise UserError(f'tfds:{name}: needs splits "train" and "test" or "validation" with labels, found {found}')
        if None in builder.info.features["image"].shape:
            train, test = (TfdsImages(folder, split, len(class_names)) for split in ("train", held_out))
            for images in (train, test):
                images.check()
            return StreamedDataset(f"tfds:{name}", folder, train, test, class_names)
        return Dataset(
            name=f"tfds:{name}",
            train=_read(builder, "train", len(class_names)),
            test=_read(builder, held_out, len(class_names)),
            class_names=class_names,
        )


def _find_prepared(name: str, data_dir: Path) -> Path | None:
    """Return the folder of the prepared set, or None; needs no builder code."""
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"tfds:{name}: expected tfds:NAME[/CONFIG][:VERSION], such as tfds:mnist:3.0.1")
    root = data_dir / match["name"]
    roots = [root / match["config"]] if match["config"] else [root, *sorted(root.glob("[!.]*/"))]
    prepared: dict[Path, list[tuple[tuple[int, ...], Path]]] = {}
    for each in roots:
        for info in each.glob("*/dataset_info.json"):
            version = info.parent.name
            if re.fullmatch(r"\d+\.\d+\.\d+", version) and match["version"] in (None, version):
                prepared.setdefault(each, []).append((tuple(map(int, version.split("."))), info.parent))
    if len(prepared) > 1:
        configs = ", ".join(each.name for each in prepared)
        raise UserError(f"tfds:{name}: {root} holds several configs, choose one (NAME/CONFIG): {configs}")
    return max(next(iter(prepared.values())))[1] if prepared else None


def _prepare(name: str, data_dir: Path) -> Path:
    """Have TFDS download `name` and write it as ArrayRecord; return its folder."""
    import tensorflow_datasets as tfds

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a banner about TensorFlow
            builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)  # the community's list is on the network
        base = re.split("[/:]", name)[0]
        nearest = difflib.get_close_matches(base, known)
        hint = f"; the nearest: {', '.join(nearest)}" if nearest else ""
        found = ", ".join(str(path.parent) for path in sorted(data_dir.glob(f"{base}/**/dataset_info.json")))
        hint += f"; prepared there: {found}" if found else ""
        raise UserError(f"tfds:{name}: not prepared in {data_dir}, and TFDS has no such set{hint}") from error
    except ImportError as error:  # some builders import TensorFlow at once
        raise UserError(f"tfds:{name}: {one_line(error)}; pip install 'resnet_jax[tfds]'") from error
    except Exception as error:  # AssertionError, ValueError: it has no such version or config
        raise UserError(f"tfds:{name}: {one_line(error)}") from error
    _check_features(name, builder.info.features)  # before a long download
    if find_spec("tensorflow") is None:
        # TFDS itself would start to download, and fail for want of TensorFlow only after that.
        raise UserError(
            f"tfds:{name} is not prepared in {data_dir}: preparing it needs TensorFlow (pip install"
            f" 'resnet_jax[tfds]'), or copy {builder.data_dir} from where it is prepared"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # network, disk, manual downloads: each builder has its own
        raise UserError(f"tfds:{name}: could not be prepared in {data_dir} ({one_line(error)})") from error
    return Path(builder.data_dir)


def _check_features(name: str, features: Any) -> tuple[str, ...]:
    """Return the class names, having checked that `features` are an image and a label."""
    import tensorflow_datasets as tfds

    def feature(key: str, kind: type) -> Any:
        found = features[key] if isinstance(features, tfds.features.FeaturesDict) and key in features else None
        if not isinstance(found, kind):
            raise UserError(f'tfds:{name}: needs a feature "{key}" of type {kind.__name__}, found {found}')
        return found

    image = feature("image", tfds.features.Image)
    if image.np_dtype != np.uint8 or image.shape[2] not in (1, 3):
        raise UserError(f"tfds:{name}: needs uint8 images of 1 or 3 channels, found {image}")
    return tuple(feature("label", tfds.features.ClassLabel).names)


def _held_out(builder: Any) -> str | None:
    """Return the split to test on: the first of these that has labels."""
    for split in ("test", "validation"):
        if split in builder.info.splits and len(source := open_records(builder, split)):
            with contextlib.suppress(Exception):  # a damaged file is reported when it is read
                if source[0]["label"] < 0:
                    continue
            return split
    return None


def _read(builder: Any, split: str, num_classes: int) -> Split:
    """Decode a whole split into memory."""
    folder, source = Path(builder.data_dir), open_records(builder, split)
    shape = builder.info.features["image"].shape  # H, W, 1 or 3
    images = np.empty((len(source), *shape[:2], 3), np.uint8)
    labels = np.empty(len(source), np.int64)
    for start in range(0, len(source), BATCH):
        stop = min(start + BATCH, len(source))
        try:
            records = source.__getitems__(list(range(start, stop)))
            for index, record in enumerate(records, start):
                if record["image"].shape != shape:  # it could be broadcast by mistake
                    raise ValueError(f"image {index} is {record['image'].shape}, not {shape}")
                images[index] = record["image"]  # one channel is broadcast to three
                labels[index] = record["label"]
        except Exception as error:
            raise unreadable(folder, split, start, stop, error) from error
    return make_split(images, labels, num_classes, f"{folder} ({split})")
