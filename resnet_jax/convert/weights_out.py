"""Write the weights of a work directory for other programs, and check what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from flax.traverse_util import flatten_dict

from resnet_jax.convert.files import read_safetensors, write_safetensors
from resnet_jax.convert.names import Layout, tensors_from_variables
from resnet_jax.convert.onnx import export_onnx
from resnet_jax.convert.stablehlo import export_stablehlo
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
      workdir: of a run or an import.
      form: "safetensors", "stablehlo" or "onnx".
      out: the file to write.
      names: of the tensors in safetensors: "torch" (torchvision's; for the CIFAR networks those of the CIFAR
        ResNets for PyTorch) or "resnet_jax" (ours, such as stage2_block1/conv1/kernel).
      step: of the checkpoint; None for the last.

    Returns:
      The largest difference found on reloading: of tensors (safetensors) or of logits relative to their scale.

    Raises:
      UserError: no such work directory or checkpoint, or a file that cannot be written.
      CommandError: what was written is not what the model is.
    """
    trained = load(workdir, step=step)
    inputs = trained.origin.inputs
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {reason(error)}") from error
    if form == "safetensors":
        return _export_safetensors(trained, out, names)
    write = export_stablehlo if form == "stablehlo" else export_onnx
    return write(trained.model, trained.variables, inputs.preprocessing, inputs.image_shape, out)


def _export_safetensors(trained: Trained, out: Path, names: str) -> float:
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
        if reloaded.keys() != tensors.keys():
            raise CommandError(f"{out} did not read back: other names")
        difference = max(float(np.abs(reloaded[name] - tensors[name]).max()) for name in tensors)
        if difference:
            raise CommandError(f"{out} did not read back: tensors differ by up to {difference}")
    return difference
