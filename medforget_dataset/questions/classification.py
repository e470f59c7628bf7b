"""Multiple-choice questions: one constant set of four options for every kind of section.

Options that were drawn per study would identify the study, so both the options and their order depend on the kind of
the section alone. What is right follows from the section's text: the option whose words come first in it, or the last
option ("none of these") when none does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..hierarchy import Section


LETTERS = "ABCD"


class ClassificationKind(NamedTuple):
    """A question about one kind of section.

    Args:
        question (`str`): Asked before the options.
        options (`tuple[str, str, str, str]`): What the letters A to D stand for.
        patterns (`tuple[str, str, str, str]`): Regular expressions; an empty one stands for "none of the others".
    """

    question: str
    options: tuple[str, str, str, str]
    patterns: tuple[str, str, str, str]

    @property
    def text(self) -> str:
        """The question with its options inline, as the paper's Table 2 writes it."""
        return f"{self.question} " + " ".join(f"{x}) {y}" for x, y in zip(LETTERS, self.options, strict=True))

    def answer(self, text: str) -> str:
        """The right letter for a section's text.

        Example:
            >>> KINDS["findings"].answer("There is a small right pneumothorax.")
            'C'
        """
        places = {}
        for letter, pattern in zip(LETTERS, self.patterns, strict=True):
            match = re.search(pattern, text, re.IGNORECASE) if pattern else None
            if match:
                places[letter] = match.start()
        return min(places, key=places.__getitem__) if places else LETTERS[self.patterns.index("")]


_AFFIRMED = r"(?<!no )(?<!or )(?<!without )"
_LUNG = _AFFIRMED + r"\b(?:opacit|opacificat|consolidat|nodule|mass\b|infiltrat|atelectasis)"
_EFFUSION = _AFFIRMED + r"\b(?:pleural effusion|effusion)"
_PNEUMOTHORAX = _AFFIRMED + r"\b(?:pneumothora)"
_ACUTE = r"emergency|trauma|chest pain unit|\bED\b"
_CRITICAL = r"intensive|coronary care|step-down|\bICU\b"
_CLINIC = r"clinic\b|outpatient"

KINDS = {
    "examination": ClassificationKind(
        "Where was the examination requested?",
        ("outpatient clinic", "emergency care", "ward or elsewhere", "critical care"),
        (_CLINIC, _ACUTE, "", _CRITICAL),
    ),
    "indication": ClassificationKind(
        "What was the complaint?",
        ("breathing", "heart or circulation", "fever or wasting", "something else"),
        (
            "cough|dyspnea|wheez|hemoptysis|shortness of breath|sob\\b|hypoxia",
            "chest pain|palpitation|syncope|orthopnea|swelling|edema",
            "fever|sweats|chills|weight loss|sepsis",
            "",
        ),
    ),
    "clinical_history": ClassificationKind(
        "Which disease is in the history?",
        ("cancer", "another disease", "lung disease", "heart disease"),
        (
            "cancer|lymphoma|melanoma|carcinoma|metasta|malignan",
            "",
            "copd|asthma|fibrosis|sarcoid|emphysema",
            "atrial|heart failure|coronary artery|aortic|hypertension",
        ),
    ),
    "technique": ClassificationKind(
        "What was the tube voltage?",
        ("112 to 118 kVp", "below 105 kVp", "105 to 111 kVp", "another value"),
        (r"\b11[2-8] ?kvp", r"\b(?:[4-9]\d|10[0-4]) ?kvp", r"\b(?:10[5-9]|11[01]) ?kvp", ""),
    ),
    "comparison": ClassificationKind(
        "How far back is the earlier image?",
        ("days", "months", "weeks", "another time"),
        (r"\bdays?\b", r"\bmonths?\b", r"\bweeks?\b", ""),
    ),
    "findings": ClassificationKind(
        "What is found first?",
        ("opacity or nodule", "pleural effusion", "pneumothorax", "none of these"),
        (_LUNG, _EFFUSION, _PNEUMOTHORAX, ""),
    ),
    "impression": ClassificationKind(
        "What does the impression name first?",
        ("pneumothorax", "none of these", "opacity or nodule", "pleural effusion"),
        (_PNEUMOTHORAX, "", _LUNG, _EFFUSION),
    ),
    "notification": ClassificationKind(
        "Who was told of the result?",
        ("critical care", "outpatient clinic", "emergency care", "ward or elsewhere"),
        (_CRITICAL, _CLINIC, _ACUTE, ""),
    ),
}
OTHER = ClassificationKind(
    "What does the section name first?",
    ("pleural effusion", "pneumothorax", "none of these", "opacity or nodule"),
    (_EFFUSION, _PNEUMOTHORAX, "", _LUNG),
)


def classification_question(section: Section) -> tuple[ClassificationKind, str]:
    """The question for a section of a rendered report, its own kind's or the common one, and the right letter."""
    kind = KINDS.get(section.key, OTHER)
    return kind, kind.answer(section.text)
