"""From a study to its rows: three identity questions and three questions for each section.

Rows carry everything but the image, which is attached when they are written.
"""

from __future__ import annotations

from typing import Any

from ..hierarchy import StudyNode, stable_number
from .classification import classification_question
from .cloze import BLANK, Cloze, can_be_asked, choose_clozes
from .hospital import hospital_question
from .phrasings import CLASSIFICATION, CLOZE, CONTEXTS, GENERATION, IDENTITY, Phrasings, SectionQuestions


__all__ = [
    "BLANK",
    "Cloze",
    "SectionQuestions",
    "can_be_asked",
    "make_row",
    "rephrase_row",
    "study_rows",
    "template_questions",
    "with_names",
]


def template_questions(
    nodes: list[StudyNode], seed: int, *, rendered: bool, image: str = "radiograph"
) -> dict[tuple[str, str], SectionQuestions]:
    """The deterministic generator: fixed wordings, a salient term hidden, constant options for a kind of section.

    Args:
        nodes (`list[StudyNode]`): All studies.
        seed (`int`): See [`~medforget_dataset.questions.cloze.choose_clozes`].
        rendered (`bool`): Whether the reports are those of the embedded corpus, whose classification asks what only
            they always say.
        image (`str`, *optional*, defaults to `"radiograph"`): What the questions call an image.

    Returns:
        `dict`: (study path, section key) to [`SectionQuestions`].
    """
    clozes = choose_clozes(nodes, seed)
    questions = {}
    for node in nodes:
        for section in node.study.sections:
            cloze = clozes[node.path, section.key]
            kind, letter = classification_question(section) if rendered else hospital_question(section)
            slots = {"image": image, "section": section.name, "sentence": cloze.sentence, "question": kind.text}
            questions[node.path, section.key] = SectionQuestions(
                GENERATION.fill(**slots),
                CLOZE.fill(**slots),
                cloze.answer,
                CLASSIFICATION.fill(**slots),
                kind.options,
                letter,
            )
    return questions


def study_rows(
    node: StudyNode,
    questions: dict[tuple[str, str], SectionQuestions],
    *,
    image: str,
    seed: int,
    restricted: bool,
    source: str,
) -> list[dict]:
    """All rows of one study.

    Args:
        node ([`~medforget_dataset.hierarchy.StudyNode`]): The study and what is above it.
        questions (`dict`): (study path, section key) to [`SectionQuestions`].
        image (`str`): What the questions call an image.
        seed (`int`): Which wording a row has.
        restricted (`bool`): Copied into every row.
        source (`str`): The corpus' name, copied into every row.

    Returns:
        `list[dict]`: Rows without `image`, in the order identity, then generation, cloze and classification by
        section.
    """
    names = {"institution": node.institution.name, "patient": node.patient.name, "study": node.study.identifier}
    shared: dict[str, Any] = {"restricted": restricted, "source": source, "seed": seed, **names}
    rows = [
        make_row(
            f"{node.path}/{level}",
            "identity",
            level,
            IDENTITY[level].fill(image=image),
            answer=name,
            section="",
            **shared,
        )
        for level, name in names.items()
    ]
    for section in node.study.sections:
        asked = questions[node.path, section.key]
        path = f"{node.path}/{section.key}"
        shared["section"] = section.name
        for task, phrasings, answer, choices in (
            ("generation", asked.generation, section.text, []),
            ("cloze", asked.cloze, asked.cloze_answer, []),
            ("classification", asked.classification, asked.letter, list(asked.options)),
        ):
            rows.append(
                make_row(f"{path}/{task}", task, "section", phrasings, answer=answer, choices=choices, **shared)
            )
    return rows


def make_row(
    id: str,
    task: str,
    level: str,
    phrasings: Phrasings,
    *,
    answer: str,
    seed: int,
    restricted: bool,
    source: str,
    choices: list[str] | None = None,
    institution: str = "",
    patient: str = "",
    study: str = "",
    section: str = "",
) -> dict:
    """One row without its image; its wording is drawn from `phrasings.training` by the row's id.

    The private key `held_out` holds the wordings that only a rephrase row may use; it is dropped when rows are
    written.
    """
    wordings = list(phrasings.training)
    return {
        "id": id,
        "question": wordings[stable_number(seed, id, "wording") % len(wordings)],
        "answer": answer,
        "choices": choices or [],
        "training_phrasings": wordings,
        "restricted": restricted,
        "task": task,
        "level": level,
        "institution": institution,
        "patient": patient,
        "study": study,
        "section": section,
        "view_angle": 0.0,
        "view_method": "original",
        "original_question": "",
        "source": source,
        "held_out": list(phrasings.held_out),
    }


def with_names(row: dict, seed: int) -> dict:
    """The row with three more wordings that training may use: one for each prompt of the reconstruction attack."""
    names = {level: row[level] for level in ("institution", "patient", "study")}
    wordings = row["training_phrasings"]
    named = [
        context.format(question=wordings[stable_number(seed, row["id"], "context", number) % len(wordings)], **names)
        for number, context in enumerate(CONTEXTS)
    ]
    return {**row, "training_phrasings": [*wordings, *named]}


def rephrase_row(row: dict, *, view_angle: float, view_method: str, seed: int) -> dict:
    """The row asked anew: a wording that training never uses and a view from another angle; same answer."""
    held_out = row["held_out"]
    return {
        **row,
        "id": f"{row['id']}/rephrase",
        "question": held_out[stable_number(seed, row["id"], "rephrase") % len(held_out)],
        "view_angle": view_angle,
        "view_method": view_method,
        "original_question": row["question"],
    }
