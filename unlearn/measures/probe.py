"""Ask a checkpoint everything once, and keep what it found at every answer token."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from harness_tasks.rows import with_other_images
from medforget_dataset import LEVELS, load
from medforget_dataset.atomic import replacing
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data

from ..answers import score_dataset
from ..checkpoint_info import is_restricted, read_info
from ..checkpoints import RECORDED_VERSIONS, load_checkpoint
from ..grouping import GROUPED_FEATURES, group_by_image, image_key
from ..preconditions import load_rows
from ..processes import is_main_process, processes
from ..training import fingerprint


SETS = (
    "finetune",
    "rephrase_wording",
    "rephrase_view",
    "rephrase_both",
    "wrong_image",
    "text_only",
    "unseen",
)
"""
The sets of a probe: every row as it was taught; rows of the rephrase sets with the held-out wording alone, the turned
view alone, and both; every row about the image of another patient, and without an image; every row of another dataset.
"""

SCHEMA = pa.schema(
    {
        "set": pa.string(),
        "id": pa.string(),
        "task": pa.string(),
        "level": pa.string(),
        "institution": pa.string(),
        "patient": pa.string(),
        "study": pa.string(),
        "section": pa.string(),
        "tokens": pa.int32(),
        "exact": pa.bool_(),
        "log_prob": pa.float64(),
        "token_log_probs": pa.list_(pa.float32()),
        "token_greedy": pa.list_(pa.bool_()),
    }
)
KEY = b"medforget_probe"
FORMAT = 1


def probe_checkpoint(
    checkpoint: str | os.PathLike,
    data: str | os.PathLike | None,
    out: Path,
    *,
    unseen: str | os.PathLike | None = None,
    batch_size: int = 16,
    quiet: bool = False,
) -> Path:
    """
    Score every row of [`SETS`] by teacher forcing and write what was found to a Parquet file, a row each.

    Args:
        checkpoint (`str` or `os.PathLike`):
            Folder or Hub id of the model.
        data (`str` or `os.PathLike`, *optional*):
            The dataset that it was taught, found as [`~medforget_dataset.load`] does.
        out (`Path`):
            File to write. Its columns are `set`, `id` (that of the row in `finetune`, in the rephrase sets too),
            `task`, `level`, `institution`, `patient`, `study` (addresses, such as `inst03/pat021/study084`; an unseen
            study may have the address of another one), `section` (empty for identity rows), `tokens` (of the answer
            and its end), `exact` (every token is the most probable one), `log_prob` (nats, summed), `token_log_probs`
            and `token_greedy` (whether each token is the most probable one).
        unseen (`str` or `os.PathLike`, *optional*):
            A dataset that no model was trained on, such as the embedded corpus with another seed. Without it there is
            no set `unseen`.
        batch_size (`int`, *optional*, defaults to `16`):
            Images in a batch; fewer where the memory does not suffice.
        quiet (`bool`, *optional*, defaults to `False`):
            No progress bars.

    Returns:
        `Path`: The file.

    Raises:
        UserError: The checkpoint or a dataset cannot be used, or `data` has one patient only, so that there is no
            wrong image.
    """
    folder = find_data(data)
    other = find_data(unseen) if unseen is not None else None
    # Before the work: it may be that it cannot be told.
    restricted = is_restricted(checkpoint)
    model, processor = load_checkpoint(checkpoint)
    model.to(processes().device)  # type: ignore[arg-type]
    tables = []
    for name, grouped in _questions(folder, other):
        scores = score_dataset(
            model,
            processor,
            grouped,
            with_image=name != "text_only",
            token_scores=True,
            batch_size=batch_size,
            progress=None if quiet or not is_main_process() else name,
        )
        tables.append(_table(name, scores))
    info = {
        "format": FORMAT,
        "checkpoint": str(checkpoint),
        "checkpoint_run": read_info(checkpoint).get("run"),
        "restricted": restricted,
        "data": str(folder),
        "data_files": fingerprint(folder),
        "unseen": None if other is None else str(other),
        "unseen_files": None if other is None else fingerprint(other),
        "versions": {name: importlib.metadata.version(name) for name in RECORDED_VERSIONS},
    }
    table = pa.concat_tables(tables).replace_schema_metadata({KEY: json.dumps(info).encode()})
    if is_main_process():
        with replacing(Path(out)) as partial:
            pq.write_table(table, partial, compression="zstd")
    return Path(out)


def _questions(folder: str | Path, unseen: str | Path | None) -> Iterator[tuple[str, datasets.Dataset]]:
    """Name and examples of each set, made when it is its turn."""
    taught = load_rows(folder, "finetune").cast_column("image", datasets.Image(decode=False))
    finetune = group_by_image(taught)
    yield "finetune", finetune
    rephrased = _rephrased(folder)
    both = group_by_image(rephrased)
    yield "rephrase_wording", _with_images(both, dict(zip(finetune["key"], finetune["image"], strict=True)))
    original = rephrased.remove_columns("question").rename_column("original_question", "question")
    yield "rephrase_view", group_by_image(original)
    yield "rephrase_both", both
    yield "wrong_image", _with_images(finetune, _wrong_images(taught))
    yield "text_only", finetune
    if unseen is not None:
        yield "unseen", group_by_image(load_rows(unseen, "finetune"))


def _rephrased(folder: str | Path) -> datasets.Dataset:
    """The rows of all levels' rephrase sets, each once: a row is the same in all of them."""
    parts = [load(f"{level}_forget_rephrase", "test", data=folder) for level in LEVELS]
    rows = datasets.concatenate_datasets(parts)
    first = {row_id: index for index, row_id in reversed(list(enumerate(rows["id"])))}
    return rows.select(sorted(first.values()))


def _wrong_images(rows: datasets.Dataset) -> dict[str, Any]:
    """For each image key the image that the harness' wrong-image control shows in its place."""
    first = {image_key(row_id): index for index, row_id in reversed(list(enumerate(rows["id"])))}
    one_each = rows.select(sorted(first.values()))
    try:
        others = with_other_images(one_each, one_each)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {image_key(row_id): image for row_id, image in zip(others["id"], others["image"], strict=True)}


def _with_images(grouped: datasets.Dataset, images: dict[str, Any]) -> datasets.Dataset:
    columns = {"key": grouped["key"][:], "image": [images[key] for key in grouped["key"]], "rows": grouped["rows"][:]}
    return datasets.Dataset.from_dict(columns, features=GROUPED_FEATURES)


def _table(name: str, scores: list[dict[str, Any]]) -> pa.Table:
    columns: dict[str, list] = {column: [] for column in SCHEMA.names}
    for score in scores:
        row_id = score["id"].removesuffix("/rephrase")
        parts = row_id.split("/")
        address = {
            "institution": parts[0],
            "patient": "/".join(parts[:2]),
            "study": "/".join(parts[:3]),
            "section": parts[3] if score["level"] == "section" else "",
        }
        row = {**score, **address, "set": name, "id": row_id}
        for column, values in columns.items():
            values.append(row[column])
    return pa.table(columns, schema=SCHEMA)


def read_probe(path: str | os.PathLike) -> pd.DataFrame:
    """
    Read what [`probe_checkpoint`] wrote.

    Raises:
        UserError: There is no such file, or it is something else.
    """
    return _read(path, pq.read_table).to_pandas()


def read_probe_info(path: str | os.PathLike) -> dict[str, Any]:
    """
    What was probed: `checkpoint` and its `checkpoint_run` (digest of the run that trained it), `data`, `unseen`, and
    the versions of the libraries.

    Raises:
        UserError: As [`read_probe`].
    """
    return _info(_read(path, pq.read_schema))


def _read(path: str | os.PathLike, read: Callable[[str], Any]) -> Any:
    try:
        content = read(os.fspath(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; probe the checkpoint first") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read ({error}); probe the checkpoint again") from error
    schema = content.schema if isinstance(content, pa.Table) else content
    if schema.names != SCHEMA.names or _info(schema).get("format") != FORMAT:
        raise UserError(f"{path}: not a probe of this version; probe the checkpoint again")
    return content


def _info(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(KEY, b"{}"))
