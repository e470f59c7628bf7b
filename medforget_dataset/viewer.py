"""What the Hub's dataset viewer asks of a folder, checked before anything is uploaded.

The viewer reads the configurations from the card's head and the rows from Parquet, at most 300 MB of a file at once:
it finds a page of rows by the offset index of each column, and some of its services read whole row groups
(dataset-viewer, `libs/libviewer/src/parquet.rs` and `libs/libcommon/src/libcommon/parquet_utils.py`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import yaml
from huggingface_hub import DatasetCard

from .benchmark import CONFIGS, SPLITS


CARD = "README.md"
ROW_GROUP_BYTES = 300_000_000
"""Bytes of a row group before compression that the viewer still reads."""
# As `datasets` has them: what a folder's name cannot hold on every system, and the form of a split's name.
_NOT_IN_CONFIG_NAMES = re.compile(r"[<>:/\\|?*]")
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")


def viewer_problems(folder: Path) -> Iterator[str]:
    """Every reason for which the viewer would not show a dataset folder as it is meant.

    Args:
        folder (`Path`): A folder written by [`~medforget_dataset.build`].

    Yields:
        `str`: One line for each, naming the file.
    """
    card = folder / CARD
    try:
        head: dict[str, Any] = DatasetCard.load(card).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        yield f"{card}: its head cannot be read: {str(error).partition(chr(10))[0]}"
        return
    claims: dict[Path, tuple[str, str]] = {}
    for config, split, pattern in _entries(head):
        yield from (f"{card}: {problem}" for problem in _name_problems(config, split))
        matched = _matching(folder, pattern)
        if not matched:
            yield f"{card}: configuration {config}, split {split}: no file {pattern}"
        for file in matched:
            if file in claims:
                yield f"{file}: claimed by {'/'.join(claims[file])} and again by {config}/{split}"
            claims[file] = config, split
    yield from (f"{card}: {problem}" for problem in _config_problems(folder, head))
    for file in sorted(folder.rglob("*.parquet")):
        if file not in claims:
            yield f"{file}: no configuration of {CARD} claims it"
        yield from (f"{file}: {problem}" for problem in _parquet_problems(file))
    yield from (f"{card}: {problem}" for problem in _info_problems(head, _rows(claims)))


def _matching(folder: Path, pattern: str) -> list[Path]:
    if pattern.startswith("/") or ".." in pattern.split("/"):
        return []
    try:
        return sorted(folder.glob(pattern))
    except ValueError:  # no pattern
        return []


def _entries(head: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Configuration, split and pattern of files, as the head lists them."""
    for config in _list_of_dicts(head.get("configs")):
        for entry in _list_of_dicts(config.get("data_files")):
            paths = entry.get("path")
            for path in paths if isinstance(paths, list) else [paths]:
                yield str(config.get("config_name")), str(entry.get("split")), str(path)


def _list_of_dicts(value: Any) -> list[dict[str, Any]]:
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, dict)]


def _name_problems(config: str, split: str) -> Iterator[str]:
    if _NOT_IN_CONFIG_NAMES.search(config):
        yield f"configuration {config!r}: its name must have none of <>:/\\|?*"
    if not _SPLIT_NAME.fullmatch(split):
        yield f"configuration {config}: split {split!r} must be letters, digits and underscores, with dots between"


def _config_problems(folder: Path, head: dict[str, Any]) -> Iterator[str]:
    listed: dict[str, list[str]] = {}
    for config, split, _ in _entries(head):
        listed.setdefault(config, []).append(split)
    for config in CONFIGS:
        if config not in listed:
            yield f"configs: {config} is missing"
        elif listed[config] != list(SPLITS[config]):
            yield f"configuration {config}: splits {', '.join(listed[config])}, expected {', '.join(SPLITS[config])}"
    for config in sorted(listed.keys() - set(CONFIGS)):
        yield f"configs: {config} is not one of the dataset's"
    defaults = [str(c.get("config_name")) for c in _list_of_dicts(head.get("configs")) if c.get("default")]
    if defaults != ["finetune"]:
        yield f"configs: the default is {', '.join(defaults) or 'not said'}, expected finetune"
    try:
        found = datasets.get_dataset_config_names(str(folder))
    # All that `datasets` raises for a head that it cannot use.
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        yield f"`datasets` cannot use its configs: {str(error).partition(chr(10))[0]}"
        return
    for config in sorted(listed.keys() ^ set(found)):
        yield f"configs: {config} is listed, and `datasets` {'finds' if config in found else 'does not find'} it"


def _parquet_problems(file: Path) -> Iterator[str]:
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, ValueError):  # which `validate` has named
        return
    if not _declares_image((parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")):
        yield "its metadata does not declare the column image as Image()"
    without_index = Counter[str]()
    for group in range(parquet.metadata.num_row_groups):
        of_group = parquet.metadata.row_group(group)
        if of_group.total_byte_size > ROW_GROUP_BYTES:
            yield (
                f"row group {group} has {of_group.total_byte_size / 1e6:.1f} MB before compression; the viewer reads "
                f"{ROW_GROUP_BYTES / 1e6:.0f}"
            )
        for column in map(of_group.column, range(of_group.num_columns)):
            without_index[column.path_in_schema] += not column.has_offset_index
    if missing := [name for name, count in without_index.items() if count]:
        yield f"no page index of {len(missing)} columns, {missing[0]} first; the viewer would read whole row groups"


def _declares_image(metadata: bytes) -> bool:
    try:
        return json.loads(metadata)["info"]["features"]["image"]["_type"] == "Image"
    except (ValueError, KeyError, TypeError):
        return False


def _rows(claims: dict[Path, tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Rows of each split, of those whose files can all be read."""
    rows: Counter[tuple[str, str]] = Counter()
    unreadable = set()
    for file, place in claims.items():
        try:
            rows[place] += pq.read_metadata(file).num_rows
        except (OSError, ValueError):
            unreadable.add(place)
    return {place: count for place, count in rows.items() if place not in unreadable}


def _info_problems(head: dict[str, Any], rows: dict[tuple[str, str], int]) -> Iterator[str]:
    infos = {str(info.get("config_name")): info for info in _list_of_dicts(head.get("dataset_info"))}
    for config in CONFIGS:
        if config not in infos:
            yield f"dataset_info: {config} is missing"
            continue
        info, where = infos[config], f"dataset_info of {config}"
        types = {str(feature.get("name")): feature.get("dtype") for feature in _list_of_dicts(info.get("features"))}
        if types.get("image") != "image":
            yield f"{where}: column image is {types.get('image')}, expected image"
        said = {str(split.get("name")): split.get("num_examples") for split in _list_of_dicts(info.get("splits"))}
        for split in SPLITS[config]:
            found = rows.get((config, split))
            if found is not None and said.get(split) != found:
                yield f"{where}: {said.get(split)} rows in {split}, the files have {found}"
