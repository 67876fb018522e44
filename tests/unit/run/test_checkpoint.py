"""Damaged checkpoints are found, named and never used; what was complete survives."""

from __future__ import annotations

import dataclasses
import logging
import random
import shutil

import jax
import numpy as np
import pytest

from resnet_jax.cli.commands import main
from resnet_jax.config import Config, ModelConfig, to_json
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError
from resnet_jax.inference.load import load
from resnet_jax.models import abstract_variables, build_model
from resnet_jax.models.stacking import is_stacked, unstack_blocks
from resnet_jax.run.checkpoint import Checkpoints, restore
from resnet_jax.run.saved import (
    CHECKSUMS,
    METADATA,
    accept,
    best_step,
    mark_evaluated,
    recover,
    saved_steps,
    unfinished,
    verify,
    was_evaluated,
)
from resnet_jax.run.workdir import create_workdir
from resnet_jax.steps import TrainState

STEPS = (4, 8, 12)


def state_of(step: int) -> TrainState:
    kernel = np.random.RandomState(step).normal(size=(3, 3, 16, 16)).astype(np.float32)
    return TrainState(np.array(step, np.int32), {"conv1": {"kernel": kernel}}, {"bn1": {"mean": kernel[0, 0, 0]}}, ())


def assert_is(state: TrainState, step: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of three steps, the second one evaluated best, the last one not evaluated."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(Config()))
    checkpoints = Checkpoints(workdir, keep=3)
    for step, error in zip(STEPS, (20.0, 10.0, None), strict=True):
        checkpoints.save(state_of(step), validation_error=error, evaluated=error is not None)
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def checkpoint(workdir, step):
    return workdir / "checkpoints" / str(step)


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_intact_checkpoints_are_restored_with_what_was_noted(saved):
    assert saved_steps(saved) == list(STEPS)
    for step in STEPS:
        assert verify(saved, step) is None
        assert_is(restore(saved, state_of(0), step), step)
    assert_is(restore(saved, state_of(0)), 12)
    assert best_step(saved) == 8
    assert [was_evaluated(saved, step) for step in STEPS] == [True, True, False]
    assert recover(saved) == []
    assert saved_steps(saved) == list(STEPS)


def test_a_missed_evaluation_is_noted_when_it_is_made(workdir):
    mark_evaluated(workdir, 12)
    assert was_evaluated(workdir, 12)
    assert verify(workdir, 12) is None
    assert_is(restore(workdir, state_of(0)), 12)
    Checkpoints(workdir, keep=3).close()  # orbax reads it, too


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    position = random.Random(path.name).randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def remove(path):
    path.unlink()


def no_checksums(folder):
    (folder / CHECKSUMS).unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def half_copied(folder):
    """As a rename that is not atomic leaves it."""
    for path in files_of(folder)[::2]:
        path.unlink()


def swapped(folder):
    """With the arrays of another step."""
    shutil.rmtree(folder / "default")
    shutil.copytree(folder.parent / "4" / "default", folder / "default")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, remove])
def test_every_file_of_a_checkpoint_is_watched(workdir, damage):
    folder = checkpoint(workdir, 12)
    # The second says only that the rename was about to come; of the first nothing is a number of the state.
    unwatched = {METADATA, "commit_success.txt"}
    watched = [path for path in files_of(folder) if path.parent != folder or path.name not in unwatched]
    assert len(watched) > 8
    for path in watched:
        whole = path.read_bytes()
        if not whole:
            continue
        damage(path)
        found = verify(workdir, 12)
        assert found is not None, path
        if path.name != CHECKSUMS:  # which a flipped bit may make name another file
            assert path.relative_to(folder).as_posix() in str(found)
            assert ("is missing" in str(found)) == (damage is remove)
        path.write_bytes(whole)
    assert verify(workdir, 12) is None


@pytest.mark.parametrize("position", range(0, 8 * 300, 97))
def test_a_flipped_bit_in_the_notes_of_orbax_changes_no_number(workdir, position):
    path = checkpoint(workdir, 12) / METADATA
    data = bytearray(path.read_bytes())
    data[position // 8 % len(data)] ^= 1 << position % 8
    path.write_bytes(data)
    intact = verify(workdir, 12) is None
    assert_is(restore(workdir, state_of(0)), 12 if intact else 8)


@pytest.mark.parametrize("damage", [no_checksums, empty, half_copied, swapped])
def test_the_newest_intact_checkpoint_is_used(workdir, damage, capsys):
    damage(checkpoint(workdir, 12))
    fault = str(verify(workdir, 12))
    assert_is(restore(workdir, state_of(0)), 8)
    assert f"warning: the checkpoint of step 12 is damaged ({fault}): using step 8" in capsys.readouterr().err
    with pytest.raises(UserError, match="the checkpoint of step 12 in .* is damaged"):
        restore(workdir, state_of(0), 12)

    left = files_of(checkpoint(workdir, 12))
    (line,) = recover(workdir)
    assert f"step 12 is damaged ({fault}): moved to {workdir / 'damaged' / '12'}" in line
    assert saved_steps(workdir) == [4, 8]
    assert len(files_of(workdir / "damaged" / "12")) == len(left)  # nothing is deleted
    assert recover(workdir) == [f"the checkpoint of step 12 is gone from {workdir / 'checkpoints'}"]
    # The step can be saved again.
    checkpoints = Checkpoints(workdir, keep=3)
    checkpoints.save(state_of(12))
    checkpoints.wait()
    assert_is(restore(workdir, state_of(0)), 12)


def test_if_none_is_intact_nothing_is_done(workdir):
    for step in STEPS:
        truncate(checkpoint(workdir, step) / "default" / "manifest.ocdbt")
    before = files_of(workdir)
    fault = r"no checkpoint in .*/checkpoints is intact \(step 4: default/manifest.ocdbt has changed; step 8: "
    with pytest.raises(UserError, match=fault):
        recover(workdir)
    with pytest.raises(UserError, match="is intact"):
        restore(workdir, state_of(0))
    assert files_of(workdir) == before


def test_lost_checkpoints_do_not_begin_a_run_again(workdir):
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints is empty, but a checkpoint of step 12 was saved there: copy it"):
        recover(workdir)
    (workdir / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is empty"):
        recover(workdir)


def test_a_new_run_has_nothing_to_recover(tmp_path):
    assert recover(tmp_path) == []


def test_what_a_killed_run_was_saving_does_not_count_and_is_removed(workdir):
    half = checkpoint(workdir, "16.orbax-checkpoint-tmp")
    shutil.copytree(checkpoint(workdir, 12), half)
    assert saved_steps(workdir) == list(STEPS)
    assert unfinished(workdir) == [half.name]
    assert recover(workdir) == []
    checkpoints = Checkpoints(workdir, keep=3)
    checkpoints.save(state_of(20))
    checkpoints.close()
    assert unfinished(workdir) == []
    assert saved_steps(workdir) == [8, 12, 20]


def test_an_old_checkpoint_that_was_being_removed_is_removed(workdir):
    half_copied(checkpoint(workdir, 4) / "default")
    assert recover(workdir) == []
    assert saved_steps(workdir) == [8, 12]
    assert not (workdir / "damaged").exists()


def test_an_old_checkpoint_without_checksums_is_kept(workdir):
    no_checksums(checkpoint(workdir, 4))
    assert "moved to" in recover(workdir)[0]
    assert files_of(workdir / "damaged" / "4")


def test_a_checkpoint_that_is_removed_while_it_is_read_is_no_damage(workdir, monkeypatch):
    """A run that goes on saves a new one and removes the one that another program has begun to read."""

    def removed(path):
        monkeypatch.undo()
        for step in STEPS:
            shutil.rmtree(checkpoint(workdir, step))
        checkpoints = Checkpoints(workdir)
        checkpoints.save(state_of(16))
        checkpoints.close()
        raise FileNotFoundError(path)

    monkeypatch.setattr("resnet_jax.run.saved._sha256", removed)
    assert_is(restore(workdir, state_of(0)), 16)


def test_a_checkpoint_of_another_network_is_a_mistake_of_the_user(saved):
    other = state_of(0)
    other = TrainState(other.step, {"conv1": {"kernel": np.zeros((3, 3, 16, 32), np.float32)}}, other.batch_stats, ())
    with pytest.raises(UserError, match=r"checkpoints/12 does not fit the network of config.json there: "):
        restore(saved, other)
    for opt_state in ({"more": np.zeros(3)}, ({"scale": np.zeros(())},)):  # of another optimizer
        with pytest.raises(UserError, match=r"checkpoints/12 does not fit the network of config.json there: "):
            restore(saved, dataclasses.replace(state_of(0), opt_state=opt_state))
    less = dataclasses.replace(state_of(0), batch_stats={})
    with pytest.raises(UserError, match=r"checkpoints/12 does not fit the network of config.json there: "):
        restore(saved, less)


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_weights_are_loaded_whatever_the_optimizer_was(tmp_path, scan_blocks):
    shape, random = (8, 8, 3), np.random.RandomState(0)
    config = Config(ModelConfig(depth=14))
    shapes = abstract_variables(build_model(config.model, 2), shape)
    weights = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    other = {"mu": weights["params"], "count": np.int32(7)}
    state = TrainState(np.array(3, np.int32), weights["params"], weights["batch_stats"], other)
    zero_mean = Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32))
    create_workdir(tmp_path / "run", config, Inputs(shape, ("a", "b"), zero_mean), state)
    trained = load(tmp_path / "run", scan_blocks=scan_blocks)
    assert trained.origin.step == 3
    assert is_stacked(trained.variables) == scan_blocks
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(trained.variables), weights)


def test_saving_without_a_validation_error_gives_no_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "absl")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(4))
    checkpoints.close()
    assert [record.getMessage() for record in caplog.records] == []


def test_links_are_no_files_of_a_checkpoint(workdir):
    outside, folder = workdir / "outside", checkpoint(workdir, 12)
    outside.write_text("secret")
    (folder / "link").symlink_to(outside)
    accept(workdir, 12)
    outside.write_text("changed")
    assert verify(workdir, 12) is None
    (folder / "default" / "manifest.ocdbt").rename(outside)
    (folder / "default" / "manifest.ocdbt").symlink_to(outside)
    assert str(verify(workdir, 12)) == "default/manifest.ocdbt is missing"


@pytest.mark.parametrize("text", ["", "[", "[]", "3", '{"a": 1}', "[" * 100_000, "\ufffe"])
def test_checksums_that_are_none(workdir, text):
    for encoding in ("utf-8", "utf-16"):
        (checkpoint(workdir, 12) / CHECKSUMS).write_text(text, encoding=encoding)
        assert verify(workdir, 12) is not None


def test_the_command_lists_and_verifies(workdir, capsys):
    assert main(["checkpoints", str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "4", "8", "12"]
    assert lines[1].endswith("20.00 %  intact")
    assert lines[2].endswith("10.00 %  intact, the best")
    assert lines[3].endswith("intact, the last")

    flip_a_bit(next(path for path in files_of(checkpoint(workdir, 12)) if path.parent.name == "d"))
    no_checksums(checkpoint(workdir, 8))
    shutil.copytree(checkpoint(workdir, 12), checkpoint(workdir, "16.orbax-checkpoint-tmp"))
    assert main(["checkpoints", str(workdir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("intact, the last")
    assert "damaged: checksums.json is missing" in lines[2]
    assert "/d/" in lines[3]
    assert lines[3].endswith("has changed")
    assert "--accept STEP" in lines[4]
    assert lines[5].startswith("16.orbax-checkpoint-tmp: being saved")

    assert main(["checkpoints", str(workdir), "--accept", "8"]) == 1  # 12 is still damaged
    assert "8 " in capsys.readouterr().out
    assert verify(workdir, 8) is None
    with pytest.raises(UserError, match="no checkpoint of step 5; there are: 4, 8, 12"):
        accept(workdir, 5)
    with pytest.raises(UserError, match="is not a work directory"):
        main(["checkpoints", str(workdir / "checkpoints")])
