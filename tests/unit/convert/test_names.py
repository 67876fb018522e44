"""PyTorch's names and layouts: exact, and bit for bit there and back."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import create_model
from resnet_jax.convert.names import tensors_from_variables, variables_from_tensors
from resnet_jax.errors import UserError


def shapes(model, size=32):
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, size, size, 3)))


def random_variables(model):
    random = np.random.RandomState(0)
    variables = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), dict(shapes(model)))
    return {"batch_stats": {}, **variables}


@pytest.mark.parametrize(
    ("name", "options", "layout"),
    [
        ("resnet18", {}, "torchvision"),
        ("resnet34", {"shortcut": "A"}, "torchvision"),
        ("resnet50", {"num_classes": 7}, "torchvision"),
        ("resnet101", {"num_classes": 2}, "torchvision"),
        ("resnet20", {}, "cifar"),
        ("resnet56", {"shortcut": "B"}, "cifar"),
        ("plain20", {}, "cifar"),
    ],
)
def test_there_and_back_is_bit_exact(name, options, layout):
    model = create_model(name, **options)
    variables = random_variables(model)
    tensors = tensors_from_variables(variables, model, layout)
    back = variables_from_tensors(tensors, model, shapes(model), layout, "file")
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    again = tensors_from_variables(back, model, layout)
    assert tensors.keys() == again.keys()
    for key in tensors:
        np.testing.assert_array_equal(tensors[key], again[key])


def test_torchvisions_names_of_resnet50():
    names = set(tensors_from_variables(random_variables(model := create_model("resnet50")), model, "torchvision"))
    expected = {"conv1.weight", "fc.weight", "fc.bias"}
    norms = ["bn1"]
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            for number in (1, 2, 3):
                expected.add(f"layer{layer}.{block}.conv{number}.weight")
                norms.append(f"layer{layer}.{block}.bn{number}")
        expected.add(f"layer{layer}.0.downsample.0.weight")
        norms.append(f"layer{layer}.0.downsample.1")
    expected |= {f"{n}.{leaf}" for n in norms for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert names == expected


def test_torchvisions_names_of_vgg():
    small = create_model("vgg16", num_classes=2)
    names = tensors_from_variables({"params": dict(shapes_as_zeros(small)), "batch_stats": {}}, small, "torchvision")
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # ReLUs and pools take the numbers between
    expected = {f"features.{i}.{leaf}" for i in convs for leaf in ("weight", "bias")}
    expected |= {f"classifier.{i}.{leaf}" for i in (0, 3, 6) for leaf in ("weight", "bias")}
    assert set(names) == expected
    assert names["classifier.0.weight"].shape == (4096, 25088)
    vgg19 = create_model("vgg19", num_classes=2)
    tensors = tensors_from_variables({"params": dict(shapes_as_zeros(vgg19)), "batch_stats": {}}, vgg19, "torchvision")
    assert {int(m[1]) for key in tensors if (m := re.match(r"features\.(\d+)", key))} == {
        0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34,
    }  # fmt: skip


def shapes_as_zeros(model):
    """Zeros that take no memory."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes(model)["params"])


def test_layouts_of_the_tensors():
    model = create_model("resnet20", shortcut="B")
    variables = random_variables(model)
    tensors = tensors_from_variables(variables, model, "cifar")
    kernel = variables["params"]["stage2_block1"]["conv1"]["kernel"]  # [3, 3, 16, 32]
    assert tensors["layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
    assert tensors["layer2.0.conv1.weight"][5, 4, 1, 2] == kernel[1, 2, 4, 5]
    assert tensors["layer2.0.shortcut.0.weight"].shape == (32, 16, 1, 1)
    np.testing.assert_array_equal(tensors["linear.weight"], variables["params"]["fc"]["kernel"].T)
    np.testing.assert_array_equal(tensors["bn1.running_var"], variables["batch_stats"]["stem_bn"]["var"])


def test_vggs_first_dense_layer_is_flattened_in_the_other_order():
    path = ("fc6", "kernel")
    from resnet_jax.convert.names import from_torch, to_torch

    kernel = np.arange(7 * 7 * 512 * 2, dtype=np.float32).reshape(-1, 2)
    there = to_torch(path, kernel)
    # Position (h, w, c) is h*7*512 + w*512 + c here and c*49 + h*7 + w there.
    assert there[1, 3 * 49 + 2 * 7 + 5] == kernel[2 * 7 * 512 + 5 * 512 + 3, 1]
    np.testing.assert_array_equal(from_torch(path, there), kernel)


def test_every_tensor_is_used_exactly_once():
    model = create_model("resnet20")
    tensors = tensors_from_variables(random_variables(model), model, "cifar")
    tensors["bn1.num_batches_tracked"] = np.int64(3)  # a counter of PyTorch's that nothing needs
    variables_from_tensors(tensors, model, shapes(model), "cifar", "file")
    tensors["layer1.0.conv1.bias"] = np.zeros(16, np.float32)
    tensors["layer1.0.conv2.weight"] = np.zeros((16, 16, 1, 1), np.float32)
    del tensors["linear.bias"]
    message = (
        r"file does not fit the network; tensors missing: linear.bias; left over: layer1.0.conv1.bias;"
        r" of another shape: layer1.0.conv2.weight \(16, 16, 1, 1\) instead of \(16, 16, 3, 3\)"
    )
    with pytest.raises(UserError, match=message):
        variables_from_tensors(tensors, model, shapes(model), "cifar", "file")
