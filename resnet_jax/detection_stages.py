"""What is trained when: all at once, or in the four stages of the paper (Ren et al. 2015, Sec. 3.2)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from resnet_jax.config import Config
from resnet_jax.models.detector import Detector


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps in which the same layers are trained.

    Attributes:
      begin: the step before the first one.
      end: the last one.
      drops: steps, counted from `begin`, at which the rate is divided by 10.
      losses: which are minimized.
      trains: parts of Detector's variables; None for all.
      separate: whether the RPN still has a trunk of its own.
      renews: parts that begin anew.
    """

    begin: int
    end: int
    drops: tuple[int, ...]
    losses: Literal["both", "rpn", "regions"] = "both"
    trains: tuple[str, ...] | None = None
    separate: bool = False
    renews: tuple[str, ...] = ()

    def trainable(self, model: Detector, params: Any) -> Any:
        """Return a tree like `params` of bools: what is trained in this stage."""
        mask = model.trainable(params)
        if self.trains is None:
            return mask
        return {
            name: tree if name in self.trains else jax.tree.map(lambda _: False, tree) for name, tree in mask.items()
        }


def stages(config: Config) -> tuple[Stage, ...]:
    """Return the stages of a run, in order.

    Of the paper's four the first trains an RPN, the second a detector on its proposals, each from the weights that the
    run begins with; the third a new RPN on the detector's trunk, and the fourth the detector's other layers on the
    proposals of that. Proposals of an RPN that is fixed are computed when they are needed, and are the same every time.
    """
    detection = config.detection
    if detection.schedule == "joint":
        return (Stage(0, config.run.steps, config.optim.boundaries),)
    regions = ("tail", "scores", "deltas")
    kinds: list[tuple[tuple[int, int], dict[str, Any]]] = [
        (detection.rpn_steps, {"losses": "rpn", "trains": ("rpn_trunk", "rpn"), "separate": True}),
        (detection.region_steps, {"losses": "regions", "trains": ("trunk", *regions), "separate": True}),
        (detection.rpn_steps, {"losses": "rpn", "trains": ("rpn",), "renews": ("rpn",)}),
        (detection.region_steps, {"losses": "regions", "trains": regions}),
    ]
    found, begin = [], 0
    for (high, low), kind in kinds:
        found.append(Stage(begin, begin + high + low, (high,) if low else (), **kind))
        begin += high + low
    return tuple(found)


def stage_of(config: Config, step: int) -> Stage:
    """Return the stage that makes a step, counted from 1; of step 0 the first."""
    of_config = stages(config)
    return next((stage for stage in of_config if step <= stage.end), of_config[-1])
