"""Make the inputs of the golden values from NumPy alone, so that they need not be stored.

The PyTorch scripts and the JAX tests both call these functions. Each tensor is seeded by its own name, so
neither side depends on the order in which the other creates its parameters.
"""

import math
import re
import zlib

import numpy as np

NUM_SAMPLES = 32

# Networks of imagenet.npz: key of the golden values -> (name, options), as `create_model` takes them. All
# values are spelt out, so that neither side depends on the defaults of the other.
IMAGENET_RESNETS = {
    "resnet18": ("resnet18", {"shortcut": "B", "pool_padding": "caffe"}),
    "resnet18-torch": ("resnet18", {"shortcut": "B", "pool_padding": "torch"}),
    "plain34": ("plain34", {"shortcut": "none", "pool_padding": "caffe"}),
    "resnet34-A": ("resnet34", {"shortcut": "A", "pool_padding": "caffe"}),
    "resnet34-B": ("resnet34", {"shortcut": "B", "pool_padding": "caffe"}),
    "resnet34-C": ("resnet34", {"shortcut": "C", "pool_padding": "caffe"}),
    "resnet50": ("resnet50", {"shortcut": "B", "stride_on": "1x1", "pool_padding": "caffe"}),
    "resnet50-torch": ("resnet50", {"shortcut": "B", "stride_on": "3x3", "pool_padding": "torch"}),
    "resnet101": ("resnet101", {"shortcut": "B", "stride_on": "1x1", "pool_padding": "caffe"}),
    "resnet152": ("resnet152", {"shortcut": "B", "stride_on": "1x1", "pool_padding": "caffe"}),
}
VGGS = ("vgg16", "vgg19")
# Tested apart: they take long.
LARGE_NETWORKS = ("plain34", "resnet34-A", "resnet34-B", "resnet50-torch", "resnet101", "resnet152", *VGGS)
IMAGENET_CLASSES = 20  # few, to keep the file small
# The stem makes 33x36 of it. The max pool behind then meets an odd height, where the output of "caffe" and "torch"
# differs in size, and an even width, where the last window of "caffe" is clipped.
RESNET_IMAGE = (65, 72, 3)
VGG_IMAGE = (64, 96, 3)


def make_tensors(shapes):
    """Return {name: float32 array} for {name: shape}; the last part of a name says what the tensor is."""
    return {name: _make_tensor(name, shape) for name, shape in shapes.items()}


def _make_tensor(name, shape):
    z = _standard_normal(name, shape)
    kind = name.rsplit("/", 1)[-1]
    if kind == "kernel":  # He et al. 2015: variance 2 / fan_in; the last axis is the output
        z *= math.sqrt(2 / math.prod(shape[:-1]))  # in place: the fc6 of VGG has 103 million elements
        value = z
    elif kind == "scale":
        value = 1 + 0.1 * z
        if name.endswith("/bn3/scale"):  # the last of a bottleneck: the sum of 50 of them would explode
            value *= 0.25
    elif kind in ("bias", "mean"):
        value = 0.1 * z
    elif kind == "var":
        value = 1 + 0.1 * np.abs(z)
    else:
        raise ValueError(f"a name must end in kernel, scale, bias, mean or var; got {name!r}")
    # Rounded here, so that the float64 reference and the float32 model start from identical numbers.
    return value.astype(np.float32)


def open_relus(params):
    """Return the parameters with the bias of each BN in a block raised by its scale.

    An input of ReLU so near 0 that float32 puts it on the other side switches a gradient on or off, and a single
    one changes the gradients of all layers before it by up to a few per cent. This makes them rarer, and
    make_imagenet_training_batch avoids the rest.
    """
    scales = {name: params[name.removesuffix("bias") + "scale"] for name in params if re.search(r"/bn\d/bias$", name)}
    return params | {name: params[name] + scale for name, scale in scales.items()}


def make_batch():
    """Return (images [8, 32, 32, 3] float32, labels [8] int32 in 0..9)."""
    images = _standard_normal("images", (8, 32, 32, 3)).astype(np.float32)
    labels = np.random.RandomState(zlib.crc32(b"labels")).randint(0, 10, size=8).astype(np.int32)
    return images, labels


def make_imagenet_images(image_shape):
    """Return images [2, *image_shape] float32."""
    return _standard_normal("imagenet images", (2, *image_shape)).astype(np.float32)


def make_imagenet_training_batch():
    """Return (images [4, 33, 40, 3] float32, labels [4] int32 below IMAGENET_CLASSES)."""
    # Number 21 of 817 keeps the inputs of ReLU in resnet50 with open_relus farthest from 0: at least 11 times the
    # RMS error of float32.
    images = _standard_normal("imagenet training images 21", (4, 33, 40, 3)).astype(np.float32)
    random = np.random.RandomState(zlib.crc32(b"imagenet labels"))
    return images, random.randint(0, IMAGENET_CLASSES, size=4).astype(np.int32)


def sample(array):
    """Return NUM_SAMPLES values at evenly spaced flat (C order) indices; a smaller array repeats some."""
    flat = np.asarray(array).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, NUM_SAMPLES).round().astype(int)]


def _standard_normal(name, shape):
    # RandomState, not default_rng: NumPy promises that its stream never changes.
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
