"""An OpenAI-compatible endpoint: what is sent to it, what is sent again, and what ends the asking."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from ..agreement import is_loopback
from ..errors import UserError
from .cache import ReplyCache
from .replies import Reply


if TYPE_CHECKING:
    import openai


logger = logging.getLogger(__name__)

# Five minutes for a reply of a few hundred tokens: a large model on a busy server, and no more.
TIMEOUT_SECONDS = 300.0
CONNECT_SECONDS = 10.0
# How often a request is sent again after the first time, and how long the waits between are: 0.5, 1, 2 … seconds.
RETRIES = 7
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
# Rows in a row that the endpoint fails to answer at all before it is taken for gone.
GIVE_UP = 5
# As long as it has answered nothing at all, so many tries over so many seconds are enough. A server that is loading
# its model refuses for a while; one that lets us wait for five minutes twice will not answer the next row either.
SILENT_TRIES, SILENT_SECONDS = 2, 120.0
# Requests in flight; local servers batch about so many.
CONCURRENCY = 8
_BUSY = (408, 409, 425, 429)
_UNPROCESSABLE = (400, 413, 422)
_T = TypeVar("_T")


class Unanswered(Exception):
    """A request that got no reply, however often it was sent; the row is missing."""


class Gone(Exception):
    """The endpoint answers nothing, or does not let us in: there is no point in asking for other rows."""


class _Malformed(Exception):
    """An answer that is no reply: HTML, half a JSON, no choices."""


class _Unprocessable(Unanswered):
    """The endpoint does not take this body; sending it again is of no use."""


class Budget:
    """How many requests may be sent in all, those that are sent again included.

    Args:
        limit (`int`): Requests.
    """

    def __init__(self, limit: int):
        self.limit, self.sent = limit, 0

    def spend(self) -> None:
        """Count a request, or raise [`Unanswered`] if it would be one too many."""
        if self.sent >= self.limit:
            raise Unanswered(f"the cap of {self.limit} requests is reached")
        self.sent += 1


def check_address(url: str, flag: str) -> None:
    """Refuse what is no plain http(s) address, before anything is sent or a name looked up.

    Args:
        url (`str`): The endpoint.
        flag (`str`): What the user named it by.

    Raises:
        UserError: It holds a password or a query, or is not an address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{flag}: not an address: {error}") from error
    # Never repeated in the message: the endpoint stands in records.
    if parts.username is not None or parts.password is not None:
        raise UserError(f"{flag}: must not hold a user name or password; put the key into $OPENAI_API_KEY")
    if parts.query or parts.fragment:
        raise UserError(f"{flag}: must not hold a query or fragment; put the key into $OPENAI_API_KEY")
    # What Python's and the client's parser could read differently has no place in an address.
    plain = re.fullmatch(r"[!-~]+", url) and "\\" not in url
    if parts.scheme not in ("http", "https") or not host or port == 0 or not plain:
        raise UserError(f"{flag} {url!r}: must be http://HOST… or https://HOST…")


def check_client(asker: str) -> None:
    """Raise a `UserError` that says what to install for `asker` unless the `openai` client is there."""
    if importlib.util.find_spec("openai") is None:
        raise UserError(f"{asker}: needs the openai client: pip install 'medforget[llm]'")


def check_connection(url: str, flag: str) -> None:
    """Refuse an endpoint to which there is no connection; whatever it answers, it is there.

    The list of models is asked for, which costs nothing, and without the key. A redirect is not followed.

    Args:
        url (`str`): The endpoint, as [`check_address`] lets it pass.
        flag (`str`): What the user named it by.

    Raises:
        UserError: The connection is refused, or the host unknown or out of reach.
    """
    import openai

    transport = openai.DefaultHttpxClient(follow_redirects=False, trust_env=not is_loopback(url))
    with openai.OpenAI(
        base_url=url, api_key="none", http_client=transport, max_retries=0, timeout=CONNECT_SECONDS
    ) as client:
        try:
            client.models.with_raw_response.list()
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            # Other kinds: it has taken the connection, and what it does with requests that matter is seen there.
            if type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError"):
                reason = str(cause) or type(cause).__name__
                raise UserError(
                    f"{flag} {url}: no connection: {reason}; start the server, or mend the address"
                ) from error
        except openai.APIStatusError:
            pass  # An answer too.


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in a notebook too, which has a loop of its own running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


class Endpoint:
    """The endpoint with its cache; `async with` it. What is in the cache is not sent.

    The key is read from `$OPENAI_API_KEY`. Redirects are not followed, so that no server can send a report on to
    another, and an endpoint on this machine is spoken to directly whatever proxies the environment names.

    Args:
        url (`str`): Base address.
        cache ([`~medforget_dataset.llm.cache.ReplyCache`]): Replies so far.
        forms (`Sequence[str]`, *optional*): Forms in which a request can be put, the most demanding first. What the
            server refuses is not used again.
        budget ([`Budget`], *optional*): Requests that may be sent; without one there is no cap.
    """

    def __init__(
        self,
        url: str,
        cache: ReplyCache,
        *,
        forms: Sequence[str] = ("json_schema", "json_object"),
        budget: Budget | None = None,
    ):
        self.url, self.cache, self.forms, self.budget = url, cache, tuple(forms), budget
        self.tokens = self.cached = 0
        self._key = os.environ.get("OPENAI_API_KEY") or "none"
        self._form: str | None = None
        self._first = asyncio.Lock()
        self._sending: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failed_in_a_row = self._tries = 0
        self._has_answered = False
        self._first_sent: float | None = None

    async def __aenter__(self) -> Endpoint:
        import openai

        transport = openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=not is_loopback(self.url))
        self._client: openai.AsyncOpenAI = openai.AsyncOpenAI(
            base_url=self.url, api_key=self._key, http_client=transport, max_retries=0, timeout=TIMEOUT_SECONDS
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.close()

    async def ask(self, body_of: Callable[[str], dict[str, Any]], *, send: bool = True) -> tuple[Reply, bool] | None:
        """The reply to a request.

        Args:
            body_of (`Callable[[str], dict]`): Body of the request in a form.
            send (`bool`, *optional*, defaults to `True`): Whether to send the request if it is not in the cache.

        Returns:
            `tuple[Reply, bool]`, *optional*: The reply, and whether it was sent for now; `None` if it may not be.

        Raises:
            Unanswered: There is no reply to be had for this request.
            Gone: Nor for any other.
        """
        if self._form is None:
            # One row goes ahead, so that a server that does not know json_schema says so once and not for all rows.
            async with self._first:
                if self._form is None:
                    return await self._ask_first(body_of, send)
        return await self._answer(body_of(self._form), send)

    async def _ask_first(self, body_of: Callable[[str], dict[str, Any]], send: bool) -> tuple[Reply, bool] | None:
        refused = []
        for form in self.forms:
            body = body_of(form)
            try:
                answer = await self._answer(body, send)
            except _Unprocessable as error:
                if form == self.forms[-1]:
                    raise
                refused.append((body, str(error)))
                continue
            if answer:
                self._form = form
                for other, reason in refused:
                    self.cache.put(other, {"unprocessable": reason})
            break
        return answer

    async def _answer(self, body: dict[str, Any], send: bool) -> tuple[Reply, bool] | None:
        # What is asked in the same words has the same body: the second waits for the first's reply.
        async with self._sending[json.dumps(body["messages"])]:
            known = self.cache.get(body)
            if known is not None:
                if "unprocessable" in known:
                    raise _Unprocessable(known["unprocessable"])
                self.cached += 1
                return Reply(**known), False
            if not send:
                return None
            reply = await self._send_until_answered(body)
            self.cache.put(body, reply._asdict())
            return reply, True

    async def _send_until_answered(self, body: dict[str, Any]) -> Reply:
        import openai

        if self._first_sent is None:
            self._first_sent = time.monotonic()
        for retry in range(RETRIES + 1):
            is_slow = False
            wait = min(FIRST_WAIT_SECONDS * 2**retry, LONGEST_WAIT_SECONDS) * (1 - random.random() / 4)
            if self.budget:
                self.budget.spend()
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    reply = await self._send(body)
                self._failed_in_a_row, self._has_answered = 0, True
                return reply
            except (TimeoutError, openai.APITimeoutError):
                reason, gone, is_slow = f"no reply in {TIMEOUT_SECONDS:g} seconds", False, True
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                reason, gone = f"{type(cause).__name__}: {cause}", type(cause).__name__ == "ConnectError"
            except _Malformed as error:
                reason, gone = str(error), False
            except openai.APIStatusError as error:
                reason, gone = self._reason(error), False
                wait = max(wait, _retry_after(error))
            self._check_silence(reason, time.monotonic() - self._first_sent)
            if retry < RETRIES:
                # Hundreds of rows may each be put off for a moment; what costs minutes is told every time.
                level = logging.WARNING if is_slow or not self._has_answered else logging.INFO
                logger.log(level, "%s: %s, trying again (%d of %d)", self.url, reason, retry + 2, RETRIES + 1)
                await asyncio.sleep(wait)
        self._failed_in_a_row += 1
        if gone or self._failed_in_a_row >= GIVE_UP:
            raise Gone(reason)
        raise Unanswered(reason)

    def _check_silence(self, reason: str, seconds: float) -> None:
        """Count a try that failed, and raise [`Gone`] if the endpoint has had its time and answered nothing yet."""
        self._tries += 1
        if not self._has_answered and self._tries >= SILENT_TRIES and seconds >= SILENT_SECONDS:
            raise Gone(f"{reason}, and nothing was answered in {self._tries} tries over {seconds:.0f} seconds")

    def _reason(self, error: openai.APIStatusError) -> str:
        """What a status says, if the request may be sent again."""
        status, message = error.status_code, self._shortened(error.message)
        if error.code == "insufficient_quota":
            raise Gone(message) from error
        if status in _UNPROCESSABLE:
            raise _Unprocessable(message) from error
        if 300 <= status < 400:
            raise Gone(f"answers {status}, a redirect, and these are not followed; name the final address") from error
        if status < 500 and status not in _BUSY:
            raise Gone(message) from error
        return message

    async def _send(self, body: dict[str, Any]) -> Reply:
        raw = await self._client.chat.completions.with_raw_response.create(**body)
        text = raw.http_response.text
        try:
            answer = json.loads(text)
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            message = choice["message"]
            reply = Reply(
                content=message.get("content") or "",
                refusal=message.get("refusal") or "",
                finish_reason=choice.get("finish_reason") or "",
                model=answer.get("model") or "",
            )
            self.tokens += int(usage.get("prompt_tokens") or 0) + int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Malformed(f"answers 200 with something that is no reply: {self._shortened(text)!r}") from error
        if not all(isinstance(value, str) for value in reply):
            raise _Malformed("answers 200 with a reply whose text is not text")
        return reply

    def _shortened(self, text: str) -> str:
        # Some servers repeat the key that they refuse.
        line = " ".join(text.replace(self._key, "…" if self._key != "none" else "none").split())
        return line if len(line) <= 160 else f"{line[:160]}…"


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the server asks us to wait, up to a minute; 0 if it does not say."""
    value = error.response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
            seconds = when.timestamp() - parsedate_to_datetime(error.response.headers["date"]).timestamp()
        except (ValueError, TypeError, KeyError):
            seconds = 0.0
    return max(0.0, min(seconds, LONGEST_WAIT_SECONDS))


async def ask_each(
    endpoint: Endpoint,
    asks: Sequence[_T],
    ask_one: Callable[[_T], Awaitable[None]],
    *,
    concurrency: int,
    description: str,
) -> None:
    """Ask for many rows at a time, with a progress bar.

    Args:
        endpoint ([`Endpoint`]): Not yet entered.
        asks (`Sequence`): What is asked for.
        ask_one (`Callable`): Asks for one of them and keeps the answer.
        concurrency (`int`): How many at a time.
        description (`str`): Stands before the bar.

    Raises:
        Gone: The endpoint answers nothing, or does not let us in.
    """
    waiting = iter(asks)
    with tqdm(total=len(asks), desc=description, unit="row") as bar:
        async with endpoint:

            async def work() -> None:
                for ask in waiting:
                    await ask_one(ask)
                    bar.set_postfix_str(f"{endpoint.tokens} tokens, {endpoint.cached} cached", refresh=False)
                    bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(asks))):
                        group.create_task(work())
            except ExceptionGroup as group_of_errors:
                raise group_of_errors.exceptions[0] from None
