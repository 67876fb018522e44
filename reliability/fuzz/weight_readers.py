"""The readers of weights: .safetensors, PyTorch's files, Caffe's models and mean images."""

from __future__ import annotations

import functools
import io
import random
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from reliability.fuzz import hostile, mutations
from reliability.fuzz.reader import Damaged, Files, Reader
from resnet_jax.convert import weights_in
from resnet_jax.convert.caffe import MESSAGES, read_caffemodel, read_mean
from resnet_jax.convert.files import write_safetensors
from resnet_jax.convert.names import tensors_from_variables
from resnet_jax.models import cifar_resnet

_CLASSES = 3


def _cache_shapes() -> None:
    weights_in.abstract_variables = functools.cache(weights_in.abstract_variables)  # a tenth of a second each


@functools.cache
def _tensors() -> dict[str, np.ndarray]:
    """Return the weights of a network of 8 layers under PyTorch's names."""
    model = cifar_resnet(8, num_classes=_CLASSES)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    return tensors_from_variables(variables, model, "cifar")


def _safetensors() -> Files:
    with tempfile.TemporaryDirectory() as temporary:
        write_safetensors(_tensors(), Path(temporary, "x.safetensors"))
        return {"x.safetensors": Path(temporary, "x.safetensors").read_bytes()}


def _damage_safetensors(rng: random.Random, files: Files) -> Damaged:
    content = files["x.safetensors"]
    (length,) = struct.unpack_from("<Q", content)
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(6):
        case 0:
            content = mutations.damage_repeatedly(rng, content)
        case 1:
            content = mutations.at_start(mutations.damage_repeatedly, 8 + length)(rng, content)
        case 2:
            content = safetensors.numpy.save(_damage_tensors(rng))
        case 3:
            number = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_000))
            content = struct.pack("<Q", number) + header + data
        case _:
            header = mutations.json_document(rng, header)
            content = struct.pack("<Q", len(header)) + header + data
    return {"x.safetensors": content}


def _damage_tensors(rng: random.Random) -> dict[str, np.ndarray]:
    tensors = dict(_tensors())
    name = rng.choice(["linear.weight", "linear.bias", *tensors])
    array = tensors[name]
    width = array.shape[-1]
    with np.errstate(over="ignore"):
        choices: tuple[Any, ...] = (
                np.float32(1).reshape(()), array[:0], np.zeros((2**40, 0), np.float32), array[None], array.T,
                np.zeros((2**33, 0, 5), np.float32), np.zeros((0, width), np.float32), array.astype(np.int64),
                array.astype(np.float16), array.astype(bool), array.astype(np.complex64), array * 1e300,
                array.astype(np.float64) * 1e300, array * np.nan, array * np.inf,
            array.astype(np.uint8), np.concatenate([array, array]),
        )  # fmt: skip
        tensors[name] = rng.choice(choices)
    if rng.random() < 0.3:
        tensors[rng.choice(("fc.weight", "a" * 5000, "", "\x00", "\x1b[31m", "x\ny", "module." + name))] = array
    if rng.random() < 0.2:
        del tensors[rng.choice(list(tensors))]
    return {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}


def _read_weights(folder: Path, names: frozenset[str]) -> None:
    for path in sorted(folder.iterdir()):
        config, variables, inputs = weights_in.read_weights(path, "resnet8")
        assert config.model.family == "cifar"
        assert 1 <= len(inputs.class_names) <= 10_000
        for leaf in jax.tree.leaves(variables):
            assert leaf.dtype == np.float32
            assert np.isfinite(leaf).all()


def _torch_files() -> Files:
    import torch

    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in _tensors().items()}
    files = {}
    for name, zipped in (("x.pth", True), ("x.th", False)):
        stream = io.BytesIO()
        torch.save({"state_dict": tensors, "epoch": 3}, stream, _use_new_zipfile_serialization=zipped)
        files[name] = stream.getvalue()
    return files


def _damage_torch(rng: random.Random, files: Files) -> Damaged:
    name = rng.choice(list(files))
    content = files[name]
    kind = rng.randrange(8)
    if kind == 0:
        content = rng.choice(hostile.PICKLES)
    elif kind == 1:
        content = rng.choice(
            (hostile.zip_file("x/data.pkl", hostile.deflated_zeros(1 << 30), 1 << 30), hostile.zip_of({}))
        )
    elif kind == 2:
        content = _odd_state(rng)
    elif kind < 5 and name == "x.pth":  # what is in the archive, in one that is whole
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        member = rng.choice([next(name for name in members if name.endswith("data.pkl")), *members])
        members[member] = mutations.damage_repeatedly(rng, members[member])
        if rng.random() < 0.3:
            members[member] = rng.choice(hostile.PICKLES)
        content = hostile.zip_of(members)
    else:
        content = mutations.at_start(mutations.damage_repeatedly, rng.choice((600, 8000)))(rng, content)
    return {**dict.fromkeys(files), name: content}


def _odd_state(rng: random.Random) -> bytes:
    import torch

    one = torch.ones(1)
    tensor: Any = rng.choice(
        (
            torch.ones(3).to_sparse(), one.to("meta"), torch.ones(3, dtype=torch.complex64), one.bool(),
            torch.as_strided(torch.ones(1, dtype=torch.float16), (1 << 29,), (0,)), one.expand(1 << 31),
            torch.as_strided(one, (1 << 20, 1 << 20), (0, 0)), torch.ones(2, dtype=torch.bfloat16),
            torch.nn.Parameter(one),
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), torch.ones(0, 1 << 40), 3, "text", None,
            torch.ones(3, dtype=torch.float8_e4m3fn), one * float("nan"), [1], {"a": one},
        )
    )  # fmt: skip
    state: dict[Any, Any] = {name: torch.from_numpy(array) for name, array in _tensors().items()}
    state[rng.choice(("linear.weight", "conv1.weight", "new", 5, None, (1, 2), b"x", 1.5))] = tensor
    stream = io.BytesIO()
    torch.save(rng.choice((state, state, {"state_dict": state}, [state], {"model": {"state_dict": 1}}, tensor)), stream)
    return stream.getvalue()


def _caffemodel() -> Files:
    net = MESSAGES["NetParameter"]()

    def add(name: str, kind: str, *blobs: np.ndarray) -> None:
        layer = net.layer.add(name=name.encode(), type=kind.encode())
        for array in blobs:
            blob = layer.blobs.add(data=array.reshape(-1).tolist())
            blob.shape.dim.extend(array.shape)

    names = ["conv1", *(f"{stage}a_branch{branch}" for stage in (2, 3, 4, 5) for branch in ("1", "2a", "2b", "2c"))]
    for name in names:
        stem = name == "conv1"
        add(name if stem else f"res{name}", "Convolution", np.ones((2, 3 if stem else 2, 1, 1)))
        add("bn_conv1" if stem else f"bn{name}", "BatchNorm", np.ones(2), np.ones(2), np.ones(1))
        add("scale_conv1" if stem else f"scale{name}", "Scale", np.ones(2), np.ones(2))
    add("fc1000", "InnerProduct", np.ones((3, 2)), np.ones(3))
    return {"x.caffemodel": net.SerializeToString()}


_HUGE = (0, 1, -1, 2, 3, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))


def _damage_caffemodel(rng: random.Random, files: Files) -> Damaged:
    content = files["x.caffemodel"]
    if rng.random() < 0.5:
        return {"x.caffemodel": mutations.damage_repeatedly(rng, content)}
    net = MESSAGES["NetParameter"].FromString(content)
    for _ in range(rng.choice((1, 1, 2))):
        layer = rng.choice(net.layer)
        match rng.randrange(6):
            case 0:
                layer.name = rng.choice(
                    (b"", b"\xff", b"x" * 5000, b"res2b999999_branch1", b"res2z_branch2a", b"\x1b[0m\n")
                )
            case 1:
                layer.type = rng.choice((b"", b"\xff", b"Scale", b"x" * 5000))
            case 2:
                del layer.blobs[rng.randrange(len(layer.blobs)) :]
            case 3:
                net.layer.add().CopyFrom(layer)
            case _ if layer.blobs:
                _damage_blob(rng, rng.choice(layer.blobs))
    content = net.SerializeToString()
    return {"x.caffemodel": mutations.damage(rng, content) if rng.random() < 0.1 else content}


def _damage_blob(rng: random.Random, blob: Any) -> None:
    match rng.randrange(5):
        case 0:
            blob.num = rng.choice(_HUGE)
            blob.channels = rng.choice(_HUGE)
        case 1:
            blob.shape.dim.extend([rng.choice(_HUGE)] * rng.choice((1, 2, 40)))
        case 2 if blob.shape.dim:
            blob.shape.dim[rng.randrange(len(blob.shape.dim))] = rng.choice(_HUGE)
        case 3 if blob.data:
            blob.data[0] = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-40, -1.0))
        case _:
            blob.double_data.extend([rng.choice((1e300, float("nan"), 0.0, 1.0))] * rng.choice((1, len(blob.data))))


def _read_caffemodel(folder: Path, names: frozenset[str]) -> None:
    weights = read_caffemodel(folder / "x.caffemodel")
    assert all(array.dtype == np.float32 and array.size and np.isfinite(array).all() for array in weights.values())
    assert weights["fc.weight"].ndim == 2
    assert weights["conv1.weight"].shape[1] == 3


def _mean_files() -> Files:
    blob = MESSAGES["BlobProto"](num=1, channels=3, height=4, width=5, data=[100.0] * 60)
    return {"mean.binaryproto": blob.SerializeToString()}


def _damage_mean(rng: random.Random, files: Files) -> Damaged:
    blob = MESSAGES["BlobProto"].FromString(files["mean.binaryproto"])
    if rng.random() < 0.5:
        _damage_blob(rng, blob)
    content = blob.SerializeToString()
    return {"mean.binaryproto": mutations.damage_repeatedly(rng, content) if rng.random() < 0.6 else content}


def _read_mean(folder: Path, names: frozenset[str]) -> None:
    mean = read_mean(folder / "mean.binaryproto")
    assert (mean.dtype, mean.ndim, mean.shape[2]) == (np.float32, 3, 3)
    assert mean.min() >= 0
    assert mean.max() <= 255


_IN = ("resnet_jax.convert.files", "resnet_jax.convert.weights_in", "resnet_jax.convert.names")
_TORCH = ("resnet_jax.convert.torch_files", *_IN)
WEIGHT_READERS = (
    Reader("safetensors", 800, _IN, _safetensors, _damage_safetensors, _read_weights, _cache_shapes),
    Reader("torch", 500, _TORCH, _torch_files, _damage_torch, _read_weights, _cache_shapes, needs="torch"),
    Reader("caffemodel", 900, ("resnet_jax.convert.caffe",), _caffemodel, _damage_caffemodel, _read_caffemodel),
    Reader("mean-image", 400, ("resnet_jax.convert.caffe",), _mean_files, _damage_mean, _read_mean),
)
