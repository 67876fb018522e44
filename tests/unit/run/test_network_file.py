"""A network in one file: what was trained is read back, exactly; what is damaged is named in one line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from resnet_jax.config import Config, DataConfig, HostsConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.models import abstract_variables, build_model
from resnet_jax.run.network_file import Description, own_names, read_description, read_own, to_bytes, to_metadata

RANDOM = np.random.default_rng(0)
MEAN = RANDOM.random((8, 6, 3), np.float32)
INPUTS = Inputs((8, 6, 3), ("Ameise", "蜂"), Preprocessing(MEAN, np.float32([0.1, 1 / 3, 1e-7])), 0.1 * MEAN[:3, 0])
CONFIG = Config(
    model=ModelConfig(depth=8, shortcut="B"),
    data=DataConfig(name="folder", dir="/home/somebody/data"),
    optim=OptimConfig(learning_rate=0.05),
    run=RunConfig(workdir="/home/somebody/runs/a", init_from="/home/somebody/runs/b", seed=3),
    hosts=HostsConfig(coordinator="host:1", processes=2, process_id=1),
)
DESCRIPTION = Description("resnet_jax", CONFIG, 7, INPUTS, {"commit": "abc", "results": [{"top1_error": 8.35}]})


def variables():
    shapes = abstract_variables(build_model(CONFIG.model, 2), INPUTS.image_shape)
    return jax.tree.map(lambda leaf: RANDOM.random(leaf.shape, np.float32), shapes)


@pytest.fixture
def file(tmp_path):
    safetensors.numpy.save_file(own_names(variables()), tmp_path / "x.safetensors", to_metadata(DESCRIPTION))
    return tmp_path / "x.safetensors"


def test_what_was_written_is_read_back(tmp_path):
    written, path = variables(), tmp_path / "x.safetensors"
    safetensors.numpy.save_file(own_names(written), path, to_metadata(DESCRIPTION))
    read = read_description(path)
    assert (read.names, read.step, read.more) == ("resnet_jax", 7, DESCRIPTION.more)
    assert (read.inputs.image_shape, read.inputs.class_names) == (INPUTS.image_shape, INPUTS.class_names)
    for found, expected in zip(
        (*read.inputs.preprocessing, read.inputs.lighting), (*INPUTS[2], INPUTS[3]), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, read_own(path, read), dict(written))


def test_the_recipe_goes_with_the_file_and_the_folders_of_the_computer_do_not(file):
    assert b"somebody" not in file.read_bytes()
    expected = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, dir="data"),
        run=dataclasses.replace(CONFIG.run, workdir=None, init_from="b"),
        hosts=HostsConfig(),
    )
    assert read_description(file).config == expected


def test_the_same_network_makes_the_same_bytes(tmp_path):
    tensors = own_names(variables())
    for names, metadata in (("resnet_jax", {"resnet_jax"}), ("torch", {"format", "resnet_jax"})):
        contents = {to_bytes(tensors, DESCRIPTION._replace(names=names)) for _ in range(8)}
        assert len(contents) == 1
        (tmp_path / "x.safetensors").write_bytes(*contents)
        with safetensors.safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
            assert set(file.metadata()) == metadata
            assert file.metadata().get("format", "pt") == "pt"
            for name, array in tensors.items():
                np.testing.assert_array_equal(file.get_tensor(name), array)


def test_a_file_of_others_has_no_description(tmp_path):
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file({"a": MEAN}, tmp_path / "x.safetensors", metadata)
        assert read_description(tmp_path / "x.safetensors") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": "caffe"}, "names"),
        ({"step": -1}, "step"),
        ({"config": {"model": {"depht": 8}}}, "unknown field 'model.depht'; did you mean model.depth"),
        ({"config": []}, "config"),
        ({"inputs": {}}, "image_shape"),
    ],
)
def test_metadata_that_are_none(tmp_path, change, message):
    metadata = json.loads(to_metadata(DESCRIPTION)["resnet_jax"]) | change
    safetensors.numpy.save_file({"a": MEAN}, tmp_path / "x.safetensors", {"resnet_jax": json.dumps(metadata)})
    with pytest.raises(UserError, match=f"the metadata of {tmp_path}/x.safetensors .*{message}") as caught:
        read_description(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "inputs", [{"mean": [1, 2]}, {"std": [0, 1, 1]}, {"mean": [[[0.5] * 3] * 9] * 8}, {"std": [1]}]
)
def test_preprocessing_that_is_none(tmp_path, inputs):
    metadata = json.loads(to_metadata(DESCRIPTION)["resnet_jax"])
    metadata["inputs"] |= inputs
    safetensors.numpy.save_file({"a": MEAN}, tmp_path / "x.safetensors", {"resnet_jax": json.dumps(metadata)})
    with pytest.raises(UserError, match=f"the metadata of {tmp_path}/x.safetensors are damaged: the (mean|std) of the"):
        read_description(tmp_path / "x.safetensors")


def test_tensors_that_do_not_fit_are_named(file):
    tensors = own_names(variables())
    tensors["fc/kernel"] = tensors["fc/kernel"].T.copy()
    tensors["fc/more"] = tensors.pop("fc/bias")
    tensors["stem_bn/mean"][3] = np.nan
    safetensors.numpy.save_file(tensors, file, to_metadata(DESCRIPTION))
    message = (
        r"x.safetensors does not fit the network; tensors missing: fc/bias; left over: fc/more;"
        r" of another shape: fc/kernel \(2, 64\) instead of \(64, 2\); with numbers that are not finite: stem_bn/mean"
    )
    with pytest.raises(UserError, match=message):
        read_own(file, DESCRIPTION)
