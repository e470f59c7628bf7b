"""What is wrong with a patient, study by study: the facts from which both the image and the report are made.

Age, sex, heart and pacemaker belong to the patient and are the same in all of that patient's studies; acute findings
and everything about the visit belong to the study.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..hierarchy import stable_number
from .findings import DIAMETERS_MM, HEART_SIZES, SIDES, SIZES, Finding
from .volume import LOBES


ACUTE_KINDS = ("opacity", "nodule", "effusion", "pneumothorax")

# One quarter of the studies has neither opacity, effusion nor pneumothorax first, so that no classification letter
# prevails.
MAIN_KINDS = {"opacity": 0.16, "nodule": 0.14, "effusion": 0.24, "pneumothorax": 0.23, "none": 0.23}
SECOND_FINDING = 0.3
CARDIOMEGALY = 0.25
PACEMAKER = 0.15


@dataclass(frozen=True)
class Case:
    """The facts of one study.

    Args:
        age (`int`): Years.
        sex (`str`): `"man"` or `"woman"`.
        findings (`tuple[Finding, ...]`): In the order in which the report names them; never empty.
        previous (`tuple[Finding, ...]`): Findings of the same patient's preceding study; empty for the first one.
    """

    age: int
    sex: str
    findings: tuple[Finding, ...]
    previous: tuple[Finding, ...] = ()


def generator(*key: object) -> np.random.Generator:
    """Random numbers that depend on `key` alone."""
    return np.random.default_rng(stable_number(*key))


def sample_cases(seed: int, patient_key: str, study_keys: list[str]) -> list[Case]:
    """Draw the facts of all studies of a patient, oldest first."""
    rng = generator(seed, patient_key, "patient")
    age, sex = int(rng.integers(24, 88)), str(rng.choice(["man", "woman"]))
    chronic = []
    if rng.random() < CARDIOMEGALY:
        chronic.append(Finding("cardiomegaly", "", str(rng.choice(list(HEART_SIZES)))))
    if rng.random() < PACEMAKER:
        chronic.append(Finding("pacemaker", str(rng.choice(SIDES)), ""))
    cases: list[Case] = []
    for number, study_key in enumerate(study_keys):
        findings = _study_findings(generator(seed, study_key, "findings"), chronic)
        cases.append(Case(age + number // 2, sex, findings, cases[-1].findings if cases else ()))
    return cases


def _study_findings(rng: np.random.Generator, chronic: list[Finding]) -> tuple[Finding, ...]:
    main = str(rng.choice(list(MAIN_KINDS), p=list(MAIN_KINDS.values())))
    acute = [] if main == "none" else [_acute(rng, main)]
    if acute and rng.random() < SECOND_FINDING:
        second = _acute(rng, str(rng.choice([kind for kind in ACUTE_KINDS if kind != main])))
        if _side(second) != _side(acute[0]):
            acute.append(second)
    if not acute and (not chronic or rng.random() < 0.5):
        return (Finding("central line", str(rng.choice(SIDES)), ""), *chronic)
    return (*acute, *chronic)


def _acute(rng: np.random.Generator, kind: str) -> Finding:
    place = str(rng.choice(LOBES if kind in ("opacity", "nodule") else SIDES))
    if kind == "nodule":
        smallest, largest = DIAMETERS_MM
        return Finding(kind, place, "", diameter_mm=int(rng.integers(smallest, largest + 1)))
    return Finding(kind, place, str(rng.choice(SIZES)))


def _side(finding: Finding) -> str:
    return finding.place.split()[0] if finding.place else ""
