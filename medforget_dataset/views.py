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

from .benchmark import REPHRASE_ANGLES, Benchmark, BuildOptions
from .errors import UserError
from .writer import read_record


# Around and between the angles of the rephrase sets, and never one of them: those are for evaluation alone.
TRAINING_ANGLES = (-36.0, -22.0, -8.0, 8.0, 22.0, 36.0)
assert not set(TRAINING_ANGLES) & set(REPHRASE_ANGLES)


def training_views(
    data: Path, *, size: int, file: Path | None = None, workers: int | None = None
) -> dict[str, list[Image.Image]]:
    """Views of every study that training may use, its own image among them as often as all others together.

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
        UserError: `data` is not a dataset folder of this version, or `file` holds views of another dataset.
    """
    options = read_record(data)["options"]
    key = hashlib.sha256(json.dumps([options, TRAINING_ANGLES, size]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("MEDFORGET_CACHE", "~/.cache/medforget")).expanduser()
    file = file or cache / f"views-{key}.parquet"
    if not file.is_file():
        _render(file, key, Benchmark(BuildOptions(**options | {"image_size": size}), workers))
    table = pq.read_table(file)
    if (table.schema.metadata or {}).get(b"medforget_views") != key.encode():
        raise UserError(f"{file}: holds views of another dataset, size or set of angles; remove it")
    views: dict[str, list[Image.Image]] = {}
    for row in table.to_pylist():
        views.setdefault(row["study"], []).append(Image.open(io.BytesIO(row["image"])))
    return {study: images[:1] * (len(images) - 1) + images[1:] for study, images in views.items()}


def _render(file: Path, key: str, benchmark: Benchmark) -> None:
    angles = (0.0, *TRAINING_ANGLES)
    images = benchmark.render({node.path: angles for node in benchmark.nodes})
    rows = [
        {"study": node.path, "view_angle": angle, "image": images[node.study.key, angle]}
        for node in benchmark.nodes
        for angle in angles
    ]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"medforget_views": key})
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        pq.write_table(table, partial, compression="zstd")
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
