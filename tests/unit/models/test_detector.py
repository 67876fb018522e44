"""A classifier cut in two, and the detector that stands on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from resnet_jax.config import Config, DetectionConfig, ModelConfig, OptimConfig
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.detector import build_detector, make_detector
from resnet_jax.models.pool import MaxPool


def small(name="resnet18", **options):
    return create_model(name, num_classes=7, **options).clone(filters=(4, 8, 8, 16))


def with_statistics(variables, seed=0):
    """Give BN other statistics than those it begins with, so that mistakes show."""
    leaves, structure = jax.tree.flatten(variables["batch_stats"])
    rng = np.random.default_rng(seed)
    stats = [jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32) for leaf in leaves]
    return {**variables, "batch_stats": jax.tree.unflatten(structure, stats)}


@pytest.fixture(scope="module")
def classifier():
    model = small()
    images = jax.random.normal(jax.random.key(1), (1, 224, 224, 3))
    variables = with_statistics(jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0)))
    return model, variables, images


def only(variables, names):
    """Return the variables of some layers."""
    return {kind: {k: v for k, v in tree.items() if k.startswith(names)} for kind, tree in variables.items()}


def test_trunk_and_tail_of_a_resnet_are_the_classifier(classifier):
    model, variables, images = classifier
    trunk, tail = model.cut()
    feature_map = list(
        trunk.apply(only(variables, ("stem", "stage1", "stage2", "stage3")), images, train=False).values()
    )[-1]
    assert feature_map.shape == (1, 14, 14, 8)
    whole = tail.clone(backbone_only=False)
    found = whole.apply(only(variables, ("stage4", "fc")), feature_map, train=False)
    np.testing.assert_allclose(found, model.apply(variables, images, train=False), rtol=1e-5, atol=1e-5)


def test_an_image_as_one_region_gives_the_classifier_s_logits(classifier):
    """Pooled to 14x14 of 14x14 cells nothing changes: with the weights of the last layer, the scores are the logits."""
    model, variables, images = classifier
    detector = make_detector(model, 6, DetectionConfig(rpn_filters=8))
    new = jax.eval_shape(lambda: detector.init(jax.random.key(0), images, train=False))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), dict(new["params"]))
    trunk, tail = (only(variables, names) for names in (("stem", "stage1", "stage2", "stage3"), ("stage4",)))
    params |= {"trunk": trunk["params"], "tail": tail["params"], "scores": variables["params"]["fc"]}
    of_detector = {"params": params, "batch_stats": {"trunk": trunk["batch_stats"], "tail": tail["batch_stats"]}}
    assert jax.tree.map(jnp.shape, of_detector["params"]) == jax.tree.map(lambda leaf: leaf.shape, dict(new["params"]))
    found = detector.apply(of_detector, images, None, train=False, method="of_images")
    region = jnp.array([[[0, 0, 223, 223]]], jnp.float32)
    logits, deltas = detector.apply(of_detector, found.feature_map, region, train=False, method="of_regions")
    assert deltas.shape == (1, 1, 7, 4)
    np.testing.assert_allclose(logits[0], model.apply(variables, images, train=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [50, 101])
def test_the_variables_of_a_deep_classifier_are_those_of_trunk_and_tail(depth):
    model = create_model(f"resnet{depth}")
    images = jnp.zeros((1, 224, 224, 3))
    whole, *halves = (
        jax.eval_shape(lambda m=m, x=x: m.init(jax.random.key(0), x, train=False))["params"]
        for m, x in zip((model, *model.cut()), (images, images, jnp.zeros((1, 14, 14, 1024))), strict=True)
    )
    together = {**halves[0], **halves[1], "fc": whole["fc"]}
    assert {k: v.shape for k, v in flatten_dict(together).items()} == {
        k: v.shape for k, v in flatten_dict(whole).items()
    }
    convs = [path for path in flatten_dict(halves[0]) if path[-1] == "kernel" and path[-2] != "shortcut_conv"]
    assert len(convs) == {50: 40, 101: 91}[depth]  # "91 conv layers in ResNet-101" (appendix A)


def test_trunk_and_tail_of_vgg_are_the_classifier():
    model = create_model("vgg16", num_classes=7)
    trunk, tail = model.cut()
    images = jnp.zeros((1, 224, 224, 3))
    whole, first, second = (
        jax.eval_shape(lambda m=m, x=x: m.init(jax.random.key(0), x, train=False))["params"]
        for m, x in ((model, images), (trunk, images), (tail, jnp.zeros((1, 7, 7, 512))))
    )
    assert {**first, **second}.keys() == whole.keys() - {"fc8"}
    assert second["fc6"]["kernel"].shape == whole["fc6"]["kernel"].shape
    shapes = jax.eval_shape(lambda p: trunk.apply({"params": p}, images, train=False), first)
    assert list(shapes.values())[-1].shape == (1, 14, 14, 512)  # before pool5
    assert trunk.feature_strides["conv5"] == 16
    image = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    params = trunk.init(jax.random.key(0), image, train=False)
    before = trunk.apply(params, image, train=False)["conv5"]
    after = model.clone(backbone_only=True).apply(params, image, train=False)["conv5"]
    np.testing.assert_array_equal(MaxPool(2, 2).apply({}, before), after)


@pytest.fixture(scope="module")
def detector():
    model = make_detector(small(), 3, DetectionConfig(rpn_filters=8, anchor_scales=(2.0, 4.0)))
    images = jax.random.normal(jax.random.key(1), (2, 100, 135, 3))
    variables = jax.jit(lambda key: model.init(key, images[:, :64, :64], train=False))(jax.random.key(0))
    return model, with_statistics(variables), images


def test_padding_changes_nothing(detector):
    """An image of 100x135 gives the same map and scores in arrays of 100x135, 160x200 and 200x160."""
    model, variables, images = detector
    alone = model.apply(variables, images, None, train=False, method="of_images")
    height, width = alone.feature_map.shape[1:3]
    assert (height, width) == (7, 9)
    sizes = jnp.tile(jnp.array([100, 135]), (2, 1))
    for shape in ((160, 200), (200, 160)):
        padded = jax.random.normal(jax.random.key(9), (2, *shape, 3)).at[:, :100, :135].set(images)
        found = model.apply(variables, padded, sizes, train=False, method="of_images")
        there = found.feature_map.shape[1:3]
        np.testing.assert_allclose(found.feature_map[:, :height, :width], alone.feature_map, rtol=1e-4, atol=1e-5)
        assert not found.feature_map[:, height:].any()
        assert not found.feature_map[:, :, width:].any()
        for name in ("logits", "deltas"):
            inside = getattr(found, name).reshape(2, *there, 6, -1)[:, :height, :width]
            np.testing.assert_allclose(
                inside.reshape(2, height * width * 6, -1), getattr(alone, name), rtol=1e-4, atol=1e-5
            )


def test_scores_are_in_the_order_of_the_anchors(detector):
    """What the RPN says of a cell is what the anchors there are for: only the cell's surroundings change it."""
    model, variables, images = detector
    before = model.apply(variables, images, None, train=False, method="of_images")
    anchors = model.anchors(*before.feature_map.shape[1:3])
    assert len(anchors) == before.logits.shape[1]
    changed = images.at[:, :, :4].add(5.0)  # at the left border
    after = model.apply(variables, changed, None, train=False, method="of_images")
    rows = np.flatnonzero((np.abs(after.logits - before.logits) > 1e-6).any((0, 2)))
    centers = (anchors[:, 0] + anchors[:, 2]) / 2
    assert centers[rows].min() < 16
    moved = np.abs(after.logits - before.logits).max((0, 2))
    assert moved[centers < 16].max() > 10 * moved[centers > 120].max()


def test_new_layers_begin_small(detector):
    _, variables, _ = detector
    params = variables["params"]
    for name, deviation in (("scores", 0.01), ("deltas", 0.001)):
        assert np.std(params[name]["kernel"]) == pytest.approx(deviation, rel=0.4)
        assert not params[name]["bias"].any()
    for layer in ("conv", "scores", "deltas"):
        assert np.std(params["rpn"][layer]["kernel"]) == pytest.approx(0.01, rel=0.4)


def test_frozen_layers_and_bn_are_not_trainable(detector):
    _, variables, _ = detector
    config = Config(
        model=ModelConfig(family="imagenet", depth=18, frozen_bn=True),
        optim=OptimConfig(trainable=("stage2", "stage3", "stage4", "head")),
    )
    mask = flatten_dict(build_detector(config, 3).trainable(variables["params"]))
    for path, trains in mask.items():
        is_bn, frozen = "bn" in path[-2], path[1].startswith(("stem", "stage1"))
        assert trains == (not is_bn and not frozen), path


def test_cifar_networks_have_no_map_of_stride_16():
    with pytest.raises(UserError, match="needs a network for ImageNet"):
        build_detector(dataclasses.replace(Config(), model=ModelConfig(depth=20)), 3)
