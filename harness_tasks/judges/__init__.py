"""Who marks how factual a generated section is, behind one interface: `lexical`, offline, or `llm`, over an endpoint.

docs/gen-score.md says what each of them is, and what it is not.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from medforget_dataset.errors import UserError


logger = logging.getLogger(__name__)

JUDGES = ("lexical", "llm")
# Weight of factuality in the Gen Score; the rest is ROUGE-L's (paper, section 4.1).
FACTUALITY_WEIGHT = 0.75


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, and how it is asked. lm-eval takes the same as `--metadata judge=…,judge_endpoint=…`.

    Args:
        judge (`str`, *optional*, defaults to `"lexical"`): `"lexical"` or `"llm"`.
        endpoint (`str`, *optional*): Base address of an OpenAI-compatible endpoint, for `"llm"`.
        model (`str`, *optional*): The model's name there.
        max_requests (`int`, *optional*, defaults to `20000`): Requests that one process may send, those that are sent
            again included; all levels of one checkpoint at full scale need some 5,000. What is left has no mark.
        complies (`str`, *optional*): Who agreed, under what terms, that restricted text may go to `endpoint`.
        cache (`str`, *optional*): Folder that keeps the replies, by default `judge` in `$MEDFORGET_CACHE`.
        concurrency (`int`, *optional*, defaults to `8`): Requests in flight. No mark depends on it.

    Raises:
        UserError: The judge is unknown, or a setting is missing, of no use, or not a number where it must be one.

    Example:
        >>> metadata = {"judge": "llm", "judge_endpoint": "http://127.0.0.1/v1", "judge_model": "m"}
        >>> JudgeSettings.from_metadata(metadata).name
        'llm:m'
    """

    judge: str = "lexical"
    endpoint: str = ""
    model: str = ""
    max_requests: int = 20_000
    complies: str = ""
    cache: str = ""
    concurrency: int = 8

    def __post_init__(self):
        if self.judge not in JUDGES:
            raise UserError(f"judge {self.judge}: unknown; choose from {', '.join(JUDGES)}")
        if self.judge == "llm" and not (self.endpoint and self.model):
            raise UserError("judge llm: needs judge_endpoint, a URL, and judge_model, a name")
        given = [name for name in ("endpoint", "model", "complies", "cache") if getattr(self, name)]
        if self.judge != "llm" and given:
            raise UserError(f"judge_{given[0]}: is for judge=llm; judge {self.judge} asks nobody")
        for name in ("max_requests", "concurrency"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"judge_{name} {value!r}: must be a whole number of at least 1")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> JudgeSettings:
        """The settings among lm-eval's metadata; keys that do not begin with `judge` are others' business."""
        defaults = asdict(cls())
        keys = {"judge": "judge"} | {f"judge_{name}": name for name in defaults if name != "judge"}
        given = {key: value for key, value in metadata.items() if key.startswith("judge")}
        unknown = [key for key in given if key not in keys]
        if unknown:
            raise UserError(f"{unknown[0]}: unknown; the judge's settings are {', '.join(keys)}")
        # The command line makes numbers of what looks like one, a model's name too.
        values: dict[str, Any] = {
            keys[key]: value if keys[key] in ("max_requests", "concurrency") else str(value)
            for key, value in given.items()
        }
        return cls(**values)

    def metadata(self) -> dict[str, Any]:
        """The settings as lm-eval's metadata, without those that are as by default."""
        defaults = asdict(JudgeSettings())
        changed = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return {"judge": self.judge} | {f"judge_{name}": value for name, value in changed.items() if name != "judge"}

    @property
    def name(self) -> str:
        """What stands beside every number of this judge."""
        return f"llm:{self.model}" if self.judge == "llm" else self.judge


class Answered(NamedTuple):
    """A generated section to be marked: what was asked, what is right, what was answered; and whether the texts stand
    under an agreement."""

    question: str
    reference: str
    answer: str
    restricted: bool


class Mark(NamedTuple):
    """What a judge says of an answer.

    Args:
        value (`float`, *optional*): From 1, wrong or empty of sense, to 10, all right; `None` if there is no mark.
        reason (`str`): Why so, or why there is none.
    """

    value: float | None
    reason: str = ""


class Judge(Protocol):
    """What every judge can do."""

    def check(self, *, restricted: bool) -> None:
        """Raise a [`~medforget_dataset.errors.UserError`] if it cannot be asked, or not about restricted texts."""

    def marks(self, answers: Sequence[Answered]) -> list[Mark]:
        """The mark of each answer, in order.

        Raises:
            UserError: No marks are to be had at all.
        """


def get_judge(settings: JudgeSettings) -> Judge:
    """The judge of these settings."""
    if settings.judge == "llm":
        from .llm import LLMJudge

        return LLMJudge(settings)
    from .lexical import LexicalJudge

    return LexicalJudge()


def gen_score(factuality: float, rouge_l: float) -> float:
    """The paper's Gen Score (section 4.1): 0.75 factuality + 0.25 ROUGE-L, all between 0 and 1.

    Example:
        >>> gen_score(1.0, 0.5)
        0.875
    """
    return FACTUALITY_WEIGHT * factuality + (1 - FACTUALITY_WEIGHT) * rouge_l


class Awaited(dict):
    """Place of a row's scores until the judge has been asked about all rows at once; then it holds them.

    lm-eval gives every metric's aggregation the values that the rows had for it, and logs these values afterwards.

    Args:
        settings ([`JudgeSettings`]): The judge.
        answered ([`Answered`]): What it is asked about.
        rouge_l (`float`): The row's ROUGE-L.
    """

    def __init__(self, settings: JudgeSettings, answered: Answered, rouge_l: float):
        super().__init__()
        self.settings, self.answered, self.rouge_l = settings, answered, rouge_l

    def take(self, mark: Mark) -> None:
        """Hold the scores of a mark: `factuality`, `gen_score`, `reason`; the scores are `None` if there is none."""
        factuality = None if mark.value is None else mark.value / 10
        score = None if factuality is None else gen_score(factuality, self.rouge_l)
        self.update(factuality=factuality, gen_score=score, reason=mark.reason)


def settle(items: Sequence[Any]) -> None:
    """Have those of `items` marked that are [`Awaited`] and empty, all in one pass. Numbers are left as they are.

    Raises:
        UserError: No marks are to be had at all.
    """
    waiting = [item for item in items if isinstance(item, Awaited) and not item]
    if not waiting:
        return
    settings = waiting[0].settings
    marks = get_judge(settings).marks([item.answered for item in waiting])
    for item, mark in zip(waiting, marks, strict=True):
        item.take(mark)
    why = Counter(mark.reason for mark in marks if mark.value is None)
    if why:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in why.most_common(3))
        logger.warning("judge %s: %d of %d answers have no mark: %s", settings.name, why.total(), len(marks), reasons)
