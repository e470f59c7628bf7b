"""Whose answers a `--use_cache` file holds: lm-eval's keys name the request, and not the model that answered it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlitedict import SqliteDict

from medforget_dataset.errors import UserError


logger = logging.getLogger(__name__)

# A table of its own, so that what reads or counts the answers meets nothing else.
_TABLE = "checkpoint"
_FILES = ("*config.json", "*.safetensors", "*.bin")


class Owner(NamedTuple):
    """
    A checkpoint.

    Args:
        name (`str`):
            Its paths, an adapter's first, then that of the model it belongs to.
        digest (`str`):
            Digest of the names, sizes and times of its files.
    """

    name: str
    digest: str


def owner_of(paths: Sequence[str], revision: str) -> Owner:
    """
    The checkpoint in these places.

    Args:
        paths (`Sequence[str]`):
            Folders or Hub ids, the outermost adapter first.
        revision (`str`):
            Revision of what is on the Hub.
    """
    found = hashlib.sha256()
    names = []
    for path in paths:
        folder = Path(path)
        names.append(str(folder.resolve()) if folder.is_dir() else f"{path} ({revision})")
        for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
            facts = file.stat()
            found.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return Owner(" on ".join(names), found.hexdigest())


def claim(answers: Any, owner: Owner) -> None:
    """
    Write down that answers are this checkpoint's, at the first use of their file.

    Args:
        answers (`SqliteDict`):
            What lm-eval keeps answers in.
        owner ([`Owner`]):
            The checkpoint that will be asked.

    Raises:
        UserError: They are another checkpoint's, or this one's before its files were changed.
    """
    with SqliteDict(answers.filename, tablename=_TABLE, autocommit=True) as table:
        known = Owner(table["name"], table["digest"]) if "name" in table else None
        if known is None:
            if len(answers):
                logger.warning("%s: does not say whose answers it holds; taken for %s", answers.filename, owner.name)
            table["digest"], table["name"] = owner.digest, owner.name
    if known and known != owner:
        whose = known.name if known.name != owner.name else f"{known.name} before its files were changed"
        raise UserError(
            f"{answers.filename}: holds the answers of {whose}, not of {owner.name}; give another --use_cache"
        )
