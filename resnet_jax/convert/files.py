"""Read tensors from files of others; nothing in them is ever run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from resnet_jax.convert.torch_files import read_torch
from resnet_jax.errors import UserError, optional, reason

_TORCH_SUFFIXES = (".pth", ".th", ".pt")


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
        tensors = read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        tensors = read_torch(path)
    else:
        raise UserError(f"{path}: unknown kind of file; use .pth, .th, .pt, .safetensors or .caffemodel")
    for name, array in tensors.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: the tensor {name!r} holds {array.dtype}, no real numbers")
    stripped = {name.removeprefix("module."): array for name, array in tensors.items()}
    if len(stripped) < len(tensors):
        raise UserError(f"{path} holds the same tensor with and without the prefix module.")
    return stripped


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read a .safetensors file, whatever its name.

    Raises:
      UserError: it is damaged, or safetensors is not installed.
    """
    safetensors = optional("safetensors.numpy", extra="convert")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # the library's own, and what the types and shapes in a damaged header make numpy raise
        raise UserError(f"{path} is damaged or not a .safetensors file: {reason(error)}") from error


def write_safetensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write arrays to a .safetensors file."""
    optional("safetensors.numpy", extra="convert").save_file(tensors, path)
