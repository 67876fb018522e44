"""Read tensors from files of others; nothing in them is ever run."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.errors import UserError, optional, reason
from resnet_jax.run.network_file import SUFFIX, is_safetensors, read_safetensors

# Under which training scripts keep the tensors, and their moving averages.
_CONTAINERS = ("state_dict", "model", "teacher", "blobs")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_HDF5 = b"\x89HDF"
_KERAS_MEMBER = "model.weights.h5"  # of a .keras file, which is a zip
_TORCH_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # begins what torch.save() wrote before it wrote zips
# What an array in a pickle is made of; to make anything else may run code.
_OF_ARRAYS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
}


class Tensors(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: by name, without what all names begin with, such as "module." or "model.".
      taken: what they were taken from in the file, in words; nothing if it holds nothing else.
    """

    arrays: dict[str, np.ndarray]
    taken: str = ""


def read_tensors(path: Path, *, prefix: str = "", averaged: bool = False) -> Tensors:
    """Read a checkpoint of PyTorch (needs torch), .safetensors, HDF5 of Keras (needs h5py), or a pickle of arrays.

    What a file is is told by its content, whatever it is called.

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
    taken = ""
    if is_safetensors(path) or path.suffix == SUFFIX:
        tensors = read_safetensors(path)
    elif begin.startswith(_HDF5):
        tensors = _read_keras(path, path)
    elif begin.startswith(b"PK") and (of_keras := _keras_member(path)):
        tensors = _read_keras(path, of_keras)
    elif begin.startswith(b"\x80") and path.suffix == ".pkl" and not begin.startswith(_TORCH_PICKLE):
        tensors, taken = _read_pickle(path, averaged)
    elif begin.startswith((b"PK", b"\x80")) or path.suffix in (".pth", ".th", ".pt"):  # zip, pickle
        tensors, taken = _read_torch(path, averaged)
    else:
        raise UserError(
            f"{path} is no file of weights that is known: PyTorch's, .safetensors, Keras's HDF5, .caffemodel or a .pkl"
        )
    if averaged and not taken:
        raise UserError(f"--weights ema: {path} holds one set of weights")
    for name, array in tensors.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: the tensor {name!r} holds {array.dtype}, no real numbers")
    tensors.pop(_COUNTER, None)
    return Tensors(without_prefix(tensors, prefix, str(path)), taken)


def without_prefix(tensors: Mapping[str, np.ndarray], prefix: str, called: str) -> dict[str, np.ndarray]:
    """Take the tensors whose names begin with `prefix`, and cut off that and what all their names begin with.

    Raises:
      UserError: there are none; `called` is where they were looked for.
    """
    chosen = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    if prefix and not chosen:
        found = ", ".join(sorted({name.rpartition(".")[0].rpartition(".")[0] + "." for name in tensors})[:5])
        raise UserError(f"--prefix {prefix}: no tensor of {called} begins so; there are such as {found}")
    while len(chosen) > 1:
        first = {name.partition(".")[0] for name in chosen}
        if len(first) > 1 or not all("." in name for name in chosen):
            break
        chosen = {name.partition(".")[2]: array for name, array in chosen.items()}
    return chosen


def some_names(tensors: Collection[str]) -> str:
    """Return the first names of tensors, for a message."""
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


def _keras_member(path: Path) -> io.BytesIO | None:
    """Return the weights in a .keras file, or None if a zip is something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return io.BytesIO(archive.read(_KERAS_MEMBER)) if _KERAS_MEMBER in archive.namelist() else None
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None


def _read_keras(path: Path, content: Path | io.BytesIO) -> dict[str, np.ndarray]:
    """Read HDF5 of Keras, whole models or weights, 2.2 to 3: arrays as LAYER.kernel, in PyTorch's layouts."""
    h5py = optional("h5py", extra="convert")
    arrays: dict[str, np.ndarray] = {}

    def read(name: str, item: Any) -> None:
        *groups, leaf = name.split("/")
        if not isinstance(item, h5py.Dataset) or not groups or groups[0] in ("optimizer", "optimizer_weights"):
            return
        layer = groups[-1]
        if layer == "vars":  # Keras 3 counts the layers of a class, and their arrays
            layer = str(item.parent.attrs.get("name", groups[-2]))
            names = ("gamma", "beta", "moving_mean", "moving_variance")
            leaf = (names if item.parent["0"].ndim == 1 else ("kernel", "bias"))[int(leaf)]
        array = np.asarray(item)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        arrays[f"{layer}.{leaf.partition(':')[0]}"] = np.ascontiguousarray(array)

    try:
        with h5py.File(content, "r") as file:
            file.visititems(read)
    except Exception as error:  # of whatever is damaged
        raise UserError(f"{path} is damaged or no HDF5 of Keras: {reason(error)}") from error
    if not arrays:
        raise UserError(f"{path} holds no layers of Keras")
    return arrays


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) not in _OF_ARRAYS:
            raise UserError(f"it holds {module}.{name} beside arrays, and reading that may run code")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(path: Path, averaged: bool) -> tuple[dict[str, np.ndarray], str]:
    """Read a pickle that holds arrays by name, as detectron2's are, and nothing that runs code."""
    try:
        with path.open("rb") as file:
            content: Any = _ArraysOnly(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged pickle makes its reader raise anything
        raise UserError(f"{path} is damaged: {reason(error)}") from error
    content, taken = _choose(content, averaged, path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not arrays by name")
    arrays = {name: array for name, array in content.items() if isinstance(name, str) and isinstance(array, np.ndarray)}
    if not arrays:
        raise UserError(f"{path} holds no arrays")
    return arrays, taken


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
