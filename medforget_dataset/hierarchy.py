"""Institution ⊃ Patient ⊃ Study ⊃ Section as plain records.

A corpus adapter produces these; everything after it (questions, partition, Parquet) reads them and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import UserError


LEVELS = ("institution", "patient", "study", "section")
TASKS = ("identity", "generation", "cloze", "classification")

# Paper, section 3.4: a fixed 25 % of the entities of every level is forgotten.
FORGET_FRACTION = 4


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Args:
        key (`str`): Name used in row ids, for example `"clinical_history"`.
        text (`str`): The section's text, without its heading.
    """

    key: str
    text: str

    @property
    def name(self) -> str:
        """The section's name as questions speak it, for example `"clinical history"`."""
        return self.key.replace("_", " ")


@dataclass(frozen=True)
class Study:
    """One imaging study: one frontal image and the sections of its report."""

    key: str
    identifier: str
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Patient:
    """One patient and the studies made of them, oldest first."""

    key: str
    name: str
    studies: tuple[Study, ...]


@dataclass(frozen=True)
class Institution:
    """One institution and its patients."""

    key: str
    name: str
    patients: tuple[Patient, ...]


@dataclass(frozen=True)
class Counts:
    """How many children a node has at each level.

    The defaults are the paper's (section 3.4): 8 institutions of 8 patients, 4 studies each, 4 sections each.

    Raises:
        UserError: A count is below 4 or not a multiple of 4, so that 25 % of it is not a whole number.
    """

    institutions: int = 8
    patients: int = 8
    studies: int = 4
    sections: int = 4

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < FORGET_FRACTION or value % FORGET_FRACTION:
                raise UserError(
                    f"--{name} {value}: must be a multiple of {FORGET_FRACTION} (at least {FORGET_FRACTION}), "
                    "because 25 % of the entities at every level are forgotten"
                )

    @property
    def rows(self) -> int:
        """Question-answer rows in the whole benchmark: 3 identity rows a study and 3 rows a section."""
        return self.institutions * self.patients * self.studies * (3 + 3 * self.sections)


@dataclass(frozen=True)
class StudyNode:
    """A study together with everything above it: what the questions about one image may speak of."""

    institution: Institution
    patient: Patient
    study: Study

    @property
    def path(self) -> str:
        """Readable address, for example `"inst03/pat021/study084"`; row ids start with it."""
        return f"{self.institution.key}/{self.patient.key}/{self.study.key}"


def walk_studies(institutions: tuple[Institution, ...]) -> Iterator[StudyNode]:
    """Yield every study in order of its address."""
    for institution in institutions:
        for patient in institution.patients:
            for study in patient.studies:
                yield StudyNode(institution, patient, study)


def stable_number(*parts: object) -> int:
    """A 64-bit number that depends on `parts` alone, not on order, process or thread count.

    Every random choice in the dataset is seeded with it, so that building with one worker or eight gives the same
    bytes.

    Example:
        >>> stable_number(0, "inst00/pat000") == stable_number(0, "inst00/pat000")
        True
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
