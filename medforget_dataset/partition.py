"""Which rows are forgotten at each level, and which are retained.

Forgetting a node removes its identity rows and everything beneath it, and leaves the identity rows of the nodes above
it (paper, Table 2). A quarter of the nodes of every level is forgotten (section 3.4); which quarter, the paper leaves
open.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import UserError
from .hierarchy import FORGET_FRACTION, LEVELS, Institution, stable_number


SELECTIONS = ("stratified", "nested", "flat")


def forget_ids(
    level: str, rows: Sequence[dict], institutions: tuple[Institution, ...], *, selection: str, seed: int
) -> set[str]:
    """Ids of the rows to forget at a level; all other rows are retained.

    Args:
        level (`str`): `"institution"`, `"patient"`, `"study"` or `"section"`.
        rows (`Sequence[dict]`): All rows of the benchmark.
        institutions (`tuple[Institution, ...]`): The hierarchy the rows were made from.
        selection (`str`): `"stratified"` forgets a quarter of the children of every node, so that a forgotten node
            always has retained siblings; `"nested"` forgets everything under the same quarter of the institutions at
            every level; `"flat"` draws as many rows at random without regard to the hierarchy, the comparison of the
            paper's Figure 7.
        seed (`int`): Which nodes or rows.

    Raises:
        UserError: Unknown level or selection.
    """
    if level not in LEVELS:
        raise UserError(f"--level {level}: unknown level; choose from {', '.join(LEVELS)}")
    if selection not in SELECTIONS:
        raise UserError(f"--selection {selection}: unknown selection; choose from {', '.join(SELECTIONS)}")
    nodes = forget_nodes(level, institutions, nested=selection == "nested", seed=seed)
    ids = {row["id"] for row in rows if is_forgotten(row, level, nodes)}
    if selection == "flat":
        order = np.random.default_rng(stable_number(seed, "flat", level)).permutation(len(rows))
        ids = {rows[index]["id"] for index in order[: len(ids)]}
    return ids


def forget_nodes(level: str, institutions: tuple[Institution, ...], *, nested: bool, seed: int) -> set[str]:
    """Addresses of the forgotten nodes of a level, for example `{"inst00/pat003", …}` at patient level."""
    quarter = _draw([institution.key for institution in institutions], "", seed)
    if level == "institution":
        return quarter
    paths = set()
    for institution in institutions:
        if nested and institution.key not in quarter:
            continue
        below = _children(institution, level)
        for parent, children in below.items():
            paths |= {f"{parent}/{key}" for key in (children if nested else _draw(children, parent, seed))}
    return paths


def is_forgotten(row: dict, level: str, nodes: set[str]) -> bool:
    """Whether a row is one of the forgotten nodes' own identity rows or lies beneath one."""
    parts = row["id"].split("/")
    depth = LEVELS.index(level) + 1
    if row["task"] == "identity" and LEVELS.index(row["level"]) + 1 < depth:
        return False
    return "/".join(parts[:depth]) in nodes


def _children(institution: Institution, level: str) -> dict[str, list[str]]:
    root = institution.key
    if level == "patient":
        return {root: [patient.key for patient in institution.patients]}
    if level == "study":
        return {f"{root}/{patient.key}": [study.key for study in patient.studies] for patient in institution.patients}
    return {
        f"{root}/{patient.key}/{study.key}": [section.key for section in study.sections]
        for patient in institution.patients
        for study in patient.studies
    }


def _draw(keys: list[str], parent: str, seed: int) -> set[str]:
    order = np.random.default_rng(stable_number(seed, "forget", parent)).permutation(len(keys))
    return {keys[index] for index in order[: len(keys) // FORGET_FRACTION]}
