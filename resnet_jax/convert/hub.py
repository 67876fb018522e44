"""Weights by the names that others publish them under, downloaded once, and what stands beside them."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.errors import UserError, did_you_mean, optional, printable, reason
from resnet_jax.files import read_text
from resnet_jax.inference.load import Trained
from resnet_jax.models import VGG
from resnet_jax.models.blocks import StrideOn


class Published(NamedTuple):
    """A file of a network: its name ends in the begin of its SHA-256; the error in % that its publisher states."""

    file: str
    top1_error: float


_V1, _V2 = "IMAGENET1K_V1", "IMAGENET1K_V2"
# By publisher: the folder that files are in, and the files by name. Those of torchvision, with 224 pixels of 256 or, in
# the second version, of 232, and of "Proper ResNet Implementation for CIFAR10/CIFAR100 in Pytorch" (Y. Idelbayev).
ADDRESSES = {
    "torchvision": "https://download.pytorch.org/models/",
    "cifar": "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/",
}
PUBLISHED = {
    "torchvision": {
        f"resnet18.{_V1}": Published("resnet18-f37072fd.pth", 30.242),
        f"resnet34.{_V1}": Published("resnet34-b627a593.pth", 26.686),
        f"resnet50.{_V1}": Published("resnet50-0676ba61.pth", 23.870),
        f"resnet50.{_V2}": Published("resnet50-11ad3fa6.pth", 19.142),
        f"resnet101.{_V1}": Published("resnet101-63fe2227.pth", 22.626),
        f"resnet101.{_V2}": Published("resnet101-cd907fc2.pth", 18.114),
        f"resnet152.{_V1}": Published("resnet152-394f9c45.pth", 21.688),
        f"resnet152.{_V2}": Published("resnet152-f82ba261.pth", 17.716),
        f"vgg16.{_V1}": Published("vgg16-397923af.pth", 28.408),
        f"vgg19.{_V1}": Published("vgg19-dcbb9e9d.pth", 27.624),
    },
    "cifar": {
        "resnet20": Published("resnet20-12fca82f.th", 8.27),
        "resnet32": Published("resnet32-d509ac18.th", 7.37),
        "resnet44": Published("resnet44-014dd654.th", 6.90),
        "resnet56": Published("resnet56-4bfd9763.th", 6.61),
        "resnet110": Published("resnet110-1d1ed7c2.th", 6.32),
        "resnet1202": Published("resnet1202-f3b1deed.th", 6.18),
    },
}
_HUBS = {"hf": "", "timm": "timm/"}  # on Hugging Face's hub: what comes before the name
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Of timm's networks these alone are the paper's; others share their names of tensors.
_ARCHITECTURES = re.compile(r"(tv_)?resnet(18|34|50|101|152)")


class Beside(NamedTuple):
    """What the JSON beside a file of weights says: nothing, where it says nothing.

    Attributes:
      stride_on: which convolution of a bottleneck subsamples.
      mean, std: of each channel of pixels in [0, 1].
      class_names: in the order of the logits.
    """

    stride_on: StrideOn | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()


class _Pretrained(pydantic.BaseModel):
    mean: tuple[float, ...] = ()
    std: tuple[pydantic.PositiveFloat, ...] = ()


class _Config(pydantic.BaseModel):
    """config.json of transformers or timm."""

    downsample_in_bottleneck: bool | None = None
    id2label: dict[int, str] = {}
    architecture: str | None = None
    pretrained_cfg: _Pretrained = _Pretrained()


class _Preprocessor(pydantic.BaseModel):
    """preprocessor_config.json of transformers."""

    image_mean: tuple[float, ...] = ()
    image_std: tuple[pydantic.PositiveFloat, ...] = ()


def read_beside(file: Path) -> Beside:
    """Read what transformers or timm have written beside a file of weights; other JSON says nothing.

    Raises:
      UserError: timm says that the network is none of the paper's.
    """
    config, preprocessor = _read(file, "config.json", _Config), _read(file, "preprocessor_config.json", _Preprocessor)
    if config.architecture and not _ARCHITECTURES.fullmatch(config.architecture):
        raise UserError(f"{file}: {config.architecture} by its config.json is no network of this package")
    names = tuple(name for _, name in sorted(config.id2label.items()))
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names) or sorted(config.id2label) != list(range(len(names))):
        names = ()
    return Beside(
        None if config.downsample_in_bottleneck is None else "1x1" if config.downsample_in_bottleneck else "3x3",
        config.pretrained_cfg.mean or preprocessor.image_mean,
        config.pretrained_cfg.std or preprocessor.image_std,
        names,
    )


def _read(file: Path, name: str, kind: Any) -> Any:
    try:
        return kind.model_validate_json(read_text(file.with_name(name)))
    except (OSError, ValueError):
        return kind()


def is_hub_name(source: str) -> bool:
    """Tell names of published weights from files."""
    return source.partition(":")[0] in {*PUBLISHED, *_HUBS} and ":" in source


def fetch(name: str, *, offline: bool, say: Callable[[str], object]) -> tuple[Path, Beside, str]:
    """Return the file of published weights, downloaded if it was not before, what is beside it, and its full name.

    Args:
      name: "torchvision:resnet50" (or "torchvision:resnet50.IMAGENET1K_V2"), "cifar:resnet20", "timm:NAME" or
        "hf:OWNER/NAME", both with @REVISION behind it if not the newest is wanted.
      offline: download nothing.
      say: called with what its publisher says of it, a line each.

    Raises:
      UserError: there are no such weights, or they cannot be downloaded.
    """
    publisher, _, rest = name.partition(":")
    if publisher in _HUBS:
        repository, _, revision = (_HUBS[publisher] + rest).partition("@")
        file = _from_hugging_face(name, repository, revision or None, offline)
        return file, read_beside(file), f"{publisher}:{rest.partition('@')[0]}@{file.parent.name}"
    known = PUBLISHED[publisher]
    full = rest if rest in known else f"{rest}.{_V1}"
    if full not in known:
        raise UserError(f"{publisher} has no {rest}: choose {', '.join(known)}{did_you_mean(rest, known)}")
    published = known[full]
    say(f"{publisher}:{full}: {published.top1_error:g} % top-1 error by its publisher")
    return _from_address(ADDRESSES[publisher] + published.file, offline), Beside(), f"{publisher}:{full}"


def _from_address(address: str, offline: bool) -> Path:
    """Download a file whose name has the first digits of its SHA-256, into the user's folder for caches."""
    pooch = optional("pooch", extra="download")
    pooch.get_logger().setLevel("WARNING")
    folder, name = Path(pooch.os_cache("resnet_jax")), address.rpartition("/")[2]
    if (folder / name).is_file():
        return folder / name
    by_hand = f"put {address} into {folder}"
    if offline:
        raise UserError(f"--offline: {name} is not there; {by_hand}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(suffix=".part", dir=folder) as temporary:
            downloaded = pooch.retrieve(address, None, name, temporary, progressbar=sys.stderr.isatty())
            checksum = sha256_of(Path(downloaded))
            begin = Path(name).stem.rpartition("-")[2]
            if not checksum.startswith(begin):
                raise UserError(f"{address} is not the file that was published: SHA-256 {checksum}, not {begin}...")
            os.replace(downloaded, folder / name)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"could not download {address} ({printable(reason(error))}): {by_hand}") from error
    return folder / name


def _from_hugging_face(name: str, repository: str, revision: str | None, offline: bool) -> Path:
    """Download weights and the JSON beside them from Hugging Face's hub (HF_ENDPOINT) into its cache (HF_HOME)."""
    hub = optional("huggingface_hub", extra="hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it says while it tries again

    def download(file: str) -> Path | None:
        if offline:
            kept = hub.try_to_load_from_cache(repository, file, revision=revision)
            return Path(kept) if isinstance(kept, str) else None
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        except hub.errors.LocalEntryNotFoundError:  # which is an EntryNotFoundError, too: there is no network
            raise
        except hub.errors.EntryNotFoundError:
            return None

    try:
        for file in ("config.json", "preprocessor_config.json"):
            download(file)
        found = next(filter(None, map(download, _WEIGHTS)), None)
    except Exception as error:  # of the network, of the hub, of a name that is none
        raise UserError(f"could not download {name} ({printable(reason(error))})") from error
    if found is None:
        where = "was not downloaded before: leave out --offline" if offline else f"has neither {' nor '.join(_WEIGHTS)}"
        raise UserError(f"{name} {where}")
    return found


def describe_for_transformers(trained: Trained) -> dict[str, str]:
    """Return the content of config.json and preprocessor_config.json of transformers.

    Raises:
      UserError: transformers has no such network.
    """
    model, inputs = trained.model, trained.origin.inputs
    mean, std = inputs.preprocessing
    if isinstance(model, VGG) or model.stem != "imagenet" or model.shortcut != "B":
        raise UserError("--names hf: the ResNets of transformers are those of ImageNet with shortcuts of option B")
    if mean.ndim == 3:
        raise UserError("--names hf: the mean of this network is an image, and transformers takes one of each channel")
    labels = dict(enumerate(inputs.class_names))
    config = {
        "architectures": ["ResNetForImageClassification" if labels else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": inputs.image_shape[2],
        "embedding_size": model.filters[0],
        "hidden_sizes": [filters * (4 if model.block == "bottleneck" else 1) for filters in model.filters],
        "depths": model.blocks,
        "layer_type": model.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": model.stride_on == "1x1",
        "id2label": labels,
        "label2id": {name: number for number, name in labels.items()},
    }
    preprocessor = {
        "image_processor_type": "ConvNextImageProcessor",  # which resizes and crops as evaluation does
        "size": {"shortest_edge": inputs.image_shape[0]},
        "crop_pct": 0.875,
        "resample": 2,  # bilinear
        "image_mean": [float(value) for value in mean],
        "image_std": [float(value) for value in std],
    }
    files = {"config.json": config, "preprocessor_config.json": preprocessor}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
