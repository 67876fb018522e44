"""A table or figure of the paper beside ours: as text, Markdown and CSV, with pictures if it is a figure."""

from __future__ import annotations

import csv
import dataclasses
import io
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_jax.errors import UserError, reason
from resnet_jax.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Command:
    """What would fill a cell.

    Attributes:
      arguments: python and what follows; FILE stands for something that only the user has.
      multiply_adds: about how much it computes.
    """

    arguments: tuple[str, ...]
    multiply_adds: float

    def __str__(self) -> str:
        return shlex.join(["python", *self.arguments])

    @property
    def complete(self) -> bool:
        """Whether it can be run as it is."""
        return "FILE" not in self.arguments


def format_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Lay rows out for a terminal, a rule behind the first; the columns numbered in `right` end at one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:])]


@dataclasses.dataclass(frozen=True)
class Artefact:
    """One table or figure.

    Attributes:
      name: such as "table6".
      title: the paper's caption in short.
      columns, rows: of the table; of a figure, what its curves end with. A cell without a run is empty.
      notes: what a reader must know, a sentence each.
      commands: that would fill what is empty.
      figure: the picture, or None for a table.
      points: of a figure, for the CSV: a header and rows.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]
    commands: list[Command]
    figure: Figure | None = None
    points: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def to_text(self) -> str:
        """Return the table for a terminal."""
        return "\n".join([self.title, "", *format_table([self.columns, *self.rows]), *self._ending("")])

    def to_markdown(self) -> str:
        """Return the table, with the picture above it if there is one."""
        lines = [f"# {self.title}", ""]
        if self.figure:
            lines += [f"![{self.title}]({self.name}.png)", ""]
        table = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        return "\n".join([*lines, *self._ending("    ")]) + "\n"

    def _ending(self, indent: str) -> list[str]:
        lines = [line for note in self.notes for line in ("", note)]
        if self.commands:
            lines += ["", "What is empty or unfinished would be filled by", ""]
            lines += [f"{indent}{command}" for command in self.commands]
        return lines

    def to_csv(self) -> str:
        """Return the rows of a table, or the points of a figure."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.points or [self.columns, *self.rows])
        return text.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.md and NAME.csv, and NAME.png and NAME.svg of a figure; each complete or not at all.

        Raises:
          UserError: they cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {reason(error)}") from error
        paths = []
        for suffix, text in (("md", self.to_markdown()), ("csv", self.to_csv())):
            paths.append(folder / f"{self.name}.{suffix}")
            with atomic_write(paths[-1]) as partial:
                partial.write_text(text)
        if self.figure:
            from matplotlib import rc_context

            # The same runs make the same files: no dates, no random numbers inside.
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                paths.append(folder / f"{self.name}.{suffix}")
                with atomic_write(paths[-1]) as partial, rc_context({"svg.hashsalt": "resnet_jax"}):
                    self.figure.savefig(partial, format=suffix, dpi=150, metadata=metadata)
        return paths
