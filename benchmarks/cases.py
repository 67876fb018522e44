"""What is measured: one table, most important first; and what a peer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Platform = Literal["cpu", "gpu"]

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4  # of all peers; random labels diverge at higher rates

PEERS: dict[str, tuple[str, dict[str, Any]]] = {  # module and options of its prepare(case, **options)
    "ours": ("benchmarks.ours", {}),
    "ours, one step a dispatch": ("benchmarks.ours", {"single": True}),
    "ours, again": ("benchmarks.ours", {}),
    "ours, before": ("benchmarks.ours", {}),  # of another checkout
    "ours, deterministic": ("benchmarks.ours", {"deterministic": True}),
    "ours, deterministic, again": ("benchmarks.ours", {"deterministic": True}),
    "ours, scan_blocks": ("benchmarks.ours", {"scan_blocks": True}),
    "ours, scan_blocks and remat": ("benchmarks.ours", {"scan_blocks": True, "remat": True}),
    "plain Flax": ("benchmarks.plain_flax", {}),
    "PyTorch": ("benchmarks.torch_peer", {}),
    "torch.compile": ("benchmarks.torch_peer", {"mode": "default"}),
    "torch.compile, CUDA graphs": ("benchmarks.torch_peer", {"mode": "reduce-overhead"}),
}


class Case(NamedTuple):
    """One measurement of several peers.

    Attributes:
      platform: where it is measured.
      network: a name that create_model takes.
      mode: of the network in a step.
      batch_size: images in a step.
      dtype: of the activations.
      peers: who takes part, of PEERS.
      rounds: at most so many turns of each.
    """

    platform: Platform
    network: str
    mode: Literal["train", "inference"]
    batch_size: int
    dtype: Literal["float32", "bfloat16"]
    peers: tuple[str, ...]
    rounds: int = 3

    @property
    def name(self) -> str:
        """Unique within a platform."""
        dtype = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        return f"{self.network}-{self.mode}-{dtype}-{self.batch_size}"

    # Not by resnet_jax.models.parse_name: JAX would count into PyTorch's memory.
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

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        imagenet = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
        return imagenet[self.depth] if self.family == "imagenet" else ((self.depth - 2) // 6,) * 3


class Prepared(NamedTuple):
    """A peer that is compiled and ready to be timed.

    Attributes:
      compute: compute(calls) makes so many calls and returns when the device has done them.
      steps_per_call: batches in a call.
      compile_seconds: what comes before the first step can run; None where nothing is compiled.
      peak_device_bytes: highest use of device memory so far; None on the CPU.
      settings: what a reader must know, for the report.
      digest: digest(calls) makes so many calls from the initial state and names the bits of what comes out.
    """

    compute: Callable[[int], None]
    steps_per_call: int
    compile_seconds: float | None
    peak_device_bytes: Callable[[], int | None]
    settings: dict[str, Any]
    digest: Callable[[int], str] | None = None


class UnavailableError(Exception):
    """A peer that cannot take part on this machine; the message is a word or two for the table."""


_EAGER = ("ours", "plain Flax", "PyTorch")
_ALL = (*_EAGER, "torch.compile")
_SINGLE = ("ours", "ours, one step a dispatch", *_ALL[1:])
_SCAN = ("ours", "ours, scan_blocks", *_EAGER[1:])
_DEEPEST = ("ours, scan_blocks and remat",)

CASES = (
    Case("cpu", "resnet20", "train", 128, "float32", _SINGLE, rounds=5),
    Case("cpu", "resnet20", "inference", 128, "float32", _ALL, rounds=5),
    Case("cpu", "resnet110", "train", 128, "float32", _SCAN),
    Case("cpu", "resnet50", "train", 8, "float32", _EAGER),
    Case("cpu", "resnet50", "inference", 8, "float32", _EAGER),
    Case("cpu", "resnet56", "train", 128, "float32", _EAGER),
    Case("cpu", "resnet20", "train", 128, "bfloat16", _EAGER),
    Case("cpu", "resnet1202", "train", 128, "float32", _DEEPEST, rounds=1),
    Case("cpu", "resnet18", "train", 8, "float32", _EAGER),
    Case("cpu", "vgg16", "train", 4, "float32", _EAGER),
    Case("cpu", "resnet152", "train", 4, "float32", _EAGER),
    Case("gpu", "resnet50", "train", 256, "bfloat16", _ALL, rounds=5),
    Case("gpu", "resnet20", "train", 128, "bfloat16", _SINGLE, rounds=5),
    Case("gpu", "resnet110", "train", 128, "bfloat16", _SCAN, rounds=5),
    Case("gpu", "resnet20", "train", 128, "float32", _EAGER, rounds=5),
    Case("gpu", "resnet50", "inference", 256, "bfloat16", _EAGER),
    Case("gpu", "resnet20", "inference", 128, "bfloat16", _EAGER),
    Case("gpu", "resnet50", "train", 128, "float32", _EAGER),
    Case("gpu", "resnet152", "train", 64, "bfloat16", _EAGER),
    Case("gpu", "vgg16", "train", 64, "bfloat16", _EAGER),
    Case("gpu", "resnet18", "train", 256, "bfloat16", _EAGER),
    Case("gpu", "resnet56", "train", 128, "bfloat16", _EAGER),
    Case("gpu", "resnet1202", "train", 128, "bfloat16", _DEEPEST, rounds=1),
)
