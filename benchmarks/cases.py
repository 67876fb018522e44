"""What is measured: one table, most important first."""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal["train", "inference", "train.py", "start"]
Dtype = Literal["float32", "bfloat16"]
Platform = Literal["cpu", "gpu"]

PEERS = {
    "ours": "ours",
    "ours-single": "ours, one step a dispatch",
    "ours-scan": "ours, scan_blocks",
    "ours-scan-remat": "ours, scan_blocks and remat",
    "flax": "plain Flax",
    "torch": "PyTorch",
    "torch-compile": "torch.compile",
}
_JAX = ("ours", "flax")
_EAGER = ("ours", "flax", "torch")
_ALL = ("ours", "flax", "torch", "torch-compile")
_OURS = ("ours",)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement of several peers.

    Attributes:
      platform: where it belongs to the default set.
      network: a name that create_model takes.
      kind: "train" and "inference" time steps in workers; "train.py" times the command from end to end on made-up
        CIFAR-10; "start" times two starts of a training process that share a compilation cache.
      batch_size: images in a step.
      dtype: of the activations.
      peers: who takes part, of PEERS.
      rounds: at most so many (None: as many as the run has).
      single_step: one step is all: no warm-up, one round (for the networks that take minutes).
      roofline: compare the step of ours with the memory bandwidth.
      timeout: seconds that a worker may take to get ready, or for a round.
    """

    platform: Platform
    network: str
    kind: Kind
    batch_size: int
    dtype: Dtype
    peers: tuple[str, ...]
    rounds: int | None = None
    single_step: bool = False
    roofline: bool = False
    timeout: float = 150.0

    @property
    def name(self) -> str:
        """Unique within a platform."""
        dtype = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        return f"{self.network}-{self.kind}-{dtype}-{self.batch_size}"

    # Not by resnet_jax.models.parse_name: every worker imports this, and JAX would count into PyTorch's memory.
    @property
    def depth(self) -> int:
        return int(self.network.removeprefix("resnet").removeprefix("vgg"))

    @property
    def family(self) -> Literal["cifar", "imagenet", "vgg"]:
        if self.network.startswith("vgg"):
            return "vgg"
        return "imagenet" if self.depth in (18, 34, 50, 101, 152) else "cifar"

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return 32 if self.family == "cifar" else 224

    @property
    def num_classes(self) -> int:
        return 10 if self.family == "cifar" else 1000

    @property
    def pool_batches(self) -> int:
        """How many different batches of random images the peers go through, and an evaluation of ours has."""
        return 16 if self.family == "cifar" else 4


CASES = (
    Case("cpu", "resnet20", "train", 128, "float32", ("ours", "ours-single", "flax", "torch", "torch-compile")),
    Case("cpu", "resnet20", "inference", 128, "float32", _ALL),
    Case("cpu", "resnet20", "train.py", 128, "float32", _OURS),
    Case("cpu", "resnet20", "start", 128, "float32", _OURS),
    Case("cpu", "resnet110", "train", 128, "float32", ("ours", "ours-scan", "flax", "torch"), rounds=3),
    Case("cpu", "resnet50", "train", 8, "float32", _EAGER, rounds=3),
    Case("cpu", "resnet50", "inference", 8, "float32", _EAGER, rounds=3),
    Case("cpu", "resnet56", "train", 128, "float32", _EAGER, rounds=3),
    Case("cpu", "resnet20", "train", 128, "bfloat16", _EAGER, rounds=3),
    Case("cpu", "resnet1202", "train", 128, "float32", ("ours-scan-remat",), single_step=True, timeout=600),
    Case("cpu", "resnet18", "train", 8, "float32", _EAGER, rounds=3),
    Case("cpu", "vgg16", "train", 4, "float32", _EAGER, rounds=3),
    Case("cpu", "resnet152", "train", 4, "float32", _EAGER, rounds=3),
    Case("gpu", "resnet50", "train", 256, "bfloat16", _ALL, roofline=True),
    Case("gpu", "resnet20", "train", 128, "bfloat16", ("ours", "ours-single", "flax", "torch", "torch-compile")),
    Case("gpu", "resnet110", "train", 128, "bfloat16", ("ours", "ours-scan", "flax", "torch")),
    Case("gpu", "resnet20", "train.py", 128, "float32", _OURS),
    Case("gpu", "resnet20", "train", 128, "float32", _EAGER),
    Case("gpu", "resnet50", "inference", 256, "bfloat16", _EAGER),
    Case("gpu", "resnet20", "inference", 128, "bfloat16", _EAGER),
    Case("gpu", "resnet50", "train", 128, "float32", _EAGER, rounds=3, roofline=True),
    Case("gpu", "resnet152", "train", 64, "bfloat16", _EAGER, rounds=3, roofline=True),
    Case("gpu", "vgg16", "train", 64, "bfloat16", _EAGER, rounds=3, roofline=True),
    Case("gpu", "resnet18", "train", 256, "bfloat16", _EAGER, rounds=3, roofline=True),
    Case("gpu", "resnet20", "start", 128, "float32", _OURS),
    Case("gpu", "resnet56", "train", 128, "bfloat16", _JAX, rounds=3),
    Case("gpu", "resnet1202", "train", 128, "bfloat16", ("ours-scan-remat",), single_step=True),
)


def select(platform: Platform, names: list[str] | None, peers: list[str] | None) -> list[Case]:
    """Return the cases of a platform, only those named, only with the peers named.

    Raises:
      ValueError: there is no such case or peer.
    """
    cases = [case for case in CASES if case.platform == platform]
    for what, given, known in (("case", names, [case.name for case in cases]), ("peer", peers, list(PEERS))):
        if unknown := [name for name in given or [] if name not in known]:
            raise ValueError(f"no {what} {unknown[0]!r} on this {platform}; there are {', '.join(known)}")
    if names is not None:
        cases = [case for case in cases if case.name in names]
    if peers is not None:
        cases = [dataclasses.replace(case, peers=tuple(p for p in case.peers if p in peers)) for case in cases]
    return [case for case in cases if case.peers]
