"""Our names and layouts of tensors, and PyTorch's: torchvision's resnet and vgg, and the CIFAR ResNets."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.errors import UserError
from resnet_jax.models import VGG, Model

Layout = Literal["torchvision", "cifar"]
Path = tuple[str, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_FC6_INPUT = (7, 7, 512)  # height, width, channels of the map that VGG flattens


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
    """Return all parameters and running statistics under PyTorch's names, float32."""
    flat = flatten_dict(variables["params"]) | flatten_dict(variables["batch_stats"])
    return {torch_name(path, model, layout): to_torch(path, np.asarray(value)) for path, value in flat.items()}


def variables_from_tensors(
    tensors: dict[str, np.ndarray], model: Model, shapes: dict[str, Any], layout: Layout, source: str
) -> dict[str, Any]:
    """Put tensors under PyTorch's names into variables of the shapes of model.init().

    Each tensor is used exactly once; only BN's counters `num_batches_tracked` are left out.

    Raises:
      UserError: lists tensors that are missing, left over, of another shape or not finite; `source` names the file.
    """
    left = {name: array for name, array in tensors.items() if not name.endswith(".num_batches_tracked")}
    missing, wrong, not_finite = [], [], []
    variables = {}
    for collection in ("params", "batch_stats"):
        values: dict[Path, np.ndarray] = {}
        for path, expected in flatten_dict(shapes.get(collection, {})).items():
            name = torch_name(path, model, layout)
            wanted = _torch_shape(expected.shape)
            if name not in left:
                missing.append(name)
            elif left[name].shape != wanted:
                wrong.append(f"{name} {left.pop(name).shape} instead of {wanted}")
            else:
                with np.errstate(over="ignore"):  # float64 beyond float32
                    array = left.pop(name).astype(np.float32)
                not_finite += [] if np.isfinite(array).all() else [name]
                values[path] = from_torch(path, array)
        variables[collection] = unflatten_dict(values)
    problems = [
        f"{kind}: {_some(names)}"
        for kind, names in (
            ("missing", missing),
            ("left over", sorted(left)),
            ("of another shape", wrong),
            ("with numbers that are not finite", not_finite),
        )
        if names
    ]
    if problems:
        raise UserError(f"{source} does not fit the network; tensors {'; '.join(problems)}")
    return variables


def _some(names: list[str]) -> str:
    return ", ".join(name[:100] for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
