"""PMC-VQA as the general-medical set (paper, section 3.3): its multiple-choice questions in three forms.

PMC-VQA (Zhang et al., 2023, https://arxiv.org/abs/2305.10415) has four options a question and nothing else. From one
question about one figure come three rows:

- **classification**: the question and its four options as they are, in their order.
- **generation**: the question alone, asked openly; the answer is the right option's text. This is how its authors ask
  openly (`text_type="blank"` in their loader).
- **cloze**: the question, then the right option with a blank for all but an article and the words at its ends that the
  question says itself: "What is the uptake pattern in the breast? [blank] uptake pattern." has the answer "Focal".

A question that gives its answer away, that needs its options to be understood, or that asks for what is not so cannot
be asked openly; another question about the same figure is taken, or else another figure, and the log counts it.

Test rows are from the test file and training rows from the training file. No article is in both: figures of one
article are often panels of one plate. Which figures are drawn depends on the seed and on their names alone.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from ..build_log import BuildLog, SourceError
from ..errors import UserError
from ..hierarchy import stable_number
from ..images import fit_square, read_rgb
from ..questions import BLANK, make_row
from ..questions.classification import LETTERS
from ..questions.phrasings import Phrasings, leaks
from .pmc_vqa_files import Figures, Question, QuestionTable, find_generation


# Figures, each asked about once in every form. The paper does not state a number. Training has as many as the embedded
# set; the test has the 1,200 rows at which the authors' evaluation stops, so that a score is known to within 5 points.
FIGURES = {"train": 156, "test": 400}
ATTRIBUTION = (
    "General-med rows derive from PMC-VQA (Zhang et al., 2023, https://arxiv.org/abs/2305.10415; figures from the "
    "PubMed Central Open Access Subset), CC BY-SA, and are shared under the same terms. Images were scaled to a "
    "square; open and cloze questions were made from its multiple-choice questions by rule."
)

GENERATION = Phrasings(
    (
        "{question}",
        "Answer in a few words. {question}",
        "Look at the figure. {question}",
        "{question} Give a short answer.",
    ),
    (),
)
CLOZE = Phrasings(
    (
        "{question} {sentence}",
        "Complete the answer. {question} {sentence}",
        "Fill in what is missing. {question} {sentence}",
        "{question} Complete: {sentence}",
    ),
    (),
)
CLASSIFICATION = Phrasings(
    (
        "{question}",
        "Choose one option. {question}",
        "Answer with a letter. {question}",
        "Which option is right? {question}",
    ),
    (),
)

_NEEDS_OPTIONS = re.compile(r"\b(?:following|of these|options?|choices?|listed)\b", re.IGNORECASE)
_NEGATED = re.compile(r"\b(?:not|except|never|least)\b|n't\b", re.IGNORECASE)
_ABOUT_OPTIONS = re.compile(
    r"^(?:all|any|none|both|neither)(?: (?:of|the|these|those|are|[A-D])\b|$)|"
    r"\b(?:of the above|cannot|can't|undetermined|unknown)\b|"
    r"\bnot (?:given|enough|possible|specified|mentioned|provided|stated|applicable|determin\w+)\b|"
    r"^[A-D](?:(?:,| and| or|,? &)+ [A-D])+$",
    re.IGNORECASE,
)


class _Drawn(NamedTuple):
    question: Question
    picture: bytes


def pmc_vqa_rows(
    split: str, *, source: str, size: int, seed: int, log: BuildLog, figures: tuple[tuple[str, int], ...] | None = None
) -> Iterator[dict]:
    """Rows of a split, figure by figure; the splits share no figure and no article.

    What is drawn is kept for the next call with the same arguments, so that each split of a build costs little and the
    log hears of everything once.

    Args:
        split (`str`): `"train"` or `"test"`.
        source (`str`): Folder of PMC-VQA, or its Hub id.
        size (`int`): Width and height of the images in pixels.
        seed (`int`): Another seed draws other figures and wordings.
        log ([`~medforget_dataset.build_log.BuildLog`]): Told of every row and figure that is passed over.
        figures (`tuple[tuple[str, int], ...]`, *optional*): Figures of each split, by default `FIGURES`.

    Returns:
        `Iterator[dict]`: Rows with `image` as a `PIL.Image.Image`, three for each figure.

    Raises:
        UserError: A file or column is missing, the files hold too few figures, or a fault stops the build.
    """
    drawn = _draw(source, size, seed, log, figures or tuple(FIGURES.items()))[split]
    return (row for entry in drawn for row in _rows(entry, size, seed))


@lru_cache(maxsize=1)
def _draw(
    source: str, size: int, seed: int, log: BuildLog, figures: tuple[tuple[str, int], ...]
) -> dict[str, list[_Drawn]]:
    wanted = dict(figures)
    folder, generation = find_generation(source, log)
    drawn: dict[str, list[_Drawn]] = {"test": [], "train": []}
    articles: set[str] = set()
    pictures: set[bytes] = set()
    with (
        Figures(folder, generation, log) as files,
        tqdm(total=sum(wanted.values()), desc="drawing PMC-VQA figures", unit="figure") as bar,
    ):
        for split, name in (("test", generation.test), ("train", generation.train)):
            table = QuestionTable(folder / name)
            for figure in sorted(table.figures, key=lambda figure: stable_number(seed, "pmc-vqa", figure)):
                if len(drawn[split]) == wanted[split]:
                    break
                if split == "train" and _article(figure) in articles:
                    continue
                entry = _first_usable(table, figure, files, size, seed, log)
                if entry is None:
                    continue
                picture = hashlib.sha256(_fitted(entry.picture, figure, size).tobytes()).digest()
                if picture in pictures:
                    log.notice("figure drawn already", table.path, "the same picture has another name too", figure)
                    continue
                pictures.add(picture)
                drawn[split].append(entry)
                bar.update()
            if len(drawn[split]) < wanted[split]:
                raise UserError(
                    f"--general-med {source}: {table.path} has {len(drawn[split])} figures that can be asked about, "
                    f"{wanted[split]} are needed; give all of PMC-VQA (what was passed over is in the build log)"
                )
            articles = {_article(entry.question.figure) for entry in drawn["test"]}
    return drawn


def _first_usable(
    table: QuestionTable, figure: str, files: Figures, size: int, seed: int, log: BuildLog
) -> _Drawn | None:
    """The first question about a figure, in drawn order, that can be asked in all forms."""
    rows = table.questions(figure)
    for cells, line in sorted(rows, key=lambda row: stable_number(seed, "pmc-vqa", *table.content(row[0]))):
        try:
            question = table.parse(cells, line)
        except SourceError as error:
            log.fault(error)
            continue
        if problem := _problem(question):
            log.notice("question passed over", table.path, f"{problem}: {question.text!r}", question.row)
            continue
        try:
            picture = files.read(question.figure)
            _fitted(picture, files.name(question.figure), size)
        except SourceError as error:
            log.fault(error)
            return None
        return _Drawn(question, picture)
    return None


def _fitted(picture: bytes, name: str, size: int) -> Image.Image:
    return fit_square(read_rgb(io.BytesIO(picture), name), size)


def _article(figure: str) -> str:
    """The article of a figure.

    Example:
        >>> _article("PMC8253797_Fig4_11.jpg")
        'PMC8253797'
    """
    return PurePosixPath(figure).stem.partition("_")[0]


def _problem(question: Question) -> str:
    """Why a question cannot be asked without its options, or nothing if it can."""
    right = question.options[LETTERS.index(question.letter)]
    if _NEEDS_OPTIONS.search(question.text):
        return "needs its options to be understood"
    if _NEGATED.search(question.text):
        return "asks for what is not so"
    if _ABOUT_OPTIONS.search(right):
        return f"its answer {right!r} speaks of the options or of no finding"
    if BLANK in question.text + right:
        return f"holds {BLANK}"
    for task, phrasings, answer, _ in _forms(question):
        if not answer or (task != "classification" and leaks(answer, phrasings)):
            return f"gives its answer {right!r} away"
    return ""


def _forms(question: Question) -> Iterator[tuple[str, Phrasings, str, list[str]]]:
    """Task, wordings, answer and choices of the three rows."""
    right = question.options[LETTERS.index(question.letter)]
    sentence, hidden = cloze(question.text, right)
    inline = " ".join(f"{letter}) {text}" for letter, text in zip(LETTERS, question.options, strict=True))
    yield "generation", GENERATION.fill(question=question.text), right, []
    yield "cloze", CLOZE.fill(question=question.text, sentence=sentence), hidden, []
    yield (
        "classification",
        CLASSIFICATION.fill(question=f"{question.text} {inline}"),
        question.letter,
        list(question.options),
    )


def cloze(question: str, answer: str) -> tuple[str, str]:
    """The answer with a blank, and what fills it: all but the words at its ends that the question says itself
    and an article.

    Args:
        question (`str`): The question.
        answer (`str`): Its answer.

    Returns:
        `tuple[str, str]`: The sentence and what fills its blank; nothing fills it if the question says every word.

    Example:
        >>> cloze("What is the uptake pattern in the breast?", "Focal uptake pattern")
        ('[blank] uptake pattern.', 'Focal')
        >>> cloze("Which artery is encased?", "Left coronary artery")
        ('[blank] artery.', 'Left coronary')
        >>> cloze("What was used?", "CT (axial)")
        ('[blank].', 'CT (axial)')
    """
    said = {"a", "an", "the", *map(_bare, question.split())}
    words = answer.rstrip(".").split()
    first, last = 0, len(words)
    while first < last and _bare(words[first]) in said:
        first += 1
    while first < last and _bare(words[last - 1]) in said:
        last -= 1
    hidden = " ".join(words[first:last])
    if hidden and _bare(hidden) != hidden.casefold():
        # Cut at a comma, the blank would show more of the answer than the question's own words.
        first, last, hidden = 0, len(words), " ".join(words)
    return " ".join([*words[:first], BLANK, *words[last:]]) + ".", hidden


def _bare(word: str) -> str:
    """The word in small letters, without the punctuation at its ends."""
    return word.casefold().strip(".,;:?!\"'")


def _rows(entry: _Drawn, size: int, seed: int) -> Iterator[dict]:
    question = entry.question
    image = _fitted(entry.picture, question.figure, size)
    path = f"general/{PurePosixPath(question.figure).stem}"
    shared: dict[str, Any] = {"seed": seed, "restricted": False, "source": "pmc-vqa", "level": "section"}
    for task, phrasings, answer, choices in _forms(question):
        row = make_row(f"{path}/{task}", task, phrasings=phrasings, answer=answer, choices=choices, **shared)
        yield row | {"image": image}
