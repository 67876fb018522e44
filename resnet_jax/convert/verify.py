"""Networks as functions of plain pixels, for other programs: written to a file, reloaded and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.augment import normalize
from resnet_jax.data.types import Preprocessing
from resnet_jax.errors import CommandError, UserError, reason
from resnet_jax.files import atomic_write
from resnet_jax.models import Model

TOLERANCE = 1e-4  # of the largest logit: room for float32 sums in another order, and for nothing else
_BATCH_SIZES = (1, 7)

Classify = Callable[[Any], Any]  # RGB uint8 [N, H, W, 3] -> logits float32 [N, K]


def make_classify(model: Model, variables: dict[str, Any], preprocessing: Preprocessing) -> Classify:
    """Return classify(images): normalization and network, the weights as constants, all in float32."""
    model = model.clone(dtype=jnp.float32)
    variables, (mean, std) = jax.device_get((variables, tuple(preprocessing)))

    def classify(images: jax.Array) -> Any:
        return model.apply(variables, normalize(images, mean, std), train=False)

    return classify


def write_verified(
    content: bytes, path: Path, load: Callable[[Path], Classify], classify: Classify, image_shape: tuple[int, int, int]
) -> float:
    """Write a file under another name, reload it, compare it with the network, and give it its name.

    Args:
      content: of the file.
      path: of the file; what is there stays if the comparison fails.
      load: load(path) returns the function that a file holds.
      classify: the network.
      image_shape: (H, W, 3).

    Returns:
      The largest difference of logits of random images, in batches of 1 and 7, relative to the largest logit.

    Raises:
      CommandError: the file cannot be loaded or gives other logits.
      UserError: it cannot be written.
    """
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (size, *image_shape), np.uint8) for size in _BATCH_SIZES]
    expected = [np.asarray(classify(images)) for images in batches]
    with atomic_write(path) as partial:
        partial.write_bytes(content)
        try:
            reloaded = load(partial)
            found = [np.asarray(reloaded(images)) for images in batches]
        except Exception as error:  # a damaged file makes the libraries raise anything
            raise CommandError(f"{path} was not written: it does not read back: {reason(error)}") from error
        difference = max(map(_difference, found, expected))
        if difference > TOLERANCE:
            raise CommandError(f"{path} was not written: its logits differ by {difference:.3g} of the largest")
    return difference


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of logits, relative to the largest; infinite if it is not a number."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    scale = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
    difference = float(np.abs(found - expected).max() / scale)
    return float("inf") if np.isnan(difference) else difference


def on_cpu() -> Any:
    """Return a context that computes on the CPU: accelerators round float32 products, each in its own way.

    Raises:
      UserError: JAX was told to leave out the CPU.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise UserError("exporting computes on the CPU: add it to JAX_PLATFORMS, as in cuda,cpu") from error
