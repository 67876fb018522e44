"""What pyproject.toml cannot say: the published weights lie beside the package here, and inside it once installed."""

from pathlib import Path

from setuptools import find_packages, setup

weights = [path for path in Path("weights").glob("*.safetensors") if path.stat().st_size <= 2_000_000]
setup(
    packages=[*find_packages(include=["resnet_jax*"]), "resnet_jax.weights"],
    package_dir={"resnet_jax.weights": "weights"},
    package_data={
        "resnet_jax.weights": [path.with_suffix(suffix).name for path in weights for suffix in (".safetensors", ".md")],
        "resnet_jax.paper.analysis": ["*.jinja"],
    },
)
