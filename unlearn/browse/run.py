"""What the page shows of a run: the sections of its report as they were written, and its checkpoints."""

from __future__ import annotations

import html
import re
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from harness_tasks.adapters import ADAPTER_CONFIG
from medforget_dataset.agreement import says_it_is_free
from medforget_dataset.errors import UserError
from medforget_dataset.hub_files import CHECKPOINT_INFO

from ..stages import read_json


REPORT, NUMBERS = "report.html", "report.json"
NOT_ASKED = ("pretrained",)
WEIGHTS = ("config.json", ADAPTER_CONFIG)
_SECTION = re.compile(
    r'<section id="(?P<anchor>[\w-]+)"[^>]*>\n<h2>(?P<title>.*?)</h2>(?P<body>.*?)\n</section>', re.S
)
_STYLE = re.compile(r"<style>(.*?)</style>", re.S)


class Section(NamedTuple):
    """A section of the report: its name in links, its title, and its HTML below the title."""

    anchor: str
    title: str
    body: str


class ReportedRun:
    """
    A report and the checkpoints beside it.

    Args:
        folder (`Path`):
            The folder of a run, or one that holds a run's report only, as a Space does.

    Raises:
        UserError: It has a report that is not one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.sections, self.style = self._read_report()

    @property
    def how_to_report(self) -> str:
        """How to make a report where there is none."""
        return f"medforget report {self.folder}"

    def _read_report(self) -> tuple[list[Section], str]:
        path = self.folder / REPORT
        if not path.is_file():
            return [], ""
        text = path.read_text(encoding="utf-8", errors="replace")
        sections = [Section(m["anchor"], html.unescape(m["title"]), m["body"]) for m in _SECTION.finditer(text)]
        style = _STYLE.search(text)
        if not sections or not style:
            raise UserError(f"{path}: not a report of this version; write it again with `{self.how_to_report}`")
        # The report has no script, and what stands in it is shown inside a page that has.
        if any(_runs_something(section.body) for section in sections):
            raise UserError(
                f"{path}: holds a script, which no report does; write it again with `{self.how_to_report}`"
            )
        return sections, style[1]

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """What `report.json` says; nothing if there is none that can be read."""
        return read_json(self.folder / NUMBERS)

    @cached_property
    def checkpoints(self) -> dict[str, Path]:
        """Folders of the checkpoints by their name: vanilla first, then retrained, then the rest by name."""
        found = {
            path.parent.name: path.parent
            for path in sorted(self.folder.glob(f"*/{CHECKPOINT_INFO}"))
            if path.parent.name not in NOT_ASKED and any((path.parent / name).is_file() for name in WEIGHTS)
        }
        return dict(sorted(found.items(), key=lambda item: (_rank(item[0]), item[0])))

    @cached_property
    def restricted(self) -> list[str]:
        """What of it is restricted or does not say that it is not: the report, or checkpoints, by path."""
        found = []
        data = self.numbers.get("data")
        if (self.sections or self.numbers) and not says_it_is_free(data):
            found.append(str(self.folder / REPORT))
        for path in self.checkpoints.values():
            if not says_it_is_free(read_json(path / CHECKPOINT_INFO)):
                found.append(str(path))
        return found

    @property
    def options(self) -> dict[str, Any] | None:
        """How the run's data was built, as the report says; nothing if it does not."""
        data = self.numbers.get("data")
        return data.get("options") if isinstance(data, dict) else None


class _Scripts(HTMLParser):
    """Looks for what a browser would run."""

    found = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one tag, whose attributes come without entities."""
        values = ["".join((value or "").split()).lower() for _, value in attrs]
        self.found |= tag in ("script", "iframe", "object", "embed")
        self.found |= any(name.startswith("on") for name, _ in attrs) or any("javascript:" in v for v in values)


def _runs_something(text: str) -> bool:
    parser = _Scripts()
    parser.feed(text)
    parser.close()
    return parser.found


def _rank(name: str) -> int:
    return next((rank for rank, start in enumerate(("vanilla", "retrained")) if name.startswith(start)), 2)
