"""What a build noticed in its sources: every fault and every oddity with its file and row."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .errors import UserError


LOG = "build-log.jsonl"
logger = logging.getLogger(__name__)


class SourceError(Exception):
    """A file or row of a source that cannot be used; [`BuildLog.fault`] decides what becomes of the build.

    Args:
        kind (`str`): What it is a case of, for counting, for example `"truncated image"`.
        file (`str` or `Path`): The file at fault.
        message (`str`): What is wrong and what to do.
        row (`str`, *optional*): Line, row, member or id in it.
    """

    def __init__(self, kind: str, file: str | Path, message: str, row: str = ""):
        super().__init__(f"{file}{f', {row}' if row else ''}: {message}")
        self.kind, self.file, self.row, self.message = kind, str(file), row, message


class BuildLog:
    """Counts faults and oddities, and writes each as one JSON line: `action`, `kind`, `file`, `row`, `message`.

    Args:
        on_error (`str`, *optional*, defaults to `"stop"`): Whether a fault ends the build (`"stop"`) or is passed
            over (`"skip"`).
        path (`Path`, *optional*): File to write; nothing is kept but counts without it.
        folders (`Iterable[Path]`, *optional*): Folders of this machine. The file, which is published with the data,
            has only the last part of their paths.
    """

    def __init__(self, on_error: str = "stop", path: Path | None = None, folders: Iterable[Path] = ()):
        self.on_error, self.path = on_error, path
        forms = [(form, folder) for folder in folders for form in (folder.resolve(), folder) if len(form.parts) > 1]
        names = {str(form): folder.name or folder.resolve().name for form, folder in forms}
        # A folder before the one that it lies in.
        self._folders = sorted(names.items(), key=lambda item: len(item[0]), reverse=True)
        self.skipped: Counter[str] = Counter()
        self.noticed: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def fault(self, error: SourceError) -> None:
        """A file or row that cannot be used.

        Raises:
            UserError: The build stops at faults.
        """
        if self.on_error == "stop":
            raise UserError(f"{error}; mend it, or build with --on-error skip") from error
        self._add("skipped", error.kind, error.file, error.row, error.message)

    def notice(self, kind: str, file: str | Path, message: str, row: str = "") -> None:
        """Something that the build copes with, but that whoever reads the result should know."""
        self._add("noticed", kind, str(file), row, message)

    def summary(self) -> list[str]:
        """One line for each kind: how often, and where first."""
        return [
            f"{action} {count}: {kind} (first: {self._first[kind]})"
            for action, counts in (("skipped", self.skipped), ("noticed", self.noticed))
            for kind, count in counts.most_common()
        ]

    def _add(self, action: str, kind: str, file: str, row: str, message: str) -> None:
        (self.skipped if action == "skipped" else self.noticed)[kind] += 1
        self._first.setdefault(kind, f"{file}{f', {row}' if row else ''}: {message}")
        if self.path:
            for folder, name in self._folders:
                file, message = file.replace(folder, name), message.replace(folder, name)
            line = {"action": action, "kind": kind, "file": file, "row": row, "message": message}
            with self.path.open("a", encoding="utf-8") as file_:
                file_.write(json.dumps(line) + "\n")
