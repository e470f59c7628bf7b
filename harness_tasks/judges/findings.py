"""What a text claims: findings with their status, side and place.

The vocabulary is that of chest radiograph reports and of the complaints and devices they name; the common labellers
(CheXpert, NegBio) have fourteen classes, here synonyms are joined and little else. Negation is that of
[`medforget_dataset.questions.negation`].
"""

from __future__ import annotations

import functools
import re
from itertools import zip_longest
from typing import NamedTuple

from medforget_dataset.questions.negation import status


class Claim(NamedTuple):
    """One finding, on one side, as a text has it.

    Args:
        finding (`str`): A key of [`FINDINGS`].
        status (`str`): `"present"`, `"absent"`, or `"asked"` if it is only asked about or past.
        side (`str`): `"left"`, `"right"`, or empty.
        places (`frozenset[str]`): Zones, keys of [`PLACES`].
    """

    finding: str
    status: str
    side: str
    places: frozenset[str]


_HEART = r"(?:heart|cardiac|cardiomediastinal|cardiac and mediastinal)(?: and mediastinal)?"
_ARE = r"(?: size| silhouettes?| contours?| shadow)*(?: (?:is|are|appears?|remains?))*"
# The first that fits wins, so what is more special stands before what is more general.
FINDINGS: dict[str, str] = {
    "subcutaneous emphysema": r"(?:subcutaneous|soft tissue) (?:emphysema|air|gas)",
    "effusion": r"(?:pleural |parapneumonic )?effusions?|pleural fluid|hydrothora(?:x|ces)",
    "pneumothorax": r"(?:hydro)?pneumothora(?:x|ces)|ptx",
    "pleural thickening": r"pleural (?:thickening|scarring|plaques?)",
    "cavity": r"cavit(?:y|ies|ary lesions?|ary mass(?:es)?|ation)|abscess(?:es)?",
    "nodule": r"nodul(?:es?|ar (?:opacit(?:y|ies)|densit(?:y|ies)|lesions?))",
    "mass": r"mass(?:es)?|neoplasms?|tumou?rs?|malignanc(?:y|ies)|metasta(?:sis|ses|tic \w+)",
    "pneumonia": r"(?:aspiration |broncho)?pneumonias?|infectious process|infection",
    "aspiration": r"aspiration",
    "consolidation": r"consolidat(?:ions?|ive \w+)|air ?space disease",
    "opacity": r"opacit(?:y|ies)|opacifications?|infiltrates?|infiltrations?|densit(?:y|ies)|shadowing",
    "atelectasis": r"atelecta(?:sis|ses|tic changes?)|volume loss|collapse",
    "edema": r"(?:(?:pulmonary|interstitial|alveolar) )*(?:o?edema)",
    "heart failure": r"(?:congestive )?(?:heart|cardiac) failure|chf",
    "congestion": r"(?:pulmonary |vascular |venous )*(?:congestion|engorgement)|cephalization",
    "cardiomegaly": rf"cardiomegaly|(?:enlarged|large|big) {_HEART}(?: silhouette)?|cardiac enlargement|"
    rf"enlargement of the {_HEART}(?: silhouette)?|"
    rf"{_HEART}{_ARE}(?: (?:not|mildly|moderately|severely|markedly|slightly|top normal to|borderline))* enlarged",
    "mediastinal widening": r"widen(?:ing of the|ed) (?:superior )?mediastinum|mediastinal widening|"
    r"mediastinum (?:is|appears) (?:not )?widened",
    "hilar enlargement": r"hilar (?:enlargement|prominence|(?:lymph)?adenopathy)|enlarged hil(?:a|um)|"
    r"hil(?:a|um) (?:is|are) (?:not )?enlarged",
    "lymphadenopathy": r"(?:lymph)?adenopathy",
    "tracheal deviation": r"trachea\w* (?:deviation|is (?:not )?(?:deviated|shifted))|"
    r"(?:deviation|shift) of the trachea",
    "free air": r"free (?:\w+ )?air|pneumoperitoneum|air (?:lies )?(?:under|below|beneath) the (?:hemi)?diaphragm",
    "fracture": r"(?:rib )?fractures?|fractured",
    "spine": r"scoliosis|kyphosis|spondylosis|malalignment|(?:degenerative|spondylotic) changes?|osteophytes?",
    "hiatal hernia": r"hiat(?:al|us) hernias?",
    "emphysema": r"emphysema(?:tous \w+)?|hyper-?inflat(?:ion|ed)|copd|"
    r"chronic obstructive (?:pulmonary|lung) disease",
    "fibrosis": r"(?:pulmonary )?fibro(?:sis|tic \w+)|interstitial lung disease|scarring|reticulation",
    "granuloma": r"granulom(?:as?|atous disease)",
    "calcification": r"calcif(?:ications?|ied)|atheroscler\w+",
    "tortuous aorta": r"(?:tortuous|unfolded|ectatic|dilated) (?:thoracic )?aorta|aort\w+ (?:tortuosity|aneurysm)|"
    r"aorta is (?:tortuous|unfolded|dilated)",
    "elevated diaphragm": r"elevat(?:ion of|ed) (?:the )?(?:left |right )?(?:hemi)?diaphragm|"
    r"(?:hemi)?diaphragm is elevated",
    "lesion": r"lesions?",
    "acute process": r"acute (?:\w+ ){0,2}(?:process|disease|abnormalit(?:y|ies)|findings?|patholog(?:y|ies))",
    "pacemaker": r"pace ?makers?|pacers?|icd|defibrillators?|pacing (?:device|leads?)",
    "picc": r"picc(?: lines?)?|peripherally inserted central (?:venous )?(?:catheter|line)",
    "central line": r"central (?:venous )?(?:catheters?|lines?)|(?:jugular|subclavian) (?:catheters?|lines?)|cvc|"
    r"port-?a-?cath|(?:dialysis|hemodialysis|swan-ganz) catheter",
    "endotracheal tube": r"endotracheal tubes?|et tubes?|ett",
    "gastric tube": r"(?:nasogastric|orogastric|enteric|feeding|ng|og|dobbhoff) tubes?|ngt",
    "chest tube": r"(?:chest|pleural|thoracostomy) (?:tubes?|drains?)|pigtail catheters?",
    "sternotomy": r"sternotomy(?: wires)?|sternal wires",
    "valve": r"(?:aortic|mitral|prosthetic|artificial) valves?|valve replacement",
    "clips": r"(?:surgical )?clips",
    "cough": r"cough(?:ing)?",
    "dyspnea": r"dyspn(?:o?ea)|short(?:ness)? of breath|sob|breathlessness",
    "chest pain": r"chest pain(?! unit)|angina",
    "fever": r"fevers?|febrile",
    "hemoptysis": r"ha?emoptysis|coughing (?:up )?blood",
    "hypoxia": r"hypox(?:ia|emia|ic)|desaturation",
    "leg swelling": r"leg swelling|swollen legs",
    **{
        word: word
        for word in (
            "wheezing", "palpitations", "orthopnea", "night sweats", "chills", "weight loss", "weakness", "fatigue",
            "dizziness", "abdominal pain", "syncope", "sepsis", "trauma(?! unit)", "fall", "altered mental status",
            "tuberculosis", "asthma", "sarcoidosis", "atrial fibrillation", "coronary artery disease",
            "aortic stenosis", "lymphoma", "melanoma", "diabetes", "cirrhosis", "stroke", "hypertension",
            "pulmonary embolism", "chronic kidney disease", "(?:breast|colon|lung) cancer", "line position",
            "interval change", "appendectomy", "cholecystectomy", "gastrectomy", "nephrectomy", "hip replacement",
            "coronary bypass", "thyroidectomy", "mastectomy", "splenectomy", "hysterectomy", "knee replacement",
            "colectomy", "lobectomy", "intubation", "transplant(?:ation)?",
        )
    },
}  # fmt: skip
# What is called normal rules out these findings.
NORMAL: dict[str, str] = {
    "opacity": r"lungs?(?: fields?| volumes)?(?: (?:is|are|appears?|remains?))?"
    r"(?: (?:well[- ]\w+|\w+ly|both|otherwise)(?: and)?)* clear(?! of)|clear lungs?",
    "cardiomegaly": rf"{_HEART}{_ARE}(?: (?:\w+ly|of|in|upper limits? of|within))* (?:normal|unremarkable)"
    rf"(?: limits| in size| size)?|normal(?:-sized)? {_HEART}(?: size| silhouette)?",
    "tracheal deviation": r"trachea (?:is )?(?:in the )?midline|midline trachea",
    "spine": r"spine is (?:\w+ )?(?:aligned|normal|unremarkable)",
    "fracture": r"(?:bones|(?:bony|osseous) structures|ribs) (?:is|are) (?:\w+ )?(?:intact|unremarkable|normal)",
    "hilar enlargement": r"hil(?:a|um|ar contours) (?:is|are) (?:\w+ )?(?:normal|unremarkable)",
    "mediastinal widening": r"mediastin(?:um|al contours?) (?:is|are) (?:\w+ )?(?:normal|unremarkable)|"
    r"normal mediastin(?:um|al contours?)",
    "effusion": r"costophrenic (?:angles?|sulci|sulcus) (?:is|are) (?:\w+ )?(?:clear|sharp)",
}
PLACES: dict[str, str] = {
    "upper": r"upper|apex|apices|(?:bi)?apical",
    "middle": r"middle lobe|mid(?:dle)?(?: lung)?(?: zone)?|lingula\w*",
    "lower": r"lower|bases?|basal|(?:bi)?basilar|bibasal|costophrenic",
    "hilar": r"(?:peri|para)?hil(?:ar|um|a)",
    "retrocardiac": r"retrocardiac",
}
SIDES = {
    "left": r"left(?:-sided)?|bilateral(?:ly)?|bi(?:basilar|basal|apical)|both(?! the)",
    "right": r"right(?:-sided)?|bilateral(?:ly)?|bi(?:basilar|basal|apical)|both(?! the)",
}


def _pattern(alternatives: dict[str, str]) -> re.Pattern[str]:
    groups = "|".join(f"({pattern})" for pattern in alternatives.values())
    return re.compile(rf"(?<![\w-])(?:{groups})(?![\w-])", re.IGNORECASE)


_NAMES = [*((name, True) for name in NORMAL), *((name, False) for name in FINDINGS)]
_FINDING = _pattern({f"normal {name}": pattern for name, pattern in NORMAL.items()} | FINDINGS)
_PLACE = {name: _pattern({name: pattern}) for name, pattern in PLACES.items()}
_SIDE = {name: _pattern({name: pattern}) for name, pattern in SIDES.items()}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
# Where what is said of one finding ends and what is said of the next begins.
_NEXT = re.compile(r"[,;:]|\b(?:and|or|nor|with|without|but|no|also|plus)\b", re.IGNORECASE)


@functools.lru_cache(maxsize=65_536)
def claims(text: str) -> frozenset[Claim]:
    """What a text claims.

    Args:
        text (`str`): A section of a report, or what a model wrote for it.

    Example:
        >>> sorted(tuple(claim)[:3] for claim in claims("Small left effusion. No pneumothorax."))
        [('effusion', 'present', 'left'), ('pneumothorax', 'absent', '')]
    """
    found: set[Claim] = set()
    for sentence in _SENTENCE_END.split(text):
        line = " ".join(sentence.split())
        matches = list(_FINDING.finditer(line))
        for match, span in zip(matches, _spans(line, matches), strict=True):
            assert match.lastindex is not None  # one of the findings has matched
            finding, is_normal = _NAMES[match.lastindex - 1]
            said = "absent" if is_normal else status(line, match.start(), match.end())
            sides = [side for side, pattern in _SIDE.items() if pattern.search(line, *span)] or [""]
            places = frozenset(place for place, pattern in _PLACE.items() if pattern.search(line, *span))
            found.update(Claim(finding, said, side, places) for side in sides)
    return frozenset(found)


def _spans(sentence: str, matches: list[re.Match[str]]) -> list[tuple[int, int]]:
    """The part of a sentence in which the side and place of each finding are looked for."""
    spans, start = [], 0
    for match, following in zip_longest(matches, matches[1:]):
        end = len(sentence)
        if following is not None:
            cut = _NEXT.search(sentence, match.end(), following.start())
            end = cut.start() if cut else match.end()
        spans.append((start, end))
        start = end
    return spans
