"""Loss and error as sums and counts; they become means only when they are printed."""

from __future__ import annotations

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Metrics:
    """Sums by true class, each [num_classes] float32: exact for up to 2^24 images a class.

    Attributes:
      loss: summed cross-entropy, in nats.
      errors: wrongly classified images.
      top5_errors: images whose class is not among the five with the largest logits.
      count: images.
    """

    loss: Any
    errors: Any
    top5_errors: Any
    count: Any

    def __add__(self, other: Metrics) -> Metrics:
        return jax.tree.map(lambda a, b: a + b, self, other)

    @property
    def images(self) -> int:
        return int(np.sum(self.count))

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(np.sum(np.asarray(self.loss, np.float64)) / self.images)

    @property
    def top1_error(self) -> float:
        """Wrongly classified images in %."""
        return float(100 * np.sum(np.asarray(self.errors, np.float64)) / self.images)

    @property
    def top5_error(self) -> float:
        """Images whose class is not among the five with the largest logits, in %."""
        return float(100 * np.sum(np.asarray(self.top5_errors, np.float64)) / self.images)

    @property
    def class_errors(self) -> np.ndarray:
        """Wrongly classified images of each class in % [num_classes]; NaN for a class without images."""
        with np.errstate(invalid="ignore"):
            return 100 * np.asarray(self.errors, np.float64) / np.asarray(self.count, np.float64)


def compute_metrics(logits: jax.Array, losses: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
    """Sum up one batch.

    Args:
      logits: [N, num_classes].
      losses: [N] cross-entropy of each image.
      labels: [N] int32.
      mask: [N] bool, False where an image does not count.
    """
    chex.assert_equal_shape([losses, labels, mask])  # [N] each; [N, 1] would broadcast silently
    chex.assert_shape(logits, (len(labels), None))
    member = jax.nn.one_hot(labels, logits.shape[-1]) * mask[:, None]  # [N, num_classes]
    wrong = (logits.argmax(-1) != labels).astype(jnp.float32)
    of_class = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # Of equal logits the first counts as the larger one, as in argmax.
    before = (logits > of_class) | ((logits == of_class) & (jnp.arange(logits.shape[-1]) < labels[:, None]))
    wrong5 = (before.sum(-1) >= 5).astype(jnp.float32)
    # A sum, not a matrix product: TPUs and GPUs would round the losses to bfloat16 or TF32.
    return Metrics(
        loss=jnp.where(member > 0, losses[:, None], 0.0).sum(0),
        errors=(member * wrong[:, None]).sum(0),
        top5_errors=(member * wrong5[:, None]).sum(0),
        count=member.sum(0),
    )
