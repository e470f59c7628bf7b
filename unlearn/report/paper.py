"""The numbers that the paper prints, and where it contradicts itself."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path


FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Printed:
    """
    A cell of Table 3 or Table 5 of the paper (arXiv 2512.09867, version 1).

    Attributes:
        text (`str`):
            As printed, in per cent.
        note (`str`):
            What it contradicts, if anything.
    """

    text: str
    note: str

    @property
    def value(self) -> float:
        """The number, 0 to 1."""
        return float(self.text) / 100


@cache
def printed(table: int) -> dict[tuple[str, str, str, str, str], Printed]:
    """The cells of a table by method, level, split, task and metric; the vanilla model's level is empty."""
    path = FOLDER / f"paper_table{table}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return {
            (row["method"], row["level"], row["split"], row["task"], row["metric"]): Printed(row["value"], row["note"])
            for row in csv.DictReader(file)
        }


def find(table: int, method: str, level: str, split: str, task: str, metric: str) -> Printed | None:
    """The paper's number, if it has one; of the vanilla model it has one for all levels."""
    return printed(table).get((method, "" if method == "vanilla" else level, split, task, metric))
