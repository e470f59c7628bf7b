"""The report of a study, written from its facts in radiologists' English.

Each sentence carries one fact that varies, so that a blank in it cannot be filled from the rest of the sentence, and
the sections differ by how facts combine. What the image cannot show (the hour, the tube voltage, the complaint) is
drawn at random; what it shows is the case's findings and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..hierarchy import Section
from .cases import Case, generator
from .findings import Finding


VIEWS = (
    "single PA view", "upright PA view", "PA view in full inspiration", "standing frontal view",
    "frontal digital view", "erect PA view", "single frontal view", "routine PA view",
)  # fmt: skip
SERVICES = (
    "the trauma unit", "the chest pain unit", "the emergency department",
    "the intensive care unit", "the coronary care unit", "the step-down unit",
    "the pulmonary clinic", "the oncology clinic", "the preoperative clinic",
    "the surgical ward", "the cardiology ward", "the geriatric ward",
)  # fmt: skip
SYMPTOMS = (
    "cough", "dyspnea", "wheezing", "hemoptysis",
    "chest pain", "palpitations", "orthopnea", "leg swelling",
    "fever", "night sweats", "chills", "weight loss",
    "weakness", "fatigue", "dizziness", "abdominal pain",
)  # fmt: skip
QUESTIONS = (
    "pneumonia", "aspiration", "heart failure", "pulmonary edema", "malignancy", "metastasis",
    "rib fracture", "tuberculosis", "atelectasis", "line position", "abscess", "interval change",
)  # fmt: skip
HISTORIES = (
    "COPD", "asthma", "pulmonary fibrosis", "sarcoidosis",
    "atrial fibrillation", "heart failure", "coronary artery disease", "aortic stenosis",
    "breast cancer", "colon cancer", "lymphoma", "melanoma",
    "diabetes", "chronic kidney disease", "cirrhosis", "stroke",
)  # fmt: skip
SURGERIES = (
    "appendectomy", "cholecystectomy", "hip replacement", "coronary bypass", "thyroidectomy", "gastrectomy",
    "splenectomy", "nephrectomy", "knee replacement", "colectomy",
)  # fmt: skip
RECOMMENDATIONS = (
    "chest CT", "lateral radiograph", "bedside ultrasound", "clinical correlation", "echocardiography",
    "repeat radiograph tomorrow", "repeat radiograph in 2 days", "repeat radiograph in 1 week",
    "repeat radiograph in 3 weeks", "repeat radiograph in 6 weeks", "repeat radiograph in 3 months",
    "specialist referral",
)  # fmt: skip
INTERVALS = (
    "2 days", "4 days", "1 week", "2 weeks", "3 weeks", "5 weeks", "2 months", "3 months", "5 months", "7 months",
    "9 months", "1 year",
)  # fmt: skip
LAST_YEAR = 2024
DURATIONS = ("2 days", "3 days", "5 days", "1 week", "10 days", "2 weeks")
GRIDS = ("8:1", "10:1", "12:1")
MEANS = ("by telephone", "in person", "by secure message", "by pager")
# True of every rendered case: neither the source CT nor any inserted finding shows these.
NEGATIVES = (
    "No acute fracture is seen.",
    "The trachea is midline.",
    "No free air lies under the diaphragm.",
    "No widening of the mediastinum.",
    "The thoracic spine is aligned.",
    "No cavitary lesion.",
    "The hila are not enlarged.",
    "No subcutaneous emphysema.",
    "No interstitial edema.",
    "Soft tissues are unremarkable.",
)

# How often a section is among the four drawn: the order of the paper's Figure 4, Impression before Findings and so on.
SECTION_WEIGHTS = {
    "impression": 3.0,
    "findings": 2.2,
    "technique": 2.0,
    "indication": 1.7,
    "examination": 1.2,
    "comparison": 0.4,
    "clinical_history": 0.35,
    "notification": 0.4,
}


def noun_phrase(finding: Finding) -> str:
    """The finding as a radiologist names it, for example `"small right pleural effusion"`."""
    return {
        "opacity": f"{finding.size} {finding.place} opacity",
        "nodule": f"{finding.diameter_mm} mm {finding.place} nodule",
        "effusion": f"{finding.size} {finding.place} pleural effusion",
        "pneumothorax": f"{finding.size} {finding.place} pneumothorax",
        "cardiomegaly": f"{finding.size} cardiomegaly",
        "pacemaker": f"{finding.place} chest pacemaker",
        "central line": f"{finding.place} central venous catheter",
    }[finding.kind]


def write_report(seed: int, study_key: str, case: Case, sections: int) -> tuple[Section, ...]:
    """Write the report of a study and draw `sections` of its sections, in the order in which reports have them."""
    rng = generator(seed, study_key, "report")
    texts = {key: writer(rng, case) for key, writer in WRITERS.items()}
    present = [key for key, text in texts.items() if text]
    weights = np.array([SECTION_WEIGHTS[key] for key in present])
    drawn = set(rng.choice(present, size=sections, replace=False, p=weights / weights.sum()))
    return tuple(Section(key, texts[key]) for key in present if key in drawn)


def _clock(rng: np.random.Generator) -> str:
    return f"{rng.integers(24):02d}:{rng.integers(60):02d}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _examination(rng: np.random.Generator, case: Case) -> str:
    return f"Chest radiograph, {rng.choice(VIEWS)}. Requested by {rng.choice(SERVICES)}. Acquired at {_clock(rng)}."


def _indication(rng: np.random.Generator, case: Case) -> str:
    who = f"{case.sex.capitalize()} aged {case.age}."
    complaint = _sentence(f"{rng.choice(SYMPTOMS)} for {rng.choice(DURATIONS)}")
    return f"{who} {complaint} Evaluate for {rng.choice(QUESTIONS)}."


def _clinical_history(rng: np.random.Generator, case: Case) -> str:
    # Not before the patient was of age.
    year = rng.integers(max(1985, LAST_YEAR - case.age + 18), LAST_YEAR + 1)
    return f"History of {rng.choice(HISTORIES)}. Prior {rng.choice(SURGERIES)} in {year}."


def _technique(rng: np.random.Generator, case: Case) -> str:
    return (
        f"Tube voltage {rng.integers(98, 126)} kVp. Exposure {rng.integers(10, 60) / 10} mAs. "
        f"Grid ratio {rng.choice(GRIDS)}. Source distance {rng.integers(175, 190)} cm."
    )


def _comparison(rng: np.random.Generator, case: Case) -> str:
    if not case.previous:
        return ""
    main = case.findings[0]
    return (
        f"Radiograph from {rng.choice(INTERVALS)} earlier. The {noun_phrase(main)} is {_change(main, case.previous)}."
    )


def _change(finding: Finding, previous: tuple[Finding, ...]) -> str:
    before = [other for other in previous if (other.kind, other.place) == (finding.kind, finding.place)]
    if not before:
        return "new"
    order = {"": 0, "small": 0, "mild": 0, "moderate": 1, "large": 2, "marked": 2}
    now, then = (order[x.size] * 100 + x.diameter_mm for x in (finding, before[0]))
    return "unchanged" if now == then else "larger" if now > then else "smaller"


def _findings(rng: np.random.Generator, case: Case) -> str:
    seen = [f"There is {_article(noun_phrase(finding))}." for finding in case.findings]
    normal = list(rng.choice(NEGATIVES, size=2, replace=False))
    return " ".join(seen + [str(sentence) for sentence in normal])


def _article(phrase: str) -> str:
    if "cardiomegaly" in phrase:
        return phrase
    vowel_sound = phrase.startswith(("a", "e", "i", "o", "u", "8 ", "11 ", "18 "))
    return f"{'an' if vowel_sound else 'a'} {phrase}"


def _impression(rng: np.random.Generator, case: Case) -> str:
    parts = [_sentence(noun_phrase(finding)) for finding in case.findings[:2]]
    return f"{' '.join(parts)} Recommend {rng.choice(RECOMMENDATIONS)}."


def _notification(rng: np.random.Generator, case: Case) -> str:
    main = case.findings[0]
    if main.kind not in ("pneumothorax", "effusion", "central line", "opacity"):
        return ""
    return (
        f"Result called to {rng.choice(SERVICES)}. Reported finding: {noun_phrase(main)}. "
        f"Read back {rng.choice(MEANS)} at {_clock(rng)}."
    )


# In the order in which a report has them.
WRITERS: dict[str, Callable[[np.random.Generator, Case], str]] = {
    "examination": _examination,
    "indication": _indication,
    "clinical_history": _clinical_history,
    "technique": _technique,
    "comparison": _comparison,
    "findings": _findings,
    "impression": _impression,
    "notification": _notification,
}
