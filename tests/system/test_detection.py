"""Detection as a user runs it: it learns, goes on with the same bits, does the same on more devices, draws."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from detection_runs import make_detection_config, with_steps
from flax.traverse_util import flatten_dict
from paths import ROOT, SHARED
from PIL import Image
from tiny_runs import assert_same_bits, without_times
from voc_sets import make_set, write_set

import resnet_jax
from resnet_jax.data.detection import describe_detection, load_annotated
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.detection_trainer import DetectionTrainer
from resnet_jax.errors import UserError
from resnet_jax.evaluate_detection import evaluate_detection
from resnet_jax.inference.load import build_network
from resnet_jax.models.stacking import init_variables
from resnet_jax.optim import sgd
from resnet_jax.run.checkpoint import restore
from resnet_jax.run.records import read_records
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import create_train_state
from resnet_jax.training import train

BCCD = SHARED / "data" / "bccd"


def state_of(config, step=None):
    dataset = load_annotated(config)
    trainer = DetectionTrainer(config, describe_detection(config, dataset), dataset)
    return jax.device_get(restore(Path(config.run.workdir), trainer.abstract_state(), step))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"), 8, portrait=3)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Four images of rectangles, learned by heart."""
    folder = tmp_path_factory.mktemp("learned")
    make_set(folder / "set", 4, portrait=0)
    config = make_detection_config(
        folder / "set",
        folder / "run",
        model={"width": 0.125, "bn_decay": 0.98},
        optim={"boundaries": (500,), "warmup": "linear", "warmup_steps": 20},
        detection={"regions": 32, "anchor_scales": (1.5, 2.5)},
        steps=600,
        log_every=100,
        eval_every=600,
        save_every=600,
    )
    return folder, config, train(config)


def test_four_images_are_learned_by_heart(learned):
    _, _, score = learned
    assert score.mean_average_precision > 90
    assert score.recall > 90


def test_a_mirrored_image_has_mirrored_detections(learned):
    folder, config, _ = learned
    trained = resnet_jax.load(config.run.workdir)
    pixels = np.asarray(Image.open(folder / "set" / "JPEGImages" / "000000.jpg"))
    plain, mirrored = resnet_jax.detect(trained, [pixels, pixels[:, ::-1].copy()], threshold=0.5)
    assert len(plain.scores) == len(mirrored.scores) > 0
    width = pixels.shape[1]
    expected = np.stack(
        [width - plain.boxes[:, 2] - 1, plain.boxes[:, 1], width - plain.boxes[:, 0] - 1, plain.boxes[:, 3]], 1
    )
    for box, k in zip(expected, plain.classes, strict=True):
        of_class = mirrored.boxes[mirrored.classes == k]
        assert np.abs(of_class - box).max(1).min() < 8  # pixels, of boxes of 20 to 45


def test_files_and_arrays_give_the_same_and_boxes_are_in_pixels_of_the_image(learned):
    folder, config, _ = learned
    trained = resnet_jax.load(config.run.workdir)
    path = folder / "set" / "JPEGImages" / "000001.jpg"
    pixels = np.asarray(Image.open(path))
    small, of_path = resnet_jax.detect(trained, [pixels, path], threshold=0.5)
    np.testing.assert_array_equal(small.boxes, of_path.boxes)
    large = np.kron(pixels, np.ones((2, 2, 1), np.uint8))
    (doubled,) = resnet_jax.detect(trained, [large], threshold=0.5)
    assert len(doubled.scores) >= 1
    best = small.boxes[small.classes == doubled.classes[0]]
    assert np.abs(2 * best - doubled.boxes[0]).max(1).min() < 8
    with pytest.raises(UserError, match="cannot read the image"):
        resnet_jax.detect(trained, ["nowhere.jpg"])
    with pytest.raises(ValueError, match="uint8"):
        resnet_jax.detect(trained, [np.zeros((9, 9, 3))])


def test_evaluating_again_gives_what_training_said(learned):
    _, config, score = learned
    again = evaluate_detection(config.run.workdir)
    np.testing.assert_allclose(again.score.average_precisions, score.average_precisions, atol=1e-6)
    assert again.score.recall == score.recall


def test_a_run_that_is_cut_in_two_ends_with_the_same_bits(tmp_path, data_dir):
    """Both shapes of arrays come within these steps."""
    whole = make_detection_config(data_dir, tmp_path / "whole", steps=6, log_every=1, save_every=3, eval_every=6)
    train(whole)
    parts = make_detection_config(data_dir, tmp_path / "parts", steps=3, log_every=1, save_every=3, eval_every=6)
    train(parts)
    train(with_steps(parts, 6))
    assert_same_bits(state_of(whole), state_of(with_steps(parts, 6)))
    records = [without_times(read_records(Path(config.run.workdir))) for config in (whole, parts)]
    of_training = [[record for record in one if record["kind"] == "train"] for one in records]
    assert of_training[0] == of_training[1]
    assert {"rpn_class_loss", "rpn_box_loss", "region_class_loss", "region_box_loss"} < of_training[0][0].keys()


def test_the_four_stages_train_what_they_should_and_go_on_across_their_borders(tmp_path):
    data_dir = make_set(tmp_path / "set", 4, portrait=0)
    stages = {"schedule": "alternating", "rpn_steps": (1, 1), "region_steps": (2, 0)}
    config = make_detection_config(
        data_dir,
        tmp_path / "run",
        model={"frozen_bn": True},
        detection=stages,
        steps=8,
        save_every=2,
        eval_every=8,
        keep=9,
    )
    train(config)
    trainer = DetectionTrainer(config, describe_detection(config, load_annotated(config)), load_annotated(config))
    states = [jax.device_get(trainer.initial_state()), *(state_of(config, step) for step in (2, 4, 6, 8))]
    changed = []
    for before, after in itertools.pairwise(states):
        old, new = flatten_dict(before.params), flatten_dict(after.params)
        changed.append({path[0] for path in old if (old[path] != new[path]).any()})
    assert changed == [
        {"rpn_trunk", "rpn"},
        {"trunk", "tail", "scores", "deltas"},
        {"rpn"},
        {"tail", "scores", "deltas"},
    ]
    rates = [record["learning_rate"] for record in read_records(tmp_path / "run") if record["kind"] == "train"]
    np.testing.assert_allclose(rates, [0.002, 0.02, 0.002, 0.02])  # of steps 2, 4, 6, 8
    assert len(resnet_jax.detect(resnet_jax.load(tmp_path / "run"), np.zeros((1, 72, 96, 3), np.uint8))) == 1

    # Begun again from the end of the second stage.
    parts = dataclasses.replace(config, run=dataclasses.replace(config.run, workdir=str(tmp_path / "parts")))
    interrupted = tmp_path / "parts"
    subprocess.run(["cp", "-r", tmp_path / "run", interrupted], check=True)
    for step in (6, 8):
        subprocess.run(["rm", "-r", interrupted / "checkpoints" / str(step)], check=True)
    (interrupted / "last_checkpoint").write_text("4")
    train(parts)
    assert_same_bits(state_of(config), state_of(parts))


def test_a_detector_begins_with_the_weights_of_a_classifier(tmp_path, data_dir):
    config = make_detection_config(data_dir, tmp_path / "run", steps=1, model={"frozen_bn": True})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mean=None))
    classifier = dataclasses.replace(config, data=type(config.data)())
    classifier = dataclasses.replace(classifier, detection=type(config.detection)(), run=type(config.run)())
    model = build_network(classifier, 5)
    variables = init_variables(model, jax.random.key(7), (64, 64, 3))
    mean = Preprocessing(np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.2, 0.2]))
    state = create_train_state(sgd(lambda step: 0.1), variables)
    create_workdir(tmp_path / "classifier", classifier, Inputs((64, 64, 3), tuple("abcde"), mean), state)

    with pytest.raises(UserError, match="nothing says what to subtract"):
        train(config)
    begun = dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=str(tmp_path / "classifier")))
    frozen = dataclasses.replace(begun, optim=dataclasses.replace(begun.optim, trainable=("head",)))
    train(frozen)
    found = state_of(dataclasses.replace(frozen, data=dataclasses.replace(frozen.data, mean=(0.4, 0.5, 0.6))))
    for part in ("trunk", "tail"):
        for path, leaf in flatten_dict(found.params[part]).items():
            np.testing.assert_array_equal(leaf, flatten_dict(variables["params"])[path])
    np.testing.assert_allclose(resnet_jax.load(tmp_path / "run").origin.inputs.preprocessing.mean, mean.mean)


DEVICES = r"""
import json, re, sys
import jax, numpy as np
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from detection_runs import make_detection_config
from resnet_jax.data.detection import describe_detection, load_annotated
from resnet_jax.detection_trainer import DetectionTrainer
import dataclasses
config = make_detection_config(Path(sys.argv[1]), Path("unused"), model={"frozen_bn": True})
config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8, eval_batch_size=8))
dataset = load_annotated(config)
trainer = DetectionTrainer(config, describe_detection(config, dataset), dataset)
state = trainer.initial_state()
trainer.begin(state)
(program,) = trainer._programs.values()
text = program.as_text()
kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
collectives = re.findall(rf"= (\w+\[[\d,]*\])\S* ({kinds})(?:-start)?\(", text)  # such as f32[78042], all-reduce
state, report = trainer.train(state, 1)
score = trainer.evaluate(state, "test")
trainer.data.close()
leaves = jax.tree_util.tree_leaves_with_path(state.params)
np.savez(sys.argv[3], **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
print(json.dumps({"devices": jax.device_count(), "collectives": collectives, "recall": score.recall,
                  "loss": float(report.history.metrics.loss[0])}))
"""


def test_eight_devices_do_what_one_does_with_a_single_sum(tmp_path, data_dir):
    """No suppression waits for another device: gradients and metrics are summed up, unreadable images counted."""
    found = []
    for devices in (1, 8):
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", DEVICES, str(data_dir), str(ROOT / "tests"), str(tmp_path / f"{devices}.npz")]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout.splitlines()[-1]))
    one, eight = found
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["collectives"] == []
    sums = [shape for shape, kind in eight["collectives"] if kind == "all-reduce"]
    assert len(sums) == len(eight["collectives"])
    assert sorted(shape.endswith("[]") for shape in sums) == [False, True]
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert eight["recall"] == pytest.approx(one["recall"], abs=5)
    with np.load(tmp_path / "1.npz") as a, np.load(tmp_path / "8.npz") as b:
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4)


def run(*args, code=0):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def test_the_commands(learned, tmp_path):
    folder, config, score = learned
    workdir, image = config.run.workdir, folder / "set" / "JPEGImages" / "000000.jpg"
    tested = run("eval.py", workdir, "--metric", "voc12", "--results", tmp_path / "results", "--json").stdout
    result = json.loads(tested.splitlines()[-1])
    assert result["images"] == 4
    assert result["mean_average_precision"] > 85
    assert set(result["average_precision"]) == {"red", "green", "blue"}
    (line, *_) = (tmp_path / "results" / "comp4_det_test_red.txt").read_text().splitlines()
    assert re.fullmatch(r"00000\d 0\.\d{6}( \d+\.\d){4}", line)

    listed = run("-m", "resnet_jax", "detect", workdir, image, "--json").stdout
    objects = json.loads(listed)["objects"]
    assert {"class", "score", "box"} == objects[0].keys()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    drawn = run("-m", "resnet_jax", "detect", workdir, image, broken, "--out", tmp_path / "drawn")
    assert "cannot read" in drawn.stderr
    assert Image.open(tmp_path / "drawn" / "000000.png").size == Image.open(image).size

    run("-m", "resnet_jax", "report", workdir, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"{result['mean_average_precision']:.2f}" in page or f"{score.mean_average_precision:.2f}" in page
    assert page.count("data:image/jpeg") == 4
    run(
        "-m",
        "resnet_jax",
        "data",
        "show",
        folder / "set",
        "--sets",
        "trainval",
        "--images",
        3,
        "--out",
        tmp_path / "t.png",
    )
    assert Image.open(tmp_path / "t.png").width > 900

    assert "detects objects" in run("eval.py", workdir, "--protocol", "10crop", code=2).stderr
    for command in (["predict", workdir, image], ["export", workdir, "--format", "onnx", "--out", tmp_path / "x"]):
        error = run("-m", "resnet_jax", *command, code=2).stderr
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1


def test_data_check_names_what_is_left_out(tmp_path):
    folder = make_set(tmp_path / "set", 4, portrait=0)
    clean = run("-m", "resnet_jax", "data", "check", folder)
    assert "test: 4 images" in clean.stdout
    xml = folder / "Annotations" / "000001.xml"
    xml.write_text(re.sub(r"<xmax>\d+", "<xmax>0", xml.read_text(), count=1))
    (folder / "JPEGImages" / "000002.jpg").write_bytes(b"")
    found = run("-m", "resnet_jax", "data", "check", folder, code=1).stdout
    assert re.search(r"000001: object 1 \(\w+\): its box is empty", found)
    assert "000002: cannot read the image: the file is empty" in found


@pytest.mark.slow
@pytest.mark.skipif(not BCCD.is_dir(), reason="the blood cells (../shared/data/bccd) are not here")
def test_four_micrographs_are_learned_by_heart(tmp_path):
    ids = (BCCD / "ImageSets" / "Main" / "train.txt").read_text().split()[:4]
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).symlink_to(BCCD / name)
    write_set(tmp_path / "set", {"trainval": ids, "test": ids})
    options = ["--data.dir", tmp_path / "set", "--run.workdir", tmp_path / "run", "--run.steps", 300]
    options += ["--optim.boundaries", 250, "--run.eval-every", 300]
    result = run("train.py", "configs/bccd_resnet18.py", *options)
    assert float(re.search(r"test AP@.5 ([\d.]+) %", result.stdout.splitlines()[-2])[1]) > 90
