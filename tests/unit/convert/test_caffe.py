"""The authors' Caffe models: every value lands where it belongs, and every bad file is one clear line.

All files are written here byte by byte, so a wrong field number in the reader cannot cancel out.
"""

from __future__ import annotations

import copy
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from resnet_jax.convert.caffe import message_classes, read_caffemodel, read_mean
from resnet_jax.errors import UserError

EPS = 1e-5
Layers = dict[str, tuple[str, list[np.ndarray]]]  # type and blobs
LAYER, V1_LAYER = 100, 2  # the second before 2015


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    head = b""
    while value > 127:
        head, value = head + bytes([value & 127 | 128]), value >> 7
    return head + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    """A field of a message: wire type 0 for an integer, 2 for bytes, text, messages and packed lists."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def floats(array: np.ndarray) -> bytes:
    return field(5, array.astype("<f4").tobytes())


def blob(array: np.ndarray) -> bytes:
    """A BlobProto as Caffe has written it since 2015; field 6, the gradient, is to be skipped."""
    return field(7, field(1, b"".join(map(varint, array.shape)))) + floats(array) + field(6, b"\0\0\xc0\x7f")


def old_blob(array: np.ndarray) -> bytes:
    """A BlobProto of before 2015: always four axes."""
    shape = (1,) * (4 - array.ndim) + array.shape
    return b"".join(field(number, length) for number, length in enumerate(shape, 1)) + floats(array)


def unpacked_blob(array: np.ndarray) -> bytes:
    """A BlobProto whose lists are one field an element: protobuf allows readers to meet it."""
    shape = field(7, b"".join(field(1, length) for length in array.shape))
    return shape + b"".join(b"\x2d" + value.tobytes() for value in array.astype("<f4").ravel())


def layer(name: str, kind: str, blobs: list[bytes]) -> bytes:
    skipped = field(3, b"below") + field(4, b"above") + field(10, 1) + field(139, field(1, 1) + b"\x1d\xac\xc5\x27\x37")
    return field(1, name.encode()) + field(2, kind.encode()) + skipped + b"".join(field(7, each) for each in blobs)


def caffemodel(layers: Layers, write: Callable[[np.ndarray], bytes] = blob) -> bytes:
    head = field(1, b"ResNet") + field(3, b"data") + field(4, 1) + field(4, 3)
    return head + b"".join(
        field(LAYER, layer(name, kind, [write(array) for array in blobs])) for name, (kind, blobs) in layers.items()
    )


def convolution(
    random: np.random.RandomState, name: str, outputs: int, inputs: int, size: int, factor: float
) -> Layers:
    def draw(*shape: int) -> np.ndarray:
        return random.randn(*shape).astype(np.float32)

    caffe = f"res{name}" if name[0] != "_" else name[1:]
    statistics = [draw(outputs), draw(outputs) ** 2 + 0.1, np.array([factor], np.float32)]
    return {
        caffe: ("Convolution", [draw(outputs, inputs, size, size)]),
        f"bn{name}": ("BatchNorm", statistics),
        f"scale{name}": ("Scale", [draw(outputs), draw(outputs)]),
        f"{caffe}_relu": ("ReLU", []),
    }


BLOCKS = ("2a", "2b", "3a", "3b1", "4a", "4b1", "5a", "5b")  # two a stage, long-stage names in two stages


def network() -> Layers:
    """A bottleneck ResNet with the authors' names: conv1 has a bias, and BN factors are other than 1."""
    random = np.random.RandomState(0)
    layers = convolution(random, "_conv1", 5, 3, 7, factor=4)
    layers["conv1"][1].append(random.randn(5).astype(np.float32))
    inputs = 5
    for block in BLOCKS:
        middle, outputs = int(block[0]), int(block[0]) + 4
        if block[1] == "a":
            layers |= convolution(random, f"{block}_branch1", outputs, inputs, 1, factor=1)
        layers |= convolution(random, f"{block}_branch2a", middle, inputs, 1, factor=999.5)
        layers |= convolution(random, f"{block}_branch2b", middle, middle, 3, factor=0)
        layers |= convolution(random, f"{block}_branch2c", outputs, middle, 1, factor=1)
        layers[f"res{block}"] = ("Eltwise", [])
        inputs = outputs
    fc = [random.randn(10, inputs).astype(np.float32), random.randn(10).astype(np.float32)]
    return layers | {"pool5": ("Pooling", []), "fc1000": ("InnerProduct", fc), "prob": ("Softmax", [])}


def save(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    path = folder / "net.caffemodel"
    path.write_bytes(content)
    return path


def error_of(read: Callable[[pathlib.Path], Any], path: pathlib.Path) -> str:
    """The message of the UserError; it names the file and is one line."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def torch_names(caffe: str) -> tuple[str, str]:
    """Ours of `3b1_branch2c`: layer2.1.conv3, layer2.1.bn3."""
    block, branch = caffe.split("_branch")
    ours = f"layer{int(block[0]) - 1}.{0 if block[1] == 'a' else 1}."
    if branch == "1":
        return ours + "downsample.0", ours + "downsample.1"
    number = {"2a": 1, "2b": 2, "2c": 3}[branch]
    return f"{ours}conv{number}", f"{ours}bn{number}"


@pytest.mark.parametrize("write", [blob, old_blob, unpacked_blob])
def test_every_value_lands_where_it_belongs(tmp_path: pathlib.Path, write: Callable[[np.ndarray], bytes]) -> None:
    layers = network()
    weights = read_caffemodel(save(tmp_path, caffemodel(layers, write)))

    expected = {"fc.weight": layers["fc1000"][1][0], "fc.bias": layers["fc1000"][1][1]}
    for name in layers:
        if not name.startswith("scale"):
            continue
        caffe = name.removeprefix("scale")
        conv, bn = ("conv1", "bn1") if caffe == "_conv1" else torch_names(caffe)
        kernel = layers["conv1" if caffe == "_conv1" else f"res{caffe}"][1]
        mean, variance, factor = layers[f"bn{caffe}"][1]
        share = 1 / factor if factor else 0 * factor
        expected[f"{conv}.weight"] = kernel[0][:, [2, 1, 0]] if conv == "conv1" else kernel[0]
        expected[f"{bn}.weight"], expected[f"{bn}.bias"] = layers[name][1]
        expected[f"{bn}.running_mean"] = mean * share - (kernel[1] if len(kernel) == 2 else 0)
        expected[f"{bn}.running_var"] = variance * share
    assert weights.keys() == expected.keys()
    assert len(weights) == 5 * (1 + 3 * len(BLOCKS) + 4) + 2
    for name, array in weights.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_names_and_shapes(tmp_path: pathlib.Path) -> None:
    weights = read_caffemodel(save(tmp_path, caffemodel(network())))
    assert weights["conv1.weight"].shape == (5, 3, 7, 7)
    assert weights["layer1.0.downsample.0.weight"].shape == (6, 5, 1, 1)
    assert weights["layer2.1.conv2.weight"].shape == (3, 3, 3, 3)  # res3b1_branch2b
    assert weights["layer4.1.bn3.running_var"].shape == (9,)
    assert "layer2.1.downsample.0.weight" not in weights
    assert not weights["layer3.0.bn2.running_mean"].any()  # a factor of 0


@pytest.mark.parametrize("blocks", [["a", "b", "c", "d"], ["a", *(f"b{number}" for number in range(1, 36))]])
def test_blocks_are_counted_in_the_file(tmp_path: pathlib.Path, blocks: list[str]) -> None:
    layers, random = network(), np.random.RandomState(1)
    layers = {name: value for name, value in layers.items() if "4b1" not in name}
    for block in blocks[:0:-1]:  # the last one first: the names decide, not the order
        for branch in ("2a", "2b", "2c"):
            layers |= convolution(random, f"4{block}_branch{branch}", 2, 2, 1, factor=1)
    weights = read_caffemodel(save(tmp_path, caffemodel(layers)))
    found = {name.split(".")[1] for name in weights if name.startswith("layer3.")}
    assert found == {str(index) for index in range(len(blocks))}
    last = layers[f"res4{blocks[-1]}_branch2b"][1][0]
    np.testing.assert_array_equal(weights[f"layer3.{len(blocks) - 1}.conv2.weight"], last)


def convolve(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """[N, I, H, W] and [O, I, 7, 7] to [N, O, H/2, W/2]: pad 3, stride 2, in float64."""
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (3, 3), (3, 3)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(2, 3))[:, :, ::2, ::2]
    return np.einsum("nihwyx,oiyx->nohw", windows, kernel)


def normalise(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return (x - mean[:, None, None]) / np.sqrt(variance[:, None, None] + EPS)


def test_conv1_of_rgb_is_caffes_of_bgr(tmp_path: pathlib.Path) -> None:
    layers = network()
    rgb = np.random.RandomState(2).uniform(-120, 130, (2, 3, 12, 12))

    kernel, bias = layers["conv1"][1]
    mean, variance, factor = layers["bn_conv1"][1]
    gamma, beta = layers["scale_conv1"][1]
    caffe = convolve(rgb[:, [2, 1, 0]], kernel) + bias[:, None, None]
    caffe = normalise(caffe, mean / factor, variance / factor) * gamma[:, None, None] + beta[:, None, None]

    weights = read_caffemodel(save(tmp_path, caffemodel(layers)))
    ours = normalise(convolve(rgb, weights["conv1.weight"]), weights["bn1.running_mean"], weights["bn1.running_var"])
    ours = ours * weights["bn1.weight"][:, None, None] + weights["bn1.bias"][:, None, None]

    assert np.abs(bias).min() > 0.01  # it matters
    np.testing.assert_allclose(ours, caffe, rtol=1e-5, atol=1e-4)  # values are around 1,000


def test_conv1_needs_no_bias(tmp_path: pathlib.Path) -> None:
    layers = network()
    del layers["conv1"][1][1]  # as in ResNet-101 and 152
    weights = read_caffemodel(save(tmp_path, caffemodel(layers)))
    np.testing.assert_array_equal(weights["bn1.running_mean"], layers["bn_conv1"][1][0] / 4)


def rename(old: str, new: str) -> Callable[[Layers], None]:
    return lambda layers: layers.update({new: layers.pop(old)})


def set_blob(name: str, index: int, *shape: int) -> Callable[[Layers], None]:
    return lambda layers: layers[name][1].__setitem__(index, np.ones(shape, np.float32))


class FewerValues(np.ndarray):
    """Is written without its last values."""

    def tobytes(self, *_: Any) -> bytes:
        return np.asarray(self)[:-1].tobytes()


BAD_LAYERS: dict[str, tuple[Callable[[Layers], Any], str]] = {
    "no BN": (lambda layers: layers.pop("bn2b_branch2a"), "bn2b_branch2a is missing"),
    "no Scale": (lambda layers: layers.pop("scale3b1_branch2c"), "scale3b1_branch2c is missing"),
    "no projection": (
        lambda layers: [layers.pop(f"{kind}5a_branch1") for kind in ("res", "bn", "scale")],
        "res5a_branch1 is missing",
    ),
    "another classifier": (rename("fc1000", "fc3\n"), "fc1000 is missing"),
    "one more layer": (lambda layers: layers.update(fc2=layers["fc1000"]), "unknown layer 'fc2'"),
    "no blobs": (lambda layers: layers["res2a_branch2a"][1].clear(), "res2a_branch2a is missing"),
    "fused BN": (lambda layers: layers["bn2a_branch1"][1].pop(), "bn2a_branch1 has 2 blobs, not 3"),
    "matrix for a conv": (set_blob("res2a_branch1", 0, 6, 5), "res2a_branch1: a blob of shape 6x5, expected 4 axes"),
    "too few values": (
        lambda layers: layers["fc1000"][1].__setitem__(1, np.ones(10).view(FewerValues)),
        "fc1000: cannot reshape array",
    ),
    "no filters": (set_blob("res2a_branch1", 0, 0, 5, 1, 1), "res2a_branch1: a blob of shape 0x5x1x1, expected"),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layers(tmp_path: pathlib.Path, case: str) -> None:
    spoil, problem = BAD_LAYERS[case]
    layers = copy.deepcopy(network())
    spoil(layers)
    message = error_of(read_caffemodel, save(tmp_path, caffemodel(layers)))
    assert message.split(": ", 2)[2].startswith(problem)


def test_layers_without_weights_may_have_any_name(tmp_path: pathlib.Path) -> None:
    layers = network()
    layers["spare"] = layers.pop("res2b_branch2a_relu")
    read_caffemodel(save(tmp_path, caffemodel(layers)))


@pytest.mark.parametrize(
    ("renamed", "found"), [({"3b1": "3b2"}, "a, b2"), ({"3a": "3b"}, "b, b1"), ({"3a": "3x", "3b1": "3y"}, "x, y")]
)
def test_blocks_follow_each_other(tmp_path: pathlib.Path, renamed: dict[str, str], found: str) -> None:
    layers = network()
    for old, new in renamed.items():
        layers = {name.replace(old, new): value for name, value in layers.items()}
    message = error_of(read_caffemodel, save(tmp_path, caffemodel(layers)))
    assert f"blocks of res3: expected a, b, c, ... or a, b1, b2, ...; found {found}" in message


def test_other_networks(tmp_path: pathlib.Path) -> None:
    """VGG's files have the layers of before 2015."""
    old = field(4, b"conv1_1") + field(5, 4) + field(6, old_blob(np.ones((2, 3, 3, 3))))
    message = error_of(read_caffemodel, save(tmp_path, field(V1_LAYER, old)))
    assert "no layer with weights as Caffe writes them since 2015; expected a .caffemodel of the authors" in message
    vgg = {"conv1_1": ("Convolution", [np.ones((2, 3, 3, 3))])}
    message = error_of(read_caffemodel, save(tmp_path, caffemodel(vgg)))
    assert "not the layers of the authors' ResNet-50, 101 or 152: blocks of res2" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no layer with weights"),
        (field(1, b"net") + field(LAYER, layer("conv1", "Convolution", [])), "no layer with weights"),
        (b'name: "ResNet-50"\ninput: "data"\n', "damaged"),
        (b"<!DOCTYPE html><html>", "damaged"),
        (field(LAYER, layer("conv1", "Convolution", [field(5, bytes(7))])), "damaged"),
        (caffemodel(network())[:-100], "damaged or cut short"),
    ],
    ids=["empty", "no weights", "a prototxt", "a page", "broken float", "cut short"],
)
def test_other_and_damaged_files(tmp_path: pathlib.Path, content: bytes, problem: str) -> None:
    path = save(tmp_path, content)
    assert problem in error_of(read_caffemodel, path)
    error_of(read_mean, path)


@pytest.mark.parametrize("read", [read_caffemodel, read_mean])
def test_files_that_cannot_be_read(tmp_path: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> None:
    assert "No such file" in error_of(read, tmp_path / "absent.caffemodel")
    assert "Is a directory" in error_of(read, tmp_path)


def test_without_protobuf_the_way_out_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message_classes.cache_clear()
    monkeypatch.setitem(sys.modules, "google.protobuf.descriptor_pb2", None)
    with pytest.raises(UserError, match=r"needs protobuf, of the extra \[convert\]: pip install protobuf"):
        read_mean(save(tmp_path, b""))


@pytest.mark.parametrize("write", [blob, old_blob])
@pytest.mark.parametrize("shape", [(1, 3, 4, 6), (3, 4, 6)])
def test_mean(tmp_path: pathlib.Path, write: Callable[[np.ndarray], bytes], shape: tuple[int, ...]) -> None:
    bgr = np.random.RandomState(5).uniform(90, 130, shape).astype(np.float32)
    mean = read_mean(save(tmp_path, write(bgr)))
    assert mean.shape == (4, 6, 3)
    assert mean.dtype == np.float32
    planes = bgr.reshape(3, 4, 6)
    assert mean[1, 2].tolist() == [planes[2, 1, 2], planes[1, 1, 2], planes[0, 1, 2]]
    np.testing.assert_array_equal(mean[..., 0], planes[2])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (blob(np.ones((2, 3, 4, 4))), "not a mean image of pixels from 0 to 255: a blob of shape 2x3x4x4"),
        (blob(np.ones((2, 4, 4))), "not a mean image of pixels from 0 to 255: 2 planes"),
        (blob(np.full((3, 2, 2), 300)), "values from 300 to 300"),
        (blob(np.full((3, 2, 2), -1)), "values from -1 to -1"),
        (blob(np.full((3, 2, 2), math.nan)), "values from nan to nan"),
        (blob(np.ones((3, 2, 2)))[:-30], "damaged or cut short"),
    ],
)
def test_bad_means(tmp_path: pathlib.Path, content: bytes, problem: str) -> None:
    assert problem in error_of(read_mean, save(tmp_path, content))


def test_a_model_is_no_mean(tmp_path: pathlib.Path) -> None:
    assert "not a mean image" in error_of(read_mean, save(tmp_path, caffemodel(network())))
