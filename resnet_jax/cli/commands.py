"""python -m resnet_jax summary|import|export|predict|detect|checkpoints|data|paper|responses|report ..."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from resnet_jax.cli.arguments import ArgumentParser
from resnet_jax.cli.data import add_commands as add_data_commands
from resnet_jax.cli.detect import add_command as add_detect_command
from resnet_jax.cli.predict import add_command as add_predict_command
from resnet_jax.errors import UserError, optional
from resnet_jax.paper.items import NAMES


def main(args: Sequence[str]) -> int:
    """Parse the sub-command and run it; each imports what it needs, so that --help answers at once."""
    options = make_parser().parse_args(args)
    return options.run(options)


def make_parser() -> ArgumentParser:
    """Return the parser of all sub-commands; `run` is the function of the chosen one."""
    parser = ArgumentParser(prog="python -m resnet_jax", description="Networks, weights, the paper's results.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("summary", help="a network layer by layer, with parameters and multiply-adds")
    command.add_argument("model", metavar="MODEL", help="such as resnet20, plain34, resnet50, vgg16")
    command.add_argument("--image-size", type=int, metavar="N", help="height and width in pixels; default 32 or 224")
    command.add_argument("--shortcut", choices=("A", "B", "C"), help="default: A for CIFAR networks, else B")
    command.add_argument("--stride-on", choices=("1x1", "3x3"), help="which convolution of a bottleneck subsamples")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_summary)

    command = commands.add_parser("import", help="make a work directory from weights of others")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="torchvision:resnet50, timm:resnet18.tv_in1k, hf:microsoft/resnet-50, cifar:resnet20 and the like; or a"
        " file of PyTorch, .safetensors, .caffemodel, HDF5 of Keras, or .pkl of detectron2",
    )
    command.add_argument(
        "--model",
        metavar="NAME",
        help="such as resnet20, plain34, where the tensors leave a choice; a file of export says it itself, and all of"
        " the following",
    )
    command.add_argument("--out", type=Path, required=True, metavar="WORKDIR", help="folder to make")
    command.add_argument("--offline", action="store_true", help="download nothing; take what was downloaded before")
    command.add_argument(
        "--backbone",
        action="store_true",
        help="without the last layer, which need not be there; to begin a run with",
    )
    command.add_argument(
        "--preprocessing",
        choices=("torchvision", "caffe", "detectron2", "none"),
        help="what the weights were trained with: torchvision's mean and std, Caffe's or detectron2's mean of pixels in"
        " 0..255, or pixels in [0, 1] as they are; default: what is beside the file, or as usual for its names",
    )
    command.add_argument(
        "--mean", type=float, nargs="+", metavar="X", help="of each channel of pixels in [0, 1], instead of the usual"
    )
    command.add_argument("--std", type=float, nargs="+", metavar="X", help="likewise, to divide by")
    command.add_argument(
        "--channels",
        choices=("RGB", "BGR"),
        help="their order in training, which import turns to RGB; default: as usual for the names of the tensors",
    )
    command.add_argument(
        "--prefix", default="", metavar="TEXT", help="take the tensors whose names begin so; cut it off"
    )
    command.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="ema: the moving averages that a checkpoint has beside its weights",
    )
    command.add_argument("--mean-file", type=Path, metavar="FILE", help="Caffe's mean image (.binaryproto)")
    command.add_argument(
        "--stride-on",
        choices=("1x1", "3x3"),
        help="which convolution of a bottleneck subsamples; default: 1x1 for Caffe, detectron2 and Keras, else 3x3",
    )
    command.set_defaults(run=_import)

    command = commands.add_parser("export", help="write the weights of a work directory for other programs")
    command.add_argument(
        "workdir", type=Path, metavar="WORKDIR", help="of train.py or of an import; or the name of a published network"
    )
    command.add_argument("--format", required=True, choices=("safetensors", "stablehlo", "onnx"))
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint to export; default: the last")
    command.add_argument(
        "--names",
        choices=("torch", "hf", "resnet_jax"),
        default="torch",
        help="names and layouts of the tensors in safetensors: PyTorch's (default); those of transformers, and then"
        " --out is a folder for from_pretrained(); or ours, which load() takes",
    )
    command.add_argument(
        "--what",
        choices=("logits", "pooled", "features"),
        help="logits; the mean over all positions of the last feature map; or all feature maps. In safetensors what is"
        " not logits is the network without its last layer; default: logits, of a backbone features",
    )
    command.add_argument(
        "--image-size",
        nargs="+",
        metavar="N",
        help="of StableHLO and ONNX, in pixels: height and width, one number for both, or any; default: as in training",
    )
    command.add_argument(
        "--gradient",
        action="store_true",
        help="StableHLO that can be differentiated by its images, which then are float32 of pixels in 0..255",
    )
    command.add_argument("--fold-bn", action="store_true", help="take BN into the convolutions, as ONNX always has it")
    command.add_argument(
        "--metadata",
        nargs="+",
        metavar="NAME=TEXT",
        default=[],
        help="more metadata, such as license=MIT",
    )
    command.set_defaults(run=_export)

    command = commands.add_parser("checkpoints", help="list the checkpoints of a work directory and verify them")
    command.add_argument("workdir", type=Path, metavar="WORKDIR", help="of train.py or of an import")
    command.add_argument(
        "--accept",
        type=int,
        metavar="STEP",
        help="first give this checkpoint checksums of its files as they are: one of a version that wrote none, or that"
        " was changed on purpose",
    )
    command.set_defaults(run=_checkpoints)

    add_predict_command(commands)

    add_detect_command(commands)

    add_data_commands(commands)

    command = commands.add_parser("paper", help="a table or figure of the paper, filled from runs")
    command.add_argument(
        "name", choices=NAMES, metavar="NAME", help="table1 to table6, figure1, figure4, figure6 or figure7"
    )
    command.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs; default: runs")
    command.add_argument("--out", type=Path, metavar="DIR", help="where files are written; default: RUNS/paper")
    command.add_argument("--data.dir", dest="data_dir", metavar="DIR", help="where the data set is now")
    command.add_argument("--train", action="store_true", help="run what is missing, cheapest first")
    command.add_argument("--budget", type=float, metavar="MINUTES", help="stop and save --train after so long")
    command.set_defaults(run=_paper)

    command = commands.add_parser("responses", help="standard deviations of the layer responses (Fig. 7)")
    command.add_argument("workdirs", type=Path, nargs="+", metavar="WORKDIR", help="of train.py or of an import")
    command.add_argument("--data.dir", dest="data_dir", metavar="DIR", help="where the data set is now")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint to measure; default: the last")
    command.add_argument("--json", action="store_true", help="print one JSON object a work directory instead")
    command.set_defaults(run=_responses)

    command = commands.add_parser("report", help="one HTML page of a run: curves, errors, mistakes, configuration")
    command.add_argument("workdir", type=Path, metavar="WORKDIR", help="of train.py or of an import")
    command.add_argument("--out", type=Path, metavar="FILE", help="file to write; default: WORKDIR/report.html")
    command.add_argument("--data.dir", dest="data_dir", metavar="DIR", help="where the data set is now")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint to test; default: the last")
    command.set_defaults(run=_report)

    return parser


def _summary(options: argparse.Namespace) -> int:
    from resnet_jax.models import create_model, parse_name
    from resnet_jax.paper.analysis.summary import summarize, to_table

    chosen = {"shortcut": options.shortcut, "stride_on": options.stride_on}
    try:
        model = create_model(options.model, **{name: value for name, value in chosen.items() if value})
        is_cifar = parse_name(options.model).family == "cifar"
        size = options.image_size or (32 if is_cifar else 224)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if size < 32:
        raise UserError(f"--image-size must be at least 32; got {size}")
    summary = summarize(options.model, model, size)
    if options.json:
        print(json.dumps(dataclasses.asdict(summary)))
        return 0
    print(to_table(summary))
    if is_cifar:  # of which ResNet-26, say, is another network elsewhere
        print("6n+2: a CIFAR network (Sec. 4.2)")
    return 0


def _import(options: argparse.Namespace) -> int:
    from resnet_jax.convert.weights_in import import_weights
    from resnet_jax.paper.networks import network_name

    trained = import_weights(
        options.source,
        options.model,
        options.out,
        backbone=options.backbone,
        preprocessing=options.preprocessing,
        mean=options.mean,
        std=options.std,
        channels=options.channels,
        offline=options.offline,
        prefix=options.prefix,
        averaged=options.weights == "ema",
        say=print,
        mean_file=options.mean_file,
        stride_on=options.stride_on,
    )
    model = trained.origin.config.model
    stride = f", stride on the {model.stride_on}" if model.family == "imagenet" and model.depth >= 50 else ""
    shortcut = "" if model.family == "vgg" else f", shortcut {model.shortcut}"
    backbone = ", without a last layer" if options.backbone else ""
    print(f"imported {options.source} into {options.out}: {network_name(model)}{shortcut}{stride}{backbone}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from resnet_jax.convert.programs import Options
    from resnet_jax.convert.weights_out import export
    from resnet_jax.parallel.backend import share_the_card

    share_the_card()
    pairs = [text.partition("=") for text in options.metadata]
    if wrong := [name + sign for name, sign, _ in pairs if not (name and sign)]:
        raise UserError(f"--metadata takes NAME=TEXT; got {wrong[0]}")
    if pairs and options.format != "safetensors":
        raise UserError(f"--metadata goes with --format safetensors, not {options.format}")
    chosen = Options(options.what, _image_size(options.image_size), options.gradient, options.fold_bn)
    if options.format == "safetensors" and (chosen.image_size or chosen.gradient):
        raise UserError("--image-size and --gradient go with --format stablehlo or onnx: safetensors hold weights")
    exported = export(
        options.workdir,
        options.format,
        options.out,
        names=options.names,
        step=options.step,
        metadata={name: text for name, _, text in pairs},
        options=chosen,
    )
    print(
        f"exported {options.workdir} to {options.out}; read by {exported.compared_with}:"
        f" largest difference {exported.difference:.3g}"
    )
    if exported.explanation:
        print(f"\n{exported.explanation}")
    return 0


def _image_size(texts: Sequence[str] | None) -> tuple[int, int] | Literal["any"] | None:
    if texts == ["any"] or texts is None:
        return "any" if texts else None
    numbers = [int(text) for text in texts if text.isascii() and text.isdigit()]
    if len(numbers) != len(texts) or len(numbers) > 2:
        raise UserError(f"--image-size takes N, HEIGHT WIDTH or any; got {' '.join(texts)}")
    return numbers[0], numbers[-1]


def _checkpoints(options: argparse.Namespace) -> int:
    from resnet_jax.run.saved import accept, describe
    from resnet_jax.run.workdir import load_config

    load_config(options.workdir)  # which is refused if this is no work directory
    if options.accept is not None:
        accept(options.workdir, options.accept)
    text, damaged = describe(options.workdir)
    print(text)
    return 1 if damaged else 0


def _paper(options: argparse.Namespace) -> int:
    if options.budget is not None and not (options.train and options.budget > 0):
        raise UserError("--budget takes the minutes, more than 0, that --train may run")
    from resnet_jax.paper.commands import fill
    from resnet_jax.paper.make import make

    current = partial(make, options.name, options.runs, options.data_dir)
    if options.train:
        options.runs.mkdir(parents=True, exist_ok=True)
        fill(current, options.budget, lambda line: print(line, flush=True))
    artefact = current()
    written = artefact.write(options.out or options.runs / "paper")
    print(artefact.to_text())
    print(f"\nwrote {', '.join(map(str, written))}")
    return 0


def _responses(options: argparse.Namespace) -> int:
    if options.step is not None and len(options.workdirs) > 1:
        raise UserError(f"--step goes with one work directory; got {len(options.workdirs)}")
    from resnet_jax.paper.analysis.responses import measure_workdir, to_table
    from resnet_jax.parallel.devices import configure

    configure()
    for workdir in options.workdirs:
        responses = measure_workdir(workdir, data_dir=options.data_dir, step=options.step)
        if options.json:
            print(json.dumps({"workdir": str(workdir), **dataclasses.asdict(responses)}))
        else:
            print(f"{workdir}, step {responses.step}\n\n{to_table(responses)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    path = options.out or options.workdir / "report.html"
    if options.out and not path.parent.is_dir():
        raise UserError(f"--out: there is no folder {path.parent}")
    for package in ("jinja2", "matplotlib"):
        optional(package, extra="report")
    from resnet_jax.parallel.devices import configure
    from resnet_jax.run.workdir import load_config

    configure()
    if load_config(options.workdir).detects:
        from resnet_jax.evaluate_detection import evaluate_detection
        from resnet_jax.paper.analysis.detection_report import write_detection_report

        found = evaluate_detection(options.workdir, data_dir=options.data_dir, step=options.step)
        write_detection_report(options.workdir, found, path)
    else:
        from resnet_jax.evaluate import evaluate
        from resnet_jax.paper.analysis.report import write_report

        evaluation = evaluate([options.workdir], data_dir=options.data_dir, step=options.step)
        write_report(options.workdir, evaluation, path)
    print(f"wrote {path}")
    return 0
