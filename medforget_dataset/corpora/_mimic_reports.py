"""The reports of MIMIC-CXR, one at a time: from the archive they are published in, or from an unpacked tree.

Both are known by compact tables of numbers: what Python keeps of an archive's member is twenty times as large.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from ..build_log import BuildLog, SourceError
from ..errors import UserError


ARCHIVE = "mimic-cxr-reports.zip"
# Reports have two thousand characters; the longest of MIMIC-CXR have twenty thousand.
MAX_REPORT_BYTES = 1_000_000
TREES = ("mimic-cxr-reports/files", "mimic-cxr-reports", "files", "")
_REPORT = re.compile(r"(.*/)?p(\d\d)/p(\2\d{6})/s(\d{8})\.txt")
_IDS = [("patient", "u4"), ("study", "u4")]
_MEMBER = [("folder", "u4"), ("offset", "u8"), ("packed", "u8"), ("size", "u8"), ("crc", "u4"), ("method", "u2")]
_BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError)


class Reports(ABC):
    """Reports by number, from 0.

    Args:
        file (`Path`): The archive or folder.
        rows (`list[tuple]`): What is known of each report, its patient and study first.
        fields (`list[tuple[str, str]]`): The rows' names and types.
        log ([`~medforget_dataset.build_log.BuildLog`]): Told of studies that are there twice.
    """

    def __init__(self, file: Path, rows: list[tuple], fields: list[tuple[str, str]], log: BuildLog):
        self.file = file
        table = np.array(rows, dtype=fields)
        table = table[np.argsort(table["study"], kind="stable")]
        studies, counts = np.unique(table["study"], return_counts=True)
        for study in studies[counts > 1]:
            same = table[table["study"] == study]
            places = ", ".join(f"p{patient}/s{study}.txt" for patient in same["patient"])
            message = f"{len(same)} reports of this study ({places}); none is used, remove all but the right one"
            log.fault(SourceError("duplicate study", file, message, f"s{study}"))
        self.table = table[np.isin(table["study"], studies[counts == 1])]

    def __len__(self) -> int:
        return len(self.table)

    def ids(self, number: int) -> tuple[int, int]:
        """Patient and study of a report."""
        row = self.table[number]
        return int(row["patient"]), int(row["study"])

    def find(self, study: int) -> int:
        """The number of a study's report."""
        return int(np.searchsorted(self.table["study"], study))

    def place(self, number: int) -> str:
        """Where a report stands, below the archive's or tree's root."""
        patient, study = self.ids(number)
        return f"p{str(patient)[:2]}/p{patient}/s{study}.txt"

    @abstractmethod
    def read(self, number: int) -> str:
        """The text of a report.

        Raises:
            SourceError: It cannot be read, is too long for a report, or is not UTF-8.
        """

    def _decode(self, data: bytes, file: Path, place: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"byte {error.start} is not UTF-8; convert the file"
            raise SourceError("text that is not UTF-8", file, message, place) from error


class ReportArchive(Reports):
    """`mimic-cxr-reports.zip`, read without unpacking it.

    Raises:
        UserError: The file is no zip archive, or cut short, or holds no reports.
    """

    def __init__(self, file: Path, log: BuildLog):
        try:
            self._archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{file}: not a zip archive, or cut short ({error}); download it again") from error
        rows, self._folders = [], dict[str, int]()
        for info in self._archive.infolist():
            try:
                if match := _match_member(info.filename, file):
                    folder = self._folders.setdefault(match[1] or "", len(self._folders))
                    ids = int(match[3]), int(match[4])
                    size = info.compress_size, info.file_size
                    rows.append((*ids, folder, info.header_offset, *size, info.CRC, info.compress_type))
            except SourceError as error:
                log.fault(error)
        if not rows:
            raise UserError(f"{file}: holds no reports like files/p10/p10000032/s50414267.txt; download it again")
        self._archive.filelist.clear()
        self._archive.NameToInfo.clear()
        super().__init__(file, rows, _IDS + _MEMBER, log)
        self._prefixes = list(self._folders)

    def place(self, number: int) -> str:
        return self._prefixes[self.table[number]["folder"]] + super().place(number)

    def read(self, number: int) -> str:
        place = self.place(number)
        info = zipfile.ZipInfo(place)
        _, _, _, info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type = self.table[
            number
        ].item()
        if info.file_size > MAX_REPORT_BYTES:
            raise _too_long(info.file_size, self.file, place)
        try:
            with self._archive.open(info) as member:
                # A damaged archive may state a size that is not the member's.
                data = member.read(MAX_REPORT_BYTES + 1)
        except _BROKEN as error:
            raise SourceError("damaged archive member", self.file, f"{error}; download it again", place) from error
        return self._decode(data, self.file, place)


class ReportTree(Reports):
    """An unpacked tree `p10/p10000032/s50414267.txt`."""

    def __init__(self, file: Path, log: BuildLog):
        rows = []
        for path in file.glob("p[0-9][0-9]/p*/*.txt"):
            if match := _REPORT.fullmatch(place := path.relative_to(file).as_posix()):
                rows.append((int(match[3]), int(match[4])))
            else:
                log.fault(_misplaced(file, place))
        super().__init__(file, rows, _IDS, log)

    def read(self, number: int) -> str:
        place = self.place(number)
        path = self.file / place
        try:
            if (size := path.stat().st_size) > MAX_REPORT_BYTES:
                raise _too_long(size, path)
            data = path.read_bytes()
        except OSError as error:
            raise SourceError("unreadable report", path, error.strerror or str(error)) from error
        return self._decode(data, path, "")


def open_reports(folders: Iterable[Path], log: BuildLog) -> Reports | None:
    """The archive in the first of some folders that has one, or else the tree in the first that has one."""
    folders = list(folders)
    for folder in folders:
        if (archive := folder / ARCHIVE).is_file():
            return ReportArchive(archive, log)
    for folder in folders:
        for tree in TREES:
            if next((folder / tree).glob("p[0-9][0-9]/p*/s*.txt"), None):
                return ReportTree(folder / tree, log)
    return None


def _match_member(name: str, file: Path) -> re.Match[str] | None:
    """Patient and study in a member's name; `None` for what is no text, such as a folder.

    Raises:
        SourceError: The name leads out of the archive's root, or is no report's.
    """
    if match := _REPORT.fullmatch(name):
        if name[0] not in "/\\" and ".." not in name and ":" not in name:
            return match
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or parts[:1] == ("/",) or re.match("[A-Za-z]:", name):
        message = "leads out of the archive; it is not read, get the archive from PhysioNet again"
        raise SourceError("member outside its root", file, message, name)
    if name.endswith(".txt"):
        raise _misplaced(file, name)
    return None


def _misplaced(file: Path, place: str) -> SourceError:
    return SourceError("misplaced report", file, "not named like p10/p10000032/s50414267.txt; remove it", place)


def _too_long(size: int, file: Path, place: str = "") -> SourceError:
    return SourceError("report too long", file, f"{size:,} bytes; a report has at most {MAX_REPORT_BYTES:,}", place)
