"""Trained networks: load one, feed it images, begin another run with its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.config import Config
from resnet_jax.data.augment import normalize
from resnet_jax.data.types import Inputs
from resnet_jax.errors import UserError, did_you_mean
from resnet_jax.models import Model, abstract_variables, build_model, stack_blocks
from resnet_jax.models.detector import NEW_LAYERS, PARTS, SMALL_IMAGE, Detector, build_detector
from resnet_jax.optim import HEADS
from resnet_jax.run.checkpoint import read_state
from resnet_jax.run.network_file import SUFFIX, Description, read_description, read_own
from resnet_jax.run.saved import intact_step
from resnet_jax.run.workdir import load_config, load_inputs

_STRUCTURE = ("family", "depth", "width", "shortcut", "zero_channels", "stride_on", "pool_padding")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where trained weights come from: the configuration of the run, the step of the checkpoint, and its inputs.

    `metadata` is what else the file says, such as "results", if it was one.
    """

    config: Config
    step: int
    inputs: Inputs
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Trained(NamedTuple):
    """A network with its weights: `model.apply(variables, preprocess(images, origin), train=False)`.

    Of detection it is a Detector, for inference.detect.detect().

    On GPUs and TPUs that rounds products unless it is inside `jax.default_matmul_precision("highest")`, as eval.py is.
    """

    model: Any  # Model, or Detector
    variables: dict[str, Any]
    origin: Origin


def load(source: str | Path, *, step: int | None = None, scan_blocks: bool = False) -> Trained:
    """Load a trained network onto the first device; the data set is not needed.

    Args:
      source: the work directory of a run of train.py or of an import, a .safetensors file of export with our names of
        tensors, or the name of a published network: one of published().
      step: of the checkpoint in a work directory; None for the last one that is intact.
      scan_blocks: whether the network is one with stacked blocks, which compiles fast however deep it is. It does
        not matter how it was trained.

    Returns:
      (model, variables, origin): variables holds `params` and `batch_stats`, float32.

    Raises:
      UserError: no such network, or no such checkpoint or a damaged one.
    """
    path = _find(source)
    described = _describe(path) if path.is_file() else None
    config, inputs = (described.config, described.inputs) if described else (load_config(path), load_inputs(path))
    model_config = dataclasses.replace(config.model, scan_blocks=scan_blocks, remat=False)
    model = build_network(dataclasses.replace(config, model=model_config), len(inputs.class_names))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if described:
        if step not in (None, described.step):
            raise UserError(f"{path} holds step {described.step} alone; got --step {step}")
        variables = read_own(path, described)
        variables = jax.device_put(stack_blocks(variables) if scan_blocks else variables, device)
        return Trained(model, variables, Origin(config, described.step, inputs, described.more))
    shapes = abstract_variables(model, SMALL_IMAGE if config.detects else inputs.image_shape)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    step = intact_step(path, step)
    variables = read_state(path, step, wanted, partial=True)  # whatever the optimizer was
    return Trained(model, variables, Origin(config, step, inputs))


def check_classifies(trained: Trained) -> None:
    """Raise UserError if a network is a detector."""
    if isinstance(trained.model, Detector):
        raise UserError("this network detects objects: python -m resnet_jax detect, or detect() in Python")


def build_network(config: Config, num_classes: int) -> Model | Detector:
    """Build the configured classifier, or detector.

    Raises:
      UserError: there is no such network.
    """
    return build_detector(config, num_classes) if config.detects else build_model(config.model, num_classes)


def read_config(source: str | Path) -> Config:
    """Read how the network of load(source) was trained, and nothing else.

    Raises:
      UserError: no such network.
    """
    path = _find(source)
    return _describe(path).config if path.is_file() else load_config(path)


def published() -> dict[str, Path]:
    """Return the files of the networks that come with this package, by name, such as "cifar10_resnet20"."""
    package = Path(__file__).parents[1]
    folders = [package / "weights", package.parent / "weights"]  # of an installed package, and of a checkout
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {file.stem: file for file in sorted(folder.glob(f"*{SUFFIX}"))}


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.exists() or len(path.parts) > 1:
        return path
    known = published()
    if str(source) not in known:
        raise UserError(
            f"{source} is no work directory, no {SUFFIX} file and none of the published networks"
            f" {', '.join(known)}{did_you_mean(str(source), known)}"
        )
    return known[str(source)]


def _describe(path: Path) -> Description:
    """Read what a file of ours says of its network."""
    description = read_description(path)
    if description is None or description.names != "resnet_jax":
        raise UserError(
            f"{path} has no network in our names of tensors; make a work directory of it:"
            f" python -m resnet_jax import {path} --out WORKDIR"
        )
    return description


def preprocess(images: Any, origin: Origin) -> jax.Array:
    """Normalize images as the network was trained on them.

    Args:
      images: uint8 [N, H, W, C], RGB where C is 3; of the size origin.inputs.image_shape where the mean is per pixel.
      origin: of load().

    Returns:
      float32 [N, H, W, C].

    Raises:
      ValueError: images of another type or size.
    """
    mean, std = origin.inputs.preprocessing
    images = jax.numpy.asarray(images)
    channels = origin.inputs.image_shape[2]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != channels:
        raise ValueError(f"expected uint8 images [N, H, W, {channels}], got {images.dtype} {images.shape}")
    if mean.ndim == 3 and images.shape[1:] != mean.shape:
        raise ValueError(f"the mean is per pixel, for images {mean.shape}; got {images.shape[1:]}")
    return normalize(images, mean, std)


def check_same_network(trained: Trained, config: Config) -> None:
    """Check what shapes alone would not show, such as which convolution subsamples.

    Raises:
      UserError: the networks differ in more than the number of classes.
    """
    if (channels := trained.origin.inputs.image_shape[2]) != 3:
        raise UserError(f"--init-from holds a network that takes {channels} channels; images are read as RGB")
    for name in _STRUCTURE:
        theirs, ours = getattr(trained.origin.config.model, name), getattr(config.model, name)
        if theirs != ours:
            option = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"--init-from holds a network with model.{name} {theirs}, not {ours}: add {option} {theirs}"
            )


def adopt_weights(trained: Trained, variables: dict[str, Any]) -> dict[str, Any]:
    """Replace `params` and `batch_stats` of a new network, but for a last layer of other classes.

    Those of a classifier fit the trunk and the tail of a detector by their names; its other layers stay new.

    Args:
      trained: loaded with the scan_blocks of the new network.
      variables: of the new network, on its devices.

    Raises:
      UserError: other layers differ.
    """
    detects = "trunk" in variables["params"] and not isinstance(trained.model, Detector)

    def found(collection: str) -> dict[tuple[str, ...], Any]:
        theirs = flatten_dict(trained.variables[collection])
        if not detects:
            return theirs
        of_parts = flatten_dict(variables[collection])
        return {path: theirs[path[1:]] for path in of_parts if path[0] in PARTS and path[1:] in theirs}

    params, theirs = flatten_dict(variables["params"]), found("params")
    differing = {path for path in params if path not in theirs or params[path].shape != theirs[path].shape}
    layers = {path[path[0] in PARTS] for path in differing}
    new = set() if trained.origin.inputs.class_names else {"fc6", "fc7"}  # a backbone has none of VGG's last layers
    if detects:
        new |= set(NEW_LAYERS)
    if layers - set(HEADS) - new:
        raise UserError(f"--init-from does not fit the network: {', '.join(sorted(layers - set(HEADS) - new))} differ")
    # A layer is new as a whole.
    heads = {path[0] for path in differing if path[0] in HEADS}
    adopted = {path: old if path in differing or path[0] in heads else theirs[path] for path, old in params.items()}
    weights = {"params": unflatten_dict(adopted), "batch_stats": unflatten_dict(found("batch_stats"))}
    return jax.tree.map(lambda leaf, old: jax.device_put(np.asarray(leaf), old.sharding), weights, variables)
