"""A network as a function of plain pixels for other programs, in StableHLO or ONNX: written, reloaded and compared."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from resnet_jax.convert.fold import apply_folded, fold_bn
from resnet_jax.data.augment import normalize
from resnet_jax.errors import CommandError, UserError, optional, reason
from resnet_jax.files import atomic_write
from resnet_jax.inference.load import Trained
from resnet_jax.models import VGG, Model, ResNet
from resnet_jax.models.pool import GlobalAveragePool
from resnet_jax.models.precision import full_float32

_TOLERANCE = 1e-4  # of the largest number of a result: room for float32 sums in another order, and for nothing else
_PLATFORMS = ("cpu", "cuda", "tpu")

Form = Literal["stablehlo", "onnx"]
What = Literal["logits", "pooled", "features"]
Size = tuple[int, int] | Literal["any"]
# RGB uint8 [N, H, W, 3] -> logits or pooled features, float32 [N, K], or feature maps [N, H', W', C] by name
Function = Callable[[Any], Any]


class Options(NamedTuple):
    """How a program is written.

    Attributes:
      what: it returns: "logits" [b, K], "pooled" (the mean over all positions of the last feature map) [b, C], or
        "features" (all feature maps by name, such as conv5_x) [b, H', W', C]; None: logits, of a backbone features.
      image_size: (height, width) in pixels, "any", or None for that of training.
      gradient: whether it can be differentiated by the images, which then are float32 [b, H, W, 3] of pixels in 0..255
        (StableHLO alone).
      fold_bn: whether BN is taken into the convolutions.
    """

    what: What | None = None
    image_size: Size | None = None
    gradient: bool = False
    fold_bn: bool = False


USUAL = Options()


def export_program(trained: Trained, form: Form, path: Path, options: Options = USUAL) -> float:
    """Write a network with its weights and normalization, for any batch size; it computes in full float32.

    So it does whatever the dtype of the network, and on every device.

    StableHLO is for CPU, NVIDIA GPU and TPU, and is used with jax (and flatbuffers, which jax.export needs):

        logits = jax.export.deserialize(Path(path).read_bytes()).call(images)  # after `import jax.export`

    In ONNX the input is `images`, RGB uint8 [b, H, W, 3], and the outputs are `logits`, `pooled` or the feature maps by
    their names; BN is always folded into the convolutions.

    Returns:
      The largest difference of the results on reloading, relative to the largest of them.

    Raises:
      UserError: a package or the CPU is missing, the network cannot be written so, or the file cannot.
      CommandError: the file does not give the results of the network; what was at `path` stays.
    """
    what = options.what or usual_what(trained)
    sizes = _sizes(trained, form, what, options)
    channels = trained.origin.inputs.image_shape[2:]
    with on_cpu():
        apply, weights = function_of(trained, what)
        program: Function = partial(apply, weights)
        if form == "onnx" or options.fold_bn:
            program = _folded(trained, what)
        images = jax.ShapeDtypeStruct(
            (*_symbolic(trained, options), *channels), jnp.float32 if options.gradient else jnp.uint8
        )
        if form == "stablehlo":
            content = _to_stablehlo(program, images, vjp_order=int(options.gradient))
            load = _load_stablehlo
        else:
            names = _names(trained, what)
            content, load = _to_onnx(program, images, names), partial(_load_onnx, names=names)
        # With weights that are no constants: those XLA computes with beforehand, and once did wrongly.
        shapes = [(*size, *channels) for size in sizes]
        return write_verified(content, path, [load], partial(jax.jit(apply), weights), shapes, dtype=images.dtype)


def usual_what(trained: Trained) -> What:
    """Return what a network is exported for, if nothing else is said."""
    return "logits" if trained.origin.inputs.class_names else "features"


def _sizes(trained: Trained, form: Form, what: What, options: Options) -> list[tuple[int, int]]:
    """Return sizes of images to compare with; check that the network can be written for them.

    Raises:
      UserError: it cannot.
    """
    (height, width, _), size = trained.origin.inputs.image_shape, options.image_size
    model, is_per_pixel = trained.model, trained.origin.inputs.preprocessing.mean.ndim == 3
    if options.gradient and form == "onnx":
        raise UserError("--gradient is for --format stablehlo: ONNX programs have none")
    if what == "logits" and not trained.origin.inputs.class_names:
        raise UserError("a backbone has no logits: choose --what features or pooled")
    if size in (None, (height, width)):
        return [(height, width)]
    if is_per_pixel:
        raise UserError(f"--image-size: the mean of this network is an image of {height}x{width} pixels")
    if isinstance(model, VGG) and what == "logits":
        raise UserError(f"--image-size: the fully-connected layers of a VGG are for {height}x{width} pixels")
    if isinstance(size, tuple):
        if min(size) < 32:
            raise UserError(f"--image-size must be at least 32; got {size[0]} {size[1]}")
        return [size]
    stride = max(model.feature_strides.values())
    if isinstance(model, ResNet) and model.shortcut == "A":
        if form == "onnx" and model.stem == "imagenet":
            raise UserError("--image-size any: ONNX has no ImageNet network with option A so; name a size")
        return [(2 * stride, 3 * stride), (4 * stride, 2 * stride)]
    return [(height, width), (2 * stride + 1, 3 * stride - 1)]


def _symbolic(trained: Trained, options: Options) -> Sequence[Any]:
    """Return the shape of a batch of images, without channels."""
    if options.image_size != "any":
        (batch,) = jax.export.symbolic_shape("b")
        return batch, *(options.image_size or trained.origin.inputs.image_shape[:2])
    model = trained.model
    if isinstance(model, ResNet) and model.shortcut == "A":  # whose slices and convolutions round another way
        stride = max(model.feature_strides.values())
        return jax.export.symbolic_shape(f"b, {stride}*h, {stride}*w")
    return jax.export.symbolic_shape("b, h, w", constraints=("h >= 32", "w >= 32"))


def _names(trained: Trained, what: What) -> list[str]:
    return list(trained.model.feature_strides) if what == "features" else [what]


def function_of(trained: Trained, what: What) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return apply(weights, images), a network in full float32 to be used inside on_cpu(), and its weights."""
    apply_model = _apply(trained.model, what)

    def apply(weights: Any, images: jax.Array) -> Any:
        variables, preprocessing = weights
        return apply_model(variables, normalize(images, *preprocessing))

    return apply, jax.device_get((trained.variables, tuple(trained.origin.inputs.preprocessing)))


def _apply(model: Model, what: What) -> Callable[[Any, Any], Any]:
    """Return the function of a network of variables and normalized images, in full float32."""
    model = model.clone(dtype=jnp.float32)
    model = model if what == "logits" else model.clone(backbone_only=True)

    def apply(variables: Any, images: jax.Array) -> Any:
        with full_float32():
            outputs: Any = model.apply(variables, images, train=False)
            if what != "pooled":
                return outputs
            return GlobalAveragePool().apply({}, outputs[list(model.feature_strides)[-1]])

    return apply


def _folded(trained: Trained, what: What) -> Function:
    """Return the function of a network in full float32, its BN folded into the convolutions."""
    apply_model = _apply(trained.model, what)

    def apply(images: jax.Array) -> Any:
        folded = fold_bn(jax.device_get(trained.variables))
        mean, std = jax.device_get(tuple(trained.origin.inputs.preprocessing))
        return apply_folded(apply_model, folded, normalize(images, mean, std))

    return apply


def on_cpu() -> Any:
    """Return a context that computes on the CPU: accelerators round float32 products, each in its own way."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise UserError("exporting computes on the CPU: add it to JAX_PLATFORMS, as in cuda,cpu") from error


def _to_stablehlo(function: Function, images: jax.ShapeDtypeStruct, vjp_order: int) -> bytes:
    optional("flatbuffers", extra="convert")  # jax.export imports it, and jax does not declare it
    with _without_source_locations():
        exported = jax.export.export(jax.jit(function), platforms=_PLATFORMS)(images)
        return bytes(exported.serialize(vjp_order=vjp_order))


def _load_stablehlo(path: Path) -> Function:
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


def _to_onnx(function: Function, images: jax.ShapeDtypeStruct, names: list[str]) -> bytes:
    optional("onnxruntime", extra="onnx")
    converter = optional("jax2onnx", extra="onnx")

    def in_order(images: jax.Array) -> Any:
        with nn.intercept_methods(_count_by_adding):
            outputs = function(images)
        return tuple(outputs[name] for name in names) if isinstance(outputs, dict) else outputs

    with contextlib.redirect_stdout(io.StringIO()):
        graph = converter.to_onnx(in_order, inputs=[images], input_names=["images"], output_names=names)
    if jax.export.is_symbolic_dim(images.shape[1]):
        del graph.graph.value_info[:]  # whose sizes have names that do not hold for every map
    return bytes(_simplified(graph.SerializeToString()))


def _simplified(content: bytes) -> Any:
    """Let ONNX Runtime make the program what it makes of it anyway: biases go into convolutions, where quantization
    looks for them, and layouts change less often. The operators stay those of ONNX.
    """
    runtime = optional("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "network.onnx"))
        runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        program = optional("onnx", extra="onnx").load(options.optimized_model_filepath)
    used = {node.domain for node in program.graph.node}
    imports = [each for each in program.opset_import if each.domain in used]
    del program.opset_import[:]
    program.opset_import.extend(imports)  # without all that ONNX Runtime could have used
    return program.SerializeToString()


def _count_by_adding(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Take means over maps of any size as quotients of sums: jax2onnx 0.17 takes a wrong size for a symbolic one."""
    is_mean = isinstance(context.module, GlobalAveragePool) and context.method_name == "__call__"
    if not is_mean or not jax.export.is_symbolic_dim(args[0].shape[1]):
        return call(*args, **kwargs)
    return args[0].sum((1, 2)) / (0 * args[0][..., :1] + 1).sum((1, 2))


def _load_onnx(path: Path, names: list[str]) -> Function:
    session = optional("onnxruntime", extra="onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def function(images: Any) -> Any:
        outputs = dict(zip(names, session.run(names, {"images": np.asarray(images)}), strict=True))
        return outputs if len(names) > 1 else outputs[names[0]]

    return function


def write_verified(
    content: bytes,
    path: Path,
    loads: Sequence[Callable[[Path], Function]],
    function: Function,
    image_shapes: Sequence[tuple[int, ...]],
    batch_sizes: tuple[int, ...] = (1, 7),
    dtype: Any = np.uint8,
) -> float:
    """Write a file under another name, reload it, compare it with the network, and give it its name.

    Args:
      content: of the file.
      path: of the file; what is there stays if the comparison fails.
      loads: each load(path) returns the function that a file holds, as somebody reads it.
      function: the network.
      image_shapes: each (H, W, C), of random images.
      batch_sizes: how many of them are compared at a time.
      dtype: of the images.

    Returns:
      The largest difference of the results, relative to the largest of an array of them.

    Raises:
      UserError: the file cannot be written.
      CommandError: it cannot be loaded, or gives other results.
    """
    rng = np.random.default_rng(0)
    pairs = zip(
        itertools.cycle(image_shapes), [*batch_sizes, *batch_sizes[-1:] * (len(image_shapes) - 1)], strict=False
    )
    batches = [rng.integers(0, 256, (size, *shape), np.uint8).astype(dtype) for shape, size in pairs]
    expected = [_arrays(function(images)) for images in batches]
    with atomic_write(path) as partial:
        partial.write_bytes(content)
        try:
            read = [load(partial) for load in loads]
            found = [[_arrays(reloaded(images)) for images in batches] for reloaded in read]
        except Exception as error:  # a damaged file makes the libraries raise anything
            raise CommandError(f"{path} was not written: it does not read back: {reason(error)}") from error
        difference = max(
            _difference(*pair)
            for results in found
            for arrays in zip(results, expected, strict=True)
            for pair in itertools.zip_longest(*arrays)
        )
        if difference > _TOLERANCE:
            raise CommandError(f"{path} was not written: its results differ by {difference:.3g} of the largest")
    return difference


def _arrays(results: Any) -> list[np.ndarray]:
    return [np.asarray(array) for array in jax.tree.leaves(results)]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two arrays, relative to the largest number; infinite if it is not a number."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    scale = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
    difference = float(np.abs(found - expected).max() / scale)
    return float("inf") if np.isnan(difference) else difference
