"""Where a run in progress keeps its checkpoints, so that it can go on after it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from medforget_dataset.atomic import write_text
from medforget_dataset.errors import UserError

from .callbacks import COMPLETE


RECORD = "training.json"


class TrainingFolder:
    """
    `OUT.training`, beside the checkpoint `OUT` that a run will write; gone once that is written.

    Args:
        out (`Path`):
            Folder of the checkpoint to be written.
    """

    def __init__(self, out: Path):
        self.path = out.with_name(f"{out.name}.training")

    def open(self, plan: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """
        Make the folder, or take up the one that is there.

        Args:
            plan (`dict[str, Any]`):
                What the run does, anything JSON can hold.
            resume (`bool`):
                Go on with a run of the same plan.
            overwrite (`bool`):
                Start anew where there is a run that is not gone on with.

        Raises:
            UserError: If there is an unfinished run and neither is asked for, or it has another plan, or the folder
                holds something else.
        """
        if not self._is_free_or_ours():
            raise UserError(
                f"{self.path}: holds something else than a run in progress; move it away, or choose another --out"
            )
        plan = json.loads(json.dumps(plan, sort_keys=True, default=str))
        before = self._read()
        if self.path.exists() and not (resume and before == plan):
            if not overwrite:
                raise UserError(self._refusal(before, plan, resume))
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / RECORD, json.dumps(plan, indent=2) + "\n")

    def _refusal(self, before: dict[str, Any], plan: dict[str, Any], resume: bool) -> str:
        if not resume:
            return (
                f"{self.path}: holds a run that was not finished; add --resume to go on with it, or --overwrite to "
                "start again"
            )
        different = next((k for k in sorted(before.keys() | plan.keys()) if before.get(k) != plan.get(k)), RECORD)
        return (
            f"{self.path}: holds another run: {different} was {before.get(different)!r}, now it is "
            f"{plan.get(different)!r}; give what it was, or add --overwrite to start again"
        )

    def _is_free_or_ours(self) -> bool:
        if not self.path.is_dir():
            return not self.path.exists()
        # A run that was killed at once may have left half a record, under a name with a dot.
        return (self.path / RECORD).is_file() or all(path.name.startswith(".") for path in self.path.iterdir())

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        complete = [mark.parent for mark in self.path.glob(f"checkpoint-*/{COMPLETE}")]
        return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
