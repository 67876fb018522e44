"""Configuration: frozen dataclasses whose defaults are the paper's CIFAR-10 recipe (Sec. 4.2).

A config file is Python and defines get_config() -> Config; the command line overrides single fields. A work
directory keeps the result as JSON, and reading that runs no code.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import tyro
from annotated_types import Ge, Lt, MinLen
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from resnet_jax.errors import UserError, did_you_mean

T = TypeVar("T")
Share = Annotated[float, Ge(0), Lt(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Precision = Literal["default", "high", "highest"]
Text = Annotated[str, pydantic.StringConstraints(pattern=r"^[^\x00]*$")]  # UTF-8, as that of config.json

_FREE, _RESIDENT, _STREAMED, _DETECTION = "free on resume", "resident", "streamed", "detection"
FreeOnResume = Annotated[T, _FREE]  # may differ when a run is resumed: it does not change the parameters at a step
ForResident = Annotated[T, _RESIDENT]  # only for images that are kept on the devices
ForStreamed = Annotated[T, _STREAMED]  # only for images that are read in training
ForDetection = Annotated[T, _DETECTION]  # only for images with boxes

_CHECKS = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, revalidate_instances="always")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    __pydantic_config__ = _CHECKS

    family: str = "cifar"
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
    bn_group_size: PositiveInt | None = 64
    """Images that share BN statistics (the paper's 64 on each of 2 GPUs); None: the whole batch."""
    bn_decay: Share = 0.9
    """Share of the old value in each update of the running BN statistics (0 to 1)."""
    running_variance: Literal["unbiased", "biased"] = "unbiased"
    """Whether the running BN variance averages the n/(n-1) estimate (Caffe, PyTorch) or not (Flax)."""
    frozen_bn: bool = False
    """Normalize by the running statistics also in training and leave BN as it is (for fine-tuning)."""
    init_fan: Literal["fan_in", "fan_out"] = "fan_in"
    """Fan of the He initialization."""
    scan_blocks: FreeOnResume[bool] = False
    """Compile the equal blocks of a stage as one loop: compile time does not grow with depth. It changes no result."""
    remat: FreeOnResume[bool] = False
    """Keep only the input of each block for the backward pass and compute the rest again, to save memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters, statistics and logits are float32."""
    width: PositiveFloat = 1.0
    """Times the filters of every layer of a cifar or imagenet network."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    __pydantic_config__ = _CHECKS

    name: Text = "cifar10"
    """digits, cifar10, cifar100 (cifar100-coarse: its 20 superclasses), imagenet, folder (any other images in a folder
    for each class), or tfds:NAME for a set of TensorFlow Datasets. Images of many sizes are read from the disk in
    training ("streamed"); others are kept on the devices. voc, and tfds:voc/YEAR: images with boxes, for detection."""
    dir: FreeOnResume[Text] = "data"
    """Folder of the data set, as it is or packed; CIFAR is downloaded into it where it holds none."""
    in_memory: bool | None = None
    """Of "folder": read all images at the start and keep them on the devices, as CIFAR-10; None: where they have one
    size of at most 64x64 pixels and are at most 2 GiB. It decides which options apply."""
    batch_size: PositiveInt = 128
    """Images in a training step, over all devices."""
    eval_batch_size: FreeOnResume[PositiveInt] = 500
    """Images evaluated at a time, over all devices; it does not change any result."""
    validation_size: NonNegativeInt = 0
    """Training images split off for validation (the paper's 45k/5k split: 5000); 0: train on all."""
    split_seed: Seed = 0
    """Seed of the validation split."""
    mean: tuple[float, float, float] | None = None
    """Channel means to subtract from pixels in [0, 1]; None: the per-pixel mean of the training images."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    """Channel standard deviations to divide by; the paper does not divide."""
    padding: ForResident[NonNegativeInt] = 4
    """Zeros added on each side before the random crop, in pixels; 0: no crop. Not for streamed images."""
    flip: bool = True
    """Mirror training images left to right at random."""
    image_size: ForStreamed[PositiveInt] = 224
    """Height and width that streamed images are cropped to, in pixels."""
    crop: ForStreamed[Literal["scale", "area"]] = "scale"
    """Random crop of streamed images. scale: of the image resized to a random shorter side (Sec. 3.4); area: of a
    random part of its area, 8 to 100 %, and a ratio of 3/4 to 4/3 (Szegedy et al. 2015)."""
    shorter_side: ForStreamed[tuple[PositiveInt, PositiveInt]] = (256, 480)
    """Range of the random shorter side of the crop "scale", in pixels, ends included."""
    lighting: ForStreamed[NonNegativeFloat] = 0.0
    """Standard deviation of the PCA colour augmentation of streamed images (Krizhevsky et al. 2012: 0.1); 0: none."""
    upright: ForStreamed[bool] = False
    """Turn streamed images as their cameras marked them (EXIF), in training and in testing."""
    workers: ForStreamed[FreeOnResume[NonNegativeInt | None]] = None
    """Processes that decode streamed images, on each host; None: one a core; 0: threads of this process. It does not
    change any result."""
    train_sets: ForDetection[tuple[str, ...]] = ("2007_trainval",)
    """Sets of VOC to train on, joined: YEAR_SET is VOCYEAR/ImageSets/Main/SET.txt, SET alone that of --data.dir itself;
    of TFDS its splits, by default train and validation."""
    test_sets: ForDetection[tuple[str, ...]] = ("2007_test",)
    """Sets of VOC to test on; of TFDS its splits, by default test."""
    max_broken: ForStreamed[FreeOnResume[NonNegativeFloat]] = 0.1
    """Unreadable training images, in % of all, that are skipped; more stop the run."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    __pydantic_config__ = _CHECKS

    learning_rate: PositiveFloat = 0.1
    """Rate until the first boundary."""
    schedule: str = "steps"
    """steps: divide the rate by 10 at the boundaries; plateau: when the validation error no longer falls (needs
    --data.validation-size); cosine: half a period of a cosine, to 0 at the last step."""
    boundaries: tuple[int, ...] = (32_000, 48_000)
    """Steps at which the schedule "steps" divides the rate by 10."""
    plateau_patience: PositiveInt = 5
    """Evaluations in a row without a lower validation error after which the schedule "plateau" divides the rate."""
    momentum: Share = 0.9
    """Share of the old velocity (0 to 1)."""
    momentum_style: Literal["caffe", "torch"] = "caffe"
    """caffe: the rate is inside the velocity, as the authors had it; torch: outside."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 penalty, coupled: times the parameter it is added to the gradient."""
    weight_decay_on: Literal["all", "kernels"] = "all"
    """all parameters (Caffe), or kernels only: neither biases nor BN."""
    warmup: Literal["none", "steps", "error", "linear"] = "none"
    """steps: begin with so many steps at the warm-up rate; error: until the training error has come down; linear:
    raise the rate from 0 over so many steps."""
    warmup_learning_rate: PositiveFloat = 0.01
    """Rate of the warm-ups "steps" and "error"."""
    warmup_steps: PositiveInt = 400
    """Steps of the warm-ups "steps" and "linear"."""
    warmup_error: PositiveFloat = 80.0
    """Training error in % (average of the recent batches) below which the warm-up "error" ends."""
    label_smoothing: Share = 0.0
    """Share of the target probability that is spread over all classes (0 to 1); the paper has none."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: multiply the loss of an image by how rare its class is among the training images, 1 on average, so that
    every class counts the same."""
    accumulation_steps: FreeOnResume[PositiveInt] = 1
    """Parts that a batch is computed in, one after the other, to save memory: their gradients are averaged, and so are
    their BN statistics. It changes no result beyond rounding if the parts are whole BN groups."""
    trainable: Annotated[tuple[str, ...], MinLen(1)] = ("all",)
    """Parts that are trained, for fine-tuning: all, or some of stem, stage1, stage2, ..., head (of VGG: conv1, ...,
    conv5, fc6, fc7, head). The others stay as they are, BN with its running statistics."""
    head_factor: PositiveFloat = 1.0
    """Times the rate, for the last layer."""
    bias_factor: PositiveFloat = 1.0
    """Times the rate, for all biases, those of BN too (Caffe's usual 2)."""
    precision: Precision = "default"
    """How training multiplies float32. default: as fast as the device can (TF32 on NVIDIA GPUs, one pass of bfloat16
    on TPUs, float32 on CPUs); high: TF32, three passes, float32; highest: float32 everywhere, as evaluation always."""


@dataclasses.dataclass(frozen=True)
class DetectionConfig:
    """Faster R-CNN, for images with boxes (the paper's appendix A; Ren et al. 2015)."""

    __pydantic_config__ = _CHECKS

    shorter_side: PositiveInt = 600
    """Images are resized to this shorter side, in pixels, or as far as the longer one allows."""
    longer_side: PositiveInt = 1000
    """Longest side, in pixels."""
    anchor_scales: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (8.0, 16.0, 32.0)
    """Sides of the square anchors, in units of 16 pixels."""
    anchor_ratios: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (0.5, 1.0, 2.0)
    """Heights of the anchors to their widths."""
    rpn_filters: PositiveInt = 512
    """Filters of the 3x3 convolution of the RPN."""
    rpn_samples: PositiveInt = 256
    """Anchors of an image that the RPN is trained on, half of them positive at most."""
    rpn_positive: Share = 0.7
    """IoU with an object from which an anchor is positive."""
    rpn_negative: Share = 0.3
    """IoU with all objects below which an anchor is negative."""
    rpn_nms: Share = 0.7
    """IoU above which proposals suppress each other."""
    train_proposals: tuple[PositiveInt, PositiveInt] = (12_000, 2_000)
    """Proposals of an image before and after suppression, in training."""
    test_proposals: FreeOnResume[tuple[PositiveInt, PositiveInt]] = (6_000, 300)
    """The same in testing."""
    min_size: NonNegativeFloat = 16.0
    """Shortest side of a proposal, in pixels of the image before it is resized."""
    pooled_size: PositiveInt | None = None
    """Bins to a side of RoI pooling; None: 14 before conv5_x of a ResNet, 7 before fc6 of VGG."""
    regions: PositiveInt = 128
    """Regions of an image that the second network is trained on."""
    foreground: Share = 0.25
    """Largest share of regions with an IoU of at least 0.5 with an object."""
    background_iou: tuple[Share, Share] = (0.1, 0.5)
    """IoU of the regions that are trained to be background."""
    target_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (0.1, 0.1, 0.2, 0.2)
    """What the coordinates that the second network regresses are divided by."""
    schedule: Literal["joint", "alternating"] = "joint"
    """joint: both networks in each step; alternating: the paper's four stages, RPN, regions, and both again with the
    shared layers fixed."""
    rpn_steps: tuple[NonNegativeInt, NonNegativeInt] = (60_000, 20_000)
    """Steps of each stage of the RPN, at the rate and at a tenth of it (schedule "alternating")."""
    region_steps: tuple[NonNegativeInt, NonNegativeInt] = (30_000, 10_000)
    """Likewise of the stages of regions."""
    nms: FreeOnResume[Share] = 0.3
    """IoU above which boxes of a class suppress each other."""
    threshold: FreeOnResume[Share] = 0.05
    """Lowest score of a box that is found."""
    most: FreeOnResume[PositiveInt] = 100
    """Boxes found in an image at most."""
    metric: FreeOnResume[Literal["voc07", "voc12"]] = "voc07"
    """Average precision: voc07: the mean at 11 recalls (VOC 2007); voc12: the area under the curve (2010 on)."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    __pydantic_config__ = _CHECKS

    init_from: Annotated[Text | None, tyro.conf.arg(prefix_name=False, metavar="WORKDIR")] = None
    """Work directory whose weights and preprocessing a new run begins with; the last layer is new where the number of
    classes differs."""
    workdir: FreeOnResume[Text | None] = None
    """Folder for checkpoints, logs and curves; None: runs/NAME for the config file NAME.py."""
    steps: FreeOnResume[PositiveInt] = 64_000
    """Training steps in all; a finished run goes on if this is raised."""
    seed: Seed = 0
    """Of the initialization, the order of the images and the augmentation."""
    steps_per_dispatch: FreeOnResume[PositiveInt | None] = None
    """Most training steps in one dispatch to the device; None: on accelerators 20, on a CPU as many as fit between log
    lines and take some seconds. It changes no result."""
    log_every: FreeOnResume[PositiveInt] = 100
    """Steps between log lines."""
    eval_every: FreeOnResume[PositiveInt] = 1_000
    """Steps between evaluations on all test (and validation) images."""
    save_every: FreeOnResume[PositiveInt] = 1_000
    """Steps between checkpoints; one more is saved at the end."""
    keep: FreeOnResume[PositiveInt] = 3
    """Last checkpoints to keep; the one best on the validation split stays too."""
    require: FreeOnResume[Literal["any", "gpu", "tpu", "cpu"]] = "any"
    """What JAX must run on: a job for a GPU ends at once where it would train on the CPU."""
    on_log_error: FreeOnResume[Literal["stop", "continue"]] = "stop"
    """What to do when a log, curves.png or the output cannot be written, on a full disk say: stop, or go on without
    it. A checkpoint that cannot be written always stops the run."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    __pydantic_config__ = _CHECKS

    distributed: bool = False
    """Run as one of several processes that Slurm, Open MPI, GKE or a TPU pod slice has started and describes in the
    environment."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes that nothing describes; then the next two are needed too."""
    processes: PositiveInt | None = None
    """Number of processes."""
    process_id: NonNegativeInt | None = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class Config:
    __pydantic_config__ = _CHECKS

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    hosts: HostsConfig = HostsConfig()
    detection: DetectionConfig = DetectionConfig()

    @property
    def bn_group_size(self) -> int | None:
        """Images that share BN statistics in training; None where there are no such groups."""
        return None if self.model.family == "vgg" or self.model.frozen_bn else self.model.bn_group_size

    @property
    def detects(self) -> bool:
        """Whether it is about boxes, not about the classes of whole images."""
        return self.data.name == "voc" or self.data.name.startswith("tfds:voc")


_CONFIG: pydantic.TypeAdapter[Config] = pydantic.TypeAdapter(Config)


def check_config(config: Config) -> None:
    """Check what can be checked without data and devices.

    Raises:
      UserError: a value of the wrong type or out of range, or values that do not go together.
    """
    try:
        _CONFIG.validate_python(config)
    except pydantic.ValidationError as error:
        raise UserError(_first_mistake(error)) from error
    _check_batch(config)
    _check_detection(config)
    smallest, largest = config.data.shorter_side
    if not config.data.image_size <= smallest <= largest:
        raise UserError(
            f"--data.shorter-side must be two increasing numbers, not below --data.image-size"
            f" {config.data.image_size}; got {smallest} {largest}"
        )
    if config.optim.schedule == "plateau" and not config.data.validation_size:
        raise UserError(
            "--optim.schedule plateau follows the validation error: hold images out with --data.validation-size"
        )
    _check_hosts(config.hosts)


def _first_mistake(error: pydantic.ValidationError) -> str:
    """Return pydantic's words for the first mistake, as one line that begins with the option."""
    mistake = error.errors(include_url=False)[0]
    names, message, value = [str(name) for name in mistake["loc"][:2]], mistake["msg"], repr(mistake["input"])[:60]
    if not names:  # no JSON, or no object
        return message
    if mistake["type"] == "unexpected_keyword_argument":
        known = field_names() if len(names) == 2 else [field.name for field in dataclasses.fields(Config)]
        unknown = ".".join(names)[:60]
        return f"unknown field {unknown!r}{did_you_mean(unknown, known)}"
    if message.startswith(("Input should", "String should")):
        return f"{option('.'.join(names))} must {message.split(' should ', 1)[1]}; got {value}"
    return f"{option('.'.join(names))}: {message}; got {value}"


def _check_batch(config: Config) -> None:
    """Check that the batch divides into parts, and each of them into BN groups."""
    batch, parts, group = config.data.batch_size, config.optim.accumulation_steps, config.bn_group_size
    if batch % parts:
        raise UserError(
            f"a batch of {batch} (--data.batch-size) does not divide into {parts} parts (--optim.accumulation-steps)"
        )
    if group is not None and batch // parts % group:
        named = f"a batch of {batch}"
        part = f"a part of {batch // parts} (--optim.accumulation-steps {parts})" if parts > 1 else named
        raise UserError(
            f"{part} (--data.batch-size) does not divide into BN groups of {group}:"
            " choose another --model.bn-group-size, or None for the whole batch"
        )


def _check_detection(config: Config) -> None:
    detection = config.detection
    if detection.shorter_side > detection.longer_side:
        raise UserError(
            f"--detection.shorter-side {detection.shorter_side} is above --detection.longer-side"
            f" {detection.longer_side}"
        )
    if detection.background_iou[0] >= detection.background_iou[1]:
        raise UserError(f"--detection.background-iou must increase; got {detection.background_iou}")
    if detection.train_proposals[1] < detection.regions:
        raise UserError(
            f"--detection.regions {detection.regions} are drawn from --detection.train-proposals, which are"
            f" {detection.train_proposals[1]} at most"
        )
    if config.detects and detection.schedule == "alternating":
        steps = 2 * (sum(detection.rpn_steps) + sum(detection.region_steps))
        if config.optim.boundaries:
            raise UserError(
                "--detection.schedule alternating has its own drops of the rate (--detection.rpn-steps,"
                " --detection.region-steps): give --optim.boundaries without numbers"
            )
        if config.run.steps != steps:
            raise UserError(
                f"the four stages of --detection.schedule alternating have {steps} steps: give --run.steps {steps}"
            )


def _check_hosts(hosts: HostsConfig) -> None:
    given = [hosts.coordinator, hosts.processes, hosts.process_id]
    if hosts.coordinator is None or hosts.processes is None or hosts.process_id is None:
        if any(value is not None for value in given):
            raise UserError("--hosts.coordinator, --hosts.processes and --hosts.process-id go together")
        return
    if not re.fullmatch(r".+:\d{1,5}", hosts.coordinator):
        raise UserError(f"--hosts.coordinator must be HOST:PORT; got {hosts.coordinator}")
    if hosts.process_id >= hosts.processes:
        raise UserError(
            f"--hosts.process-id counts from 0: the last of {hosts.processes} processes is {hosts.processes - 1};"
            f" got {hosts.process_id}"
        )


# What has no effect on images with boxes, beside what is for images of a fixed size.
_NOT_FOR_DETECTION = (
    "model.scan_blocks",
    "data.in_memory",
    "data.validation_size",
    "optim.label_smoothing",
    "optim.class_weights",
)


def check_applies(config: Config, *, streamed: bool) -> None:
    """Refuse options that have no effect on the images of the data set.

    Args:
      config: of the run.
      streamed: whether its images are read in training; if not, they are kept on the devices.

    Raises:
      UserError: an option for other images is not at its default.
    """
    usual = Config()
    if config.detects:
        have_effect = ("data.workers", "data.max_broken")
        names = [name for name in (*_marked(_RESIDENT), *_marked(_STREAMED)) if name not in have_effect]
        names += _NOT_FOR_DETECTION
        meant, are = "images without boxes", "with boxes"
    else:
        names = [*_marked(_RESIDENT if streamed else _STREAMED), *_marked(_DETECTION)]
        names += [name for name in field_names() if name.startswith("detection.")]
        meant, are = ("images that are kept on the devices", "streamed") if streamed else ("streamed images", "not")
    for name in names:
        if get_field(config, name) != get_field(usual, name):
            if name in _marked(_DETECTION) or name.startswith("detection."):
                meant, are = "images with boxes", "without"
            stream = (
                ", or stream them with --data.in-memory False" if config.data.name == "folder" and not streamed else ""
            )
            raise UserError(
                f"{option(name)} is for {meant}; those of {config.data.name} are {are}: leave it at"
                f" {get_field(usual, name)}{stream}"
            )


def get_field(config: Config, name: str) -> Any:
    """Return the value of a dotted name such as "model.depth"."""
    group, field = name.split(".")
    return getattr(getattr(config, group), field)


def option(name: str) -> str:
    """Return how the command line calls a field."""
    return "--init-from" if name == "run.init_from" else f"--{name.replace('_', '-')}"


def to_json(config: Config) -> str:
    """Write every field, so that a later change of a default does not change an old run."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str) -> Config:
    """Read what to_json wrote; a field that an older version did not have keeps its default.

    Args:
      text: JSON.
      source: names the text in errors.

    Raises:
      UserError: no JSON, an unknown field, a value of the wrong type or out of range.
    """
    try:
        config = _CONFIG.validate_json(text)
        check_config(config)
        return config
    except (pydantic.ValidationError, UserError) as error:
        mistake = _first_mistake(error) if isinstance(error, pydantic.ValidationError) else error
        raise UserError(f"{source} is not a configuration of this program: {mistake}") from error


def difference(old: Config, new: Config) -> str | None:
    """Name the first field that makes `new` another experiment than `old`, or None."""
    bound, free = _bound_on_resume(new), _marked(_FREE)
    for name in field_names():
        before, now = get_field(old, name), get_field(new, name)
        if before != now and (name in bound or name not in free):
            reason = f", which {bound[name]} depends on" if name in bound else ""
            return f"{name} is {before} there and {now} here{reason}"
    return None


def _bound_on_resume(config: Config) -> dict[str, str]:
    """Name fields that are free, but change the parameters with this configuration, and through what."""
    bound = {}
    if config.optim.schedule not in ("steps", "plateau"):  # a schedule may follow the number of steps
        bound["run.steps"] = f"the schedule {config.optim.schedule}"
    if config.optim.schedule == "plateau":
        bound["run.eval_every"] = "the schedule plateau"
    if config.model.bn_group_size is None:  # each part has BN statistics of its own
        bound["optim.accumulation_steps"] = "BN without groups"
    if config.model.family == "vgg":  # each part draws its own numbers
        bound["optim.accumulation_steps"] = "dropout"
    if config.detects:
        bound["optim.accumulation_steps"] = "the sampling of boxes"
    return bound


def field_names() -> list[str]:
    """Return the dotted names of all fields."""
    return list(_hints())


def _marked(marker: str) -> list[str]:
    return [name for name, hint in _hints().items() if marker in getattr(hint, "__metadata__", ())]


@functools.cache
def _hints() -> dict[str, Any]:
    """Return the types of all fields by their dotted names."""
    groups = typing.get_type_hints(Config)
    return {
        f"{group}.{field.name}": typing.get_type_hints(groups[group], include_extras=True)[field.name]
        for group in groups
        for field in dataclasses.fields(groups[group])
    }
