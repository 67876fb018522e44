"""Write the weights of a network for other programs, and compare what those programs make of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from resnet_jax.convert.differences import differences, explain
from resnet_jax.convert.names import layout_of, tensors_from_variables
from resnet_jax.convert.programs import Classify, classifier, export_program, on_cpu, write_verified
from resnet_jax.convert.weights_in import read_exported
from resnet_jax.data.augment import normalize
from resnet_jax.errors import UserError, reason
from resnet_jax.inference.load import Origin, Trained, load
from resnet_jax.models import VGG, build_model, stack_blocks
from resnet_jax.run.network_file import Description, Names, own_names, read_description, to_bytes
from resnet_jax.run.records import read_evaluations, read_records


class Exported(NamedTuple):
    """What export() has written.

    Attributes:
      compared_with: what has read the file and computed logits with it.
      difference: the largest difference of these logits, relative to the largest.
      explanation: in what PyTorch's network of the same names is another one, and how to change it; or nothing.
    """

    compared_with: str
    difference: float
    explanation: str = ""


def export(
    source: str | Path,
    form: Literal["safetensors", "stablehlo", "onnx"],
    out: Path,
    *,
    names: Names = "torch",
    step: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Export a trained network, read the file as its users do, and compare logits.

    Args:
      source, step: see load().
      form: of the file `out`.
      names: of the tensors in safetensors: "torch" (torchvision's; for the CIFAR networks those of the CIFAR
        ResNets for PyTorch) or "resnet_jax" (ours, such as stage2_block1/conv1/kernel).
      metadata: more of it for safetensors.

    Raises:
      UserError: no such network or checkpoint, or a file that cannot be written.
      CommandError: what was written is not what the model is.
    """
    trained = load(source, step=step)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {reason(error)}") from error
    if form != "safetensors":
        library = {"stablehlo": "jax", "onnx": "ONNX Runtime"}[form]
        return Exported(library, export_program(trained, form, out))
    more = {**trained.origin.metadata, **_recorded(Path(source), trained.origin.step), **(metadata or {})}
    return _export_safetensors(trained, out, names, more)


def _export_safetensors(trained: Trained, out: Path, names: Names, more: dict[str, Any]) -> Exported:
    model, variables, origin = trained
    readers, compared_with, explanation = [_as_we_read_it], "import", ""
    if names == "resnet_jax":
        tensors = own_names(variables)
    else:
        tensors, explanation = tensors_from_variables(variables, model, layout_of(model)), explain(model)
        if importlib.util.find_spec("torch"):
            readers, compared_with = [*readers, _as_pytorch_reads_it], "import and PyTorch"
    more |= {"pytorch": explanation} if explanation else {}
    description = Description(names, origin.config, origin.step, origin.inputs, more)
    content = to_bytes(tensors, description)
    with on_cpu():
        classify, shape = _classifier(trained), origin.inputs.image_shape
        difference = write_verified(content, out, readers, classify, shape, batch_sizes=[2])
    return Exported(compared_with, difference, explanation)


def _recorded(workdir: Path, step: int) -> dict[str, Any]:
    """Return what is on record of a checkpoint: errors in % on all test images, and what it was trained on."""
    if not workdir.is_dir():
        return {}
    names = ("protocol", "data", "count", "top1_error", "top5_error", "platform", "device")
    results = [
        {name: record[name] for name in names}
        for record in read_evaluations(workdir)
        if [member["step"] for member in record["members"]] == [step]
    ]
    records = read_records(workdir)
    results += [
        {"protocol": "single", "count": record["images"], "top1_error": record["error"], "when": "after training"}
        for record in records
        if record["kind"] == "test" and record["step"] == step
    ][-1:]
    starts = [record for record in records if record["kind"] == "start"]
    of_this_process = ("kind", "step", "time", "compile_seconds", "compilation_cache")
    trained = {name: value for start in starts[-1:] for name, value in start.items() if name not in of_this_process}
    unique = [result for i, result in enumerate(results) if result not in results[:i]]
    return {name: value for name, value in (("results", unique), ("trained", trained)) if value}


def _classifier(trained: Trained) -> Classify:
    """Return the function of a network; equal blocks are stacked, so that it compiles fast."""
    if not isinstance(trained.model, VGG):
        model, variables = trained.model.clone(scan_blocks=True), stack_blocks(trained.variables)
        trained = Trained(model, variables, trained.origin)
    classify, weights = classifier(trained)
    return partial(jax.jit(classify), weights)


def _as_we_read_it(path: Path) -> Classify:
    """Return the function of an exported file as import makes it."""
    description = _description(path)
    config, variables, inputs = read_exported(path, description)
    model = build_model(config.model, len(inputs.class_names))
    return _classifier(Trained(model, variables, Origin(config, 0, inputs)))


def _as_pytorch_reads_it(path: Path) -> Classify:
    """Return the function of PyTorch's network, changed as explain() says, with the tensors of an exported file."""
    import safetensors.torch
    import torch

    from resnet_jax.convert.pytorch import build

    config, inputs = (description := _description(path)).config, description.inputs
    model = build_model(config.model, len(inputs.class_names))
    network = build(model)
    for difference in differences(model):
        difference.change(network)
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)
    network.eval()

    def classify(images: Any) -> Any:
        x = np.ascontiguousarray(np.moveaxis(np.asarray(normalize(images, *inputs.preprocessing)), -1, 1))
        with torch.inference_mode():
            return network(torch.from_numpy(x)).numpy()

    return classify


def _description(path: Path) -> Description:
    description = read_description(path)
    if description is None:
        raise ValueError("its metadata are not in it")
    return description
