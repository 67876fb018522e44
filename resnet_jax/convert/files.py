"""Read tensors from files of others; nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.errors import UserError, reason
from resnet_jax.run.network_file import SUFFIX, is_safetensors, read_safetensors

# Under which training scripts keep the tensors, and their moving averages.
_CONTAINERS = ("state_dict", "model")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_HDF5 = b"\x89HDF"


class Tensors(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: by name, without what all names begin with, such as "module." or "model.".
      taken: what they were taken from in the file, in words; nothing if it holds nothing else.
    """

    arrays: dict[str, np.ndarray]
    taken: str = ""


def read_tensors(path: Path, *, prefix: str = "", averaged: bool = False) -> Tensors:
    """Read a checkpoint of PyTorch (needs torch) or a .safetensors file (does not), whatever it is called.

    Args:
      path: the file.
      prefix: only the tensors whose names begin so are read, and it is cut off.
      averaged: whether the moving averages are read where a checkpoint has them beside the weights.

    Raises:
      UserError: no such file, another kind of file, a damaged one, or one that holds more than tensors.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(16)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if begin.startswith(_HDF5):
        raise UserError(f"{path} is HDF5, as Keras writes it, which is not read: convert it to .safetensors")
    if is_safetensors(path) or path.suffix == SUFFIX:
        if averaged:
            raise UserError(f"--weights ema: {path} is a .safetensors file, which holds one set of weights")
        tensors, taken = read_safetensors(path), ""
    elif begin.startswith((b"PK", b"\x80")) or path.suffix in (".pth", ".th", ".pt"):  # zip, pickle
        tensors, taken = _read_torch(path, averaged)
    else:
        raise UserError(f"{path} is no file of weights that is known: PyTorch's, .safetensors or .caffemodel")
    for name, array in tensors.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: the tensor {name!r} holds {array.dtype}, no real numbers")
    tensors.pop(_COUNTER, None)
    return Tensors(_without_prefix(tensors, prefix, path), taken)


def _without_prefix(tensors: Mapping[str, np.ndarray], prefix: str, path: Path) -> dict[str, np.ndarray]:
    chosen = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    if prefix and not chosen:
        found = ", ".join(sorted({name.rpartition(".")[0].rpartition(".")[0] + "." for name in tensors})[:5])
        raise UserError(f"--prefix {prefix}: no tensor of {path} begins so; there are such as {found}")
    while len(chosen) > 1:
        first = {name.partition(".")[0] for name in chosen}
        if len(first) > 1 or not all("." in name for name in chosen):
            break
        chosen = {name.partition(".")[2]: array for name, array in chosen.items()}
    return chosen


def some_names(tensors: Mapping[str, Any]) -> str:
    """Return the first names of a file's tensors, for an error."""
    return ", ".join(list(tensors)[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")


def _read_torch(path: Path, averaged: bool) -> tuple[dict[str, np.ndarray], str]:
    """Read a file of torch.save(): float32 arrays by name, and what they were taken from."""
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
        raise UserError(_refused(path, str(error))) from error
    except Exception as error:  # a damaged file makes torch raise anything
        if "TorchScript" in str(error):
            raise UserError(_refused(path, str(error))) from error
        raise UserError(f"{path} is damaged or not a PyTorch file: {reason(error)}") from error
    content, taken = _choose(content, averaged, path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
    others = [str(name) for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if others or not content:
        raise UserError(f"{path} is no state_dict of tensors; found also: {', '.join(others[:5]) or 'nothing'}")
    try:
        return {name: tensor.detach().float().numpy() for name, tensor in content.items()}, taken
    except (RuntimeError, TypeError) as error:  # a sparse tensor, say
        raise UserError(f"{path} holds other than plain tensors: {reason(error)}") from error


def _refused(path: Path, why: str) -> str:
    """Say what is in a file beside tensors, and how somebody who trusts it takes them out."""
    out = path.with_suffix(".tensors.pth")
    if "TorchScript" in why:
        saved = f"torch.save(torch.jit.load({str(path)!r}).state_dict(), {str(out)!r})"
        return f'{path} is TorchScript, a program. If you trust it: python -c "import torch; {saved}"'
    found = re.search(r"GLOBAL ([\w.]+)", why)
    if not found:
        return f"{path} is refused: it is damaged or holds more than tensors"
    loaded = f"c = torch.load({str(path)!r}, 'cpu', weights_only=False)"
    taken = "c = c.get('state_dict', c.get('model', c)) if isinstance(c, dict) else c"
    saved = f"torch.save(c if isinstance(c, dict) else c.state_dict(), {str(out)!r})"
    return (
        f"{path} is refused: it holds {found[1]} beside tensors, and reading that may run code. If you trust it:"
        f' python -c "import torch; {loaded}; {taken}; {saved}"'
    )


def _choose(content: Any, averaged: bool, path: Path) -> tuple[Any, str]:
    """Return the state_dict in what a training script has saved, and what it is called there."""
    taken = ""
    averages = [name for name in _AVERAGES if isinstance(content, dict) and isinstance(content.get(name), dict)]
    if averaged:
        if not averages:
            raise UserError(f"--weights ema: {path} holds no moving averages ({', '.join(_AVERAGES)})")
        content, taken = content[averages[0]], averages[0]
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content, taken = content[container], taken or container
    if averages and not averaged:
        taken += f" (--weights ema takes {averages[0]})"
    return content, taken
