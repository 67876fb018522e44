"""Read the weights of others, and make a work directory of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.convert.caffe import read_caffemodel, read_mean
from resnet_jax.convert.files import read_tensors, some_names, without_prefix
from resnet_jax.convert.foreign_names import CAFFE, Channels, Convention, PreprocessingName, network_of, recognize
from resnet_jax.convert.hub import Beside, fetch, is_hub_name, read_beside
from resnet_jax.convert.names import COUNTER, Layout, layout_of, tensor_shapes, variables_from_tensors
from resnet_jax.data.sources.cifar10 import CLASS_NAMES
from resnet_jax.data.types import Inputs, Preprocessing, check_inputs
from resnet_jax.errors import UserError
from resnet_jax.inference.load import Origin, Trained
from resnet_jax.models import Model, ModelName, abstract_variables, build_model, parse_name
from resnet_jax.models.blocks import StrideOn
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.run.network_file import Description, is_safetensors, read_description, read_own, read_safetensors
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import create_train_state

# Channel means and standard deviations in [0, 1], RGB.
PREPROCESSING: dict[PreprocessingName, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # Both torchvision's networks and the CIFAR ResNets published for PyTorch use ImageNet's statistics.
    "torchvision": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Caffe subtracts the mean from pixels in 0..255 and does not scale them.
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
    "detectron2": ((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255,) * 3),
    "none": ((0.0,) * 3, (1.0,) * 3),
}
# The first and the last layer of each kind of file.
_STEMS = {"cifar": "conv1.weight", "torchvision": "conv1.weight", "vgg": "features.0.weight"}
_HEADS = {"cifar": "linear.weight", "torchvision": "fc.weight", "vgg": "classifier.6.weight"}


def import_weights(source: str | Path, model_name: str | None, workdir: Path, **options: Any) -> Trained:
    """Read weights and write a work directory with them as the checkpoint of step 0.

    Args:
      source, model_name, **options: of read_weights().
      workdir: to be made.

    Raises:
      UserError: a file that cannot be read, does not fit the network, or a work directory that exists.
    """
    if workdir.exists():
        raise UserError(f"{workdir} exists; choose another --out")
    trained = read_weights(source, model_name, **options)
    config = trained.origin.config
    optimizer = build_optimizer(config.optim, build_schedule(config.optim, config.run.steps))
    state = create_train_state(optimizer, jax.tree.map(jnp.asarray, trained.variables))
    create_workdir(workdir, config, trained.origin.inputs, state, trained.origin.metadata["source"])
    return trained


def read_weights(
    source: str | Path | Mapping[str, Any],
    model_name: str | None = None,
    *,
    backbone: bool = False,
    preprocessing: PreprocessingName | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    mean_file: Path | None = None,
    channels: Channels | None = None,
    stride_on: StrideOn | None = None,
    prefix: str = "",
    averaged: bool = False,
    offline: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Trained:
    """Read weights of others into a network of this package.

    The names of the tensors may be those of torchvision, timm, the CIFAR ResNets for PyTorch, transformers, detectron2,
    Caffe2, Caffe (ResNet-50, 101, 152) or Keras; the shortcuts, the classes and mostly the network follow from them.

    Args:
      source: a file of PyTorch, .safetensors, .caffemodel, HDF5 of Keras or .pkl of detectron2; a name such as
        "torchvision:resnet50", "timm:resnet18.tv_in1k", "hf:microsoft/resnet-50" or "cifar:resnet20", which is
        downloaded once; or tensors by name, such as the state_dict() of a network in PyTorch.
      model_name: such as "resnet20", "plain34", "vgg16", where the tensors leave a choice: the plain networks have
        those of the networks with shortcuts of option A.
      backbone: take everything but the last layer, which need not be there; whatever else is in the file, such as
        the heads of self-supervised training, is left out.
      preprocessing: that the weights were trained with; None for what a config.json beside the file says, or else
        for what is usual where such names come from.
      mean, std: of the channels of pixels in [0, 1] (RGB), instead of those of `preprocessing`.
      mean_file: Caffe's mean image (.binaryproto), instead of channel means.
      channels: the order of the channels that the weights were trained on; the result always takes RGB. None: as usual.
      stride_on: which convolution of a bottleneck subsamples; None: what a config.json of transformers beside the file
        says, or else as usual: "1x1" for Caffe, detectron2 and Keras, "3x3" for PyTorch.
      prefix, averaged: of read_tensors().
      offline: download nothing, take what was downloaded before.
      say: called with what was assumed, a line each.

    Returns:
      Trained: model, variables (`params` and `batch_stats`, float32, as NumPy arrays) and origin, as load() does.
      Without a last layer the model is a backbone, whose call returns feature maps by name.

    Raises:
      UserError: a file that cannot be read or downloaded, or does not fit the network.
    """
    name = None if model_name is None else _parse(model_name)
    options: dict[str, object] = {
        "--preprocessing": preprocessing,
        "--mean": mean,
        "--std": std,
        "--mean-file": mean_file,
    }
    options |= {"--channels": channels, "--stride-on": stride_on, "--prefix": prefix, "--weights ema": averaged}
    given = [option for option, value in (options | {"--backbone": backbone}).items() if value]
    found = _find(source, given, prefix, averaged, offline, say)
    if isinstance(found, Trained):
        _check_name(name, found.origin.config.model, str(source))
        return found
    convention = found.convention._replace(channels=channels or found.convention.channels)
    name = name or _infer_name(found)
    if name.family == "cifar" and any(key.startswith("layer4.") for key in found.tensors):
        raise UserError(f"--model {model_name} is 6n+2: a CIFAR network; {found.called} holds one of ImageNet")
    layout = _layout_of(name, found.tensors)
    kind = "vgg" if name.family == "vgg" else layout
    tensors = _to_rgb(found, _STEMS[kind], convention.channels)
    model_config = _model_config(name, tensors, convention, stride_on or found.beside.stride_on)
    if name.shortcut and name.shortcut != model_config.shortcut:
        raise UserError(f"--model {model_name}: {found.called} has shortcuts of option {model_config.shortcut}")
    depth, num_classes = tensors[_STEMS[kind]].shape[1], 0
    if not backbone:
        num_classes = _count_classes(tensors, _HEADS[kind], found.called)
    mean, std = _statistics(found, convention, depth, preprocessing, mean, std)
    inputs = _inputs_of_others(name, num_classes, depth, mean, std, mean_file, found.beside.class_names)
    statistics: dict[str, Any] = {"mean": None if mean_file else mean, "std": std} if depth == 3 else {}
    dataset = "cifar10" if name.family == "cifar" else "imagenet"
    config = Config(model=model_config, data=DataConfig(dataset, **statistics))
    if backbone:
        tensors = _trunk(tensors, config, inputs, layout, say)
    variables = _to_variables(tensors, config, inputs, layout, found.called)
    of = f"of {mean_file}" if mean_file else " ".join(f"{value:.4g}" for value in mean)
    say(f"pixels in [0, 1]: mean {of}, std {' '.join(f'{value:.4g}' for value in std)}")
    if convention.channels == "BGR":
        say("channels: from BGR to RGB")
    return _trained(config, variables, inputs, found.source)


class _Found(NamedTuple):
    """Tensors of others, in torchvision's names; what they came from, for messages and on record."""

    tensors: dict[str, np.ndarray]
    convention: Convention
    beside: Beside
    called: str
    source: str


def _find(
    source: str | Path | Mapping[str, Any],
    given: list[str],
    prefix: str,
    averaged: bool,
    offline: bool,
    say: Callable[[str], object],
) -> _Found | Trained:
    """Read the tensors of read_weights(); a file of export is a whole network, for which no option may be given."""
    if isinstance(source, Mapping):
        tensors, convention = recognize(without_prefix({k: _to_array(v) for k, v in source.items()}, prefix, "tensors"))
        return _Found(tensors, convention, Beside(), "tensors", "tensors")
    file, called, beside = Path(source), Path(source).name, None
    if is_hub_name(str(source)):
        file, beside, called = fetch(str(source), offline=offline, say=say)
    if is_safetensors(file) and (description := read_description(file)):
        if given:
            raise UserError(f"{file} was exported from here and says it itself: leave out {', '.join(given)}")
        return _trained(*read_exported(file, description), called)
    if file.suffix == ".caffemodel":
        if prefix or averaged:
            raise UserError(f"{file}: --prefix and --weights are for files of PyTorch and .safetensors")
        return _Found(read_caffemodel(file), CAFFE, Beside(), str(file), called)
    arrays, taken = read_tensors(file, prefix=prefix, averaged=averaged)
    if taken:
        say(f"weights: {taken}")
    return _Found(*recognize(arrays), read_beside(file) if beside is None else beside, str(source), called)


def _trained(config: Config, variables: dict[str, Any], inputs: Inputs, source: str) -> Trained:
    return Trained(_model(config, inputs), variables, Origin(config, 0, inputs, {"source": source}))


def _model(config: Config, inputs: Inputs) -> Model:
    return build_model(dataclasses.replace(config.model, scan_blocks=False), len(inputs.class_names))


def _to_array(value: Any) -> np.ndarray:
    """Return a tensor of PyTorch, on whatever device, or of NumPy or JAX as an array of NumPy's."""
    return value.detach().cpu().float().numpy() if hasattr(value, "detach") else np.asarray(value)


def _infer_name(found: _Found) -> ModelName:
    if name := network_of(found.tensors):
        return parse_name(name)
    _check_stem(found, "conv1.weight")
    raise UserError(
        f"--model is needed, such as resnet20: nothing in {found.called} says which network it is; the plain networks"
        f" have the tensors of those with shortcuts of option A (it has {some_names(found.tensors)})"
    )


def _check_stem(found: _Found, stem: str) -> None:
    if stem not in found.tensors:
        several = any(name.endswith(f".{stem}") for name in found.tensors)
        hint = "; --prefix takes one of several networks" if several else ""
        raise UserError(
            f"{found.called} has no tensor {stem}, the first layer; it has {some_names(found.tensors)}{hint}"
        )


def _layout_of(name: ModelName, tensors: Mapping[str, np.ndarray]) -> Layout:
    """Return whose names a file has; some CIFAR ResNets are named as torchvision's."""
    as_torchvision = "fc.weight" in tensors or any(".downsample." in key for key in tensors)
    return "cifar" if name.family == "cifar" and not as_torchvision else "torchvision"


def _to_rgb(found: _Found, stem: str, channels: Channels) -> dict[str, np.ndarray]:
    """Check the first convolution, and turn the channels that it takes."""
    _check_stem(found, stem)
    kernel = found.tensors[stem]
    if kernel.ndim != 4 or 0 in kernel.shape:
        raise UserError(f"{found.called}: {stem}, the first layer, has shape {kernel.shape}, not (out, in, h, w)")
    return found.tensors | {stem: kernel[:, ::-1]} if channels == "BGR" else found.tensors


def _statistics(
    found: _Found,
    convention: Convention,
    depth: int,
    preprocessing: PreprocessingName | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each of the `depth` channels: as given, or beside the file, or as usual."""
    usual = PREPROCESSING[preprocessing or convention.preprocessing]
    if preprocessing is None and found.beside.mean and found.beside.std:
        usual = found.beside.mean, found.beside.std
    if depth != 3 and len(usual[0]) != depth:
        if preprocessing not in (None, "none"):
            raise UserError(f"--preprocessing {preprocessing} is for RGB: {found.called} takes {depth} channels")
        usual = (0.0,) * depth, (1.0,) * depth
    chosen = tuple(mean or usual[0]), tuple(std or usual[1])
    for option, values in zip(("--mean", "--std"), chosen, strict=True):
        if len(values) != depth:
            raise UserError(f"{option}: {found.called} takes {depth} channels; got {len(values)} numbers")
    return chosen


def _inputs_of_others(
    name: ModelName,
    num_classes: int,
    depth: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mean_file: Path | None,
    class_names: tuple[str, ...],
) -> Inputs:
    """Return the inputs of weights that others trained: of the usual size, the mean that of a file if there is one."""
    side = 32 if name.family == "cifar" else 224
    shape = (side, side, depth)
    array = np.asarray(mean if mean_file is None else read_mean(mean_file) / 255, np.float32)
    if mean_file and array.shape != shape:
        raise UserError(f"{mean_file}: expected a mean image of {side}x{side} pixels, found {array.shape}")
    if len(class_names) != num_classes:
        is_cifar10 = name.family == "cifar" and num_classes == len(CLASS_NAMES)
        class_names = CLASS_NAMES if is_cifar10 else tuple(map(str, range(num_classes)))
    inputs = Inputs(shape, class_names, Preprocessing(array, np.asarray(std, np.float32)))
    check_inputs(inputs)
    return inputs


def _trunk(
    tensors: dict[str, np.ndarray], config: Config, inputs: Inputs, layout: Layout, say: Callable[[str], object]
) -> dict[str, np.ndarray]:
    """Return the tensors of a backbone, and say which are left out."""
    model = _model(config, inputs)
    wanted = tensor_shapes(model, abstract_variables(model, inputs.image_shape), layout)
    left_out = [name for name in tensors if name not in wanted and not name.endswith(COUNTER)]
    if left_out:
        say(f"left out: {some_names(left_out)}")
    return {name: array for name, array in tensors.items() if name in wanted}


def read_exported(file: Path, description: Description) -> tuple[Config, dict[str, Any], Inputs]:
    """Return what read_weights() does, of a .safetensors file, whatever its name, that describes itself."""
    config, inputs = description.config, description.inputs
    if description.names == "resnet_jax":
        return config, read_own(file, description), inputs
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, zero_channels="both"))
    layout = layout_of(build_model(config.model, 1))
    tensors, _ = recognize(read_safetensors(file))
    return config, _to_variables(tensors, config, inputs, layout, str(file)), inputs


def _to_variables(
    tensors: dict[str, np.ndarray], config: Config, inputs: Inputs, layout: Layout, called: str
) -> dict[str, Any]:
    model = _model(config, inputs)
    return variables_from_tensors(tensors, model, abstract_variables(model, inputs.image_shape), layout, called)


def _parse(model_name: str) -> ModelName:
    try:
        return parse_name(model_name)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error


def _check_name(name: ModelName | None, config: ModelConfig, file: str) -> None:
    """Raise UserError if a file holds another network than the one that was named."""
    plain = config.shortcut == "none" and config.family != "vgg"
    shortcut = config.shortcut if name and name.shortcut else ""
    if name is not None and name != (config.family, config.depth, plain, shortcut):
        kind = "vgg" if config.family == "vgg" else "plain" if plain else "resnet"
        raise UserError(f"{file} holds {kind}{config.depth} by its own word: leave out --model")


def _count_classes(tensors: dict[str, np.ndarray], head: str, called: str) -> int:
    """Return the number of rows of the last layer, each of which takes room in the file."""
    if head not in tensors:
        raise UserError(
            f"{called} has no tensor {head}, the last layer; it has {some_names(tensors)}; --backbone does without"
        )
    shape = tensors[head].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{called}: {head}, the last layer, has shape {shape}, not (classes, inputs)")
    return shape[0]


def _model_config(
    name: ModelName, tensors: dict[str, np.ndarray], convention: Convention, stride_on: StrideOn | None
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
        stride_on=stride_on or convention.stride_on,
        pool_padding=convention.pool_padding,
    )
