"""Make a table or figure by its name."""

from __future__ import annotations

from pathlib import Path

from resnet_jax.errors import optional
from resnet_jax.paper.architectures import make_table1
from resnet_jax.paper.artefact import Artefact
from resnet_jax.paper.runs import find_runs
from resnet_jax.paper.tables import make_results, make_table5


def make(name: str, root: Path, data_dir: str | None = None) -> Artefact:
    """Make a table or figure from the runs below `root`.

    Args:
      name: one of paper.NAMES.
      root: folder of the runs.
      data_dir: where the data set is; it appears in the commands that would fill what is empty.

    Raises:
      UserError: no such folder, or matplotlib is not installed.
    """
    if name == "table1":
        return make_table1()
    runs = find_runs(root)
    if name.startswith("figure"):
        optional("matplotlib", extra="plots")
        from resnet_jax.paper.figures import make_curves, make_figure7

        return make_figure7(runs, data_dir) if name == "figure7" else make_curves(name, runs, data_dir)
    return make_table5(runs, data_dir) if name == "table5" else make_results(name, runs, data_dir)
