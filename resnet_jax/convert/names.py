"""Our names and layouts of tensors, and PyTorch's: torchvision's resnet and vgg, and the CIFAR ResNets."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.models import VGG, Model, ResNet
from resnet_jax.run.network_file import exactly

Layout = Literal["torchvision", "cifar"]
Path = tuple[str, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = ".num_batches_tracked"  # of BN in PyTorch, which nothing depends on
_FC6_INPUT = (7, 7, 512)  # height, width, channels of the map that VGG flattens


def layout_of(model: Model) -> Layout:
    """Return whose names PyTorch's users have for a network."""
    return "cifar" if isinstance(model, ResNet) and model.stem == "cifar" else "torchvision"


def torch_name(path: Path, model: Model, layout: Layout) -> str:
    """Return PyTorch's name of a parameter or running statistic, such as ("stage2_block1", "conv1", "kernel")."""
    *modules, leaf = path
    if isinstance(model, VGG):
        return f"{_vgg_module(modules[0], model)}.{_LEAVES[leaf]}"
    shortcut, head = ("downsample", "fc") if layout == "torchvision" else ("shortcut", "linear")
    names = {
        "stem_conv": "conv1",
        "stem_bn": "bn1",
        "fc": head,
        "shortcut_conv": f"{shortcut}.0",
        "shortcut_bn": f"{shortcut}.1",
    }
    parts = []
    for module in modules:
        if module.startswith("stage"):
            stage, block = module.removeprefix("stage").split("_block")
            parts.append(f"layer{stage}.{int(block) - 1}")
        else:
            parts.append(names.get(module, module))
    return ".".join([*parts, _LEAVES[leaf]])


def _vgg_module(module: str, model: VGG) -> str:
    """Count as torchvision's nn.Sequential does: a convolution and its ReLU are two entries, a pool is one."""
    if module.startswith("fc"):
        return f"classifier.{3 * (int(module[2:]) - 6)}"
    stage, number = (int(part) for part in module.removeprefix("conv").split("_"))
    return f"features.{2 * (sum(model.convs[: stage - 1]) + number - 1) + stage - 1}"


def to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """Lay a tensor out as PyTorch does: convolutions [O, I, H, W], fully-connected layers [out, in]."""
    if path[-1] != "kernel":
        return array
    # What fc6 takes is flattened in the order C, H, W there: it is turned as the convolution that it amounts to.
    kernel = array.reshape(*_FC6_INPUT, -1) if path[0] == "fc6" else array
    turned = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
    return np.ascontiguousarray(turned).reshape(_torch_shape(array.shape))


def from_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """Undo to_torch()."""
    if path[-1] != "kernel":
        return array
    height, width, channels = _FC6_INPUT
    kernel = array.reshape(-1, channels, height, width) if path[0] == "fc6" else array
    turned = np.ascontiguousarray(kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T)
    return turned.reshape(array.shape[::-1]) if path[0] == "fc6" else turned


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def tensors_from_variables(variables: dict[str, Any], model: Model, layout: Layout) -> dict[str, np.ndarray]:
    """Return all parameters and running statistics under PyTorch's names, float32.

    With option A they are always those of the network with half of the zero channels on each side, as PyTorch's CIFAR
    ResNets have it: the same function, and other channels only in another order.
    """
    flat = flatten_dict(variables["params"]) | flatten_dict(variables["batch_stats"])
    orders = _orders(model)
    return {
        torch_name(path, model, layout): to_torch(path, _reordered(path, np.asarray(value), model, orders))
        for path, value in flat.items()
    }


def tensor_shapes(model: Model, shapes: dict[str, Any], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in PyTorch of variables of the shapes of model.init()."""
    flat = flatten_dict(shapes["params"]) | flatten_dict(shapes.get("batch_stats", {}))
    return {torch_name(path, model, layout): _torch_shape(leaf.shape) for path, leaf in flat.items()}


def variables_from_tensors(
    tensors: dict[str, np.ndarray], model: Model, shapes: dict[str, Any], layout: Layout, source: str
) -> dict[str, Any]:
    """Put tensors under PyTorch's names into variables of the shapes of model.init(); undo tensors_from_variables().

    Each tensor is used exactly once; only BN's counters (COUNTER) are left out.

    Raises:
      UserError: lists tensors that are missing, left over, of another shape or not finite; `source` names the file.
    """
    flat = {collection: flatten_dict(shapes.get(collection, {})) for collection in ("params", "batch_stats")}
    counted = {name: array for name, array in tensors.items() if not name.endswith(COUNTER)}
    found = exactly(counted, tensor_shapes(model, shapes, layout), source)
    back = [np.argsort(order) for order in _orders(model)]

    def variable(path: Path) -> np.ndarray:
        return _reordered(path, from_torch(path, found[torch_name(path, model, layout)]), model, back)

    return {
        collection: unflatten_dict({path: variable(path) for path in leaves}) for collection, leaves in flat.items()
    }


def _orders(model: Model) -> list[np.ndarray]:
    """Return for the stem and each stage where its channels come from, with option A and zero channels at the end.

    The new channels of such a stage are behind the old ones; here half of them is put before. Otherwise nothing moves,
    and nothing is returned.
    """
    if isinstance(model, VGG) or (model.shortcut, model.zero_channels) != ("A", "end"):
        return []
    orders = [np.arange(model.filters[0])]
    for filters in model.filters:
        old = orders[-1]
        new = np.arange(len(old), filters * (1 if model.block == "basic" else 4))
        orders.append(np.concatenate([new[: len(new) // 2], old, new[len(new) // 2 :]]))
    return orders


def _reordered(path: Path, array: np.ndarray, model: Model, orders: list[np.ndarray]) -> np.ndarray:
    """Reorder the channels that a variable shares with shortcuts: what a block takes and gives, and what fc takes."""
    module, leaf = path[0], path[-1]
    if not orders or isinstance(model, VGG) or module.startswith("stem"):
        return array
    if module == "fc":
        return array[orders[-1]] if leaf == "kernel" else array
    stage, block = map(int, module.removeprefix("stage").split("_block"))
    if path[1] == "conv1":
        return array[:, :, orders[stage - 1 if block == 1 else stage]]
    last = "2" if model.block == "basic" else "3"
    return array[..., orders[stage]] if path[1] in ("conv" + last, "bn" + last) else array
