"""Parquet, card and build record, written in one step so that none of them can disagree with another."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HUB_CACHE

from .atomic import replacing
from .benchmark import SPLITS, Benchmark
from .build_log import LOG, BuildLog
from .builder import DESCRIPTIONS, FEATURES, VERSION
from .card import render_card
from .card_examples import IMAGES, choose_examples
from .errors import UserError
from .hierarchy import LEVELS
from .options import BuildOptions
from .questions.llm import CONCURRENCY
from .viewer import ROW_GROUP_BYTES


logger = logging.getLogger(__name__)

RECORD = "build.json"
FORMAT = "medforget"
# One page holds every distinct image of a split, so that an image is stored once however many rows show it.
DICTIONARY_PAGE_BYTES = 64 << 20


def parquet_path(config: str, split: str) -> str:
    """Where a split lies below the dataset folder, in the Hub's naming."""
    return f"{config}/{split}-00000-of-00001.parquet"


def build(
    out: str | os.PathLike,
    *,
    workers: int | None = None,
    concurrency: int = CONCURRENCY,
    force: bool = False,
    **options,
) -> Path:
    """Build the dataset folder: one Parquet file per configuration and split, the card and `build.json`.

    The folder appears under its name only when it is complete; a build of the same options that is there already is
    left as it is.

    Args:
        out (`str` or `os.PathLike`): The folder to write. `load_dataset` finds it by this name from its parent.
        workers (`int`, *optional*): Processes that render images, by default one a CPU core. No byte depends on it.
        concurrency (`int`, *optional*, defaults to `8`): Requests to a language model in flight. Nor on this.
        force (`bool`, *optional*, defaults to `False`): Build even if the folder already holds this build.
        **options: Fields of [`~medforget_dataset.benchmark.BuildOptions`].

    Returns:
        `Path`: The folder.

    Raises:
        UserError: A value is out of range, or `out` holds something that is not part of a MedForget dataset.
    """
    out, build_options = Path(out), BuildOptions(**options)
    record = _record(build_options)
    if _holds_other_things(out):
        raise UserError(f"--out {out}: holds something that is not a MedForget dataset; choose another folder")
    if not force and is_built(out, build_options):
        return out
    with replacing(out) as partial:
        partial.mkdir()
        folders = [*build_options.folders().values(), Path(HF_HUB_CACHE)]
        log = BuildLog(build_options.on_error, partial / LOG, folders)
        _write(partial, Benchmark(build_options, workers, log, concurrency), record)
    for line in log.summary():
        logger.warning(line)
    return out


def is_built(folder: Path, options: BuildOptions) -> bool:
    """Whether the folder holds exactly this build, made by this version, with every file there."""
    record = _read_json(folder / RECORD)
    if any(record.get(key) != value for key, value in _record(options).items()):
        return False
    return "files" in record and not any(changed_file(folder, name, record) for name in record["files"])


def changed_file(folder: Path, name: str, record: dict) -> str | None:
    """What is wrong with a file of a build, in one line that names it; `None` if it is the file that was built."""
    path, expected = folder / name, record["files"].get(name)
    if not path.is_file():
        return f"{path}: missing"
    if expected is None:
        return f"{path}: not in {RECORD}"
    if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
        return f"{path}: not the file that was built (cut short, damaged or changed)"
    return None


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: Path) -> dict:
    """The build record of a dataset folder.

    Raises:
        UserError: The folder has none, or it is not one.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{folder}: not a MedForget dataset (no {RECORD})")
    record = _read_json(path)
    missing = [key for key in ("options", "restricted", "files") if key not in record]
    if missing:
        raise UserError(f"{path}: not a build record: {', '.join(missing)} missing")
    if record.get("version") != VERSION:
        raise UserError(f"{path}: built by version {record.get('version')}, this is {VERSION}; build it again")
    return record


def read_options(folder: Path, record: dict) -> BuildOptions:
    """The options of a build, from its record.

    Raises:
        UserError: One is unknown, of another type or out of range, or the record is not what a build writes.
    """
    path, options = folder / RECORD, record["options"]
    if not isinstance(options, dict) or not _is_file_list(record["files"]):
        raise UserError(f"{path}: not a build record: its options or files are not what a build writes")
    types = {option.name: type(option.default) for option in fields(BuildOptions)}
    for name, value in options.items():
        if name not in types:
            raise UserError(f"{path}: option {name!r} is unknown; build it again")
        if type(value) is not types[name]:
            raise UserError(f"{path}: option {name} is {value!r}, not {types[name].__name__}; build it again")
    try:
        return BuildOptions(**options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _is_file_list(files: object) -> bool:
    entries = files.values() if isinstance(files, dict) else [None]
    return all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries)


def _record(options: BuildOptions) -> dict:
    return {"format": FORMAT, "version": VERSION, "options": asdict(options)}


def _holds_other_things(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        return True
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    record = _read_json(folder / RECORD)
    known = {RECORD, *record.get("files", {})} if record.get("format") == FORMAT else set()
    return bool(found - known)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(folder: Path, benchmark: Benchmark, record: dict) -> None:
    benchmark.render_all()
    splits = {}
    for config, names in SPLITS.items():
        for split in names:
            path = folder / parquet_path(config, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist([_encode(row) for row in benchmark.examples(config, split)], schema=_schema())
            write_parquet(table, path)
            splits[config, split] = {
                "rows": table.num_rows,
                "bytes": table.nbytes,
                "file_bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
    examples = choose_examples(benchmark)
    for name, content in examples.images.items():
        (folder / IMAGES).mkdir(exist_ok=True)
        (folder / IMAGES / name).write_bytes(content)
    card = render_card(benchmark, FEATURES, splits, DESCRIPTIONS, examples)
    (folder / "README.md").write_text(card, encoding="utf-8")
    record |= {
        "restricted": benchmark.corpus.restricted,
        "views": {"method": benchmark.view_method} | (benchmark.svdrr.record() if benchmark.svdrr else {}),
        "forgotten_rows": {level: len(benchmark.forgotten(level)) for level in LEVELS},
    }
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / RECORD).write_text(json.dumps(record | {"files": files}, indent=2) + "\n")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table whose rows are ordered by image: each image once, compressed, with a page index.

    `Dataset.to_parquet` would write every row's image again: 61 MB instead of 4 for 3,840 rows of 256 images.
    """
    # Where one page cannot hold all distinct images, the rest is written row by row, as the table counts its bytes.
    groups = -(-table.nbytes // (ROW_GROUP_BYTES // 2))
    pq.write_table(
        table,
        path,
        row_group_size=max(1, table.num_rows // max(1, groups)),
        compression="zstd",
        use_dictionary=True,
        dictionary_pagesize_limit=DICTIONARY_PAGE_BYTES,
        use_content_defined_chunking=True,
        write_page_index=True,
    )


def _schema() -> pa.Schema:
    # The Hub and `datasets` read Image and ClassLabel from this key of the schema's metadata.
    features = {"info": {"features": FEATURES.to_dict()}}
    return FEATURES.arrow_schema.with_metadata({"huggingface": json.dumps(features)})


def _encode(row: dict) -> dict:
    return row | {name: FEATURES[name].str2int(row[name]) for name in ("task", "level")}
