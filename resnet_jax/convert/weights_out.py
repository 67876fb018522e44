"""Write the weights of a work directory for other programs, and check what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from flax.traverse_util import flatten_dict

from resnet_jax.convert.files import read_safetensors, write_safetensors
from resnet_jax.convert.names import Layout, tensors_from_variables
from resnet_jax.convert.programs import export_program
from resnet_jax.errors import CommandError, UserError, reason
from resnet_jax.files import atomic_write
from resnet_jax.inference.load import Trained, load


def export(
    workdir: Path,
    form: Literal["safetensors", "stablehlo", "onnx"],
    out: Path,
    *,
    names: Literal["torch", "resnet_jax"] = "torch",
    step: int | None = None,
) -> float:
    """Export a trained network, reload the file and compare.

    Args:
      workdir, step: see load().
      form: of the file `out`.
      names: of the tensors in safetensors: "torch" (torchvision's; for the CIFAR networks those of the CIFAR
        ResNets for PyTorch) or "resnet_jax" (ours, such as stage2_block1/conv1/kernel).

    Returns:
      The largest difference of logits on reloading, relative to the largest; the tensors in safetensors are the same.

    Raises:
      UserError: no such work directory or checkpoint, or a file that cannot be written.
      CommandError: what was written is not what the model is.
    """
    trained = load(workdir, step=step)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {reason(error)}") from error
    if form != "safetensors":
        return export_program(trained, form, out)
    _export_safetensors(trained, out, names)
    return 0.0


def _export_safetensors(trained: Trained, out: Path, names: str) -> None:
    model, variables, origin = trained
    if names == "torch":
        layout: Layout = "cifar" if origin.config.model.family == "cifar" else "torchvision"
        tensors = tensors_from_variables(variables, model, layout)
    else:
        flat = flatten_dict(variables["params"], sep="/") | flatten_dict(variables["batch_stats"], sep="/")
        tensors = {name: np.asarray(value) for name, value in flat.items()}
    with atomic_write(out) as partial:
        write_safetensors(tensors, partial)
        reloaded = read_safetensors(partial)
        if reloaded.keys() != tensors.keys() or not all(
            np.array_equal(reloaded[name], tensors[name]) for name in tensors
        ):
            raise CommandError(f"{out} was not written: its tensors do not read back as they are")
