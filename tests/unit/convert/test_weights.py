"""Import, evaluation, fine-tuning and export of weights, with files as others write them."""

import argparse
import os
import pickle
import re
import shlex
import subprocess
import sys
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
    before, after = read_tensors(path).arrays, safetensors.numpy.load_file(tmp_path / "torch.safetensors")
    counters = {name.replace("running_mean", "num_batches_tracked") for name in before if "running_mean" in name}
    assert {(str(after[name].dtype), after[name].shape, int(after.pop(name))) for name in counters} == {
        ("int64", (), 0)
    }
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
    config = import_weights(tmp_path / "file.safetensors", name, tmp_path / "run").origin.config
    assert config.model.shortcut == shortcut
    loaded = resnet_jax.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, dict(variables))
    assert loaded.origin.inputs.class_names == ("0", "1", "2")


def test_torchvisions_layout_means_the_stride_on_the_3x3(tmp_path):
    _, variables, tensors = make_tensors("resnet18", "torchvision", num_classes=4)
    safetensors.numpy.save_file(tensors, tmp_path / "file.safetensors")
    _, found, origin = read_weights(tmp_path / "file.safetensors", "resnet18", preprocessing="none")
    config, inputs = origin.config, origin.inputs
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
    origin = read_weights(file, "resnet50", mean_file=mean_file).origin
    config, inputs = origin.config, origin.inputs
    assert (config.model.stride_on, config.model.pool_padding, config.model.shortcut) == ("1x1", "caffe", "B")
    images = np.random.RandomState(1).randint(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    # Caffe's input is the pixel minus the mean, in 0..255.
    np.testing.assert_allclose(normalize(images, *inputs.preprocessing), images - mean, atol=1e-3)
    assert read_weights(file, "resnet50", stride_on="3x3").model.stride_on == "3x3"


def test_pytorch_loads_an_export_strictly(resnet8, tmp_path):
    torch = pytest.importorskip("torch", reason="loading a state_dict needs torch")
    import_weights(resnet8[0], "resnet8", tmp_path / "run")
    main(["export", str(tmp_path / "run"), "--format", "safetensors", "--out", str(tmp_path / "out.safetensors")])
    tensors = {k: torch.from_numpy(v) for k, v in safetensors.numpy.load_file(tmp_path / "out.safetensors").items()}
    convolution = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
    stem = torch.nn.Sequential(OrderedDict(conv1=convolution, bn1=torch.nn.BatchNorm2d(16)))
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
    tensors = {name: torch.from_numpy(array) for name, array in read_tensors(path).arrays.items()}
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
    safetensors.numpy.save_file(
        {**read_tensors(resnet8[0]).arrays, name: np.asarray(array)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match=f"x.safetensors.*{message}"):
        import_weights(tmp_path / "x.safetensors", "resnet8", tmp_path / "run")


def random_state(torch):
    """Return the state_dict of the CIFAR ResNet of 8 layers, and what it is here."""
    tensors = make_tensors("resnet8", "cifar", zero_channels="both")
    return {name: torch.from_numpy(array) for name, array in tensors[2].items()}, tensors[1]


@pytest.mark.parametrize("name", ["x.pth.tar", "x.ckpt", "pytorch_model.bin", "x"])
def test_files_are_told_by_what_is_in_them(tmp_path, name):
    torch = pytest.importorskip("torch", reason="writing these needs torch")
    state, variables = random_state(torch)
    torch.save({"epoch": 90, "arch": "resnet8", "state_dict": state}, tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / name, "resnet8")[1], variables)
    safetensors.numpy.save_file({key: tensor.numpy() for key, tensor in state.items()}, tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / name, "resnet8")[1], variables)


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module._orig_mod.", "backbone.encoder.model."])
def test_what_all_names_begin_with_is_left_out(tmp_path, prefix):
    _, variables, tensors = make_tensors("resnet8", "cifar", zero_channels="both")
    safetensors.numpy.save_file({prefix + name: array for name, array in tensors.items()}, tmp_path / "x.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / "x.safetensors", "resnet8")[1], variables)


def test_one_of_several_networks_is_chosen_by_its_prefix(tmp_path):
    _, variables, tensors = make_tensors("resnet8", "cifar", zero_channels="both")
    both = {f"module.encoder_q.{name}": array for name, array in tensors.items()}
    both |= {f"module.encoder_k.{name}": 0 * array for name, array in tensors.items()}
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(both, file)
    found = read_weights(file, "resnet8", prefix="module.encoder_q.")[1]
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    for model in ("resnet8", None):
        message = refused(file, model)
        assert "has no tensor conv1.weight, the first layer; it has encoder_" in message
        assert message.endswith("; --prefix takes one of several networks")
    assert "--prefix encoder: no tensor of" in refused(file, prefix="encoder")


def test_moving_averages_beside_the_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="writing .pth needs torch")
    state, variables = random_state(torch)
    file, said = tmp_path / "x.pth", []
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": other, "model_ema": {f"module.{name}": tensor for name, tensor in state.items()}}, file)
    found = read_weights(file, "resnet8", averaged=True, say=said.append)[1]
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert said[0] == "weights: model_ema"
    plain = read_weights(file, "resnet8", say=said.append)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 1, rtol=1e-6), plain, variables)
    assert "weights: model (--weights ema takes model_ema)" in said
    torch.save({"n_averaged": torch.tensor(5), **{f"module.{name}": tensor for name, tensor in state.items()}}, file)
    jax.tree.map(np.testing.assert_array_equal, read_weights(file, "resnet8")[1], variables)
    assert "--weights ema: " in refused(file, averaged=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_numbers_of_other_lengths(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="writing bfloat16 needs torch")
    import safetensors.torch

    state, variables = random_state(torch)
    shorter = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    safetensors.torch.save_file(shorter, tmp_path / "x.safetensors")
    expected = read_weights(tmp_path / "x.safetensors", "resnet8")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), expected, variables)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(expected))


def test_the_way_out_of_a_refused_checkpoint_works(tmp_path):
    torch = pytest.importorskip("torch", reason="writing .pth needs torch")
    state, variables = random_state(torch)
    for number, content in enumerate(
        (
            {"model": state, "args": argparse.Namespace(lr=0.1)},
            {"state_dict": state, "args": argparse.Namespace(lr=0.1)},
        )
    ):
        file = tmp_path / f"{number}.pth"
        torch.save(content, file)
        message = refused(file)
        assert "it holds argparse.Namespace beside tensors, and reading that may run code. If you trust it:" in message
        command = shlex.split(message.partition("If you trust it: ")[2])
        subprocess.run([sys.executable, *command[1:]], check=True)
        found = read_weights(tmp_path / f"{number}.tensors.pth", "resnet8")[1]
        jax.tree.map(np.testing.assert_array_equal, found, variables)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    assert "it holds torch.nn.modules.linear.Linear beside tensors" in refused(tmp_path / "whole.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "script.pt is TorchScript, a program. If you trust it: python -c" in refused(tmp_path / "script.pt")


def test_an_export_is_known_by_any_name(tmp_path):
    file = tmp_path / "weights.bin"
    assert main(["export", "cifar10_plain20", "--format", "safetensors", "--out", str(file)]) == 0
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) == 0
    assert resnet_jax.load(tmp_path / "run").origin.config.model.shortcut == "none"
    message = "weights.bin was exported from here and says it itself: leave out --mean, --weights ema"
    with pytest.raises(UserError, match=message):
        read_weights(file, mean=(0.0, 0.0, 0.0), averaged=True)
    with pytest.raises(UserError, match="weights.bin holds plain20 by its own word: leave out --model"):
        read_weights(file, "resnet20")


def test_a_head_in_a_sequential(tmp_path):
    _, variables, tensors = make_tensors("resnet18", "torchvision", num_classes=4)
    inside = {name.replace("fc.", "fc.1."): array for name, array in tensors.items()}
    safetensors.numpy.save_file(inside, tmp_path / "x.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / "x.safetensors", "resnet18")[1], variables)


def test_mean_and_std_of_ones_own(resnet8, tmp_path, capsys):
    arguments = ["import", str(resnet8[0]), "--model", "resnet8", "--mean", ".1", ".2", ".3", "--std", "1", "1", "0.5"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "pixels in [0, 1]: mean 0.1 0.2 0.3, std 1 1 0.5\n" in capsys.readouterr().out
    mean, std = resnet_jax.load(tmp_path / "run").origin.inputs.preprocessing
    np.testing.assert_array_equal((mean, std), np.float32([[0.1, 0.2, 0.3], [1, 1, 0.5]]))
    assert "the std of the images must be above 0" in refused_copy(resnet8[0], tmp_path, std=(1.0, 0.0, 1.0))


def refused_copy(file, folder, **options):
    copy = folder / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    (folder / "run").rename(folder / "other")
    return refused(copy, **options)


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
        ("text.pt2", "resnet8", "text.pt2 is no file of weights that is known"),
        ("keras.h5", "resnet8", "keras.h5 is damaged or no HDF5 of Keras"),
        ("file.safetensors", "resnet9", "depth must be 6n"),
        ("file.safetensors", "alexnet", "--model: unknown model 'alexnet'"),
        ("file.safetensors", "resnet8C", "--model resnet8C: .*/file.safetensors has shortcuts of option A"),
        ("file.safetensors", "resnet14", "missing: layer1.1"),
        ("file.safetensors", "resnet50", "has no tensor fc.weight|missing"),
    ],
)
def test_mistakes_of_an_import(resnet8, tmp_path, name, model, message):
    (tmp_path / "file.safetensors").write_bytes(resnet8[0].read_bytes())
    (tmp_path / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "text.pt2").write_bytes(b"some text, which is no file of weights")
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
