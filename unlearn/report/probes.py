"""What the probes of a run say: teacher-forced measures, the cascade, and relearning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS

from ..grouping import image_key
from ..measures import read_probe, summary
from .records import Record, Records
from .run_folder import RunFolder, is_number


PROBES = "probes"
RELEARNING = "relearning"
ALL_TAUGHT = "-all"
"""What the name of a model's results ends with where the forget rows of all images were taught again."""
ROW_MEASURES = ("exact", "answer_probability", "extraction_strength", "exact_memorisation")
REPHRASE_SETS = {"rephrase_wording": "wording", "rephrase_view": "view", "rephrase_both": "both"}


@dataclass(frozen=True)
class Curve:
    """
    A line of a figure: many points of one file, which `report.json` keeps together.

    Attributes:
        measure (`str`):
            `"training"` or `"relearning"`.
        metric (`str`):
            What the points are.
        checkpoint (`str`), method (`str`), level (`str`):
            The model trained.
        file (`str`):
            Where the points are, below the folder of the run.
        x (`list[float]`), y (`list[float]`):
            The points.
    """

    measure: str
    metric: str
    checkpoint: str
    method: str
    level: str
    file: str
    x: list[float]
    y: list[float]


def probe_records(run: RunFolder, records: Records) -> None:
    """Add every measure of [`~unlearn.measures.summary`] for every model and level that was probed."""
    if not (run.path / PROBES).is_dir() or run.data is None:
        return
    for level in run.levels:
        retrained = _probe(run, run.model("retrained", level).name)
        for method in run.all_methods:
            name = run.model(method, level).name
            probe = retrained if method == "retrained" else _probe(run, name)
            if probe is None:
                continue
            try:
                found = summary(probe, None if method == "retrained" else retrained, level, run.data.folder)
            except UserError as error:
                run.note(f"{_file(run, name)}: {error}")
                continue
            other = _file(run, run.model("retrained", level).name)
            for line in found:
                if _is_shown(line):
                    records.add(_record(line, method, name, _file(run, name), other))


def _file(run: RunFolder, name: str) -> str:
    return run.file(PROBES, f"{name}.parquet")


def _probe(run: RunFolder, name: str) -> Any:
    path = run.path / PROBES / f"{name}.parquet"
    if not path.is_file():
        return None
    try:
        return read_probe(path)
    except UserError as error:
        run.note(str(error))
        return None


def _is_shown(line: dict[str, Any]) -> bool:
    """Means and gaps of single kinds of questions are those of the evaluation again."""
    is_mean = line["measure"].removeprefix("gap_").removeprefix("selectivity_") in ROW_MEASURES
    return not is_mean or line["task"] == "all"


def _record(line: dict[str, Any], method: str, name: str, file: str, other: str) -> Record:
    measure, metric = _names(line["measure"])
    is_compared = measure in ("probe_gap", "forget_quality") or metric == "privacy_leak"
    return Record(
        measure,
        metric,
        math.nan if line["value"] is None else line["value"],
        line["n"],
        line["studies"],
        name,
        other if metric == "membership_auc_retrained" else file,
        other_file=other if is_compared else "",
        method=method,
        level=line["level"],
        split=line["split"] or "",
        task=line["level_probed"] or line["task"],
        set=line["set"],
        low=line["low"],
        high=line["high"],
        missing=line["missing"] or 0,
    )


def _names(measure: str) -> tuple[str, str]:
    for prefix in ("gap", "selectivity", "cascade"):
        if measure.startswith(f"{prefix}_"):
            return f"probe_{prefix}" if prefix != "cascade" else prefix, measure.removeprefix(f"{prefix}_")
    if measure in ROW_MEASURES:
        return "probe", measure
    return "forget_quality" if measure.startswith("ks_") else "membership", measure


def relearning_results(run: RunFolder, records: Records) -> list[Curve]:
    """Add `"relearning"` records of every model that was relearned, and return the curves."""
    curves = []
    for model, taught in [(model, taught) for model in run.models for taught in ("", ALL_TAUGHT)]:
        file = run.file(RELEARNING, f"{model.name}{taught}.json")
        result = run.read_json(RELEARNING, f"{model.name}{taught}.json")
        if result is None:
            continue
        if not _is_relearning(result):
            run.note(f"{file}: not what relearning writes; remove it and run `medforget run` again")
            continue
        about: dict[str, Any] = {"checkpoint": model.name, "method": model.method, "level": model.level, "file": file}
        curve = result["curve"]
        points = _finite(run, file, curve, "forget_exact", "rows")
        for metric in () if taught else ("forget_exact", "retain_exact"):
            shown = _finite(run, file, points, metric)
            rows = [float(point["rows"]) for point in shown]
            curves.append(Curve("relearning", metric, x=rows, y=[float(point[metric]) for point in shown], **about))
        numbers = {
            "rows_to_recovery": (result.get("recovered_after") or {}).get("rows"),
            "rows_per_minute": result.get("rows_per_minute"),
            "forget_exact_before": curve[0]["forget_exact"] if curve else None,
            "forget_exact_after": curve[-1]["forget_exact"] if curve else None,
            "others_exact_most": (result.get("most_of_others") or {}).get("others_exact"),
        }
        about |= {"set": "all" if taught else "some", "examples": result.get("examples")}
        sizes = int(result.get("forget_rows", 0)), _forgotten_studies(run, result.get("level") or model.level)
        for metric, value in numbers.items():
            if value is not None:
                records.add(Record("relearning", metric, float(value), *sizes, **about))
    return curves


def _forgotten_studies(run: RunFolder, level: str) -> int:
    """Studies that a level's forget rows are about; 0 where that cannot be known."""
    if run.data is None or level not in LEVELS:
        return 0
    return len({image_key(row_id) for row_id in run.data.forgotten(level)})


def _is_relearning(result: dict[str, Any]) -> bool:
    curve, parts = result.get("curve"), [result.get(name) for name in ("recovered_after", "most_of_others")]
    if not isinstance(curve, list) or not all(part is None or isinstance(part, dict) for part in parts):
        return False
    if not all(isinstance(point, dict) and {"rows", "forget_exact"} <= point.keys() for point in curve):
        return False
    sizes = [result.get(name, 0) for name in ("forget_rows", "examples")]
    numbers = [value for point in (*curve, *filter(None, parts)) for value in point.values()]
    numbers.append(result.get("rows_per_minute"))
    return all(isinstance(size, int) for size in sizes) and all(
        value is None or isinstance(value, int | float) for value in numbers
    )


def _finite(run: RunFolder, file: str, points: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The points that have these numbers. One that is absent or null was not measured; one that is NaN is told."""
    there = [point for point in points if all(point.get(name) is not None for name in names)]
    finite = [point for point in there if all(is_number(point[name]) for name in names)]
    if len(finite) < len(there):
        gone = f"{len(there) - len(finite)} of {len(there)} points of {names[0]}"
        run.note(f"{file}: {gone} are not finite numbers and not shown; the others are")
    return finite


def training_curves(run: RunFolder) -> list[Curve]:
    """The losses that each checkpoint's `medforget.json` has kept."""
    curves = []
    for model in run.models:
        file = run.file(model.name, "medforget.json")
        log = run.info(model.name).get("log") or []
        if not isinstance(log, list) or not all(isinstance(line, dict) for line in log):
            run.note(f"{file}: its log is not what training writes; the model's training curves are left out")
            continue
        for metric in ("loss", "forget_loss", "retain_loss", "forget_exact", "retain_exact"):
            # What is taught has one loss, what is unlearned two that its sum hides.
            if metric == "loss" and any("forget_loss" in line for line in log):
                continue
            points = _finite(run, file, log, metric, "step")
            if len(points) < 2:
                continue
            steps, values = [float(line["step"]) for line in points], [float(line[metric]) for line in points]
            curves.append(Curve("training", metric, model.name, model.method, model.level, file, steps, values))
    return curves
