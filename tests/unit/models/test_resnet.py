"""The networks: exact parameter counts, shapes, names, shortcuts, initialization."""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_dense import random_variables

from resnet_jax import cifar_resnet, create_model
from resnet_jax.models.blocks import BasicBlock, relu_at_end
from resnet_jax.models.conv import conv
from resnet_jax.models.norm import BatchNorm


def shapes(model, size=32):
    """Shapes of all variables, without computing them."""
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, size, size, 3)))


def param_count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)["params"]))


@pytest.mark.parametrize(
    ("depth", "count"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962), (1202, 19_421_274)],
)
def test_parameter_counts_of_table_6(depth, count):
    assert param_count(create_model(f"resnet{depth}")) == count


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_plain_nets_have_exactly_the_parameters_of_the_residual_ones(depth):
    plain, residual = create_model(f"plain{depth}"), create_model(f"resnet{depth}")
    assert shapes(plain) == shapes(residual)  # "the same depth, width, and number of parameters" (Sec. 4.2)


def test_parameter_counts_of_the_projections():
    # B: 1x1 projections 16->32 and 32->64, each with BN. C: one in every block, 3 a stage.
    b = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    c = b + 3 * (16 * 16 + 2 * 16) + 2 * (32 * 32 + 2 * 32) + 2 * (64 * 64 + 2 * 64)
    assert param_count(create_model("resnet20", shortcut="B")) == 269_722 + b
    assert param_count(create_model("resnet20", shortcut="C")) == 269_722 + c


def test_number_of_classes_and_any_depth():
    assert param_count(create_model("resnet20", num_classes=100)) == 269_722 + 90 * 65
    layers = [
        path for path in flax.traverse_util.flatten_dict(shapes(cifar_resnet(26))["params"]) if path[-1] == "kernel"
    ]
    assert len(layers) == 26


def test_names_are_the_checkpoint_format():
    params = shapes(cifar_resnet(8, shortcut="B"))["params"]
    block = {"conv1", "bn1", "conv2", "bn2"}
    assert {name: set(layers) for name, layers in params.items()} == {
        "stem_conv": {"kernel"},
        "stem_bn": {"scale", "bias"},
        "stage1_block1": block,
        "stage2_block1": block | {"shortcut_conv", "shortcut_bn"},
        "stage3_block1": block | {"shortcut_conv", "shortcut_bn"},
        "fc": {"kernel", "bias"},
    }


@pytest.mark.parametrize("depth", [21, 2, 18, 0, -4])
def test_depths_that_do_not_exist(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n\+2: .* got {depth}"):
        cifar_resnet(depth)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "unknown model"),
        ("plain34A", "unknown model"),
        ("vgg16B", "unknown model"),
        ("vgg11", "depth must be 16 or 19; got 11"),
        ("densenet121", "unknown model"),
        ("resnet20x", "unknown model"),
        ("resnet21", "6n"),
        ("plain50", "the plain nets have 18 or 34 layers; got 50"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name)


def test_a_plain_net_has_no_shortcut():
    with pytest.raises(ValueError, match="no shortcut"):
        create_model("plain20", shortcut="A")


@pytest.mark.parametrize(("size", "sides"), [(32, (32, 16, 8)), (33, (33, 17, 9)), (9, (9, 5, 3))])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_features_of_every_stage(size, sides, shortcut):
    model = cifar_resnet(8, num_classes=7, shortcut=shortcut)
    images = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    variables = random_variables(model, (size, size))
    features = model.apply(variables, images, train=False, method="features")
    first, second, third = sides
    assert {name: value.shape for name, value in features.items()} == {
        "stem": (2, size, size, 16),
        "stage1": (2, first, first, 16),
        "stage2": (2, second, second, 32),
        "stage3": (2, third, third, 64),
        "pooled": (2, 64),
        "logits": (2, 7),
    }
    np.testing.assert_array_equal(features["logits"], model.apply(variables, images, train=False))
    np.testing.assert_allclose(features["pooled"], features["stage3"].mean((1, 2)), rtol=1e-5)


def test_bfloat16_activations_and_float32_everything_else():
    model = cifar_resnet(8, dtype=jnp.bfloat16, bn_group_size=4)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    variables = random_variables(model, (16, 16))
    features, updates = model.apply(variables, images, train=True, method="features", mutable=["batch_stats"])
    assert {name: str(value.dtype) for name, value in features.items()} == {
        "stem": "bfloat16", "stage1": "bfloat16", "stage2": "bfloat16", "stage3": "bfloat16",
        "pooled": "float32", "logits": "float32",
    }  # fmt: skip
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((variables, updates))} == {"float32"}
    exact = cifar_resnet(8, bn_group_size=4).apply(variables, images, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(features["logits"], exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_training_without_mutable_batch_stats_is_an_error():
    model = cifar_resnet(8)
    images = jnp.ones((2, 32, 32, 3))
    variables = random_variables(model, (32, 32))
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        model.apply(variables, images, train=True)
    with pytest.raises(TypeError, match="train"):
        model.apply(variables, images)


@pytest.mark.parametrize(("fan", "channels"), [("fan_in", 16), ("fan_out", 32)])
def test_he_initialization(fan, channels):
    model = cifar_resnet(8, init_fan=fan)
    params = jax.jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernel = np.asarray(params["stage2_block1"]["conv1"]["kernel"])  # 3x3, 16 -> 32
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * channels)), rel=0.03)
    assert abs(kernel.mean()) < 0.003
    assert np.abs(kernel).max() > 2.5 * kernel.std()  # a Gaussian, not one truncated at 2 deviations
    np.testing.assert_array_equal(params["stage2_block1"]["bn2"]["scale"], 1)


@pytest.mark.parametrize(("zero_channels", "start"), [("end", 0), ("both", 2)])
def test_option_a_subsamples_and_appends_zero_channels(zero_channels, start):
    block = BasicBlock(
        filters=8, stride=2, shortcut="A", zero_channels=zero_channels, dilations=(1, 1), conv=conv, norm=BatchNorm
    )
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 6, 6, 4)))
    variables = block.init(jax.random.key(1), x, train=False)
    variables["params"]["bn2"]["scale"] = jnp.zeros(8)  # switches the residual function off
    y = np.asarray(block.apply(variables, x, train=False))
    np.testing.assert_array_equal(y[..., start : start + 4], x[:, ::2, ::2])
    assert y.sum() == pytest.approx(float(x[:, ::2, ::2].sum()), rel=1e-6)  # and zeros elsewhere


def test_an_identity_block_is_the_identity_plus_the_residual():
    block = BasicBlock(
        filters=4, stride=1, shortcut="B", zero_channels="end", dilations=(1, 1), conv=conv, norm=BatchNorm
    )
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 6, 6, 4)))
    variables = block.init(jax.random.key(1), x, train=False)
    variables["params"]["bn2"] = {"scale": jnp.zeros(4), "bias": jnp.full(4, 0.5)}
    np.testing.assert_allclose(block.apply(variables, x, train=False), x + 0.5, rtol=1e-6)
    plain = BasicBlock(
        filters=4, stride=1, shortcut="none", zero_channels="end", dilations=(1, 1), conv=conv, norm=BatchNorm
    )
    np.testing.assert_array_equal(plain.apply(variables, x, train=False), 0.5)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_rectifier_at_the_end_of_a_block_is_one(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jnp.array([-2.0, -0.0, 0.0, 0.5, 3.0])
    y, pull_back = jax.vjp(relu_at_end, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 0.5, 3])
    np.testing.assert_array_equal(*pull_back(jnp.full(5, 7.0)), [0, 0, 0, 7, 7])
    program = jax.jit(jax.grad(lambda x: relu_at_end(x).sum())).lower(x).as_text()
    assert ("optimization_barrier" in program) == (backend == "gpu")


@pytest.mark.parametrize("option", "ABC")
def test_names_with_a_shortcut(option):
    assert create_model(f"resnet34{option}") == create_model("resnet34", shortcut=option)
    with pytest.raises(ValueError, match=f"resnet34{option} has shortcuts of option {option}; got shortcut='none'"):
        create_model(f"resnet34{option}", shortcut="none")


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_an_image_without_its_batch_gets_a_sentence(name):
    with pytest.raises(
        ValueError, match=r"\[N, H, W, 3\], got the shape \(32, 32, 3\): images\[None\] is a batch of one"
    ):
        create_model(name).init(jax.random.key(0), jnp.zeros((32, 32, 3)), train=False)
