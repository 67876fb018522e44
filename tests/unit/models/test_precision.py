"""What tests a trained network computes in full float32, whatever the device: read off the lowered programs."""

import ast
import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from paths import ROOT
from tiny_runs import TINY, make_config

from resnet_jax.config import Config, ModelConfig
from resnet_jax.convert.programs import export_program
from resnet_jax.data.inputs import describe_inputs
from resnet_jax.data.types import Batch, Inputs, Preprocessing
from resnet_jax.data.views import make_protocol
from resnet_jax.inference.load import Origin, Trained
from resnet_jax.inference.predict import probabilities
from resnet_jax.models import ResNet, abstract_variables, cifar_resnet, create_model, recalibrate_bn
from resnet_jax.models.backend import for_this_backend
from resnet_jax.optim import sgd
from resnet_jax.paper.analysis.responses import measure
from resnet_jax.steps import create_train_state, eval_step, make_train_step
from resnet_jax.trainer import Trainer

MODEL = ResNet("cifar", "basic", (1, 2), (4, 6), num_classes=3, shortcut="B", bn_group_size=4)
IMAGES = np.random.RandomState(0).randint(0, 256, (8, 8, 8, 3)).astype(np.uint8)
NORMALIZED = IMAGES / np.float32(255)


def products(program):
    """The precision of each convolution and matrix product in StableHLO: two words, one for each factor."""
    lines = [line for line in program.splitlines() if re.search(r"stablehlo\.(convolution|dot_general)\b", line)]
    return [tuple(re.findall(r"\b(DEFAULT|HIGHEST|HIGH)\b", line)) for line in lines]


@pytest.fixture(scope="module")
def trained():
    variables = MODEL.init(jax.random.key(0), NORMALIZED, train=False)
    preprocessing = Preprocessing(np.float32([0.4, 0.5, 0.6]), np.float32([1, 1, 1]))
    return Trained(
        MODEL, variables, Origin(Config(model=ModelConfig(depth=8)), 0, Inputs((8, 8, 3), tuple("abc"), preprocessing))
    )


@pytest.fixture
def compiled(tmp_path):
    """A function that returns all products of the programs compiled so far in this test."""
    folder = tmp_path / "programs"
    jax.config.update("jax_dump_ir_to", str(folder))
    yield lambda: [product for path in sorted(folder.glob("*")) for product in products(path.read_text())]
    jax.config.update("jax_dump_ir_to", "")


def predict_views(trained, protocol):
    probabilities(trained, IMAGES, protocol, batch_size=4)


WAYS = {
    "single": lambda trained, _: predict_views(trained, make_protocol("single", (8, 8))),
    "10crop": lambda trained, _: predict_views(trained, make_protocol("10crop", (8, 8))),
    "multiscale": lambda trained, _: predict_views(trained, make_protocol("multiscale", (8, 8), (9,))),
    "responses": lambda trained, _: measure(MODEL, trained.variables, lambda x: x / jnp.float32(255), IMAGES),
    "recalibrate_bn": lambda trained, _: recalibrate_bn(MODEL, trained.variables, [NORMALIZED]),
    "export": lambda trained, folder: export_program(trained, "stablehlo", folder / "network"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_tests_a_network_is_compiled_to_full_float32(trained, tmp_path, compiled, way):
    if way == "export":
        pytest.importorskip("flatbuffers")
    WAYS[way](trained, tmp_path)
    layers = sum("kernel" in path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained.variables))
    assert len(compiled()) >= layers - (way in ("responses", "recalibrate_bn"))  # these do without the last one
    assert set(compiled()) == {("HIGHEST", "HIGHEST")}


def test_an_exported_program_says_so_itself(trained, tmp_path):
    pytest.importorskip("flatbuffers")
    bfloat16 = trained._replace(model=MODEL.clone(dtype=jnp.bfloat16))
    export_program(bfloat16, "stablehlo", tmp_path / "network")
    program = jax.export.deserialize(bytearray((tmp_path / "network").read_bytes())).mlir_module()
    assert set(products(program)) == {("HIGHEST", "HIGHEST")}


def make_trainer(tmp_path, **optim):
    config = make_config(tmp_path / "run", optim=optim)
    return Trainer(config, describe_inputs(config, TINY), TINY)


def test_training_evaluates_in_full_float32_whatever_its_own_precision(tmp_path, compiled):
    trainer = make_trainer(tmp_path, precision="high")
    state = trainer.initial_state()
    before = len(compiled())
    trainer.evaluate(state, "test")
    assert set(compiled()[before:]) == {("HIGHEST", "HIGHEST")}
    program = trainer.train_program.lower(state, *trainer.data.begin(0)).as_text()
    assert set(products(program)) == {("HIGH", "HIGH")}


def abstract(model, image_shape, size=8):
    """A state and a batch, of shapes."""
    optimizer = sgd(optax.constant_schedule(0.1))
    state = jax.eval_shape(partial(create_train_state, optimizer), abstract_variables(model, image_shape))
    shapes = ((size, *image_shape), jnp.float32), ((size,), jnp.int32), ((size,), jnp.bool)
    return optimizer, state, Batch(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (create_model("resnet50"), 54),
        (create_model("vgg16"), 18),  # 13 convolutions, the 2 factors of the pool, 3 layers
        (cifar_resnet(20, dtype=jnp.bfloat16), 20),
        (cifar_resnet(20, scan_blocks=True), 14),
    ],
    ids=["resnet50", "vgg16", "bfloat16", "scan_blocks"],
)
def test_every_layer_of_every_family(model, count):
    _, state, batch = abstract(model, (32, 32, 3))
    program = jax.jit(partial(eval_step, model=model)).lower(state, batch).as_text()
    assert products(program) == [("HIGHEST", "HIGHEST")] * count


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (cifar_resnet(8, bn_group_size=4), 1),
        (for_this_backend(cifar_resnet(8, bn_group_size=4, scan_blocks=True, remat=True)), 2),
        (create_model("vgg16"), 1),
    ],
    ids=["plainly", "all options", "vgg16"],
)
def test_training_has_its_precision_forward_and_backward(model, parts, precision):
    optimizer, state, batch = abstract(model, (32, 32, 3))
    step = partial(make_train_step, model, optimizer, lambda step: 0.1, jax.random.key(0), accumulation_steps=parts)
    program = jax.jit(step(precision=precision)).lower(state, batch).as_text()
    found = products(program)
    assert set(found) == {(precision.upper(),) * 2}
    assert (
        len(found)
        >= 3 * sum(path[-1].key == "kernel" for path, _ in jax.tree_util.tree_leaves_with_path(state.params)) - 1
    )  # the stem has no gradient of its input
    assert precision != "default" or program == jax.jit(step()).lower(state, batch).as_text()


def test_the_default_leaves_the_setting_of_jax_to_training_and_not_to_evaluation():
    model = cifar_resnet(8, bn_group_size=4)
    optimizer, state, batch = abstract(model, (8, 8, 3))
    with jax.default_matmul_precision("high"):  # as JAX_DEFAULT_MATMUL_PRECISION does
        training = jax.jit(make_train_step(model, optimizer, lambda step: 0.1, jax.random.key(0)))
        assert set(products(training.lower(state, batch).as_text())) == {("HIGH", "HIGH")}
        evaluation = jax.jit(partial(eval_step, model=model)).lower(state, batch)
        assert set(products(evaluation.as_text())) == {("HIGHEST", "HIGHEST")}


def applications(tree, inside=False):
    """Yield (line, whether it is inside full_float32()) of all that applies a network."""
    for node in ast.iter_child_nodes(tree):
        contexts = [ast.unparse(item.context_expr) for item in node.items] if isinstance(node, ast.With) else []
        if isinstance(node, ast.Call) and (
            (ast.unparse(node.func).endswith(".apply") and any(keyword.arg == "train" for keyword in node.keywords))
            or ast.unparse(node.func) == "fully_convolutional_logits"
        ):
            yield ast.unparse(node), inside
        yield from applications(node, inside or "full_float32()" in contexts)


def test_nothing_else_applies_a_network():
    """A new way to test one is to stand in full_float32(), and in the list above."""
    found = {
        path.relative_to(ROOT / "resnet_jax").as_posix(): list(applications(ast.parse(path.read_text())))
        for path in (ROOT / "resnet_jax").rglob("*.py")
    }
    without = {name: [line for line, inside in lines if not inside] for name, lines in found.items()}
    assert {name: len(lines) for name, lines in without.items() if lines} == {
        "gradients.py": 1,  # the loss of training
        "models/fully_convolutional.py": 1,  # a part of probabilities()
    }
    assert {name for name, lines in found.items() if any(inside for _, inside in lines)} == {
        "steps.py", "inference/predict.py", "convert/programs.py",
        "paper/analysis/responses.py", "models/recalibrate.py",
    }  # fmt: skip
