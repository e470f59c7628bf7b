"""What unlearning at one level of the hierarchy does to the knowledge of every level."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from medforget_dataset import LEVELS
from medforget_dataset.errors import UserError
from medforget_dataset.partition import is_forgotten

from .extraction import answer_probability
from .intervals import bootstrap_mean


RELATIONS = ("forgotten", "above", "sibling", "stranger", "unseen")
STUDY_PARTS = 3


def relations(
    rows: pd.DataFrame | Sequence[Mapping[str, Any]], level: str, forgotten_ids: Collection[str]
) -> list[str]:
    """
    How each row stands to what a level forgets.

    Where whole nodes are forgotten (selections `stratified` and `nested`), the first of these that holds:

    - `"unseen"`: of another dataset, which no model was trained on.
    - `"forgotten"`: in the level's forget set.
    - `"above"`: an identity row of a level above, about a study that lies under a forgotten node or holds one; for
      example the question for the institution, on the image of a forgotten patient.
    - `"sibling"`: the node of that level which the row lies under shares its parent with a forgotten one. The parent
      of institutions is the hospital network: beside a forgotten institution all others are siblings.
    - `"stranger"`: the rest. With `stratified`, which forgets a quarter of the children of every node, there are none.

    Where single rows are forgotten (`flat`), no node is, and nothing is above: a retained row is a `"sibling"` if its
    study has forgotten rows, else a `"stranger"`.

    Args:
        rows (`pandas.DataFrame` or `Sequence[Mapping]`):
            Rows with `id`, `task`, `level` and, for unseen ones, `set`; all of the dataset's, since from them it shows
            whether nodes are forgotten as a whole.
        level (`str`):
            Level that is forgotten.
        forgotten_ids (`Collection[str]`):
            Ids of its forget set.

    Raises:
        UserError: Unknown level, or forgotten ids that no row has.
    """
    if level not in LEVELS:
        raise UserError(f"level {level!r} does not exist; choose from {', '.join(LEVELS)}")
    table, forgotten = pd.DataFrame(rows), set(forgotten_ids)
    own = table[["id", "task", "level"]].to_dict("records")
    is_unseen = list(table["set"] == "unseen") if "set" in table else [False] * len(own)
    seen = [row for row, unseen in zip(own, is_unseen, strict=True) if not unseen]
    if missing := forgotten.difference(row["id"] for row in seen):
        raise UserError(
            f"{len(missing)} rows that {level} level forgets are not among those probed, {min(missing)} first; probe "
            "the checkpoint on the dataset whose forget set this is"
        )
    depth = LEVELS.index(level) + 1
    nodes = {_prefix(row_id, depth) for row_id in forgotten}
    by_node = all(is_forgotten(row, level, nodes) == (row["id"] in forgotten) for row in seen)
    relation = _NodeRelations(level, nodes, forgotten) if by_node else _RowRelations(forgotten)
    return ["unseen" if unseen else relation(row) for row, unseen in zip(own, is_unseen, strict=True)]


class _NodeRelations:
    def __init__(self, level: str, nodes: set[str], forgotten: set[str]):
        self.depth, self.forgotten = LEVELS.index(level) + 1, forgotten
        self.parents = {_prefix(node, self.depth - 1) for node in nodes}
        # A study lies under a forgotten node, or holds one.
        self.study_parts = min(self.depth, STUDY_PARTS)
        self.touched = {_prefix(node, self.study_parts) for node in nodes}

    def __call__(self, row: dict[str, str]) -> str:
        row_id = row["id"]
        if row_id in self.forgotten:
            return "forgotten"
        if row["task"] == "identity" and LEVELS.index(row["level"]) + 1 < self.depth:
            if _prefix(row_id, self.study_parts) in self.touched:
                return "above"
            if self.depth > STUDY_PARTS:  # an identity row lies under no section
                return "stranger"
        return "sibling" if _prefix(row_id, self.depth - 1) in self.parents else "stranger"


class _RowRelations:
    def __init__(self, forgotten: set[str]):
        self.forgotten = forgotten
        self.studies = {_prefix(row_id, STUDY_PARTS) for row_id in forgotten}

    def __call__(self, row: dict[str, str]) -> str:
        if row["id"] in self.forgotten:
            return "forgotten"
        return "sibling" if _prefix(row["id"], STUDY_PARTS) in self.studies else "stranger"


def _prefix(row_id: str, parts: int) -> str:
    return "/".join(row_id.split("/")[:parts])


def cascade(
    probe: pd.DataFrame, level: str, forgotten_ids: Collection[str], *, draws: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """
    The cascade matrix of a model that was unlearned at a level: for the questions of every level, and every relation
    to what was forgotten, what is still known.

    Args:
        probe (`pandas.DataFrame`):
            As [`~unlearn.measures.probe.read_probe`] gives it. Its sets `finetune` and `unseen` are read.
        level (`str`):
            Level that was unlearned.
        forgotten_ids (`Collection[str]`):
            Ids of its forget set.
        draws (`int`, *optional*, defaults to `1000`), seed (`int`, *optional*, defaults to `0`):
            As in [`~unlearn.measures.intervals.bootstrap_mean`].

    Returns:
        `list[dict]`: `level_probed`, `relation`, `exact` and `answer_probability`
        ([`~unlearn.measures.intervals.Interval`]) and `n`, for every pair that has rows, in the order of `LEVELS` and
        `RELATIONS`.
    """
    rows = probe[probe["set"].isin(("finetune", "unseen"))]
    rows = rows.assign(
        relation=relations(rows, level, forgotten_ids),
        answer_probability=answer_probability(rows["log_prob"], rows["tokens"]),
    )
    cells = []
    for level_probed in LEVELS:
        for relation in RELATIONS:
            cell = rows[(rows["level"] == level_probed) & (rows["relation"] == relation)]
            if len(cell):
                intervals = {
                    name: bootstrap_mean(cell[name], cell["study"], draws=draws, seed=seed)
                    for name in ("exact", "answer_probability")
                }
                cells.append({"level_probed": level_probed, "relation": relation, **intervals, "n": len(cell)})
    return cells
