"""Read the tensors of PyTorch's files; nothing in them is run."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.errors import UserError, reason

_CONTAINERS = ("state_dict", "model")  # under which training scripts keep the tensors


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Read a .pth, .th or .pt file.

    Returns:
      float32 arrays by name.

    Raises:
      UserError: torch is not installed, or the file is damaged or holds more than tensors.
    """
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
