"""Make a work directory from a file of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.convert.caffe import read_caffemodel, read_mean
from resnet_jax.convert.files import Tensors, read_tensors, some_names
from resnet_jax.convert.foreign_names import to_torchvisions
from resnet_jax.convert.names import Layout, layout_of, variables_from_tensors
from resnet_jax.data.sources.cifar10 import CLASS_NAMES
from resnet_jax.data.types import Inputs, Preprocessing, check_inputs
from resnet_jax.errors import UserError
from resnet_jax.files import read_json
from resnet_jax.models import ModelName, abstract_variables, build_model, parse_name
from resnet_jax.models.blocks import StrideOn
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.run.network_file import Description, is_safetensors, read_description, read_own, read_safetensors
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import create_train_state

PreprocessingName = Literal["torchvision", "caffe", "none"]

# Channel means and standard deviations in [0, 1], RGB.
PREPROCESSING: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    # Both torchvision's networks and the CIFAR ResNets published for PyTorch use ImageNet's statistics.
    "torchvision": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Caffe subtracts the mean from pixels in 0..255 and does not scale them.
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
# The last layer of each kind of file.
_HEADS = {"cifar": "linear.weight", "torchvision": "fc.weight", "vgg": "classifier.6.weight"}


def import_weights(file: Path, model_name: str | None, workdir: Path, **options: Any) -> Config:
    """Read weights and write a work directory with them as the checkpoint of step 0.

    Args:
      file, model_name, **options: of read_weights().
      workdir: to be made.

    Raises:
      UserError: a file that cannot be read, does not fit the network, or a work directory that exists.
    """
    if workdir.exists():
        raise UserError(f"{workdir} exists; choose another --out")
    config, variables, inputs = read_weights(file, model_name, **options)
    optimizer = build_optimizer(config.optim, build_schedule(config.optim, config.run.steps))
    state = create_train_state(optimizer, jax.tree.map(jnp.asarray, variables))
    create_workdir(workdir, config, inputs, state, file.name)
    return config


def read_weights(
    file: Path,
    model_name: str | None = None,
    *,
    preprocessing: PreprocessingName | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    mean_file: Path | None = None,
    stride_on: StrideOn | None = None,
    prefix: str = "",
    averaged: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Config, dict[str, Any], Inputs]:
    """Return the configuration of a network, its variables as NumPy arrays, and its inputs.

    Args:
      file: of PyTorch, .safetensors or .caffemodel.
      model_name: such as "resnet20", "resnet50", "vgg16"; a file that was exported from here says it itself, and
        what follows.
      preprocessing: that the weights were trained with; None for the one usual for the layout of the file.
      mean, std: of the channels of pixels in [0, 1], instead of those of `preprocessing`.
      mean_file: Caffe's mean image (.binaryproto), instead of channel means.
      stride_on: which convolution of a bottleneck subsamples; None: as usual for the layout, "1x1" for Caffe
        and "3x3" for torchvision; Hugging Face's config.json beside the file says it, and no other file.
      prefix, averaged: of read_tensors().
      say: called with what was assumed, a line each.

    Raises:
      UserError: a file that cannot be read or does not fit the network.
    """
    name = None if model_name is None else _parse(model_name)
    if is_safetensors(file) and (description := read_description(file)):
        given = {
            "--preprocessing": preprocessing,
            "--mean": mean,
            "--std": std,
            "--mean-file": mean_file,
            "--stride-on": stride_on,
            "--prefix": prefix or None,
            "--weights ema": averaged or None,
        }
        if unneeded := [option for option, value in given.items() if value is not None]:
            raise UserError(f"{file} was exported from here and says it itself: leave out {', '.join(unneeded)}")
        _check_name(name, description.config.model, file)
        return read_exported(file, description)
    if name is None:
        raise UserError(f"--model is needed: nothing in {file} says which network it is")
    is_caffe = file.suffix == ".caffemodel"
    if is_caffe and (prefix or averaged):
        raise UserError(f"{file}: --prefix and --weights are for files of PyTorch and .safetensors")
    read = Tensors(read_caffemodel(file)) if is_caffe else read_tensors(file, prefix=prefix, averaged=averaged)
    tensors = to_torchvisions(read.arrays)
    layout: Layout = "cifar" if "linear.weight" in tensors else "torchvision"
    model_config = _model_config(name, tensors, is_caffe, stride_on or _stride_beside(file))
    if name.shortcut and name.shortcut != model_config.shortcut:
        raise UserError(f"--model {model_name}: {file} has shortcuts of option {model_config.shortcut}")
    num_classes = _count_classes(tensors, _HEADS["vgg" if name.family == "vgg" else layout], file, str(model_name))
    usual = PREPROCESSING[preprocessing or ("caffe" if is_caffe else "torchvision")]
    mean, std = mean or usual[0], std or usual[1]
    inputs = _inputs_of_others(name, num_classes, mean, std, mean_file)
    dataset = "cifar10" if name.family == "cifar" else "imagenet"
    config = Config(model=model_config, data=DataConfig(dataset, mean=None if mean_file else mean, std=std))
    variables = _to_variables(tensors, config, inputs, layout, file)
    if read.taken:
        say(f"weights: {read.taken}")
    of = f"of {mean_file}" if mean_file else " ".join(f"{value:.4g}" for value in mean)
    say(f"pixels in [0, 1]: mean {of}, std {' '.join(f'{value:.4g}' for value in std)}")
    return config, variables, inputs


def _inputs_of_others(
    name: ModelName,
    num_classes: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    mean_file: Path | None,
) -> Inputs:
    """Return the inputs of weights that others trained: of the usual size, the mean that of a file if there is one."""
    side = 32 if name.family == "cifar" else 224
    shape = (side, side, 3)
    array = np.asarray(mean if mean_file is None else read_mean(mean_file) / 255, np.float32)
    if mean_file and array.shape != shape:
        raise UserError(f"{mean_file}: expected a mean image of {side}x{side} pixels, found {array.shape}")
    is_cifar10 = name.family == "cifar" and num_classes == len(CLASS_NAMES)
    class_names = CLASS_NAMES if is_cifar10 else tuple(map(str, range(num_classes)))
    inputs = Inputs(shape, class_names, Preprocessing(array, np.asarray(std, np.float32)))
    check_inputs(inputs)
    return inputs


def _stride_beside(file: Path) -> StrideOn | None:
    """Return what Hugging Face's config.json beside a file says of bottlenecks; None without one."""
    try:
        content = read_json(file.with_name("config.json"))
        return {True: "1x1", False: "3x3"}.get(content["downsample_in_bottleneck"])  # type: ignore[return-value]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_exported(file: Path, description: Description) -> tuple[Config, dict[str, Any], Inputs]:
    """Return what read_weights() does, of a .safetensors file, whatever its name, that describes itself."""
    config, inputs = description.config, description.inputs
    if description.names == "resnet_jax":
        return config, read_own(file, description), inputs
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, zero_channels="both"))
    layout = layout_of(build_model(config.model, 1))
    return config, _to_variables(read_safetensors(file), config, inputs, layout, file), inputs


def _to_variables(
    tensors: dict[str, np.ndarray], config: Config, inputs: Inputs, layout: Layout, file: Path
) -> dict[str, Any]:
    model = build_model(dataclasses.replace(config.model, scan_blocks=False), len(inputs.class_names))
    return variables_from_tensors(tensors, model, abstract_variables(model, inputs.image_shape), layout, str(file))


def _parse(model_name: str) -> ModelName:
    try:
        return parse_name(model_name)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error


def _check_name(name: ModelName | None, config: ModelConfig, file: Path) -> None:
    """Raise UserError if a file holds another network than the one that was named."""
    plain = config.shortcut == "none" and config.family != "vgg"
    shortcut = config.shortcut if name and name.shortcut else ""
    if name is not None and name != (config.family, config.depth, plain, shortcut):
        kind = "vgg" if config.family == "vgg" else "plain" if plain else "resnet"
        raise UserError(f"{file} holds {kind}{config.depth} by its own word: leave out --model")


def _count_classes(tensors: dict[str, np.ndarray], head: str, file: Path, model_name: str) -> int:
    """Return the number of rows of the last layer, each of which takes room in the file."""
    if head not in tensors:
        raise UserError(f"{file} has no tensor {head}, the last layer of {model_name}; it has {some_names(tensors)}")
    shape = tensors[head].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{file}: {head}, the last layer, has shape {shape}, not (classes, inputs)")
    return shape[0]


def _model_config(
    name: ModelName, tensors: dict[str, np.ndarray], is_caffe: bool, stride_on: StrideOn | None
) -> ModelConfig:
    """Read off the tensors which shortcuts the network has; the rest follows from who wrote the file."""
    config = ModelConfig(family=name.family, depth=name.depth, shortcut="none" if name.plain else "A")
    projections = {key for key in tensors if ".downsample.0." in key or ".shortcut.0." in key}
    if projections and not name.plain:
        # B has none where the dimensions stay: the first stage of basic blocks, the second block of bottlenecks.
        identity = "layer1.0." if name.family == "cifar" or name.depth < 50 else "layer1.1."
        is_c = any(key.startswith(identity) for key in projections)
        config = dataclasses.replace(config, shortcut="C" if is_c else "B")
    if name.family == "cifar":
        return dataclasses.replace(config, zero_channels="both")
    return dataclasses.replace(
        config,
        stride_on=stride_on or ("1x1" if is_caffe else "3x3"),
        pool_padding="caffe" if is_caffe else "torch",
    )
