"""What a run has left in its folder, and what it has not and why."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from medforget_dataset.agreement import says_it_is_free
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS

from ..checkpoint_info import read_info
from ..methods import METHODS
from .dataset import RunData


PAPER_ORDER = tuple(reversed(LEVELS))
"""Levels as in the paper's tables, from the smallest to the largest."""
CONTROLS = {"wrong-image": "another patient's image"}
"""What the vanilla model is shown instead of the image, by the ending of the evaluation's name."""
FLAT = "-flat"
"""What the name of a model ends with that forgot as many rows drawn without the hierarchy."""


class Model(NamedTuple):
    """A checkpoint of a run that is evaluated; `level` is empty for the one that forgot nothing."""

    name: str
    method: str
    level: str


class RunFolder:
    """
    The folder of a run.

    Args:
        path (`Path`):
            The folder.
        settings (`dict`):
            What `run.json` says.
        seconds (`dict[str, float]`):
            Duration of each finished stage.
        failures (`dict[str, str]`, *optional*):
            Stages that could not be done, and why.

    Attributes:
        notes (`list[str]`):
            What could not be used, a line each, with the file at fault.

    Raises:
        UserError: The settings do not say what was to be unlearned.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], seconds: dict[str, float], failures: dict[str, str] | None = None
    ):
        self.path, self.settings, self.failures = path, settings, failures or {}
        self.notes: list[str] = []
        self.plan = _plan(path, settings)
        self.levels = [level for level in PAPER_ORDER if level in self.plan["levels"]]
        self.methods = [method for method in self.plan["methods"] if method in METHODS]
        for method in self.plan["methods"]:
            if method not in METHODS:
                self.note(
                    f"run.json: method {method!r} is not one of this version; left out. Use the version it is of"
                )
        self.seconds = {stage: duration for stage, duration in seconds.items() if is_number(duration)}
        for stage in sorted(seconds.keys() - self.seconds.keys()):
            file = self.file(".stages", f"{stage}.json")
            self.note(f"{file}: its seconds are no number; remove it and run `medforget run` again")

    @property
    def all_methods(self) -> list[str]:
        """The baselines and the methods, in the order of tables."""
        return ["vanilla", "retrained", *self.methods]

    @cached_property
    def models(self) -> list[Model]:
        """Every checkpoint that the plan evaluates, in the order of tables."""
        unlearned = [
            Model(f"{method}-{level}", method, level)
            for method in ("retrained", *self.methods)
            for level in self.levels
        ]
        return [Model("vanilla", "vanilla", ""), *unlearned]

    def model(self, method: str, level: str) -> Model:
        """The checkpoint that is asked about a level."""
        return next(model for model in self.models if model.method == method and model.level in ("", level))

    @cached_property
    def data(self) -> RunData | None:
        """The dataset; nothing if it cannot be read, which a note says."""
        try:
            data = RunData(self.path / "medforget")
            data.all_ids()
            return data
        except UserError as error:
            self.note(f"{error}. What needs the data is left out")
            return None

    @property
    def is_restricted(self) -> bool:
        """Whether the run's data is marked as restricted, or any of its checkpoints does not say that it is free."""
        if self.data is not None and self.data.record["restricted"]:
            return True
        records = [self.info(model.name) for model in self.models]
        return any(record and not says_it_is_free(record) for record in records)

    def file(self, *parts: str) -> str:
        """A path below the folder as records give it."""
        return Path(*parts).as_posix()

    def info(self, name: str) -> dict[str, Any]:
        """What a checkpoint's `medforget.json` says; nothing if there is none that can be read."""
        try:
            return read_info(self.path / name)
        except UserError as error:
            self.note(str(error))
            return {}

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """A JSON object below the folder; nothing if there is none, and a note if it is damaged."""
        path = self.path.joinpath(*parts)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.note(f"{self.file(*parts)}: damaged ({error}); remove it and run `medforget run` again")
            return None
        if isinstance(content, dict):
            return content
        self.note(f"{self.file(*parts)}: not what a run writes; remove it and run `medforget run` again")
        return None

    def note(self, line: str) -> None:
        """Keep a line for the report, once."""
        if line not in self.notes:
            self.notes.append(line)

    def why_missing(self, name: str, stage: str = "evaluate") -> str:
        """Why a checkpoint has no result of a stage: not reached, or failed and with what."""
        for step in (name, f"{stage}-{name}"):
            if step in self.seconds:
                continue
            if step in self.failures:
                return f"{step} failed: {self.failures[step]}"
            return f"stage {step} was not done; run `medforget run` again"
        return f"nothing about it in the results of {stage}-{name}"


def is_number(value: Any) -> bool:
    """Whether what a file holds is a finite number; JSON as Python writes it also has NaN and infinity."""
    return isinstance(value, int | float) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _plan(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    plan = settings.get("plan")
    if isinstance(plan, dict) and all(_is_names(plan.get(name)) for name in ("methods", "levels")):
        if any(level in plan["levels"] for level in LEVELS):
            return {"preset": "not recorded", "seed": "not recorded"} | plan
    raise UserError(
        f"{path / 'run.json'}: has no plan with levels and methods, so it is not known what was unlearned; run "
        "`medforget run` again under another --name"
    )
