"""The configurations of detection: the paper's numbers, and options that do not go together."""

import dataclasses

import pytest
from paths import ROOT

from resnet_jax.cli.arguments import parse_config
from resnet_jax.config import Config, DataConfig, DetectionConfig, OptimConfig, check_applies, check_config, from_json
from resnet_jax.detection_stages import stage_of, stages
from resnet_jax.errors import UserError
from resnet_jax.models.detector import build_detector


@pytest.mark.parametrize("name", ["voc_resnet101", "voc_vgg16"])
def test_the_recipe_of_voc_is_the_published_one(name):
    """The appendix, and py-faster-rcnn where it is silent."""
    config = parse_config([str(ROOT / "configs" / f"{name}.py")])
    check_applies(config, streamed=True)
    optim, detection = config.optim, config.detection
    assert (optim.learning_rate, optim.momentum, optim.weight_decay, optim.bias_factor) == (0.001, 0.9, 0.0005, 2.0)
    assert optim.weight_decay_on == "all"
    assert (detection.shorter_side, detection.longer_side) == (600, 1000)
    assert (detection.anchor_scales, detection.anchor_ratios) == ((8, 16, 32), (0.5, 1, 2))
    assert (detection.rpn_samples, detection.rpn_positive, detection.rpn_negative) == (256, 0.7, 0.3)
    assert (detection.train_proposals, detection.test_proposals) == ((12_000, 2_000), (6_000, 300))
    assert (detection.regions, detection.foreground, detection.background_iou) == (128, 0.25, (0.1, 0.5))
    assert detection.target_std == (0.1, 0.1, 0.2, 0.2)
    assert (detection.nms, detection.threshold, detection.most, detection.metric) == (0.3, 0.05, 100, "voc07")
    assert config.data.flip
    model = build_detector(config, 20)
    assert model.pooled_size == (14 if name == "voc_resnet101" else 7)
    frozen = {"stem", "stage1"} if name == "voc_resnet101" else {"conv1", "conv2"}
    assert set(model.trunk.frozen) == frozen
    if name == "voc_resnet101":
        assert config.model.frozen_bn


def test_the_small_configuration_is_sound():
    config = parse_config([str(ROOT / "configs" / "bccd_resnet18.py")])
    check_applies(config, streamed=True)
    assert config.detects
    assert from_json('{"data": {"name": "cifar10"}}', "an old one").detection == DetectionConfig()


def detecting(**fields):
    return Config(data=DataConfig(name="voc"), **fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            detecting(detection=DetectionConfig(shorter_side=700, longer_side=600)),
            "--detection.shorter-side 700 is above",
        ),
        (detecting(detection=DetectionConfig(background_iou=(0.5, 0.5))), "must increase"),
        (detecting(detection=DetectionConfig(train_proposals=(100, 50))), "--detection.regions 128 are drawn from"),
        (detecting(detection=DetectionConfig(schedule="alternating")), "give --optim.boundaries without numbers"),
        (
            detecting(optim=OptimConfig(boundaries=()), detection=DetectionConfig(schedule="alternating")),
            "give --run.steps 240000",
        ),
    ],
)
def test_values_that_do_not_go_together(config, message):
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_options_for_other_images_are_refused():
    for data in ({"image_size": 300}, {"lighting": 0.1}, {"padding": 2}, {"validation_size": 5}):
        with pytest.raises(UserError, match="is for images without boxes; those of voc are with boxes"):
            check_applies(Config(data=DataConfig(name="voc", **data)), streamed=True)
    for config in (
        Config(detection=DetectionConfig(shorter_side=300)),
        Config(data=DataConfig(train_sets=("trainval",))),
    ):
        with pytest.raises(UserError, match="is for images with boxes; those of cifar10 are without"):
            check_applies(config, streamed=False)


def test_the_stages_follow_each_other():
    config = detecting(
        optim=OptimConfig(boundaries=()),
        detection=DetectionConfig(schedule="alternating", rpn_steps=(60, 20), region_steps=(30, 0)),
    )
    found = [(stage.begin, stage.end, stage.drops, stage.losses, stage.separate) for stage in stages(config)]
    assert found == [
        (0, 80, (60,), "rpn", True),
        (80, 110, (), "regions", True),
        (110, 190, (60,), "rpn", False),
        (190, 220, (), "regions", False),
    ]
    assert [stage_of(config, step).begin for step in (0, 1, 80, 81, 110, 111, 220)] == [0, 0, 0, 80, 80, 110, 190]
    joint = dataclasses.replace(config, detection=DetectionConfig())
    (only,) = stages(joint)
    assert (only.begin, only.end, only.losses) == (0, joint.run.steps, "both")
