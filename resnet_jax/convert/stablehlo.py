"""Export a network as StableHLO, for programs that have jax and nothing of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from resnet_jax.convert.verify import Classify, make_classify, on_cpu, write_verified
from resnet_jax.data.types import Preprocessing
from resnet_jax.errors import optional
from resnet_jax.models import Model

_PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(
    model: Model,
    variables: dict[str, Any],
    preprocessing: Preprocessing,
    image_shape: tuple[int, int, int],
    path: Path,
) -> float:
    """Write the network with its weights and normalization, for CPU, NVIDIA GPU and TPU, and compare it.

    The file is used with jax (and flatbuffers, which jax.export needs), and with any batch size:

        logits = jax.export.deserialize(Path(path).read_bytes()).call(images)  # after `import jax.export`

    Args:
      model: whatever its dtype, the file computes in float32.
      variables: params and batch_stats.
      preprocessing: mean and std in [0, 1].
      image_shape: (H, W, 3) of the RGB uint8 images that the file takes.
      path: of the file.

    Returns:
      The largest difference of logits on reloading, relative to the largest logit.

    Raises:
      UserError: flatbuffers is not installed, or the file cannot be written.
      CommandError: the file does not give the logits of the network.
    """
    optional("flatbuffers", extra="convert")  # jax.export imports it, and jax does not declare it
    with on_cpu(), _without_source_locations():
        classify = jax.jit(make_classify(model, variables, preprocessing))
        (batch,) = jax.export.symbolic_shape("b")
        images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
        exported = jax.export.export(classify, platforms=_PLATFORMS)(images)
        return write_verified(bytes(exported.serialize()), path, load_stablehlo, classify, image_shape)


def load_stablehlo(path: Path) -> Classify:
    """Load the function of a file: RGB uint8 [N, H, W, 3] to logits float32 [N, K]."""
    return jax.export.deserialize(bytearray(path.read_bytes())).call


@contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keep the paths of this computer out of the file; JAX records where each operation comes from."""
    option = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, limit)
