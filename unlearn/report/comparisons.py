"""Differences of scores: retain minus forget, a model minus the retrained one, an attack beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..measures.intervals import Interval, bootstrap_difference
from .evaluations import ATTACK, JUDGED, Answers, Evaluations
from .records import Record, Records, from_interval
from .run_folder import Model, RunFolder


COMPARED_SPLITS = ("forget", "retain", "rephrase")
UNINFORMATIVE_BELOW = 0.5
"""Where the model that knows everything scores less than this on a form of prompt, the form tells nothing."""
UNINFORMATIVE = "uninformative: the vanilla model itself scores under 50 % on this form of prompt"
NOT_ASKED = "vanilla was not asked, so nobody knows what the form tells"
NOT_SHOWN = "vanilla's own score is left out, so nobody knows what the form tells"


def comparison_records(run: RunFolder, evaluations: Evaluations, records: Records) -> None:
    """
    Add `"selectivity"` (retain minus forget), `"gap"` (a model minus the retrained model of its level, on the same
    rows) and `"leak"` (the same on the attack's rows), with intervals over studies.

    A difference is made of two scores that are both shown; where one is left out, so is the difference.
    """
    for level in run.levels:
        for method in run.all_methods:
            model = run.model(method, level)
            for kind, metric in _scored(records, method, level):
                _add(records, _selectivity(records, evaluations, model, level, kind, metric))
                if method != "retrained":
                    for split in COMPARED_SPLITS:
                        _add(records, _gap(run, records, evaluations, model, level, split, kind, metric, "gap"))
            if method != "retrained":
                for context, metric in _attacked(records, method, level):
                    _add(records, _gap(run, records, evaluations, model, level, ATTACK, context, metric, "leak"))


def _add(records: Records, record: Record | None) -> None:
    if record is not None and math.isfinite(record.value):
        records.add(record)


def _scored(records: Records, method: str, level: str) -> Iterator[tuple[str, str]]:
    yield from dict.fromkeys(
        (record.task, record.metric)
        for record in records.of("score")
        if record.method == method and record.level == level and record.split in COMPARED_SPLITS
    )


def _attacked(records: Records, method: str, level: str) -> Iterator[tuple[str, str]]:
    for record in records.of("score"):
        if record.method == method and record.level == level and record.split == ATTACK:
            yield record.task, record.metric


def _selectivity(
    records: Records, evaluations: Evaluations, model: Model, level: str, kind: str, metric: str
) -> Record | None:
    retain, forget = (
        records.find("score", model.method, level, split, kind, metric) for split in ("retain", "forget")
    )
    if retain is None or forget is None:
        return None
    sides = [evaluations.get(model.name, f"medforget_{level}_{split}_{kind}") for split in ("retain", "forget")]
    return _difference("selectivity", retain, forget, *sides, split="")


def _gap(
    run: RunFolder,
    records: Records,
    evaluations: Evaluations,
    model: Model,
    level: str,
    split: str,
    kind: str,
    metric: str,
    measure: str,
) -> Record | None:
    own, other = (records.find("score", method, level, split, kind, metric) for method in (model.method, "retrained"))
    if own is None or other is None:
        return None
    task = f"medforget_{level}_{split}_{kind}"
    names = (model.name, run.model("retrained", level).name)
    return _difference(measure, own, other, *(evaluations.get(name, task) for name in names), split=split)


def _difference(
    measure: str, one: Record, other: Record, one_side: Answers | None, other_side: Answers | None, *, split: str
) -> Record:
    interval = Interval(one.value - other.value, math.nan, math.nan, one.n, one.studies)
    if one_side and other_side and one_side.rows and other_side.rows:
        values, others = one_side.values(one.metric), other_side.values(one.metric)
        interval = bootstrap_difference(values, one_side.studies, others, other_side.studies)
        if one_side.name == other_side.name:
            # The same rows twice: they count once.
            interval = replace(interval, n=one.n)
    return from_interval(
        interval,
        measure=measure,
        metric=one.metric,
        checkpoint=one.checkpoint,
        file=one.file,
        other_file=other.file if other.file != one.file else "",
        method=one.method,
        level=one.level,
        split=split,
        task=one.task,
        version=one.version,
        judge=one.judge if one.metric in JUDGED else None,
    )


def why_uninformative(records: Records, level: str, context: str, metric: str) -> str:
    """
    Why a form of attack prompt tells nothing of other models; nothing where the model that knows everything answers it
    often enough.
    """
    vanilla = records.find("score", "vanilla", level, ATTACK, context, metric)
    if vanilla is None:
        is_asked = records.hole("score", "vanilla", level, ATTACK, context, metric) is not None
        return NOT_SHOWN if is_asked else NOT_ASKED
    return "" if vanilla.value >= UNINFORMATIVE_BELOW else UNINFORMATIVE
