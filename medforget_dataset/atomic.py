"""Files and folders that appear complete or not at all, however the process ends."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|retired)-(?P<pid>\d+)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or folder under a temporary name beside `path`, and give it its name when it is complete.

    What was there before stays until then, and comes back if anything goes wrong. What a killed process left behind
    for the same path is swept up first.

    Args:
        path (`Path`): The file or folder to write; its parent is made if there is none.

    Yields:
        `Path`: Where to write it.

    Raises:
        UserError: As [`check_named`].
    """
    check_named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    partial, retired = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("partial", "retired"))
    try:
        yield partial
        if path.is_dir():
            path.rename(retired)  # a folder cannot be renamed onto another
        partial.rename(path)
    finally:
        if retired.exists() or retired.is_symlink():
            if path.exists():
                _remove(retired)
            else:
                retired.rename(path)
        _remove(partial)


def check_named(path: Path) -> None:
    """Refuse `.` and `..`: what is written beside a folder, to take its place, needs its name.

    Raises:
        UserError: The path ends in neither a file's nor a folder's name.
    """
    if path.name in ("", ".."):
        raise UserError(f"{path}: give the folder's name, from the folder above it")


def sweep(folder: Path, name: str | None = None) -> None:
    """Put right what processes that are no longer there left in a folder: halves go, what was set aside comes back.

    Args:
        folder (`Path`): Where to look; not below.
        name (`str`, *optional*): Only what belongs to this name.
    """
    for path in folder.glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or (name is not None and match["name"] != name) or _is_running(int(match["pid"])):
            continue
        target = folder / match["name"]
        if match["kind"] == "retired" and not target.exists():
            path.rename(target)
        else:
            _remove(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file complete or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
