"""Questions that a language model writes: asked for row by row, checked by rule, and never fewer than there should be.

The paper had DeepSeek-V3 write them (sections 3.2 and 3.3). The result depends on the sections, the options and the
replies, not on the order in which replies arrive or on how often a build was interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from ...build_log import BuildLog, SourceError
from ...errors import UserError
from ...hierarchy import StudyNode, stable_number
from ...options import BuildOptions
from ..classification import LETTERS
from ..phrasings import Phrasings, SectionQuestions
from .cache import ReplyCache, default_folder
from .client import Endpoint, Gone, Unanswered, check_client, check_llm
from .prompts import Ask
from .replies import Draft, Unusable, read_reply
from .wordings import set_apart


__all__ = ["CONCURRENCY", "check_llm", "default_folder", "llm_questions"]

# How often a row is asked for in one build, each time with what was wrong before.
ATTEMPTS = 3
# Requests in flight; local servers batch about so many.
CONCURRENCY = 8
_TASKS = ("generation", "cloze", "classification")
_T = TypeVar("_T")


class _Outcome(NamedTuple):
    """A row's draft, or why it is missing; and why each earlier reply could not be used."""

    draft: Draft | None
    problem: str
    refused: tuple[str, ...]
    model: str = ""


def llm_questions(
    nodes: list[StudyNode],
    options: BuildOptions,
    *,
    templates: dict[tuple[str, str], SectionQuestions],
    image: str,
    restricted: bool,
    log: BuildLog,
    cache: Path | None = None,
    concurrency: int = CONCURRENCY,
) -> dict[tuple[str, str], SectionQuestions]:
    """Have a language model write the questions of every section.

    Args:
        nodes (`list[StudyNode]`): All studies.
        options ([`~medforget_dataset.options.BuildOptions`]): Names endpoint, model and seed.
        templates (`dict`): The deterministic questions; taken for rows that the model has no usable reply for, if the
            build passes over faults.
        image (`str`): What the questions call an image, such as `"radiograph"`.
        restricted (`bool`): Whether the reports must not leave this machine.
        log ([`~medforget_dataset.build_log.BuildLog`]): Told of every reply that could not be used.
        cache (`Path`, *optional*): Folder that keeps every reply, by default `llm` in `$MEDFORGET_CACHE` (or
            `~/.cache/medforget`).
        concurrency (`int`, *optional*, defaults to `8`): Requests in flight. The result does not depend on it.

    Returns:
        `dict`: (study path, section key) to [`~medforget_dataset.questions.SectionQuestions`].

    Raises:
        UserError: The endpoint must not be used or does not answer, or rows are missing and the build stops at faults.
    """
    check_llm(options, restricted=restricted)
    check_client()
    asks, cache = _asks(nodes, image, options.seed), cache or default_folder()
    outcomes = _run(_ask_all(asks, options, ReplyCache(cache), concurrency))
    missing = [id for id, outcome in outcomes.items() if outcome.draft is None]
    _report(outcomes, missing, options, log, cache)
    drafts = {ask.id: outcomes[ask.id].draft or _fixed(ask, templates) for ask in asks}
    try:
        phrasings, filled = set_apart(drafts, image=image)
    except ValueError as error:
        raise UserError(f"{error}: no wording is left that no other row trains on; build with another seed") from error
    for id in filled:
        log.notice("fixed wordings added", options.endpoint, "too few wordings that are not another row's", row=id)
    return {
        (node.path, section.key): _section_questions(f"{node.path}/{section.key}", phrasings, drafts)
        for node in nodes
        for section in node.study.sections
    }


def _asks(nodes: list[StudyNode], image: str, seed: int) -> list[Ask]:
    asks = [
        Ask(f"{node.path}/{section.key}/{task}", task, section, image)
        for node in nodes
        for section in node.study.sections
        for task in _TASKS
    ]
    # Dealt out in an order drawn from the ids, so that each letter is right equally often for each kind of section.
    dealt: dict[str, int] = {}
    letters = {}
    for ask in sorted(asks, key=lambda ask: stable_number(seed, "letter", ask.id)):
        if ask.task == "classification":
            dealt[ask.section.key] = number = dealt.get(ask.section.key, -1) + 1
            letters[ask.id] = LETTERS[number % len(LETTERS)]
    return [ask._replace(letter=letters.get(ask.id, ask.letter)) for ask in asks]


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own running
        return thread.submit(asyncio.run, work).result()


async def _ask_all(asks: list[Ask], options: BuildOptions, cache: ReplyCache, concurrency: int) -> dict[str, _Outcome]:
    outcomes: dict[str, _Outcome] = {}
    waiting = iter(asks)
    with tqdm(total=len(asks), desc=f"asking {options.llm_model}", unit="row") as bar:
        async with Endpoint(options, cache) as endpoint:

            async def work() -> None:
                for ask in waiting:
                    outcomes[ask.id] = await _ask_one(ask, endpoint, options.on_error)
                    bar.set_postfix_str(f"{endpoint.tokens} tokens, {endpoint.cached} cached", refresh=False)
                    bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(asks))):
                        group.create_task(work())
            except ExceptionGroup as group_of_errors:
                error = group_of_errors.exceptions[0]
                if not isinstance(error, Gone):
                    raise error from None
                raise UserError(
                    f"--endpoint {options.endpoint}: {error}; {len(asks) - len(outcomes)} of {len(asks)} rows are "
                    f"missing; what was answered is kept in {cache.folder}: build again to go on"
                ) from error
    return {ask.id: outcomes[ask.id] for ask in asks}


async def _ask_one(ask: Ask, endpoint: Endpoint, on_error: str) -> _Outcome:
    refused: list[str] = []
    limit = None
    while True:
        # What an earlier build was answered does not count against this one, so that building again tries again; but a
        # build that was interrupted ends with as many attempts as one that was not.
        allowed = limit or (ATTEMPTS if on_error == "skip" else ATTEMPTS * (len(refused) // ATTEMPTS + 1))
        try:
            answer = await endpoint.ask(ask, refused, send=len(refused) < allowed)
        except Unanswered as error:
            return _Outcome(None, str(error), tuple(refused))
        if answer is None:
            return _Outcome(None, refused[-1], tuple(refused))
        reply, sent = answer
        limit = allowed if sent else limit
        try:
            return _Outcome(read_reply(ask, reply), "", tuple(refused), reply.model)
        except Unusable as error:
            refused.append(str(error))


def _report(
    outcomes: dict[str, _Outcome], missing: list[str], options: BuildOptions, log: BuildLog, cache: Path
) -> None:
    if missing and options.on_error == "stop":
        first = "; ".join(f"{id} ({outcomes[id].problem})" for id in missing[:3])
        raise UserError(
            f"--endpoint {options.endpoint}: {len(missing)} of {len(outcomes)} rows are missing, no usable reply "
            f"for {first}{'; …' if len(missing) > 3 else ''}; what was answered is kept in {cache}: build again to "
            "ask for the missing alone, or with --on-error skip to take fixed wordings for them"
        )
    for id, outcome in outcomes.items():
        if outcome.draft is None:
            message = f"no usable reply ({outcome.problem}); takes fixed wordings"
            log.fault(SourceError("no usable reply", options.endpoint, message, row=id))
        elif outcome.refused:
            message = f"{len(outcome.refused)} replies could not be used; last: {outcome.refused[-1]}"
            log.notice("asked again", options.endpoint, message, row=id)
    models = sorted({outcome.model for outcome in outcomes.values() if outcome.model})
    message = f"{len(outcomes) - len(missing)} of {len(outcomes)} rows are worded by {', '.join(models) or 'no model'}"
    log.notice("language model", options.endpoint, f"{message} (asked for as {options.llm_model})")


def _fixed(ask: Ask, templates: dict[tuple[str, str], SectionQuestions]) -> Draft:
    asked = templates[ask.path, ask.section.key]
    if ask.task == "classification":
        return Draft(asked.classification, asked.classification, asked.letter, asked.options)
    if ask.task == "cloze":
        return Draft(asked.cloze, asked.cloze, asked.cloze_answer)
    return Draft(asked.generation, asked.generation, ask.section.text)


def _section_questions(path: str, phrasings: dict[str, Phrasings], drafts: dict[str, Draft]) -> SectionQuestions:
    generation, cloze, classification = (f"{path}/{task}" for task in _TASKS)
    a, b, c, d = drafts[classification].options
    return SectionQuestions(
        phrasings[generation],
        phrasings[cloze],
        drafts[cloze].answer,
        phrasings[classification],
        (a, b, c, d),
        drafts[classification].answer,
    )
