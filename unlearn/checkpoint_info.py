"""What a checkpoint says of itself: how it was made, and whether it derives from restricted data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from harness_tasks.adapters import adapter_config, base_and_adapters
from medforget_dataset.agreement import says_it_is_free
from medforget_dataset.errors import UserError
from medforget_dataset.hub_files import CHECKPOINT_INFO, hub_file, hub_record, is_hub_id


MARK = "medforget_restricted"
"""Entry of a restricted model's configuration, which goes wherever `save_pretrained` puts the model."""


def read_info(path: str | os.PathLike) -> dict[str, Any]:
    """
    What a checkpoint's `medforget.json` says; nothing if it has none.

    Raises:
        UserError: It is damaged.
    """
    file = Path(path, CHECKPOINT_INFO)
    return read_object(file) if file.is_file() else {}


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        UserError: It is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: cut short or damaged ({error}); copy or download the checkpoint again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not what a checkpoint has; copy or download the checkpoint again")
    return content


def is_restricted(path: str | os.PathLike | None) -> bool:
    """
    Whether a checkpoint derives from restricted data.

    One of ours does unless its record says that it does not. Any does whose configuration has the mark, and so does
    an adapter without a record of one that does. A folder that is not there may.

    Args:
        path (`str` or `os.PathLike`, *optional*):
            Folder or Hub id; no checkpoint derives from nothing.

    Raises:
        UserError: It is on the Hub and cannot be asked, a file of it is damaged, or it is an adapter of a model that
            is not there.
    """
    if not path:
        return False
    path = str(path)
    on_hub = is_hub_id(path)
    if not on_hub and not Path(path).is_dir():
        return True
    info = hub_record(path) if on_hub else _record(path)
    if info is not None and not says_it_is_free(info):
        return True
    if adapter_config(path):
        return info is None and _has_restricted_base(path)
    config = hub_file(path, CONFIG_NAME) if on_hub else Path(path, CONFIG_NAME)
    if config is None:
        raise UserError(f"{path}: its {CONFIG_NAME}, which may say that it is restricted, cannot be read; connect")
    return config.is_file() and bool(read_object(config).get(MARK))


def has_restricted_record(path: str | os.PathLike) -> bool:
    """Whether a checkpoint has a `medforget.json`, as far as it can be had now, that does not say that it is free."""
    file = Path(path, CHECKPOINT_INFO)
    found = file if file.is_file() else hub_file(str(path), CHECKPOINT_INFO)
    return found is not None and not says_it_is_free(read_object(found))


def _record(path: str) -> dict[str, Any] | None:
    return read_info(path) if Path(path, CHECKPOINT_INFO).is_file() else None


def _has_restricted_base(path: str) -> bool:
    base, adapters = base_and_adapters(path)
    try:
        return any(map(is_restricted, (*adapters[1:], base)))
    except UserError as error:
        raise UserError(f"{path}: the model that this adapter belongs to: {error}") from error


def mark_restricted(model: PreTrainedModel | PeftModel) -> None:
    """Have a model say that it derives from restricted data, wherever its configuration is saved."""
    setattr(model.config, MARK, True)


def is_marked(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model in memory says that it derives from restricted data."""
    return bool(getattr(model.config, MARK, False))
