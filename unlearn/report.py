"""The report of a run: the paper's Table 3, what selectivity says, the controls, and the plots."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from medforget_dataset.atomic import write_text
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS
from medforget_dataset.processes import available_cores
from medforget_dataset.writer import read_record

from .methods import METHODS
from .plots import Values, plot_forget_retain, plot_scores


SPLITS = {"forget": "Forget ↓", "retain": "Retain ↑", "rephrase": "Rephrase ↓", "general_med": "General Med ↑"}
# The metric that stands for a task in tables; report.json holds all of them.
MAIN_METRICS = {
    "generation": "rouge_l",
    "classification": "acc",
    "cloze": "exact_match",
    "identity": "exact_match",
}
TITLES = {"vanilla": "Vanilla", "retrained": "Retrained"}
LIBRARIES = ("torch", "transformers", "trl", "datasets", "lm_eval")
_TASK = re.compile(rf"medforget_(?:({'|'.join(LEVELS)})_(forget|retain|rephrase)|general_med)_(\w+)")

EMBEDDED = (
    "The corpus is rendered: radiographs are computed from one public chest CT; patients, names and reports are "
    "generated. No row describes a real person."
)
TEMPLATE = Path(__file__).with_name("report_template.md")

Score = dict[str, Any]


def write_report(folder: Path, settings: dict[str, Any], seconds: dict[str, float]) -> Path:
    """Write `report.json`, `report.md` and the plots of a run.

    Args:
        folder (`Path`): Folder of the run.
        settings (`dict`): What was run.
        seconds (`dict[str, float]`): Duration of each stage.

    Returns:
        `Path`: `report.md`.
    """
    plan = settings["plan"]
    levels, methods = plan["levels"], ["vanilla", "retrained", *plan["methods"]]
    scores = [
        score
        for method in methods
        for level in levels
        for score in _read(folder, method, level, "vanilla" if method == "vanilla" else f"{method}-{level}")
    ]
    wrong_image = [score for level in levels for score in _read(folder, "vanilla", level, "vanilla-wrong-image")]
    record = read_record(folder / "medforget")
    report = {
        "run": settings,
        "data": {key: record[key] for key in ("options", "restricted", "forgotten_rows")},
        "corpus": _corpus_sentence(record),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "cpu_count": available_cores(),
        "seconds": seconds,
        "scores": scores,
        "wrong_image": wrong_image,
        "gaps": _gaps(scores, levels, methods),
    }
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    values = _main_values(scores)
    plot_scores(values, levels, methods, list(MAIN_METRICS), titles(), folder / "scores.png")
    plot_forget_retain(values, levels, methods, titles(), folder / "forget-retain.png")
    write_text(folder / "report.md", _markdown(report, levels, methods))
    return folder / "report.md"


def titles() -> dict[str, str]:
    """Names of methods in tables."""
    return TITLES | {name: method.title for name, method in METHODS.items()}


def _read(folder: Path, method: str, level: str, name: str) -> Iterable[Score]:
    path = folder / "evaluation" / f"{name}.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged; finish the run with `medforget run`") from error
    for task_name, result in results.items():
        match = _TASK.fullmatch(task_name)
        if not match or match[1] not in (None, level):
            continue
        for metric, value in result["metrics"].items():
            yield {
                "method": method,
                "level": level,
                "split": match[2] or "general_med",
                "task": match[3],
                "metric": metric,
                "value": value,
                "n": result["n"],
            }


def _gaps(scores: list[Score], levels: list[str], methods: list[str]) -> list[Score]:
    """Selectivity (retain minus forget) and forget minus retrained, for every method, level and task."""
    values = {(s["method"], s["level"], s["split"], s["task"], s["metric"]): s["value"] for s in scores}
    gaps = []
    for level in levels:
        for method in methods:
            for task, metric in MAIN_METRICS.items():
                forget = values.get((method, level, "forget", task, metric))
                if forget is None:
                    continue
                retrained = values.get(("retrained", level, "forget", task, metric))
                gaps.append(
                    {
                        "method": method,
                        "level": level,
                        "task": task,
                        "metric": metric,
                        "selectivity": values[method, level, "retain", task, metric] - forget,
                        "forget_minus_retrained": None if retrained is None else forget - retrained,
                    }
                )
    return gaps


def _corpus_sentence(record: dict[str, Any]) -> str:
    if record["options"]["corpus"] == "embedded":
        return EMBEDDED
    return f"Corpus: {record['options']['corpus']}{', restricted' if record['restricted'] else ''}."


def _markdown(report: dict[str, Any], levels: list[str], methods: list[str]) -> str:
    options = report["data"]["options"]
    studies = options["institutions"] * options["patients"] * options["studies"]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        plan=report["run"]["plan"],
        options=options,
        levels=levels,
        studies=studies,
        rows=studies * 3 * (1 + options["sections"]),
        score_table=_table(report["scores"], levels, methods),
        gap_table=_gap_table(report["gaps"], levels, methods),
        wrong_image_table=_wrong_image_table(report["wrong_image"]),
    )


def _main_values(scores: list[Score]) -> Values:
    return {
        (s["method"], s["level"], s["split"], s["task"]): s["value"]
        for s in scores
        if s["metric"] == MAIN_METRICS[s["task"]]
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _table(scores: list[Score], levels: list[str], methods: list[str]) -> str:
    """The layout of the paper's Table 3, with identity beside its three tasks."""
    columns = [("generation", "Gen"), ("classification", "Class"), ("cloze", "Cloze"), ("identity", "Id")]
    shown = [
        (split, task, title)
        for split in SPLITS
        for task, title in columns
        if (split, task) != ("general_med", "identity")
    ]
    values = _main_values(scores)
    header = "| Method | Level | " + " | ".join(f"{SPLITS[split]} {title}" for split, _, title in shown) + " |"
    lines = [header, "|---|---|" + "---:|" * len(shown)]
    for level in levels:
        for method in methods:
            cells = [_percent(values.get((method, level, split, task))) for split, task, _ in shown]
            lines.append(f"| {titles()[method]} | {level} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gap_table(gaps: list[Score], levels: list[str], methods: list[str]) -> str:
    tasks = list(MAIN_METRICS)
    lines = ["| Method | Level | " + " | ".join(tasks) + " |", "|---|---|" + "---:|" * len(tasks)]
    cells = {(gap["method"], gap["level"], gap["task"]): _gap_cell(gap) for gap in gaps}
    for level in levels:
        for method in methods:
            row = [cells.get((method, level, task), "–") for task in tasks]
            lines.append(f"| {titles()[method]} | {level} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _gap_cell(gap: Score) -> str:
    text = f"{100 * gap['selectivity']:+.1f}"
    beyond = gap["forget_minus_retrained"]
    if beyond is None or gap["method"] == "retrained":
        return text
    return f"{text} ({100 * beyond:+.1f}{' **over**' if beyond < 0 and gap['method'] != 'vanilla' else ''})"


def _wrong_image_table(scores: list[Score]) -> str:
    lines = ["| Level | Split | Task | Metric | Score | n |", "|---|---|---|---|---:|---:|"]
    lines += [
        f"| {s['level']} | {s['split']} | {s['task']} | {s['metric']} | {_percent(s['value'])} | {s['n']} |"
        for s in scores
    ]
    return "\n".join(lines)
