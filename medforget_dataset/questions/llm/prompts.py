"""What a language model is asked: one request for every row, in structured output.

One request a row, not a section: a reply that cannot be used costs one row's question again and not three, and what
is missing is named by the row's id. Servers keep the system prompt, which is the same for all rows of a task, in their
prefix cache.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ...hierarchy import Section
from ..cloze import BLANK


# As many as the fixed wordings have, so that some can be lost to another row's held-out wordings.
TRAINING, HELD_OUT = 6, 3

_WORDINGS = (
    f'Put {TRAINING} of them under "training" and {HELD_OUT} others under "held_out"; no two of all these may be '
    "alike, and each is one line of at most 40 words, in English, as a clinician would put it"
)
_FORM = "Reply with one JSON object and nothing else"

SYSTEM = {
    "generation": f"""\
You write questions for a benchmark in which a model sees a medical image and must write one section of its report.
You are given what the image is, and the section's name and text. Word the question that asks for the whole section in
different ways.
{_WORDINGS}.
- Every wording contains the section's name exactly as given.
- No wording tells what the section says: no finding, place, number, device, disease or phrase of its text.
- Every wording makes sense to someone who has the image before them and has not read the report.
{_FORM}: {{"training": [{TRAINING} strings], "held_out": [{HELD_OUT} strings]}}""",
    "cloze": f"""\
You write fill-in-the-blank questions for a benchmark in which a model sees a medical image.
You are given what the image is, and the name and text of one section of its report. Copy one sentence of it letter for
letter, and put {BLANK} in the place of one clinical detail of one to four words: a finding, side, place, size,
device, view, symptom or disease, not a word that the rest of the sentence gives away.
- "answer" is what {BLANK} replaced, letter for letter; it occurs nowhere else in the sentence.
- With the answer put back, "sentence" is exactly what the section says. {BLANK} occurs once.
Then word, in different ways, the instruction that stands before the sentence and asks to complete it.
{_WORDINGS}.
- Every instruction contains the section's name exactly as given, and neither {BLANK} nor the answer.
{_FORM}: {{"sentence": string, "answer": string, "training": [{TRAINING} strings], \
"held_out": [{HELD_OUT} strings]}}""",
    "classification": f"""\
You write multiple-choice questions for a benchmark in which a model sees a medical image.
You are given what the image is, and the name and text of one section of its report. Choose one clinical element that
the section states, and ask what it is for this image, with four options of which exactly one is right by the
section's text.
- "options" are four short phrases of the same kind, all different, each complete in itself: no letters before them and
  nothing like "all of the above", because their order will be changed.
- "answer" is the letter, A to D, of the right option in your order.
Then word the question in different ways, without its options.
{_WORDINGS}.
- Every wording asks exactly the same, fits the same options, and does not contain the right one.
{_FORM}: {{"options": [4 strings], "answer": "A", "B", "C" or "D", "training": [{TRAINING} strings], \
"held_out": [{HELD_OUT} strings]}}""",
}
_STRING = {"type": "string"}
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    "generation": {},
    "cloze": {"sentence": _STRING, "answer": _STRING},
    "classification": {
        "options": {"type": "array", "items": _STRING, "minItems": 4, "maxItems": 4},
        "answer": {"type": "string", "enum": ["A", "B", "C", "D"]},
    },
}


class Ask(NamedTuple):
    """A row whose question a language model writes.

    Args:
        id (`str`): The row's id.
        task (`str`): `"generation"`, `"cloze"` or `"classification"`.
        section ([`~medforget_dataset.hierarchy.Section`]): What is asked about.
        image (`str`): What an image is called, such as `"radiograph"`.
        letter (`str`, *optional*, defaults to `"A"`): Where the right option of a classification is put. Models have
            favourite letters, so that theirs is not kept.
    """

    id: str
    task: str
    section: Section
    image: str
    letter: str = "A"

    @property
    def path(self) -> str:
        """Address of the study."""
        return self.id.rsplit("/", 2)[0]


def fields_of(task: str) -> dict[str, dict[str, Any]]:
    """JSON schema of every field of a task's reply; all are required and there are no others."""
    wordings = {
        name: {"type": "array", "items": _STRING, "minItems": count, "maxItems": count}
        for name, count in (("training", TRAINING), ("held_out", HELD_OUT))
    }
    return _OWN_FIELDS[task] | wordings


def request(ask: Ask, refused: list[str], *, model: str, seed: int, by_schema: bool) -> dict[str, Any]:
    """Body of a request to `/chat/completions`.

    Args:
        ask ([`Ask`]): The row.
        refused (`list[str]`): Why each earlier reply for it could not be used.
        model (`str`): Name of the model at the endpoint.
        seed (`int`): Seed of the build; servers that sample take it.
        by_schema (`bool`): Whether the server knows `json_schema`; else `json_object` is asked for.

    Returns:
        `dict`: The body, the same for the same arguments.
    """
    about = {"image": ask.image, "section": ask.section.name, "text": ask.section.text}
    given = json.dumps(about, ensure_ascii=False)
    messages = [{"role": "system", "content": SYSTEM[ask.task]}, {"role": "user", "content": given}]
    if refused:
        reasons = "\n".join(f"{number}. {reason}" for number, reason in enumerate(refused, 1))
        messages.append({"role": "user", "content": f"Your earlier replies could not be used:\n{reasons}\n{_FORM}."})
    fields = fields_of(ask.task)
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    strict = {"name": ask.task, "strict": True, "schema": schema}
    form = {"type": "json_schema", "json_schema": strict} if by_schema else {"type": "json_object"}
    return {"model": model, "messages": messages, "temperature": 0, "seed": seed, "response_format": form}
