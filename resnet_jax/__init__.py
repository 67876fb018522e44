"""The networks, recipe and evaluation of "Deep Residual Learning for Image Recognition" in JAX."""

from resnet_jax.models import BatchNorm, ResNet, cifar_resnet, create_model

__version__ = "0.1.0"
__all__ = ["BatchNorm", "ResNet", "__version__", "cifar_resnet", "create_model"]
