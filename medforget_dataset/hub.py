"""Publishing on the Hub: `medforget push dataset | model`. Restricted data and what derives from it never goes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from .agreement import check_sharing
from .errors import UserError
from .writer import RECORD, changed_file, read_record


CHECKPOINT_INFO = "medforget.json"
# What a checkpoint is made of; anything else beside it was not written by us.
CHECKPOINT_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "README.md"]


def push_dataset(folder: Path, repo_id: str) -> str:
    """Upload a dataset folder as it was built to a private repository.

    Args:
        folder (`Path`): A folder written by [`~medforget_dataset.build`].
        repo_id (`str`): `ORG/NAME` on the Hub; made if it is not there, private.

    Returns:
        `str`: Address of the repository.

    Raises:
        UserError: The data is restricted (nothing is sent then), a file is not as it was built, or the Hub refuses.
    """
    record = read_record(folder)
    # The mark stands in the record and in every row; one of them is enough.
    restricted = record["restricted"] or any(_has_restricted_rows(folder / name) for name in record["files"])
    check_sharing(str(folder), restricted=restricted, target=repo_id)
    for name in record["files"]:
        if problem := changed_file(folder, name, record):
            raise UserError(f"{problem}; build the dataset again")
    return _upload(folder, repo_id, "dataset", [RECORD, *record["files"]])


def push_model(checkpoint: Path, repo_id: str) -> str:
    """Upload a checkpoint to a private repository.

    Args:
        checkpoint (`Path`): A folder written by `medforget finetune` or `medforget unlearn`.
        repo_id (`str`): `ORG/NAME` on the Hub; made if it is not there, private.

    Returns:
        `str`: Address of the repository.

    Raises:
        UserError: The checkpoint derives from restricted data (nothing is sent then), it does not say what it derives
            from, or the Hub refuses.
    """
    try:
        info = json.loads((checkpoint / CHECKPOINT_INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint}: not a MedForget checkpoint (no readable {CHECKPOINT_INFO})") from error
    check_sharing(str(checkpoint), restricted=info.get("restricted", True), target=repo_id)
    return _upload(checkpoint, repo_id, "model", CHECKPOINT_FILES)


def _has_restricted_rows(file: Path) -> bool:
    if file.suffix != ".parquet" or not file.is_file():
        return False
    return any(pq.read_table(file, columns=["restricted"])["restricted"].to_pylist())


def _upload(folder: Path, repo_id: str, kind: str, files: list[str]) -> str:
    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type=kind, folder_path=folder, allow_patterns=files, commit_message=f"Upload {kind}"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: an id that the Hub cannot have
        raise UserError(f"{repo_id}: {str(error).strip().partition(chr(10))[0]}") from error
    return str(url)
