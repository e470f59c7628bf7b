"""What corpora that read a hospital's files have in common: the paper's sampling, invented names, images.

The paper (section 3.2) keeps studies that have four standard sections, then patients with at least four such studies,
draws four studies a patient and four sections a study, and groups every eight patients into one synthetic institution.
An adapter lists the studies; which of them make the benchmark is drawn here, by the seed and the source's own ids.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

from PIL import Image
from tqdm import tqdm

from ..build_log import BuildLog, SourceError
from ..errors import UserError
from ..hierarchy import Institution, Patient, Section, Study, stable_number
from ..images import fit_square, read_radiograph
from ..names import MAX_PATIENTS, institution_names, patient_names, study_identifiers
from ..options import BuildOptions
from ..questions import can_be_asked


class StudyEntry(NamedTuple):
    """A study of the source that has the sections asked for.

    Args:
        patient (`str`): The source's id of the patient.
        study (`str`): The source's id of the study, unique in the corpus.
        time (`str`): Sorts a patient's studies; empty where the source does not tell.
        institution (`str`): The source's label, empty where it has none.
    """

    patient: str
    study: str
    time: str = ""
    institution: str = ""


class HospitalCorpus(ABC):
    """Base of the corpora that read files; see [`~medforget_dataset.corpora.CorpusProtocol`].

    A subclass gives `scan`, `sections` and `image_file`, and the class attributes of the protocol.

    Args:
        options ([`~medforget_dataset.options.BuildOptions`]): What to build, and from which folder.
        log ([`~medforget_dataset.build_log.BuildLog`], *optional*): Where faults and oddities go.

    Raises:
        UserError: `root` or `images` is not a folder.
    """

    name: ClassVar[str]
    restricted: bool
    license: str
    license_name: str = ""
    license_link: ClassVar[str] = ""
    attribution: str
    image_noun: ClassVar[str] = "radiograph"
    real_institutions: ClassVar[bool] = False
    grouping_note: ClassVar[str] = ""
    reads_files = True
    views = "geometric"
    standard_sections: ClassVar[tuple[str, ...]] = ("examination", "indication", "findings", "impression")
    """Sections that every study must have; empty where the corpus knows no standard."""
    identifier_form: ClassVar[str] = "study_chest_xray"
    """What invented identifiers of studies begin with."""

    def __init__(self, options: BuildOptions, log: BuildLog | None = None):
        self.options, self.log = options, log or BuildLog(options.on_error)
        self.root = Path(options.root).expanduser()
        self.image_root = Path(options.images).expanduser() if options.images else self.root
        for name, folder in (("root", self.root), ("images", self.image_root)):
            if not folder.is_dir():
                raise UserError(f"--{name} {folder}: no such folder")
        if options.institutions * options.patients > MAX_PATIENTS:
            raise UserError(f"--patients {options.patients}: names are invented for {MAX_PATIENTS} patients in all")
        standard = len(self.standard_sections)
        if options.section_kinds == "standard" and standard and options.sections != standard:
            raise UserError(
                f"--sections {options.sections}: {self.name} has {standard} standard sections "
                f"({', '.join(self.standard_sections)}); add `any` to draw from all sections"
            )

    @abstractmethod
    def scan(self) -> Iterator[StudyEntry]:
        """Every study that [`qualifies`], in any order, each with a frontal image as far as the index tells."""

    @abstractmethod
    def sections(self, entry: StudyEntry) -> Mapping[str, str]:
        """The sections of a study's report, in the report's order: key to text.

        Raises:
            SourceError: The report cannot be used.
        """

    @abstractmethod
    def image_file(self, entry: StudyEntry) -> Path | None:
        """The study's best frontal image, or `None` if it has none.

        Raises:
            SourceError: The image cannot be used.
        """

    def time(self, entry: StudyEntry) -> str:
        """What sorts the drawn studies of a patient; empty where nobody knows."""
        return entry.time

    def qualifies(self, sections: Mapping[str, object]) -> bool:
        """Whether a study's sections are enough: the standard ones, and as many as asked for."""
        return len(sections) >= self.options.sections and all(key in sections for key in self.standard_sections)

    def institutions(self) -> tuple[Institution, ...]:
        """The hierarchy that was drawn, without images."""
        return self._chosen[0]

    def image(self, patient_key: str, study_key: str, *, view_angle: float = 0.0, size: int = 224) -> Image.Image:
        """The study's frontal image as acquired, on a black square of `size` pixels. It cannot be turned."""
        if view_angle:
            raise ValueError(f"{self.name} has no view from {view_angle}°")
        return fit_square(self.read_image(self._chosen[1][study_key]), size)

    def read_image(self, file: Path, log: BuildLog | None = None) -> Image.Image:
        """An image of the source, upright, in the file's resolution.

        Raises:
            SourceError: It cannot be used.
        """
        return read_radiograph(file, log)

    def __getstate__(self) -> dict:
        # Workers need the chosen images alone, never the index of a whole hospital.
        kept = ("options", "log", "root", "image_root")
        return {name: self.__dict__[name] for name in kept} | {"_chosen": self._chosen}

    @cached_property
    def _chosen(self) -> tuple[tuple[Institution, ...], dict[str, Path]]:
        """The drawn hierarchy, and the image file of each study key."""
        options, files = self.options, {}
        labels = self._draw_patients()
        names, numbers = institution_names(options.seed), iter(range(10**9))
        people = patient_names(options.seed, options.institutions * options.patients)
        count = options.institutions * options.patients * options.studies
        identifiers = study_identifiers(options.seed, count, self.identifier_form)
        institutions, patient_number = [], 0
        for number, (label, patients) in enumerate(labels):
            built = []
            for studies in patients:
                own = []
                for _, sections, file in studies:
                    key = f"study{next(numbers):03d}"
                    files[key] = file
                    own.append(Study(key, next(identifiers), sections))
                built.append(Patient(f"pat{patient_number:03d}", next(people), tuple(own)))
                patient_number += 1
            institutions.append(Institution(f"inst{number:02d}", label or next(names), tuple(built)))
        return tuple(institutions), files

    def _draw_patients(self) -> list[tuple[str, list[list[tuple]]]]:
        """The institutions' labels, each with its patients' studies."""
        options = self.options
        pools: dict[str, dict[str, list[StudyEntry]]] = defaultdict(lambda: defaultdict(list))
        for entry in self.scan():
            pools[entry.institution][entry.patient].append(entry)
        grouped = list(pools) != [""] and bool(pools)
        wanted = options.patients if grouped else options.institutions * options.patients
        chosen, found = [], []
        total = options.institutions * options.patients * options.studies
        with tqdm(total=total, desc="choosing studies", unit="study") as bar:
            for label in sorted(pools, key=lambda label: self._order("institution", label)):
                patients = self._patients(pools[label], wanted, bar)
                found.append((label, len(patients)))
                if len(patients) == wanted:
                    chosen.append((label, patients))
                if len(chosen) == (options.institutions if grouped else 1):
                    break
        if len(chosen) < (options.institutions if grouped else 1):
            raise UserError(self._too_few(found, grouped))
        if grouped:
            return chosen
        patients, each = chosen[0][1], options.patients
        return [("", patients[start : start + each]) for start in range(0, len(patients), each)]

    def _patients(self, pool: Mapping[str, list[StudyEntry]], wanted: int, bar: tqdm) -> list[list[tuple]]:
        patients: list[list[tuple]] = []
        for patient in sorted(pool, key=lambda patient: self._order("patient", patient)):
            if len(patients) == wanted:
                break
            entries = pool[patient]
            if len(entries) < self.options.studies:
                self.log.notice(
                    "patient with too few studies",
                    self.root,
                    f"{len(entries)} studies that qualify, {self.options.studies} are needed",
                    f"patient {patient}",
                )
                continue
            if studies := self._studies(entries):
                patients.append(studies)
                bar.update(len(studies))
        return patients

    def _studies(self, entries: list[StudyEntry]) -> list[tuple[StudyEntry, tuple[Section, ...], Path]]:
        """A patient's drawn studies in order of time, or none if too few can be used."""
        usable = []
        for entry in sorted(entries, key=lambda entry: self._order("study", entry.study)):
            try:
                file = self.image_file(entry)
                if file is None:
                    self.log.notice("no frontal image", self.root, "study passed over", f"study {entry.study}")
                    continue
                self.read_image(file, self.log)
                sections = self._sections(entry)
                if unfit := [section.name for section in sections if not can_be_asked(section)]:
                    message = f"{', '.join(unfit)}: nothing in it that can be asked; study passed over"
                    self.log.notice("section that cannot be asked", self.root, message, f"study {entry.study}")
                    continue
                usable.append((entry, sections, file))
            except SourceError as error:
                self.log.fault(error)
            if len(usable) == self.options.studies:
                return sorted(usable, key=lambda study: (self.time(study[0]), study[0].study))
        return []

    def _sections(self, entry: StudyEntry) -> tuple[Section, ...]:
        """The drawn sections of a study, in the report's order."""
        sections = self.sections(entry)
        keys = list(self.standard_sections)
        if self.options.section_kinds == "any" or not keys:
            drawn = sorted(sections, key=lambda key: self._order("section", entry.study, key))
            keys = drawn[: self.options.sections]
        return tuple(Section(key, text) for key, text in sections.items() if key in keys)

    def _order(self, *key: str) -> int:
        return stable_number(self.options.seed, self.name, *key)

    def _too_few(self, found: list[tuple[str, int]], grouped: bool) -> str:
        options = self.options
        kinds = ", ".join(self.standard_sections) or f"{options.sections} sections"
        if not grouped:
            enough = sum(count for _, count in found)
            return (
                f"--root {self.root}: {enough} patients have {options.studies} studies with {kinds} and a frontal "
                f"image; {options.institutions} institutions of {options.patients} need "
                f"{options.institutions * options.patients}; lower --institutions, --patients or --studies"
            )
        full = [label for label, count in found if count == options.patients]
        return (
            f"--root {self.root}: {len(full)} institutions ({', '.join(sorted(full)) or 'none'}) have "
            f"{options.patients} patients with {options.studies} studies with {kinds} and an image; "
            f"{options.institutions} are asked for; lower --institutions, --patients or --studies"
        )


def section_key(heading: str) -> str:
    """A heading as rows spell it in ids.

    Example:
        >>> section_key("Clinical History ")
        'clinical_history'
    """
    return re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_")
