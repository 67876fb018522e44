"""Names that others give to the tensors of torchvision's ResNets."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

_BLOCK = r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\."
# Hugging Face's, in transformers: what a name is, and what torchvision calls it.
_HUGGING_FACE: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"resnet\.embedder\.embedder\.convolution\.(\w+)"), lambda m: f"conv1.{m[1]}"),
    (re.compile(r"resnet\.embedder\.embedder\.normalization\.(\w+)"), lambda m: f"bn1.{m[1]}"),
    (re.compile(_BLOCK + r"shortcut\.convolution\.(\w+)"), lambda m: f"{_block(m)}.downsample.0.{m[3]}"),
    (re.compile(_BLOCK + r"shortcut\.normalization\.(\w+)"), lambda m: f"{_block(m)}.downsample.1.{m[3]}"),
    (re.compile(_BLOCK + r"layer\.(\d+)\.convolution\.(\w+)"), lambda m: f"{_block(m)}.conv{int(m[3]) + 1}.{m[4]}"),
    (re.compile(_BLOCK + r"layer\.(\d+)\.normalization\.(\w+)"), lambda m: f"{_block(m)}.bn{int(m[3]) + 1}.{m[4]}"),
    (re.compile(r"classifier\.1\.(\w+)"), lambda m: f"fc.{m[1]}"),
)


def _block(match: re.Match[str]) -> str:
    return f"layer{int(match[1]) + 1}.{match[2]}"


def to_torchvisions(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Call tensors as torchvision does, where they have Hugging Face's names, or are in a Sequential (fc.1.weight)."""
    if any(name.startswith("resnet.embedder.") for name in tensors):
        return {_translated(name): array for name, array in tensors.items()}
    inside = {re.fullmatch(r"fc\.(\d+)\.(weight|bias)", name) for name in tensors if name.startswith("fc.")}
    if inside and all(inside) and len({match[1] for match in inside if match}) == 1:  # a head behind dropout, say
        return {re.sub(r"^fc\.\d+\.", "fc.", name): array for name, array in tensors.items()}
    return tensors


def _translated(name: str) -> str:
    """Return torchvision's name; one that is not known stays, and is refused as left over."""
    for pattern, theirs in _HUGGING_FACE:
        if match := pattern.fullmatch(name):
            return theirs(match)
    return name
