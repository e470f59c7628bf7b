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

    One of ours does unless it says that it does not. Another does if its configuration has the mark, or it is an
    adapter of one that does. A folder that is not there may.

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
    has_record = on_hub or Path(path, CHECKPOINT_INFO).is_file()
    info = hub_record(path) if on_hub else read_info(path) if has_record else None
    if info is not None:
        return not says_it_is_free(info)
    if adapter_config(path):
        base, adapters = base_and_adapters(path)
        return any(map(is_restricted, (*adapters[1:], base)))
    config = hub_file(path, CONFIG_NAME) if on_hub else Path(path, CONFIG_NAME)
    return config is not None and config.is_file() and bool(read_object(config).get(MARK))


def mark_restricted(model: PreTrainedModel | PeftModel) -> None:
    """Have a model say that it derives from restricted data, whoever saves it."""
    setattr(model.config, MARK, True)


def is_marked(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model in memory says that it derives from restricted data."""
    return bool(getattr(model.config, MARK, False))
