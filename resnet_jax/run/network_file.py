"""A network in one file: .safetensors whose metadata says which network it is, how it was trained, and its inputs."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import pydantic
import safetensors
import safetensors.numpy
from annotated_types import MinLen
from flax.traverse_util import flatten_dict, unflatten_dict
from pydantic import NonNegativeInt, PositiveInt

from resnet_jax.config import Config, from_json, to_json
from resnet_jax.data.types import Inputs, Preprocessing, check_inputs
from resnet_jax.errors import UserError, reason
from resnet_jax.models import abstract_variables, build_model

SUFFIX = ".safetensors"
_KEY = "resnet_jax"
Names = Literal["torch", "hf", "resnet_jax"]
_DTYPES: dict[str, Any] = {  # by the names of the format; ml_dtypes comes with JAX
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "BOOL": "?", "C64": "<c8",
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    **{f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)},
}  # fmt: skip

_Row = Annotated[list[float], MinLen(1)]
_Image = Annotated[list[Annotated[list[_Row], MinLen(1)]], MinLen(1)]


class Description(NamedTuple):
    """What the metadata of a file of ours say.

    Attributes:
      names: of its tensors: "torch", "hf" (those of transformers) or "resnet_jax" (such as stage2_block1/conv1/kernel).
      config: of the run, without the folders of its computer.
      step: of the checkpoint.
      inputs: of the network.
      more: values of JSON by name, such as "results".
    """

    names: Names
    config: Config
    step: int
    inputs: Inputs
    more: Mapping[str, Any] = types.MappingProxyType({})


class _Inputs(pydantic.BaseModel):
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    class_names: tuple[str, ...]
    mean: _Row | _Image
    std: _Row
    lighting: Annotated[list[_Row], MinLen(1)] | None = None


class _Described(pydantic.BaseModel):
    """The JSON in the metadata; further fields are allowed."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")

    names: Names
    step: NonNegativeInt
    config: dict[str, Any]
    inputs: _Inputs


def to_bytes(tensors: dict[str, np.ndarray], description: Description) -> bytes:
    """Return the content of a file; that of the same network is always the same."""
    content = safetensors.numpy.save(tensors, metadata=to_metadata(description))
    size = int.from_bytes(content[:8], "little")  # of the header, JSON, in which the library orders metadata anyhow
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return content[:8] + ordered + content[8 + size :]


def to_metadata(description: Description) -> dict[str, str]:
    """Return the metadata of a file: all in one JSON object, and for PyTorch's programs whose tensors they are."""
    config, inputs = description.config, description.inputs
    begun = config.run.init_from and Path(config.run.init_from).name
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, dir=type(config.data).dir),
        run=dataclasses.replace(config.run, workdir=None, init_from=begun),
        hosts=type(config.hosts)(),
    )
    arrays = {"mean": inputs.preprocessing.mean, "std": inputs.preprocessing.std, "lighting": inputs.lighting}
    described = {
        **description.more,
        "names": description.names,
        "step": description.step,
        "config": json.loads(to_json(config)),
        "inputs": {
            "image_shape": inputs.image_shape,
            "class_names": inputs.class_names,
            **{name: _shortest(array) for name, array in arrays.items() if array is not None},
        },
    }
    return {_KEY: json.dumps(described), **({} if description.names == "resnet_jax" else {"format": "pt"})}


def _shortest(array: np.ndarray) -> Any:
    """Return nested lists whose JSON has no more digits than float32 needs."""
    return [_shortest(part) for part in array] if array.ndim else float(str(np.float32(array)))


def is_safetensors(path: Path) -> bool:
    """Tell by its first bytes whether a file is of this format, whatever its name; not if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"  # behind the length of the header
    except OSError:
        return False


def read_description(path: Path) -> Description | None:
    """Read the metadata of a .safetensors file; None if it is not of this program.

    Raises:
      UserError: the file or its metadata are damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # of the library's own type
        raise _damaged(path, error) from error
    if _KEY not in metadata:
        return None
    source = f"the metadata of {path}"
    try:
        read = _Described.model_validate_json(metadata[_KEY])
        mean, std = (np.array(values, np.float32) for values in (read.inputs.mean, read.inputs.std))
        lighting = None if read.inputs.lighting is None else np.array(read.inputs.lighting, np.float32)
        inputs = Inputs(read.inputs.image_shape, read.inputs.class_names, Preprocessing(mean, std), lighting)
        check_inputs(inputs)
    except ValueError as error:
        raise UserError(f"{source} are damaged: {reason(error)}") from error
    config = from_json(json.dumps(read.config), source)
    return Description(read.names, config, read.step, inputs, read.model_extra or {})


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a .safetensors file, whatever its name.

    Raises:
      UserError: it is damaged.
    """
    try:
        tensors = dict(safetensors.deserialize(path.read_bytes()))
        return {name: _to_array(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # the library's own, and what the types and shapes in a damaged header make numpy raise
        raise _damaged(path, error) from error


def _to_array(tensor: Mapping[str, Any]) -> np.ndarray:
    """Return a tensor of the library's; of a type that NumPy has not, as float32."""
    dtype = np.dtype(_DTYPES[tensor["dtype"]])
    array = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return array.astype(np.float32) if dtype.kind == "V" else array


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or not a .safetensors file: {reason(error)}")


def own_names(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return params and batch_stats under our names, such as stage2_block1/conv1/kernel."""
    flat = flatten_dict(variables["params"], sep="/") | flatten_dict(variables["batch_stats"], sep="/")
    return {name: np.asarray(value) for name, value in flat.items()}


def read_own(path: Path, description: Description) -> dict[str, Any]:
    """Read `params` and `batch_stats`, float32, of a file with our names of tensors.

    Raises:
      UserError: it is damaged, or does not fit the network that it says it holds.
    """
    config, inputs = description.config, description.inputs
    model = build_model(dataclasses.replace(config.model, scan_blocks=False), len(inputs.class_names))
    shapes = abstract_variables(model, inputs.image_shape)
    flat = {collection: flatten_dict(tree, sep="/") for collection, tree in shapes.items()}
    wanted = {name: leaf.shape for leaves in flat.values() for name, leaf in leaves.items()}
    tensors = exactly(read_safetensors(path), wanted, str(path))
    return {
        collection: unflatten_dict({name: tensors[name] for name in leaves}, sep="/")
        for collection, leaves in flat.items()
    }


def exactly(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, np.ndarray]:
    """Return the tensors that a network wants as float32; each of the file must be one of them.

    Args:
      tensors: of the file.
      wanted: name and shape of each tensor of the network.
      source: names the file in errors.

    Raises:
      UserError: lists tensors that are missing, left over, of another shape or not finite.
    """
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "left over": sorted(tensors.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tensors[name].shape} instead of {shape}"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    with np.errstate(over="ignore"):  # float64 beyond float32
        found = {name: tensors[name].astype(np.float32) for name in wanted if name in tensors}
    problems["with numbers that are not finite"] = [name for name, a in found.items() if not np.isfinite(a).all()]
    if any(problems.values()):
        described = "; ".join(f"{problem}: {_some(names)}" for problem, names in problems.items() if names)
        raise UserError(f"{source} does not fit the network; tensors {described}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(name[:100] for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
