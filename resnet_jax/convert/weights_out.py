"""Write the weights of a network for other programs, and compare what those programs make of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from resnet_jax.convert.differences import differences, explain
from resnet_jax.convert.fold import fold_bn
from resnet_jax.convert.foreign_names import to_hugging_face
from resnet_jax.convert.hub import describe_for_transformers
from resnet_jax.convert.names import COUNTER, layout_of, tensors_from_variables
from resnet_jax.convert.programs import (
    USUAL,
    Function,
    Options,
    export_program,
    function_of,
    on_cpu,
    usual_what,
    write_verified,
)
from resnet_jax.convert.weights_in import read_exported
from resnet_jax.data.augment import normalize
from resnet_jax.errors import UserError, reason
from resnet_jax.files import atomic_write
from resnet_jax.inference.load import Origin, Trained, check_classifies, load
from resnet_jax.models import VGG, abstract_variables, build_model, stack_blocks
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
    options: Options = USUAL,
) -> Exported:
    """Export a trained network, read the file as its users do, and compare logits.

    Args:
      source, step: see load().
      form: of the file `out`.
      names: of the tensors in safetensors: "torch" (torchvision's; for the CIFAR networks those of the CIFAR
        ResNets for PyTorch), "hf" (those of transformers: `out` is a folder for from_pretrained()) or "resnet_jax"
        (ours, such as stage2_block1/conv1/kernel).
      metadata: more of it for safetensors.
      options: see programs.Options; of these safetensors take fold_bn, and are without the last layer for `what`
        other than logits.

    Raises:
      UserError: no such network or checkpoint, or a file that cannot be written.
      CommandError: what was written is not what the model is.
    """
    trained = load(source, step=step)
    check_classifies(trained)
    try:
        (out if names == "hf" else out.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {reason(error)}") from error
    if form != "safetensors":
        library = {"stablehlo": "jax", "onnx": "ONNX Runtime"}[form]
        return Exported(library, export_program(trained, form, out, options))
    more = {**trained.origin.metadata, **_recorded(Path(source), trained.origin.step), **(metadata or {})}
    if (options.what or usual_what(trained)) != "logits":
        trained = _without_head(trained)
    if names != "hf":
        return _export_safetensors(trained, out, names, more, folded=options.fold_bn)
    beside = describe_for_transformers(trained)
    exported = _export_safetensors(trained, out / "model.safetensors", names, more, folded=options.fold_bn)
    for name, content in beside.items():
        with atomic_write(out / name) as file:
            file.write_text(content)
    return exported


def _without_head(trained: Trained) -> Trained:
    """Return the backbone of a network."""
    model, inputs = trained.model.clone(backbone_only=True), trained.origin.inputs._replace(class_names=())
    params = abstract_variables(model, inputs.image_shape)["params"]
    variables = {**trained.variables, "params": {name: trained.variables["params"][name] for name in params}}
    return Trained(model, variables, dataclasses.replace(trained.origin, inputs=inputs))


def _export_safetensors(trained: Trained, out: Path, names: Names, more: dict[str, Any], *, folded: bool) -> Exported:
    model, variables, origin = trained
    if folded and (names != "torch" or isinstance(model, VGG)):
        raise UserError("--fold-bn goes with a network that has BN, and in safetensors with --names torch")
    readers, compared_with, explanation = [_as_we_read_it], "import", explain(model, names, folded=folded)
    tensors = own_names(variables) if names == "resnet_jax" else _tensors_for_pytorch(trained, names, folded)
    if names == "torch" and importlib.util.find_spec("torch"):
        readers, compared_with = [*readers, partial(_as_pytorch_reads_it, folded=folded)], "import and PyTorch"
    more |= {"pytorch": explanation} if explanation else {}
    description = Description(names, origin.config, origin.step, origin.inputs, more)
    content = to_bytes(tensors, description)
    with on_cpu():
        function, shape = _function(trained), origin.inputs.image_shape
        difference = write_verified(content, out, readers, function, [shape], batch_sizes=(2,))
    return Exported(compared_with, difference, explanation)


def _tensors_for_pytorch(trained: Trained, names: Names, folded: bool) -> dict[str, np.ndarray]:
    """Return all tensors that load_state_dict() of PyTorch's network wants, under its names."""
    model, variables, origin = trained
    layout = layout_of(model)
    if folded:
        params = fold_bn(jax.device_get(variables))
        biases = {"bn": "conv", "downsample.1": "downsample.0", "shortcut.1": "shortcut.0"}
        tensors = tensors_from_variables({**params, "batch_stats": {}}, model, layout)
        return {
            re.sub(r"bn(?=\d\.bias$)|(downsample|shortcut)\.1(?=\.bias$)", lambda m: biases[m[0]], name): array
            for name, array in tensors.items()
        }
    tensors = tensors_from_variables(variables, model, layout)
    norms = [name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")]
    tensors |= {norm + COUNTER: np.asarray(origin.step, np.int64) for norm in norms}
    if names == "hf":
        tensors = {to_hugging_face(name): array for name, array in tensors.items()}
        if not origin.inputs.class_names:  # of ResNetModel
            tensors = {name.removeprefix("resnet."): array for name, array in tensors.items()}
    return tensors


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


def _function(trained: Trained) -> Function:
    """Return the function of a network, of a backbone its pooled features; equal blocks are stacked to compile fast."""
    if not isinstance(trained.model, VGG):
        model, variables = trained.model.clone(scan_blocks=True), stack_blocks(trained.variables)
        trained = Trained(model, variables, trained.origin)
    function, weights = function_of(trained, "logits" if trained.origin.inputs.class_names else "pooled")
    return partial(jax.jit(function), weights)


def _as_we_read_it(path: Path) -> Function:
    """Return the function of an exported file as import makes it."""
    description = _description(path)
    config, variables, inputs = read_exported(path, description)
    model = build_model(config.model, len(inputs.class_names))
    return _function(Trained(model, variables, Origin(config, 0, inputs)))


def _as_pytorch_reads_it(path: Path, *, folded: bool) -> Function:
    """Return the function of PyTorch's network, changed as explain() says, with the tensors of an exported file."""
    import safetensors.torch
    import torch

    from resnet_jax.convert.pytorch import build

    config, inputs = (description := _description(path)).config, description.inputs
    model = build_model(config.model, len(inputs.class_names))
    network = build(model, inputs.image_shape[2])
    for difference in differences(model, folded=folded):
        difference.change(network)
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)
    network.eval()

    def function(images: Any) -> Any:
        x = np.ascontiguousarray(np.moveaxis(np.asarray(normalize(images, *inputs.preprocessing)), -1, 1))
        with torch.inference_mode():
            return network(torch.from_numpy(x)).numpy()

    return function


def _description(path: Path) -> Description:
    description = read_description(path)
    if description is None:
        raise ValueError("its metadata are not in it")
    return description
