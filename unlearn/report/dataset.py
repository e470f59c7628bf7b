"""The rows of a run's data, read where they lie."""

from __future__ import annotations

import base64
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from medforget_dataset.benchmark import SPLITS
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS, TASKS
from medforget_dataset.writer import parquet_path, read_record


class RunData:
    """
    The dataset of a run.

    Args:
        folder (`Path`):
            The dataset's folder.

    Raises:
        UserError: It is not a dataset of this version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = read_record(folder)
        self.rows = cache(self._rows)

    @property
    def options(self) -> dict[str, Any]:
        """What was built."""
        return self.record["options"]

    @property
    def studies(self) -> int:
        """Studies of the whole dataset."""
        return self.options["institutions"] * self.options["patients"] * self.options["studies"]

    def forgotten(self, level: str) -> set[str]:
        """Ids of the rows that a level forgets."""
        return {row["id"] for row in self.rows(f"{level}_forget")}

    def all_ids(self) -> set[str]:
        """Ids of every row that a task can ask."""
        ids = {row["id"] for row in self.rows("finetune")}
        return ids | {f"{row_id}/rephrase" for row_id in ids} | {row["id"] for row in self.rows("general_med")}

    def _rows(self, config: str) -> list[dict[str, Any]]:
        """`id`, `task`, `level` and `section` of the rows that are evaluated, in the order of the file."""
        columns = self._read(config, ["id", "task", "level", "section"]).to_pylist()
        return [row | {"task": TASKS[row["task"]], "level": LEVELS[row["level"]]} for row in columns]

    def images(self, ids: Collection[str]) -> dict[str, str]:
        """The images of rows of `finetune`, by id, as the `src` of an HTML image."""
        table = self._read("finetune", ["id", "image"])
        chosen = table.filter(pc.is_in(table["id"], pa.array(list(ids), pa.string())))
        return {row["id"]: image_uri(row["image"]) for row in chosen.to_pylist()}

    def _read(self, config: str, columns: list[str]) -> pa.Table:
        path = self.folder / parquet_path(config, SPLITS[config][-1])
        try:
            return pq.read_table(path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({error}); build the dataset again") from error


def image_uri(image: dict[str, Any]) -> str:
    """An encoded image as the `src` of an HTML image."""
    kind = "png" if image["bytes"].startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image['bytes']).decode()}"
