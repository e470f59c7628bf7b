"""Clinically salient terms: what a cloze blank may hide.

Plain pattern matching on English report text, so that it serves any corpus. A term is matched as the longest phrase a
radiologist would call one finding ("small right pleural effusion", not "effusion"), so that a blank hides all of it.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Term(NamedTuple):
    """A salient span of a sentence: `sentence[start:end]`."""

    start: int
    end: int


_AMOUNT = r"(?:tiny|trace|small|moderate|large|mild|marked|severe|minimal|extensive|\d+(?:\.\d+)? ?(?:mm|cm))"
_SIDE = r"(?:right|left|bilateral|bibasilar|biapical)"
_PLACE = (
    rf"(?:{_SIDE}(?: (?:upper|middle|lower) lobe| chest| lung| hilar| apical| basilar| base| apex)?|"
    r"retrocardiac|lingular|perihilar)"
)
_FINDING = (
    r"(?:pleural effusions?|pneumothora(?:x|ces)|opacit(?:y|ies)|opacification|consolidations?|nodules?|mass(?:es)?|"
    r"cardiomegaly|pacemaker|central venous catheter|endotracheal tube|nasogastric tube|chest tube|picc(?: line)?|"
    r"atelectasis|pulmonary edema|pleural thickening|fractures?|infiltrates?|granulomas?|hiatal hernia|scoliosis|"
    r"emphysema|fibrosis|vascular congestion|hyperinflation|calcifications?)"
)
_WORDS = {
    "view": r"(?:single |upright |standing |erect |routine |portable |supine )?(?:frontal|ap|pa|lateral)"
    r"(?: digital)? view(?: in full inspiration)?|portable ap|pa and lateral|decubitus",
    "service": r"(?:trauma|chest pain|intensive care|coronary care|step-down) unit|emergency department|"
    r"(?:pulmonary|oncology|preoperative) clinic|(?:surgical|cardiology|geriatric) ward",
    "symptom": "cough|dyspnea|shortness of breath|wheezing|hemoptysis|chest pain|palpitations|syncope|"
    "orthopnea|leg swelling|fever|night sweats|chills|weight loss|fall|fatigue|dizziness|abdominal pain|hypoxia|"
    "weakness|sepsis|altered mental status",
    "disease": "pneumonia|aspiration|heart failure|malignancy|metastas[ie]s|rib fracture|tuberculosis|line position|"
    "abscess|interval change|copd|asthma|pulmonary fibrosis|sarcoidosis|atrial fibrillation|coronary artery disease|"
    "aortic stenosis|breast cancer|colon cancer|lung cancer|lymphoma|melanoma|diabetes|chronic kidney disease|"
    "cirrhosis|stroke|hypertension|pulmonary embolism|acute cardiopulmonary (?:process|abnormality)",
    "procedure": "appendectomy|cholecystectomy|gastrectomy|nephrectomy|hip replacement|coronary bypass|"
    "thyroidectomy|mastectomy|splenectomy|hysterectomy|knee replacement|colectomy|sternotomy|lobectomy|"
    "intubation|transplant(?:ation)?",
    "recommendation": r"chest ct|lateral radiograph|bedside ultrasound|clinical correlation|echocardiography|"
    r"repeat radiograph (?:tomorrow|in \d+ \w+)|specialist referral|follow-?up (?:ct|radiographs?)",
    "exposure": r"\d+(?:\.\d+)? (?:kvp|mas)|\d+:1",
    "change": "unchanged|stable|larger|smaller|increased|decreased|improved|worsened|resolved|new",
    "interval": r"\d+ (?:days?|weeks?|months?|years?)",
}
_PATTERN = re.compile(
    rf"(?<![\w-])(?:(?:{_AMOUNT} )?(?:{_PLACE} )?{_FINDING}|" + "|".join(_WORDS.values()) + r")(?![\w-])",
    re.IGNORECASE,
)
# English words that carry no content.
STOP_WORDS = frozenset(
    "a about above after again all also although am among an and any are as at be because been before being below "
    "both but by can cannot could did do does doing done down during each either few for from further had has have "
    "having he her here hers him his how however i if in into is it it's its just may me might more most must my "
    "neither no nor not noted now of off on once one only or other others our out over own per same seen several "
    "she should since so some such than that the their them then there there's these they this those through thus "
    "to too two under until up upon us very via was we well were what when where whether which while who whom whose "
    "why will with within without would yes yet you your".split()
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])")


def split_sentences(text: str) -> list[str]:
    """Sentences of a section, in order.

    Example:
        >>> split_sentences("Exposure 2.4 mAs. Grid ratio 8:1.")
        ['Exposure 2.4 mAs.', 'Grid ratio 8:1.']
    """
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


def find_terms(sentence: str) -> list[Term]:
    """Salient terms of a sentence, left to right, none overlapping.

    Example:
        >>> sentence = "There is a small right pleural effusion."
        >>> [sentence[term.start : term.end] for term in find_terms(sentence)]
        ['small right pleural effusion']
    """
    return [Term(*match.span()) for match in _PATTERN.finditer(sentence)]
