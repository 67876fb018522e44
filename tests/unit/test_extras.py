"""What the core does without the packages of the extras, and the one line that names an extra which is missing."""

import subprocess
import sys
import tomllib

import numpy as np
import pytest
from paths import ROOT, TESTS

from resnet_jax.cli.commands import main
from resnet_jax.config import Config
from resnet_jax.convert.programs import export_program
from resnet_jax.convert.weights_in import read_weights
from resnet_jax.data import load_dataset
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.inference.load import Origin, Trained
from resnet_jax.models import cifar_resnet
from resnet_jax.paper.make import make

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Modules that the extras alone install.
MODULES = (
    "sklearn", "matplotlib", "tensorboardX", "tensorflow_datasets", "tensorflow", "pooch", "flatbuffers",
    "torch", "jinja2", "markupsafe", "jax2onnx", "onnxruntime", "h5py", "huggingface_hub",
)  # fmt: skip
PROGRAM = f"""
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MODULES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Forbidden())
import resnet_jax.cli.arguments, resnet_jax.cli.commands
assert "jax" not in sys.modules  # so that --help answers at once
import resnet_jax.training, resnet_jax.evaluate, resnet_jax.inference.load, resnet_jax.convert.weights_in
import resnet_jax.convert.weights_out, resnet_jax.paper.make, resnet_jax.paper.analysis.responses
import resnet_jax.data.tools.pack
"""


def test_the_core_works_without_the_extras():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=ROOT)


def export(form):
    inputs = Inputs((32, 32, 3), ("a", "b"), Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32)))
    trained = Trained(cifar_resnet(8), {}, Origin(Config(), 0, inputs))
    return lambda folder: export_program(trained, form, folder / "file")


def keras_file(folder):
    (folder / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    return folder / "x.h5"


@pytest.mark.parametrize(
    ("extra", "module", "package", "use"),
    [
        ("digits", "sklearn", "scikit-learn", lambda folder: load_dataset("digits", str(folder))),
        (
            "tfds",
            "tensorflow_datasets",
            "tensorflow-datasets",
            lambda _: load_dataset("tfds:tiny", str(TESTS / "fixtures" / "tfds")),
        ),
        ("download", "pooch", "pooch", lambda folder: load_dataset("cifar10", str(folder))),
        ("plots", "matplotlib", "matplotlib", lambda folder: make("figure1", folder)),
        ("report", "jinja2", "jinja2", lambda folder: main(["report", str(folder)])),
        ("report", "matplotlib", "matplotlib", lambda folder: main(["report", str(folder)])),
        ("convert", "flatbuffers", "flatbuffers", export("stablehlo")),
        ("hub", "huggingface_hub", "huggingface_hub", lambda folder: read_weights("timm:resnet18")),
        ("convert", "h5py", "h5py", lambda folder: read_weights(keras_file(folder))),
        ("onnx", "onnxruntime", "onnxruntime", export("onnx")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, extra, module, package, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        use(tmp_path)
    assert f"needs {package}, of the extra [{extra}]: pip install {package}" in str(caught.value)
    assert any(requirement.partition(">")[0] == package for requirement in EXTRAS[extra])
    assert not list(tmp_path.glob("[!x]*"))  # nothing half-written


def test_all_and_dev_hold_what_the_tests_need():
    (everything,) = (requirement for requirement in EXTRAS["all"])
    assert everything == "resnet_jax[digits,plots,tfds,download,convert,hub,report]"
    assert "resnet_jax[all]" in EXTRAS["dev"]
