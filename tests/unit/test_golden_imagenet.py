"""The ImageNet networks and VGG beside golden values of an independent PyTorch implementation in float64.

The large ones are in tests/system.
"""

import numpy as np
import pytest
from golden.compare import assert_evaluation_close
from golden.inputs import IMAGENET_RESNETS, LARGE_NETWORKS
from paths import TESTS

from resnet_jax.models import create_model

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module")
def golden():
    with np.load(TESTS / "golden" / "imagenet.npz") as file:
        return dict(file)


@pytest.mark.parametrize("key", [key for key in IMAGENET_RESNETS if key not in LARGE_NETWORKS])
def test_evaluation(golden, key):
    assert_evaluation_close(golden, key)


@pytest.mark.parametrize(
    ("name", "key"), [("resnet34", "resnet34-B"), ("resnet50", "resnet50"), ("plain34", "plain34")]
)
def test_defaults_are_the_papers(name, key):
    _, options = IMAGENET_RESNETS[key]
    model = create_model(name)
    assert {option: getattr(model, option) for option in options} == options
