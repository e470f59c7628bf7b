"""The same studies from other angles, for training that should survive the rephrase sets' turned views."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .atomic import replacing
from .benchmark import REPHRASE_ANGLES, Benchmark
from .builder import VERSION
from .errors import UserError
from .options import BuildOptions
from .writer import parquet_path, read_record


# Around and between the angles of the rephrase sets, and never one of them: those are for evaluation alone.
TRAINING_ANGLES = (-36.0, -22.0, -8.0, 8.0, 22.0, 36.0)
KEY = b"medforget_views"
assert not set(TRAINING_ANGLES) & set(REPHRASE_ANGLES)


def training_views(
    data: Path, *, size: int, file: Path | None = None, workers: int | None = None
) -> dict[str, list[Image.Image]]:
    """Views of every study that training may use, the unturned one among them as often as all others together.

    Rendered once and kept in a file.

    Args:
        data (`Path`): A dataset folder of a corpus that can render views.
        size (`int`): Width and height of the views in pixels; what the model sees is enough.
        file (`Path`, *optional*): Parquet file to keep them in, by default one in `$MEDFORGET_CACHE` (or
            `~/.cache/medforget`), named after the dataset's content.
        workers (`int`, *optional*): Processes that render, by default one a CPU core.

    Returns:
        `dict[str, list[PIL.Image.Image]]`: Address of the study, for example `"inst03/pat021/study084"`, to images.

    Raises:
        UserError: `data` is not a dataset folder of this version, or `file` is something else than a file of views. A
            file of other views is replaced.
    """
    record = read_record(data)
    content = [
        VERSION,
        record["options"],
        record["files"][parquet_path("finetune", "train")],
        TRAINING_ANGLES,
        size,
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("MEDFORGET_CACHE", "~/.cache/medforget")).expanduser()
    file = file or cache / f"views-{key}.parquet"
    if _key_of(file) != key:
        _render(file, key, Benchmark(BuildOptions(**record["options"] | {"image_size": size}), workers))
    views: dict[str, list[Image.Image]] = {}
    for row in pq.read_table(file).to_pylist():
        views.setdefault(row["study"], []).append(Image.open(io.BytesIO(row["image"])))
    return {study: images[:1] * (len(images) - 1) + images[1:] for study, images in views.items()}


def _key_of(file: Path) -> str | None:
    """Which views a file holds; none if there is no such file, or it was cut short.

    Raises:
        UserError: The file holds something else.
    """
    try:
        metadata = pq.read_schema(file).metadata or {}
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not a file of turned views, or cut short ({error}); remove it") from error
    if KEY not in metadata:
        raise UserError(f"{file}: not a file of turned views; give another --views")
    return metadata[KEY].decode()


def _render(file: Path, key: str, benchmark: Benchmark) -> None:
    angles = (0.0, *TRAINING_ANGLES)
    images = benchmark.render({node.path: angles for node in benchmark.nodes})
    rows = [
        {"study": node.path, "view_angle": angle, "image": images[node.study.key, angle]}
        for node in benchmark.nodes
        for angle in angles
    ]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({KEY: key})
    with replacing(file) as partial:
        pq.write_table(table, partial, compression="zstd")
