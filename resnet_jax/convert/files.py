"""Read tensors from files of others; nothing in them is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from resnet_jax.errors import UserError

_TORCH_SUFFIXES = (".pth", ".th", ".pt")
_CONTAINERS = ("state_dict", "model")  # under which training scripts keep the tensors


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a PyTorch checkpoint (.pth, .th, .pt; needs torch) or a .safetensors file (does not).

    Returns:
      Arrays by name, without the prefix `module.` that nn.DataParallel adds.

    Raises:
      UserError: no such file, another kind of file, a damaged one, or one that holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        tensors = _read_torch(path)
    else:
        raise UserError(f"{path}: unknown kind of file; use .pth, .th, .pt, .safetensors or .caffemodel")
    stripped = {name.removeprefix("module."): array for name, array in tensors.items()}
    if len(stripped) < len(tensors):
        raise UserError(f"{path} holds the same tensor with and without the prefix module.")
    return stripped


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged or not a .safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading PyTorch files needs torch (pip install torch), or convert to .safetensors"
        ) from error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it is damaged or holds more than tensors") from error
    except Exception as error:  # a damaged file makes torch raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged or not a PyTorch file: {reason}") from error
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others or not content:
        raise UserError(f"{path} is no state_dict of tensors; found also: {', '.join(others[:5]) or 'nothing'}")
    return {name: tensor.detach().float().numpy() for name, tensor in content.items()}


def write_safetensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write arrays to a .safetensors file."""
    safetensors.numpy.save_file(tensors, path)
