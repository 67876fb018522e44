"""Evaluate a work directory on all test images: python eval.py WORKDIR [--step N] [--json]."""

import json
from collections.abc import Sequence
from pathlib import Path

from resnet_jax.command_line import ArgumentParser, run_command


def main(args: Sequence[str]) -> int:
    parser = ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="folder of a run of train.py")
    parser.add_argument("--data.dir", dest="data_dir", metavar="DIR", help="where the data set is now")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to evaluate; default: the last")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(args)
    from resnet_jax.evaluate import evaluate_workdir  # here, so that --help and mistakes answer at once

    evaluation = evaluate_workdir(options.workdir, data_dir=options.data_dir, step=options.step)
    result = evaluation.to_dict()
    print(f"step {evaluation.step}: test error {result['top1_error']:.2f} %, loss {result['loss']:.4f},", end="")
    print(f" {result['count']:,} images")
    for name, error in result["class_errors"].items():
        print(f"  {name:12} " + ("no images" if error is None else f"{error:6.2f} %"))
    if options.json:
        print(json.dumps({"workdir": str(options.workdir), **result}))
    return 0


if __name__ == "__main__":
    run_command(main)
