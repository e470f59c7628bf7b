"""Find the model that a LoRA adapter belongs to."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig
from transformers.utils import CONFIG_NAME

from medforget_dataset.errors import UserError
from medforget_dataset.hub_files import hub_file, is_hub_id


ADAPTER_CONFIG = "adapter_config.json"


def adapter_config(path: str) -> Path | None:
    """
    The file that makes a folder, or a repository on the Hub, an adapter; nothing of a whole model.

    Args:
        path (`str`):
            Folder or Hub id.
    """
    file = Path(path, ADAPTER_CONFIG)
    return file if file.is_file() else hub_file(path, ADAPTER_CONFIG)


def base_and_adapters(path: str) -> tuple[str, list[str]]:
    """
    The checkpoint that a folder leads to, and the adapters on the way, the outermost first.

    Args:
        path (`str`):
            Folder with a checkpoint, which leads to itself, or with an adapter, whose base may be one too; or a Hub
            id.

    Raises:
        UserError: If a folder is missing, is no checkpoint, or does not say which model it belongs to.
    """
    adapters: list[str] = []
    while file := adapter_config(path):
        try:
            base = PeftConfig.from_pretrained(path).base_model_name_or_path
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: cannot be read: {str(error).partition(chr(10))[0]}") from error
        adapters.append(path)
        if not base or str(base) in adapters:
            raise UserError(f"{file}: does not say which model the adapter belongs to")
        path = str(base)
    of_adapter = f"{adapters[-1]}: the model that this adapter belongs to: " if adapters else ""
    folder = Path(path)
    if not folder.is_dir() and not is_hub_id(path):
        raise UserError(f"{of_adapter}{path}: no such checkpoint folder")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{of_adapter}{path}: not a checkpoint: it has no {CONFIG_NAME}")
    return path, adapters
