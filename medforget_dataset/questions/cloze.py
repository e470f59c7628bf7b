"""Cloze questions: which term of a section is hidden.

A blank is worth asking only if the rest of its sentence does not give it away. The sentence with its blank is called a
frame; the share of the commonest answer among all blanks with the same frame is how often a reader without the image
would guess right. Each section hides the term whose frame gives least away, and no answer is used for more than 15 %
of the sections of its kind. A section without any clinical term that we know hides one of its longer words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import NamedTuple

from ..errors import UserError
from ..hierarchy import Section, StudyNode, stable_number
from .phrasings import CLOZE, GENERATION, leaks
from .terms import STOP_WORDS, find_terms, split_sentences


BLANK = "[blank]"
MAX_SHARE = 0.15
# A word worth hiding, where no clinical term is known; shorter ones are mostly grammar, in any language.
LONG_WORD = 5
_WORD = re.compile(r"[^\W_](?:[\w'’/-]*[^\W_])?")
_HIDDEN = re.compile(r"(?i:x{2,})|\W*")


class Cloze(NamedTuple):
    """A sentence with one blank, and the term that fills it."""

    sentence: str
    answer: str


def candidates(section: Section) -> list[Cloze]:
    """Every cloze a section could be asked: one salient term hidden, and found nowhere else in its sentence.

    Where no such term is known, the longer words stand in, then any word, then any number.
    """
    if BLANK in section.text:
        return []
    found = []
    for sentence in split_sentences(section.text):
        for term in find_terms(sentence):
            answer = sentence[term.start : term.end]
            frame = sentence[: term.start] + BLANK + sentence[term.end :]
            if answer.lower() not in f"{section.name} {frame}".lower():
                found.append(Cloze(frame, answer))
    return found or _any_word(section)


def _any_word(section: Section) -> list[Cloze]:
    tiers: tuple[list[Cloze], ...] = ([], [], [])
    for sentence in split_sentences(section.text):
        for match in _WORD.finditer(sentence):
            word = match[0]
            if word.lower() in STOP_WORDS or _HIDDEN.fullmatch(word):
                continue
            frame = sentence[: match.start()] + BLANK + sentence[match.end() :]
            if not leaks(word, CLOZE.fill(section=section.name, sentence=frame)):
                is_word = any(letter.isalpha() for letter in word)
                tiers[2 if not is_word else len(word) < LONG_WORD].append(Cloze(frame, word))
    return next((tier for tier in tiers if tier), [])


def can_be_asked(section: Section) -> bool:
    """Whether a section can be asked in every form: it has something to hide, and no wording gives its text away.

    Example:
        >>> can_be_asked(Section("comparison", "None.")), can_be_asked(Section("comparison", "___."))
        (True, False)
    """
    return bool(candidates(section)) and not leaks(section.text, GENERATION.fill(section=section.name))


def choose_clozes(nodes: list[StudyNode], seed: int) -> dict[tuple[str, str], Cloze]:
    """Choose one cloze for every section of a corpus.

    The result depends on the corpus and the seed alone: sections are taken in an order drawn from their addresses.

    Args:
        nodes (`list[StudyNode]`): All studies.
        seed (`int`): Order in which sections choose, and ties.

    Returns:
        `dict`: (study path, section key) to [`Cloze`].

    Raises:
        UserError: A section holds no salient term.
    """
    options = {(node.path, section.key): candidates(section) for node in nodes for section in node.study.sections}
    guess_rate = _guess_rates(options)
    sections_of_kind = Counter(key for _, key in options)
    used: dict[str, Counter[str]] = defaultdict(Counter)
    chosen = {}
    for path, key in sorted(options, key=lambda address: stable_number(seed, "cloze", *address)):
        if not options[path, key]:
            raise UserError(
                f"{path}/{key}: no clinically salient term to hide; the section cannot be asked as a cloze"
            )
        limit = max(1, int(MAX_SHARE * sections_of_kind[key]))

        def cost(cloze: Cloze, key=key, limit=limit, path=path):
            count = used[key][cloze.answer.lower()]
            return count >= limit, guess_rate[key, cloze.sentence], count, stable_number(seed, path, *cloze)

        cloze = min(options[path, key], key=cost)
        used[key][cloze.answer.lower()] += 1
        chosen[path, key] = cloze
    return chosen


def _guess_rates(options: dict[tuple[str, str], list[Cloze]]) -> dict[tuple[str, str], float]:
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for (_, key), clozes in options.items():
        for cloze in clozes:
            answers[key, cloze.sentence][cloze.answer.lower()] += 1
    return {frame: max(counts.values()) / counts.total() for frame, counts in answers.items()}
