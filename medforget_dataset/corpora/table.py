"""A table of one's own: any hospital, any kind of image, with real institution labels.

A CSV or Parquet file with one row a section and the columns `institution`, `patient`, `study`, `section`, `text` and
`image`; others are ignored. Institutions keep their labels; patients and studies get invented names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..build_log import BuildLog, SourceError
from ..errors import UserError
from ..images import read_rgb
from ..options import BuildOptions
from ._hospital import HospitalCorpus, StudyEntry, section_key
from ._rows import Row, RowReader, checked_rows, open_rows


COLUMNS = ("institution", "patient", "study", "section", "text", "image")
SUFFIXES = (".csv", ".parquet")
# By how much the channels of a grey image may differ after JPEG compression, of 255.
GREY_TOLERANCE = 16
NO_LICENSE = "terms not stated, taken for restricted"


@dataclass
class _Study:
    """What the rows of a study agree on, where each of its sections stands, and its first row's name."""

    entry: StudyEntry
    image: str
    row: str
    places: dict[str, int] = field(default_factory=dict)


class Corpus(HospitalCorpus):
    """A table; see [`~medforget_dataset.corpora.CorpusProtocol`]. `root` is its folder, or the file itself.

    It is restricted unless `license` says under which terms it may be shared.

    Raises:
        UserError: There is no table, more than one, or it lacks a column.
    """

    name = "table"
    real_institutions = True
    image_noun = "picture"
    attribution = "Texts and images are from a table that the builder of this dataset supplied."
    standard_sections = ()
    identifier_form = "study_imaging"

    def __init__(self, options: BuildOptions, log: BuildLog | None = None):
        root = Path(options.root).expanduser()
        self._named_file = root if root.is_file() else None
        super().__init__(replace(options, root=str(root.parent)) if self._named_file else options, log)
        self.restricted = not options.license
        self.license = options.license or "other"
        self.license_name = "" if options.license else NO_LICENSE

    def scan(self) -> Iterator[StudyEntry]:
        """Studies with as many sections as asked for, in the table's order."""
        owners: dict[str, str] = {}
        contradictory: set[str] = set()
        for row in tqdm(checked_rows(self._table), desc="reading the table", unit="row"):
            if isinstance(row, SourceError):
                self.log.fault(row)
                continue
            try:
                self._add(row, owners, contradictory)
            except SourceError as error:
                self.log.fault(error)
        for id, study in self._studies_of_table.items():
            if id not in contradictory and self.qualifies(study.places):
                yield study.entry

    def sections(self, entry: StudyEntry) -> Mapping[str, str]:
        """The sections of a study, in the table's order."""
        places = self._studies_of_table[entry.study].places
        return {key: " ".join(self._table.read(place)[COLUMNS.index("text")].split()) for key, place in places.items()}

    def image_file(self, entry: StudyEntry) -> Path:
        """The study's image, which must lie below the folder of images, links followed."""
        study = self._studies_of_table[entry.study]
        file = self.image_root / study.image
        if not file.resolve().is_relative_to(self.image_root.resolve()):
            message = f"image {study.image!r} is a link out of {self.image_root}; name its folder with --images"
            raise SourceError("image outside its folder", self._table.file, message, study.row)
        if not file.is_file():
            raise SourceError("missing image", self._table.file, f"image {file} does not exist", study.row)
        return file

    def read_image(self, file: Path, log: BuildLog | None = None) -> Image.Image:
        """The image, in colour if it has any: a table may hold pathology as well as radiographs."""
        try:
            with Image.open(file) as opened:
                coloured = opened.mode not in ("1", "L", "LA", "I", "F") and not opened.mode.startswith("I;")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            coloured = False  # DICOM, or damaged, which is told by whoever reads it
        image = read_rgb(file, str(file)) if coloured else None
        return image if image is not None and _has_colour(image) else super().read_image(file, log)

    def _add(self, row: Row, owners: dict[str, str], contradictory: set[str]) -> None:
        """Keep what a row tells.

        Args:
            row ([`~medforget_dataset.corpora._rows.Row`]): The row.
            owners (`dict[str, str]`): Image to the study it belongs to; extended.
            contradictory (`set[str]`): Studies whose rows disagree; extended.

        Raises:
            SourceError: The row is at fault.
        """
        institution, patient, study, heading, text, image = row.values
        file, key = self._table.file, section_key(heading)
        cells = {"institution": institution, "patient": patient, "study": study, "section": key, "image": image}
        if empty := [name for name, value in cells.items() if not value]:
            raise SourceError("empty cell", file, f"{', '.join(empty)} is empty", row.name)
        _check_path(image, file, row.name)
        new = _Study(StudyEntry(patient, study, f"{len(owners):09d}", institution), image, row.name)
        known = self._studies_of_table.setdefault(study, new)
        problem = ""
        for name, mine, theirs in (
            ("patient", patient, known.entry.patient),
            ("institution", institution, known.entry.institution),
            ("image", image, known.image),
        ):
            if mine != theirs:
                problem = f"{name} is {mine!r}, in {known.row} it is {theirs!r}"
        if (owner := owners.setdefault(image, study)) != study:
            contradictory.add(owner)
            problem = f"its image {image!r} is that of study {owner!r} as well"
        if key in known.places:
            problem = f"section {heading!r} came before"
        if problem:
            contradictory.add(study)
            message = f"study {study!r}: {problem}; the study is passed over"
            raise SourceError("contradictory study", file, message, row.name)
        if not text:
            self.log.notice("empty section", file, f"study {study!r}: {heading!r} has no text", row.name)
            return
        known.places[key] = row.place

    @cached_property
    def _studies_of_table(self) -> dict[str, _Study]:
        return {}

    @cached_property
    def _table(self) -> RowReader:
        return open_rows(self._find_table(), COLUMNS)

    def _find_table(self) -> Path:
        if self._named_file:
            if self._named_file.suffix not in SUFFIXES:
                raise UserError(f"--root {self._named_file}: must be a .csv or .parquet file, or a folder with one")
            return self._named_file
        found = sorted(file for file in self.root.iterdir() if file.suffix in SUFFIXES)
        named = [file for file in found if file.stem == "table"]
        chosen = named or found
        if len(chosen) != 1:
            what = f"{', '.join(file.name for file in chosen)}; name one of them" if chosen else "no table.csv in it"
            raise UserError(f"--root {self.root}: {what}, or table.parquet")
        return chosen[0]


def _check_path(image: str, file: Path, row: str) -> None:
    """Refuse a path that may lead out of the folder of images; nothing is opened.

    Raises:
        SourceError: It is absolute, an address, or climbs.
    """
    windows = PureWindowsPath(image)
    if PurePosixPath(image).is_absolute() or windows.drive or windows.root or "://" in image:
        problem = "must be a path below the table's folder or --images"
    elif ".." in windows.parts:
        problem = "leads out of its folder"
    elif "\\" in image:
        problem = "must have / between folders"
    else:
        return
    raise SourceError("image outside its folder", file, f"image {image!r} {problem}; it is not opened", row)


def _has_colour(image: Image.Image) -> bool:
    """Whether the channels of an RGB image differ by more than JPEG compression makes them."""
    channels = np.asarray(image, dtype=np.int16)  # (H, W, 3)
    return bool((channels.max(axis=2) - channels.min(axis=2)).max() > GREY_TOLERANCE)
