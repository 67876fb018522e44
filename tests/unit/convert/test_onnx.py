"""ONNX files give the logits of the network to a program that has ONNX Runtime alone, or are not written."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.convert.onnx import export_onnx
from resnet_jax.data.types import Preprocessing
from resnet_jax.errors import CommandError, UserError
from resnet_jax.models.pool import AdaptiveAveragePool, MaxPool

needs_extra = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("jax2onnx", "onnxruntime")),
    reason="needs jax2onnx and onnxruntime: pip install 'resnet_jax[onnx]'",
)

PROGRAM = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "b"
images = np.load("images.npz")
np.savez("logits.npz", **{name: session.run(["logits"], {"images": images[name]})[0] for name in images})
assert not {"jax", "flax", "resnet_jax"} & set(sys.modules)
"""


class VggLike(nn.Module):
    """The operations of VGG that the residual networks do without, small."""

    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(4, (3, 3), padding=((1, 1), (1, 1)))(x))
        x = MaxPool(2, 2)(x)
        x = AdaptiveAveragePool(7)(x)
        x = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(5)(x)


@needs_extra
def test_a_program_without_jax_gets_the_logits(network, tmp_path):
    path = tmp_path / "network.onnx"
    difference = export_onnx(network.model, network.variables, network.preprocessing, network.image_shape, path)
    assert 0 <= difference <= 1e-5
    np.savez(tmp_path / "images.npz", *network.images)
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, check=True)
    with np.load(tmp_path / "logits.npz") as logits:
        for found, expected in zip(logits.values(), network.logits, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert {file.name for file in tmp_path.iterdir()} == {"network.onnx", "images.npz", "logits.npz"}


def vgg_like():
    model = VggLike()
    images = jnp.zeros((1, 32, 28, 3))
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    preprocessing = Preprocessing(np.float32([0.4, 0.5, 0.6]), np.float32([1, 1, 1]))
    return model, variables, preprocessing, (32, 28, 3)


@needs_extra
def test_fully_connected_layers_behind_a_map(tmp_path):
    assert export_onnx(*vgg_like(), tmp_path / "network.onnx") <= 1e-5


@needs_extra
def test_a_truncated_file_is_not_left(cifar_network, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: write_bytes(path, data[: len(data) // 2]))
    with pytest.raises(CommandError, match=r"network.onnx was not written: it does not read back: ."):
        export_onnx(*cifar_network[:4], tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["jax2onnx", "onnxruntime"])
def test_without_the_extra_the_way_out_is_named(cifar_network, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)  # as if it were there
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}, of the extra \[onnx\]: pip install"):
        export_onnx(*cifar_network[:4], tmp_path / "network.onnx")
