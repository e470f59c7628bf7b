"""Resumable stages: each is skipped when its inputs have not changed, and leaves its output complete or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medforget_dataset.atomic import sweep, write_text
from medforget_dataset.errors import UserError

from .workers import SURVIVABLE, Workers


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RUN_FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """A piece of work that is done once for the same inputs.

    Args:
        name (`str`): Name of the stage.
        output (`Path`): File or folder that `make` writes, complete or not at all.
        make (`Callable`): Does the work; a `functools.partial` of a function of a module, so that another process can.
        after (`tuple[str, ...]`, *optional*): Stages whose output it reads; when one of them is made anew, so is this.
        inputs (`dict`, *optional*): What else the output depends on; anything JSON can hold.
        kind (`str`, *optional*): What it does, in one word, for the plan.
        seconds (`float`, *optional*, defaults to `0`): What it is expected to take on one CPU core.
        optional (`bool`, *optional*, defaults to `False`): Whether the others go on when it fails.
    """

    name: str
    output: Path
    make: Callable[[], Any]
    after: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    seconds: float = 0.0
    optional: bool = False


class Run:
    """The folder of a run, and a record of which stages are done with which inputs.

    Args:
        folder (`Path`): Folder of the run; made if there is none.
        settings (`dict`): What is run, for the record.

    Raises:
        UserError: The folder holds something that is not a run, or a run written by another version.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        if (folder / RUN_FILE).is_file():
            if ("sweep" in read_run(folder)) != ("sweep" in settings):
                raise UserError(f"{folder}: a run and a sweep cannot share a folder; choose another")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is not a run (no {RUN_FILE}); choose another --name")
        folder.mkdir(parents=True, exist_ok=True)
        self.records = folder / ".stages"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder, and sweep up what a killed one left behind."""
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another process is running this run; wait for it") from None
            for folder in (self.folder, self.records, self.folder / "evaluation"):
                sweep(folder)
            write_text(self.folder / RUN_FILE, json.dumps({"format": RUN_FORMAT, **self.settings}, indent=2) + "\n")
            yield

    def execute(self, stages: Sequence[Stage], jobs: int = 1) -> dict[str, str]:
        """Do the stages that are not done, in an order that respects what they read.

        Args:
            stages (`Sequence[Stage]`): Stages, each after those it reads.
            jobs (`int`, *optional*, defaults to `1`): Stages at a time. With one they run in this process; with more
                each runs in a process of its own with its share of the CPU cores, and writes to `logs/NAME.log`.

        Returns:
            `dict[str, str]`: The optional stages that could not be done, and why.
        """
        keys: dict[str, str] = {}
        todo: list[Stage] = []
        for stage in stages:
            upstream = {name: keys[name] for name in stage.after}
            content = json.dumps({"inputs": stage.inputs, "after": upstream}, sort_keys=True, default=str)
            keys[stage.name] = hashlib.sha256(content.encode()).hexdigest()
            made_anew = {other.name for other in todo} & set(stage.after)
            if not made_anew and self._is_done(stage, keys[stage.name]):
                logger.info("%-28s done before", stage.name)
                continue
            (self.records / f"{stage.name}.json").unlink(missing_ok=True)
            todo.append(stage)
        _tell_plan(stages, todo, jobs)
        progress = _Progress(todo, jobs)
        failures: dict[str, str] = {}

        def done(stage: Stage, seconds: float) -> None:
            self._record(stage, {"key": keys[stage.name], "seconds": round(seconds, 1)})
            progress.ended(stage, seconds)
            logger.info("%-28s %.0f s, %s", stage.name, seconds, progress.left())

        def failed(stage: Stage, error: Exception) -> set[str]:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            lost = {stage.name: reason} | dict.fromkeys(_followers(todo, stage.name), f"{stage.name} failed")
            for other in todo:
                if other.name in lost:
                    progress.ended(other, None)
                    self._record(other, {"failed": lost[other.name]})
            failures.update(lost)
            logger.error("%-28s failed: %s", stage.name, reason)
            return set(lost)

        if jobs > 1 and todo:
            with Workers(self.folder / "logs", jobs) as workers:
                workers.run(todo, done, failed)
        else:
            _one_by_one(todo, done, failed)
        return failures

    def _is_done(self, stage: Stage, key: str) -> bool:
        record = read_json(self.records / f"{stage.name}.json")
        return stage.output.exists() and record.get("key") == key and "seconds" in record

    def _record(self, stage: Stage, content: dict[str, Any]) -> None:
        self.records.mkdir(exist_ok=True)
        write_text(self.records / f"{stage.name}.json", json.dumps(content) + "\n")


class _Progress:
    """How long the stages that are left will take, as those that have ended tell.

    Args:
        stages (`Sequence[Stage]`): All that are to be done.
        jobs (`int`): Stages at a time.
    """

    def __init__(self, stages: Sequence[Stage], jobs: int):
        self.waiting = {stage.name: stage.seconds for stage in stages}
        self.jobs = jobs
        self.expected = self.taken = 0.0

    def ended(self, stage: Stage, seconds: float | None) -> None:
        """Tell that a stage has ended, after so many seconds, or cannot be done."""
        expected = self.waiting.pop(stage.name)
        if seconds is not None and expected:
            self.expected += expected
            self.taken += seconds

    def left(self) -> str:
        """The time left, in words."""
        rate = self.taken / self.expected if self.expected else 1.0
        return f"about {math.ceil(sum(self.waiting.values()) * rate / self.jobs / 60)} minutes left"


def _tell_plan(stages: Sequence[Stage], todo: Sequence[Stage], jobs: int) -> None:
    kinds = Counter(stage.kind for stage in todo if stage.kind)
    if kinds:
        listed = ", ".join(f"{number} × {kind}" for kind, number in kinds.items())
        left = _Progress(todo, jobs).left()
        logger.info("%d of %d stages to do (%s), %d at a time; %s", len(todo), len(stages), listed, jobs, left)


def _followers(stages: Sequence[Stage], name: str) -> list[str]:
    """The stages that need a stage, directly or through others."""
    lost = [name]
    for stage in stages:
        if set(stage.after) & set(lost):
            lost.append(stage.name)
    return lost[1:]


def _one_by_one(
    stages: Sequence[Stage], done: Callable[[Stage, float], None], failed: Callable[[Stage, Exception], set[str]]
) -> None:
    lost: set[str] = set()
    for stage in stages:
        if stage.name in lost:
            continue
        logger.info("%-28s ...", stage.name)
        start = time.monotonic()
        try:
            stage.make()
        except SURVIVABLE as error:
            if not stage.optional:
                raise
            lost |= failed(stage, error)
        else:
            done(stage, time.monotonic() - start)


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UserError: The folder is not a run, or was written by another version.
    """
    path = folder / RUN_FILE
    settings = read_json(path)
    if not settings:
        raise UserError(f"{path}: missing or not a run's settings; give the folder of a run, such as runs/demo")
    if settings.get("format") != RUN_FORMAT:
        raise UserError(
            f"{path}: written by another version (format {settings.get('format')}, this is {RUN_FORMAT}); "
            "choose another --name or remove the folder"
        )
    return settings


def stage_seconds(folder: Path) -> dict[str, float]:
    """How long each finished stage of a run took, in seconds, in the order in which they ended."""
    records = sorted((folder / ".stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
    contents = {path.stem: read_json(path) for path in records}
    return {name: content["seconds"] for name, content in contents.items() if "seconds" in content}


def stage_failures(folder: Path) -> dict[str, str]:
    """The stages of a run that could not be done, and why."""
    contents = {path.stem: read_json(path) for path in sorted((folder / ".stages").glob("*.json"))}
    return {name: content["failed"] for name, content in contents.items() if "failed" in content}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that may be absent or damaged; nothing then."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
