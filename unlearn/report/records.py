"""Every number of a report with where it comes from; tables, figures and sentences show these and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..measures.intervals import Interval


@dataclass(frozen=True)
class Record:
    """
    One number.

    Attributes:
        measure (`str`):
            What was done: `"score"` is a mean over the rows of a task; `"selectivity"`, `"gap"` and `"leak"` are
            differences of two scores; the others are named in `docs/report.md`.
        metric (`str`):
            Of what: `"exact_match"`, `"answer_probability"` and so on.
        value (`float`):
            The number; shares are 0 to 1.
        n (`int`), studies (`int`):
            Rows behind it, and the studies that they are about.
        checkpoint (`str`):
            Name of the model that was asked.
        file (`str`):
            Where the rows are, below the folder of the run; of a difference that of its first side.
        other_file (`str`):
            Where those of the second side are, if it has a file of its own.
        method (`str`), level (`str`):
            What made the checkpoint; the level is empty where a number holds for all of them.
        split (`str`):
            `"forget"`, `"retain"`, `"rephrase"`, `"general_med"`, `"attack"`, `"unseen"`; of the cascade the relation.
        task (`str`):
            Kind of question, or the identifiers in an attack's prompt; of the cascade the level probed.
        set (`str`):
            Set of the probe, where the number comes from one.
        low (`float`, *optional*), high (`float`, *optional*):
            95 % interval over resampled studies.
        version (`str`, *optional*):
            Version of the lm-eval task.
        judge (`str`, *optional*):
            Who judged, where somebody did.
        missing (`int`, *optional*, defaults to `0`):
            Rows left out because they have no value: the judge gave no mark, or a probability is NaN.
        examples (`int`, *optional*):
            Of relearning: images whose forgotten rows were taught.
    """

    measure: str
    metric: str
    value: float
    n: int
    studies: int
    checkpoint: str
    file: str
    other_file: str = ""
    method: str = ""
    level: str = ""
    split: str = ""
    task: str = ""
    set: str = ""
    low: float | None = None
    high: float | None = None
    version: str | None = None
    judge: str | None = None
    missing: int = 0
    examples: int | None = None

    @property
    def id(self) -> str:
        """What no other record of the report is called."""
        parts = (self.measure, self.checkpoint, self.level, self.set, self.split, self.task, self.metric)
        return "/".join(part.replace("/", "-") for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        """What `report.json` holds; what does not apply is left out."""
        return {"id": self.id} | {name: value for name, value in asdict(self).items() if value not in (None, "")}


Key = tuple[str, ...]


class Records:
    """All records of a report, found by what they are about, and why those that are not there are not."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Record] = {}
        self._holes: dict[Key, str] = {}

    def add(self, record: Record) -> None:
        """Keep a record, or, if its value is not a number, that fact."""
        key = _key(record.measure, record.method, record.level, record.split, record.task, record.metric, record.set)
        if math.isfinite(record.value):
            self._by_key[key] = record
        else:
            self._holes[key] = f"{record.metric} is {record.value} in {record.file}"

    def leave_out(self, why: str, measure: str, method: str, level: str, split: str, task: str, metric: str) -> None:
        """Say why there is no such record."""
        self._holes[_key(measure, method, level, split, task, metric)] = why

    def find(
        self,
        measure: str,
        method: str,
        level: str = "",
        split: str = "",
        task: str = "",
        metric: str = "",
        set: str = "",
    ) -> Record | None:
        """The record of this, if there is one."""
        return self._by_key.get(_key(measure, method, level, split, task, metric, set))

    def value(self, *about: str) -> float:
        """The value of the record that [`Records.find`] finds; NaN if there is none."""
        record = self.find(*about)
        return math.nan if record is None else record.value

    def hole(self, *about: str) -> str | None:
        """Why there is no such record, if that is known of it alone."""
        return self._holes.get(_key(*about))

    def of(self, measure: str) -> list[Record]:
        """All records of a measure."""
        return [record for record in self if record.measure == measure]

    def holes(self) -> list[dict[str, str]]:
        """All that is known to be missing by itself, with the reason."""
        names = ("measure", "method", "level", "split", "task", "metric", "set")
        return [dict(zip(names, key, strict=True)) | {"why": why} for key, why in self._holes.items()]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)


def _key(
    measure: str, method: str, level: str = "", split: str = "", task: str = "", metric: str = "", set: str = ""
) -> Key:
    # The questions that know no hospital are the same at every level, and so are a baseline's answers to them.
    level = "" if method == "vanilla" and split == "general_med" else level
    return measure, method, level, split, task, metric, set


def from_interval(interval: Interval, **about: Any) -> Record:
    """A record of an [`~unlearn.measures.intervals.Interval`]; bounds that are not numbers are left out."""
    low, high = (bound if math.isfinite(bound) else None for bound in (interval.low, interval.high))
    return Record(
        value=interval.value,
        low=low,
        high=high,
        n=interval.n,
        studies=interval.studies,
        missing=interval.missing,
        **about,
    )


def mean(values: Iterable[float]) -> float:
    """Mean of what is there; NaN of nothing."""
    present = [value for value in values if math.isfinite(value)]
    return sum(present) / len(present) if present else math.nan
