"""Our ONNX of a CIFAR network beside PyTorch's own export of the same weights: python -m benchmarks.exports DIR.

Times are of ONNX Runtime on one thread, in turns; the int8 ones are made by its static quantization with the same
settings and calibration images for both. DIR holds CIFAR-10.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime import quantization

from benchmarks.driver import positive
from resnet_jax.cli.arguments import ArgumentParser, run_command
from resnet_jax.convert.names import layout_of, tensors_from_variables
from resnet_jax.convert.programs import export_program
from resnet_jax.convert.pytorch import build
from resnet_jax.data.sources.cifar10 import load_cifar10
from resnet_jax.inference.load import Trained, load
from resnet_jax.parallel.devices import processor

_CALIBRATION = 200  # training images


class _Normalized(torch.nn.Module):
    """What ours is, too: uint8 [N, H, W, 3] in, normalization inside."""

    def __init__(self, trained: Trained):
        super().__init__()
        tensors = tensors_from_variables(trained.variables, trained.model, layout_of(trained.model))
        self.network = build(trained.model)
        self.network.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, strict=False)
        self.mean, self.std = map(torch.from_numpy, trained.origin.inputs.preprocessing)

    def forward(self, images: torch.Tensor) -> Any:
        return self.network(((images / 255 - self.mean) / self.std).permute(0, 3, 1, 2))


class _Images(quantization.CalibrationDataReader):
    def __init__(self, images: np.ndarray):
        self._batches = iter(np.split(images, 4))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def main(args: Sequence[str]) -> int:
    """Print a JSON line of each program: milliseconds a batch, error and agreement with the float32 network."""
    parser = ArgumentParser(prog="python -m benchmarks.exports", description=__doc__, allow_abbrev=False)
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of CIFAR-10")
    parser.add_argument("--network", default="cifar10_resnet20", help="default cifar10_resnet20")
    parser.add_argument("--batch-size", type=positive(int), default=64, help="default 64")
    parser.add_argument("--images", type=positive(int), default=2_000, help="test images of the errors; default 2,000")
    parser.add_argument("--turns", type=positive(int), default=20, help="default 20")
    options = parser.parse_args(args)
    trained, dataset = load(options.network), load_cifar10(options.dir)
    images, labels = dataset.test.images[: options.images], dataset.test.labels[: options.images]
    with tempfile.TemporaryDirectory() as temporary:
        files = {("ours", "float32"): Path(temporary, "ours.onnx"), ("torch", "float32"): Path(temporary, "torch.onnx")}
        export_program(trained, "onnx", files["ours", "float32"])
        axes = {"images": {0: "b"}, "logits": {0: "b"}}
        names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": axes, "dynamo": False}
        network = _Normalized(trained).eval()
        torch.onnx.export(network, (torch.from_numpy(images[:2]),), str(files["torch", "float32"]), **names)  # type: ignore[arg-type]
        for name in ("ours", "torch"):
            files[name, "int8"] = Path(temporary, f"{name}.int8.onnx")
            reader = _Images(dataset.train.images[:_CALIBRATION])
            quantization.quantize_static(files[name, "float32"], files[name, "int8"], reader, per_channel=True)
        sessions = {key: _session(path) for key, path in files.items()}
    batch = images[: options.batch_size]
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sessions}
    for _ in range(options.turns):
        for key, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"images": batch})
            seconds[key].append(time.perf_counter() - start)
    classes = {key: _classify(session, images) for key, session in sessions.items()}
    for (name, dtype), found in classes.items():
        record = {
            "export": name,
            "dtype": dtype,
            "milliseconds": round(1000 * float(np.median(seconds[name, dtype][1:])), 2),
            "error": round(100 * float((found != labels).mean()), 2),
            "agreement": round(100 * float((found == classes["torch", "float32"]).mean()), 2),
        }
        print(json.dumps(record), flush=True)
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "device": processor()}
    print(json.dumps({"network": options.network, "batch_size": options.batch_size, **versions}))
    return 0


def _session(path: Path) -> Any:
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = one_thread.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), one_thread, providers=["CPUExecutionProvider"])


def _classify(session: Any, images: np.ndarray) -> np.ndarray:
    batches = np.array_split(images, max(1, len(images) // 250))
    return np.concatenate([session.run(None, {"images": batch})[0].argmax(-1) for batch in batches])


if __name__ == "__main__":
    run_command(main)
