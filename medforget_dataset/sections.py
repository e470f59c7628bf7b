"""A radiology report's text as its sections: what stands under each heading, and nothing that does not.

The conventions are MIMIC-CXR's: a heading is upper-case words and a colon at the beginning of a line, `___` hides what
was de-identified, and addenda stand above the report, divided from it by a line of underscores. Results are those of
the official parser (MIT-LCP/mimic-cxr, `txt/section_parser.py`) where that is right; `docs/report-sections.md` lists
each difference.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple


# At the beginning of a line, however far it is indented; digits too, as in "CHEST, 2 VIEWS:".
_HEADING = re.compile(r"^[ \t]*([A-Z0-9][A-Z0-9 ()/,&#'+-]{1,60}):", re.MULTILINE)
_DIVIDER = re.compile(r"^[ \t]*_{10,}[ \t]*$|^[ \t]*FINAL REPORT(?: \(REVISED\))?[ \t]*$", re.MULTILINE)
_WORDS = re.compile(r"[A-Z]{2}")

_NAMES = {
    "impression": "conclusion, conclusions, impressions, summary, opinion, findings and impression",
    "findings": "finding",
    "indication": "indications, reason for exam, reason for examination, reason for the exam, reason for study, "
    "clinical indication, clinical indications, reason for this examination",
    "clinical_history": "history, clinical information, patient history, clinical data, clinical background, pfi",
    "examination": "exam, type of examination, type of exam, examinations, study, exam type",
    "technique": "techniques, technical details",
    "comparison": "comparisons, reference exam, comparison exam, comparison study, comparison studies, prior studies",
    "recommendation": "recommendations",
    "notification": "notifications, communication",
    "wet_read": "wet read, preliminary report, preliminary read",
}
_KNOWN = {name: key for key, names in _NAMES.items() for name in (key.replace("_", " "), *names.split(", "))}
# In this order: what names an impression and a finding at once is an impression.
_PARTS = (
    ("impression", "impression"),
    ("finding", "findings"),
    ("history", "clinical_history"),
    ("comparison", "comparison"),
    ("addend", "addendum"),
    ("indication", "indication"),
    ("technique", "technique"),
    ("examination", "examination"),
    ("recommendation", "recommendation"),
    ("notification", "notification"),
)
_VIEW = re.compile(
    r"(?:(?:\d|one|two|single|portable|upright|supine|semi-?(?:upright|erect)|frontal|lateral|ap|pa|bedside) )*"
    r"(?:chest|portable|upright|supine|pa and lateral|ap and lateral|frontal and lateral|(?:\d |two |one )?views?\b|"
    r"ap|pa|lateral|frontal|radiographs?)\b"
)
VIEW = "view"


class Report(NamedTuple):
    """A report that was read.

    Args:
        sections (`dict[str, str]`): Key to text, in the report's order; white space collapsed, none empty.
        oddities (`tuple[tuple[str, str], ...]`): What was out of the ordinary: its kind, and the section's key if it
            is about one.
    """

    sections: dict[str, str]
    oddities: tuple[tuple[str, str], ...]


def parse_report(text: str) -> Report:
    r"""Read the sections of a report.

    Args:
        text (`str`): The whole report; any line ends.

    Example:
        >>> parse_report(" FINDINGS:  Clear lungs.\n \n IMPRESSION:\n No pneumonia.").sections
        {'findings': 'Clear lungs.', 'impression': 'No pneumonia.'}
    """
    oddities: list[tuple[str, str]] = []
    if "\r" in text:
        oddities.append(("CRLF line ends", ""))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    *before, own = _DIVIDER.split(text)
    if not own.strip() and before:  # a divider below the report
        own = before.pop()
    sections: dict[str, str] = {}
    for part in before:
        if part.strip():
            _read_preliminary(part, sections)
    found, seen_heading = _read_part(own, oddities)
    sections.update(found)
    if not seen_heading:
        oddities.append(("report without any heading", ""))
    return Report(sections, tuple(oddities))


def _read_part(text: str, oddities: list[tuple[str, str]]) -> tuple[dict[str, str], bool]:
    """Sections of one part of a report, and whether it had a heading at all."""
    headings = [
        (match, key)
        for match in _HEADING.finditer(text)
        if (key := _key(match[1], text[match.end() : match.end() + 1].strip() == ""))
    ]
    found: dict[str, str] = {}
    named = {key for _, key in headings}
    for number, (match, key) in enumerate(headings):
        end = headings[number + 1][0].start() if number + 1 < len(headings) else len(text)
        content = " ".join(text[match.end() : end].split())
        if key.startswith(VIEW):
            # Below a heading that only names the views stand the findings, unless they have a heading of their own.
            key = "findings" if "findings" not in named else key.removeprefix(VIEW)
        if not content:
            oddities.append(("empty section", key))
        elif key in found:
            oddities.append(("repeated section", key))
            found[key] = f"{found[key]} {content}"
        else:
            found[key] = content
    return found, bool(headings)


def _read_preliminary(text: str, sections: dict[str, str]) -> None:
    """What stands above the report: an addendum, or what was read before; it never replaces the report's own."""
    found, _ = _read_part(text, [])
    if "addendum" in found:
        start = text.index(":", text.upper().index("ADDEND")) + 1
        sections["addendum"] = " ".join(text[start:].split())
    elif "wet_read" in found:
        sections["wet_read"] = found["wet_read"]


@lru_cache(maxsize=4096)
def _key(heading: str, ends: bool) -> str:
    """The section that a heading begins, which a space or the line's end follows or not; empty if it is no heading."""
    name = " ".join(heading.lower().split())
    known = _KNOWN.get(name, "")
    if known or not ends:
        return known  # "FINDINGS:The heart" is one, "3:1" or "HTTP://" is none
    if not _WORDS.search(heading):
        return ""
    for part, key in _PARTS:
        if part in name:
            return key
    if _VIEW.match(name):
        return VIEW + _slug(name)
    return "" if name[0].isdigit() else _slug(name)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")
