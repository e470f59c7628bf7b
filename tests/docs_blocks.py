"""The fenced blocks of the documentation: where they stand, what they need, and the commands in them."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
SHELL, PYTHON = ("bash", "sh", "shell", "console"), ("python", "py")
# What a block may need that a test has not, in an HTML comment on the line before it.
NEEDS = ("gpu", "credentialed data", "network", "hub")
COMMANDS = ("medforget", "lm_eval", "lm-eval", "accelerate", "python", "pip", "make")

_FENCE = re.compile(r"^ {0,3}```(\w*)[^`]*$")
_NEEDS = re.compile(r"^ {0,3}<!-- needs: (.+) -->$")
_FILE = re.compile(r"^# ((?:[\w-]+/)+[\w.-]+)$")
_VARIABLE = re.compile(r"^[A-Z_]+=")


class Block(NamedTuple):
    """A fenced block."""

    page: str  # below the repository
    line: int  # of its fence
    language: str
    needs: str  # "" if it can be run
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str:
        """The file whose content it is, named in a comment that is its first line; "" if it is none."""
        named = _FILE.match(self.text.partition("\n")[0])
        return named.group(1) if named and self.language not in SHELL else ""

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a shell block, without variables set for it."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and _VARIABLE.match(words[0]):
                words.pop(0)
            if words:
                yield words


def pages() -> list[str]:
    """Every page whose commands a reader may copy, as a path below the repository."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found += [ROOT / folder / "README.md" for folder in ("harness_tasks", "benchmarks", "medforget_dataset/assets")]
    return [page.relative_to(ROOT).as_posix() for page in found]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, start, before = [], None, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if fence := _FENCE.match(line):
            if start is None:
                needs = _NEEDS.match(before)
                start, lines = (number, fence.group(1), needs.group(1) if needs else ""), []
            else:
                found.append(Block(page, *start, textwrap.dedent("\n".join(lines) + "\n")))
                start = None
        elif start is not None:
            lines.append(line)
        before = line
    assert start is None, f"{page}:{start} is not closed"
    return found


def prose(page: str) -> str:
    """What stands outside of fenced blocks."""
    outside, fenced = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            outside.append(line)
    return "\n".join(outside)


def command_blocks() -> list[Block]:
    """Every block of shell commands or Python on every page."""
    return [block for page in pages() for block in blocks(page) if block.language in SHELL + PYTHON]
