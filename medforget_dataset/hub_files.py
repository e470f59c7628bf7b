"""Single files of repositories on the Hub: what a name means, and what a checkpoint there says of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from .errors import UserError


CHECKPOINT_INFO = "medforget.json"
"""The record of a checkpoint, as `build.json` is of a dataset."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(path: str) -> bool:
    """
    Whether a checkpoint's or dataset's name can only mean a repository on the Hub.

    >>> is_hub_id("lingshu-medical-mllm/Lingshu-7B"), is_hub_id("./runs/vanilla")
    (True, False)
    """
    return has_hub_form(path) and not Path(path).parent.is_dir()


def has_hub_form(name: str) -> bool:
    """
    Whether a name has the form `ORG/NAME`.

    >>> has_hub_form("lingshu-medical-mllm/Lingshu-7B"), has_hub_form("./vanilla"), has_hub_form("runs/a/b")
    (True, False, False)
    """
    return bool(_HUB_ID.fullmatch(name))


def hub_file(repo_id: str, name: str) -> Path | None:
    """
    A small file of a model on the Hub, from the cache if there is no network.

    Args:
        repo_id (`str`):
            Hub id; of anything else there is no file.
        name (`str`):
            Path in the repository.
    """
    if not is_hub_id(repo_id):
        return None
    try:
        return Path(hf_hub_download(repo_id, name))
    except (HfHubHTTPError, OSError, ValueError):  # who loads it next says what is wrong with the repository
        return None


def hub_record(repo_id: str) -> dict[str, Any] | None:
    """
    The `medforget.json` of a model on the Hub; nothing if the repository has none.

    Args:
        repo_id (`str`):
            Hub id.

    Raises:
        UserError: It is not known whether it has one: there is no network, and the cache does not say.
    """
    try:
        record = json.loads(Path(hf_hub_download(repo_id, CHECKPOINT_INFO)).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    except (HfHubHTTPError, OSError, ValueError) as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if absent or try_to_load_from_cache(repo_id, CHECKPOINT_INFO) is _CACHED_NO_EXIST:
            return None
        raise UserError(
            f"{repo_id}: its {CHECKPOINT_INFO}, which says whether it is restricted, cannot be read "
            f"({str(error).strip().partition(chr(10))[0]}); connect, or download the model and give its folder"
        ) from error
