"""Weights whose tensors have the names of transformers, detectron2, Caffe2 and Keras, and networks in parts."""

import collections
import io
import json
import pickle
import re
import zipfile

import h5py
import jax
import numpy as np
import pytest
import safetensors.numpy

import resnet_jax
from resnet_jax import create_model
from resnet_jax.cli.commands import main
from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.convert.names import tensors_from_variables
from resnet_jax.convert.weights_in import read_weights
from resnet_jax.errors import UserError
from resnet_jax.inference.load import adopt_weights, check_same_network
from resnet_jax.models import abstract_variables, build_model


def make_tensors(name, layout="torchvision", channels=3, **options):
    """Return random variables of a network, and their tensors in torchvision's names."""
    model, random = create_model(name, **options), np.random.default_rng(0)
    shapes = abstract_variables(model, (32, 32, channels))
    variables = jax.tree.map(lambda leaf: random.uniform(0.05, 0.1, leaf.shape).astype(np.float32), shapes)
    return variables, tensors_from_variables(variables, model, layout)


def assert_equal(found, expected, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 0, **tolerances}), found, expected)


def parts(name):
    """Take a name of torchvision's apart: stage (0: the stem), block, number in it (0: the shortcut), is BN, leaf."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layer"):
        return 0, 0, 1, module == "bn1", leaf
    stage, block, *rest = module.split(".")
    number = 0 if rest[0] == "downsample" else int(rest[0][-1])
    return int(stage[5:]), int(block), number, rest[-1] == "1" or rest[0].startswith("bn"), leaf


def hugging_faces(name):
    """Of a tensor of torchvision's, as transformers' ResNetForImageClassification has it."""
    if name.startswith("fc."):
        return name.replace("fc.", "classifier.1.")
    stage, block, number, is_bn, leaf = parts(name)
    kind = "normalization" if is_bn else "convolution"
    if not stage:
        return f"resnet.embedder.embedder.{kind}.{leaf}"
    layer = f"layer.{number - 1}" if number else "shortcut"
    return f"resnet.encoder.stages.{stage - 1}.layers.{block}.{layer}.{kind}.{leaf}"


def detectron2s(name):
    if name.startswith("fc."):
        return name.replace("fc.", "stem.fc.")
    stage, block, number, is_bn, leaf = parts(name)
    layer = f"conv{number}" if number else "shortcut"
    return f"{f'res{stage + 1}.{block}' if stage else 'stem'}.{layer}{'.norm' * is_bn}.{leaf}"


def caffe2s(name):
    leaf = {"weight": "gamma", "bias": "beta"}
    if name.startswith("fc."):
        return f"fc1000_{name[3]}"
    stage, block, number, is_bn, last = parts(name)
    layer = f"res{stage + 1}_{block}_branch{f'2{chr(96 + number)}' if number else '1'}" if stage else "conv1"
    return f"{'res_' * (not stage)}{layer}_bn_{leaf.get(last, last)}" if is_bn else f"{layer}_w"


def kerass(name):
    """Return layer and array."""
    if name.startswith("fc."):
        return "predictions", "kernel" if name.endswith("weight") else "bias"
    leaf = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    stage, block, number, is_bn, last = parts(name)
    layer = f"conv{stage + 1}_block{block + 1}_{number}" if stage else "conv1"
    return f"{layer}_{'bn' if is_bn else 'conv'}", leaf[last] if is_bn else "kernel"


def reversed_stem(tensors, stem="conv1.weight"):
    return tensors | {stem: np.ascontiguousarray(tensors[stem][:, ::-1])}


@pytest.mark.parametrize(("model", "in_bottleneck"), [("resnet18", None), ("resnet50", None), ("resnet50", True)])
def test_hugging_faces_names(tmp_path, model, in_bottleneck):
    variables, tensors = make_tensors(model, num_classes=4)
    theirs = {hugging_faces(name): array for name, array in tensors.items()}
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(theirs, file)
    labels = {3: "eel", 1: "bat", 0: "ant", 2: "cow"}
    if in_bottleneck is not None:
        config = {"downsample_in_bottleneck": in_bottleneck, "id2label": labels}
        (tmp_path / "config.json").write_text(json.dumps(config))
        preprocessor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    found = read_weights(file)  # which network it is, is in the tensors
    assert_equal(found.variables, variables)
    config, inputs = found.origin.config, found.origin.inputs
    assert (config.model.depth, config.model.stride_on) == (int(model[6:]), "1x1" if in_bottleneck else "3x3")
    assert inputs.class_names == (("ant", "bat", "cow", "eel") if in_bottleneck else ("0", "1", "2", "3"))
    assert inputs.preprocessing.mean.tolist() == pytest.approx(
        [0.5, 0.4, 0.3] if in_bottleneck else [0.485, 0.456, 0.406]
    )
    trunk = {name.removeprefix("resnet."): array for name, array in theirs.items() if name.startswith("resnet.")}
    assert_equal(read_weights(trunk, backbone=True).variables["batch_stats"], variables["batch_stats"])
    theirs["resnet.encoder.more"] = np.zeros(1, np.float32)
    with pytest.raises(UserError, match="tensors does not fit the network; tensors left over: resnet.encoder.more"):
        read_weights(theirs, model)


def test_timm_says_what_else_has_these_names(tmp_path):
    _, tensors = make_tensors("resnet18", num_classes=4)
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, file)
    described = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert read_weights(file).origin.config.data.std == (0.5, 0.25, 0.5)
    (tmp_path / "config.json").write_text(json.dumps(described | {"architecture": "resnetblur18"}))
    with pytest.raises(UserError, match="resnetblur18 by its config.json is no network of this package"):
        read_weights(file)


@pytest.mark.parametrize("form", ["detectron2", "caffe2", "caffe2 without statistics"])
def test_detectron2s_names(tmp_path, form):
    """The authors' weights for Caffe2: images are BGR in 0..255, and a bottleneck has its stride in the first 1x1."""
    variables, tensors = make_tensors("resnet50", num_classes=4)
    rename = detectron2s if form == "detectron2" else caffe2s
    theirs = {rename(name): array for name, array in reversed_stem(tensors).items()}
    if form == "caffe2 without statistics":
        theirs = {re.sub("gamma$", "s", re.sub("beta$", "b", k)): v for k, v in theirs.items() if "running" not in k}
        mean, var = (lambda x: 0 * x), (lambda x: 0 * x + 1 - 1e-5)
        change = {"mean": mean, "var": var}
        variables["batch_stats"] = jax.tree_util.tree_map_with_path(
            lambda path, leaf: change[path[-1].key](leaf), variables["batch_stats"]
        )
    file, said = tmp_path / "R-50.pkl", []
    container = {"model": collections.OrderedDict(theirs), "__author__": "Caffe2"} if form == "detectron2" else theirs
    file.write_bytes(pickle.dumps(container, protocol=2))
    found = read_weights(file, say=said.append)
    assert_equal(found.variables, variables, rtol=1e-6)
    model = found.origin.config.model
    assert (model.stride_on, model.pool_padding) == ("1x1", "torch")
    np.testing.assert_allclose(found.origin.inputs.preprocessing.mean * 255, [123.675, 116.28, 103.53], rtol=1e-5)
    np.testing.assert_allclose(found.origin.inputs.preprocessing.std * 255, 1, rtol=1e-6)
    assert "channels: from BGR to RGB" in said
    # As its converter makes them of torchvision's.
    options = {"channels": "RGB", "stride_on": "3x3", "preprocessing": "torchvision"}
    torchvisions = read_weights(
        reversed_stem(theirs, "stem.conv1.weight" if form == "detectron2" else "conv1_w"), **options
    )
    assert_equal(torchvisions.variables, variables, rtol=1e-6)
    assert torchvisions.model.stride_on == "3x3"


def test_a_pickle_is_read_only_if_it_holds_arrays_alone(tmp_path):
    file = tmp_path / "R-50.pkl"
    for content, message in (
        ({"model": pytest.importorskip}, "is refused: it holds .* beside arrays, and reading that may run code"),
        ({"model": {"a": 1}}, "holds no arrays"),
        ([1], "holds a list, not arrays by name"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=message):
            read_weights(file)
    file.write_bytes(pickle.dumps({"a": np.ones(3)})[:-20])
    with pytest.raises(UserError, match="is damaged"):
        read_weights(file)


def write_keras_2(file, theirs):
    with h5py.File(file, "w") as h5:
        for (layer, array), value in theirs.items():
            h5[f"model_weights/{layer}/{layer}/{array}:0"] = value
        h5["optimizer_weights/Adam/predictions/kernel:0"] = np.zeros((2, 2))


def write_keras_3(file, theirs):
    """As Keras 3 writes weights: layers by class and number, arrays by number, the layer's name in an attribute."""
    order = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
    layers = {}
    for (layer, array), value in theirs.items():
        layers.setdefault(layer, {})[array] = value
    with h5py.File(file, "w") as h5:
        for number, (layer, arrays) in enumerate(layers.items()):
            group = h5.create_group(f"layers/layer_{number}/vars")
            group.attrs["name"] = layer
            for position, name in enumerate(name for name in order if name in arrays):
                group[str(position)] = arrays[name]


@pytest.mark.parametrize("form", ["model.h5", "model.weights.h5", "model.keras"])
def test_keras(tmp_path, form):
    """Convolutions of Keras have a bias, and its BN another epsilon: the result is the same function."""
    variables, tensors = make_tensors("resnet50", num_classes=4)
    random, theirs = np.random.default_rng(1), {}
    for name, array in reversed_stem(tensors).items():
        layer, leaf = kerass(name)
        theirs[layer, leaf] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        if layer.endswith("conv"):
            theirs[layer, "bias"] = random.normal(size=len(array)).astype(np.float32)
    if form == "model.h5":
        write_keras_2(tmp_path / form, theirs)
    else:
        write_keras_3(content := io.BytesIO(), theirs)
        (tmp_path / form).write_bytes(content.getvalue())
        if form == "model.keras":
            with zipfile.ZipFile(tmp_path / form, "w") as archive:
                archive.writestr("config.json", "{}")
                archive.writestr("model.weights.h5", content.getvalue())
    found = read_weights(tmp_path / form)
    assert_equal(found.variables["params"], variables["params"])
    assert found.model.stride_on == "1x1"
    for block, bn, layer in (("stage2_block1", "bn2", "conv3_block1_2"), (None, "stem_bn", "conv1")):
        stats, expected = (tree["batch_stats"] for tree in (found.variables, variables))
        stats, expected = (tree[block][bn] if block else tree[bn] for tree in (stats, expected))
        np.testing.assert_allclose(
            stats["mean"], expected["mean"] - theirs[f"{layer}_conv", "bias"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            stats["var"].astype(float) + 1e-5, expected["var"].astype(float) + 1.001e-5, rtol=1e-6
        )


def test_bn_that_was_folded_is_unfolded():
    _, tensors = make_tensors("resnet18", num_classes=4)
    folded = {name: array for name, array in tensors.items() if "bn" not in name and "downsample.1" not in name}
    biases = {name: np.float32(np.arange(len(array))) for name, array in tensors.items() if name.endswith("bn1.bias")}
    folded |= {name.replace("bn", "conv"): array for name, array in biases.items()}
    others = [name for name in folded if re.search(r"(conv2|downsample\.0)\.weight", name)]
    folded |= {name.replace("weight", "bias"): np.zeros(len(folded[name]), np.float32) for name in others}
    found = read_weights(folded).variables
    np.testing.assert_array_equal(found["params"]["stage1_block1"]["bn1"]["bias"], np.arange(64))
    np.testing.assert_array_equal(found["params"]["stage1_block1"]["bn1"]["scale"], np.ones(64))
    np.testing.assert_array_equal(found["batch_stats"]["stem_bn"]["var"] + np.float32(1e-5), np.ones(64))


@pytest.mark.parametrize(
    ("prefix", "rest"),
    [
        ("", {}),  # timm with num_classes=0, Barlow Twins, DINO
        (
            "module.encoder_q.",
            {f"module.encoder_{name}": (4, 4) for name in ("q.fc.0.weight", "q.fc.2.weight", "k.conv1.weight")},
        ),  # MoCo v2
        ("module.", {"module.projection_head.0.weight": (4, 4), "module.prototypes.weight": (4, 4)}),  # SwAV
    ],
)
def test_backbones(tmp_path, prefix, rest, capsys):
    variables, tensors = make_tensors("resnet50", num_classes=4)
    trunk = {prefix + name: array for name, array in tensors.items() if not name.startswith("fc.")}
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(trunk | {name: np.ones(shape, np.float32) for name, shape in rest.items()}, file)
    chosen = prefix if "encoder" in prefix else ""
    with pytest.raises(UserError, match="has no tensor fc.weight, the last layer; .*; --backbone does without"):
        read_weights(file, prefix=chosen)
    arguments = [
        "import",
        str(file),
        "--backbone",
        "--out",
        str(tmp_path / "run"),
        *(["--prefix", chosen] * bool(chosen)),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "ResNet-50, shortcut B, stride on the 3x3, without a last layer" in out
    assert ("left out: " in out) == bool(rest)
    trained = resnet_jax.load(tmp_path / "run")
    assert trained.model.backbone_only
    expected = {name: leaves for name, leaves in variables["params"].items() if name != "fc"}
    assert_equal(trained.variables["params"], expected)
    shapes = jax.eval_shape(lambda x: trained.model.apply(trained.variables, x, train=False), np.ones((1, 64, 64, 3)))
    assert shapes["conv5_x"].shape == (1, 2, 2, 2048)
    with pytest.raises(UserError, match="a backbone has no last layer to classify with"):
        resnet_jax.predict(trained, np.zeros((1, 64, 64, 3), np.uint8))
    # A run that begins with it has a new last layer.
    config = Config(
        model=ModelConfig("imagenet", 50, "B", stride_on="3x3", pool_padding="torch"), data=DataConfig("folder")
    )
    check_same_network(trained, config)
    new = jax.tree.map(jax.numpy.zeros_like, abstract_variables_of(config, 7))
    adopted = adopt_weights(trained, new)
    assert_equal(adopted["params"] | {"fc": None}, expected | {"fc": None})
    assert adopted["params"]["fc"]["kernel"].shape == (2048, 7)


def abstract_variables_of(config, num_classes):
    model = build_model(config.model, num_classes)
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), abstract_variables(model, (32, 32, 3)))


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_numbers_of_channels(tmp_path, channels, capsys):
    variables, tensors = make_tensors("resnet18", num_classes=4, channels=channels)
    file, run = tmp_path / "x.safetensors", tmp_path / "run"
    safetensors.numpy.save_file(tensors, file)
    numbers = [str(0.1 * i) for i in range(channels)]
    assert main(["import", str(file), "--mean", *numbers, "--out", str(run)]) == 0
    trained = resnet_jax.load(run)
    assert_equal(trained.variables, variables)
    assert trained.origin.inputs.image_shape == (224, 224, channels)
    images = np.full((1, 8, 8, channels), 255, np.uint8)
    expected = 1 - 0.1 * np.arange(channels)
    np.testing.assert_allclose(resnet_jax.preprocess(images, trained.origin)[0, 0, 0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=rf"expected uint8 images \[N, H, W, {channels}\]"):
        resnet_jax.preprocess(np.zeros((1, 8, 8, 3), np.uint8), trained.origin)
    with pytest.raises(UserError, match=f"this network takes {channels} channels"):
        resnet_jax.predict(trained, np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=f"--init-from holds a network that takes {channels} channels"):
        check_same_network(trained, trained.origin.config)
    with pytest.raises(UserError, match=f"--std: .* takes {channels} channels; got 2 numbers"):
        read_weights(file, std=(1.0, 1.0))
    with pytest.raises(UserError, match=f"--preprocessing caffe is for RGB: .* takes {channels} channels"):
        read_weights(file, preprocessing="caffe")


def test_tensors_in_memory():
    torch = pytest.importorskip("torch", reason="a state_dict is PyTorch's")
    variables, tensors = make_tensors("resnet18", num_classes=4)
    state = {f"module.{name}": torch.nn.Parameter(torch.from_numpy(array)) for name, array in tensors.items()}
    trained = read_weights(state)
    assert_equal(trained.variables, variables)
    logits = trained.model.apply(trained.variables, np.ones((1, 32, 32, 3), np.float32), train=False)
    assert logits.shape == (1, 4)
    assert_equal(resnet_jax.read_weights(tensors).variables, variables)


def test_what_the_tensors_do_not_say():
    _, tensors = make_tensors("resnet8", "cifar", zero_channels="both")
    with pytest.raises(UserError, match="--model is needed, such as resnet20: .* the plain networks have the tensors"):
        read_weights(tensors)
    _, tensors = make_tensors("resnet18", num_classes=4)
    with pytest.raises(UserError, match="--model resnet26 is 6n\\+2: a CIFAR network; tensors holds one of ImageNet"):
        read_weights(tensors, "resnet26")
    _, tensors = make_tensors("resnet14", "cifar", shortcut="B")
    assert read_weights(tensors).origin.config.model.depth == 14
