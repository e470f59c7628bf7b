"""Dataset folders on the Hub, exactly as they were built."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from .errors import UserError
from .publishing import Content, Published, Upload, connect, publish
from .validate import validate
from .writer import RECORD, read_options, read_record


def dataset_upload(folder: Path) -> Upload:
    """
    The files of a dataset folder, exactly as they were built; but where `build.json` names folders of this machine
    that it was built from, the last part of each.

    Args:
        folder (`Path`):
            A folder written by [`~medforget_dataset.build`].

    Raises:
        UserError: The folder is not a MedForget dataset, a file is not as it was built, or it breaks an invariant.
    """
    record = read_record(folder)
    if problems := validate(folder):
        more = f" and {len(problems) - 1} more" if problems[1:] else ""
        raise UserError(f"{problems[0]}{more}; see `medforget validate {folder}`, and build the dataset again")
    files: dict[str, Content] = {name: folder / name for name in (RECORD, *record["files"])}
    if folders := read_options(folder, record).folders():
        shown = record | {"options": record["options"] | {name: path.name for name, path in folders.items()}}
        files[RECORD] = (json.dumps(shown, indent=2) + "\n").encode()
    return Upload("dataset", files, is_restricted_dataset(folder))


def is_restricted_dataset(folder: Path) -> bool:
    """Whether a dataset folder is restricted. The mark stands in the record and in every row; one is enough."""
    record = read_record(folder)
    return record["restricted"] or any(_has_restricted_rows(folder / name) for name in record["files"])


def _has_restricted_rows(file: Path) -> bool:
    if file.suffix != ".parquet" or not file.is_file():
        return False
    try:
        return any(pq.read_table(file, columns=["restricted"])["restricted"].to_pylist())
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of these kinds
        why = str(error).partition("\n")[0]
        raise UserError(f"{file}: its column restricted cannot be read ({why}); build the dataset again") from error


def push_dataset(
    folder: Path, repo_id: str, *, public: bool = False, replace: bool = False, complies: str = ""
) -> Published:
    """
    Upload a dataset folder as it was built to a repository, private unless `public`.

    Args:
        folder (`Path`):
            A folder written by [`~medforget_dataset.build`].
        repo_id (`str`):
            `ORG/NAME` on the Hub; made if it is not there, private.
        public (`bool`), replace (`bool`), complies (`str`):
            As in [`publish`].

    Returns:
        [`Published`]: What was sent.

    Raises:
        UserError: As [`dataset_upload`] and [`publish`].
    """
    restricted = is_restricted_dataset(folder)
    # Refused before gigabytes are read.
    connect(str(folder), repo_id, restricted=restricted, public=public, complies=complies)
    upload = dataset_upload(folder)
    return publish(upload, repo_id, what=str(folder), public=public, replace=replace, complies=complies)
