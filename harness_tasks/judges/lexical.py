"""The judge that needs no model: how far two texts agree in their findings. A proxy, and named beside its numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from medforget_dataset.questions.terms import STOP_WORDS

from . import Answered, Mark
from .findings import Claim, claims


# What a claim of the answer counts: as the reference has it; with a side or place that only one of the two names, or
# another place; against the reference.
SAME, CLOSE, AGAINST = 1.0, 0.5, -0.5
# The paper's scale.
LOWEST, HIGHEST = 1.0, 10.0


class LexicalJudge:
    """Marks by [`agreement`]; see [`~harness_tasks.judges.Judge`]."""

    def check(self, *, restricted: bool) -> None:
        """It reads on this machine and can always be asked."""

    def marks(self, answers: Sequence[Answered]) -> list[Mark]:
        """The mark of each answer, in order: 1 without any agreement, 10 with full agreement."""
        span = HIGHEST - LOWEST
        return [Mark(LOWEST + span * agreement(answered.reference, answered.answer)) for answered in answers]


def agreement(reference: str, answer: str) -> float:
    """How far an answer says what the reference says, between 0 and 1.

    With R and A the sets of [claims][`~harness_tasks.judges.findings.claims`] of reference and answer, it is the F1

        max(0, 2 · sum of what the claims of A count / (|R| + |A|))

    A claim counts 1 if R has it; 0.5 if R has it with a side or place that only one of the two names, or in another
    place of the same side; -0.5 if it contradicts R: it rules out what R has or has what R rules out, or puts on the
    other side what A does not have on R's; and else 0. Each claim of R serves one claim of A. A reference without any
    claim is compared by its words: the F1 of the sets of words that carry content.

    Args:
        reference (`str`): What the report says.
        answer (`str`): What was answered.

    Returns:
        `float`: 1 for equal texts (case and white space aside), 0 for an empty answer.

    Example:
        >>> agreement("Small left effusion.", "Left pleural effusion is seen."), agreement("Left effusion.", "None.")
        (1.0, 0.0)
    """
    if _words(reference) == _words(answer):
        return 1.0
    right, said = claims(reference), claims(answer)
    if not right:
        return _f1(_content(reference), _content(answer))
    left_over = set(right)
    total = 0.0
    for claim in said & right:
        left_over.discard(claim)
        total += SAME
    # In an order that depends on the claims alone.
    for claim in sorted(said - right, key=_order):
        if any(_denies(claim, other) for other in right) or any(_swaps_side(claim, other) for other in left_over):
            total += AGAINST
            continue
        near = [other for other in sorted(left_over, key=_order) if _is_close(claim, other)]
        if near:
            left_over.discard(near[0])
            total += CLOSE
    return max(0.0, 2 * total / (len(right) + len(said)))


def _order(claim: Claim) -> tuple[str, str, str, list[str]]:
    return claim.finding, claim.status, claim.side, sorted(claim.places)


def _denies(claim: Claim, other: Claim) -> bool:
    if claim.finding != other.finding or {claim.status, other.status} != {"present", "absent"}:
        return False
    return claim.side == other.side or "" in (claim.side, other.side)


def _swaps_side(claim: Claim, other: Claim) -> bool:
    both = (claim.finding, "present") == (other.finding, other.status) and claim.status == "present"
    return both and {claim.side, other.side} == {"left", "right"}


def _is_close(claim: Claim, other: Claim) -> bool:
    if (claim.finding, claim.status) != (other.finding, other.status):
        return False
    return claim.side == other.side or "" in (claim.side, other.side)


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _content(text: str) -> set[str]:
    return set(re.findall(r"\w+(?:[.:]\w+)*", text.casefold())) - STOP_WORDS


def _f1(right: Collection[str], said: Collection[str]) -> float:
    return 2 * len(set(right) & set(said)) / (len(right) + len(said)) if right or said else 0.0
