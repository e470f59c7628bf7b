"""The results of a sweep: one JSON file a cell, and the tables made from them."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medforget_dataset.atomic import write_text
from medforget_dataset.hierarchy import LEVELS, TASKS

from .argument_types import as_text
from .sweep_grid import Cell, Grid


CELLS = "cells"
RESULT = "result.json"
SIDES = ("forget", "retain")


@dataclass(frozen=True)
class Outcome:
    """A cell and what came of it.

    Args:
        cell ([`~unlearn.sweep_grid.Cell`]): The cell.
        result (`dict`): Content of its `result.json`; empty if it has not run, or ran on something else.
    """

    cell: Cell
    result: dict[str, Any]

    @property
    def status(self) -> str:
        """`"done"`, `"failed"` or `"pending"`."""
        return self.result.get("status", "pending")


def selectivity(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """How much more is retained than what was to be forgotten, in shares of rows answered exactly.

    >>> scores = {"forget": {"cloze": 0.25, "identity": 0.0}, "retain": {"cloze": 1.0, "identity": 0.5}}
    >>> selectivity(scores)
    {'cloze': 0.75, 'all': 0.625}

    Args:
        scores (`dict`): Shares for each task, of `forget` and of `retain` rows.

    Returns:
        `dict[str, float]`: Retain less forget, for cloze and for the mean of the tasks that both sides have.
    """
    gaps = {
        task: scores["retain"][task] - share for task, share in scores["forget"].items() if task in scores["retain"]
    }
    cloze = {"cloze": gaps["cloze"]} if "cloze" in gaps else {}
    return cloze | ({"all": sum(gaps.values()) / len(gaps)} if gaps else {})


def read_outcome(cell: Cell, out: Path, inputs: dict[str, Any]) -> Outcome:
    """What came of a cell with these inputs."""
    try:
        result = json.loads((out / CELLS / cell.name / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Outcome(cell, {})
    valid = isinstance(result, dict) and result.get("inputs") == json.loads(json.dumps(inputs, default=str))
    return Outcome(cell, result if valid else {})


def write_tables(out: Path, grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Write `results.csv`, in the order of the file, and `results.md`, the most selective cell of each level first."""
    columns = table_columns(grid)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(value(outcome)) for value in columns.values()] for outcome in outcomes)
    write_text(out / "results.csv", lines.getvalue())
    write_text(out / "results.md", _markdown(grid, outcomes, columns))


def table_columns(grid: Grid) -> dict[str, Callable[[Outcome], Any]]:
    """The columns of a table, in order, and what is in them."""
    columns: dict[str, Callable[[Outcome], Any]] = {
        "method": lambda outcome: outcome.cell.method,
        "level": lambda outcome: outcome.cell.level,
        "seed": lambda outcome: outcome.cell.seed,
    }
    columns |= {name: partial(_argument, name=name) for name in grid.varied}
    columns["status"] = lambda outcome: outcome.status
    for side in SIDES:
        columns |= {f"{side}_{task}": partial(_share, side=side, task=task) for task in TASKS}
    columns |= {
        "selectivity_cloze": partial(_share, side="selectivity", task="cloze"),
        "selectivity": partial(_share, side="selectivity", task="all"),
        "seconds": lambda outcome: outcome.result.get("seconds"),
        "cell": lambda outcome: outcome.cell.name,
        "reason": lambda outcome: outcome.result.get("reason"),
    }
    return columns


def _argument(outcome: Outcome, name: str) -> Any:
    return outcome.cell.shown.get(name)


def _share(outcome: Outcome, side: str, task: str) -> float | None:
    share = outcome.result.get(side, {}).get(task)
    return None if share is None else round(share, 4)


def _plain(value: Any) -> str:
    return " ".join(as_text(value).split())


def _markdown(grid: Grid, outcomes: Sequence[Outcome], columns: dict[str, Callable[[Outcome], Any]]) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    shares = [name for name in columns if name.startswith((*SIDES, "selectivity"))]
    lines = [
        f"# Sweep of {grid.file.name}",
        "",
        f"{len(outcomes)} cells: " + ", ".join(f"{counts[s]} {s}" for s in ("done", "failed", "pending") if counts[s]),
        "",
        "Per cent of rows answered exactly, teacher-forced. Selectivity is retain less forget, in points: of cloze, "
        "and as the mean over the tasks, by which each level is sorted.",
        "",
        "| " + " | ".join(name.replace("_", " ") if name in shares else name for name in columns) + " |",
        "|" + "".join("---:|" if name in (*shares, "seconds") else "---|" for name in columns),
    ]
    for outcome in sorted(outcomes, key=_rank):
        values = {name: value(outcome) for name, value in columns.items()}
        values |= {name: f"{100 * values[name]:.1f}" for name in shares if values[name] is not None}
        lines.append("| " + " | ".join(_plain(value).replace("|", "\\|") for value in values.values()) + " |")
    return "\n".join(lines) + "\n"


def _rank(outcome: Outcome) -> tuple[int, float]:
    best = _share(outcome, "selectivity", "all")
    return LEVELS.index(outcome.cell.level), float("inf") if best is None else -best
