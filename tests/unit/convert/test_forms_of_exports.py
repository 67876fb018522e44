"""What an export may be beside a classifier for images of one size: backbones, any size, gradients, BN folded."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from slow_dense import random_variables

import resnet_jax
from resnet_jax.cli.commands import main
from resnet_jax.config import Config, ModelConfig
from resnet_jax.convert.programs import Options, export_program
from resnet_jax.convert.weights_in import read_weights
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.models import build_model
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import create_train_state

MEAN, STD = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.25, 0.3])


def make_workdir(folder, mean=MEAN, side=64, **options):
    """Write a work directory of a network with random variables; return model and variables."""
    config = Config(model=ModelConfig(**{"family": "imagenet", "depth": 18, "shortcut": "B", **options}))
    model = build_model(config.model, 5)
    variables = random_variables(model, (side, side))
    optimizer = build_optimizer(config.optim, build_schedule(config.optim, 1))
    state = create_train_state(optimizer, jax.tree.map(jnp.asarray, variables))
    create_workdir(folder, config, Inputs((side, side, 3), tuple("abcde"), Preprocessing(mean, STD)), state)
    return model, variables


def expected(model, variables, images):
    """All outputs by name."""
    normalized = (images.astype(np.float32) / 255 - MEAN) / STD
    return jax.jit(lambda v, x: model.apply(v, x, train=False, method="features"))(variables, normalized)


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "resnet18"
    return folder, *make_workdir(folder)


def stablehlo(source, folder, *options):
    pytest.importorskip("flatbuffers", reason="jax.export needs it")
    out = folder / "network.stablehlo"
    assert main(["export", str(source), "--format", "stablehlo", "--out", str(out), *options]) == 0
    return jax.export.deserialize(bytearray(out.read_bytes()))


def test_images_of_any_size(resnet18, tmp_path):
    source, model, variables = resnet18  # whose pool rounds as Caffe's
    network = stablehlo(source, tmp_path, "--image-size", "any")
    for shape in ((1, 64, 64, 3), (2, 33, 97, 3), (3, 128, 50, 3)):
        images = random_images(*shape)
        close(network.call(images), expected(model, variables, images)["logits"])


def test_option_a_takes_multiples_of_its_stride(tmp_path):
    model, variables = make_workdir(tmp_path / "run", family="cifar", depth=8, shortcut="A", side=32)
    network = stablehlo(tmp_path / "run", tmp_path, "--image-size", "any")
    assert str(network.in_avals[0].shape) == "(b, 4*h, 4*w, 3)"
    images = random_images(2, 36, 64, 3)
    close(network.call(images), expected(model, variables, images)["logits"])


def test_another_size(resnet18, tmp_path):
    source, model, variables = resnet18
    network = stablehlo(source, tmp_path, "--image-size", "48", "80", "--fold-bn")
    images = random_images(2, 48, 80, 3)
    close(network.call(images), expected(model, variables, images)["logits"])
    assert "rsqrt" not in network.mlir_module()


def test_feature_maps_and_their_mean(resnet18, tmp_path):
    source, model, variables = resnet18
    images = random_images(2, 64, 64, 3)
    outputs = expected(model, variables, images)
    maps = stablehlo(source, tmp_path, "--what", "features").call(images)
    assert sorted(maps) == ["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x"]
    for name, found in maps.items():
        close(found, outputs[name])
    pooled = stablehlo(source, tmp_path, "--what", "pooled").call(images)
    close(pooled, outputs["conv5_x"].mean((1, 2)))


def test_a_gradient_by_the_images(resnet18, tmp_path):
    source, model, variables = resnet18
    network = stablehlo(source, tmp_path, "--gradient")
    images = random_images(1, 64, 64, 3).astype(np.float32)
    assert network.has_vjp()
    found = jax.grad(lambda x: network.call(x)[0, 2])(images)
    wanted = jax.grad(lambda x: model.apply(variables, (x / 255 - MEAN) / STD, train=False)[0, 2])(images)
    # Where rounding has turned the sign of what is rectified, a summand comes or goes.
    assert np.linalg.norm(found - wanted) <= 0.05 * np.linalg.norm(wanted)
    assert not stablehlo(source, tmp_path).has_vjp()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("onnx --gradient", "--gradient is for --format stablehlo"),
        ("stablehlo --image-size 20", "--image-size must be at least 32; got 20 20"),
        ("stablehlo --image-size 1 2 3", "--image-size takes N, HEIGHT WIDTH or any; got 1 2 3"),
        ("stablehlo --image-size some", "--image-size takes N, HEIGHT WIDTH or any; got some"),
        ("safetensors --image-size any", "--image-size and --gradient go with --format stablehlo or onnx"),
        ("safetensors --fold-bn --names hf", "--fold-bn goes with .* in safetensors with --names torch"),
    ],
)
def test_what_does_not_go_together(resnet18, tmp_path, options, message):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        main(["export", str(resnet18[0]), "--out", str(out), "--format", *options.split()])
    assert not out.is_file()


def test_networks_that_take_one_size(tmp_path):
    make_workdir(tmp_path / "A", shortcut="A")
    with pytest.raises(UserError, match="--image-size any: ONNX has no ImageNet network with option A so; name a size"):
        export_program(resnet_jax.load(tmp_path / "A"), "onnx", tmp_path / "x", Options(image_size="any"))
    mean = np.random.default_rng(0).uniform(0.4, 0.6, (32, 32, 3)).astype(np.float32)
    make_workdir(tmp_path / "run", family="cifar", depth=8, shortcut="A", side=32, mean=mean)
    with pytest.raises(UserError, match="--image-size: the mean of this network is an image of 32x32 pixels"):
        export_program(resnet_jax.load(tmp_path / "run"), "stablehlo", tmp_path / "x", Options(image_size="any"))
    with pytest.raises(UserError, match="--names hf: the ResNets of transformers are those of ImageNet"):
        main(
            ["export", str(tmp_path / "run"), "--format", "safetensors", "--names", "hf", "--out", str(tmp_path / "x")]
        )


@pytest.mark.parametrize("model", [{}, {"depth": 50}, {"family": "cifar", "depth": 8, "shortcut": "A", "side": 32}])
def test_bn_folded_in_safetensors(tmp_path, model):
    """PyTorch has compared the logits when it is there; the file is read back as the same function."""
    model, variables = make_workdir(tmp_path / "run", **model)
    out = tmp_path / "x.safetensors"
    assert main(["export", str(tmp_path / "run"), "--format", "safetensors", "--fold-bn", "--out", str(out)]) == 0
    tensors = safetensors.numpy.load_file(out)
    assert not [name for name in tensors if "running" in name or "bn" in name]
    stem, bn = variables["params"]["stem_conv"]["kernel"], variables["params"]["stem_bn"]
    stats = variables["batch_stats"]["stem_bn"]
    factor = bn["scale"] / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(tensors["conv1.weight"], (stem * factor).transpose(3, 2, 0, 1), rtol=1e-5)
    np.testing.assert_allclose(tensors["conv1.bias"], bn["bias"] - stats["mean"] * factor, rtol=1e-4, atol=1e-6)
    read = read_weights(out)
    images = random_images(1, *read.origin.inputs.image_shape)
    normalized = resnet_jax.preprocess(images, read.origin)
    wanted = expected(model, variables, images)["logits"]
    close(jax.jit(lambda v, x: read.model.apply(v, x, train=False))(read.variables, normalized), wanted)


@pytest.mark.parametrize("names", ["torch", "hf", "resnet_jax"])
def test_backbones_out_and_in(resnet18, tmp_path, names):
    source, _, variables = resnet18
    out = tmp_path / "out" / "model.safetensors"
    given = str(out.parent if names == "hf" else out)
    arguments = ["export", str(source), "--format", "safetensors", "--what", "features", "--names", names]
    assert main([*arguments, "--out", given]) == 0
    assert not [name for name in safetensors.numpy.load_file(out) if "fc" in name or "classifier" in name]
    for number in range(2):  # the second time from a work directory that is a backbone itself
        found = read_weights(out)
        assert found.origin.inputs.class_names == ()
        jax.tree.map(np.testing.assert_array_equal, found.variables["batch_stats"], variables["batch_stats"])
        assert main(["import", str(out), "--out", str(tmp_path / f"run{number}")]) == 0
        arguments[1] = str(tmp_path / f"run{number}")
        assert main([*arguments, "--out", given]) == 0


def test_a_folder_for_transformers(resnet18, tmp_path):
    source, _, variables = resnet18
    assert main(["export", str(source), "--format", "safetensors", "--names", "hf", "--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["depths"], config["layer_type"], config["downsample_in_bottleneck"]) == ([2, 2, 2, 2], "basic", True)
    assert config["id2label"] == dict(zip("01234", "abcde", strict=True))
    found = read_weights(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
