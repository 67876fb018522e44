"""python -m resnet_jax summary|import|export ..."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from resnet_jax.command_line import ArgumentParser, run_command
from resnet_jax.errors import UserError


def main(args: Sequence[str]) -> int:
    """Parse the sub-command and run it; each imports what it needs, so that --help answers at once."""
    parser = ArgumentParser(prog="python -m resnet_jax", description="Look at networks; take weights in and out.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("summary", help="a network layer by layer, with parameters and multiply-adds")
    command.add_argument("model", metavar="MODEL", help="such as resnet20, plain34, resnet50, vgg16")
    command.add_argument("--image-size", type=int, metavar="N", help="height and width in pixels; default 32 or 224")
    command.add_argument("--shortcut", choices=("A", "B", "C"), help="default: A for CIFAR networks, else B")
    command.add_argument("--stride-on", choices=("1x1", "3x3"), help="which convolution of a bottleneck subsamples")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_summary)

    command = commands.add_parser("import", help="make a work directory from weights that others trained")
    command.add_argument("file", type=Path, metavar="FILE", help=".pth, .th, .pt, .safetensors or .caffemodel")
    command.add_argument("--model", required=True, metavar="NAME", help="such as resnet20, resnet50, vgg16")
    command.add_argument("--out", type=Path, required=True, metavar="WORKDIR", help="folder to make")
    command.add_argument(
        "--preprocessing",
        choices=("torchvision", "caffe", "none"),
        help="what the weights were trained with: torchvision's mean and std, Caffe's mean of pixels in 0..255, or"
        " pixels in [0, 1] as they are; default: as usual for the file",
    )
    command.add_argument("--mean-file", type=Path, metavar="FILE", help="Caffe's mean image (.binaryproto)")
    command.add_argument(
        "--stride-on",
        choices=("1x1", "3x3"),
        help="which convolution of a bottleneck subsamples; default: 1x1 for Caffe, 3x3 for PyTorch",
    )
    command.set_defaults(run=_import)

    command = commands.add_parser("export", help="write the weights of a work directory for other programs")
    command.add_argument("workdir", type=Path, metavar="WORKDIR", help="of train.py or of an import")
    command.add_argument("--format", required=True, choices=("safetensors", "stablehlo", "onnx"))
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint to export; default: the last")
    command.add_argument(
        "--names",
        choices=("torch", "resnet_jax"),
        default="torch",
        help="names and layouts of the tensors in safetensors: PyTorch's (default) or ours",
    )
    command.set_defaults(run=_export)

    options = parser.parse_args(args)
    return options.run(options)


def _summary(options: argparse.Namespace) -> int:
    from resnet_jax.analysis.summary import summarize, to_table
    from resnet_jax.models import create_model, parse_name

    chosen = {"shortcut": options.shortcut, "stride_on": options.stride_on}
    try:
        model = create_model(options.model, **{name: value for name, value in chosen.items() if value})
        size = options.image_size or (32 if parse_name(options.model).family == "cifar" else 224)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if size < 32:
        raise UserError(f"--image-size must be at least 32; got {size}")
    summary = summarize(options.model, model, size)
    print(json.dumps(summary.to_dict()) if options.json else to_table(summary))
    return 0


def _import(options: argparse.Namespace) -> int:
    from resnet_jax.convert.weights_in import import_weights

    config = import_weights(
        options.file,
        options.model,
        options.out,
        preprocessing=options.preprocessing,
        mean_file=options.mean_file,
        stride_on=options.stride_on,
    )
    model = config.model
    stride = f", stride on the {model.stride_on}" if model.family == "imagenet" and model.depth >= 50 else ""
    print(f"imported {options.file} into {options.out}: {options.model}, shortcut {model.shortcut}{stride}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from resnet_jax.convert.weights_out import export

    difference = export(options.workdir, options.format, options.out, names=options.names, step=options.step)
    print(f"exported {options.workdir} to {options.out}; reloaded and compared: largest difference {difference:.3g}")
    return 0


if __name__ == "__main__":
    run_command(main)
