"""CheXpert Plus: chest radiographs of Stanford Hospital with the sections of their reports.

Everything but the images is read from `df_chexpert_plus_240401.csv`, which has one row an image and repeats a study's
report in each; images are the PNG of the release, or the JPEG of CheXpert under the same names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..build_log import SourceError
from ..errors import UserError
from ..hierarchy import stable_number
from ._hospital import HospitalCorpus, StudyEntry
from ._rows import CsvRows, Row, checked_rows


TABLE = "df_chexpert_plus_*.csv"
# Key of a section to the columns it is read from, the first that is filled, in the order of the hospital's reports.
# Left out: `end_of_impression` and `summary` hold a sign-off and a result code, `accession_number` a number.
SECTIONS = {
    "narrative": ("section_narrative",),
    "clinical_history": ("section_clinical_history", "section_history"),
    "comparison": ("section_comparison",),
    "technique": ("section_technique",),
    "procedure_comments": ("section_procedure_comments",),
    "findings": ("section_findings",),
    "impression": ("section_impression",),
}
COLUMNS = ("path_to_image", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order")
SECTION_COLUMNS = tuple(column for columns in SECTIONS.values() for column in columns)
PROJECTIONS = ("PA", "AP", "")  # the better first
SUFFIXES = (".png", ".jpg", ".jpeg")
_PATH = re.compile(r"(?:\w[\w.-]*/)?((?:train|valid|test)/(patient\d+)/study\d+)/(view(\d+)_(?:frontal|lateral))\.\w+")


class _Image(NamedTuple):
    """A row of the table as far as it is kept: one image, and the place of its study's report."""

    rank: tuple[int, int]
    name: str
    place: int
    order: str


class Corpus(HospitalCorpus):
    """CheXpert Plus; see [`~medforget_dataset.corpora.CorpusProtocol`].

    Raises:
        UserError: There is no table below `root`, or it lacks a column.
    """

    name = "chexpert-plus"
    restricted = True
    license = "other"
    license_name = "Stanford University Dataset Research Use Agreement"
    license_link = "https://stanfordaimi.azurewebsites.net/datasets/5158c524-d3ab-4e02-96e9-6ee9efc110a1"
    attribution = (
        "Reports and images are from CheXpert Plus (Chambon et al., CheXpert Plus: Augmenting a Large Chest X-ray "
        "Dataset with Text Radiology Reports, Patient Demographics and Additional Image Formats, arXiv:2405.19538, "
        "doi:10.57761/fzna-pm76), Stanford Center for Artificial Intelligence in Medicine and Imaging."
    )
    standard_sections = ("narrative", "clinical_history", "findings", "impression")

    def scan(self) -> Iterator[StudyEntry]:
        """Studies whose row has the sections asked for and a frontal image."""
        rows = tqdm(checked_rows(self._table), desc="reading reports", unit="image")
        reports: dict[str, int] = {}
        contradictory: set[str] = set()
        paths: set[str] = set()
        for row in rows:
            if isinstance(row, SourceError):
                self.log.fault(row)
                continue
            try:
                self._add(row, paths, reports, contradictory)
            except SourceError as error:
                self.log.fault(error)
        for key, count in self._lacking.items():
            message = f"{count:,} frontal images have no {key.replace('_', ' ')}; their studies are passed over"
            self.log.notice("studies without a section", self._table.file, message, key)
        for study, image in self._frontal.items():
            if study not in contradictory:
                yield StudyEntry(study.split("/")[1], study, image.order)

    def sections(self, entry: StudyEntry) -> Mapping[str, str]:
        """The filled section columns of a study."""
        return _sections(self._table.read(self._frontal[entry.study].place))

    def image_file(self, entry: StudyEntry) -> Path:
        """The frontal image, PA before AP, the first view among several."""
        below = f"{entry.study}/{self._frontal[entry.study].name}"
        for folder in self._image_folders:
            for suffix in SUFFIXES:
                if (file := folder / f"{below}{suffix}").is_file():
                    return file
        raise SourceError("missing image", self.image_root, f"no {below} with {', '.join(SUFFIXES)}", entry.study)

    def _add(self, row: Row, paths: set[str], reports: dict[str, int], contradictory: set[str]) -> None:
        """Keep what a row tells of its study.

        Raises:
            SourceError: The row is at fault.
        """
        path, side, projection, patient, order, *texts = row.values
        match = _PATH.fullmatch(path)
        if not match:
            message = f"path_to_image {path[:100]!r} is not like train/patient00001/study1/view1_frontal.jpg"
            raise SourceError("misplaced image", self._table.file, message, row.name)
        study, folder, name, view = match.groups()
        if f"{study}/{name}" in paths:
            raise SourceError("duplicate image", self._table.file, f"{path} came before", row.name)
        paths.add(f"{study}/{name}")
        if folder != patient:
            message = f"{path} is said to be of patient {patient!r}"
            raise SourceError("contradictory patient", self._table.file, message, row.name)
        if order and not order.isdecimal():
            message = f"patient_report_date_order {order!r} is no whole number"
            raise SourceError("damaged row", self._table.file, message, row.name)
        report = stable_number(order, *texts)
        if reports.setdefault(study, report) != report:
            contradictory.add(study)
            message = f"another report of {study} than in an earlier row; the study is passed over"
            raise SourceError("contradictory report", self._table.file, message, row.name)
        if side not in ("Frontal", "Lateral"):
            message = f"frontal_lateral {side!r} is neither Frontal nor Lateral"
            raise SourceError("unknown view", self._table.file, message, row.name)
        if side == "Lateral":
            return
        if projection not in PROJECTIONS:
            message = f"{path} is frontal and {projection} at once; passed over"
            self.log.notice("contradictory view", self._table.file, message, row.name)
            return
        sections = _sections(row.values)
        self._lacking.update(key for key in self.standard_sections if key not in sections)
        if self.qualifies(sections):
            image = _Image((PROJECTIONS.index(projection), int(view)), name, row.place, order.zfill(6))
            self._frontal[study] = min(image, self._frontal.get(study, image))

    @cached_property
    def _frontal(self) -> dict[str, _Image]:
        """The best frontal image of each study that qualifies."""
        return {}

    @cached_property
    def _lacking(self) -> Counter[str]:
        """How many frontal images lack a standard section."""
        return Counter()

    @cached_property
    def _table(self) -> CsvRows:
        files = sorted(self.root.glob(TABLE))
        if not files:
            raise UserError(f"--root {self.root}: no {TABLE} in it, such as df_chexpert_plus_240401.csv")
        if len(files) > 1:
            raise UserError(f"--root {self.root}: {', '.join(file.name for file in files)}; leave one")
        return CsvRows(files[0], [*COLUMNS, *SECTION_COLUMNS])

    @cached_property
    def _image_folders(self) -> list[Path]:
        """Where `train` or `valid` lies: in the folder of images or up to two folders below, as `PNG.zip` unpacks."""
        level, found = [self.image_root], []
        for _ in range(3):
            below: list[Path] = []
            for folder in level:
                if any((folder / split).is_dir() for split in ("train", "valid", "test")):
                    found.append(folder)
                else:
                    below += sorted(path for path in folder.iterdir() if path.is_dir())
            level = below
        if not found:
            raise UserError(
                f"--root {self.root}: no images: no folder train or valid in {self.image_root} or up to two folders "
                "below; name theirs with --images"
            )
        return found


def _sections(values: list[str]) -> dict[str, str]:
    texts = dict(zip(SECTION_COLUMNS, values[len(COLUMNS) :], strict=True))
    filled = ((key, next((texts[name] for name in columns if texts[name]), "")) for key, columns in SECTIONS.items())
    return {key: " ".join(text.split()) for key, text in filled if text}
