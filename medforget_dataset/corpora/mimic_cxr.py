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
from ..sections import Report, parse_report
from ._hospital import HospitalCorpus, StudyEntry
from ._mimic_reports import ARCHIVE, Reports, open_reports, report_ids
from ._tables import find_columns, read_csv


METADATA = "mimic-cxr-2.0.0-metadata.csv"
COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
FRONTAL = ("PA", "AP")  # the better first
# PhysioNet's folders below a download: mimic-cxr/2.1.0, mimic-cxr-jpg/2.1.0.
PLACES = ("", "mimic-cxr*", "mimic-cxr*/*", "files/mimic-cxr*", "files/mimic-cxr*/*")
_DICOM = re.compile(r".+\.dcm(?:\.gz)?")


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
        "Reports and images are from MIMIC-CXR (Johnson et al., MIMIC-CXR, a de-identified publicly available "
        "database of chest radiographs with free-text reports, Scientific Data 6, 2019) and MIMIC-CXR-JPG (Johnson et "
        "al., arXiv:1901.07042), PhysioNet."
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
        place = self._place_of[int(entry.study)]
        return self._parse(place).sections

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
    def _place_of(self) -> dict[int, str]:
        """Where the report of a study that qualifies stands."""
        return {}

    @cached_property
    def _reports(self) -> Reports:
        folders = _folders(self.root)
        if reports := open_reports(folders):
            return reports
        raise UserError(
            f"--root {self.root}: no MIMIC-CXR reports: neither {ARCHIVE} nor p10/p10000032/s50414267.txt in it, "
            "in files, in mimic-cxr-reports or in mimic-cxr*/*"
        )

    @cached_property
    def _images(self) -> tuple[Path, Path | None]:
        """The folder that holds p10 to p19, and the metadata if the images are MIMIC-CXR-JPG's."""
        folders = [*_folders(self.image_root), *_folders(self.root)]
        for folder in folders:
            for name in (f"{METADATA}.gz", METADATA):
                if (folder / name).is_file():
                    return folder / "files", folder / name
        for folder in folders:
            for files in (folder / "files", folder):
                kinds = {file.name.partition(".")[2] for file in _one_study(files)}
                if "jpg" in kinds:
                    raise UserError(f"{folder}: JPEG images but no {METADATA}.gz, which tells the frontal ones")
                if kinds & {"dcm", "dcm.gz"}:
                    return files, None
        raise UserError(
            f"--root {self.root}: no images: neither {METADATA}.gz with files/p10 beside it nor DICOM files below "
            "files/p10; name their folder with --images"
        )

    def _qualifying_reports(self) -> dict[int, int]:
        """Study to patient, for reports with the sections asked for."""
        patients: dict[int, int] = {}
        seen: set[int] = set()
        reports = self._reports
        for place in tqdm(reports.places(), desc="reading reports", unit="report", total=len(reports)):
            try:
                patient, study = report_ids(place, reports.file)
                if study in seen:
                    raise SourceError("duplicate study", reports.file, "a study of this id came before", place)
                seen.add(study)
                report = self._parse(place, log=True)
            except SourceError as error:
                self.log.fault(error)
                continue
            if self.qualifies(report.sections):
                patients[study] = patient
                self._place_of[study] = place
        return patients

    def _parse(self, place: str, log: bool = False) -> Report:
        data = self._reports.read(place)
        try:
            report = parse_report(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            message = f"byte {error.start} is not UTF-8; convert the file"
            raise SourceError("text that is not UTF-8", self._reports.file, message, place) from error
        if log:
            for kind, section in report.oddities:
                self.log.notice(kind, self._reports.file, f"{kind} {section}".strip(), place)
        return report

    def _read_metadata(self, file: Path, patients: Mapping[int, int]) -> dict[int, _Frontal]:
        """The best frontal image of each of these studies, in the studies' order."""
        best: dict[int, _Frontal] = {}
        seen: set[str] = set()
        rows = read_csv(file)
        columns = find_columns(next(rows)[1], COLUMNS, file)
        for number, row in rows:
            try:
                dicom_id, patient, study, view, *when = (row[column] for column in columns)
                if view not in FRONTAL or int(study) not in patients:
                    continue
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
    return [folder for pattern in PLACES for folder in (sorted(root.glob(pattern)) if pattern else [root])]


def _one_study(files: Path) -> list[Path]:
    """The image files of the first study below `files`."""
    study = next(files.glob("p[0-9][0-9]/p????????/s????????"), None)
    return list(study.iterdir()) if study and study.is_dir() else []


def _time(date: object, time: object) -> str:
    """Sorts by time: the metadata writes 21800506 and 213014.531, DICOM the same with zeros in front."""
    whole, _, fraction = str(time).strip().partition(".")
    return f"{str(date).strip()}{whole.zfill(6)}.{fraction}" if str(date).strip() else ""
