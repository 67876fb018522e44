"""A network as a function of plain pixels for other programs, in StableHLO or ONNX: written, reloaded and compared."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from resnet_jax.convert.fold import apply_folded, fold_bn
from resnet_jax.data.augment import normalize
from resnet_jax.errors import CommandError, UserError, optional, reason
from resnet_jax.files import atomic_write
from resnet_jax.inference.load import Trained
from resnet_jax.models.precision import full_float32

_TOLERANCE = 1e-4  # of the largest logit: room for float32 sums in another order, and for nothing else
_PLATFORMS = ("cpu", "cuda", "tpu")

Classify = Callable[[Any], Any]  # RGB uint8 [N, H, W, 3] -> logits float32 [N, K]


def export_program(trained: Trained, form: Literal["stablehlo", "onnx"], path: Path) -> float:
    """Write a network with its weights and normalization, for any batch size; it computes in full float32.

    So it does whatever the dtype of the network, and on every device.

    StableHLO is for CPU, NVIDIA GPU and TPU, and is used with jax (and flatbuffers, which jax.export needs):

        logits = jax.export.deserialize(Path(path).read_bytes()).call(images)  # after `import jax.export`

    In ONNX the input is `images`, RGB uint8 [b, H, W, 3], and the output `logits`, float32 [b, K]; BN is folded into
    the convolutions.

    Returns:
      The largest difference of logits on reloading, relative to the largest logit.

    Raises:
      UserError: a package or the CPU is missing, or the file cannot be written.
      CommandError: the file does not give the logits of the network; what was at `path` stays.
    """
    serialize, load = {"stablehlo": (_to_stablehlo, _load_stablehlo), "onnx": (_to_onnx, _load_onnx)}[form]
    shape = trained.origin.inputs.image_shape
    with on_cpu():
        classify, weights = classifier(trained)
        (batch,) = jax.export.symbolic_shape("b")
        program = _folded(trained) if form == "onnx" else partial(classify, weights)
        content = serialize(program, jax.ShapeDtypeStruct((batch, *shape), jnp.uint8))
        # With weights that are no constants: those XLA computes with beforehand, and once did wrongly.
        return write_verified(content, path, [load], partial(jax.jit(classify), weights), shape)


def classifier(trained: Trained) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return classify(weights, images), a network in full float32 to be used inside on_cpu(), and its weights."""
    model = trained.model.clone(dtype=jnp.float32)

    def classify(weights: Any, images: jax.Array) -> Any:
        variables, preprocessing = weights
        with full_float32():
            return model.apply(variables, normalize(images, *preprocessing), train=False)

    return classify, jax.device_get((trained.variables, tuple(trained.origin.inputs.preprocessing)))


def _folded(trained: Trained) -> Classify:
    """Return the function of a network in full float32, its BN folded into the convolutions."""
    model = trained.model.clone(dtype=jnp.float32)

    def classify(images: jax.Array) -> Any:
        folded = fold_bn(jax.device_get(trained.variables))
        mean, std = jax.device_get(tuple(trained.origin.inputs.preprocessing))
        return apply_folded(model, folded, normalize(images, mean, std))

    return classify


def on_cpu() -> Any:
    """Return a context that computes on the CPU: accelerators round float32 products, each in its own way."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise UserError("exporting computes on the CPU: add it to JAX_PLATFORMS, as in cuda,cpu") from error


def _to_stablehlo(classify: Classify, images: jax.ShapeDtypeStruct) -> bytes:
    optional("flatbuffers", extra="convert")  # jax.export imports it, and jax does not declare it
    with _without_source_locations():
        return bytes(jax.export.export(jax.jit(classify), platforms=_PLATFORMS)(images).serialize())


def _load_stablehlo(path: Path) -> Classify:
    return jax.export.deserialize(bytearray(path.read_bytes())).call


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keep the paths of this computer out of the file; JAX records where each operation comes from."""
    option = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, limit)


def _to_onnx(classify: Classify, images: jax.ShapeDtypeStruct) -> bytes:
    optional("onnxruntime", extra="onnx")
    converter = optional("jax2onnx", extra="onnx")
    with contextlib.redirect_stdout(io.StringIO()):
        graph = converter.to_onnx(classify, inputs=[images], input_names=["images"], output_names=["logits"])
    return graph.SerializeToString()


def _load_onnx(path: Path) -> Classify:
    session = optional("onnxruntime", extra="onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": np.asarray(images)})[0]


def write_verified(
    content: bytes,
    path: Path,
    loads: Sequence[Callable[[Path], Classify]],
    classify: Classify,
    image_shape: tuple[int, int, int],
    batch_sizes: Sequence[int] = (1, 7),
) -> float:
    """Write a file under another name, reload it, compare it with the network, and give it its name.

    Args:
      content: of the file.
      path: of the file; what is there stays if the comparison fails.
      loads: each load(path) returns the function that a file holds, as somebody reads it.
      classify: the network.
      image_shape: (H, W, 3) of random images.
      batch_sizes: how many of them are compared at a time.

    Returns:
      The largest difference of logits, relative to the largest.

    Raises:
      UserError: the file cannot be written.
      CommandError: it cannot be loaded, or gives other logits.
    """
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (size, *image_shape), np.uint8) for size in batch_sizes]
    expected = [np.asarray(classify(images)) for images in batches]
    with atomic_write(path) as partial:
        partial.write_bytes(content)
        try:
            read = [load(partial) for load in loads]
            found = [[np.asarray(reloaded(images)) for images in batches] for reloaded in read]
        except Exception as error:  # a damaged file makes the libraries raise anything
            raise CommandError(f"{path} was not written: it does not read back: {reason(error)}") from error
        difference = max(_difference(*pair) for logits in found for pair in zip(logits, expected, strict=True))
        if difference > _TOLERANCE:
            raise CommandError(f"{path} was not written: its logits differ by {difference:.3g} of the largest")
    return difference


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of logits, relative to the largest; infinite if it is not a number."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    scale = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
    difference = float(np.abs(found - expected).max() / scale)
    return float("inf") if np.isnan(difference) else difference
