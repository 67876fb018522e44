"""Trained networks, ours and those of others, from the file to the error on real images, whichever way they go."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from paths import SHARED
from torch_networks import cifar_resnet

import resnet_jax
from resnet_jax.cli.commands import main
from resnet_jax.data import load_dataset
from resnet_jax.evaluate import evaluate, record
from resnet_jax.paper.make import make
from resnet_jax.run.network_file import own_names

PUBLISHED_BY_OTHERS = SHARED / "weights" / "resnet20-12fca82f.th"
RUN = SHARED / "runs" / "cifar10_resnet20"
ERROR = 8.35  # of ResNet-20 in full float32; an image more or less is 0.01


def test_published_weights_make_their_published_error(tmp_path, cifar10_dir):
    pytest.importorskip("torch", reason="reading .th needs torch")
    assert main(["import", str(PUBLISHED_BY_OTHERS), "--model", "resnet20", "--out", str(tmp_path / "run")]) == 0
    evaluation = evaluate([tmp_path / "run"], data_dir=str(cifar10_dir))
    assert evaluation.count == 10_000
    assert evaluation.top1_error == 8.27
    record(evaluation)
    table = make("table6", tmp_path)
    rows = [row for row in table.rows if row[:2] == ("ResNet", "20")]
    assert [row[4:8] for row in rows] == [("8.75", "8.27", "1", "imported from resnet20-12fca82f.th, not trained here")]


@pytest.mark.parametrize(("name", "error"), [("cifar10_resnet20", ERROR), ("cifar10_plain20", 9.27)])
def test_a_network_of_ours_makes_the_error_of_its_card(cifar10_dir, name, error):
    evaluation = evaluate([name], data_dir=str(cifar10_dir))
    assert evaluation.count == 10_000
    assert evaluation.top1_error == pytest.approx(error, abs=0.011)


def test_a_network_of_ours_is_that_of_its_run():
    if not RUN.is_dir():
        pytest.skip("the run that it comes from (../shared/runs) is not here")
    of_run, published = (own_names(resnet_jax.load(source).variables) for source in (RUN, "cifar10_resnet20"))
    jax.tree.map(np.testing.assert_array_equal, of_run, published)


# From one work directory (that of the run where it is here) to the error, by the programs that users have.


@pytest.fixture(scope="module")
def split(cifar10_dir):
    return load_dataset("cifar10", str(cifar10_dir)).test


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    source = str(RUN) if RUN.is_dir() else "cifar10_resnet20"

    def export(form: str, *options: str) -> Path:
        path = folder / f"{form}{''.join(options)}"
        assert main(["export", source, "--format", form, "--out", str(path), *options]) == 0
        return path.rename(path.with_suffix(".safetensors")) if form == "safetensors" else path

    return export


def assert_error(test, classify):
    """classify(uint8 [N, 32, 32, 3]) returns logits [N, 10]."""
    predicted = np.concatenate([np.asarray(classify(images)).argmax(1) for images in np.split(test.images, 20)])
    assert 100 * (predicted != test.labels).mean() == pytest.approx(ERROR, abs=0.011)


def test_every_way_load_and_preprocess(split):
    model, variables, origin = resnet_jax.load(RUN if RUN.is_dir() else "cifar10_resnet20")
    classify = jax.jit(lambda x: model.apply(variables, resnet_jax.preprocess(x, origin), train=False))
    assert_error(split, classify)


@pytest.mark.parametrize("names", ["torch", "resnet_jax"])
def test_every_way_export_and_import(export, cifar10_dir, tmp_path, names):
    assert main(["import", str(export("safetensors", "--names", names)), "--out", str(tmp_path / "run")]) == 0
    error = evaluate([tmp_path / "run"], data_dir=str(cifar10_dir)).top1_error
    assert error == pytest.approx(ERROR, abs=0.011)


def test_every_way_stablehlo(export, split):
    assert_error(split, jax.export.deserialize(bytearray(export("stablehlo").read_bytes())).call)


def test_every_way_onnx(export, split):
    if not all(importlib.util.find_spec(package) for package in ("jax2onnx", "onnxruntime")):
        pytest.skip("needs jax2onnx and onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(export("onnx")), providers=["CPUExecutionProvider"])
    assert_error(split, lambda images: session.run(["logits"], {"images": images})[0])


def test_every_way_pytorch(export, split):
    torch = pytest.importorskip("torch")
    file, network = export("safetensors"), cifar_resnet(20)
    with safetensors.safe_open(file, framework="numpy") as opened:
        mean = np.float32(json.loads(opened.metadata()["resnet_jax"])["inputs"]["mean"])
    tensors = {name: torch.from_numpy(array) for name, array in safetensors.numpy.load_file(file).items()}
    network.load_state_dict(tensors, strict=True)

    def classify(images):
        normalized = np.ascontiguousarray((np.float32(images) / 255 - mean).transpose(0, 3, 1, 2))
        with torch.inference_mode():
            return network(torch.from_numpy(normalized)).numpy()

    assert_error(split, classify)
