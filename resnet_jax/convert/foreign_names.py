"""Names that others give to the tensors of ResNets, as torchvision's, and how the networks of such files are made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from resnet_jax.models import BatchNorm
from resnet_jax.models.blocks import StrideOn
from resnet_jax.models.pool import PoolPadding
from resnet_jax.models.resnet import IMAGENET_BLOCKS

Array = np.ndarray
Channels = Literal["RGB", "BGR"]
PreprocessingName = Literal["torchvision", "caffe", "detectron2", "none"]


class Convention(NamedTuple):
    """How the networks are that come in files of some kind; nothing in the tensors tells.

    Attributes:
      preprocessing: of PREPROCESSING in weights_in.py.
      stride_on: which convolution of a bottleneck subsamples.
      pool_padding: of the stem's max pool.
      channels: the order of those of images.
      bn_epsilon: what is added to the variances.
    """

    preprocessing: PreprocessingName
    stride_on: StrideOn
    pool_padding: PoolPadding
    channels: Channels = "RGB"
    bn_epsilon: float = BatchNorm.epsilon


# PyTorch's: torchvision, timm, transformers and the CIFAR ResNets.
TORCHVISION = Convention("torchvision", "3x3", "torch")
CAFFE = Convention("caffe", "1x1", "caffe")  # whose reader has turned the channels already
# The authors' weights for Caffe2, with which detectron2 trains unless told otherwise.
DETECTRON2 = Convention("detectron2", "1x1", "torch", "BGR")
KERAS = Convention("caffe", "1x1", "torch", "BGR", bn_epsilon=1.001e-5)

_NORM = {  # what torchvision calls the numbers of a BN
    **{name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var",
    "s": "weight", "b": "bias",
}  # fmt: skip
_LAYER = {"weight": "weight", "bias": "bias", "kernel": "weight", "w": "weight", "b": "bias"}
_ABC = {"a": 1, "b": 2, "c": 3}

Rename = tuple[str, Callable[[re.Match[str]], str]]


def _conv(layer: object, block: object, number: object, leaf: str) -> str:
    """Return the name of a convolution's tensor; the one with the number 0 is that of the shortcut."""
    conv = f"conv{number}" if int(str(number)) else "downsample.0"
    return f"layer{layer}.{block}.{conv}.{_LAYER[leaf]}"


def _norm(layer: object, block: object, number: object, leaf: str) -> str:
    return f"layer{layer}.{block}.{f'bn{number}' if int(str(number)) else 'downsample.1'}.{_NORM[leaf]}"


_HF_BLOCK = r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\."
_LEAF, _NORM_LEAF = r"(weight|bias|kernel)", f"({'|'.join(_NORM)})"
_C2_BLOCK, _C2_NORM = r"res(\d)_(\d+)_branch", f"_bn_{_NORM_LEAF}"
_HUGGING_FACE: tuple[Rename, ...] = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.(\w+)", lambda m: f"conv1.{m[1]}"),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.(\w+)", lambda m: f"bn1.{m[1]}"),
    (_HF_BLOCK + f"shortcut\\.convolution\\.{_LEAF}", lambda m: _conv(int(m[1]) + 1, m[2], 0, m[3])),
    (_HF_BLOCK + f"shortcut\\.normalization\\.{_NORM_LEAF}", lambda m: _norm(int(m[1]) + 1, m[2], 0, m[3])),
    (_HF_BLOCK + f"layer\\.(\\d)\\.convolution\\.{_LEAF}", lambda m: _conv(int(m[1]) + 1, m[2], int(m[3]) + 1, m[4])),
    (
        _HF_BLOCK + f"layer\\.(\\d)\\.normalization\\.{_NORM_LEAF}",
        lambda m: _norm(int(m[1]) + 1, m[2], int(m[3]) + 1, m[4]),
    ),
    (r"classifier\.1\.(weight|bias)", lambda m: f"fc.{m[1]}"),
)
_DETECTRON2: tuple[Rename, ...] = (
    (r"stem\.conv1\.(weight|bias)", lambda m: f"conv1.{m[1]}"),
    (r"stem\.(?:conv1\.norm|bn1)\.(\w+)", lambda m: f"bn1.{m[1]}"),
    (f"res(\\d)\\.(\\d+)\\.shortcut\\.{_LEAF}", lambda m: _conv(int(m[1]) - 1, m[2], 0, m[3])),
    (f"res(\\d)\\.(\\d+)\\.shortcut\\.norm\\.{_NORM_LEAF}", lambda m: _norm(int(m[1]) - 1, m[2], 0, m[3])),
    (f"res(\\d)\\.(\\d+)\\.conv(\\d)\\.{_LEAF}", lambda m: _conv(int(m[1]) - 1, m[2], m[3], m[4])),
    (f"res(\\d)\\.(\\d+)\\.conv(\\d)\\.norm\\.{_NORM_LEAF}", lambda m: _norm(int(m[1]) - 1, m[2], m[3], m[4])),
    (r"(?:stem\.fc|linear)\.(weight|bias)", lambda m: f"fc.{m[1]}"),
    # Caffe2's own.
    (r"conv1_([wb])", lambda m: f"conv1.{_LAYER[m[1]]}"),
    (f"res_conv1{_C2_NORM}", lambda m: f"bn1.{_NORM[m[1]]}"),
    (_C2_BLOCK + "1_([wb])", lambda m: _conv(int(m[1]) - 1, m[2], 0, m[3])),
    (_C2_BLOCK + f"1{_C2_NORM}", lambda m: _norm(int(m[1]) - 1, m[2], 0, m[3])),
    (_C2_BLOCK + "2([abc])_([wb])", lambda m: _conv(int(m[1]) - 1, m[2], _ABC[m[3]], m[4])),
    (_C2_BLOCK + f"2([abc]){_C2_NORM}", lambda m: _norm(int(m[1]) - 1, m[2], _ABC[m[3]], m[4])),
    (r"(?:fc1000|pred)_([wb])", lambda m: f"fc.{_LAYER[m[1]]}"),
)
_KERAS: tuple[Rename, ...] = (
    (f"conv1_conv\\.{_LEAF}", lambda m: f"conv1.{_LAYER[m[1]]}"),
    (f"conv1_bn\\.{_NORM_LEAF}", lambda m: f"bn1.{_NORM[m[1]]}"),
    (f"conv(\\d)_block(\\d+)_(\\d)_conv\\.{_LEAF}", lambda m: _conv(int(m[1]) - 1, int(m[2]) - 1, m[3], m[4])),
    (f"conv(\\d)_block(\\d+)_(\\d)_bn\\.{_NORM_LEAF}", lambda m: _norm(int(m[1]) - 1, int(m[2]) - 1, m[3], m[4])),
    (r"[a-z_]+(?:_\d+)?\.(kernel|bias)", lambda m: f"fc.{_LAYER[m[1]]}"),  # "predictions", or the user's own
)
# Of each kind of names: a tensor that tells it, how to rename, and how its networks are.
_KINDS: tuple[tuple[str, tuple[Rename, ...], Convention], ...] = (
    ("resnet.embedder.embedder.convolution.weight", _HUGGING_FACE, TORCHVISION),
    ("embedder.embedder.convolution.weight", _HUGGING_FACE, TORCHVISION),
    ("stem.conv1.weight", _DETECTRON2, DETECTRON2),
    ("res2_0_branch2a_w", _DETECTRON2, DETECTRON2),
    ("conv1_conv.kernel", _KERAS, KERAS),
)


def recognize(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], Convention]:
    """Call tensors as torchvision does, and say how the network of such a file is.

    A name that is not known stays, and is refused as left over. Biases of convolutions are taken into the BN behind
    them, and a convolution with a bias but without BN, as they are folded, gets one that only adds it.
    """
    for telling, renames, convention in _KINDS:
        if telling in tensors:
            renamed = {_renamed(name, renames): array for name, array in tensors.items()}
            return _complete(renamed, convention), convention
    inside = {re.fullmatch(r"fc\.(\d+)\.(weight|bias)", name) for name in tensors if name.startswith("fc.")}
    if inside and all(inside) and len({match[1] for match in inside if match}) == 1:  # a head behind dropout, say
        tensors = {re.sub(r"^fc\.\d+\.", "fc.", name): array for name, array in tensors.items()}
    return _complete(dict(tensors), TORCHVISION), TORCHVISION


def _renamed(name: str, renames: tuple[Rename, ...]) -> str:
    for pattern, theirs in renames:
        if match := re.fullmatch(pattern, name):
            return theirs(match)
    return name


def _complete(tensors: dict[str, Array], convention: Convention) -> dict[str, Array]:
    """Give every convolution a BN with our epsilon, and no bias."""
    for weight in [name for name in tensors if re.fullmatch(r"(.*\.)?(conv\d|(downsample|shortcut)\.0)\.weight", name)]:
        conv = weight.removesuffix(".weight")
        norm = re.sub(r"(conv(?=\d$)|0$)", lambda m: "bn" if m[0] == "conv" else "1", conv)
        bias, filters = tensors.pop(f"{conv}.bias", None), tensors[weight].shape[:1]
        scale, mean, var = f"{norm}.weight", f"{norm}.running_mean", f"{norm}.running_var"
        no_change = {mean: np.zeros(filters), var: np.full(filters, 1 - BatchNorm.epsilon)}
        if scale not in tensors and bias is not None:
            tensors |= {scale: np.ones(filters), f"{norm}.bias": bias, **no_change}
            continue
        if convention is DETECTRON2 and scale in tensors and not {mean, var} & tensors.keys():
            tensors |= no_change  # Caffe2's have scale and bias alone
        if bias is not None and mean in tensors:
            tensors[mean] = tensors[mean] - bias
        if var in tensors and convention.bn_epsilon != BatchNorm.epsilon:
            tensors[var] = tensors[var].astype(np.float64) + (convention.bn_epsilon - BatchNorm.epsilon)
    return tensors


def to_hugging_face(name: str) -> str:
    """Return what transformers calls a tensor of torchvision's."""
    module, _, leaf = name.rpartition(".")
    if module == "fc":
        return f"classifier.1.{leaf}"
    *block, layer, number = re.split(r"\.|(?<=conv)|(?<=bn)", module)
    kind = "normalization" if (layer, number) in {("bn", number), ("downsample", "1")} else "convolution"
    if not block:
        return f"resnet.embedder.embedder.{kind}.{leaf}"
    place = "shortcut" if layer == "downsample" else f"layer.{int(number) - 1}"
    return f"resnet.encoder.stages.{int(block[0][-1]) - 1}.layers.{block[1]}.{place}.{kind}.{leaf}"


def network_of(tensors: Mapping[str, Array]) -> str | None:
    """Return which network tensors in torchvision's names make, such as "resnet50"; None if they do not say it.

    The plain networks have the same tensors as those with shortcuts of option A.
    """
    vggs = {13: "vgg16", 16: "vgg19"}
    convs = [name for name in tensors if re.fullmatch(r"features\.\d+\.weight", name)]
    if convs:
        return vggs.get(len(convs))
    blocks = Counter(int(m[1]) for m in (re.fullmatch(r"layer(\d)\.\d+\.conv1\.weight", name) for name in tensors) if m)
    counts = tuple(blocks[stage] for stage in sorted(blocks))
    is_bottleneck = "layer1.0.conv3.weight" in tensors
    projected = any(name.startswith(("layer2.0.downsample.", "layer2.0.shortcut.")) for name in tensors)
    if not (is_bottleneck or projected):
        return None
    if len(counts) == 3 and len(set(counts)) == 1 and not is_bottleneck:
        return f"resnet{6 * counts[0] + 2}"
    depths = [depth for depth, each in IMAGENET_BLOCKS.items() if each == counts and (depth >= 50) == is_bottleneck]
    return f"resnet{depths[0]}" if depths else None
