"""BN folded into convolutions: the same logits, for every kind of block."""

from functools import partial

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from resnet_jax.convert.fold import apply_folded, fold_bn
from resnet_jax.data.augment import normalize


def test_the_logits_stay(network):
    model, variables, origin = network.trained
    model = model.clone(dtype=np.float32)
    folded = fold_bn(variables)
    names = {path[-1] for path in flatten_dict(folded)}
    assert names == {"kernel", "bias"}
    for images, expected in zip(network.images, network.logits, strict=True):
        found = apply_folded(partial(model.apply, train=False), folded, normalize(images, *origin.inputs.preprocessing))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_program_has_no_statistics_left(cifar_network):
    """What is left of a BN is an addition."""
    model, variables, _ = cifar_network.trained
    folded = fold_bn(variables)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    program = str(jax.make_jaxpr(lambda x: apply_folded(partial(model.apply, train=False), folded, x))(images))
    assert "rsqrt" not in program
    assert program.count("conv_general_dilated[") == 7


def test_by_hand():
    kernel = np.full((1, 1, 2, 3), 2.0, np.float32)
    norm = {"scale": np.float32([1, 2, 3]), "bias": np.float32([5, 6, 7])}
    stats = {"mean": np.float32([1, 0, -1]), "var": np.float32([1, 4, 0.25]) - np.float32(1e-5)}
    variables = {
        "params": {
            "stage1_block1": {"shortcut_conv": {"kernel": kernel}, "shortcut_bn": norm},
            "fc": {"kernel": kernel},
        },
        "batch_stats": {"stage1_block1": {"shortcut_bn": stats}},
    }
    folded = fold_bn(variables)["params"]
    block = folded["stage1_block1"]
    np.testing.assert_allclose(block["shortcut_conv"]["kernel"][0, 0, 0], [2, 2, 12], rtol=1e-6)
    np.testing.assert_allclose(block["shortcut_bn"]["bias"], [4, 6, 13], rtol=1e-6)
    assert folded["fc"] == {"kernel": kernel}
