"""The paper's Figure 7: what each model answers to the same forgotten question."""

from __future__ import annotations

from dataclasses import dataclass

from harness_tasks.scores import normalize, rouge_l

from .evaluations import Evaluations
from .reading import TITLES
from .run_folder import FLAT, RunFolder


PARTLY_FROM = 0.5
"""An answer with at least this ROUGE-L against the reference is partly recalled."""
FLAT_TITLE = ", flat"
"""What the title of a model ends with whose name ends with `FLAT`."""
RECALL = {"none": ("✔", "not recalled"), "partly": ("◐", "partly recalled"), "full": ("✖", "recalled")}


@dataclass(frozen=True)
class Answer:
    """
    One model's answer.

    Attributes:
        title (`str`):
            The model.
        text (`str`):
            What it answered.
        recall (`str`):
            A key of `RECALL`.
        file (`str`):
            Where the answer is.
    """

    title: str
    text: str
    recall: str
    file: str

    @property
    def sign(self) -> str:
        """Says the colour again."""
        return RECALL[self.recall][0]

    @property
    def words(self) -> str:
        """Says the sign in words."""
        return RECALL[self.recall][1]


@dataclass(frozen=True)
class Example:
    """
    One forgotten question.

    Attributes:
        id (`str`):
            The row.
        level (`str`):
            The level that was unlearned.
        subject (`str`):
            What the question is about: a level, or a kind of section.
        image (`str`):
            The image, as the `src` of an HTML image.
        question (`str`), reference (`str`):
            The row.
        answers (`list[Answer]`):
            Of the baselines, the methods, and the methods on the flat selection.
    """

    id: str
    level: str
    subject: str
    image: str
    question: str
    reference: str
    answers: list[Answer]


def choose_examples(run: RunFolder, evaluations: Evaluations) -> list[Example]:
    """
    For every level the first forgotten identity row of that level, and of every kind of section the first forgotten
    generation row, by id. Nobody picks them.
    """
    if run.data is None:
        return []
    chosen: list[tuple[str, str, str]] = []
    for level in run.levels:
        rows = sorted(run.data.rows(f"{level}_forget"), key=lambda row: row["id"])
        first: dict[str, str] = {}
        for row in rows:
            if row["task"] == "identity" and row["level"] == level:
                first.setdefault(level, row["id"])
            elif row["task"] == "generation":
                first.setdefault(row["section"].replace("_", " "), row["id"])
        chosen += [
            (level, subject, row_id) for subject, row_id in sorted(first.items(), key=lambda item: item[0] != level)
        ]
    images = run.data.images({row_id for _, _, row_id in chosen})
    examples = [
        _example(run, evaluations, level, subject, row_id, images[row_id]) for level, subject, row_id in chosen
    ]
    return [example for example in examples if example is not None]


def _example(
    run: RunFolder, evaluations: Evaluations, level: str, subject: str, row_id: str, image: str
) -> Example | None:
    kind = "identity" if subject == level else "generation"
    titled = [(TITLES[method], run.model(method, level).name) for method in run.all_methods]
    titled += [(f"{TITLES[method]}{FLAT_TITLE}", f"{method}-{level}{FLAT}") for method in run.methods]
    answers, question, reference = [], "", ""
    for title, name in titled:
        for split in ("forget", "retain"):
            asked = evaluations.get(name, f"medforget_{level}_{split}_{kind}")
            row = next((row for row in asked.rows if row["id"] == row_id), None) if asked else None
            if asked and row is not None:
                question, reference = row["question"], row["answer"]
                answers.append(Answer(title, row["response"], recall(row["response"], row["answer"]), asked.file))
                break
    return Example(row_id, level, subject, image, question, reference, answers) if answers else None


def recall(response: str, reference: str) -> str:
    """
    How much of a reference an answer gives away: a key of `RECALL`.

    Example:
        >>> recall("study_chest_xray_031", "study_chest_xray_021")
        'partly'
    """
    if normalize(response) == normalize(reference):
        return "full"
    return "partly" if rouge_l(reference, response) >= PARTLY_FROM else "none"
