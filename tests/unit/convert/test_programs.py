"""StableHLO and ONNX files give the logits to a program that has jax, or ONNX Runtime, alone, or are not written."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT
from slow_dense import random_variables

from resnet_jax.config import Config
from resnet_jax.convert.programs import Options, export_program, write_verified
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import CommandError, UserError
from resnet_jax.inference.load import Origin, Trained
from resnet_jax.models import create_model
from resnet_jax.models.pool import AdaptiveAveragePool, MaxPool


def needs(*packages):
    missing = not all(importlib.util.find_spec(package) for package in packages)
    return pytest.mark.skipif(missing, reason=f"needs {' and '.join(packages)}")


FORMS = [
    pytest.param("stablehlo", marks=needs("flatbuffers")),
    pytest.param("onnx", marks=needs("jax2onnx", "onnxruntime")),
]
PROGRAMS = {
    "stablehlo": """
import sys
from pathlib import Path
import jax.export
import numpy as np
classify = jax.export.deserialize(Path("network").read_bytes())
assert classify.platforms == ("cpu", "cuda", "tpu")
images = np.load("images.npz")
np.savez("logits.npz", **{name: classify.call(images[name]) for name in images})
assert not {"flax", "resnet_jax"} & set(sys.modules)
""",
    "onnx": """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("network", providers=["CPUExecutionProvider"])
assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "b"
images = np.load("images.npz")
np.savez("logits.npz", **{name: session.run(["logits"], {"images": images[name]})[0] for name in images})
assert not {"jax", "flax", "resnet_jax"} & set(sys.modules)
""",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_program_without_this_package_gets_the_logits(network, tmp_path, form):
    path = tmp_path / "network"
    assert 0 <= export_program(network.trained, form, path) <= 1e-5
    assert str(ROOT).encode() not in path.read_bytes()  # no paths of this computer
    np.savez(tmp_path / "images.npz", *network.images)
    subprocess.run([sys.executable, "-c", PROGRAMS[form]], cwd=tmp_path, check=True)
    with np.load(tmp_path / "logits.npz") as logits:
        for found, expected in zip(logits.values(), network.logits, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert {file.name for file in tmp_path.iterdir()} == {"network", "images.npz", "logits.npz"}


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


@pytest.mark.parametrize("form", FORMS)
def test_fully_connected_layers_behind_a_map(tmp_path, form):
    model = VggLike()
    variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 28, 3)), train=False))(jax.random.key(0))
    preprocessing = Preprocessing(np.float32([0.4, 0.5, 0.6]), np.float32([1, 1, 1]))
    origin = Origin(Config(), 0, Inputs((32, 28, 3), tuple("abcde"), preprocessing))
    assert export_program(Trained(model, variables, origin), form, tmp_path / "network") <= 1e-5


@pytest.mark.parametrize("form", FORMS[1:])
def test_biases_are_in_the_convolutions_of_onnx(tmp_path, form):
    """Where quantization looks for them: without, ResNet-20 in int8 has 10.1 % of errors instead of 8.1."""
    import onnx

    model = create_model("resnet8", num_classes=5)
    inputs = Inputs((32, 32, 3), tuple("abcde"), Preprocessing(np.float32([0.4, 0.5, 0.6]), np.float32([1, 1, 1])))
    trained = Trained(model, random_variables(model, (32, 32)), Origin(Config(), 0, inputs))
    export_program(trained, form, tmp_path / "network")
    program = onnx.load(tmp_path / "network")
    onnx.checker.check_model(program)
    assert [each.domain for each in program.opset_import] == [""]
    kinds = [node.op_type for node in program.graph.node]
    assert kinds.count("Conv") == 7
    assert kinds.count("Add") == 3 + sum(len(node.input) < 3 for node in program.graph.node if node.op_type == "Conv")
    assert sum(len(node.input) == 3 for node in program.graph.node if node.op_type == "Conv") >= 6


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("pool_padding", ["caffe", "torch"])
def test_onnx_of_any_size_and_of_feature_maps(tmp_path, form, pool_padding):
    import onnxruntime

    model = create_model("resnet18", num_classes=5, pool_padding=pool_padding).clone(filters=(4, 8, 16, 32))
    variables = random_variables(model, (64, 64))
    inputs = Inputs((64, 64, 3), tuple("abcde"), Preprocessing(np.float32([0.4, 0.5, 0.6]), np.float32([1, 1, 1])))
    trained = Trained(model, variables, Origin(Config(), 0, inputs))
    for what in ("logits", "pooled", "features"):
        assert export_program(trained, form, tmp_path / what, Options(what, image_size="any")) <= 1e-5
        session = onnxruntime.InferenceSession(str(tmp_path / what), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        assert names == (list(model.feature_strides) if what == "features" else [what])
        images = np.random.default_rng(0).integers(0, 256, (2, 45, 96, 3)).astype(np.uint8)
        found = session.run(names, {"images": images})
        normalized = (images.astype(np.float32) / 255 - np.float32([0.4, 0.5, 0.6])).astype(np.float32)
        expected = jax.jit(lambda x: model.apply(variables, x, train=False, method="features"))(normalized)
        for name, array in zip(names, found, strict=True):
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-4 * np.abs(expected[name]).max())


@pytest.mark.parametrize("form", FORMS)
def test_a_truncated_file_is_not_left(cifar_network, tmp_path, monkeypatch, form):
    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: write_bytes(path, data[: len(data) // 2]))
    with pytest.raises(CommandError, match=r"network was not written: it does not read back: ."):
        export_program(cifar_network.trained, form, tmp_path / "network")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logits: logits + 1e-3 * np.abs(logits).max(),
        lambda logits: logits * np.float32("nan"),
        lambda logits: logits[:1],
        lambda logits: logits.astype(np.float64),
    ],
)
def test_other_logits_are_refused_and_the_old_file_stays(tmp_path, spoil):
    def classify(images):
        return images.mean((1, 2), dtype=np.float32)

    path = tmp_path / "network"
    path.write_bytes(b"old")
    with pytest.raises(CommandError, match=r"network was not written: its results differ by (0.001|inf)"):
        write_verified(
            b"new", path, [lambda _: classify, lambda _: lambda images: spoil(classify(images))], classify, [(4, 4, 3)]
        )
    assert path.read_bytes() == b"old"
    assert write_verified(b"new", path, [lambda _: classify], classify, [(4, 4, 3)]) == 0
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_cpu_the_way_out_is_named(cifar_network, tmp_path, monkeypatch):
    def local_devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(UserError, match="add it to JAX_PLATFORMS"):
        export_program(cifar_network.trained, "stablehlo", tmp_path / "network")


@pytest.mark.parametrize(
    ("form", "package", "extra"),
    [("stablehlo", "flatbuffers", "convert"), ("onnx", "jax2onnx", "onnx"), ("onnx", "onnxruntime", "onnx")],
)
def test_without_the_extra_the_way_out_is_named(cifar_network, tmp_path, monkeypatch, form, package, extra):
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)  # as if it were there
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}, of the extra \[{extra}\]: pip install {package}"):
        export_program(cifar_network.trained, form, tmp_path / "network")
