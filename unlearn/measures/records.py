"""All measures of one checkpoint as flat records, each with its number of rows and its interval."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pandas as pd

from medforget_dataset import LEVELS, TASKS, load
from medforget_dataset.errors import UserError

from .cascade import cascade
from .comparison import MEMBERSHIP_TASKS, bootstrap_auc, forget_quality, privacy_leak
from .extraction import answer_probability, exact_memorisation, extraction_strength, min_k
from .intervals import Interval, bootstrap_difference, bootstrap_mean
from .probe import SETS, read_probe


ROW_MEASURES = ("exact", "answer_probability", "extraction_strength", "exact_memorisation")
"""Measures that every row has by itself."""
FIELDS = (
    "measure",
    "set",
    "split",
    "task",
    "level",
    "level_probed",
    "value",
    "low",
    "high",
    "n",
    "studies",
    "missing",
)
ALL = "all"


def summary(
    probe: pd.DataFrame | str | os.PathLike,
    retrained: pd.DataFrame | str | os.PathLike | None,
    level: str,
    data: str | os.PathLike | None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Every measure of a checkpoint that forgot a level.

    Args:
        probe (`pandas.DataFrame` or path):
            What [`~unlearn.measures.probe.probe_checkpoint`] found, or its file.
        retrained (`pandas.DataFrame` or path, *optional*):
            The same of the model that was trained without the level's forget set. Without it there are no gaps, no
            test of forget quality and no privacy leak.
        level (`str`):
            Level that was unlearned.
        data (`str` or `os.PathLike`, *optional*):
            The dataset whose forget set it was, found as [`~medforget_dataset.load`] does.
        draws (`int`, *optional*, defaults to `1000`), seed (`int`, *optional*, defaults to `0`):
            As in [`~unlearn.measures.intervals.bootstrap_mean`].

    Returns:
        `list[dict]`: Records with the keys of `FIELDS`. `measure` is one of

        - `exact`, `answer_probability`, `extraction_strength`, `exact_memorisation`: mean of the rows of a `set` of
          the probe, a `split` (`forget`, `retain`, `unseen`) and a `task` (or `all`);
        - `gap_` and one of these: the same minus that of the retrained model on the same rows;
        - `selectivity_` and one of these: mean of the retain rows minus mean of the forget rows;
        - `ks_statistic`, `ks_p_value`: answer probabilities of the forget rows against the retrained model's;
        - `membership_auc`, `membership_auc_retrained` and `privacy_leak` (per cent);
        - `cascade_exact`, `cascade_answer_probability`: `split` is then the relation, and `level_probed` the level of
          the questions.

        `missing` counts rows whose value is NaN: they are left out. What does not apply or is not known is `None`: the
        bounds of a test, the interval from one study, the value where no row has one.

    Raises:
        UserError: Unknown level, a file that is no probe, or a probe of another dataset.
    """
    if level not in LEVELS:
        raise UserError(f"level {level!r} does not exist; choose from {', '.join(LEVELS)}")
    forgotten = set(load(f"{level}_forget", "train", data=data)["id"])
    numbers: dict[str, int] = {}
    own = _with_measures(probe, forgotten, numbers)
    reference = None if retrained is None else _with_measures(retrained, forgotten, numbers)
    resample: dict[str, Any] = {"draws": draws, "seed": seed}
    # First, since it refuses a probe of another dataset.
    by_level = list(_cascade(own, level, forgotten, resample))
    records = [*_means(own, resample), *_selectivity(own, resample)]
    if reference is not None:
        records += [*_gaps(own, reference, resample), *_forget_quality(own, reference)]
    records += [*_membership(own, reference, resample), *by_level]
    return [{name: _known({"level": level, **record}.get(name)) for name in FIELDS} for record in records]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_measures(
    probe: pd.DataFrame | str | os.PathLike, forgotten: set[str], numbers: dict[str, int]
) -> pd.DataFrame:
    """
    The rows of a probe with their measures, their split, and `min_k`; rephrased rows of other levels are left out.
    Studies are numbered, since numbers are grouped faster than addresses; `numbers` holds those known so far.
    """
    rows = probe if isinstance(probe, pd.DataFrame) else read_probe(probe)
    is_forgotten = rows["id"].isin(forgotten)
    split = is_forgotten.map({True: "forget", False: "retain"}).where(rows["set"] != "unseen", "unseen")
    rows = rows.assign(
        split=split,
        answer_probability=answer_probability(rows["log_prob"], rows["tokens"]),
        extraction_strength=extraction_strength(rows["token_greedy"]),
        exact_memorisation=exact_memorisation(rows["token_greedy"]),
        min_k=min_k(rows["token_log_probs"]),
        study=[numbers.setdefault(study, len(numbers)) for study in rows["study"]],
    )
    return rows[~(rows["set"].str.startswith("rephrase") & ~is_forgotten)]


def _cells(rows: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Rows of every set, split and task that there are."""
    for name in SETS:
        for split in ("forget", "retain", "unseen"):
            of_split = rows[(rows["set"] == name) & (rows["split"] == split)]
            for task in (ALL, *TASKS):
                of_task = of_split if task == ALL else of_split[of_split["task"] == task]
                if len(of_task):
                    yield {"set": name, "split": split, "task": task}, of_task


def _record(measure: str, interval: Interval, **where: Any) -> dict[str, Any]:
    return {**where, "measure": measure, **asdict(interval)}


def _means(rows: pd.DataFrame, resample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for where, cell in _cells(rows):
        for measure in ROW_MEASURES:
            yield _record(measure, bootstrap_mean(cell[measure], cell["study"], **resample), **where)


def _selectivity(rows: pd.DataFrame, resample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cells = {(where["split"], where["task"]): cell for where, cell in _cells(rows[rows["set"] == "finetune"])}
    for task in (ALL, *TASKS):
        if ("forget", task) in cells and ("retain", task) in cells:
            for measure in ROW_MEASURES:
                yield _difference(
                    f"selectivity_{measure}",
                    measure,
                    cells["retain", task],
                    cells["forget", task],
                    resample,
                    set="finetune",
                    task=task,
                )


def _gaps(rows: pd.DataFrame, reference: pd.DataFrame, resample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    others = {tuple(where.values()): cell for where, cell in _cells(reference)}
    for where, cell in _cells(rows):
        if (other := others.get(tuple(where.values()))) is not None:
            for measure in ROW_MEASURES:
                # The same rows twice: they count once.
                gap = _difference(f"gap_{measure}", measure, cell, other, resample, **where)
                yield gap | {"n": int(cell[measure].notna().sum())}


def _difference(
    name: str, measure: str, one: pd.DataFrame, other: pd.DataFrame, resample: dict[str, Any], **where: Any
) -> dict[str, Any]:
    sides = (one[measure], one["study"], other[measure], other["study"])
    return _record(name, bootstrap_difference(*sides, **resample), **where)


def _forget_quality(rows: pd.DataFrame, reference: pd.DataFrame) -> Iterator[dict[str, Any]]:
    others = {tuple(where.values()): cell for where, cell in _cells(reference)}
    for where, cell in _cells(rows):
        other = others.get(tuple(where.values()))
        if where["set"] == "finetune" and where["split"] == "forget" and other is not None:
            result = forget_quality(cell["answer_probability"], other["answer_probability"])
            known = cell[cell["answer_probability"].notna()]
            size = {"n": len(known), "studies": known["study"].nunique(), "missing": len(cell) - len(known)}
            yield {**where, **size, "measure": "ks_statistic", "value": result.statistic}
            yield {**where, **size, "measure": "ks_p_value", "value": result.p_value}


def _membership(
    rows: pd.DataFrame, reference: pd.DataFrame | None, resample: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for task in MEMBERSHIP_TASKS:
        where = {"set": "finetune", "split": "forget", "task": task}
        own = _membership_auc(rows, task, resample)
        if own is None:
            continue
        yield _record("membership_auc", own, **where)
        if reference is not None and (other := _membership_auc(reference, task, resample)) is not None:
            yield _record("membership_auc_retrained", other, **where)
            leak = privacy_leak(own.value, other.value)
            size = {"n": own.n, "studies": own.studies, "missing": own.missing}
            yield {**where, **size, "measure": "privacy_leak", "value": leak}


def _membership_auc(rows: pd.DataFrame, task: str, resample: dict[str, Any]) -> Interval | None:
    of_task = rows[(rows["task"] == task) & rows["set"].isin(("finetune", "unseen"))]
    sides = [of_task[of_task["split"] == split] for split in ("forget", "unseen")]
    if not all(map(len, sides)):
        return None
    members, others = sides
    return bootstrap_auc(members["min_k"], members["study"], others["min_k"], others["study"], **resample)


def _cascade(
    rows: pd.DataFrame, level: str, forgotten: set[str], resample: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for cell in cascade(rows, level, forgotten, **resample):
        where = {"set": "finetune", "split": cell["relation"], "task": ALL, "level_probed": cell["level_probed"]}
        if cell["relation"] == "unseen":
            where["set"] = "unseen"
        for measure in ("exact", "answer_probability"):
            yield _record(f"cascade_{measure}", cell[measure], **where)
