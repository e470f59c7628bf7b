"""Resumable stages: each is skipped when its inputs have not changed, and leaves its output complete or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medforget_dataset.atomic import sweep, write_text
from medforget_dataset.errors import UserError

from .workers import Workers


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
    """

    name: str
    output: Path
    make: Callable[[], Any]
    after: tuple[str, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)


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

    def execute(self, stages: Sequence[Stage], jobs: int = 1) -> None:
        """Do the stages that are not done, in an order that respects what they read.

        Args:
            stages (`Sequence[Stage]`): Stages, each after those it reads.
            jobs (`int`, *optional*, defaults to `1`): Stages at a time. With one they run in this process; with more
                each runs in a process of its own with its share of the CPU cores, and writes to `logs/NAME.log`.
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
        if jobs > 1 and todo:
            with Workers(self.folder / "logs", jobs) as workers:
                workers.run(todo, lambda stage, seconds: self._record(stage, keys[stage.name], seconds))
            return
        for stage in todo:
            logger.info("%-28s ...", stage.name)
            start = time.monotonic()
            stage.make()
            self._record(stage, keys[stage.name], time.monotonic() - start)

    def _is_done(self, stage: Stage, key: str) -> bool:
        record = _read_json(self.records / f"{stage.name}.json")
        return stage.output.exists() and record.get("key") == key and "seconds" in record

    def _record(self, stage: Stage, key: str, seconds: float) -> None:
        self.records.mkdir(exist_ok=True)
        content = json.dumps({"key": key, "seconds": round(seconds, 1)})
        write_text(self.records / f"{stage.name}.json", content + "\n")
        logger.info("%-28s %.0f s", stage.name, seconds)


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        UserError: The folder is not a run, or was written by another version.
    """
    path = folder / RUN_FILE
    settings = _read_json(path)
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
    contents = {path.stem: _read_json(path) for path in records}
    return {name: content["seconds"] for name, content in contents.items() if "seconds" in content}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
