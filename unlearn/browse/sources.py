"""Find what is to be shown: a dataset in a folder or on the Hub, and a run."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data, newest_revision

from ..stages import read_run
from .catalogue import Catalogue
from .run import ReportedRun


# The files of a dataset folder.
DATASET_FILES = ("*.parquet", "*.json", "README.md")


def open_data(data: str | None) -> Catalogue:
    """
    The dataset. One on the Hub is downloaded into the Hub's cache, as it was built.

    Raises:
        UserError: There is none, it is not one of this version, or the Hub cannot be reached.
    """
    source = find_data(data)
    if isinstance(source, Path):
        return Catalogue(source, data or str(source))
    revision = newest_revision(source)
    try:
        folder = snapshot_download(source, repo_type="dataset", revision=revision, allow_patterns=[*DATASET_FILES])
    except OSError as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"data: {source} cannot be downloaded: {first}; start again to go on") from error
    return Catalogue(Path(folder), source)


def open_run(folder: Path | None, *, report_only: bool = False) -> ReportedRun | None:
    """
    The run, if one was given.

    Args:
        folder (`Path`, *optional*):
            Its folder.
        report_only (`bool`, *optional*, defaults to `False`):
            Whether a folder with nothing but a report will do.

    Raises:
        UserError: The folder is not a run, is a sweep, or was written by another version.
    """
    if folder is None:
        return None
    if not report_only and "sweep" in read_run(folder):
        raise UserError(f"{folder}: is a sweep; its results are in {folder / 'results.md'}")
    return ReportedRun(folder)


def find_restricted(catalogue: Catalogue, run: ReportedRun | None) -> list[str]:
    """Names of what is restricted: the dataset, by its record or any row, the report, checkpoints."""
    return ([catalogue.name] if catalogue.is_restricted else []) + (run.restricted if run else [])
