"""Compare a model with golden values: shapes from the model, parameters from NumPy, errors relative to the RMS."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from golden.inputs import make_tensors, sample

TOLERANCE = 1e-4  # of the root mean square of the golden tensor: small gradients count like large ones


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


def assert_close(name, actual, expected, rms=None):
    """Assert that no element is off by more than TOLERANCE of the root mean square of the whole tensor."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} instead of {expected.shape}"
    rms = np.sqrt(np.mean(expected**2)) if rms is None else rms
    error = np.max(np.abs(actual - expected)) / rms
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


def assert_summary_close(name, actual, norm, samples):
    """Compare a tensor with the golden L2 norm and 32 golden samples of it."""
    actual = np.asarray(actual, np.float64)
    assert_close(f"norm of {name}", np.linalg.norm(actual), norm)
    assert_close(name, sample(actual), samples, rms=norm / np.sqrt(actual.size))
