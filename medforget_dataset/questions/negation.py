"""Which findings a sentence affirms, and which it rules out.

In the spirit of NegEx (Chapman et al., A simple algorithm for identifying negated findings and diseases in discharge
summaries, Journal of Biomedical Informatics 34, 2001): a negation reaches forward to the end of its clause, or back
over it ("is not seen"); phrases that only look like one ("no change in") do not count. What is merely possible, or
cannot be excluded, is not ruled out. The libraries that do this need spaCy and a model of the language.
"""

from __future__ import annotations

import re

from .terms import split_sentences


_VERBS = r"(?:is|are|was|were|has|have|had|remains?|persists?|shows|demonstrates)"
_SEEN = (
    r"(?:seen|present|identified|visuali[sz]ed|noted|demonstrated|evident|appreciated|detected|visible|found|"
    r"observed|apparent|suspected|likely)"
)
# What is cut out before negations are looked for.
_FALSE = re.compile(
    r"\b(?:no|without|not) (?:(?:significant|interval|appreciable|definite|substantial|relevant|further|major|other|"
    r"obvious|gross|acute|large)(?:ly)? )*"
    r"(?:changes?|increase|decrease|improvement|progression|worsening|growth|difference)\b"
    r"|\bnot (?:\w+ly )?(?:changed|increased|decreased|improved|worsened|progressed|grown)\b|\bnot only\b"
    r"|\b(?:can ?not|could not|not)(?: be)?(?: \w+ly)? (?:rule out|ruled out|exclude[sd]?)\b"
    rf"|\bnot (?:clearly |well |fully )?{_SEEN} (?:previously|before|on (?:the )?(?:prior|previous|last|earlier|_))"
    rf"|\bnot (?:previously|well|fully|completely|optimally) {_SEEN}\b|, not {_SEEN} (?:previously|before)\b",
    re.IGNORECASE,
)
_FORWARD = re.compile(
    r"\b(?:no|not|without|neither|nor|never|den(?:ies|ied)|negative for|free of|clear of|absence of|lack of|"
    r"fail(?:s|ed)? to|doubt)\b|\bw/o\b",
    re.IGNORECASE,
)
# These speak of one thing, and not of all that follows.
_GONE = re.compile(r"\b(?:(?:resolution|removal|clearing|disappearance) of|resolved|removed|absent)\b", re.IGNORECASE)
_GONE_ENDS = re.compile(r",|\b(?:with|after)\b", re.IGNORECASE)
# What was or may be, and is not told to be.
_NOT_NOW = re.compile(
    r"\b(?:rule[sd]? out|r/o|to exclude|excluding|(?:evaluat|assess)\w* for|eval for|history of|h/o)(?!\w)",
    re.IGNORECASE,
)
_BACKWARD = re.compile(
    rf"\b(?:(?:{_VERBS} |been )*(?:not (?:\w+ )?{_SEEN}|no longer (?:\w+ )?{_SEEN}|unlikely|doubtful)|"
    rf"(?:{_VERBS} |been )+(?:(?!partial|incomplete|not)\w+ ){{0,2}}"
    r"(?:ruled out|excluded|absent|removed|resolved|cleared|disappeared)|resolved(?=[.,]|$))(?!\w)",
    re.IGNORECASE,
)
_NONE = re.compile(r"\w* ?[:–-] ?(?:none|no|nil|absent|negative) ?(?:[.,;]|$)", re.IGNORECASE)
# Where a clause ends, and with it the reach of a negation.
_CLAUSE = re.compile(
    r"[;:]|,? \b(?:but|however|although|though|except(?: for)?|with the exception of|apart from|aside from|other than|"
    r"whereas|while|yet|there (?:is|are)|and (?:there )?(?:is|are))\b",
    re.IGNORECASE,
)
_VERB = re.compile(rf"(?<!which )(?<!that )(?<!who )\b{_VERBS}\b", re.IGNORECASE)
# After a comma, these begin something new, unless "or" tells that the list of what is ruled out goes on.
_ANEW = re.compile(
    r", (?:and |with )?(?:a|an|the|stable|unchanged|persistent|increas\w+|decreas\w+|improv\w+|worsen\w+|small|trace|"
    r"tiny|minimal|mild|moderate|new)\b",
    re.IGNORECASE,
)
_LIST = re.compile(r"\b(?:or|nor)\b", re.IGNORECASE)
# "and cardiomegaly is unchanged", but not "and cardiomegaly is seen".
_OWN_VERB = re.compile(rf"[\w ]*?\b{_VERBS} (?!{_SEEN})", re.IGNORECASE)
_AND = re.compile(r"\band\b[^,]*$", re.IGNORECASE)


def first_affirmed(text: str, pattern: str, *, now: bool = True) -> int | None:
    """Where a text first affirms a finding.

    Args:
        text (`str`): A section of a report.
        pattern (`str`): Regular expression of the finding; case does not matter.
        now (`bool`, *optional*, defaults to `True`): Leave out what belongs to the past or is only asked about
            ("history of", "rule out").

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
            if not _is_negated(blanked, match.start(), match.end(), now):
                return start + match.start()
        start += len(sentence) + 1
    return None


def status(sentence: str, start: int, end: int) -> str:
    """What a sentence says of the finding that it names at `[start, end)`.

    Args:
        sentence (`str`): One sentence of a report.
        start (`int`), end (`int`): Where the finding stands in it.

    Returns:
        `str`: `"present"`, `"absent"` if it is ruled out, or `"asked"` if it belongs to the past or is only asked
        about ("history of", "rule out").

    Example:
        >>> [status(text, *re.search("effusion", text).span()) for text in ("An effusion.", "No effusion is seen.")]
        ['present', 'absent']
    """
    blanked = _FALSE.sub(lambda match: "-" * len(match[0]), sentence)
    if _is_negated(blanked, start, end, now=False):
        return "absent"
    return "asked" if _is_negated(blanked, start, end, now=True) else "present"


def _is_negated(sentence: str, start: int, end: int, now: bool) -> bool:
    clause_start = max((match.end() for match in _CLAUSE.finditer(sentence, 0, start)), default=0)
    following = _CLAUSE.search(sentence, end)
    clause_end = following.start() if following else len(sentence)
    if _NONE.match(sentence, end) or (now and _NOT_NOW.search(sentence, clause_start, start)):
        return True
    rest = sentence[end:clause_end]
    for cue in _FORWARD.finditer(sentence, clause_start, end):
        if not _is_out_of_reach(sentence[cue.end() : start], rest):
            return True
    for cue in _GONE.finditer(sentence, clause_start, start):
        if not _GONE_ENDS.search(sentence, cue.end(), start):
            return True
    backward = _BACKWARD.search(sentence, end, clause_end)
    # A finding of which something else was said before the negation came is not what the negation is about.
    return backward is not None and not _VERB.search(sentence, end, backward.start())


def _is_out_of_reach(between: str, rest: str) -> bool:
    """Whether a negation ends before the finding; `rest` is what follows the finding in its clause."""
    if _VERB.search(between) or (_ANEW.search(between) and not _LIST.search(rest)):
        return True
    return bool(_AND.search(between) and _OWN_VERB.match(rest))
