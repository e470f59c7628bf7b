"""The embedded general-medical set: anatomy questions that know no institution, patient or study.

Images are labelled slices of the embedded CT and projections of people outside the hierarchy. What is right is
counted from the label map, or is the angle of the projection. The set stands where the paper has PMC-VQA; like every
other set it asks in generation, cloze and classification form.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from ..questions import BLANK, make_row
from ..questions.classification import LETTERS
from ..questions.phrasings import Phrasings
from ..radiographs import render, slice_image, slice_structures


# Images a plane or view: enough that neighbouring slices of a test slice are in train.
SLICES = {"axial": 72, "coronal": 48, "sagittal": 42}
# Where each plane holds at least three of the organs; beyond lies little but skin.
RANGES = {"axial": (0.0, 1.0), "coronal": (0.2, 0.8), "sagittal": (0.22, 0.78)}
PEOPLE = 18
# Named for the side whose front is nearer the detector, as radiographers do.
VIEWS = {"frontal": 0.0, "left anterior oblique": -45.0, "right anterior oblique": 45.0, "lateral": 90.0}
ORGANS = (
    "right lung", "left lung", "heart", "aorta", "trachea", "esophagus", "liver", "spleen", "stomach", "colon",
    "right kidney", "left kidney", "pancreas", "spine", "sternum", "right scapula", "left scapula", "right clavicle",
    "left clavicle", "right humerus", "left humerus", "thyroid",
)  # fmt: skip
# What is largest is asked among organs of which every slice of the plane has one, none of them in more than a third.
LARGEST = {
    "axial": ("liver", "right lung", "spine", "left lung"),
    "coronal": ("right scapula", "pancreas", "right kidney", "sternum"),
    "sagittal": ("spine", "spleen", "heart", "right clavicle"),
}
ORDINALS = ("largest", "second largest", "third largest")

GENERATION = Phrasings(
    (
        "Describe the anatomy in this image.",
        "What does this image show?",
        "Which anatomy is seen here?",
        "Give a short description of this image.",
    ),
    (),
)
CLOZE = Phrasings(
    ("Complete: {sentence}", "Fill in the blank: {sentence}", "What is missing? {sentence}", "Name it: {sentence}"), ()
)
CLASSIFICATION = Phrasings(
    (
        "{question}",
        "Choose one option. {question}",
        "Answer with a letter. {question}",
        "Quiz: {question}",
    ),
    (),
)


class _Facts(NamedTuple):
    name: str
    image: Image.Image
    description: str
    sentence: str
    missing: str
    question: str
    choices: tuple[str, ...]
    right: str


def anatomy_rows(split: str, *, size: int, seed: int) -> list[dict]:
    """Rows of a split; every third image is a test image, so that the splits share none.

    Args:
        split (`str`): `"train"` or `"test"`.
        size (`int`): Width and height of the images in pixels.
        seed (`int`): Wordings and the people of the projections.

    Returns:
        `list[dict]`: Rows with `image` as a `PIL.Image.Image`, three an image.
    """
    return [row for entry in _facts(split, size, seed) for row in _rows(entry, seed)]


@lru_cache(maxsize=2)
def _facts(split: str, size: int, seed: int) -> list[_Facts]:
    facts = [
        _slice_facts(plane, number, size)
        for plane, count in SLICES.items()
        for number in range(count)
        if (number % 3 == 1) == (split == "test")
    ]
    facts += [
        _view_facts(view, person, size, seed)
        for person in range(PEOPLE)
        for view in VIEWS
        if (person % 3 == 1) == (split == "test")
    ]
    return facts


def _slice_facts(plane: str, number: int, size: int) -> _Facts:
    low, high = RANGES[plane]
    position = low + (high - low) * number / (SLICES[plane] - 1)
    shares = slice_structures(plane, position)
    ranked = sorted((name for name in ORGANS if name in shares), key=lambda name: -shares[name])[: len(ORDINALS)]
    asked = number % len(ranked)
    listed = ", ".join(f"the {name}" for name in ranked)
    largest = max(LARGEST[plane], key=lambda name: shares.get(name, 0.0))
    return _Facts(
        name=f"{plane}-{number:03d}",
        image=slice_image(plane, position, size),
        description=f"{plane.capitalize()} CT slice. Largest structures: {listed}.",
        sentence=f"In this {plane} slice the {ORDINALS[asked]} structure is the {BLANK}.",
        missing=ranked[asked],
        question=f"Which of these is largest in this {plane} slice?",
        choices=LARGEST[plane],
        right=largest,
    )


def _view_facts(view: str, person: int, size: int, seed: int) -> _Facts:
    key = f"general{person:02d}"
    return _Facts(
        name=f"projection-{person:02d}-{view.replace(' ', '-')}",
        image=render(key, key, view_angle=VIEWS[view], size=size, seed=seed),
        description=f"Chest radiograph in {view} projection.",
        sentence=f"This chest radiograph is a {BLANK} projection.",
        missing=view,
        question="How is the chest projected?",
        choices=tuple(VIEWS),
        right=view,
    )


def _rows(facts: _Facts, seed: int) -> list[dict]:
    path = f"general/{facts.name}"
    inline = " ".join(f"{letter}) {text}" for letter, text in zip(LETTERS, facts.choices, strict=True))
    slots = {"sentence": facts.sentence, "question": f"{facts.question} {inline}"}
    shared: dict[str, Any] = {
        "seed": seed,
        "restricted": False,
        "source": "embedded",
        "level": "section",
    }
    rows = [
        make_row(f"{path}/{task}", task, phrasings=phrasings.fill(**slots), answer=answer, choices=choices, **shared)
        for task, phrasings, answer, choices in (
            ("generation", GENERATION, facts.description, []),
            ("cloze", CLOZE, facts.missing, []),
            ("classification", CLASSIFICATION, LETTERS[facts.choices.index(facts.right)], list(facts.choices)),
        )
    ]
    return [row | {"image": facts.image} for row in rows]
