"""Multiple-choice questions for reports that a hospital wrote: the same rule as for rendered ones, other wording.

What is right follows from the section's text; findings that the text rules out do not count.
"""

from __future__ import annotations

import re

from ..hierarchy import Section
from .classification import LETTERS, ClassificationKind
from .negation import first_affirmed
from .terms import split_sentences


_OPACITY = (
    r"opacit|opacificat|consolidat|nodul|\bmass(?:es)?\b|infiltrat|atelecta|pneumonia|airspace|scarring|granuloma"
)
_PLEURA = r"effusion|pneumothora|pleural (?:thickening|fluid)|hemothorax"
_DEVICE = (
    r"catheter|\btubes?\b|picc|\blines?\b|pacemaker|\bpacer|icd\b|\bleads?\b|wires?\b|\bclips?\b|stent|valve|hardware|"
    r"drain\b|port-?a-?cath"
)
_HEART = (
    r"cardiomegaly|enlarge\w* (?:of the )?(?:heart|cardiac)|heart .{0,20}enlarged|edema|congesti|heart failure|"
    r"vascular"
)
_TWO_VIEWS = r"\bpa (?:and|&|/) ?lat|\bap (?:and|&|/) ?lat|(?:two|2)[ -]views?|frontal and lateral|\bpa,? lat"
_PORTABLE = r"portable|bedside|semi-?(?:upright|erect)|supine"
_ONE_VIEW = r"(?:single|one|1)[ -](?:\w+ )?views?|frontal|\bap\b|\bpa\b"

_HISTORY = ClassificationKind(
    "Which disease is in the history?",
    ("cancer", "another disease", "lung disease", "heart disease"),
    (
        r"cancer|lymphoma|melanoma|carcinoma|metasta|malignan|leukemia|myeloma|tumou?r|\bca\b",
        "",
        r"copd|asthma|fibrosis|sarcoid|emphysema|pneumonia|tubercul|bronchi|smok",
        r"atrial|heart|coronary|aortic|hypertension|chf|cardi|cabg|\bcad\b|\bmi\b",
    ),
)
_VIEWS = ClassificationKind(
    "How was the image taken?",
    ("a single view", "portable or lying", "frontal and lateral views", "another way"),
    (_ONE_VIEW, _PORTABLE, _TWO_VIEWS, ""),
)
# Asked in this order: "portable AP" is portable, "PA and lateral" two views, whatever stands first.
_VIEWS_ORDER = (_TWO_VIEWS, _PORTABLE, _ONE_VIEW)

KINDS = {
    "findings": ClassificationKind(
        "What is found first?",
        ("opacity, nodule or atelectasis", "line, tube or device", "effusion or pneumothorax", "none of these"),
        (_OPACITY, _DEVICE, _PLEURA, ""),
    ),
    "impression": ClassificationKind(
        "What does the impression name first?",
        ("effusion or pneumothorax", "none of these", "opacity, nodule or atelectasis", "large heart or congestion"),
        (_PLEURA, "", _OPACITY, _HEART),
    ),
    "indication": ClassificationKind(
        "What was the complaint?",
        ("breathing", "heart or circulation", "fever, infection or wasting", "something else"),
        (
            r"cough|dyspnea|wheez|hemoptysis|shortness of breath|\bsob\b|\bdoe\b|hypoxi|respirat|asthma|copd",
            r"chest pain|\bcp\b|palpitation|syncope|orthopnea|swelling|edema|chf|heart|\bafib\b|stroke",
            r"fever|sweats|chills|weight loss|sepsis|infect|pneumonia|\bpna\b|leukocytosis",
            "",
        ),
    ),
    "clinical_history": _HISTORY,
    "history": _HISTORY,
    "examination": _VIEWS,
    "technique": _VIEWS,
    "narrative": _VIEWS,
    "procedure_comments": _VIEWS,
    "comparison": ClassificationKind(
        "What is it compared with?",
        ("nothing", "another chest image", "a CT", "something else"),
        (
            r"\bnone\b|\bno (?:prior|previous|comparison|relevant)|not available|unavailable",
            r"chest|radiograph|x-?ray|cxr|\bfilm",
            r"\bct\b|tomogra",
            "",
        ),
    ),
    "recommendation": ClassificationKind(
        "What is recommended?",
        ("a CT", "another radiograph", "clinical correlation", "something else"),
        (r"\bct\b|tomogra", r"radiograph|x-?ray|\bviews?\b|\bfilms?\b|follow-?up", r"clinical|correlat", ""),
    ),
    "notification": ClassificationKind(
        "How was the result passed on?",
        ("in person", "by telephone", "electronically", "another way"),
        (r"in person", r"phone|telephone|\bcalled\b", r"page|e-?mail|electronic|dashboard|wet read", ""),
    ),
}
# Of a section that we know nothing about, the length is what can be asked.
LENGTH = ClassificationKind(
    "How many sentences does the section have?", ("one", "two", "three", "four or more"), ("", "", "", "")
)
_RULED_OUT = ("findings", "impression")


def hospital_question(section: Section) -> tuple[ClassificationKind, str]:
    """The question for a section of a hospital's report, and the right letter.

    Example:
        >>> kind, letter = hospital_question(Section("findings", "No effusion. The lungs show a small nodule."))
        >>> kind.options["ABCD".index(letter)]
        'opacity, nodule or atelectasis'
    """
    kind = KINDS.get(section.key)
    if kind is None:
        return LENGTH, LETTERS[min(len(split_sentences(section.text)), len(LETTERS)) - 1]
    if kind is _VIEWS:
        found = next((pattern for pattern in _VIEWS_ORDER if re.search(pattern, section.text, re.IGNORECASE)), "")
        return kind, LETTERS[kind.patterns.index(found)]
    if section.key not in _RULED_OUT:
        return kind, kind.answer(section.text)
    places = {
        letter: place
        for letter, pattern in zip(LETTERS, kind.patterns, strict=True)
        if pattern and (place := first_affirmed(section.text, pattern)) is not None
    }
    return kind, min(places, key=places.__getitem__) if places else LETTERS[kind.patterns.index("")]
