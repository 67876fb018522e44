"""The commands that would fill what is missing, and running them within a budget."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from resnet_jax.config import Config, field_names, get_field, option
from resnet_jax.data.views import ProtocolName, make_protocol
from resnet_jax.errors import CommandError, UserError
from resnet_jax.paper.analysis.responses import read_responses
from resnet_jax.paper.artefact import Artefact, Command
from resnet_jax.paper.networks import Network
from resnet_jax.paper.runs import Run, Runs
from resnet_jax.run.checkpoint import saved_steps

# Images of the input's size that take as long: 10 views; both mirror images of five scales, in area.
_SCALES = make_protocol("multiscale", (224, 224)).scales
_VIEWS = {"single": 1, "10crop": 10, "multiscale": 2 * sum((scale / 224) ** 2 for scale in _SCALES)}
_BACKWARD = 3  # a training step takes about three times the multiply-adds of the forward pass


def missing_commands(
    network: Network,
    runs: Runs,
    *,
    seeds: int | None = None,
    protocol: ProtocolName | None = None,
    responses: bool = False,
    curves: bool = False,
) -> list[Command]:
    """Return what is still to be done for a network.

    An ImageNet network need not be trained here: imported weights fill a cell, too.

    Args:
      seeds: how often it is to be trained; None for as often as in the paper.
      protocol: that it is to be tested by, if it is.
      responses: whether its layer responses are to be measured.
      curves: whether its training curves are needed, which imported weights do not have.
    """
    commands = []
    of_network = runs.of(network)
    imports_do = not network.is_cifar and not curves
    if network.is_trained and not (imports_do and of_network and not runs.trained(network)):
        done = {run.config.run.seed for run in runs.trained(network) if run.finished}
        missing = [seed for seed in range(seeds or network.seeds) if seed not in done]
        commands += [_train_command(network, seed, runs) for seed in missing]
    if imports_do and not of_network:
        name = network.name.removeprefix("imagenet_").rstrip("ABC")
        folder = runs.root / f"{network.name}_imported"
        commands.append(Command(("-m", "resnet_jax", "import", "FILE", "--model", name, "--out", str(folder)), 0))
    for run in of_network:
        if protocol and run.result(protocol) is None and (run.source is not None or run.finished):
            commands.append(evaluation_command([run], protocol, runs))
        measured = read_responses(run.workdir) if responses else None
        if responses and run.step and (measured is None or measured.step < max(saved_steps(run.workdir), default=0)):
            measure = ("-m", "resnet_jax", "responses", str(run.workdir), *_data(runs))
            commands.append(Command(measure, network.multiply_adds * network.test_images))
    return commands


def _train_command(network: Network, seed: int, runs: Runs) -> Command:
    """Train a network, or go on with the run of this seed that has come furthest."""
    begun = [run for run in runs.trained(network) if run.config.run.seed == seed]
    folder = begun[0].workdir if begun else runs.root / (network.name + (f"_seed{seed}" if seed else ""))
    arguments = ["train.py", f"configs/{network.name}.py", "--run.workdir", str(folder)]
    if seed:
        arguments += ["--run.seed", str(seed)]
    if begun:
        arguments += _overrides(begun[0].config, network.config)
    done = begun[0].step if begun else 0
    images = (network.steps - done) * network.config.data.batch_size
    return Command((*arguments, *_data(runs)), network.multiply_adds * images * _BACKWARD)


def _overrides(config: Config, recipe: Config) -> list[str]:
    """Return the options by which a run differs from its network's configuration file: it must go on with them."""
    options = []
    for name in field_names():
        value = get_field(config, name)
        if value == get_field(recipe, name) or name in ("run.workdir", "run.seed", "run.steps"):
            continue
        flag = option(name)
        if isinstance(value, bool):
            options.append(flag if value else flag.replace(".", ".no-"))
        else:
            options += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return options


def evaluation_command(members: Sequence[Run], protocol: ProtocolName, runs: Runs) -> Command:
    """Test a network or an ensemble."""
    arguments = ("eval.py", *(str(run.workdir) for run in members), "--protocol", protocol, *_data(runs))
    images = sum(run.network.multiply_adds * run.network.test_images for run in members)
    return Command(arguments, images * _VIEWS[protocol])


def _data(runs: Runs) -> tuple[str, ...]:
    return ("--data.dir", runs.data_dir) if runs.data_dir else ()


def fill(make: Callable[[], Artefact], budget_minutes: float | None, say: Callable[[str], None]) -> None:
    """Run what is missing, cheapest first, until nothing is or the budget is spent; half-done runs are resumed.

    Args:
      make: looks at the runs anew; its commands are what is missing.
      budget_minutes: None for no limit. A training run is stopped then, and saved.
      say: prints a line.

    Raises:
      UserError: the current folder is not that of the repository.
      CommandError: a command failed.
    """
    if not Path("train.py").is_file():  # the commands, and the folders in them, are meant from there
        raise UserError("--train runs train.py, which is not here: go to the folder of the repository")
    ends = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    tried: set[Command] = set()
    while left := [command for command in make().commands if command.complete and command not in tried]:
        command = left[0]
        seconds = None if ends is None else ends - time.monotonic()
        if seconds is None or seconds > 0:
            if command.arguments[0] == "train.py":  # of a new checkpoint everything is measured anew
                tried = {before for before in tried if before.arguments[0] == "train.py"}
            tried.add(command)
            say(f"$ {command}")
            if _run(command, seconds):
                continue
        say("the budget is spent; the same command again goes on")
        return


def _run(command: Command, seconds: float | None) -> bool:
    """Run a command; return whether it came to its end within so many seconds."""
    process = subprocess.Popen([sys.executable, *command.arguments])
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # a training run saves and stops
        process.wait()
        return False
    except BaseException:  # Ctrl-C has reached it, too: let it save
        process.wait()
        raise
    if code:
        raise CommandError(f"failed with exit code {code}: {command}")
    return True
