"""Make the inputs of the golden values from NumPy alone, so that they need not be stored.

The PyTorch script and the JAX test both call these functions. Each tensor is seeded by its own name, so
neither side depends on the order in which the other creates its parameters.
"""

import math
import zlib

import numpy as np

NUM_SAMPLES = 32


def make_tensors(shapes):
    """Return {name: float32 array} for {name: shape}; the last part of a name says what the tensor is."""
    return {name: _make_tensor(name, shape) for name, shape in shapes.items()}


def _make_tensor(name, shape):
    z = _standard_normal(name, shape)
    kind = name.rsplit("/", 1)[-1]
    if kind == "kernel":  # He et al. 2015: variance 2 / fan_in; the last axis is the output
        value = z * math.sqrt(2 / math.prod(shape[:-1]))
    elif kind == "scale":
        value = 1 + 0.1 * z
    elif kind in ("bias", "mean"):
        value = 0.1 * z
    elif kind == "var":
        value = 1 + 0.1 * np.abs(z)
    else:
        raise ValueError(f"a name must end in kernel, scale, bias, mean or var; got {name!r}")
    # Rounded here, so that the float64 reference and the float32 model start from identical numbers.
    return value.astype(np.float32)


def make_batch():
    """Return (images [8, 32, 32, 3] float32, labels [8] int32 in 0..9)."""
    images = _standard_normal("images", (8, 32, 32, 3)).astype(np.float32)
    labels = np.random.RandomState(zlib.crc32(b"labels")).randint(0, 10, size=8).astype(np.int32)
    return images, labels


def sample(array):
    """Return NUM_SAMPLES values at evenly spaced flat (C order) indices; a smaller array repeats some."""
    flat = np.asarray(array).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, NUM_SAMPLES).round().astype(int)]


def _standard_normal(name, shape):
    # RandomState, not default_rng: NumPy promises that its stream never changes.
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
