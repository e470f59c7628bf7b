"""Replies of a language model on disk, so that nothing that was answered is asked and paid for again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..atomic import sweep
from ..errors import UserError


def default_folder(name: str = "llm") -> Path:
    """A folder in `$MEDFORGET_CACHE`, by default in `~/.cache/medforget`."""
    return Path(os.environ.get("MEDFORGET_CACHE", "~/.cache/medforget")).expanduser() / name


class ReplyCache:
    """One file for each answered request, named after the digest of its body.

    Replies quote the reports they are about, so that folder and files are open to their owner alone.

    Args:
        folder (`Path`): Where the files lie; made if there is none.

    Raises:
        UserError: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; name another folder in $MEDFORGET_CACHE") from error
        sweep(folder)

    def get(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """What was answered to a request; `None` if nothing was, or if the file is damaged."""
        try:
            entry = json.loads(self._path(body).read_bytes())
            return entry["reply"] if entry["sha256"] == _digest(entry["reply"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, body: dict[str, Any], reply: dict[str, Any]) -> None:
        """Keep what was answered; the file is there complete or not at all."""
        path = self._path(body)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        # The mode holds from the first byte on, whatever the umask is.
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump({"sha256": _digest(reply), "reply": reply}, file)
        partial.replace(path)

    def _path(self, body: dict[str, Any]) -> Path:
        return self.folder / f"{_digest(body)}.json"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
