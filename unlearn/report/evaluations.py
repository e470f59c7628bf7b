"""Scores of a run's evaluations: read, checked against what they claim to be, averaged over studies."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from harness_tasks.generate import VERSION
from medforget_dataset.hierarchy import LEVELS

from ..grouping import image_key
from ..measures.intervals import Interval, bootstrap_mean
from .records import Record, Records, from_interval
from .run_folder import CONTROLS, FLAT, RunFolder


EVALUATION = "evaluation"
ASKED = "checkpoint.json"
"""Beside the answers: the digest of the run that trained the checkpoint that gave them."""
ATTACK = "attack"
TASK_NAME = re.compile(
    rf"medforget_(?:(?P<level>{'|'.join(LEVELS)})_(?P<split>forget|retain|rephrase|{ATTACK})|general_med)_(?P<kind>\w+)"
)
JUDGED = ("factuality", "gen_score")
ROW_TEXTS = ("id", "question", "answer", "response")
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Answers:
    """
    The answers of one checkpoint to one task.

    Attributes:
        name (`str`):
            The lm-eval task.
        level (`str`), split (`str`), kind (`str`):
            What it asks; the level is empty for `general_med`.
        file (`str`):
            Where the answers are, below the folder of the run; the file of means where there are no answers.
        metrics (`dict[str, float]`):
            Means as the evaluation wrote them.
        n (`int`):
            Rows asked.
        rows (`list[dict]`):
            A line of TASK.jsonl each; none in the results of older versions.
    """

    name: str
    level: str
    split: str
    kind: str
    file: str
    metrics: dict[str, float]
    n: int
    version: str | None = None
    judge: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def values(self, metric: str) -> list[float | None]:
        """The metric of each row; `None` where it is missing."""
        return [row.get(metric) for row in self.rows]

    @property
    def studies(self) -> list[str]:
        """The unit of each row that is resampled: its study, or its image where it knows no hospital."""
        return [image_key(row["id"]) for row in self.rows]


class Evaluations:
    """
    All evaluations of a run.

    Args:
        run ([`~unlearn.report.run_folder.RunFolder`]):
            The run. It is told of every file that cannot be used.
    """

    def __init__(self, run: RunFolder):
        self.run = run
        self._ids = run.data.all_ids() if run.data else None
        names = [model.name for model in run.models]
        controls = [f"vanilla-{control}" for control in CONTROLS]
        flat = [f"{model.name}{FLAT}" for model in run.models if model.method in run.methods]
        self.by_name = {name: self._read(name) for name in (*names, *controls, *flat)}
        for path in sorted((run.path / EVALUATION).glob("*.json")):
            if path.stem not in self.by_name:
                run.note(f"{run.file(EVALUATION, path.name)}: not of a checkpoint of this run; left out")
        self._drop_other_versions()

    def get(self, name: str, task: str) -> Answers | None:
        """The answers of a checkpoint to a task, if they are there and can be used."""
        return self.by_name.get(name, {}).get(task)

    def _read(self, name: str) -> dict[str, Answers]:
        results = self.run.read_json(EVALUATION, f"{name}.json") or {}
        answers, foreign = {}, []
        for task, result in results.items():
            match = TASK_NAME.fullmatch(task)
            if match is None or not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
                foreign.append(task)
                continue
            wrong = _wrong_field(result)
            if wrong:
                file = self.run.file(EVALUATION, f"{name}.json")
                self.run.note(f"{file}: {wrong} of {task}; left out. Run `medforget run` again")
                continue
            read = self._answers(name, task, match, result)
            if read is not None:
                answers[task] = read
        if foreign:
            named = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            file = self.run.file(EVALUATION, f"{name}.json")
            self.run.note(f"{file}: {len(foreign)} results are not of this benchmark ({named}); left out")
        return answers

    def _answers(self, name: str, task: str, match: re.Match, result: dict[str, Any]) -> Answers | None:
        rows_file = self.run.file(EVALUATION, name, f"{task}.jsonl")
        rows = self._rows(rows_file)
        answers = Answers(
            task,
            match["level"] or "",
            match["split"] or "general_med",
            match["kind"],
            rows_file if rows else self.run.file(EVALUATION, f"{name}.json"),
            {metric: _number(value) for metric, value in result["metrics"].items()},
            result.get("n", len(rows)),
            None if result.get("version") is None else str(result["version"]),
            result.get("judge"),
            rows,
        )
        problem = self._problem(answers) if rows else None
        if problem:
            self.run.note(f"{rows_file}: {problem}; left out. Run `medforget run` again")
            return None
        return answers

    def _rows(self, file: str) -> list[dict[str, Any]]:
        try:
            lines = (self.run.path / file).read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self.run.note(f"{file}: damaged ({error}); its means are shown without intervals")
            return []

    def _problem(self, answers: Answers) -> str | None:
        """What is wrong with answers that are there: not what the means were made from, or not about this data."""
        if len(answers.rows) != answers.n:
            return f"holds {len(answers.rows)} answers, where the evaluation counted {answers.n}"
        for row in answers.rows:
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ROW_TEXTS):
                return f"holds lines without one of {', '.join(ROW_TEXTS)}"
        if self._ids is not None:
            other = next((row["id"] for row in answers.rows if row["id"] not in self._ids), None)
            if other is not None:
                return f"row {other} is not in the run's data"
        for metric, mean in answers.metrics.items():
            present = [value for value in answers.values(metric) if value is not None]
            other = next((value for value in present if not isinstance(value, int | float)), None)
            if other is not None:
                return f"{metric} of a row is {other!r}, which is no number"
            if not present:
                continue
            own = math.fsum(present) / len(present)
            if math.isfinite(mean) and not math.isclose(own, mean, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                return f"{metric} of its rows is {own:.4f}, where the evaluation says {mean:.4f}"
        return None

    def _drop_other_versions(self) -> None:
        counts: dict[str, Counter[str | None]] = defaultdict(Counter)
        for tasks in self.by_name.values():
            for task, answers in tasks.items():
                counts[task][answers.version] += 1
        right = {task: _version_to_show(of_task) for task, of_task in counts.items()}
        for name, tasks in self.by_name.items():
            old = [task for task, answers in tasks.items() if answers.version != right[task]]
            if old:
                version = tasks[old[0]].version or "not recorded"
                self.run.note(
                    f"{self.run.file(EVALUATION, f'{name}.json')}: {len(old)} results are of another version of the "
                    f"tasks (the version of {old[0]} is {version}); left out. Run `medforget run` again"
                )
            for task in old:
                del tasks[task]


def _wrong_field(result: dict[str, Any]) -> str | None:
    """What a result says of itself that cannot be read."""
    n, judge = result.get("n", 0), result.get("judge")
    if not isinstance(n, int) or n < 0:
        return f"n is {json.dumps(n)} and no number of rows"
    if judge is not None and not isinstance(judge, str):
        return f"judge is {json.dumps(judge)} and no name"
    return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _version_to_show(counts: Counter[str | None]) -> str | None:
    """The version of the tasks that are installed, or, where no result has it, that of most results."""
    own = str(VERSION)
    return own if own in counts else counts.most_common(1)[0][0]


def score_records(run: RunFolder, evaluations: Evaluations, records: Records) -> None:
    """
    Add a record for every metric of every task: measure `"score"`, or `"control"` for the controls.

    What a judge gave is shown of one judge only, the one that most results have; the others are left out with the
    reason.
    """
    judge = main_judge(evaluations)
    for model in run.models:
        for answers in evaluations.by_name[model.name].values():
            if model.level and answers.level not in ("", model.level):
                continue
            about = {"method": model.method, "level": answers.level or model.level}
            for record in _records(answers, "score", model.name, **about):
                if record.metric in JUDGED and answers.judge != judge:
                    why = f"judged by {answers.judge or 'somebody not named'}, the others by {judge}"
                    about_it = (record.method, record.level, record.split, record.task, record.metric)
                    records.leave_out(why, "score", *about_it)
                else:
                    records.add(record)
    for control in CONTROLS:
        name = f"vanilla-{control}"
        for answers in evaluations.by_name[name].values():
            for record in _records(answers, "control", name, method="vanilla", level=answers.level, set=control):
                if record.metric not in JUDGED or answers.judge == judge:
                    records.add(record)


def main_judge(evaluations: Evaluations) -> str | None:
    """The judge of most results; of several with as many, the first by name."""
    judges = Counter(
        answers.judge
        for tasks in evaluations.by_name.values()
        for answers in tasks.values()
        if answers.judge and any(metric in answers.metrics for metric in JUDGED)
    )
    return min(judges, key=lambda judge: (-judges[judge], judge), default=None)


def _records(answers: Answers, measure: str, checkpoint: str, **about: Any) -> Iterator[Record]:
    for metric, mean in answers.metrics.items():
        interval = Interval(mean, math.nan, math.nan, answers.n, 0)
        values = answers.values(metric)
        # A row without the metric is a row of another kind of evaluation; a NaN among the rows makes the mean one.
        if any(value is not None for value in values) and math.isfinite(mean):
            if not any(isinstance(value, float) and math.isnan(value) for value in values):
                interval = bootstrap_mean(values, answers.studies)
            else:
                interval = Interval(math.nan, math.nan, math.nan, answers.n, 0)
        yield from_interval(
            interval,
            measure=measure,
            metric=metric,
            checkpoint=checkpoint,
            file=answers.file,
            split=answers.split,
            task=answers.kind,
            version=answers.version,
            judge=answers.judge if metric in JUDGED else None,
            **about,
        )
