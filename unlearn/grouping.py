"""Rows gathered by image: the examples that training, unlearning and scoring read.

One example is an image with all its rows, so that an image is encoded once for all of them.
"""

from collections.abc import Collection
from typing import Any

import datasets
import pyarrow as pa

from medforget_dataset.errors import UserError


GROUPED_FEATURES = datasets.Features(
    {
        "key": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "rows": datasets.List(
            {
                "id": datasets.Value("string"),
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
                "training_phrasings": datasets.List(datasets.Value("string")),
                "task": datasets.Value("string"),
                "level": datasets.Value("string"),
                "forget": datasets.Value("bool"),
                "restricted": datasets.Value("bool"),
            }
        ),
    }
)


def image_key(row_id: str) -> str:
    """
    The part of a row's id that names its image.

    >>> image_key("inst03/pat021/study084/impression/cloze")
    'inst03/pat021/study084'
    >>> image_key("general/axial-031/cloze")
    'general/axial-031'
    """
    parts = row_id.split("/")
    return "/".join(parts[:2] if parts[0] == "general" else parts[:3])


def patient_key(key: str) -> str:
    """The part of an image key that names its patient; an image of general knowledge is its own patient."""
    return "/".join(key.split("/")[:2])


def group_by_image(dataset: datasets.Dataset, forget: datasets.Dataset | Collection[str] = ()) -> datasets.Dataset:
    """
    Gather the rows of each image into one example.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of the MedForget schema, in any order.
        forget ([`~datasets.Dataset`] or `Collection[str]`, *optional*, defaults to `()`):
            Rows, or ids of rows, in `dataset` that are to be forgotten. One image may carry both kinds.

    Returns:
        [`~datasets.Dataset`]: One example an image, in order of first appearance, with the columns `key`, `image`
        (encoded, not decoded) and `rows` (a list of id, question, answer, training_phrasings, task, level, forget,
        restricted).

    Raises:
        UserError: If `dataset` has no rows or one without question or answer, or `forget` names rows that it does not
            hold.
    """
    if len(dataset) == 0:
        raise UserError("the dataset has no rows")
    names = ["id", "question", "answer", "training_phrasings", "task", "level"]
    table = dataset.select_columns(names).with_format(None)[:]
    for name in ("task", "level"):
        table[name] = dataset.features[name].int2str(table[name])
    # Rows that do not say may be.
    restricted = dataset["restricted"][:] if "restricted" in dataset.column_names else [True] * len(dataset)
    forget_ids = set(forget["id"] if isinstance(forget, datasets.Dataset) else forget)
    if missing := forget_ids.difference(table["id"]):
        raise UserError(f"{len(missing)} rows to forget are not in the dataset, {min(missing)} among them")

    first_rows: list[int] = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for index, values in enumerate(zip(*(table[name] for name in names), strict=True)):
        row = dict(zip(names, values, strict=True))
        if empty := [name for name in ("question", "answer") if not row[name]]:
            raise UserError(f"{row['id']}: its {empty[0]} is empty; build the dataset again")
        key = image_key(row["id"])
        if key not in groups:
            groups[key] = []
            first_rows.append(index)
        groups[key].append({**row, "forget": row["id"] in forget_ids, "restricted": restricted[index]})

    images = dataset.select_columns(["image"]).with_format("arrow")[first_rows]["image"]
    columns = {"key": list(groups), "rows": list(groups.values())}
    schema = GROUPED_FEATURES.arrow_schema
    arrays = [columns[f.name] if f.name in columns else images.cast(f.type) for f in schema]
    return datasets.Dataset(
        pa.table(arrays, schema=schema.remove_metadata()), info=datasets.DatasetInfo(features=GROUPED_FEATURES)
    )


def split_by_kind(grouped: datasets.Dataset) -> datasets.Dataset:
    """
    Part the rows to forget from those to retain: an image with both becomes two examples.

    Args:
        grouped ([`~datasets.Dataset`]):
            Examples of [`group_by_image`].

    Returns:
        [`~datasets.Dataset`]: Examples with rows of one kind.
    """

    def split(batch: dict[str, list]) -> dict[str, list]:
        parts: dict[str, list] = {name: [] for name in batch}
        for key, image, rows in zip(batch["key"], batch["image"], batch["rows"], strict=True):
            for kind in (True, False):
                if of_kind := [row for row in rows if row["forget"] == kind]:
                    for name, value in (("key", key), ("image", image), ("rows", of_kind)):
                        parts[name].append(value)
        return parts

    return grouped.map(split, batched=True, features=grouped.features, keep_in_memory=True, desc="parting rows")
