"""Export a network as ONNX, with jax2onnx, and check it with ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from resnet_jax.convert.verify import Classify, make_classify, on_cpu, write_verified
from resnet_jax.data.types import Preprocessing
from resnet_jax.errors import optional
from resnet_jax.models import Model


def export_onnx(
    model: Model,
    variables: dict[str, Any],
    preprocessing: Preprocessing,
    image_shape: tuple[int, int, int],
    path: Path,
) -> float:
    """Write the network with its weights and normalization, and compare what ONNX Runtime makes of it.

    The input is `images`, RGB uint8 [b, H, W, 3] with any b, and the output `logits`, float32 [b, K].

    Args:
      model: whatever its dtype, the file computes in float32.
      variables: params and batch_stats.
      preprocessing: mean and std in [0, 1].
      image_shape: (H, W, 3) of the images that the file takes.
      path: of the file.

    Returns:
      The largest difference of logits on reloading, relative to the largest logit.

    Raises:
      UserError: jax2onnx or onnxruntime is not installed, or the file cannot be written.
      CommandError: the file does not give the logits of the network.
    """
    optional("onnxruntime", extra="onnx")
    converter = optional("jax2onnx", extra="onnx")
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_shape), np.uint8)
    with on_cpu():
        classify = make_classify(model, variables, preprocessing)
        with contextlib.redirect_stdout(io.StringIO()):
            graph = converter.to_onnx(classify, inputs=[images], input_names=["images"], output_names=["logits"])
        return write_verified(graph.SerializeToString(), path, _load, classify, image_shape)


def _load(path: Path) -> Classify:
    session = optional("onnxruntime", extra="onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": np.asarray(images)})[0]
