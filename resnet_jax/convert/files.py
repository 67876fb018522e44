"""Read tensors from files of others; nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.errors import UserError, reason
from resnet_jax.run.network_file import SUFFIX, read_safetensors

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
    if path.suffix == SUFFIX:
        tensors = read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        tensors = _read_torch(path)
    else:
        raise UserError(f"{path}: unknown kind of file; use .pth, .th, .pt, .safetensors or .caffemodel")
    for name, array in tensors.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: the tensor {name!r} holds {array.dtype}, no real numbers")
    stripped = {name.removeprefix("module."): array for name, array in tensors.items()}
    if len(stripped) < len(tensors):
        raise UserError(f"{path} holds the same tensor with and without the prefix module.")
    return stripped


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    """Read a .pth, .th or .pt file: float32 arrays by name."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading PyTorch files needs torch (pip install torch), or convert to .safetensors"
        ) from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 6):
        # CVE-2025-32434: before, a file could run code in spite of weights_only.
        raise UserError(f"{path}: reading PyTorch files needs torch 2.6 or later, not {torch.__version__}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text is on how to run what is in the file
        raise UserError(f"{path} is refused: it is damaged or holds more than tensors") from error
    except Exception as error:  # a damaged file makes torch raise anything
        raise UserError(f"{path} is damaged or not a PyTorch file: {reason(error)}") from error
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
    others = [str(name) for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if others or not content:
        raise UserError(f"{path} is no state_dict of tensors; found also: {', '.join(others[:5]) or 'nothing'}")
    try:
        return {name: tensor.detach().float().numpy() for name, tensor in content.items()}
    except (RuntimeError, TypeError) as error:  # a sparse tensor, say
        raise UserError(f"{path} holds other than plain tensors: {reason(error)}") from error
