"""Write the weights of a work directory for other programs, and check what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from resnet_jax.convert.files import read_tensors, write_safetensors
from resnet_jax.convert.names import Layout, tensors_from_variables
from resnet_jax.errors import CommandError, UserError
from resnet_jax.trained import Trained, load


def export(workdir: Path, form: str, out: Path, *, names: str = "torch", step: int | None = None) -> float:
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
    writers: dict[str, Callable[[], float]] = {
        "safetensors": lambda: _export_safetensors(trained, out, names),
        "stablehlo": lambda: _export_stablehlo(trained, out),
        "onnx": lambda: _export_onnx(trained, out),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return writers[form]()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def _export_safetensors(trained: Trained, out: Path, names: str) -> float:
    model, variables, config = trained
    if names == "torch":
        layout: Layout = "cifar" if config.run.model.family == "cifar" else "torchvision"
        tensors = tensors_from_variables(variables, model, layout)
    else:
        flat = flatten_dict(variables["params"], sep="/") | flatten_dict(variables["batch_stats"], sep="/")
        tensors = {name: np.asarray(value) for name, value in flat.items()}
    partial = out.with_name(out.name + ".new.safetensors")
    try:
        write_safetensors(tensors, partial)
        reloaded = read_tensors(partial)
        if reloaded.keys() != tensors.keys():
            raise CommandError(f"{out} did not read back: other names")
        difference = max(float(np.abs(reloaded[name] - tensors[name]).max()) for name in tensors)
        if difference:
            raise CommandError(f"{out} did not read back: tensors differ by up to {difference}")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _export_stablehlo(trained: Trained, out: Path) -> float:
    from resnet_jax.convert.stablehlo import export_stablehlo

    inputs = trained.config.inputs
    return export_stablehlo(trained.model, trained.variables, inputs.preprocessing, inputs.image_shape, out)


def _export_onnx(trained: Trained, out: Path) -> float:
    from resnet_jax.convert.onnx import export_onnx

    inputs = trained.config.inputs
    return export_onnx(trained.model, trained.variables, inputs.preprocessing, inputs.image_shape, out)
