"""MIMIC-CXR: chest radiographs of the Beth Israel Deaconess Medical Center with their reports.

Reports are read from `mimic-cxr-reports.zip` without unpacking it, or from an unpacked tree; images from MIMIC-CXR-JPG
with its metadata, or from the DICOM files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..build_log import SourceError
from ..errors import UserError
from ..images import read_dicom_header
from ..sections import parse_report
from ._hospital import HospitalCorpus, StudyEntry
from ._mimic_reports import ARCHIVE, Reports, open_reports
from ._tables import find_columns, read_csv


METADATA = "mimic-cxr-2.0.0-metadata.csv"
COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
FRONTAL = ("PA", "AP")  # the better first
# PhysioNet's folders below a download: mimic-cxr/2.1.0, mimic-cxr-jpg/2.1.0.
PLACES = ("", "mimic-cxr*", "mimic-cxr*/*", "files/mimic-cxr*", "files/mimic-cxr*/*")
_DICOM = re.compile(r".+\.dcm(?:\.gz)?")
_IMAGE = re.compile(r"\.(jpg|dcm)(?:\.gz)?$")
_DICOM_ID = re.compile(r"[\w-]+")


class _Frontal(NamedTuple):
    """A study's best frontal image: how good its view is, its id, and when it was acquired."""

    rank: int
    dicom_id: str
    time: str


class Corpus(HospitalCorpus):
    """MIMIC-CXR; see [`~medforget_dataset.corpora.CorpusProtocol`].

    Raises:
        UserError: There are no reports below `root`, no images below `root` or `images`, or images without the
            metadata that tells the frontal ones.
    """

    name = "mimic-cxr"
    restricted = True
    license = "other"
    license_name = "PhysioNet Credentialed Health Data License 1.5.0"
    license_link = "https://physionet.org/content/mimic-cxr/view-license/2.1.0/"
    attribution = (
        "Reports and images are from MIMIC-CXR v2 (Johnson, Pollard, Mark, Berkowitz and Horng, MIMIC-CXR Database, "
        "PhysioNet, 2019, https://doi.org/10.13026/C2JT1Q; Johnson et al., MIMIC-CXR, a de-identified publicly "
        "available database of chest radiographs with free-text reports, Scientific Data 6, 317, 2019, "
        "https://doi.org/10.1038/s41597-019-0322-0) and MIMIC-CXR-JPG (Johnson et al., MIMIC-CXR-JPG, a large "
        "publicly available database of labeled chest radiographs, 2019, arXiv:1901.07042, "
        "https://doi.org/10.13026/8360-t248), under the PhysioNet Credentialed Health Data License 1.5.0. Names of "
        "institutions and patients are invented."
    )

    def scan(self) -> Iterator[StudyEntry]:
        """Studies whose report has the sections asked for, and a frontal image as far as the metadata knows."""
        folder, metadata = self._images  # a missing index is told before minutes of reading
        patients = self._qualifying_reports()
        if metadata is None:
            for study, patient in patients.items():
                yield StudyEntry(str(patient), str(study))
            return
        self._frontal.update(self._read_metadata(metadata, patients))
        for study, frontal in self._frontal.items():
            yield StudyEntry(str(patients[study]), str(study), frontal.time)

    def sections(self, entry: StudyEntry) -> Mapping[str, str]:
        """The sections of a study's report."""
        return parse_report(self._reports.read(self._reports.find(int(entry.study)))).sections

    def image_file(self, entry: StudyEntry) -> Path | None:
        """The frontal image, PA before AP, the first by id among several."""
        folder, metadata = self._images
        folder = folder / f"p{entry.patient[:2]}" / f"p{entry.patient}" / f"s{entry.study}"
        if metadata is not None:
            return folder / f"{self._frontal[int(entry.study)].dicom_id}.jpg"
        views = []
        for file in sorted(folder.glob("*")):
            if _DICOM.fullmatch(file.name):
                header = read_dicom_header(file)
                if (view := str(header.get("ViewPosition", ""))) in FRONTAL:
                    time = _time(header.get("StudyDate", ""), header.get("StudyTime", ""))
                    views.append((_Frontal(FRONTAL.index(view), file.name, time), file))
        if not views:
            return None
        self._frontal[int(entry.study)], file = min(views)
        return file

    def time(self, entry: StudyEntry) -> str:
        """When the study was made, by the metadata or the DICOM header."""
        return self._frontal[int(entry.study)].time

    @cached_property
    def _frontal(self) -> dict[int, _Frontal]:
        return {}

    @cached_property
    def _reports(self) -> Reports:
        if reports := open_reports(_folders(self.root), self.log):
            return reports
        raise UserError(
            f"--root {self.root}: no MIMIC-CXR reports: neither {ARCHIVE} nor files/p10/p10000032/s50414267.txt is "
            "there, in mimic-cxr-reports or in mimic-cxr/2.1.0"
        )

    @cached_property
    def _images(self) -> tuple[Path, Path | None]:
        """The folder that holds p10 to p19, and the metadata if the images are MIMIC-CXR-JPG's."""
        folders = _folders(self.image_root)
        kinds = {folder: _image_kinds(folder / "files") for folder in folders}
        for folder in folders:
            for name in (f"{METADATA}.gz", METADATA):
                # Some keep the metadata beside DICOM files, which tell the same.
                if (folder / name).is_file() and kinds[folder] != {"dcm"}:
                    return folder / "files", folder / name
        for folder in folders:
            if "jpg" in kinds[folder]:
                raise UserError(
                    f"{folder}: JPEG images but no {METADATA}.gz, which tells the frontal ones; it comes with "
                    "MIMIC-CXR-JPG"
                )
            if kinds[folder]:
                return folder / "files", None
        raise UserError(
            f"--{'images' if self.options.images else 'root'} {self.image_root}: no images: neither "
            f"{METADATA}.gz nor files/p10/p10000032/s50414267/*.dcm is there or in mimic-cxr*/2.*; name their folder "
            "with --images"
        )

    def _qualifying_reports(self) -> dict[int, int]:
        """Study to patient, for reports with the sections asked for."""
        patients: dict[int, int] = {}
        reports = self._reports
        for number in tqdm(range(len(reports)), desc="reading reports", unit="report"):
            try:
                report = parse_report(reports.read(number))
            except SourceError as error:
                self.log.fault(error)
                continue
            for kind, section in report.oddities:
                self.log.notice(kind, reports.file, f"{kind} {section}".strip(), reports.place(number))
            if self.qualifies(report.sections):
                patient, study = reports.ids(number)
                patients[study] = patient
        return patients

    def _read_metadata(self, file: Path, patients: Mapping[int, int]) -> dict[int, _Frontal]:
        """The best frontal image of each of these studies, in the studies' order."""
        best: dict[int, _Frontal] = {}
        seen: set[str] = set()
        rows = read_csv(file)
        columns = find_columns(next(rows)[1], COLUMNS, file)
        for number, row in rows:
            try:
                dicom_id, patient, study, view, *when = (row[column].strip() for column in columns)
                if int(study) not in patients or view not in FRONTAL:
                    continue
                if not _DICOM_ID.fullmatch(dicom_id):
                    raise ValueError(f"{dicom_id!r} is not the id of an image")
                if dicom_id in seen or patients[int(study)] != int(patient):
                    problem = "came before" if dicom_id in seen else f"is of patient {patients[int(study)]}"
                    raise SourceError("duplicate image", file, f"{dicom_id} {problem}", f"row {number}")
            except (IndexError, ValueError) as error:
                self.log.fault(SourceError("damaged metadata row", file, str(error), f"row {number}"))
                continue
            except SourceError as error:
                self.log.fault(error)
                continue
            seen.add(dicom_id)
            found = _Frontal(FRONTAL.index(view), dicom_id, _time(*when))
            best[int(study)] = min(found, best.get(int(study), found))
        return {study: best[study] for study in patients if study in best}


def _folders(root: Path) -> list[Path]:
    """Where a download may lie below `root`, the newest version first."""
    folders = (sorted(root.glob(pattern), reverse=True) if pattern else [root] for pattern in PLACES)
    return [folder for found in folders for folder in found if folder.is_dir()]


def _image_kinds(files: Path) -> set[str]:
    """Which of `"jpg"` and `"dcm"` the first study with images below `files` has."""
    first = next((file for file in files.glob("p[0-9][0-9]/p*/s*/*") if _IMAGE.search(file.name)), None)
    names = (match for file in (first.parent.iterdir() if first else ()) if (match := _IMAGE.search(file.name)))
    return {match[1] for match in names}


def _time(date: object, time: object) -> str:
    """Sorts by time: the metadata writes 21800506 and 213014.531, DICOM the same with zeros in front."""
    whole, _, fraction = str(time).strip().partition(".")
    return f"{str(date).strip()}{whole.zfill(6)}.{fraction}" if str(date).strip() else ""
