"""The networks, recipe and evaluation of "Deep Residual Learning for Image Recognition" in JAX."""

from typing import TYPE_CHECKING, Any

from resnet_jax.models import VGG, BatchNorm, ResNet, cifar_resnet, create_model, imagenet_resnet, recalibrate_bn, vgg

if TYPE_CHECKING:
    from resnet_jax.inference.load import load, preprocess

__version__ = "0.1.0"
__all__ = [
    "VGG",
    "BatchNorm",
    "ResNet",
    "__version__",
    "cifar_resnet",
    "create_model",
    "imagenet_resnet",
    "load",
    "preprocess",
    "recalibrate_bn",
    "vgg",
]


def __getattr__(name: str) -> Any:
    """Import what needs orbax only when it is asked for: that takes a second."""
    if name in ("load", "preprocess"):
        from resnet_jax.inference import load as trained

        return getattr(trained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
