"""Loss and errors as sums and counts; they become means only when they are printed.

A further error rate is one entry of ERRORS: training, evaluation, logs and reports take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

AnyArray = jax.Array | np.ndarray


class ErrorRate(NamedTuple):
    """Which images count as wrongly classified.

    Attributes:
      label: what logs and reports call it.
      is_wrong: is_wrong(scores [N, K], labels [N], numpy or jax.numpy) -> [N] bool.
      least_classes: with fewer it says little and is not shown.
    """

    label: str
    is_wrong: Callable[[Any, Any, ModuleType], Any]
    least_classes: int = 0


def _classes_before(scores: Any, labels: Any, xp: ModuleType) -> Any:
    """Count the classes before the right one: of equal scores the first counts as the larger one, as in argmax."""
    of_class = xp.take_along_axis(scores, labels[:, None], axis=-1)
    before = (scores > of_class) | ((scores == of_class) & (xp.arange(scores.shape[-1]) < labels[:, None]))
    return before.sum(-1)


ERRORS = {
    "error": ErrorRate("error", lambda scores, labels, xp: scores.argmax(-1) != labels),
    "top5_error": ErrorRate("top-5", lambda scores, labels, xp: _classes_before(scores, labels, xp) >= 5, 11),
}


def shown_errors(num_classes: int) -> dict[str, ErrorRate]:
    """Return those of ERRORS that say something about so many classes."""
    return {name: error for name, error in ERRORS.items() if num_classes >= error.least_classes}


def wrong_images(scores: Any, labels: Any, xp: ModuleType = jnp) -> dict[str, Any]:
    """Tell by each of ERRORS which images are wrong: [N] bool.

    Args:
      scores: [N, num_classes], logits or probabilities.
      labels: [N] whole numbers.
      xp: jax.numpy or numpy.
    """
    return {name: error.is_wrong(scores, labels, xp) for name, error in ERRORS.items()}


@flax.struct.dataclass
class Metrics:
    """Sums by true class, each [num_classes]; in float32 they are exact for up to 2^24 images a class.

    Attributes:
      loss: summed cross-entropy, in nats.
      wrong: wrongly classified images by each of ERRORS: "error", "top5_error".
      count: images.
    """

    loss: AnyArray
    wrong: dict[str, AnyArray]
    count: AnyArray

    @staticmethod
    def zeros(num_classes: int) -> Metrics:
        """Return sums of nothing."""
        zero = np.zeros(num_classes, np.float32)
        return Metrics(zero, dict.fromkeys(ERRORS, zero), zero)

    def __add__(self, other: Metrics) -> Metrics:
        return jax.tree.map(lambda a, b: a + b, self, other)

    @property
    def images(self) -> int:
        return int(_total(self.count))

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return _total(self.loss) / self.images

    @property
    def errors(self) -> dict[str, float]:
        """Wrongly classified images by each of ERRORS, in %."""
        return {name: 100 * _total(wrong) / self.images for name, wrong in self.wrong.items()}

    @property
    def top1_error(self) -> float:
        """Images whose class has not the largest logit, in %."""
        return self.errors["error"]

    @property
    def top5_error(self) -> float:
        """Images whose class is not among the five with the largest logits, in %."""
        return self.errors["top5_error"]

    @property
    def error(self) -> float:
        """What a checkpoint is judged by: top1_error."""
        return self.top1_error

    @property
    def batch_error(self) -> Any:
        """Error in % of sums over all classes, also inside a jitted function."""
        return 100 * self.wrong["error"] / self.count

    @property
    def finite(self) -> bool:
        """Whether the mean loss is."""
        return bool(np.isfinite(self.mean_loss))

    def values(self, num_classes: int) -> dict[str, Any]:
        """Return what a record holds: the errors that say something about so many classes."""
        shown = {name: error for name, error in self.errors.items() if name in shown_errors(num_classes)}
        return {"loss": self.mean_loss, **shown, "images": self.images}

    def words(self, num_classes: int) -> str:
        """Return what a line of the log says of training steps."""
        return f"loss {self.mean_loss:.4f}  {self._words_of_errors(num_classes)}"

    def result(self, num_classes: int) -> str:
        """Return what a line of the log says of an evaluation."""
        return f"{self._words_of_errors(num_classes)}  loss {self.mean_loss:.4f}"

    def _words_of_errors(self, num_classes: int) -> str:
        shown = shown_errors(num_classes)
        return "  ".join(f"{error.label} {self.errors[name]:.2f} %" for name, error in shown.items())

    @property
    def class_errors(self) -> np.ndarray:
        """Wrongly classified images of each class in % [num_classes]; NaN for a class without images."""
        with np.errstate(invalid="ignore"):
            return 100 * np.asarray(self.wrong["error"], np.float64) / np.asarray(self.count, np.float64)


class Score(Protocol):
    """What an evaluation says: Metrics, or another's."""

    @property
    def images(self) -> int: ...

    @property
    def error(self) -> float:
        """In %; the checkpoint with the least is the best."""
        ...

    @property
    def finite(self) -> bool: ...

    def values(self, num_classes: int) -> dict[str, Any]:
        """Return what a record of it holds."""
        ...

    def result(self, num_classes: int) -> str:
        """Return what a line of the log says of it."""
        ...


def _total(sums: AnyArray) -> float:
    return float(np.sum(np.asarray(sums, np.float64)))


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
    # Sums, not matrix products: TPUs and GPUs would round the losses to bfloat16 or TF32.
    wrong = {
        name: (member * of_image.astype(jnp.float32)[:, None]).sum(0)
        for name, of_image in wrong_images(logits, labels).items()
    }
    return Metrics(loss=jnp.where(member > 0, losses[:, None], 0.0).sum(0), wrong=wrong, count=member.sum(0))


@flax.struct.dataclass
class StepMetrics:
    """What one training step reports; float32 scalars, or [steps] for several.

    Attributes:
      metrics: sums over the batch and all classes, in training mode, before the update.
      learning_rate: of the update.
      gradient_norm: L2 norm of the gradient of the loss, without weight decay.
      skipped: images that could not be read and were replaced by others.
    """

    metrics: Metrics
    learning_rate: AnyArray
    gradient_norm: AnyArray
    skipped: AnyArray

    @property
    def finite(self) -> jax.Array:
        """Whether loss and gradient are finite."""
        return jnp.isfinite(self.metrics.loss) & jnp.isfinite(self.gradient_norm)


@flax.struct.dataclass
class StepsReport:
    """What a dispatch of training steps reports.

    Attributes:
      steps: how many were made: fewer than asked for if the last of them was not finite. int32 scalar.
      history: one entry a step, [most_steps]; those beyond `steps` are zero.
    """

    steps: AnyArray
    history: StepMetrics
