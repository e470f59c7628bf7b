"""Rows and pictures for the dataset card: what the questions of one study look like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .benchmark import Benchmark


IMAGES = "images"
"""Folder of the card's pictures, below the dataset's."""


@dataclass
class CardExamples:
    """What the card shows of a build; empty where the data is restricted.

    Attributes:
        images (`dict[str, bytes]`): Name of a file below `images/` to its content, the bytes that the Parquet has.
        angle (`float`): Degrees by which the second picture is turned.
        rows (`list[dict[str, str]]`): `task`, `question`, `rephrased` and `answer` of the study's first rows, as
            Markdown.
        general (`dict[str, str]`): `question` and `answer` of a general-med row.
    """

    images: dict[str, bytes] = field(default_factory=dict)
    angle: float = 0.0
    rows: list[dict[str, str]] = field(default_factory=list)
    general: dict[str, str] = field(default_factory=dict)


def choose_examples(benchmark: Benchmark) -> CardExamples:
    """The first study that the patient level forgets, with its identity rows and those of one section."""
    if benchmark.corpus.restricted:
        return CardExamples()
    turned = next(benchmark.examples("patient_forget_rephrase", "test"))
    study = "/".join(turned["id"].split("/")[:3])
    rephrased = {
        row["id"].removesuffix("/rephrase"): row["question"]
        for row in benchmark.config_rows("patient_forget_rephrase")
    }
    of_study = [row for row in benchmark.examples("finetune", "train") if row["id"].startswith(f"{study}/")]
    sections = [row["section"] for row in of_study if row["section"]]
    section = "findings" if "findings" in sections else sections[0]
    shown = [row for row in of_study if row["section"] in ("", section)]
    general = next(benchmark.examples("general_med", "test"))
    pictures = {"study.jpg": of_study[0], "study-turned.jpg": turned, "general-med.jpg": general}
    return CardExamples(
        images={name: row["image"]["bytes"] for name, row in pictures.items()},
        angle=turned["view_angle"],
        rows=[
            {
                "task": f"{row['task']}, {row['section'] or row['level']}",
                "question": as_cell(row["question"]),
                "rephrased": as_cell(rephrased.get(row["id"], "–")),
                "answer": _answer(row),
            }
            for row in shown
        ],
        general={"question": as_cell(general["question"]), "answer": _answer(general)},
    )


def _answer(row: dict[str, Any]) -> str:
    if not row["choices"]:
        return as_cell(row["answer"])
    return as_cell(f"{row['answer']}: {row['choices']['ABCD'.index(row['answer'])]}")


def as_cell(text: str) -> str:
    r"""A text as it stands in a cell of a Markdown table.

    Example:
        >>> as_cell("A: left | right\nB: none_of_these")
        'A: left \\| right<br>B: none\\_of\\_these'
    """
    for character in "\\|*_`<>[]":
        text = text.replace(character, f"\\{character}")
    return "<br>".join(" ".join(line.split()) for line in text.splitlines())
