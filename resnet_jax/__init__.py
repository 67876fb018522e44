"""The networks, recipe and evaluation of "Deep Residual Learning for Image Recognition" in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_jax import models
    from resnet_jax.convert.weights_in import read_weights
    from resnet_jax.inference.detect import detect
    from resnet_jax.inference.load import load, preprocess
    from resnet_jax.inference.predict import predict
    from resnet_jax.models import (
        VGG,
        BatchNorm,
        ResNet,
        cifar_resnet,
        create_model,
        imagenet_resnet,
        recalibrate_bn,
        vgg,
    )

__version__ = "0.1.0"
__all__ = [
    "VGG",
    "BatchNorm",
    "ResNet",
    "__version__",
    "cifar_resnet",
    "create_model",
    "detect",
    "imagenet_resnet",
    "load",
    "models",
    "predict",
    "preprocess",
    "read_weights",
    "recalibrate_bn",
    "vgg",
]


def __getattr__(name: str) -> Any:
    """Import jax and orbax only when a name is asked for that needs them, so that --help answers at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = {
        "detect": "inference.detect",
        "load": "inference.load",
        "predict": "inference.predict",
        "preprocess": "inference.load",
        "read_weights": "convert.weights_in",
    }
    module = importlib.import_module(f"resnet_jax.{where.get(name, 'models')}")
    return module if name == "models" else getattr(module, name)
