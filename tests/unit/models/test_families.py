"""The registry of networks, and which parameters of each are trained."""

import jax
import pytest
from flax.traverse_util import flatten_dict

from resnet_jax import create_model
from resnet_jax.config import ModelConfig
from resnet_jax.errors import UserError
from resnet_jax.models import FAMILIES, abstract_variables, build_model


def trained(name, **options):
    """Return {path of a parameter: whether it is trained}."""
    model = create_model(name, **options)
    params = abstract_variables(model, (32, 32, 3))["params"]
    mask = model.trainable(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    return flatten_dict(mask, sep="/")


@pytest.mark.parametrize("name", ["resnet14", "plain18", "resnet50", "vgg16"])
def test_all_parameters_are_trained(name):
    assert all(trained(name).values())


@pytest.mark.parametrize(("name", "options"), [("resnet14", {"shortcut": "C"}), ("resnet50", {"scan_blocks": True})])
def test_frozen_bn_is_the_one_thing_that_is_not_trained(name, options):
    frozen = {path for path, is_trained in trained(name, frozen_bn=True, **options).items() if not is_trained}
    all_paths = trained(name, **options)
    assert frozen == {path for path in all_paths if path.endswith(("scale", "bias")) and path != "fc/bias"}
    assert {"stem_bn/scale", "stage1_block1/shortcut_bn/bias"} <= frozen


@pytest.mark.parametrize(("family", "depth"), [("cifar", 20), ("imagenet", 50), ("vgg", 16)])
def test_a_configuration_chooses_a_family(family, depth):
    model = build_model(ModelConfig(family=family, depth=depth, shortcut="B", init_fan="fan_out"), 7)
    assert isinstance(model, FAMILIES[family].module)
    assert (model.num_classes, model.init_fan) == (7, "fan_out")
    assert getattr(model, "shortcut", "B") == "B"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(family="imagnet"), "--model.family imagnet: choose cifar, imagenet, vgg; did you mean imagenet?"),
        (ModelConfig(depth=21), r"--model.depth: depth must be 6n\+2"),
    ],
)
def test_networks_that_do_not_exist(config, message):
    with pytest.raises(UserError, match=message):
        build_model(config, 10)
