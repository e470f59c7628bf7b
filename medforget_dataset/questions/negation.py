"""Which findings a sentence affirms, and which it rules out.

In the spirit of NegEx (Chapman et al., A simple algorithm for identifying negated findings and diseases in discharge
summaries, 2001): a negation reaches forward to the end of its clause, or back over it ("is not seen"); phrases that
only look like one ("no change") do not count.
"""

from __future__ import annotations

import re

from .terms import split_sentences


# What is cut out before negations are looked for: "no change in the effusion" affirms it.
_FALSE = re.compile(
    r"\b(?:no|without|not) (?:\w+ ){0,2}(?:change|increase|decrease|improvement|progression|worsening)\b"
    r"|\bnot only\b|\bno longer only\b|\bcannot (?:be )?(?:entirely |completely )?(?:rule out|ruled out|exclude\w*)",
    re.IGNORECASE,
)
_FORWARD = re.compile(
    r"\b(?:no|not|without|neither|nor|never|denies|negative for|free of|clear of|absence of|absent|lack of|"
    r"rule[sd]? out|r/o|exclude[sd]?|resolution of|resolved|removal of|removed|evaluate for|assess for|history of)\b",
    re.IGNORECASE,
)
_BACKWARD = re.compile(
    r"\b(?:(?:is|are|was|were|has been|have been) (?:\w+ )?(?:ruled out|excluded|absent|removed|resolved)|"
    r"(?:has|have|had) (?:\w+ )?(?:resolved|cleared|disappeared)|"
    r"not (?!previously)(?:\w+ )?(?:seen|present|identified|visuali[sz]ed|noted|demonstrated|evident|appreciated|"
    r"detected)|no longer (?:\w+ )?(?:seen|present|visible|identified|evident)|unlikely)\b",
    re.IGNORECASE,
)
# A finding of which something else was said before the negation came is not what the negation is about.
_VERB = re.compile(r"\b(?:is|are|was|were|has|have|had)\b.*\b(?:and|with|or)\b", re.IGNORECASE)
# Where a clause ends, and with it the reach of a negation.
_CLAUSE = re.compile(
    r"[;:]|,? \b(?:but|however|although|though|except(?: for)?|with the exception of|apart from|aside from|other than|"
    r"whereas|while|yet|which|there (?:is|are)|and (?:there )?(?:is|are))\b",
    re.IGNORECASE,
)


def first_affirmed(text: str, pattern: str) -> int | None:
    """Where a text first affirms a finding.

    Args:
        text (`str`): A section of a report.
        pattern (`str`): Regular expression of the finding; case does not matter.

    Returns:
        `int`, *optional*: Position in the text with sentences joined by one space; `None` if it is never affirmed.

    Example:
        >>> first_affirmed("No effusion. There is a pneumothorax.", "pneumothorax|effusion")
        24
        >>> first_affirmed("No focal consolidation, pleural effusion, or pneumothorax.", "pneumothorax") is None
        True
    """
    start = 0
    finding = re.compile(pattern, re.IGNORECASE)
    for sentence in split_sentences(text):
        blanked = _FALSE.sub(lambda match: "-" * len(match[0]), sentence)
        for match in finding.finditer(sentence):
            if not _is_negated(blanked, match.start(), match.end()):
                return start + match.start()
        start += len(sentence) + 1
    return None


def _is_negated(sentence: str, start: int, end: int) -> bool:
    clause_start = max((match.end() for match in _CLAUSE.finditer(sentence, 0, start)), default=0)
    following = _CLAUSE.search(sentence, end)
    clause_end = following.start() if following else len(sentence)
    if _FORWARD.search(sentence, clause_start, start):
        return True
    backward = _BACKWARD.search(sentence, end, clause_end)
    return backward is not None and not _VERB.search(sentence, end, backward.start())
