"""Make a table or figure by its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from resnet_jax.errors import optional
from resnet_jax.paper.artefact import Artefact
from resnet_jax.paper.runs import Runs, find_runs
from resnet_jax.paper.tables import make_results, make_table1, make_table5


def make(name: str, root: Path, data_dir: str | None = None) -> Artefact:
    """Make a table or figure from the runs below `root`; its commands are sorted, the cheapest first.

    Args:
      name: one of items.NAMES.
      root: folder of the runs.
      data_dir: where the data set is; it appears in the commands that would fill what is empty.

    Raises:
      UserError: no such folder, or matplotlib is not installed.
    """
    if name == "table1":
        return make_table1()
    runs = find_runs(root, data_dir)
    artefact = _make(name, runs)
    commands = sorted(artefact.commands, key=lambda command: command.multiply_adds)
    return dataclasses.replace(artefact, notes=[*artefact.notes, *runs.left_out], commands=commands)


def _make(name: str, runs: Runs) -> Artefact:
    if name.startswith("figure"):
        optional("matplotlib", extra="plots")
        from resnet_jax.paper.figures import make_curves, make_figure7

        return make_figure7(runs) if name == "figure7" else make_curves(name, runs)
    return make_table5(runs) if name == "table5" else make_results(name, runs)
