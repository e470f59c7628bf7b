"""A radiology report as text to its sections, by the conventions of MIMIC-CXR.

A section is opened by a heading in capitals at the start of a line. Only what stands below a heading is a section:
text without one is never given a name. `docs/report-sections.md` compares the result with the official parser's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Report(NamedTuple):
    """The sections of a report.

    Args:
        sections (`dict[str, str]`): Key to text, in the report's order; white space is single spaces.
        oddities (`tuple[tuple[str, str], ...]`): What was out of the ordinary, as its kind and the section concerned:
            `"CRLF line ends"`, `"report without any heading"`, `"empty section"` or `"repeated section"`.
    """

    sections: dict[str, str]
    oddities: tuple[tuple[str, str], ...]


class _Headed(NamedTuple):
    """A piece of a report below its heading; the key is `None` below a heading that names a view."""

    key: str | None
    heading: str
    text: str


# Spellings of headings that MIMIC-CXR is known to use, misspellings included, separated by bars.
_SPELLINGS = {
    "examination": "exam|type of examination|type of exam",
    "indication": "indications|reason for examination|reason for exam|reason for study|clinical indication|idication|"
    "ndication",
    "clinical_history": "history|clinical information|patient history",
    "technique": "",
    "comparison": "comparisons|comparison exam|comparison film|reference exam|comparision|comparisions|comparsion|"
    "comparrison",
    "findings": "finding|findins|findindgs|findgings|findngs|findnings|finidngs|reference findings",
    "impression": "conclusion|findings and impression|findings/impression|findings/ impression|impresson|imprression|"
    "imoression|impressoin|imprssion|impresion|imperssion|mpression|impession",
    "provisional_impression": "pfi|provisional findings impression|provisional findings impression (pfi)",
    "recommendation": "recommendations|recommendation(s)",
    "notification": "notifications",
    "addendum": "",
    "wet_read": "wetread",
}
_KEYS = {
    spelling: key
    for key, spellings in _SPELLINGS.items()
    for spelling in (key.replace("_", " "), *filter(None, spellings.split("|")))
}
# In headings of any other wording, the first of these decides.
_WORDS = (
    ("impression", "impression"), ("findings", "findings"), ("indication", "indication"), ("reason for", "indication"),
    ("history", "clinical_history"), ("comparison", "comparison"), ("addendum", "addendum"),
    ("technique", "technique"), ("recommendation", "recommendation"), ("notification", "notification"),
)  # fmt: skip
# A heading such as "CHEST, TWO VIEWS:" heads what is seen, unless the report has findings of its own.
_VIEWS = re.compile(
    r"chest|portable|ribs|bone window|(?:pa|ap) and lat|lateral and (?:pa|ap)\b|"
    r"frontal (?:and|view|upright|semi-upright)|(?:two|one|pa|ap|lateral|\d) views?"
)
# Other headings of these characters are sections of their own, as the official parser has them. What has digits or
# marks as well is a line of text unless it names a known kind.
_PLAIN = re.compile(r"[a-z ()/,-]*[a-z]{2}[a-z ()/,-]*")
# A line break instead of `^`: three times as fast. A colon within a heading stands in a time of day.
_CAPITALS = r"[A-Z0-9 ()/,&'+_-]*"
_HEADING = re.compile(rf"\n[^\S\n]*([A-Z(]{_CAPITALS}(?:(?<=\d):(?=\d){_CAPITALS})*):")
# De-identification marks are three underscores; a divider is a line of many.
_BOUNDARY = re.compile(r"\n[^\S\n]*(_{10,}|FINAL REPORT|FINAL REPORT \(REVISED\))[^\S\n]*(?=\n)")
_ASIDE = re.compile(r"[\s*]*(ADDENDUM|WET ?READ)\b(?:\W|ADDENDUM)*")
_LETTER = re.compile(r"[^\W_]")
_BYTE_ORDER_MARK = "\ufeff"


def parse_report(text: str) -> Report:
    r"""Read the sections that a report names.

    Addenda and wet reads on top of a report are one section each, whatever headings stand in them, so that they
    neither replace nor swallow a section of the report itself. A section that is headed twice has both texts; one
    that has no text, or whose text was wholly de-identified (`___`), is left out.

    Args:
        text (`str`): The report as it is in the file.

    Returns:
        [`Report`]: Its sections, and what was odd about it.

    Example:
        >>> parse_report(" INDICATION:  Cough.\n \n CHEST, 2 VIEWS:\n Clear lungs.\n \n IMPRESSION:  Normal.").sections
        {'indication': 'Cough.', 'findings': 'Clear lungs.', 'impression': 'Normal.'}
    """
    oddities: list[tuple[str, str]] = []
    if "\r" in text:
        oddities.append(("CRLF line ends", ""))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    asides, own = _split_asides(f"\n{text.removeprefix(_BYTE_ORDER_MARK)}\n")
    pieces = [*asides, *_split_headings(own)]
    if not pieces:
        oddities.append(("report without any heading", ""))
    has_findings = any(piece.key == "findings" and _LETTER.search(piece.text) for piece in pieces)
    sections: dict[str, str] = {}
    for key, heading, below in pieces:
        content = " ".join(below.split())
        if not _LETTER.search(content):
            if key and "_" not in content:  # an empty view was the report's title
                oddities.append(("empty section", key))
            continue
        if key is None:
            key = _slug(heading.lower()) if has_findings else "findings"
        if content != sections.setdefault(key, content):
            oddities.append(("repeated section", key))
            sections[key] += f" {content}"
    return Report(sections, tuple(oddities))


def _split_asides(text: str) -> tuple[list[_Headed], str]:
    """Addenda and wet reads, and the report itself."""
    parts = _BOUNDARY.split(text)
    if len(parts) <= 3 and not parts[0].strip():  # nothing but a title on top: nearly every report
        return [], parts[-1]
    blocks = [part for part in zip(parts[::2], [*parts[1::2], ""], strict=True) if part[0].strip()]
    titles = [_ASIDE.match(block) for block, _ in blocks]
    reports = [not title and any(_headings(block)) for title, (block, _) in zip(titles, blocks, strict=True)]
    if not any(reports) and blocks:  # the last one is the report, whatever stands on top of it
        titles[-1] = None
    asides, own = [], []
    for number, (title, (block, end)) in enumerate(zip(titles, blocks, strict=True)):
        if title:
            key = "addendum" if title[1] == "ADDENDUM" else "wet_read"
            asides.append(_Headed(key, title[1], block[title.end() :]))
        elif end.startswith("_") and any(reports[number + 1 :]):
            asides.append(_Headed("addendum", "the text above the divider", block))
        else:
            own.append(block)
    return asides, "\n".join(own)


def _split_headings(text: str) -> list[_Headed]:
    found = list(_headings(text))
    ends = [match.start() for _, match in found[1:]] + [len(text)]
    return [_Headed(key, match[1].strip(), text[match.end() : end]) for (key, match), end in zip(found, ends)]  # noqa: B905


def _headings(text: str) -> Iterator[tuple[str | None, re.Match[str]]]:
    """The headings that open a section, each with its key, `None` for a view."""
    below, opened = -1, ""
    for match in _HEADING.finditer(text):
        name = " ".join(match[1].lower().split())
        known, key, end = name in _KEYS, _key(name), match.end()
        if key == "" or not (known or text[end].isspace()):
            continue  # "AT 10:20" and "RATIO 3:1" head nothing, "FINDINGS:Clear" does
        if opened and not known and not text[below : match.start()].strip(" \t"):
            continue  # directly below an empty heading, capitals are the first words of its text
        below, opened = end, key or ""
        yield key, match


@lru_cache(maxsize=4096)
def _key(name: str) -> str | None:
    """The key of a heading in small letters; `None` for a view, empty if it heads nothing."""
    if name in _KEYS:
        return _KEYS[name]
    for word, key in _WORDS:
        if word in name:
            return key
    if name.startswith("exam"):
        return "examination"
    if _VIEWS.search(name):
        return None
    return _slug(name) if _PLAIN.fullmatch(name) else ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")
