"""What a language model answered, and the JSON object that was asked for in it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple


# Where a server does not hold a model to JSON, many put it into a block of Markdown.
_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


class Reply(NamedTuple):
    """What a language model answered, whether it can be used or not."""

    content: str
    refusal: str
    finish_reason: str
    model: str


class Unusable(Exception):
    """A reply that breaks a rule; the message tells the model which."""


def read_object(reply: Reply, fields: Collection[str]) -> dict[str, Any]:
    """The JSON object of a reply.

    Args:
        reply ([`Reply`]): What was answered.
        fields (`Collection[str]`): The fields that it must have, and no others.

    Returns:
        `dict`: Its fields; their values are not looked at.

    Raises:
        Unusable: The reply is a refusal, is cut off, or is no such object.

    Example:
        >>> read_object(Reply('{"score": 7}', "", "stop", "m"), ["score"])
        {'score': 7}
    """
    if reply.refusal or reply.finish_reason == "content_filter":
        raise Unusable(f"refused: {shortened(reply.refusal or reply.finish_reason)}")
    if reply.finish_reason == "length":
        raise Unusable("cut off before its end (finish_reason length): be brief")
    fenced = _FENCED.fullmatch(reply.content)
    try:
        found = json.loads(fenced[1] if fenced else reply.content)
    except ValueError:
        raise Unusable(f"not JSON: {shortened(reply.content)!r}") from None
    if not isinstance(found, dict) or set(found) != set(fields):
        raise Unusable(f"not an object with exactly the fields {', '.join(fields)}")
    return found


def shortened(text: str) -> str:
    """The beginning of a text, as one line of at most 80 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:80]}…"
