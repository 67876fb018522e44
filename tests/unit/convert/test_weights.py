"""Import, evaluation, fine-tuning and export of weights, with files as others write them."""

import os
import pickle
import re
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import resnet_jax
from resnet_jax import create_model
from resnet_jax.cli.commands import main
from resnet_jax.config import Config, ModelConfig
from resnet_jax.convert.files import read_tensors
from resnet_jax.convert.names import tensors_from_variables
from resnet_jax.convert.weights_in import import_weights, read_weights
from resnet_jax.data.augment import normalize
from resnet_jax.errors import UserError
from resnet_jax.inference.load import adopt_weights, check_same_network
from resnet_jax.models import abstract_variables


def make_tensors(name, layout, **options):
    """Return a network, random variables for it, and the tensors of a file that holds them."""
    model, random = create_model(name, **options), np.random.default_rng(0)
    shapes = abstract_variables(model, (32, 32, 3))
    variables = jax.tree.map(lambda leaf: random.uniform(0.05, 0.1, leaf.shape).astype(np.float32), shapes)
    return model, variables, tensors_from_variables(variables, model, layout)


@pytest.fixture(scope="module")
def resnet8(tmp_path_factory):
    """A small CIFAR ResNet as .safetensors in PyTorch's names, and our model and variables."""
    model, variables, tensors = make_tensors("resnet8", "cifar", zero_channels="both")
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    safetensors.numpy.save_file({f"module.{name}": array for name, array in tensors.items()}, path)
    return path, model, variables


def test_an_import_is_an_ordinary_work_directory(resnet8, tmp_path, capsys):
    path, model, variables = resnet8
    workdir = tmp_path / "imported"
    assert main(["import", str(path), "--model", "resnet8", "--out", str(workdir)]) == 0
    assert "ResNet-8, shortcut A" in capsys.readouterr().out
    loaded, loaded_variables, origin = resnet_jax.load(workdir)
    jax.tree.map(np.testing.assert_array_equal, loaded_variables, dict(variables))
    assert loaded.zero_channels == "both"
    assert origin.step == 0
    assert origin.config.data.mean == pytest.approx((0.485, 0.456, 0.406))
    images = np.random.RandomState(0).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    normalized = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(resnet_jax.preprocess(images, origin), normalized, rtol=1e-4, atol=1e-5)
    expected = model.apply(variables, normalized, train=False)
    actual = loaded.apply(loaded_variables, resnet_jax.preprocess(images, origin), train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_safetensors_out_is_what_came_in(resnet8, tmp_path, capsys):
    path, _, _ = resnet8
    import_weights(path, "resnet8", tmp_path / "run")
    for names in ("torch", "resnet_jax"):
        out = tmp_path / f"{names}.safetensors"
        assert (
            main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(out), "--names", names]) == 0
        )
        difference = float(capsys.readouterr().out.rpartition("largest difference ")[2])
        assert difference <= (1e-5 if names == "torch" else 0)
    before, after = read_tensors(path), safetensors.numpy.load_file(tmp_path / "torch.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    ours = safetensors.numpy.load_file(tmp_path / "resnet_jax.safetensors")
    assert ours["stage2_block1/conv1/kernel"].shape == (3, 3, 16, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resnet_jax.safetensors", "run", "torch.safetensors"]


@pytest.mark.parametrize(
    ("name", "options", "shortcut"),
    [("resnet14", {"shortcut": "B"}, "B"), ("resnet8", {"shortcut": "C"}, "C"), ("plain14", {}, "none")],
)
def test_the_shortcuts_are_read_off_the_tensors(tmp_path, name, options, shortcut):
    _, variables, tensors = make_tensors(name, "cifar", num_classes=3, **options)
    safetensors.numpy.save_file(tensors, tmp_path / "file.safetensors")
    config = import_weights(tmp_path / "file.safetensors", name, tmp_path / "run")
    assert config.model.shortcut == shortcut
    loaded = resnet_jax.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, dict(variables))
    assert loaded.origin.inputs.class_names == ("0", "1", "2")


def test_torchvisions_layout_means_the_stride_on_the_3x3(tmp_path):
    _, variables, tensors = make_tensors("resnet18", "torchvision", num_classes=4)
    safetensors.numpy.save_file(tensors, tmp_path / "file.safetensors")
    config, found, inputs = read_weights(tmp_path / "file.safetensors", "resnet18", preprocessing="none")
    assert (config.model.stride_on, config.model.pool_padding, config.model.shortcut) == ("3x3", "torch", "B")
    assert config.data.mean == (0, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert inputs.image_shape == (224, 224, 3)


def test_caffes_layout_means_the_stride_on_the_1x1_and_the_mean_image(tmp_path, monkeypatch):
    _, _, tensors = make_tensors("resnet50", "torchvision", num_classes=5)  # what the reader of .caffemodel returns
    mean = np.random.RandomState(0).uniform(90, 130, (224, 224, 3)).astype(np.float32)
    monkeypatch.setattr("resnet_jax.convert.weights_in.read_caffemodel", lambda path: tensors)
    monkeypatch.setattr("resnet_jax.convert.weights_in.read_mean", lambda path: mean)
    file, mean_file = tmp_path / "file.caffemodel", tmp_path / "mean.binaryproto"
    file.write_bytes(b"")
    config, _, inputs = read_weights(file, "resnet50", mean_file=mean_file)
    assert (config.model.stride_on, config.model.pool_padding, config.model.shortcut) == ("1x1", "caffe", "B")
    images = np.random.RandomState(1).randint(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    # Caffe's input is the pixel minus the mean, in 0..255.
    np.testing.assert_allclose(normalize(images, *inputs.preprocessing), images - mean, atol=1e-3)
    assert read_weights(file, "resnet50", stride_on="3x3")[0].model.stride_on == "3x3"


def test_pytorch_loads_an_export_strictly(resnet8, tmp_path):
    torch = pytest.importorskip("torch", reason="loading a state_dict needs torch")
    import_weights(resnet8[0], "resnet8", tmp_path / "run")
    main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(tmp_path / "out.safetensors")])
    tensors = {k: torch.from_numpy(v) for k, v in safetensors.numpy.load_file(tmp_path / "out.safetensors").items()}
    convolution = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
    stem = torch.nn.Sequential(OrderedDict(conv1=convolution, bn1=torch.nn.BatchNorm2d(16)))
    # Strict, though the counters num_batches_tracked are not in the file.
    stem.load_state_dict({k: v for k, v in tensors.items() if k.startswith(("conv1.", "bn1."))}, strict=True)
    images = np.random.RandomState(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = torch.relu(stem.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)))).numpy()
    model, variables, _ = resnet_jax.load(tmp_path / "run")
    features = model.apply(variables, images, train=False, method="features")
    np.testing.assert_allclose(features["stem"].transpose(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [10, 3])
def test_fine_tuning_begins_with_the_weights(resnet8, tmp_path, classes):
    path, _, variables = resnet8
    import_weights(path, "resnet8", tmp_path / "source")
    trained = resnet_jax.load(tmp_path / "source")
    new = make_tensors("resnet8", "cifar", num_classes=classes)[1]
    new = jax.tree.map(jnp.zeros_like, new)
    adopted = adopt_weights(trained, new)
    for name, layer in adopted["params"].items():
        expected = variables["params"][name] if name != "fc" or classes == 10 else new["params"][name]
        jax.tree.map(np.testing.assert_array_equal, layer, expected)
    jax.tree.map(np.testing.assert_array_equal, adopted["batch_stats"], variables["batch_stats"])
    with pytest.raises(UserError, match="zero_channels both, not end: add --model.zero-channels both"):
        check_same_network(trained, Config(model=ModelConfig(depth=8)))


def refused(path, model="resnet8", **options):
    out = path.parent / "run"
    with pytest.raises(UserError) as caught:
        import_weights(path, model, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def test_damaged_safetensors(resnet8, tmp_path):
    whole = resnet8[0].read_bytes()
    path = tmp_path / "file.safetensors"
    for content in (whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        assert "is damaged or not a .safetensors file" in refused(path)


def test_a_pickle_that_would_run_code(tmp_path):
    pytest.importorskip("torch", reason="reading .pth needs torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for protocol in (0, 2):
        (tmp_path / "file.pth").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=protocol))
        assert "file.pth is" in refused(tmp_path / "file.pth")
    assert not (tmp_path / "executed").exists()


def test_pytorch_files(resnet8, tmp_path):
    torch = pytest.importorskip("torch", reason="writing .pth needs torch")
    path, _, variables = resnet8
    tensors = {name: torch.from_numpy(array) for name, array in read_tensors(path).items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3}, tmp_path / "file.pth")
    import_weights(tmp_path / "file.pth", "resnet8", tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, resnet_jax.load(tmp_path / "a").variables, dict(variables))
    truncated = (tmp_path / "file.pth").read_bytes()[:5000]
    (tmp_path / "file.pth").write_bytes(truncated)
    refused(tmp_path / "file.pth")
    torch.save([1, 2], tmp_path / "file.pt")
    assert "holds a list, not a state_dict" in refused(tmp_path / "file.pt")
    torch.save({"epoch": 3}, tmp_path / "file.th")
    assert "is no state_dict of tensors; found also: epoch" in refused(tmp_path / "file.th")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("linear.weight", np.float32(1), r"linear.weight, the last layer, has shape \(\), not \(classes, inputs\)"),
        ("linear.weight", np.zeros((0, 64), np.float32), r"linear.weight, the last layer, has shape \(0, 64\)"),
        ("bn1.weight", np.full(16, np.nan, np.float32), "tensors with numbers that are not finite: bn1.weight"),
        ("bn1.weight", np.full(16, 1e300), "tensors with numbers that are not finite: bn1.weight"),
        ("bn1.weight", np.zeros(16, np.complex64), "the tensor 'bn1.weight' holds complex64, no real numbers"),
    ],
)
def test_tensors_that_no_network_can_use(resnet8, tmp_path, name, array, message):
    safetensors.numpy.save_file({**read_tensors(resnet8[0]), name: np.asarray(array)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"x.safetensors.*{message}"):
        import_weights(tmp_path / "x.safetensors", "resnet8", tmp_path / "run")


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_pytorch_tensors_that_are_no_plain_ones(tmp_path, kind):
    torch = pytest.importorskip("torch", reason="writing .pth needs torch")
    tensor = torch.ones(3).to_sparse() if kind == "sparse" else torch.ones(1, device="meta")
    torch.save({"conv1.weight": tensor}, tmp_path / "x.pth")
    assert "x.pth holds other than plain tensors: " in refused(tmp_path / "x.pth")
    torch.save({5: torch.ones(1)}, tmp_path / "y.pth")
    assert "is no state_dict of tensors; found also: 5" in refused(tmp_path / "y.pth")


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("none.safetensors", "resnet8", "no file"),
        ("none.caffemodel", "resnet50", "No such file"),
        ("file.h5", "resnet8", "unknown kind of file"),
        ("file.safetensors", "resnet9", "depth must be 6n"),
        ("file.safetensors", "alexnet", "--model: unknown model 'alexnet'"),
        ("file.safetensors", "resnet14", "missing: layer1.1"),
        ("file.safetensors", "resnet50", "has no tensor fc.weight|missing"),
    ],
)
def test_mistakes_of_an_import(resnet8, tmp_path, name, model, message):
    for suffix in ("safetensors", "h5"):
        (tmp_path / f"file.{suffix}").write_bytes(resnet8[0].read_bytes())
    assert re.search(message, refused(tmp_path / name, model))


def test_an_existing_folder_is_not_overwritten(resnet8, tmp_path):
    with pytest.raises(UserError, match="exists; choose another --out"):
        import_weights(resnet8[0], "resnet8", tmp_path)


def test_an_export_that_cannot_be_written(resnet8, tmp_path):
    import_weights(resnet8[0], "resnet8", tmp_path / "run")
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "x.safetensors")
    with pytest.raises(UserError, match="cannot write"):
        main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", out])
