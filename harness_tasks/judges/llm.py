"""A language model as the judge, over any OpenAI-compatible endpoint."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from medforget_dataset.agreement import check_endpoint
from medforget_dataset.errors import UserError
from medforget_dataset.llm.cache import ReplyCache, default_folder
from medforget_dataset.llm.client import (
    Budget,
    Endpoint,
    Gone,
    Unanswered,
    ask_each,
    check_address,
    check_client,
    check_connection,
    run,
)
from medforget_dataset.llm.replies import Unusable

from . import Answered, JudgeSettings, Mark
from .rubric import FORMS, read_mark, request


logger = logging.getLogger(__name__)

# How often an answer is asked about, each time with what was wrong with the reply before.
ATTEMPTS = 3


@functools.cache
def budget(settings: JudgeSettings) -> Budget:
    """What a process may send with these settings, for all tasks together."""
    return Budget(settings.max_requests)


@functools.cache
def _connect(endpoint: str, folder: Path) -> None:
    # Each generation task checks its judge.
    try:
        check_connection(endpoint, "judge_endpoint")
    except UserError as error:
        # A second look at the same answers needs no server.
        if not any(folder.glob("*.json")):
            raise
        logger.warning("%s; only answers that have replies in %s can be marked", error, folder)


class LLMJudge:
    """Marks by a language model; see [`~harness_tasks.judges.Judge`].

    Every reply is kept on disk under the whole request, which holds question, reference, answer, model and rubric, so
    that nothing is asked twice. An answer whose replies could not be used three times has no mark, now and whenever
    these replies are in the cache.

    Args:
        settings ([`~harness_tasks.judges.JudgeSettings`]): Endpoint and model.
    """

    def __init__(self, settings: JudgeSettings):
        self.settings = settings

    def check(self, *, restricted: bool) -> None:
        """Refuse an endpoint that must not or cannot be asked, before any text is sent.

        Raises:
            UserError: It is not a plain http(s) address, restricted text must not go there, the client is missing, or
                there is no connection and no reply in the cache either.
        """
        self._check_settings(restricted=restricted)
        _connect(self.settings.endpoint, self._folder())

    def _folder(self) -> Path:
        return Path(self.settings.cache).expanduser() if self.settings.cache else default_folder("judge")

    def _check_settings(self, *, restricted: bool) -> None:
        check_address(self.settings.endpoint, "judge_endpoint")
        flags = ("judge_endpoint", "judge_complies")
        check_endpoint(self.settings.endpoint, restricted=restricted, complies=self.settings.complies, flags=flags)
        check_client("judge llm")

    def marks(self, answers: Sequence[Answered]) -> list[Mark]:
        """The mark of each answer, in order; equal answers to equal questions are asked about once.

        Raises:
            UserError: The endpoint must not be asked, answers nothing, or does not let us in. What it has answered by
                then is kept.
        """
        self._check_settings(restricted=any(answered.restricted for answered in answers))
        asks = list(dict.fromkeys(answered._replace(restricted=False) for answered in answers))
        found = run(self._ask_all(asks, ReplyCache(self._folder())))
        return [found[answered._replace(restricted=False)] for answered in answers]

    async def _ask_all(self, asks: list[Answered], cache: ReplyCache) -> dict[Answered, Mark]:
        settings, found = self.settings, {}
        endpoint = Endpoint(settings.endpoint, cache, forms=FORMS, budget=budget(settings))

        async def ask_one(ask: Answered) -> None:
            found[ask] = await self._ask_one(ask, endpoint)

        try:
            await ask_each(
                endpoint, asks, ask_one, concurrency=settings.concurrency, description=f"judge {settings.model}"
            )
        except Gone as error:
            raise UserError(
                f"judge_endpoint {settings.endpoint}: {error}; {len(asks) - len(found)} of {len(asks)} answers have "
                f"no mark; what was answered is kept in {cache.folder}: run again to go on; the model's own answers "
                "are kept where `--use_cache` was given"
            ) from error
        return found

    async def _ask_one(self, ask: Answered, endpoint: Endpoint) -> Mark:
        refused: list[str] = []
        while len(refused) < ATTEMPTS:
            try:
                answer = await endpoint.ask(lambda form: request(ask, refused, model=self.settings.model, form=form))
            except Unanswered as error:
                return Mark(None, str(error))
            assert answer is not None  # it may be sent
            try:
                return read_mark(answer[0])
            except Unusable as error:
                refused.append(str(error))
        return Mark(None, f"no usable reply in {ATTEMPTS}, last: {refused[-1]}")
