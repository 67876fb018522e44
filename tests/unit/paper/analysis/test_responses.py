"""Fig. 7: the responses are taken in the right places, of every image once, and lose no digits."""

import dataclasses
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import Config, DataConfig, ModelConfig
from resnet_jax.data import load_dataset
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.models import VGG, BatchNorm, ResNet, build_model, cifar_resnet, create_model, stack_blocks
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.paper.analysis.responses import (
    Responses,
    by_layer,
    make_moments,
    measure,
    measure_workdir,
    read_responses,
    to_table,
)
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import create_train_state

IMAGES = np.random.RandomState(0).randint(0, 256, (7, 16, 16, 3)).astype(np.uint8)
BASIC = ["stem_conv", *(f"stage{s}_block1/conv{c}" for s in (1, 2, 3) for c in (1, 2))]  # of depth 8


def preprocess(images):
    return (images.astype(jnp.float32) - 120) / 60


def abstract_variables(model):
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def random_variables(model):
    """Return variables with everything of BN and every bias random: no two places of a layer have the same std."""
    random = np.random.RandomState(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            values = random.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        else:
            values = random.uniform(*((-1, 1) if path[-1].key in ("bias", "mean") else (0.5, 2)), leaf.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


def expected_stds(model, variables, layers):
    """Keep all outputs of BN, or of convolutions where there is none, and take the std of each in float64."""
    apply = partial(
        model.apply,
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, (BatchNorm, nn.Conv)),
        mutable=["intermediates"],
    )
    _, kept = jax.jit(apply)(variables, preprocess(jnp.asarray(IMAGES)))
    stds = []
    for layer in layers:
        outputs = kept["intermediates"]
        for name in (layer if isinstance(model, VGG) else layer.replace("conv", "bn")).split("/"):
            outputs = outputs[name]
        stds.append(np.asarray(outputs["__call__"][0], np.float64).std())
    return stds


def small(stem, block, blocks, shortcut="B", **options):
    return ResNet(stem, block, blocks, filters=(4, 8), num_classes=3, shortcut=shortcut, **options)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (cifar_resnet(8, shortcut="none"), BASIC),
        (small("cifar", "basic", (1, 1), shortcut="A", remat=True), BASIC[:5]),
        (small("cifar", "basic", (1, 1), dtype=jnp.bfloat16), BASIC[:5]),
        (
            small("imagenet", "bottleneck", (2, 1)),
            ["stage1_block1/conv2", "stage1_block2/conv2", "stage2_block1/conv2"],
        ),
        (VGG(convs=(2, 1, 0, 0, 0), num_classes=3, backbone_only=True), ["conv1_1", "conv1_2", "conv2_1"]),
    ],
    ids=["plain", "A+remat", "B+bfloat16", "bottleneck", "vgg"],
)
def test_the_std_of_every_3x3_layer(model, layers):
    variables = random_variables(model)
    responses = measure(model, variables, preprocess, IMAGES, batch_size=4, step=3)
    assert responses.layers == tuple(layers)
    assert (responses.step, responses.images) == (3, 7)
    tolerance = 1e-5 if model.dtype == jnp.float32 else 2e-3  # what another order of rounding to bfloat16 does
    np.testing.assert_allclose(responses.stds, expected_stds(model, variables, layers), rtol=tolerance)


def test_padding_of_the_last_batch_does_not_count():
    model = small("cifar", "basic", (1, 1))
    variables = random_variables(model)
    at_once, in_batches = (measure(model, variables, preprocess, IMAGES, batch_size=size) for size in (100, 4))
    np.testing.assert_allclose(in_batches.stds, at_once.stds, rtol=1e-6)
    images = preprocess(jnp.asarray(IMAGES[:4]))
    moments = jax.jit(make_moments(model))
    mask = jnp.arange(4) < 3
    zeros, nans = (moments(variables, images.at[3].set(value), mask) for value in (0, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, zeros, nans)
    assert zeros["stem_conv"]["moments"].count == 3 * 16 * 16
    with pytest.raises(ValueError, match="no images"):
        measure(model, variables, preprocess, IMAGES[:0])


def test_no_digits_are_lost_far_from_zero():
    model = VGG(convs=(1, 0, 0, 0, 0), num_classes=3, backbone_only=True)
    variables = random_variables(model)
    bias = variables["params"]["conv1_1"]["bias"]
    bias[:] = 3000  # E[x^2] - E[x]^2 in float32 would leave two digits of a variance near 1
    responses = measure(model, variables, preprocess, IMAGES, batch_size=4)
    np.testing.assert_allclose(responses.stds, expected_stds(model, variables, ["conv1_1"]), rtol=1e-5)


@pytest.mark.parametrize(("stem", "block"), [("cifar", "basic"), ("imagenet", "bottleneck")])
def test_blocks_in_a_loop_respond_alike(stem, block):
    model = small(stem, block, (3, 2))
    variables = random_variables(model)
    single = measure(model, variables, preprocess, IMAGES, batch_size=4)
    scanned = measure(model.clone(scan_blocks=True), stack_blocks(variables), preprocess, IMAGES, batch_size=4)
    assert scanned.layers == single.layers
    np.testing.assert_allclose(scanned.stds, single.stds, rtol=1e-5)


def abstract_moments(model):
    images, mask = jnp.zeros((2, 32, 32, 3)), jnp.ones(2, bool)
    return jax.eval_shape(make_moments(model), abstract_variables(model), images, mask)


def names(model):
    return list(by_layer(jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract_moments(model))))


def test_moments_of_bfloat16_networks_are_float32():
    for leaf in jax.tree.leaves(abstract_moments(small("cifar", "basic", (2, 1), dtype=jnp.bfloat16))):
        assert leaf.dtype in (jnp.int32, jnp.float32)


def test_layers_are_in_forward_order():
    layers = names(cifar_resnet(62))  # ten blocks a stage
    assert len(layers) == 61  # 6n+1
    assert layers[:3] == ["stem_conv", "stage1_block1/conv1", "stage1_block1/conv2"]
    assert layers[17:20] == ["stage1_block9/conv1", "stage1_block9/conv2", "stage1_block10/conv1"]
    assert layers[20:22] == ["stage1_block10/conv2", "stage2_block1/conv1"]
    assert names(cifar_resnet(62, scan_blocks=True)) == layers
    assert len(names(cifar_resnet(1202, scan_blocks=True))) == 1201
    assert names(create_model("resnet50"))[-1] == "stage4_block3/conv2"
    assert len(names(create_model("vgg16"))) == 13


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Untrained weights, as a run leaves them, for the 360 test images of digits."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    config = Config(model=ModelConfig(depth=8, scan_blocks=True), data=DataConfig(name="digits", eval_batch_size=100))
    dataset = load_dataset("digits", "data")
    model = build_model(config.model, dataset.num_classes)
    state = create_train_state(build_optimizer(config.optim, build_schedule(config.optim, 1)), random_variables(model))
    preprocessing = Preprocessing(np.full(3, 0.5, np.float32), np.ones(3, np.float32))
    create_workdir(path, config, Inputs(dataset.image_shape, dataset.class_names, preprocessing), state)
    return path


def test_a_work_directory_gets_its_file(workdir):
    assert read_responses(workdir) is None
    responses = measure_workdir(workdir, data_dir="elsewhere")
    assert read_responses(workdir) == responses
    assert (responses.step, responses.images, list(responses.layers)) == (0, 360, BASIC)
    assert not list(workdir.glob("*.new"))
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        measure_workdir(workdir, step=5)
    (workdir / "responses.json.new").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*responses.json: Is a directory"):
        measure_workdir(workdir)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        '{"step": 1, "images": 2, "layers": ["a"], "stds": []}',
        "\xff",
        '{"step": 1, "images": 2, "layers": ["a"], "stds": [-1]}',
        '{"step": 1, "images": 2, "layers": ["a"], "stds": [NaN]}',
        '{"step": 1, "images": 2, "layers": [], "stds": []}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "responses.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="cannot read .*responses.json"):
        read_responses(tmp_path)


def test_table_and_json(tmp_path):
    responses = Responses(64000, 10000, ("stem_conv", "stage1_block1/conv1", "stage1_block1/conv2"), (0.5, 2.0, 0.25))
    assert responses.sorted_stds == (2.0, 0.5, 0.25)
    assert responses.mean_std == pytest.approx(2.75 / 3)
    (tmp_path / "responses.json").write_text(json.dumps(dataclasses.asdict(responses)))
    assert read_responses(tmp_path) == responses
    lines = to_table(responses).splitlines()
    assert lines[0].split() == ["layer", "std", "sorted"]
    assert [line.split() for line in lines[2:5]] == [
        ["1", "stem_conv", "0.5000", "2.0000"],
        ["2", "stage1_block1/conv1", "2.0000", "0.5000"],
        ["3", "stage1_block1/conv2", "0.2500", "0.2500"],
    ]
    assert lines[-1] == "mean over 3 layers: 0.9167 (10,000 images)"
