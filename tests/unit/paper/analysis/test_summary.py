"""The summary of Table 1: multiply-adds, parameters and layers in forward order."""

import json

import pytest

from resnet_jax import create_model
from resnet_jax.cli.commands import main
from resnet_jax.errors import UserError
from resnet_jax.paper.analysis.summary import summarize


@pytest.mark.parametrize(
    ("name", "options", "exact", "paper"),
    [
        ("resnet18", {"shortcut": "A"}, 1_794_805_760, 1.8),
        ("resnet18", {}, 1_814_073_344, 1.8),
        ("resnet34", {"shortcut": "A"}, 3_644_493_824, 3.6),
        ("resnet101", {}, 7_570_194_432, 7.6),
        ("resnet152", {}, 11_282_415_616, 11.3),
        ("vgg19", {}, 19_632_062_464, 19.6),
    ],
)
def test_multiply_adds_of_table_1(name, options, exact, paper):
    summary = summarize(name, create_model(name, **options), 224)
    assert summary.multiply_adds == exact
    assert round(summary.multiply_adds / 1e9, 1) == paper


def test_where_the_paper_prints_something_else():
    # ResNet-50: 3.858e9, printed 3.8 and not 3.9. VGG-16: 15.3e9 are its convolutions; 15.5e9 with fc6 to fc8.
    assert summarize("resnet50", create_model("resnet50"), 224).multiply_adds == 3_857_973_248
    vgg16 = summarize("vgg16", create_model("vgg16"), 224)
    assert vgg16.multiply_adds == 15_470_264_320
    assert sum(layer.multiply_adds for layer in vgg16.layers if layer.kind == "conv") == 15_346_630_656


def test_layers_of_resnet20_in_forward_order(capsys):
    assert main(["summary", "resnet20", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["model"] == "resnet20"
    assert summary["params"] == 269_722
    assert summary["multiply_adds"] == sum(layer["multiply_adds"] for layer in summary["layers"])
    kinds = [layer["kind"] for layer in summary["layers"]]
    assert kinds == ["conv"] * 19 + ["average_pool", "dense"]
    assert summary["layers"][7] == {
        "name": "stage2_block1/conv1", "kind": "conv", "kernel": [3, 3], "stride": [2, 2],
        "padding": [[1, 1], [1, 1]], "in_features": 16, "out_features": 32, "input_shape": [32, 32, 16],
        "output_shape": [16, 16, 32], "params": 4608, "multiply_adds": 4608 * 256,
    }  # fmt: skip
    assert summary["layers"][-1]["params"] == 650
    assert summary["layers"][-1]["multiply_adds"] == 640


def test_stride_and_padding_of_resnet50():
    layers = {layer.name: layer for layer in summarize("resnet50", create_model("resnet50"), 224).layers}
    assert (layers["stem_conv"].kernel, layers["stem_conv"].stride) == ((7, 7), (2, 2))
    assert layers["pool1"].padding == ((0, 1), (0, 1))
    assert layers["stage2_block1/conv1"].stride == (2, 2)
    assert layers["stage2_block1/conv2"].stride == (1, 1)
    later = {layer.name: layer for layer in summarize("r", create_model("resnet50", stride_on="3x3"), 224).layers}
    assert later["stage2_block1/conv1"].stride == (1, 1)
    assert later["stage2_block1/conv2"].stride == (2, 2)
    assert sum(layer.multiply_adds for layer in later.values()) == 4_089_184_256


def test_parameters_of_layers_and_bn_make_the_total():
    summary = summarize("resnet18", create_model("resnet18"), 64)
    bn = 2 * sum(layer.out_features for layer in summary.layers if layer.kind == "conv")
    assert sum(layer.params for layer in summary.layers) + bn == summary.params == 11_689_512


def test_the_table_and_mistakes(capsys):
    assert main(["summary", "plain18", "--image-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "layer"
    assert lines[-1].startswith("plain18: 11,515,688 parameters, ")
    for args, message in (
        (["resnet21"], "depth must be"),
        (["resnet50", "--image-size", "16"], "--image-size must be at least 32"),
        (["plain18", "--shortcut", "A"], "no shortcut"),
        (["vgg16", "--shortcut", "A"], "shortcut"),
    ):
        with pytest.raises(UserError, match=message):
            main(["summary", *args])
