"""Training runs on a made-up data set: records, checkpoints, resuming, stopping, mistakes."""

import dataclasses
import json
import os
import shutil
import signal
from functools import partial

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_bits, make_config, make_split, saved_state, tiny_dataset, without_times

import resnet_jax
from resnet_jax.config import OptimConfig
from resnet_jax.data import Dataset
from resnet_jax.data.resident import Sampler
from resnet_jax.data.types import Preprocessing
from resnet_jax.errors import DivergedError, Interrupted, UserError
from resnet_jax.evaluate import evaluate
from resnet_jax.models import abstract_variables, vgg
from resnet_jax.optim import build_optimizer, build_schedule
from resnet_jax.run.checkpoint import Checkpoints, restore
from resnet_jax.run.logs import RunLog
from resnet_jax.run.records import read_records
from resnet_jax.run.saved import best_step, saved_steps
from resnet_jax.run.workdir import load_config
from resnet_jax.steps import TrainState, create_train_state, make_train_step, make_train_steps
from resnet_jax.training import train


@pytest.fixture(autouse=True, scope="module")
def dataset():
    with tiny_dataset():
        yield


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """An undisturbed run of 12 steps and its final metrics."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, train(make_config(workdir))


def test_a_run_learns_and_records_what_it_did(finished):
    workdir, metrics = finished
    assert metrics.images == 53
    assert metrics.top1_error < 20  # 67 % by chance
    records = read_records(workdir)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("start", 0), ("train", 4), ("train", 5), ("train", 6), ("test", 6), ("train", 8), ("train", 10),
        ("train", 12), ("test", 12),
    ]  # fmt: skip
    train_records = [r for r in records if r["kind"] == "train"]
    assert sum(r["images"] for r in train_records) == 12 * 16
    assert [r["learning_rate"] for r in train_records] == pytest.approx([0.05] * 5 + [0.005])
    assert records[-1]["error"] == pytest.approx(metrics.top1_error)
    assert records[-1]["loss"] == pytest.approx(metrics.mean_loss)
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert all(tag in events for tag in (b"train/loss", b"train/learning_rate", b"test/error"))
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "config.json").read_text())["model"]["depth"] == 8
    assert saved_steps(workdir) == [4, 8, 12]
    assert [path.name for path in workdir.parent.iterdir()] == ["finished"]  # nothing temporary is left


def test_a_resumed_run_ends_with_the_same_bits_and_records(finished, tmp_path):
    workdir, metrics = finished
    train(make_config(tmp_path / "run", steps=8))
    (tmp_path / "run" / "curves.png").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # of steps after the last checkpoint
        file.write('{"kind": "train", "step": 9, "error": 1.0}\n{"kind": "tr')
    resumed = train(make_config(tmp_path / "run"))
    config = make_config(workdir)
    assert_same_bits(saved_state(tmp_path / "run", config), saved_state(workdir, config))
    assert_same_bits(resumed, metrics)
    whole, parts = (without_times(read_records(path)) for path in (workdir, tmp_path / "run"))
    assert [r for r in parts if (r["kind"], r["step"]) != ("test", 8)] == whole
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_damaged_checkpoint_costs_an_interval_and_nothing_else(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    for path in (workdir / "checkpoints" / "12" / "default" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    config = make_config(workdir)
    train(config)
    output = capsys.readouterr().out
    assert "warning: the checkpoint of step 12 is damaged (default/d/" in output
    assert f"{workdir}: going on after step 8\n" in output
    assert_same_bits(saved_state(workdir, config), saved_state(finished[0], config))
    records, expected = (without_times(read_records(path)) for path in (workdir, finished[0]))
    assert records == expected

    for path in (workdir / "checkpoints").rglob("checksums.json"):
        path.unlink()
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError, match="is intact .*or if only checksums are missing: python -m resnet_jax checkp"):
        train(config)
    assert sorted(workdir.rglob("*")) == before
    assert (workdir / "metrics.jsonl").read_text() != ""


def test_an_accelerator_makes_the_same_run_in_dispatches_of_one_length(finished, tmp_path, monkeypatch):
    """Also where something is due within one; its program is another one, so only rounding may differ."""
    for module in ("resnet_jax.trainer", "resnet_jax.run.monitor"):
        monkeypatch.setattr(f"{module}.counts_steps", lambda: True)
    metrics = train(make_config(tmp_path / "run"))
    records, expected = (without_times(read_records(path)) for path in (tmp_path / "run", finished[0]))
    assert [(r["kind"], r["step"], r.get("images")) for r in records] == [
        (r["kind"], r["step"], r.get("images")) for r in expected
    ]
    assert metrics.mean_loss == pytest.approx(finished[1].mean_loss, rel=1e-3)
    states = (saved_state(path, make_config(path)) for path in (tmp_path / "run", finished[0]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), *states)


def test_a_finished_run_is_only_evaluated_again(finished):
    workdir, metrics = finished
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    assert_same_bits(train(make_config(workdir)), metrics)
    assert {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")} == before
    with pytest.raises(UserError, match="is at step 12 already, beyond --run.steps 5"):
        train(make_config(workdir, steps=5))


def test_evaluation_needs_only_the_work_directory(finished):
    workdir, metrics = finished
    evaluation = evaluate([workdir])
    assert evaluation.step == 12
    assert evaluation.top1_error == pytest.approx(metrics.top1_error)
    assert evaluation.loss == pytest.approx(metrics.mean_loss, rel=1e-5)
    np.testing.assert_allclose(evaluation.class_errors, metrics.class_errors)
    assert evaluate([workdir], step=4).loss != pytest.approx(metrics.mean_loss, rel=1e-3)


def test_a_trained_network_is_loaded_without_the_data(finished):
    workdir, metrics = finished
    model, variables, origin = resnet_jax.load(workdir)
    assert origin.step == 12
    assert origin.config == make_config(workdir)
    assert origin.inputs.class_names == ("red", "green", "blue")
    split = make_split(53, seed=1)  # the test images
    logits = model.apply(variables, resnet_jax.preprocess(split.images, origin), train=False)
    assert int((logits.argmax(-1) != split.labels).sum()) == metrics.wrong["error"].sum()
    losses = -jax.nn.log_softmax(logits)[np.arange(53), split.labels]
    assert float(losses.mean()) == pytest.approx(metrics.mean_loss, rel=1e-4)
    assert resnet_jax.load(workdir, step=4).origin.step == 4
    with pytest.raises(ValueError, match="the mean is per pixel"):
        resnet_jax.preprocess(split.images[:, :7], origin)
    with pytest.raises(ValueError, match="expected uint8"):
        resnet_jax.preprocess(split.images / 255, origin)


def test_data_with_other_classes_is_refused(finished, monkeypatch):
    digits = Dataset("other", make_split(101, seed=0), make_split(53, seed=1), ("0", "1", "2"))
    monkeypatch.setattr("resnet_jax.data.sources.load_dataset", lambda name, data_dir: digits)
    with pytest.raises(UserError, match="other has the classes 0, 1, 2, but the weights are for red, green, blue"):
        evaluate([finished[0]])


def test_evaluation_of_what_is_not_there(finished, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 5; there are: 4, 8, 12"):
        evaluate([finished[0]], step=5)
    with pytest.raises(UserError, match="is not a work directory"):
        evaluate([tmp_path])


@pytest.mark.parametrize(
    ("signum", "at", "stopped"),
    [
        (signal.SIGTERM, 6, 6),  # in the evaluation, which is given up
        (signal.SIGINT, 5, 6),  # before it
        (signal.SIGTERM, 8, 9),
        (signal.SIGINT, 12, 12),  # in the last evaluation
    ],
)
def test_a_signal_saves_and_the_run_goes_on(finished, tmp_path, monkeypatch, signum, at, stopped):
    config = make_config(tmp_path / "run", steps_per_dispatch=1)
    write = RunLog.train

    def write_and_stop(self, step, *args, **kwargs):
        write(self, step, *args, **kwargs)
        if step == at:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "train", write_and_stop)
        message = rf"stopped by {signum.name} after step {stopped}, saved in .*run;"
        with pytest.raises(Interrupted, match=message) as stop:
            train(config)
    assert stop.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    assert saved_steps(tmp_path / "run")[-1] == stopped
    assert_same_bits(train(config), finished[1])
    assert_same_bits(saved_state(tmp_path / "run", config), saved_state(finished[0], config))
    evaluations = [
        [record for record in without_times(read_records(path)) if record["kind"] == "test"]
        for path in (tmp_path / "run", finished[0])
    ]
    assert evaluations[0] == evaluations[1]
    records = read_records(tmp_path / "run")
    assert_same_bits(train(config), finished[1])  # a finished run is not begun again
    assert read_records(tmp_path / "run") == records


def test_a_run_that_diverges_names_the_step_and_the_last_good_checkpoint(tmp_path):
    # 5 good steps, then a rate that makes the parameters overflow.
    optim = {"warmup": "steps", "warmup_steps": 5, "warmup_learning_rate": 0.01, "learning_rate": 1e30}
    config = make_config(tmp_path / "run", optim=optim, save_every=2)
    # On one device the numbers of step 6 are just small enough for its evaluation.
    what = "the test loss is nan after step 6|the gradient is nan at step 7"
    with pytest.raises(DivergedError, match=rf"({what}); the last good checkpoint is step 4"):
        train(config)
    assert saved_steps(tmp_path / "run")[:2] == [2, 4]


def test_the_last_checkpoints_and_the_best_on_validation_stay(tmp_path):
    config = make_config(tmp_path, steps=12, save_every=2, keep=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_size=30))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, workdir=str(tmp_path / "run")))
    train(config)
    records = [r for r in read_records(tmp_path / "run") if r["kind"] == "validation"]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10, 12]
    assert {r["images"] for r in records} == {30}
    errors = {r["step"]: r["error"] for r in records}
    best = best_step(tmp_path / "run")
    assert errors[best] == min(errors.values())
    assert saved_steps(tmp_path / "run") == sorted({best, 10, 12})


def test_without_a_validation_split_the_test_images_choose_nothing(finished):
    assert best_step(finished[0]) is None


def changed(config, group, **fields):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **fields)})


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        ("model", {"depth": 21}, r"--model.depth: depth must be 6n\+2: .* got 21"),
        ("data", {"batch_size": 128}, "a batch of 128 is larger than the 101 training images of tiny"),
        ("data", {"validation_size": 101}, "--data.validation-size 101: choose between 1 and 100"),
        ("optim", {"boundaries": (5, 5)}, "--optim.boundaries: .*must increase"),
        ("run", {"workdir": None}, "--run.workdir is not set"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, group, fields, message):
    with pytest.raises(UserError, match=message):
        train(changed(make_config(tmp_path / "run"), group, **fields))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_the_devices_cannot_divide(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    with pytest.raises(UserError, match="--data.batch-size 16 does not divide over 3 devices: choose a multiple of 3"):
        train(make_config(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_drops_of_the_rate_to_come_may_be_others(finished, tmp_path):
    """A finished run goes on with a further drop; the past is bound, also by what was changed then."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    config = make_config(workdir, optim={"boundaries": (10, 13)}, steps=14)
    train(config)
    rates = {record["step"]: record["learning_rate"] for record in read_records(workdir) if record["kind"] == "train"}
    assert rates[12] == pytest.approx(0.005)
    assert rates[14] == pytest.approx(0.0005)
    assert load_config(workdir).optim.boundaries == (10, 13)
    assert load_config(workdir).run.steps == 12  # as at first, and free
    message = f"optim.boundaries is .10, 13. there and .10,. here; .* --init-from {workdir}"
    with pytest.raises(UserError, match=message):
        train(make_config(workdir, steps=16))
    with pytest.raises(UserError, match="optim.learning_rate is 0.05 there and 0.1 here"):
        train(make_config(workdir, optim={"boundaries": (10, 13), "learning_rate": 0.1}, steps=16))


def test_work_directories_that_cannot_be_used(finished, tmp_path):
    workdir, _ = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    with pytest.raises(UserError, match="another configuration: model.depth is 8 there and 14 here"):
        train(changed(make_config(workdir), "model", depth=14))
    assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*")) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file exists and is not a work directory"):
        train(make_config(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the work directory .*Not a directory"):
        train(make_config(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="exists and is not a work directory"):
        train(make_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_work_directory_that_became_unwritable(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl: not a regular file"):
        train(make_config(tmp_path / "run"))


def test_a_network_without_bn_but_with_dropout_trains_too(tmp_path):
    model = vgg(16, num_classes=3)  # traced only: its 134 million parameters are not made
    schedule = build_schedule(OptimConfig(), steps=1)
    optimizer = build_optimizer(OptimConfig(), schedule)
    preprocessing = Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32))
    sampler = Sampler(jax.random.key(0), preprocessing, batch_size=4, num_images=9, padding=0, flip=True)
    steps = make_train_steps(make_train_step(model, optimizer, schedule, jax.random.key(1)), sampler)
    state = jax.eval_shape(partial(create_train_state, optimizer), abstract_variables(model, (32, 32, 3)))
    split = (jax.ShapeDtypeStruct((9, 32, 32, 3), np.uint8), jax.ShapeDtypeStruct((9,), np.int32))
    after, _ = jax.eval_shape(steps, state, split, jax.eval_shape(sampler.orders, np.int32(0)), np.int32(1))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)

    small = TrainState(np.int32(3), {"fc6": np.ones(2)}, {}, ())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small)
    checkpoints.wait()
    restored = restore(tmp_path, jax.tree.map(jax.numpy.asarray, small))
    assert restored.batch_stats == {}
    np.testing.assert_array_equal(restored.params["fc6"], 1)


def test_the_progress_bar_of_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    train(make_config(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "12/12" in out
    assert "images/s" in out
    assert "loss" in out
