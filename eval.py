"""Test the networks of work directories on all test images: python eval.py WORKDIR... [--protocol 10crop]."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_jax.cli.arguments import ArgumentParser, run_command
from resnet_jax.errors import UserError, printable


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument(
        "workdirs", type=Path, nargs="+", metavar="WORKDIR", help="folder of a run or an import; several: an ensemble"
    )
    parser.add_argument(
        "--protocol",
        choices=("single", "10crop", "multiscale"),
        default="single",
        help="single: the image, or its centre crop; 10crop: corners, centre and mirror images; multiscale: the whole"
        " image at five sizes and mirrored, fully convolutional",
    )
    parser.add_argument(
        "--scales", type=int, nargs="+", metavar="N", help="shorter sides in pixels, instead of the paper's"
    )
    parser.add_argument("--data.dir", dest="data_dir", metavar="DIR", help="where the data set is now")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to evaluate; default: the last")
    parser.add_argument("--batch-size", type=int, metavar="N", help="views computed at a time; default: the run's")
    parser.add_argument(
        "--max-broken",
        type=float,
        default=100.0,
        metavar="PERCENT",
        help="unreadable test images that are left out, in %% of all; more are an error; default: 100",
    )
    parser.add_argument(
        "--save-predictions", type=Path, metavar="FILE", help="write ids, labels and probabilities as .npz"
    )
    parser.add_argument(
        "--metric",
        choices=("voc07", "voc12"),
        help="average precision of detection: at 11 recalls, or the area under the curve; default: the run's",
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="of detection: write the files that the test server of VOC takes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every class, as the last line")
    return parser


def main(args: Sequence[str]) -> int:
    options = make_parser().parse_args(args)
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1; got {options.batch_size}")
    if not 0 <= options.max_broken <= 100:
        raise UserError(f"--max-broken must be between 0 and 100; got {options.max_broken:g}")
    predictions: Path | None = options.save_predictions
    if predictions and not predictions.parent.is_dir():
        raise UserError(f"--save-predictions: there is no folder {predictions.parent}")
    from resnet_jax.inference.load import read_config
    from resnet_jax.parallel.devices import configure

    configure()
    if len(options.workdirs) == 1 and read_config(options.workdirs[0]).detects:
        return _detection(options)
    if options.metric or options.results:
        raise UserError("--metric and --results are for detection; this network classifies images")
    from resnet_jax.evaluate import evaluate, record

    evaluation = evaluate(
        options.workdirs,
        protocol=options.protocol,
        scales=tuple(options.scales) if options.scales else None,
        data_dir=options.data_dir,
        step=options.step,
        batch_size=options.batch_size,
        max_broken=options.max_broken,
    )
    for image in evaluation.unreadable:
        print(printable(f"warning: cannot read the test image {image}: left out"), file=sys.stderr)
    if predictions:
        evaluation.save_predictions(predictions)
    result = evaluation.to_dict()
    steps = "step" if len(evaluation.members) == 1 else f"ensemble of {len(evaluation.members)}, steps"
    print(f"{steps} {', '.join(str(member.step) for member in evaluation.members)}: ", end="")
    print(f"test error {evaluation.top1_error:.2f} %, ", end="")
    if len(evaluation.test.class_names) > 10:
        print(f"top-5 {evaluation.top5_error:.2f} %, ", end="")
    print(f"loss {evaluation.loss:.4f}, {evaluation.count:,} images, {evaluation.protocol}")
    if len(evaluation.test.class_names) <= 20:
        names = [printable(name) for name in evaluation.test.class_names]  # of folders that others have made
        width = max(map(len, names))
        for name, error in zip(names, result["class_errors"].values(), strict=True):
            print(f"  {name:{width}} " + ("no images" if error is None else f"{error:6.2f} %"))
    if options.json:
        print(json.dumps(result))
    try:
        record(evaluation)
    except UserError as error:  # of a folder that may only be read: the result stands
        print(f"warning: {printable(str(error))}", file=sys.stderr)
    return 0


def _detection(options: argparse.Namespace) -> int:
    from resnet_jax.evaluate_detection import evaluate_detection

    usual = vars(make_parser().parse_args(["."]))
    for name in ("protocol", "scales", "save_predictions"):
        if getattr(options, name) != usual[name]:
            raise UserError(
                f"--{name.replace('_', '-')} is for the classes of whole images; this network detects objects"
            )
    evaluation = evaluate_detection(
        options.workdirs[0],
        data_dir=options.data_dir,
        step=options.step,
        batch_size=options.batch_size,
        metric=options.metric,
        max_broken=options.max_broken,
    )
    for image in evaluation.unreadable:
        print(printable(f"warning: cannot read the test image {image}: left out"), file=sys.stderr)
    print("\n".join(map(printable, evaluation.to_lines())))
    if options.results:
        written = evaluation.write_results(options.results)
        print(f"wrote {len(written)} files into {options.results}")
    if options.json:
        print(json.dumps(evaluation.to_dict()))
    return 0


if __name__ == "__main__":
    run_command(main)
