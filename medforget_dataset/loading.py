"""Load a configuration from where the data is, and never from somewhere else in silence."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from .benchmark import SPLITS, check_config
from .errors import UserError
from .hub_files import has_hub_form
from .writer import RECORD, changed_file, parquet_path, read_record


ENVIRONMENT = "MEDFORGET_DIR"
DEFAULT_FOLDER = "medforget"


def load(
    config: str = "finetune",
    split: str | None = None,
    *,
    data: str | os.PathLike | None = None,
    streaming: bool = False,
):
    """Load a configuration of the dataset.

    Args:
        config (`str`, *optional*, defaults to `"finetune"`): One of [`~medforget_dataset.CONFIGS`].
        split (`str`, *optional*): `"train"` or `"test"`; by default all splits.
        data (`str` or `os.PathLike`, *optional*): A dataset folder, or a Hub id `ORG/NAME`. By default the folder
            that the environment variable `MEDFORGET_DIR` names, or else `./medforget`.
        streaming (`bool`, *optional*, defaults to `False`): As in `datasets.load_dataset`.

    Returns:
        `datasets.Dataset`, or `datasets.DatasetDict` without `split`; their iterable kinds with `streaming`.

    Raises:
        UserError: There is no such configuration or split, the folder is not a MedForget dataset, a file of it is
            missing or damaged, or the Hub cannot be reached (a cached copy is never used in its place).
    """
    check_config(config)
    if split is not None and split not in SPLITS[config]:
        raise UserError(f"split {split!r} does not exist in {config}; choose from {', '.join(SPLITS[config])}")
    source = find_data(data)
    if isinstance(source, str):
        revision = newest_revision(source)
        return datasets.load_dataset(source, config, split=split, streaming=streaming, revision=revision)
    record = read_record(source)
    for name in ("README.md", *(parquet_path(config, split) for split in SPLITS[config])):
        if problem := changed_file(source, name, record):
            raise UserError(f"{problem}; build the dataset again with `medforget build --out {source} --force`")
    return datasets.load_dataset(str(source), config, split=split, streaming=streaming)


def find_data(data: str | os.PathLike | None = None) -> Path | str:
    """The dataset's folder as an absolute path, or a Hub id.

    Raises:
        UserError: What is named is neither, or nothing is named and there is no `./medforget`.
    """
    origin = "data" if data is not None else ENVIRONMENT if os.environ.get(ENVIRONMENT) else f"./{DEFAULT_FOLDER}"
    name = os.fspath(data) if data is not None else os.environ.get(ENVIRONMENT) or DEFAULT_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / RECORD).is_file():
            raise UserError(f"{origin}: {folder} is not a MedForget dataset (no {RECORD})")
        return folder.resolve()
    if data is not None and has_hub_form(name):
        return name
    raise UserError(
        f"{origin}: no dataset folder {folder}; build one with `medforget build --out {DEFAULT_FOLDER}`, "
        f"set {ENVIRONMENT}, or give a Hub id ORG/NAME"
    )


def newest_revision(repository: str) -> str | None:
    """The commit the Hub serves now; asking for it by name keeps `load_dataset` from falling back to an older one.

    Raises:
        UserError: The dataset cannot be read, or the Hub cannot be reached.
    """
    try:
        return HfApi().dataset_info(repository).sha
    except HfHubHTTPError as error:
        raise UserError(
            f"data: {repository} is neither a folder nor a dataset on the Hub that you can read"
        ) from error
    except Exception as error:  # whatever kept us from asking, of an HTTP library that differs by version
        raise UserError(f"data: {repository} is no folder here, and the Hub cannot be reached: {error}") from error
