"""Requests of lm-eval by what they share: equal ones are one, and questions about an image come together.

Requests hold no images, so that processes can send them to each other.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image


class Prefix(NamedTuple):
    """What questions share: the text up to and with the last image, and the digest of the images."""

    text: str
    digest: str


class Request(NamedTuple):
    """
    What is asked.

    Args:
        prefix (`Prefix`):
            What comes before the question.
        suffix (`str`):
            The question.
        arguments (`dict[str, Any]` or `str`):
            How to decode, or the continuation to score.
        cache_key (`str`):
            What lm-eval keeps the answer under; empty if it keeps none.
    """

    prefix: Prefix
    suffix: str
    arguments: Any
    cache_key: str

    @property
    def decoding(self) -> str:
        """The arguments as text: requests with the same can be decoded together."""
        return json.dumps(self.arguments, sort_keys=True, default=repr)

    @property
    def key(self) -> str:
        """What makes two requests the same."""
        return hashlib.sha256(json.dumps([*self.prefix, self.suffix, self.decoding]).encode()).hexdigest()


class Row(NamedTuple):
    """Tokens to pass behind a prefix, and the requests that they answer, each with the tokens to be scored."""

    tokens: tuple[int, ...]
    owners: list[tuple[Request, list[int]]]


class Part(NamedTuple):
    """Rows behind one prefix that are passed through the model together."""

    text: str
    images: Sequence[Image.Image]
    rows: list[Row]


def digest(images: Iterable[Image.Image]) -> str:
    """Digest of what images show."""
    found = hashlib.sha256()
    for image in images:
        found.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return found.hexdigest()


def by_prefix(
    requests: Iterable[Request],
    images: Mapping[str, Sequence[Image.Image]],
    tokens: Callable[[Request], tuple[list[int], list[int]]],
) -> list[Part]:
    """
    Requests by prefix, the largest images first, each with its rows, the shortest first; equal rows are one.

    Args:
        requests (`Iterable[Request]`):
            What is asked.
        images (`Mapping[str, Sequence[Image.Image]]`):
            Images by their digest.
        tokens (`Callable`):
            Gives the tokens to pass for a request, and those to be scored.
    """
    rows: dict[Prefix, dict[tuple[int, ...], Row]] = defaultdict(dict)
    for request in requests:
        passed, scored = tokens(request)
        row = rows[request.prefix].setdefault(tuple(passed), Row(tuple(passed), []))
        row.owners.append((request, scored))
    parts = [
        Part(prefix.text, images[prefix.digest], sorted(own.values(), key=lambda row: len(row.tokens)))
        for prefix, own in rows.items()
    ]
    return sorted(parts, key=lambda part: -sum(image.width * image.height for image in part.images))


def batches(parts: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """Parts in batches of at most `size` rows; one that is larger is cut."""
    batch: list[Part] = []
    filled = 0
    for part in parts:
        for start in range(0, len(part.rows), size):
            piece = part._replace(rows=part.rows[start : start + size])
            if batch and filled + len(piece.rows) > size:
                yield batch
                batch, filled = [], 0
            batch.append(piece)
            filled += len(piece.rows)
    if batch:
        yield batch


def share_out(asked: Sequence[Mapping[str, Request]], done: Mapping[str, Any]) -> list[list[Request]]:
    """
    Divide what several processes ask: all questions about an image to one of those that have it, as evenly as it goes.

    Args:
        asked (`Sequence[Mapping[str, Request]]`):
            The requests of each process by their keys; the same on all processes.
        done (`Mapping[str, Any]`):
            Answers that are there already, by the keys of their requests.

    Returns:
        `list[list[Request]]`: What each process has to answer.
    """
    left: dict[Prefix, dict[str, Request]] = defaultdict(dict)
    holders: dict[Prefix, set[int]] = defaultdict(set)
    for process, requests in enumerate(asked):
        for key, request in requests.items():
            holders[request.prefix].add(process)
            if key not in done:
                left[request.prefix][key] = request
    shares: list[list[Request]] = [[] for _ in asked]
    for prefix, requests in sorted(left.items(), key=lambda item: -len(item[1])):
        least = min(sorted(holders[prefix]), key=lambda process: len(shares[process]))
        shares[least].extend(requests.values())
    return shares
