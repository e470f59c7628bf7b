"""The rows of a dataset by their place in the hierarchy: what the page lists, counts and shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from medforget_dataset.benchmark import CONFIGS, SPLITS
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS, TASKS
from medforget_dataset.hub import is_restricted_dataset
from medforget_dataset.writer import changed_file, parquet_path, read_record

from ..grouping import image_key


COLUMNS = (
    "id",
    "question",
    "answer",
    "choices",
    "task",
    "level",
    "institution",
    "patient",
    "study",
    "section",
    "view_angle",
    "view_method",
    "original_question",
)
GENERAL = "general_med"
IDENTITY = "identity"
FORGOTTEN, RETAINED = "forgotten", "retained"
IMAGES_AT_A_TIME = 256

Row = dict[str, Any]


class Turned(NamedTuple):
    """A view from another angle: the encoded image, the angle in degrees, and how it was turned."""

    image: bytes
    angle: float
    method: str


class Place(NamedTuple):
    """What is looked at; an empty part means all. Nodes are addresses, such as `inst03/pat021`."""

    config: str = "finetune"
    task: str = ""
    institution: str = ""
    patient: str = ""
    study: str = ""
    section: str = ""


class Catalogue:
    """
    A dataset folder, of which the texts and the encoded images of a configuration are read when first asked for.

    Args:
        folder (`Path`):
            A dataset folder written by `medforget build`.
        name (`str`, *optional*):
            What the user calls it; the folder's path by default.

    Raises:
        UserError: It is not a dataset of this version, or a file of it is missing, damaged or changed.
    """

    def __init__(self, folder: Path, name: str = ""):
        self.folder, self.name = folder, name or str(folder)
        self.record = read_record(folder)
        self._checked: set[str] = set()
        self.config_rows = cache(self._config_rows)
        self._images_of = cache(self._read_images)

    @cached_property
    def taught(self) -> dict[str, Row]:
        """The rows of `finetune` by their id."""
        return {row["id"]: row for row in self._read("finetune", "train")}

    @cached_property
    def rephrased(self) -> dict[str, Row]:
        """The rows of all rephrase sets by the id of the row that they ask again; a row is the same in every set."""
        rows = (row for level in LEVELS for row in self._read(f"{level}_forget_rephrase", "test"))
        return {base_id(row["id"]): row for row in rows}

    @cached_property
    def forgotten(self) -> dict[str, dict[str, str]]:
        """For each level, `"forgotten"` or `"retained"` by the id of every row, as its two configurations say."""
        states = {}
        for level in LEVELS:
            parts = ((f"{level}_forget", FORGOTTEN), (f"{level}_retain", RETAINED))
            states[level] = {row_id: word for config, word in parts for row_id in self._ids(config)}
            if unknown := self.taught.keys() - states[level].keys():
                raise UserError(
                    f"{self.folder}: {min(unknown)} is neither in {level}_forget nor in {level}_retain; see "
                    f"`medforget validate {self.folder}`"
                )
        return states

    @cached_property
    def is_restricted(self) -> bool:
        """Whether the build record or any row says that the data is restricted."""
        return is_restricted_dataset(self.folder)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of rows of every configuration."""
        return {config: len(self.config_rows(config)) for config in CONFIGS}

    def states(self, row_id: str) -> dict[str, str]:
        """`"forgotten"` or `"retained"` at each level; nothing for a row outside the hierarchy."""
        known = base_id(row_id)
        return {level: states[known] for level, states in self.forgotten.items() if known in states}

    @cached_property
    def forgotten_nodes(self) -> set[str]:
        """Addresses of the nodes that are forgotten at their own level; a section's ends with its name."""
        return {
            node_of(self.taught[row_id], level)
            for level, states in self.forgotten.items()
            for row_id, state in states.items()
            if state == FORGOTTEN and row_id in self.taught and self.taught[row_id]["level"] == level
        }

    def rows(self, place: Place) -> list[Row]:
        """The rows of a place, in the order of their configuration."""
        return [row for row in self.config_rows(place.config) if _is_in(row, place)]

    def row(self, row_id: str) -> Row:
        """A row of any configuration by its id; raises `KeyError` if there is none."""
        if row_id in self.taught:
            return self.taught[row_id]
        known = {row["id"]: row for row in (*self.rephrased.values(), *self.config_rows(GENERAL))}
        return known[row_id]

    def children(self, place: Place, level: str) -> list[tuple[str, str, int]]:
        """
        What can be chosen at a level, given what is chosen above it and the filters.

        Args:
            place (`Place`):
                What is chosen.
            level (`str`):
                One of the four levels.

        Returns:
            `list[tuple[str, str, int]]`: Address (for a section its key), name and number of rows of each node.
        """
        above = LEVELS[: LEVELS.index(level)]
        free = place._replace(**dict.fromkeys(set(LEVELS) - set(above), ""))
        names: dict[str, str] = {}
        counts = Counter[str]()
        for row in self.rows(free):
            key = _value(row, level)
            names.setdefault(key, _name(row, level))
            counts[key] += 1
        return [(key, name, counts[key]) for key, name in names.items() if key]

    def image(self, row: Row) -> bytes:
        """The encoded image that a row is asked about."""
        if row["id"].endswith("/rephrase"):
            turned = self.turned(row)
            if turned is not None:
                return turned.image
        config = GENERAL if row["id"].startswith("general/") else "finetune"
        return self._images_of(config)[image_key(row["id"])]

    def upright(self, row: Row) -> bytes:
        """The image of a row's study as it was acquired or rendered."""
        return self.image(self.taught.get(base_id(row["id"]), row))

    def turned(self, row: Row) -> Turned | None:
        """The view of a row's study in the rephrase sets; nothing if no level forgets a row of the study."""
        key = image_key(row["id"])
        for level in LEVELS:
            if image := self._images_of(f"{level}_forget_rephrase").get(key):
                again = self._turned_rows[key]
                return Turned(image, again["view_angle"], again["view_method"])
        return None

    @cached_property
    def _turned_rows(self) -> dict[str, Row]:
        return {image_key(row_id): row for row_id, row in self.rephrased.items()}

    def _config_rows(self, config: str) -> list[Row]:
        if config == "finetune":
            return list(self.taught.values())
        if config == GENERAL:
            return [row for split in SPLITS[GENERAL] for row in self._read(GENERAL, split)]
        if config.endswith("_rephrase"):
            level = config.split("_")[0]
            return [self.rephrased[row_id] for row_id in self._ids(f"{level}_forget") if row_id in self.rephrased]
        return [self.taught[row_id] for row_id in self._ids(config)]

    def _ids(self, config: str) -> list[str]:
        return self._table(config, "train", ("id",))["id"].to_pylist()

    def _read(self, config: str, split: str) -> Iterator[Row]:
        for row in self._table(config, split, COLUMNS).to_pylist():
            yield row | {"task": TASKS[row["task"]], "level": LEVELS[row["level"]]}

    def _table(self, config: str, split: str, columns: Iterable[str]) -> pa.Table:
        with self._open(config, split) as file:
            return file.read(columns=list(columns))

    def _open(self, config: str, split: str) -> pq.ParquetFile:
        name = parquet_path(config, split)
        self._check(name)
        try:
            return pq.ParquetFile(self.folder / name)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{self.folder / name}: cannot be read ({error}); build the dataset again") from error

    def _check(self, name: str) -> None:
        if name in self._checked:
            return
        if problem := changed_file(self.folder, name, self.record):
            raise UserError(f"{problem}; build or download the dataset again")
        self._checked.add(name)

    def _read_images(self, config: str) -> dict[str, bytes]:
        """The encoded images of a configuration by image key: each once, of the first row that shows it."""
        images: dict[str, bytes] = {}
        for split in SPLITS[config]:
            with self._open(config, split) as file:
                # In parts: as a column, an image is there as often as it has rows.
                for batch in file.iter_batches(IMAGES_AT_A_TIME, columns=["id", "image"]):
                    for index, row_id in enumerate(batch["id"].to_pylist()):
                        if (key := image_key(row_id)) not in images:
                            images[key] = batch["image"][index]["bytes"].as_py()
        return images


def base_id(row_id: str) -> str:
    """
    The id of the row that a rephrase row asks again; of any other row its own.

    >>> base_id("inst00/pat001/study004/patient/rephrase")
    'inst00/pat001/study004/patient'
    """
    return row_id.removesuffix("/rephrase")


def node_of(row: Row, level: str) -> str:
    """The address of the node at a level that a row is about."""
    key = image_key(row["id"])
    if level == "section":
        return f"{key}/{row['section'] or IDENTITY}"
    return "/".join(key.split("/")[: LEVELS.index(level) + 1])


def _value(row: Row, level: str) -> str:
    if level == "section":
        return row["section"] or (IDENTITY if row["institution"] else "")
    if row["institution"]:
        return node_of(row, level)
    return image_key(row["id"]) if level == "study" else ""


def _name(row: Row, level: str) -> str:
    if level == "section":
        return row["section"].replace("_", " ") or "whose study this is"
    return row[level] or image_key(row["id"]).partition("/")[2]


def _is_in(row: Row, place: Place) -> bool:
    if place.task and row["task"] != place.task:
        return False
    return all(not chosen or _value(row, level) == chosen for level, chosen in zip(LEVELS, place[2:], strict=True))


def by_image(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the image that they are about, in order of first appearance."""
    images: dict[str, list[Row]] = {}
    for row in rows:
        images.setdefault(image_key(row["id"]), []).append(row)
    return images
