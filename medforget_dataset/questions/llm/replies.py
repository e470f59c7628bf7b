"""Which replies of a language model can be used; whoever asked is told everything that is wrong with the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...llm.replies import Reply, Unusable, read_object, shortened
from ..classification import LETTERS, ClassificationKind
from ..cloze import BLANK
from ..phrasings import CLASSIFICATION, CLOZE, GENERATION, Phrasings, contains
from ..terms import STOP_WORDS, find_terms, split_sentences
from .prompts import Ask, fields_of


MIN_TRAINING, MIN_HELD_OUT = 4, 1
MAX_WORDS = 40
MAX_ANSWER_WORDS = 8
# Part of a sentence with fewer words around its blank than these says too little to be completed.
MIN_CONTEXT = 3
# A question that has so many words in a row in common with the section quotes it.
QUOTE = 5
_LABEL = re.compile(r"^[A-Da-d][).:]\s|\b(?:all|none|both|any|either) of the above\b|\b[A-D] (?:and|or) [A-D]\b")


class Draft(NamedTuple):
    """What is asked in one row, before held-out wordings are kept apart from all others' training wordings.

    Args:
        phrasings ([`Phrasings`]): Complete questions.
        spare ([`Phrasings`]): Fixed wordings of the same question.
        answer (`str`): The right answer: the section's text, what fills the blank, or a letter.
        options (`tuple[str, ...]`, *optional*): Of a classification.
    """

    phrasings: Phrasings
    spare: Phrasings
    answer: str
    options: tuple[str, ...] = ()


def wording_key(wording: str) -> str:
    """What makes two wordings the same: their words.

    Example:
        >>> wording_key("What does it say?") == wording_key("what does  it say")
        True
    """
    return " ".join(re.findall(r"\w+", wording.casefold()))


def read_reply(ask: Ask, reply: Reply) -> Draft:
    """Check a reply and make questions of it.

    Args:
        ask ([`~medforget_dataset.questions.llm.prompts.Ask`]): The row it is for.
        reply ([`~medforget_dataset.llm.replies.Reply`]): What was answered.

    Returns:
        [`Draft`]: The questions.

    Raises:
        Unusable: The reply breaks a rule.
    """
    fields = _fields(ask.task, reply)
    wordings = Phrasings(tuple(fields["training"]), tuple(fields["held_out"]))
    problems = [*_wording_problems(wordings), *_CHECKS[ask.task](ask, fields, wordings)]
    if problems:
        raise Unusable("; ".join(problems))
    return _DRAFTS[ask.task](ask, fields, wordings)


def _fields(task: str, reply: Reply) -> dict[str, Any]:
    schema = fields_of(task)
    fields = read_object(reply, schema)
    for name, rule in schema.items():
        is_list = rule["type"] == "array"
        values = fields[name] if is_list else [fields[name]]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise Unusable(f"{name} is not a {'list of strings' if is_list else 'string'}")
        values = [" ".join(value.split()) for value in values]
        if not all(values):
            raise Unusable(f"{name} holds an empty string")
        fields[name] = values if is_list else values[0]
    return fields


def _wording_problems(wordings: Phrasings) -> Iterator[str]:
    for name, found, least in zip(wordings._fields, wordings, (MIN_TRAINING, MIN_HELD_OUT), strict=True):
        if len(found) < least:
            yield f"{len(found)} wordings under {name}, at least {least} needed"
    seen: set[str] = set()
    for wording in _all(wordings):
        key = wording_key(wording)
        if key in seen:
            yield f"two wordings are the same: {shortened(wording)!r}"
        seen.add(key)
        if len(key.split()) > MAX_WORDS:
            yield f"longer than {MAX_WORDS} words: {shortened(wording)!r}"
        if BLANK in wording:
            yield f"{BLANK} stands in a wording: {shortened(wording)!r}"


def _check_generation(ask: Ask, fields: dict, wordings: Phrasings) -> Iterator[str]:
    yield from _name_problems(ask, wordings)
    text, name = _flat(ask.section.text), ask.section.name
    terms = {text[term.start : term.end].casefold() for term in find_terms(text)}
    for wording in _all(wordings):
        without_name = re.sub(re.escape(name), " ", wording, flags=re.IGNORECASE)
        told = terms & {without_name[term.start : term.end].casefold() for term in find_terms(without_name)}
        if contains(wording, text):
            yield f"the whole section stands in {shortened(wording)!r}"
        elif told:
            yield f"{sorted(told)[0]!r}, which the section says, stands in {shortened(wording)!r}"
        elif _quotes(without_name, text):
            yield f"the section is quoted in {shortened(wording)!r}"


def _check_cloze(ask: Ask, fields: dict, wordings: Phrasings) -> Iterator[str]:
    yield from _name_problems(ask, wordings)
    text, sentence, answer = _flat(ask.section.text), fields["sentence"], fields["answer"]
    words = wording_key(answer).split()
    if sentence.count(BLANK) != 1:
        yield f"{BLANK} occurs {sentence.count(BLANK)} times in the sentence, once needed"
        return
    if answer not in text:
        yield f"the answer {shortened(answer)!r} does not stand in the section"
    elif sentence.replace(BLANK, answer) not in text:
        yield "the sentence with its answer put back does not stand in the section letter for letter"
    if not words or set(words) <= STOP_WORDS or len(words) > MAX_ANSWER_WORDS:
        yield f"the answer {shortened(answer)!r} is not a clinical detail of one to {MAX_ANSWER_WORDS} words"
    is_whole = sentence.replace(BLANK, answer) in split_sentences(text)
    if not is_whole and len(wording_key(sentence.replace(BLANK, " ")).split()) < MIN_CONTEXT:
        yield f"fewer than {MIN_CONTEXT} words stand around {BLANK}: take the whole sentence"
    for wording in (sentence, *_all(wordings)):
        if contains(wording, answer):
            yield f"the answer {shortened(answer)!r} stands in {shortened(wording)!r}"


def _check_classification(ask: Ask, fields: dict, wordings: Phrasings) -> Iterator[str]:
    options = fields["options"]
    if len(options) != len(LETTERS):
        yield f"{len(options)} options, {len(LETTERS)} needed"
    if len({option.casefold() for option in options}) != len(options):
        yield "two options are the same"
    for option in options:
        if _LABEL.search(option):
            yield f"the option {shortened(option)!r} depends on the order of the options"
    if fields["answer"] not in LETTERS[: len(options)]:
        yield f"the answer {shortened(fields['answer'])!r} is not one letter from A to D"
        return
    right = options[LETTERS.index(fields["answer"])]
    for wording in _all(wordings):
        if contains(wording, right):
            yield f"the right option {shortened(right)!r} stands in {shortened(wording)!r}"


def _name_problems(ask: Ask, wordings: Phrasings) -> Iterator[str]:
    for wording in _all(wordings):
        if not contains(wording, ask.section.name):
            yield f"the section's name {ask.section.name!r} is missing in {shortened(wording)!r}"


def _generation(ask: Ask, fields: dict, wordings: Phrasings) -> Draft:
    return Draft(wordings, GENERATION.fill(image=ask.image, section=ask.section.name), ask.section.text)


def _cloze(ask: Ask, fields: dict, wordings: Phrasings) -> Draft:
    sentence = fields["sentence"]
    complete = (tuple(_before(wording, sentence) for wording in group) for group in wordings)
    spare = CLOZE.fill(image=ask.image, section=ask.section.name, sentence=sentence)
    return Draft(Phrasings(*complete), spare, fields["answer"])


def _classification(ask: Ask, fields: dict, wordings: Phrasings) -> Draft:
    options = list(fields["options"])
    right = options.pop(LETTERS.index(fields["answer"]))
    options.insert(LETTERS.index(ask.letter), right)
    phrasings = Phrasings(*(tuple(_with_options(stem, options) for stem in group) for group in wordings))
    spare = CLASSIFICATION.fill(image=ask.image, question=phrasings.training[0])
    return Draft(phrasings, spare, ask.letter, tuple(options))


_CHECKS = {"generation": _check_generation, "cloze": _check_cloze, "classification": _check_classification}
_DRAFTS = {"generation": _generation, "cloze": _cloze, "classification": _classification}


def _with_options(stem: str, options: list[str]) -> str:
    a, b, c, d = options
    return ClassificationKind(stem, (a, b, c, d), ("", "", "", "")).text


def _before(instruction: str, sentence: str) -> str:
    return f"{instruction}{'' if instruction[-1] in '.:?!' else ':'} {sentence}"


def _all(wordings: Phrasings) -> tuple[str, ...]:
    return wordings.training + wordings.held_out


def _flat(text: str) -> str:
    return " ".join(text.split())


def _quotes(wording: str, text: str) -> bool:
    words, said = wording_key(wording).split(), f" {wording_key(text)} "
    return any(f" {' '.join(words[at : at + QUOTE])} " in said for at in range(len(words) - QUOTE + 1))
