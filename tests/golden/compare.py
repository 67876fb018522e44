"""Compare a model with golden values: shapes from the model, parameters from NumPy, errors relative to the RMS."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from golden.inputs import (
    IMAGENET_CLASSES,
    IMAGENET_RESNETS,
    RESNET_IMAGE,
    VGG_IMAGE,
    VGGS,
    make_imagenet_images,
    make_tensors,
    sample,
)

from resnet_jax.models import create_model

# Of the root mean square of the golden tensor, so that small gradients count like large ones. Both sides compute in
# float64; the golden values are stored as float32 (6e-8).
TOLERANCE = 1e-5


def flat_variables(model, images):
    """Return (params, batch_stats) with the golden values' numbers, both flat {name: array}."""
    variables = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    flat = (flatten_dict(variables.get(collection, {}), sep="/") for collection in ("params", "batch_stats"))
    return tuple(make_tensors({name: value.shape for name, value in values.items()}) for values in flat)


def nest(params, batch_stats):
    """Return the variables of `flat_variables` as `model.apply` takes them."""
    return {
        "params": unflatten_dict(params, sep="/"),
        "batch_stats": unflatten_dict(batch_stats, sep="/"),
    }


def assert_close(name, actual, expected, rms=None, tolerance=TOLERANCE):
    """Assert that no element is off by more than a share of the root mean square of the whole tensor."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} instead of {expected.shape}"
    rms = np.sqrt(np.mean(expected**2)) if rms is None else rms
    error = np.max(np.abs(actual - expected)) / rms
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def assert_summary_close(name, actual, norm, samples):
    """Compare a tensor with the golden L2 norm and 32 golden samples of it."""
    actual = np.asarray(actual, np.float64)
    assert_close(f"norm of {name}", np.linalg.norm(actual), norm)
    assert_close(name, sample(actual), samples, rms=norm / np.sqrt(actual.size))


def assert_evaluation_close(golden, key):
    """Compare the names of all variables, then the logits and the outputs of all stages, of an ImageNet network."""
    is_vgg = key in VGGS
    name, options = (key, {}) if is_vgg else IMAGENET_RESNETS[key]
    model = create_model(name, num_classes=IMAGENET_CLASSES, dtype=jnp.float64, **options)
    images = make_imagenet_images(VGG_IMAGE if is_vgg else RESNET_IMAGE)
    params, batch_stats = flat_variables(model, images)
    assert sorted(params) == str(golden[f"{key}/param_names"]).split()
    assert sorted(batch_stats) == str(golden[f"{key}/stats_names"]).split()
    features = jax.jit(lambda variables: model.apply(variables, images, train=False, method="features"))(
        nest(params, batch_stats)
    )
    norms, samples = golden[f"{key}/eval/norms"], golden[f"{key}/eval/samples"]
    outputs = [output for output in features if output not in ("pooled", "logits")]
    for output, norm, values in zip(outputs, norms, samples, strict=True):  # the first that fails is where to look
        assert_summary_close(output, features[output], norm, values)
    assert_close("logits", features["logits"], golden[f"{key}/eval/logits"])
