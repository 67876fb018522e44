"""Standard deviations of layer responses, the paper's Fig. 7 (Sec. 4.2, "Analysis of Layer Responses")."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from pydantic import Field, TypeAdapter

from resnet_jax.data import load_test_images
from resnet_jax.data.inputs import check_classes
from resnet_jax.data.views import make_protocol
from resnet_jax.errors import UserError, reason
from resnet_jax.files import atomic_write, read_json
from resnet_jax.inference.load import check_classifies, load, preprocess
from resnet_jax.inference.predict import read_views
from resnet_jax.models import BatchNorm, Model, unstack_blocks
from resnet_jax.models.backend import for_this_backend
from resnet_jax.models.precision import full_float32
from resnet_jax.paper.artefact import format_table
from resnet_jax.parallel.devices import make_shardings
from resnet_jax.run.workdir import load_config

_FILE = "responses.json"


class Moments(NamedTuple):
    """Of each channel: how many values (int32 scalar), their mean and summed squared distances from it [C] float32."""

    count: Any
    mean: Any
    m2: Any


@dataclasses.dataclass(frozen=True)
class Responses:
    """Standard deviations of the responses of every 3x3 layer of one checkpoint.

    Attributes:
      step: of the checkpoint.
      images: how many they were measured on.
      layers: names of the convolutions as in checkpoints, in forward order.
      stds: one for each layer, over all images, positions and channels.
    """

    step: int
    images: int
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    stds: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...]

    @property
    def sorted_stds(self) -> tuple[float, ...]:
        """The standard deviations in descending order (Fig. 7, bottom)."""
        return tuple(sorted(self.stds, reverse=True))

    @property
    def mean_std(self) -> float:
        """The mean over layers."""
        return float(np.mean(self.stds))

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.stds):
            raise ValueError(f"{len(self.layers)} layers and {len(self.stds)} standard deviations")


def make_moments(model: Model) -> Callable[[Any, jax.Array, jax.Array], dict[str, Any]]:
    """Return moments(variables, images, mask), to be jitted: those of the responses of every 3x3 layer.

    "The responses are the outputs of each 3x3 layer, after BN and before nonlinearity" (Fig. 7); in VGG, which has
    no BN, the outputs with bias. BN normalizes by the running statistics.

    Returns:
      moments(variables, images [N, H, W, 3] float32 normalized, mask [N] bool) -> a tree of Moments for by_layer().
      Images whose mask is False do not count at all. With scan_blocks it compiles fast however deep the network.
    """

    def moments(variables: Any, images: jax.Array, mask: jax.Array) -> dict[str, Any]:
        chex.assert_shape(mask, images.shape[:1])
        conv: Any = None  # the last 3x3 convolution, until its BN comes, and its output
        convolved: Any = None

        def capture(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            nonlocal conv, convolved
            output, module = call(*args, **kwargs), context.module
            if context.method_name != "__call__":
                return output
            if isinstance(module, nn.Conv) and module.kernel_size == (3, 3):
                conv, convolved = module, output
            is_bn = isinstance(module, BatchNorm) and args[0] is convolved
            if is_bn or (conv is module and conv.use_bias):  # with a bias no BN follows
                # Sown, since values inside a loop over blocks can leave it in no other way; not in a tuple of one.
                conv.sow("responses", "moments", _moments(output, mask), lambda _, new: new, lambda: None)
                conv = convolved = None  # inside a loop over blocks they are not to outlive it
            return output

        with full_float32(), nn.intercept_methods(capture):
            _, updates = model.apply(variables, images, train=False, mutable=["responses"])
        return updates["responses"]

    return moments


def _moments(x: jax.Array, mask: jax.Array) -> Moments:
    """Reduce x [N, H, W, C]; in short sums and around the mean, so that float32 loses no digits."""
    x = x.astype(jnp.float32)
    images = mask.sum(dtype=jnp.int32)

    def mean(values: jax.Array) -> jax.Array:
        by_image = values.mean(2).mean(1)  # [N, C]
        return jnp.where(mask[:, None], by_image, 0).sum(0) / jnp.maximum(images, 1)

    center = mean(x)
    count = images * (x.shape[1] * x.shape[2])
    return Moments(count, center, count * mean(jnp.square(x - center)))


def by_layer(tree: dict[str, Any]) -> dict[str, Moments]:
    """Name the moments by layer, "stem_conv", "stage1_block1/conv1" and so on, in forward order.

    Args:
      tree: of make_moments(), on the host: jit would sort the layers by the alphabet.
    """
    layers = {"/".join(path[:-1]): moments for path, moments in flatten_dict(unstack_blocks(tree)).items()}
    # Forward order is that of the numbers of stage, block and layer; the stem has none and comes first.
    return dict(sorted(layers.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))


def measure(
    model: Model,
    variables: Any,
    preprocess: Callable[[jax.Array], jax.Array],
    images: Iterable[np.ndarray],
    *,
    batch_size: int = 128,
    step: int = 0,
) -> Responses:
    """Measure the responses to images, in batches over all devices; activations are not kept.

    Args:
      model, variables: any network.
      preprocess: maps uint8 to normalized float32 images [N, H, W, 3]; it is jitted.
      images: uint8 [H, W, 3] each, of one size.
      batch_size: images at a time, rounded up to a multiple of the devices. It does not change the result.
      step: of the checkpoint that the variables come from.

    Raises:
      ValueError: no images.
    """
    batch_size += -batch_size % jax.device_count()
    replicated, by_image = make_shardings()
    moments = make_moments(for_this_backend(model))

    of_batch = jax.jit(
        lambda variables, images, mask: moments(variables, preprocess(images), mask), out_shardings=replicated
    )
    variables = jax.device_put(variables, replicated)
    parts, count, stream = [], 0, iter(images)
    while batch := list(islice(stream, batch_size)):
        mask = np.arange(batch_size) < len(batch)
        batch += batch[-1:] * (batch_size - len(batch))
        parts.append(jax.device_get(of_batch(variables, *jax.device_put((np.stack(batch), mask), by_image))))
        count += int(mask.sum())
    if not parts:
        raise ValueError("no images to measure the responses to")
    layers = by_layer(jax.tree.map(lambda *leaves: np.stack(leaves, -1), *parts))  # means [C, batches]
    return Responses(step, count, tuple(layers), tuple(map(_std, layers.values())))


def _std(groups: Moments) -> float:
    """Combine the moments of many groups of values in float64 (Chan, Golub & LeVeque 1983)."""
    count, mean, m2 = np.broadcast_arrays(*(np.asarray(values, np.float64) for values in groups))
    center = np.average(mean, weights=count)
    return float(np.sqrt((m2 + count * np.square(mean - center)).sum() / count.sum()))


def measure_workdir(workdir: Path, *, data_dir: str | None = None, step: int | None = None) -> Responses:
    """Measure the responses of a checkpoint to the single view of every test image; write WORKDIR/responses.json.

    Raises:
      UserError: no work directory, no such checkpoint, no data, or the file cannot be written.
    """
    config = load_config(workdir)
    test = load_test_images(config.data.name, data_dir or config.data.dir, upright=config.data.upright)
    trained = load(workdir, step=step, scan_blocks=config.model.scan_blocks)
    check_classifies(trained)
    model, variables, origin = trained
    check_classes(origin.inputs, test)
    height, width, _ = origin.inputs.image_shape
    responses = measure(
        model,
        variables,
        lambda images: preprocess(images, origin),
        (view for views in read_views(test.images, make_protocol("single", (height, width)), {}) for view in views),
        batch_size=config.data.eval_batch_size,
        step=origin.step,
    )
    with atomic_write(workdir / _FILE) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(responses), indent=2) + "\n")
    return responses


def read_responses(workdir: Path) -> Responses | None:
    """Read what measure_workdir() wrote, or return None if it has not.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / _FILE
    try:
        return TypeAdapter(Responses).validate_python(read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; delete it and measure the responses again") from error


def to_table(responses: Responses) -> str:
    """Return the responses as text, a line a layer; beside them the same in descending order."""
    by_size = zip(responses.layers, responses.stds, responses.sorted_stds, strict=True)
    rows = [
        (str(index), name, f"{std:.4f}", f"{other:.4f}") for index, (name, std, other) in enumerate(by_size, start=1)
    ]
    table = format_table([("", "layer", "std", "sorted"), *rows], right=(0, 2, 3))
    count, images = len(responses.layers), responses.images
    return "\n".join([*table, "", f"mean over {count} layers: {responses.mean_std:.4f} ({images:,} images)"])
