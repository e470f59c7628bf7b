"""The numbers of a checkpoint's card, read from the report of the run that evaluated it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from harness_tasks.generate import CONFIGS, CONTEXTS
from medforget_dataset.benchmark import SPLITS
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS

from .checkpoint_info import read_info
from .measures.probe import read_probe_info
from .report.evaluations import ASKED, ATTACK, EVALUATION
from .report.reading import choose_metrics
from .report.records import Record, Records
from .report.write import FORMAT


REPORT = "report.json"
METRIC_NAMES = {
    "gen_score": "Gen Score",
    "rouge_l": "ROUGE-L",
    "acc": "accuracy",
    "exact_match": "exact match",
}
# What a measure of a run's later stages is called where it is missing.
_MORE_MEASURES = {"probe": "answer probabilities", "membership": "membership", "relearning": "relearning"}


@dataclass(frozen=True)
class Score:
    """A score that the card shows: which questions of which kind, by which metric, and its record."""

    level: str
    split: str
    kind: str
    metric: str
    record: Record

    @property
    def about(self) -> tuple[str, str, str, str]:
        """What [`~unlearn.report.records.Records.find`] finds it by, after measure and method."""
        return self.level, self.split, self.kind, self.metric

    @property
    def config(self) -> str:
        """The dataset's configuration that is asked."""
        return "general_med" if self.split == "general_med" else f"{self.level}_{CONFIGS[self.split]}"

    @property
    def task(self) -> str:
        """The lm-eval task."""
        place = "general_med" if self.split == "general_med" else f"{self.level}_{self.split}"
        return f"medforget_{place}_{self.kind}"

    @property
    def per_cent(self) -> float:
        """The score as the card's head gives it."""
        return round(100 * self.record.value, 2)

    @property
    def uncertainty(self) -> dict[str, float]:
        """Rows, and bounds of the interval in per cent where there is one."""
        bounds = {"low": self.record.low, "high": self.record.high}
        return {"n": self.record.n} | {k: round(100 * bound, 2) for k, bound in bounds.items() if bound is not None}


@dataclass
class RunNumbers:
    """
    What a run's report says of one of its checkpoints.

    Args:
        run (`Path`):
            Folder of the run.
        name (`str`):
            Name of the checkpoint's folder in it.

    Raises:
        UserError: There is no report, or it was written by another version.
    """

    run: Path
    name: str
    report: dict[str, Any] = field(init=False)
    records: Records = field(init=False)

    def __post_init__(self) -> None:
        file = self.run / REPORT
        try:
            self.report = json.loads(file.read_text(encoding="utf-8"))
            if self.report["format"] != FORMAT:
                raise UserError(f"{file}: written by another version; run `medforget report {self.run}`")
            self.records = _records(self.report)
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: missing or damaged; run `medforget report {self.run}`") from error
        self.metrics = choose_metrics(self.records)

    @cached_property
    def is_of_checkpoint(self) -> bool:
        """
        Whether the checkpoint that lies there is the one that was asked, and not one that was written over it.

        Raises:
            UserError: `medforget.json`, the probe or the evaluation's record is damaged.
        """
        asked, probe = self.run / EVALUATION / self.name / ASKED, self.run / "probes" / f"{self.name}.parquet"
        digests = {_asked_run(asked)} if asked.is_file() else set()
        digests |= {read_probe_info(probe).get("checkpoint_run")} if probe.is_file() else set()
        return (digests - {None} or {None}) == {read_info(self.run / self.name).get("run")}

    @cached_property
    def method(self) -> str:
        """`"vanilla"`, `"retrained"` or the method that made the checkpoint; empty if the report does not know it."""
        return next((record.method for record in self.records if record.checkpoint == self.name), "")

    @cached_property
    def levels(self) -> list[str]:
        """Levels at which it was asked, from the largest down."""
        found = {record.level for record in self.records.of("score") if record.checkpoint == self.name}
        return [level for level in LEVELS if level in found]

    @property
    def level(self) -> str:
        """The level that a model other than the one that knows everything is about."""
        return self.levels[0] if self.levels else ""

    @cached_property
    def scores(self) -> list[Score]:
        """Every score that is shown, in the order of the table."""
        places = [(level, split) for level in self.levels for split in ("forget", "retain", "rephrase")]
        found = []
        for level, split in (*places, (self.level, "general_med")):
            for kind, metric in self.metrics.items():
                record = self.records.find("score", self.method, level, split, kind, metric)
                if record is not None:
                    found.append(Score(level, split, kind, metric, record))
        return found

    @property
    def judges(self) -> set[str]:
        """Who judged generated text."""
        return {score.record.judge for score in self.scores if score.record.judge}

    def has(self, method: str) -> bool:
        """Whether another model was asked the same."""
        return any(record.method == method and record.level in self.levels for record in self.records.of("score"))

    @property
    def is_attacked(self) -> bool:
        """Whether the reconstruction attack was put to it."""
        about, metric = (self.method, self.level, ATTACK), self.metrics.generation
        return any(self.records.find("score", *about, context, metric) for context in CONTEXTS)

    @property
    def unmeasured(self) -> list[str]:
        """What this run did not measure of it."""
        measured = {record.measure for record in self.records if record.checkpoint == self.name}
        missing = [] if self.is_attacked else ["the reconstruction attack"]
        return [*missing, *(words for measure, words in _MORE_MEASURES.items() if measure not in measured)]

    def eval_results(self, dataset: str | None) -> list[EvalResult]:
        """The scores as the card's `model-index` has them."""
        return [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=dataset or "medforget",
                dataset_name=f"MedForget {score.config}",
                dataset_config=score.config,
                dataset_split=SPLITS[score.config][-1],
                metric_type=score.metric,
                metric_name=f"{METRIC_NAMES[score.metric]}, {score.kind}, {score.split} rows, per cent",
                metric_value=score.per_cent,
                metric_args=score.uncertainty,
            )
            for score in self.scores
        ]

    def eval_entries(self, dataset: str) -> list[EvalResultEntry]:
        """The same for `.eval_results/`; a task is named as lm-eval's."""
        entries = []
        for score in self.scores:
            uncertainty = ", ".join(f"{name} {value}" for name, value in score.uncertainty.items())
            notes = f"{METRIC_NAMES[score.metric]}, per cent, {uncertainty}"
            entries.append(EvalResultEntry(dataset, score.task, score.per_cent, notes=notes))
        return entries


def _asked_run(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["checkpoint_run"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: damaged; remove it") from error


def _records(report: dict[str, Any]) -> Records:
    records, names = Records(), {field.name for field in dataclasses.fields(Record)}
    for line in report["records"]:
        # What belongs to no checkpoint, such as the share of a kind of section, is none of a card's.
        if line.get("checkpoint"):
            records.add(Record(**{name: value for name, value in line.items() if name in names}))
    return records
