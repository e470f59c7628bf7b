"""What the page shows as HTML: images, questions and answers, who forgets what, and what checkpoints answered."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from medforget_dataset.hierarchy import LEVELS

from .catalogue import FORGOTTEN, GENERAL, Catalogue, Place, Row, base_id


LETTERS = "ABCDEFGH"
EMBEDDED = "<b>These are not patients.</b> Radiographs are computed from one public chest CT; texts are generated."
RESTRICTED = "<b>Restricted.</b> Under a data use agreement: it stays on this machine and must not be shared."
FORGOTTEN_MARK = "✕"
PROBABILITIES = ("Probability", "Plain")
NO_GUARANTEE = "Unlearning is not a guarantee of privacy: a score says what the questions asked still bring back."


def data_uri(image: bytes) -> str:
    """A JPEG, as every image of the dataset is, as the `src` of an HTML image."""
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def banner(catalogue: Catalogue, restricted: Sequence[str]) -> str:
    """The head of the page: what is shown, and what has to be known about it."""
    notes = [f'<p class="mf-note mf-restricted">{RESTRICTED}</p>'] if restricted else []
    if catalogue.record["options"].get("corpus") == "embedded":
        notes.append(f'<p class="mf-note">{EMBEDDED}</p>')
    notes.append(f'<p class="mf-note mf-quiet">{NO_GUARANTEE}</p>')
    title = f'<h1>MedForget <span class="mf-name">{escape(catalogue.name)}</span></h1>'
    return f'<header class="mf-head">{title}{"".join(notes)}</header>'


def counts(catalogue: Catalogue, rows: Sequence[Row], images: int, place: Place) -> str:
    """How many rows and images are chosen, and how many of them each level forgets."""
    total = catalogue.sizes[place.config]
    noun = "image" if images == 1 else "images"
    head = f"<b>{len(rows):,}</b> of {total:,} rows of <code>{place.config}</code>, about <b>{images:,}</b> {noun}."
    if place.config == GENERAL:
        return f'<p class="mf-counts">{head} They belong to no hierarchy, and no level forgets them.</p>'
    states = [catalogue.states(row["id"]) for row in rows]
    of_levels = []
    for level in LEVELS:
        forgotten = sum(state[level] == FORGOTTEN for state in states)
        of_levels.append(f'<span class="mf-share"><span>{level}</span> {forgotten:,}</span>')
    legend = f'<span class="mf-quiet">{FORGOTTEN_MARK} forgotten at its own level</span>'
    return f'<p class="mf-counts">{head} Forgotten at each level: {"".join(of_levels)}{legend}</p>'


def study(catalogue: Catalogue, rows: Sequence[Row], position: str) -> str:
    """An image with its turned view, and the questions of these rows, which are all about it; `position` heads it."""
    if not rows:
        return '<p class="mf-empty">No row matches. Set a filter back to “all”.</p>'
    first = rows[0]
    cards = "".join(card(catalogue, row) for row in rows)
    path = " › ".join(escape(first[level]) for level in LEVELS[:3] if first[level])
    path = path or escape(first["id"].rpartition("/")[0])
    images = _images(catalogue, first)
    head = f'<p class="mf-position mf-quiet">{position}</p><h2>{path}</h2>'
    return f'<div class="mf-study"><div class="mf-images">{head}{images}</div><div>{cards}</div></div>'


def _images(catalogue: Catalogue, row: Row) -> str:
    noun = "Radiograph" if row["institution"] else "Image"
    upright = _figure(catalogue.upright(row), noun)
    if row["id"].startswith("general/"):
        return f'<div class="mf-pair">{upright}</div>'
    turned = catalogue.turned(row)
    if turned is None:
        return (
            f'<div class="mf-pair">{upright}</div><p class="mf-quiet">No turned view: no level forgets this study.</p>'
        )
    words = f"Turned by {degrees(turned.angle)} ({escape(turned.method)})"
    return f'<div class="mf-pair">{upright}{_figure(turned.image, words)}</div>'


def _figure(image: bytes, caption: str) -> str:
    return f'<figure><img src="{data_uri(image)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def degrees(angle: float) -> str:
    """
    An angle with its sign.

    >>> degrees(-30.0)
    '−30°'
    """
    return f"{angle:+g}°".replace("-", "−")


def card(catalogue: Catalogue, row: Row) -> str:
    """A question with its answer, its other wording, and whether each level forgets it."""
    where = row["section"].replace("_", " ") or (row["level"] if row["task"] == "identity" else "")
    title = f'<span class="mf-task">{row["task"]}</span> {escape(where)}'
    parts = [f'<p class="mf-question">{escape(row["question"])}</p>', answer(row)]
    if again := _other_wording(catalogue, row):
        parts.append(again)
    states = "".join(chip(level, state) for level, state in catalogue.states(row["id"]).items())
    return (
        f'<article class="mf-card" data-id="{escape(row["id"])}"><h3>{title}<code>{escape(row["id"])}</code></h3>'
        f'{"".join(parts)}<p class="mf-states">{states}</p></article>'
    )


def answer(row: Row) -> str:
    """The answer, or the options with the right one marked."""
    if not row["choices"]:
        return f'<p class="mf-answer"><b>Answer</b> {escape(row["answer"])}</p>'
    options = []
    for letter, choice in zip(LETTERS, row["choices"], strict=False):
        text = f"{letter}) {escape(choice)}"
        options.append(f'<li class="mf-right"><b>{text} ✓</b></li>' if letter == row["answer"] else f"<li>{text}</li>")
    return (
        f'<p class="mf-answer"><b>Answer</b> {escape(row["answer"])}</p><ul class="mf-choices">{"".join(options)}</ul>'
    )


def _other_wording(catalogue: Catalogue, row: Row) -> str:
    if row["original_question"]:
        words = f"Taught as: {escape(row['original_question'])}"
    elif again := catalogue.rephrased.get(base_id(row["id"])):
        words = f"Rephrased, at {degrees(again['view_angle'])}: {escape(again['question'])}"
    else:
        return ""
    return f'<p class="mf-again">{words}</p>'


def chip(level: str, state: str) -> str:
    """Whether a level forgets a row, as a word and a colour."""
    return f'<span class="mf-chip mf-{state}" data-level="{level}" data-state="{state}"><i>{level}</i> {state}</span>'


def replies(found: Mapping[str, Any], waiting: Sequence[str], right: str, status: str) -> str:
    """
    What checkpoints answered.

    Args:
        found (`Mapping[str, Reply or str]`):
            For each checkpoint its reply, or why there is none.
        waiting (`Sequence[str]`):
            Checkpoints still to be asked.
        right (`str`):
            The right answer.
        status (`str`):
            What is being done; empty when all is done.
    """
    rows = "".join(_reply(name, reply) for name, reply in found.items())
    rows += "".join(f'<tr><th scope="row">{escape(name)}</th><td colspan="4">…</td></tr>' for name in waiting)
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Checkpoint", "Answer", "Right?", *PROBABILITIES))
    note = (
        "Probability: of the right answer and its end, per token (the report’s answer probability). Plain: of the "
        "whole of it. Right: as the report compares, after case, white space and final punctuation."
    )
    line = f'<p class="mf-status" role="status">{escape(status)}</p>' if status else ""
    table = f'<table class="mf-replies"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return (
        f'{line}<p class="mf-answer"><b>Right answer</b> {escape(right)}</p>'
        f'<div class="mf-wide">{table}</div><p class="mf-quiet">{note} {NO_GUARANTEE}</p>'
    )


def _reply(name: str, reply: Any) -> str:
    head = f'<tr data-checkpoint="{escape(name)}"><th scope="row">{escape(name)}</th>'
    if isinstance(reply, str):
        return f'{head}<td colspan="4" class="mf-failed">{escape(reply)}</td></tr>'
    mark, word = ("✓", "right") if reply.is_right else ("✗", "wrong")
    share = 100 * reply.probability
    bar = f'<span class="mf-track"><span class="mf-bar" style="width:{share:.0f}%"></span></span>'
    cells = (
        f'<td>{escape(reply.text) or "(nothing)"}</td><td class="mf-{word}">{mark} {word}</td>',
        _number(PROBABILITIES[0], reply.probability, f"{share:.2f} %{bar}"),
        _number(PROBABILITIES[1], reply.plain_probability, _plain(reply.plain_probability)),
    )
    return f"{head}{''.join(cells)}</tr>"


def _number(title: str, value: float, words: str) -> str:
    return f'<td class="mf-number" data-title="{title}" data-value="{value!r}">{words}</td>'


def _plain(probability: float) -> str:
    return f"{100 * probability:.2f} %" if probability >= 1e-4 else f"{probability:.1e}"
