"""The networks of Table 1 and VGG: exact parameter counts, options, features, frozen BN."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_dense import random_variables

from resnet_jax import create_model
from resnet_jax.models import stack_blocks
from resnet_jax.models.pool import AdaptiveAveragePool, MaxPool


def shapes(model, size=64):
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, size, size, 3)))


def param_count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)["params"]))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
    ],
)
def test_parameter_counts(name, count):
    assert param_count(create_model(name)) == count


@pytest.mark.parametrize(("depth", "projections"), [(18, 3), (34, 3)])
def test_plain_nets_and_option_a_have_no_projections(depth, projections):
    plain, a, b = (create_model(f"resnet{depth}", shortcut=shortcut) for shortcut in ("none", "A", "B"))
    in_projections = sum(i * o + 2 * o for i, o in ((64, 128), (128, 256), (256, 512)))
    assert shapes(create_model(f"plain{depth}")) == shapes(plain) == shapes(a)
    assert param_count(b) - param_count(a) == in_projections
    count = sum("shortcut_conv" in block for block in shapes(b)["params"].values())
    assert count == projections


def test_option_c_has_a_projection_in_every_block():
    blocks = {name: set(block) for name, block in shapes(create_model("resnet34", shortcut="C"))["params"].items()}
    assert all("shortcut_conv" in layers for name, layers in blocks.items() if name.startswith("stage"))
    assert len(blocks) == 16 + 3


def test_the_two_places_of_the_stride_differ_in_nothing_but_the_result():
    first, second = (create_model("resnet50", num_classes=3, stride_on=on) for on in ("1x1", "3x3"))
    assert shapes(first) == shapes(second)
    first, second = (model.clone(blocks=(1, 1), filters=(8, 16)) for model in (first, second))
    images = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    variables = random_variables(first, (64, 64))
    a, b = (jax.jit(partial(model.apply, train=False))(variables, images) for model in (first, second))
    assert not np.allclose(a, b, rtol=0.01)


@pytest.mark.parametrize(
    ("size", "sides"), [(224, (112, 56, 28, 14, 7)), (32, (16, 8, 4, 2, 1)), (101, (51, 25, 13, 7, 4))]
)
def test_features_by_the_papers_names(size, sides):
    model = create_model("resnet50", backbone_only=True)
    variables = shapes(model, size)
    features = jax.eval_shape(partial(model.apply, train=False), variables, jnp.zeros((2, size, size, 3)))
    channels = (64, 256, 512, 1024, 2048)
    expected = {name: (2, side, side, c) for name, side, c in zip(model.feature_strides, sides, channels, strict=True)}
    assert {name: value.shape for name, value in features.items()} == expected
    assert model.feature_strides == {"conv1": 2, "conv2_x": 4, "conv3_x": 8, "conv4_x": 16, "conv5_x": 32}
    assert "fc" not in variables["params"]


def test_features_of_vgg():
    model = create_model("vgg16", backbone_only=True)
    variables = shapes(model)
    features = jax.eval_shape(partial(model.apply, train=False), variables, jnp.zeros((2, 64, 64, 3)))
    assert {name: value.shape for name, value in features.items()} == {
        "conv1": (2, 32, 32, 64), "conv2": (2, 16, 16, 128), "conv3": (2, 8, 8, 256), "conv4": (2, 4, 4, 512),
        "conv5": (2, 2, 2, 512),
    }  # fmt: skip
    assert model.feature_strides == {"conv1": 2, "conv2": 4, "conv3": 8, "conv4": 16, "conv5": 32}
    assert len([path for path in variables["params"] if path.startswith("conv")]) == 13


def test_frozen_bn_neither_uses_nor_changes_batch_statistics():
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3)) * 5
    model = create_model("resnet8", frozen_bn=True)
    variables = random_variables(model, (16, 16))

    def loss(params):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, updates = model.apply(variables_, images, train=True, mutable=["batch_stats"])
        return jnp.square(logits).sum(), (logits, updates)

    grads, (logits, updates) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    expected = jax.jit(partial(model.apply, train=False))(variables, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    np.testing.assert_array_equal(grads["stem_bn"]["scale"], 0)
    assert np.abs(grads["stem_conv"]["kernel"]).max() > 0


def test_dropout_of_vgg_acts_in_training_alone():
    model = create_model("vgg16", num_classes=5)
    small = model.clone(convs=(1, 1, 1, 1, 1))
    images = jnp.ones((1, 32, 32, 3))
    variables = {"params": jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes(small, 32)["params"])}
    evaluated = small.apply(variables, images, train=False)
    np.testing.assert_array_equal(evaluated, small.apply(variables, images, train=False))
    trained = [small.apply(variables, images, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)]
    np.testing.assert_array_equal(trained[0], trained[1])
    assert (np.asarray(trained[0]) != np.asarray(trained[2])).any()
    # Half of the outputs of fc6 and of fc7 drop and the others double, so that the mean stays.
    assert float(trained[0][0, 0]) == pytest.approx(float(evaluated[0, 0]), rel=0.1)


@pytest.mark.parametrize(
    ("ceil", "margin", "size", "padding", "out"),
    [
        (True, 0, 112, (0, 1), 56),  # Caffe
        (True, 0, 113, (0, 0), 56),
        (False, 1, 112, (1, 1), 56),  # PyTorch
        (False, 1, 113, (1, 1), 57),
    ],
)
def test_the_two_paddings_of_the_pool(ceil, margin, size, padding, out):
    pool = MaxPool(3, 2, margin=margin, ceil=ceil)
    assert pool.padding(size, size) == (padding, padding)
    x = jax.random.normal(jax.random.key(0), (1, size, size, 1))
    y = np.asarray(pool.apply({}, x))[0, :, :, 0]
    assert y.shape == (out, out)
    image = np.asarray(x)[0, :, :, 0]
    corner = image[: 3 - margin, : 3 - margin].max()  # of the windows of one corner each
    assert y[0, 0] == corner
    start = 2 * (out - 1) - margin
    assert y[-1, -1] == image[start : start + 3, start : start + 3].max()


def test_adaptive_average_pool():
    x = np.random.RandomState(0).normal(size=(1, 10, 7, 2)).astype(np.float32)
    y = AdaptiveAveragePool(7).apply({}, jnp.array(x))
    for i in range(7):
        rows = slice(i * 10 // 7, -(-(i + 1) * 10 // 7))
        np.testing.assert_allclose(y[0, i], x[0, rows].mean(0), rtol=1e-4, atol=1e-5)
    assert AdaptiveAveragePool(7).apply({}, jnp.ones((1, 2, 3, 1))).shape == (1, 7, 7, 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet50", {"stride_on": "1x1"}), ("resnet50", {"stride_on": "3x3"}), ("resnet18", {"shortcut": "A"})],
)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_computes_what_subsampling_leaves_out(name, options, output_stride):
    """Every step of the subsampled maps is one of the denser maps, of the same weights, at the borders too."""
    model = create_model(name, backbone_only=True, **options).clone(filters=(4, 8, 16, 32), blocks=(1, 2, 2, 2))
    variables = random_variables(model, (64, 64))
    images = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    maps = model.apply(variables, images, train=False)
    dilated = model.clone(output_stride=output_stride)
    dense = dilated.apply(variables, images, train=False)
    assert [64 // x.shape[1] for x in dense.values()] == list(dilated.feature_strides.values())
    assert max(dilated.feature_strides.values()) == output_stride
    for part, x in maps.items():
        every = dense[part].shape[1] // x.shape[1]
        np.testing.assert_allclose(dense[part][:, ::every, ::every], x, rtol=1e-4, atol=1e-4)
    stacked = dilated.clone(scan_blocks=True)
    assert stacked.apply(stack_blocks(variables), images, train=False)["conv5_x"] == pytest.approx(
        np.asarray(dense["conv5_x"]), rel=1e-4, abs=1e-4
    )


def test_an_output_stride_that_no_stage_has_is_refused():
    with pytest.raises(ValueError, match="output_stride must be one of 4, 8, 16, 32; got 12"):
        shapes(create_model("resnet18", output_stride=12))


def test_a_network_is_a_module_inside_another():
    class Segmenter(nn.Module):
        @nn.compact
        def __call__(self, images):
            maps = create_model("resnet18", backbone_only=True, output_stride=16, name="backbone")(images, train=False)
            return nn.Conv(5, (1, 1), name="classes")(maps["conv5_x"])

    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(Segmenter().init, jax.random.key(0), images)
    assert set(variables["params"]) == {"backbone", "classes"}
    alone = jax.eval_shape(
        partial(create_model("resnet18", backbone_only=True).init, train=False), jax.random.key(0), images
    )
    assert variables["params"]["backbone"] == alone["params"]
