"""Networks of timm, torchvision, transformers and Keras, of random weights and BN statistics: in, and out again."""

import re

import jax
import numpy as np
import pytest
import safetensors.torch
from torch_networks import import_torchvision

import resnet_jax
from resnet_jax.cli.commands import main
from resnet_jax.convert.weights_in import read_weights

torch = pytest.importorskip("torch")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)


def randomize(network):
    """Draw weights and statistics that all matter and keep the scale of the activations."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            values *= (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("weight", "running_var")):
            values = 1 + 0.2 * values.clamp(-2, 2)
        else:
            values *= 0.2
        tensor.copy_(values)  # of a counter its whole part
    return network.eval()


def build(kind, monkeypatch):
    """Return a network of somebody else's, its logits as a function, and PyTorch's stride of a bottleneck."""
    import_torchvision(monkeypatch)
    package, name = kind.split(" ")
    if package == "torchvision":
        import torchvision

        network = torchvision.models.get_model(name, num_classes=7)
    elif package == "timm":
        network = pytest.importorskip("timm").create_model(name, num_classes=7)
    else:
        transformers = pytest.importorskip("transformers")
        depth, on_1x1 = int(name[6:8]), name.endswith("1x1")
        config = transformers.ResNetConfig(
            depths=[2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3],
            hidden_sizes=[64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048],
            layer_type="basic" if depth == 18 else "bottleneck",
            downsample_in_bottleneck=on_1x1,
            num_labels=7,
        )
        network = transformers.ResNetForImageClassification(config)
    return randomize(network)


def logits_of(network, preprocessing):
    mean, std = preprocessing
    pixels = np.moveaxis((IMAGES / 255 - mean) / std, -1, 1).astype(np.float32)
    with torch.inference_mode():
        found = network(torch.from_numpy(np.ascontiguousarray(pixels)))
    return np.asarray(getattr(found, "logits", found))


def our_logits(trained):
    images = resnet_jax.preprocess(IMAGES, trained.origin)
    return jax.jit(lambda v, x: trained.model.apply(v, x, train=False))(trained.variables, images)


def close(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


KINDS = [
    "torchvision resnet18", "torchvision resnet50",
    "timm resnet18", "timm resnet50",
    "transformers resnet18", "transformers resnet50", "transformers resnet50-1x1",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_again(tmp_path, monkeypatch, kind):
    network = build(kind, monkeypatch)
    state, package = network.state_dict(), kind.partition(" ")[0]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "x.pth")
    names = "torch"
    if package == "transformers":
        network.config.save_pretrained(tmp_path)  # which says where the stride is
        names = "hf"
    expected = None
    for number, file in enumerate(("model.safetensors", "x.pth")):
        run = tmp_path / f"run{number}"
        assert main(["import", str(tmp_path / file), "--out", str(run)]) == 0
        trained = resnet_jax.load(run)
        expected = logits_of(network, trained.origin.inputs.preprocessing)
        close(our_logits(trained), expected)
        for leaf in jax.tree.leaves(trained.variables):
            leaf.delete()
    out = tmp_path / "out"
    file = out if names == "hf" else out / "model.safetensors"
    assert main(["export", str(run), "--format", "safetensors", "--names", names, "--out", str(file)]) == 0
    again = build(kind, monkeypatch)
    torch.nn.init.zeros_(next(again.parameters()))
    if package == "transformers":
        again, report = type(again).from_pretrained(out, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        again.eval()
    else:
        again.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"), strict=True)
    close(logits_of(again, resnet_jax.load(run).origin.inputs.preprocessing), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_backbone_of_timms(monkeypatch, name):
    import_torchvision(monkeypatch)
    network = randomize(pytest.importorskip("timm").create_model(name, num_classes=0))
    trained = read_weights(network.state_dict(), backbone=True)
    maps = our_logits(trained)
    close(np.asarray(maps["conv5_x"]).mean((1, 2)), logits_of(network, trained.origin.inputs.preprocessing))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_is_torchvisions_and_timms(monkeypatch, output_stride):
    import_torchvision(monkeypatch)
    import torchvision

    dilated = [False, output_stride == 8, True]
    theirs = randomize(torchvision.models.resnet50(num_classes=7, replace_stride_with_dilation=dilated))
    trained = read_weights(theirs.state_dict())
    ours = trained._replace(model=trained.model.clone(output_stride=output_stride))
    close(our_logits(ours), logits_of(theirs, trained.origin.inputs.preprocessing))
    timm = pytest.importorskip("timm")
    basic = randomize(timm.create_model("resnet18", num_classes=7, output_stride=output_stride))
    trained = read_weights(basic.state_dict())
    ours = trained._replace(model=trained.model.clone(output_stride=output_stride))
    close(our_logits(ours), logits_of(basic, trained.origin.inputs.preprocessing))


def test_detectron2s_network(monkeypatch):
    """Its network is torchvision's with the stride on the first 1x1 and images in BGR, by other names."""
    import_torchvision(monkeypatch)
    import torchvision

    network = torchvision.models.resnet50(num_classes=7)
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    randomize(network)
    state = {}
    for key, tensor in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            key = key if key.startswith("layer") else f"stem.{key}"
            key = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
            key = re.sub(r"bn(\d)", r"conv\1.norm", key).replace("downsample.0", "shortcut")
            state[key.replace("downsample.1", "shortcut.norm")] = tensor
    trained = read_weights(state)
    pixels = np.moveaxis(IMAGES[..., ::-1] - np.float32([103.53, 116.28, 123.675]), -1, 1)
    with torch.inference_mode():
        expected = network(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
    found = our_logits(trained)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()  # the images are rounded, too


@pytest.mark.parametrize("form", ["x.h5", "x.weights.h5", "x.keras"])
def test_kerass_network(tmp_path, monkeypatch, form):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    network = keras.applications.ResNet50(weights=None, classes=7, input_shape=(64, 64, 3), classifier_activation=None)
    random = np.random.default_rng(0)
    for weight in network.weights:
        values = random.normal(size=weight.shape)
        if len(weight.shape) > 1:
            values *= (2 / np.prod(weight.shape[:-1])) ** 0.5
        else:
            values = 1 + 0.2 * values.clip(-2, 2) if weight.name in ("gamma", "moving_variance") else 0.2 * values
        weight.assign(values)
    (network.save_weights if "weights" in form else network.save)(tmp_path / form)
    trained = read_weights(tmp_path / form)
    pixels = keras.applications.resnet50.preprocess_input(IMAGES.astype(np.float32))
    expected = np.asarray(network(pixels, training=False))
    # Keras's means have fewer digits than Caffe's, which are those of the import.
    np.testing.assert_allclose(trained.origin.inputs.preprocessing.mean * 255, [123.68, 116.779, 103.939], rtol=1e-5)
    assert np.abs(our_logits(trained) - expected).max() <= 2e-5 * np.abs(expected).max()
