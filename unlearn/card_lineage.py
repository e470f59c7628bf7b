"""Where a checkpoint comes from, as far as it can be told: the stages that made it, the base model, the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medforget_dataset.errors import UserError
from medforget_dataset.hub_files import CHECKPOINT_INFO, has_hub_form
from medforget_dataset.writer import read_record

from .card_commands import hub_base
from .checkpoint_info import read_info
from .presets import TINY_PRESETS
from .training import fingerprint


# What the stages of a checkpoint are told by.
_WORDS = ("stage", "base", "base files", "data", "data files", "level", "method", "config", "preset")
_TABLES = ("arguments", "method_arguments", "forgotten", "exact_match")


@dataclass(frozen=True)
class Lineage:
    """
    The stages that made a checkpoint.

    Attributes:
        stages (`tuple[dict, ...]`):
            What `medforget.json` of each says, the checkpoint's own last. The first may itself come from a checkpoint
            that is no longer there.
        base (`str`, *optional*):
            Hub id of the model that the first stage started from.
        is_tiny (`bool`):
            Whether the first stage started from nothing.
        record (`dict`, *optional*):
            What `build.json` of the dataset says.
        dataset (`str`, *optional*):
            Hub id of the dataset.
    """

    stages: tuple[dict[str, Any], ...]
    base: str | None = None
    is_tiny: bool = False
    record: dict[str, Any] | None = None
    dataset: str | None = None


def trace(checkpoint: Path) -> Lineage:
    """
    Follow a checkpoint back to the model that it was made from, through folders that are still what they were.

    Args:
        checkpoint (`Path`):
            Its folder.

    Raises:
        UserError: `medforget.json` of one of them is damaged.
    """
    checkpoint = checkpoint.resolve()
    info = _read_stage(checkpoint)
    stages, base, is_tiny = _before(checkpoint, info)
    data, files = info.get("data"), info.get("data files")
    record = None
    if data and Path(data).is_dir() and files in (None, fingerprint(data)):
        try:
            record = read_record(Path(data))
        except UserError:  # of another version: what it was is not known
            record = None
    dataset = data if data and data == files and has_hub_form(data) else None
    return Lineage((*stages, info), base, is_tiny, record, dataset)


def _read_stage(checkpoint: Path) -> dict[str, Any]:
    info = read_info(checkpoint)
    wrong = [name for name in _WORDS if not isinstance(info.get(name), str | None)]
    wrong += [name for name in _TABLES if not isinstance(info.get(name), dict | None)]
    if not wrong and not all(isinstance(count, int) for count in (info.get("forgotten") or {}).values()):
        wrong = ["forgotten"]
    if wrong:
        name, file = wrong[0], checkpoint / CHECKPOINT_INFO
        raise UserError(f"{file}: {name} cannot be {info[name]!r}; copy or download the checkpoint again")
    return info


def _before(checkpoint: Path, info: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...], str | None, bool]:
    """The stages before a checkpoint, and what the first of them started from."""
    base, files = info.get("base"), info.get("base files")
    if info.get("stage") == "pretrain" or (base in TINY_PRESETS and files is None):
        return (), None, True
    if not base or base == files:
        return (), hub_base(info), False
    for folder in (Path(base), checkpoint.parent / Path(base).name):
        if folder.is_dir() and fingerprint(folder) == files:
            before = _read_stage(folder)
            stages, root, is_tiny = _before(folder, before)
            return (*stages, before), root, is_tiny
    return (), None, False
