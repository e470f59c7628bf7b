"""Questions that a language model writes: asked for row by row, checked by rule, and never fewer than there should be.

The paper had DeepSeek-V3 write them (sections 3.2 and 3.3). The result depends on the sections, the options and the
replies, not on the order in which replies arrive or on how often a build was interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ...agreement import check_endpoint
from ...build_log import BuildLog, SourceError
from ...errors import UserError
from ...hierarchy import StudyNode, stable_number
from ...llm.cache import ReplyCache, default_folder
from ...llm.client import CONCURRENCY, Endpoint, Gone, Unanswered, ask_each, check_address, check_client, run
from ...llm.replies import Unusable
from ...options import BuildOptions
from ..classification import LETTERS
from ..phrasings import Phrasings, SectionQuestions
from .prompts import Ask, request
from .replies import Draft, read_reply
from .wordings import set_apart


__all__ = ["CONCURRENCY", "check_llm", "default_folder", "llm_questions"]

# How often a row is asked for in one build, each time with what was wrong before.
ATTEMPTS = 3
_TASKS = ("generation", "cloze", "classification")


class _Outcome(NamedTuple):
    """A row's draft, or why it is missing; and why each earlier reply could not be used."""

    draft: Draft | None
    problem: str
    refused: tuple[str, ...]
    model: str = ""


def check_llm(options: BuildOptions, *, restricted: bool) -> None:
    """Refuse an endpoint that is not fit to be sent reports, before anything is sent or a name looked up.

    Args:
        options ([`~medforget_dataset.options.BuildOptions`]): Names endpoint and model.
        restricted (`bool`): Whether the reports must not leave this machine.

    Raises:
        UserError: No endpoint or model is named, the endpoint is not a plain http(s) address, or restricted text must
            not go there.
    """
    if not options.endpoint or not options.llm_model:
        raise UserError("--questions llm: needs --endpoint URL and --llm-model NAME")
    check_address(options.endpoint, "--endpoint")
    check_endpoint(options.endpoint, restricted=restricted, complies=options.endpoint_complies)


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
    check_client("--questions llm")
    asks, cache = _asks(nodes, image, options.seed), cache or default_folder()
    outcomes = run(_ask_all(asks, options, ReplyCache(cache), concurrency))
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


async def _ask_all(asks: list[Ask], options: BuildOptions, cache: ReplyCache, concurrency: int) -> dict[str, _Outcome]:
    outcomes: dict[str, _Outcome] = {}
    endpoint = Endpoint(options.endpoint, cache)

    async def ask_one(ask: Ask) -> None:
        outcomes[ask.id] = await _ask_one(ask, endpoint, options)

    try:
        await ask_each(endpoint, asks, ask_one, concurrency=concurrency, description=f"asking {options.llm_model}")
    except Gone as error:
        raise UserError(
            f"--endpoint {options.endpoint}: {error}; {len(asks) - len(outcomes)} of {len(asks)} rows are "
            f"missing; what was answered is kept in {cache.folder}: build again to go on"
        ) from error
    return {ask.id: outcomes[ask.id] for ask in asks}


async def _ask_one(ask: Ask, endpoint: Endpoint, options: BuildOptions) -> _Outcome:
    refused: list[str] = []
    limit = None

    def body(form: str) -> dict[str, Any]:
        by_schema = form == "json_schema"
        return request(ask, refused, model=options.llm_model, seed=options.seed, by_schema=by_schema)

    while True:
        # What an earlier build was answered does not count against this one, so that building again tries again; but a
        # build that was interrupted ends with as many attempts as one that was not.
        most = ATTEMPTS if options.on_error == "skip" else ATTEMPTS * (len(refused) // ATTEMPTS + 1)
        allowed = limit or most
        try:
            answer = await endpoint.ask(body, send=len(refused) < allowed)
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
