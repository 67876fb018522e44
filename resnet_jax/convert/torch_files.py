"""Read the tensors of PyTorch's files; nothing in them is run, and none of it is larger than the file."""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.errors import UserError

_CONTAINERS = ("state_dict", "model")  # under which training scripts keep the tensors
_MOST_PICKLED_BYTES = 1 << 26  # names and shapes of the tensors, whose numbers lie elsewhere
_OLD_FORM_PICKLES = 4  # magic number, protocol, system and tensors, one behind the other
_DEEPEST = 100  # tuples in tuples; tensors take 3


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
        _check_depth(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it is damaged or holds more than tensors") from error
    except Exception as error:  # a damaged file makes torch raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path} is damaged or not a PyTorch file: {reason}") from error
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
    others = [
        str(name)[:60] for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))
    ]
    if others or not content:
        raise UserError(f"{path} is no state_dict of tensors; found also: {', '.join(others[:5]) or 'nothing'}")
    return {name: _to_numpy(tensor, name, path) for name, tensor in content.items()}


def _to_numpy(tensor: Any, name: str, path: Path) -> np.ndarray:
    """Convert a tensor to float32, if it is one that holds all its numbers."""
    size = tensor.nelement() * tensor.element_size()
    is_dense = str(tensor.layout) == "torch.strided" and tensor.device.type == "cpu" and not tensor.is_quantized
    # Strides of 0 let one number in a small file stand for any amount of memory.
    if not is_dense or tensor.is_complex() or size > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {name[:60]!r} is no plain tensor that holds all its numbers")
    return tensor.detach().float().numpy()


def _check_depth(path: Path) -> None:
    """Check that no tuples lie in tuples without end: hash() of them, as of a key, would end the process.

    Raises:
      Exception: of any type, where the file is damaged.
    """
    # A file that is mapped does not make room for the gigabytes that a length in it claims, as one that is open does.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"PK\x03\x04":
            for _ in range(_OLD_FORM_PICKLES):
                _check_depth_of_pickle(content)
            return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith("data.pkl"):
                if info.file_size > _MOST_PICKLED_BYTES:
                    raise ValueError(f"{info.file_size:,} bytes of names and shapes")
                _check_depth_of_pickle(io.BytesIO(archive.read(info)))


def _check_depth_of_pickle(file: Any) -> None:
    """Follow a pickle's instructions with the depth of each value instead of the value."""
    stack: list[int] = []
    marks: list[int] = []  # lengths of the stack
    memo: dict[Any, int] = {}
    for instruction, argument, _ in pickletools.genops(file):
        match instruction.name:
            case "MARK":
                marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name:
                takes = instruction.stack_before
                start = len(stack) - len(takes)
                if pickletools.markobject in takes:
                    start = marks.pop() - takes.index(pickletools.markobject)
                if start < 0:
                    raise ValueError("a pickle that takes more than there is")
                depth = max(stack[start:], default=0) + name.startswith("TUPLE")
                if depth > _DEEPEST:
                    raise ValueError("tuples in tuples, too deeply")
                stack[start:] = [depth] * len(instruction.stack_after)
