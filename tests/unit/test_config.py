"""Configuration: files, overrides, JSON, and one clear line for each mistake."""

import dataclasses
import json

import pytest
from paths import ROOT

from resnet_jax.cli.arguments import parse_config
from resnet_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    check_applies,
    check_config,
    difference,
    field_names,
    from_json,
    get_field,
    to_json,
)
from resnet_jax.errors import UserError

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
IMAGENET = {
    "plain18": (18, "none"), "plain34": (34, "none"), "resnet18": (18, "A"), "resnet34A": (34, "A"),
    "resnet34B": (34, "B"), "resnet34C": (34, "C"), "resnet50": (50, "B"), "resnet101": (101, "B"),
    "resnet152": (152, "B"),
}  # fmt: skip


def test_there_is_one_config_for_each_experiment():
    residual = {f"cifar10_resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)}
    plain = {f"cifar10_plain{depth}" for depth in (20, 32, 44, 56, 110)}
    imagenet = {f"imagenet_{name}" for name in IMAGENET}
    others = {"digits_resnet20", "cifar100_resnet56", "imagenet_resnet50_v15", "bccd_resnet18"}
    others |= {"voc_resnet101", "voc_vgg16"}
    assert {path.stem for path in CONFIGS} == residual | plain | imagenet | others


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_follow_the_paper(path):
    config = parse_config([str(path)])
    assert config.run.workdir == f"runs/{path.stem}"
    if not path.stem.startswith("cifar10_"):
        return
    depth = int(path.stem.removeprefix("cifar10_resnet").removeprefix("cifar10_plain"))
    assert config.model.depth == depth
    assert config.model.shortcut == ("none" if "plain" in path.stem else "A")
    warmup = "steps" if "resnet110" in path.stem or "1202" in path.stem else "none"
    expected = {
        "data.name": "cifar10", "data.batch_size": 128, "data.padding": 4, "data.flip": True,
        "data.mean": None, "data.std": (1, 1, 1), "data.validation_size": 0, "model.bn_group_size": 64,
        "optim.learning_rate": 0.1, "optim.boundaries": (32_000, 48_000), "optim.momentum": 0.9,
        "optim.weight_decay": 1e-4, "optim.weight_decay_on": "all", "optim.warmup": warmup,
        "optim.warmup_learning_rate": 0.01, "optim.warmup_steps": 400, "optim.warmup_error": 80,
        "run.steps": 64_000,
    }  # fmt: skip
    assert {name: get_field(config, name) for name in expected} == expected


@pytest.mark.parametrize("name", IMAGENET)
def test_configs_follow_the_paper_on_imagenet(name):
    config = parse_config([str(ROOT / f"configs/imagenet_{name}.py")])
    depth, shortcut = IMAGENET[name]
    expected = {
        "model.family": "imagenet", "model.depth": depth, "model.shortcut": shortcut, "model.bn_group_size": 32,
        "model.stride_on": "1x1", "model.pool_padding": "caffe", "model.init_fan": "fan_in", "model.dtype": "float32",
        "data.name": "imagenet", "data.batch_size": 256, "data.flip": True, "data.image_size": 224,
        "data.crop": "scale", "data.shorter_side": (256, 480), "data.lighting": 0.1, "data.mean": None,
        "data.std": (1, 1, 1), "data.validation_size": 0,
        "optim.learning_rate": 0.1, "optim.schedule": "steps", "optim.boundaries": (150_000, 300_000, 450_000),
        "optim.momentum": 0.9, "optim.momentum_style": "caffe", "optim.weight_decay": 1e-4,
        "optim.weight_decay_on": "all", "optim.warmup": "none", "optim.label_smoothing": 0.0,
        "run.steps": 600_000,
    }  # fmt: skip
    assert {name: get_field(config, name) for name in expected} == expected
    assert config.data.eval_batch_size % 8 == 0  # the paper's 8 GPUs


def test_the_recipe_that_is_not_the_papers():
    config = parse_config([str(ROOT / "configs/imagenet_resnet50_v15.py")])
    epoch = 1_281_167 / config.data.batch_size
    assert config.run.steps == round(90 * epoch)
    assert config.optim.warmup_steps == round(8 * epoch)
    assert config.optim.learning_rate == config.data.batch_size / 1000
    assert config.optim.weight_decay == 2**-15


def test_overrides():
    args = (
        "--run.workdir w --run.steps 5 --run.seed 7 --data.dir d --data.batch-size 64 --model.depth 32"
        " --model.shortcut B --optim.learning-rate 0.05 --optim.boundaries 3 4 --model.bn-group-size None"
        " --data.mean 0.5 0.4 0.3 --data.no-flip"
    )
    config = parse_config([str(ROOT / "configs/cifar10_resnet20.py"), *args.split()])
    changed = {
        name: get_field(config, name) for name in field_names() if get_field(config, name) != get_field(Config(), name)
    }
    assert changed == {
        "run.workdir": "w", "run.steps": 5, "run.seed": 7, "data.dir": "d", "data.batch_size": 64,
        "model.depth": 32, "model.shortcut": "B", "optim.learning_rate": 0.05, "optim.boundaries": (3, 4),
        "model.bn_group_size": None, "data.mean": (0.5, 0.4, 0.3), "data.flip": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model.dept 20", "unknown option --model.dept; did you mean --model.depth"),
        ("--lr 1", "unknown option --lr"),
        ("stray", "unknown option stray"),
        ("--model.shortcut D", "invalid choice 'D' for argument '--model.shortcut'"),
        ("--model.depth twenty", "--model.depth: invalid literal for int"),
        ("--run.steps", "Missing value for argument '--run.steps'"),
        ("--run.steps 0", "--run.steps must be greater than 0; got 0"),
        ("--run.seed -1", "--run.seed must be greater than or equal to 0; got -1"),
        ("--run.seed 4294967296", "--run.seed must be less than 4294967296"),
        ("--model.bn-group-size 0", "--model.bn-group-size must be greater than 0; got 0"),
        ("--data.workers -1", "--data.workers must be greater than or equal to 0; got -1"),
        ("--optim.learning-rate 0", "--optim.learning-rate must be greater than 0; got 0.0"),
        ("--optim.learning-rate nan", "--optim.learning-rate must be a finite number; got nan"),
        ("--optim.weight-decay inf", "--optim.weight-decay must be a finite number; got inf"),
        ("--data.lighting inf", "--data.lighting must be a finite number"),
        ("--data.mean 0 nan 0", "--data.mean must be a finite number"),
        ("--data.std 0 1 1", "--data.std must be greater than 0; got 0.0"),
        ("--optim.momentum 1", "--optim.momentum must be less than 1; got 1.0"),
        ("--data.batch-size 100", "a batch of 100 .* does not divide into BN groups of 64"),
        ("--optim.accumulation-steps 3", "a batch of 128 .* does not divide into 3 parts"),
        ("--optim.accumulation-steps 4", "a part of 32 .* does not divide into BN groups of 64"),
        ("--data.shorter-side 480 256", "--data.shorter-side must be two increasing numbers, .* got 480 256"),
        ("--data.shorter-side 200 256", "not below --data.image-size 224; got 200 256"),
        ("--optim.schedule plateau", "hold images out with --data.validation-size"),
        ("--hosts.coordinator h:1", "--hosts.process-id go together"),
        ("--hosts.process-id 0", "--hosts.process-id go together"),
        ("--hosts.coordinator h --hosts.processes 2 --hosts.process-id 0", "must be HOST:PORT; got h"),
        ("--hosts.coordinator h:1 --hosts.processes 2 --hosts.process-id 2", "the last of 2 processes is 1; got 2"),
    ],
)
def test_mistakes_on_the_command_line(args, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config([str(ROOT / "configs/cifar10_resnet20.py"), *args.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config file .*; did you mean .*/config.py"),
        ("x = (", "SyntaxError"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): return 3", "must return a Config, not int"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text or "")
    with pytest.raises(UserError, match=message):
        parse_config([str(tmp_path / ("config.py" if text else "confg.py"))])


@pytest.mark.parametrize("args", [[], ["--run.steps", "5", "configs/digits_resnet20.py"]])
def test_the_file_comes_first(args):
    with pytest.raises(UserError, match="which configuration. Its file comes first"):
        parse_config(args)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in field_names():
        flag = "--init-from " if name == "run.init_from" else f"--{name.replace('_', '-')} "
        assert flag in text.replace(",", " ,"), flag
    assert "Images that share BN statistics" in text


def test_json_is_read_back():
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, mean=(0.5, 0.4, 0.25)))
    assert from_json(to_json(config), "here") == config
    assert json.loads(to_json(config))["optim"].keys() == {f.name for f in dataclasses.fields(config.optim)}


def test_a_field_that_an_older_version_did_not_have_keeps_its_default():
    data = json.loads(to_json(Config()))
    del data["model"]["zero_channels"]
    assert from_json(json.dumps(data), "here") == Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["model"].update(depht=20), "unknown field 'model.depht'; did you mean model.depth"),
        (lambda data: data.update(modl={}), "unknown field 'modl'; did you mean model"),
        (lambda data: data.update({"x" * 10_000: 1}), "unknown field 'x{60}'"),
        (lambda data: data.update(model=[]), "--model must be an object"),
        (lambda data: data["model"].update(depth="20"), "--model.depth must be a valid integer; got '20'"),
        (lambda data: data["run"].update(steps=True), "--run.steps must be a valid integer; got True"),
        (lambda data: data["run"].update(steps=-1), "--run.steps must be greater than 0"),
        (lambda data: data["run"].update(seed=2**32), "--run.seed must be less than 4294967296"),
        (lambda data: data["run"].update(init_from=3), "--init-from must be a valid string"),
        (lambda data: data["model"].update(shortcut="D"), "--model.shortcut must be 'none', 'A', 'B' or 'C'; got 'D'"),
        (lambda data: data["data"].update(mean=[1, 2]), "--data.mean: Field required"),
        (lambda data: data["data"].update(mean=[0, float("nan"), 0]), "--data.mean must be a finite number"),
        (lambda data: data["data"].update(dir="a\0b"), "--data.dir must match pattern"),
        (lambda data: data["optim"].update(boundaries=[1, [2]]), "--optim.boundaries must be a valid integer"),
    ],
)
def test_mistakes_in_the_json(change, message):
    data = json.loads(to_json(Config()))
    change(data)
    with pytest.raises(UserError, match=f"here is not a configuration.*{message}"):
        from_json(json.dumps(data), "here")


@pytest.mark.parametrize(
    "text", [to_json(Config())[:-10], "", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "[]", "null", "NaN", "\ufeff{}"]
)
def test_what_is_no_json_or_no_object(text):
    with pytest.raises(UserError, match="^here is not a configuration") as caught:
        from_json(text, "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_may_change_when_a_run_is_resumed():
    def change(**groups):
        fields = {name: dataclasses.replace(getattr(Config(), name), **values) for name, values in groups.items()}
        return dataclasses.replace(Config(), **fields)

    assert difference(Config(), Config()) is None
    assert difference(Config(), change(run={"steps": 100, "workdir": "x"}, data={"dir": "elsewhere"})) is None
    assert difference(Config(), change(model={"depth": 32})) == "model.depth is 20 there and 32 here"
    assert difference(Config(), change(run={"seed": 1})) == "run.seed is 0 there and 1 here"


@pytest.mark.parametrize(
    ("what", "field", "reason"),
    [
        ({"optim.schedule": "cosine"}, "run.steps", "the schedule cosine"),
        ({"optim.schedule": "plateau", "data.validation_size": 5000}, "run.eval_every", "the schedule plateau"),
        ({"model.bn_group_size": None}, "optim.accumulation_steps", "BN without groups"),
        ({"model.family": "vgg", "model.depth": 16}, "optim.accumulation_steps", "dropout"),
    ],
)
def test_what_may_not_change_because_something_follows_it(what, field, reason):
    def change(config, fields):
        for name, value in fields.items():
            group, field = name.split(".")
            config = dataclasses.replace(
                config, **{group: dataclasses.replace(getattr(config, group), **{field: value})}
            )
        return config

    usual, special = Config(), change(Config(), what)
    before = get_field(usual, field)
    assert difference(usual, change(usual, {field: 4})) is None
    expected = f"{field} is {before} there and 4 here, which {reason} depends on"
    assert difference(special, change(special, {field: 4})) == expected
    others = {name: 4 for name in ("run.steps", "run.eval_every", "optim.accumulation_steps") if name != field}
    assert difference(special, change(special, others)) is None


@pytest.mark.parametrize("model", [ModelConfig("vgg", 16), ModelConfig(frozen_bn=True)], ids=["vgg", "frozen"])
def test_networks_that_use_no_bn_groups_take_any_batch(model):
    config = Config(model, DataConfig(batch_size=100))  # which 64 does not divide
    check_config(config)
    assert config.bn_group_size is None
    with pytest.raises(UserError, match="does not divide into BN groups of 64"):
        check_config(Config(data=config.data))


@pytest.mark.parametrize(
    ("data", "streamed", "message"),
    [
        (DataConfig(), True, None),
        (DataConfig(), False, None),
        (DataConfig(padding=0), False, None),
        (DataConfig(lighting=0.1, crop="area", image_size=160, workers=3), True, None),
        (DataConfig("tfds:x", padding=0), True, "--data.padding is for images that are kept .* those of tfds:x are"),
        (DataConfig(lighting=0.1), False, "--data.lighting is for streamed images; .* cifar10 .* leave it at 0.0"),
        (DataConfig(shorter_side=(256, 300)), False, "--data.shorter-side is for streamed images"),
        (DataConfig(workers=0), False, "--data.workers is for streamed images; .* leave it at None"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(data, streamed, message):
    if message is None:
        check_applies(Config(data=data), streamed=streamed)
    else:
        with pytest.raises(UserError, match=message):
            check_applies(Config(data=data), streamed=streamed)
