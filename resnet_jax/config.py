"""Configuration: frozen dataclasses whose defaults are the paper's CIFAR-10 recipe (Sec. 4.2).

A config file is Python and defines get_config() -> Config; the command line overrides single fields. A work
directory keeps the result as JSON, and reading that runs no code.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from typing import Annotated, Any, Literal

import typeguard
import tyro

from resnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    family: Literal["cifar", "imagenet", "vgg"] = "cifar"
    """cifar: the networks of Sec. 4.2; imagenet: those of Table 1; vgg: VGG-16 and VGG-19."""
    depth: int = 20
    """Weighted layers. cifar: 6n+2, as in 20, 32, 44, 56, 110, 1202; imagenet: 18, 34, 50, 101, 152; vgg: 16, 19."""
    shortcut: Literal["none", "A", "B", "C"] = "A"
    """none: plain net. A: identity, zero channels where dimensions grow. B: projection there. C: projections
    in every block."""
    zero_channels: Literal["end", "both"] = "end"
    """Where option A puts its zero channels: behind the others, or half on each side."""
    stride_on: Literal["1x1", "3x3"] = "1x1"
    """Which convolution of a bottleneck subsamples: the first 1x1 (the authors), or the 3x3 (torchvision)."""
    pool_padding: Literal["caffe", "torch"] = "caffe"
    """Padding of the max pool of imagenet networks: none and rounded up, or 1 on each side."""
    bn_group_size: int | None = 64
    """Images that share BN statistics (the paper's 64 on each of 2 GPUs); None: the whole batch."""
    bn_decay: float = 0.9
    """Share of the old value in each update of the running BN statistics (0 to 1)."""
    running_variance: Literal["unbiased", "biased"] = "unbiased"
    """Whether the running BN variance averages the n/(n-1) estimate (Caffe, PyTorch) or not (Flax)."""
    frozen_bn: bool = False
    """Normalize by the running statistics also in training and leave BN as it is (for fine-tuning)."""
    init_fan: Literal["fan_in", "fan_out"] = "fan_in"
    """Fan of the He initialization."""
    scan_blocks: bool = False
    """Compile the equal blocks of a stage as one loop: compile time does not grow with depth. It changes no result."""
    remat: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again, to save memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters, statistics and logits are float32."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "cifar10"
    """digits, cifar10, or tfds:NAME for a set of TensorFlow Datasets with images of one size."""
    dir: str = "data"
    """Folder of the data set; CIFAR-10 is downloaded into it where it holds none."""
    batch_size: int = 128
    """Images in a training step, over all devices."""
    eval_batch_size: int = 500
    """Images evaluated at a time, over all devices; it does not change any result."""
    validation_size: int = 0
    """Training images split off for validation (the paper's 45k/5k split: 5000); 0: train on all."""
    split_seed: int = 0
    """Seed of the validation split."""
    mean: tuple[float, float, float] | None = None
    """Channel means to subtract from pixels in [0, 1]; None: the per-pixel mean of the training images."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Channel standard deviations to divide by; the paper does not divide."""
    padding: int = 4
    """Zeros added on each side before the random crop, in pixels; 0: no crop."""
    flip: bool = True
    """Mirror training images left to right at random."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 0.1
    """Rate until the first boundary."""
    boundaries: tuple[int, ...] = (32_000, 48_000)
    """Steps at which the rate is divided by 10."""
    momentum: float = 0.9
    """Share of the old velocity (0 to 1)."""
    momentum_style: Literal["caffe", "torch"] = "caffe"
    """caffe: the rate is inside the velocity, as the authors had it; torch: outside."""
    weight_decay: float = 1e-4
    """L2 penalty, coupled: times the parameter it is added to the gradient."""
    weight_decay_on: Literal["all", "kernels"] = "all"
    """all parameters (Caffe), or kernels only: neither biases nor BN."""
    warmup: Literal["none", "steps", "error"] = "none"
    """steps: begin with so many steps at the warm-up rate; error: until the training error has come down."""
    warmup_learning_rate: float = 0.01
    """Rate of the warm-up."""
    warmup_steps: int = 400
    """Steps of the warm-up "steps"."""
    warmup_error: float = 80.0
    """Training error in % (average of the recent batches) below which the warm-up "error" ends."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    init_from: Annotated[str | None, tyro.conf.arg(prefix_name=False, metavar="WORKDIR")] = None
    """Work directory whose weights and preprocessing a new run begins with; the last layer is new where the number of
    classes differs."""
    workdir: str | None = None
    """Folder for checkpoints, logs and curves; None: runs/NAME for the config file NAME.py."""
    steps: int = 64_000
    """Training steps in all; a finished run goes on if this is raised."""
    seed: int = 0
    """Of the initialization, the order of the images and the augmentation."""
    steps_per_dispatch: int | None = None
    """Most training steps in one dispatch to the device; None: as many as fit between log lines and take some
    seconds. It changes no result."""
    log_every: int = 100
    """Steps between log lines."""
    eval_every: int = 1_000
    """Steps between evaluations on all test (and validation) images."""
    save_every: int = 1_000
    """Steps between checkpoints; one more is saved at the end."""
    keep: int = 3
    """Last checkpoints to keep; the one best on the validation split stays too."""


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()


# What may differ when a run is resumed: none of it changes the parameters at a given step.
_FREE_ON_RESUME = {
    "model.scan_blocks", "model.remat", "data.dir", "data.eval_batch_size", "run.steps_per_dispatch",
    "run.workdir", "run.steps", "run.log_every", "run.eval_every", "run.save_every", "run.keep",
}  # fmt: skip


def check_config(config: Config) -> None:
    """Check what can be checked without data and devices.

    Raises:
      UserError: a value out of range.
    """
    at_least_one = [
        "data.batch_size", "data.eval_batch_size", "run.steps", "run.log_every", "run.eval_every",
        "run.save_every", "run.keep", "run.steps_per_dispatch", "optim.warmup_steps",
    ]  # fmt: skip
    at_least_zero = ["data.validation_size", "data.padding", "optim.weight_decay", "run.seed", "data.split_seed"]
    positive = ["optim.learning_rate", "optim.warmup_learning_rate"]
    shares = ["optim.momentum", "model.bn_decay"]
    for names, ok, range_text in (
        (at_least_one, lambda v: v >= 1, "at least 1"),
        (at_least_zero, lambda v: v >= 0, "at least 0"),
        (positive, lambda v: 0 < v < float("inf"), "above 0 and finite"),
        (shares, lambda v: 0 <= v < 1, "from 0 up to, not including, 1"),
    ):
        for name in names:
            value = get_field(config, name)
            if value is not None and not ok(value):
                raise UserError(f"--{name.replace('_', '-')} must be {range_text}; got {value}")
    if config.run.seed >= 2**32:
        raise UserError(f"--run.seed must be below 2^32; got {config.run.seed}")
    group = config.model.bn_group_size
    if group is not None and (group < 1 or config.data.batch_size % group):
        raise UserError(
            f"a batch of {config.data.batch_size} (--data.batch-size) does not divide into BN groups of {group}:"
            " choose another --model.bn-group-size, or None for the whole batch"
        )
    if min(config.data.std) <= 0:
        raise UserError(f"--data.std must be above 0; got {config.data.std}")


def get_field(config: Config, name: str) -> Any:
    """Return the value of a dotted name such as "model.depth"."""
    group, field = name.split(".")
    return getattr(getattr(config, group), field)


def to_json(config: Config) -> str:
    """Write every field, so that a later change of a default does not change an old run."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """Read what to_json wrote; `source` names the text in errors.

    Raises:
      UserError: no JSON, an unknown field, a value of the wrong type or out of range.
    """
    try:
        data = json.loads(text)
        groups = {field.name: type(field.default) for field in dataclasses.fields(Config)}
        config = Config(**{name: _build(groups[name], name, values) for name, values in _items(data, groups)})
        check_config(config)
    except (json.JSONDecodeError, UserError) as error:
        raise UserError(f"{source} is not a configuration of this program: {error}") from error
    return config


def _build(group: Any, group_name: str, values: Any) -> Any:
    """Make one group from its JSON object; a field that an older version did not have keeps its default."""
    hints = typing.get_type_hints(group)
    fields = {}
    for name, value in _items(values, hints):
        fields[name] = tuple(value) if isinstance(value, list) else value
        try:
            typeguard.check_type(fields[name], hints[name])
        except typeguard.TypeCheckError as error:
            raise UserError(f"{group_name}.{name}: {error}") from error
    return group(**fields)


def _items(data: Any, known: typing.Collection[str]) -> list[tuple[str, Any]]:
    if not isinstance(data, dict):
        raise UserError(f"expected an object, found {data!r}")
    for name in data:
        if name not in known:
            raise UserError(f"unknown field {name!r}{did_you_mean(name, known)}")
    return list(data.items())


def difference(old: Config, new: Config) -> str | None:
    """Name the first field that makes `new` another experiment than `old`, or None."""
    for name in field_names():
        before, now = get_field(old, name), get_field(new, name)
        if before != now and name not in _FREE_ON_RESUME:
            return f"{name} is {before} there and {now} here"
    return None


def field_names() -> list[str]:
    """Return the dotted names of all fields."""
    defaults = Config()
    groups = [(group.name, getattr(defaults, group.name)) for group in dataclasses.fields(Config)]
    return [f"{name}.{field.name}" for name, group in groups for field in dataclasses.fields(group)]


def did_you_mean(word: str, known: typing.Collection[str]) -> str:
    """Return "; did you mean NAME?" for the nearest known name, or nothing."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
