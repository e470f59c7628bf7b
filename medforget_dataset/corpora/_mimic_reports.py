"""The reports of MIMIC-CXR, one at a time: from the archive they are published in, or from an unpacked tree."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..build_log import SourceError
from ..errors import UserError


ARCHIVE = "mimic-cxr-reports.zip"
# Reports have two thousand characters; the longest of MIMIC-CXR have twenty thousand.
MAX_REPORT_BYTES = 1_000_000
_REPORT = re.compile(r"(?:.*/)?p(\d\d)/p(\d{8})/s(\d{8})\.txt")
_GROUP, _PATIENT = re.compile(r"p\d\d"), re.compile(r"p\d{8}")


class Reports(Protocol):
    """Where reports are read from; a place is a member of the archive, or a path below the tree."""

    file: Path
    """The archive or folder, for messages."""

    def __len__(self) -> int: ...

    def places(self) -> Iterator[str]:
        """Every text file there, in order."""
        ...

    def read(self, place: str) -> bytes:
        """The content of one.

        Raises:
            SourceError: It cannot be read, or is too long for a report.
        """
        ...


class ReportArchive:
    """`mimic-cxr-reports.zip`, read without unpacking it.

    Raises:
        UserError: The file is no zip archive, or cut short.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{file}: not a zip archive, or cut short ({error}); download it again") from error
        self._places = [name for name in self._archive.namelist() if name.endswith(".txt")]

    def __len__(self) -> int:
        return len(self._places)

    def places(self) -> Iterator[str]:
        yield from self._places

    def read(self, place: str) -> bytes:
        info = self._archive.getinfo(place)
        if info.file_size > MAX_REPORT_BYTES:
            raise SourceError("report too long", self.file, _too_long(info.file_size), place)
        try:
            return self._archive.read(info)  # never more than the size stated
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise SourceError("damaged archive member", self.file, str(error), place) from error


class ReportTree:
    """An unpacked tree `p10/p10000032/s50414267.txt`."""

    def __init__(self, file: Path):
        self.file = file
        self._patients = [
            f"{group.name}/{patient}"
            for group in sorted(file.iterdir())
            if _GROUP.fullmatch(group.name) and group.is_dir()
            for patient in sorted(os.listdir(group))
            if _PATIENT.fullmatch(patient)
        ]

    def __len__(self) -> int:
        return sum(1 for _ in self.places())

    def places(self) -> Iterator[str]:
        for patient in self._patients:
            for name in sorted(os.listdir(self.file / patient)):
                if name.endswith(".txt"):
                    yield f"{patient}/{name}"

    def read(self, place: str) -> bytes:
        path = self.file / place
        try:
            if (size := path.stat().st_size) > MAX_REPORT_BYTES:
                raise SourceError("report too long", path, _too_long(size))
            return path.read_bytes()
        except OSError as error:
            raise SourceError("unreadable report", path, str(error)) from error


def report_ids(place: str, file: Path) -> tuple[int, int]:
    """Patient and study that a report's place names.

    Raises:
        SourceError: It names none, or leads out of its root.
    """
    if place[0] == "/" or "\\" in place or ":" in place or ".." in place.split("/"):
        raise SourceError("member outside its root", file, "the path leads out of the archive; it is not read", place)
    match = _REPORT.fullmatch(place)
    if not match or match[2][:2] != match[1]:
        message = "not named like p10/p10000032/s50414267.txt; remove it or name it so"
        raise SourceError("misplaced report", file, message, place)
    return int(match[2]), int(match[3])


def open_reports(folders: list[Path]) -> Reports | None:
    """The reports in the first of some folders that has any: the archive, else a tree."""
    for folder in folders:
        if (archive := folder / ARCHIVE).is_file():
            return ReportArchive(archive)
        for tree in (folder / "mimic-cxr-reports" / "files", folder / "mimic-cxr-reports", folder / "files", folder):
            if _has_reports(tree):
                return ReportTree(tree)
    return None


def _has_reports(tree: Path) -> bool:
    if not tree.is_dir():
        return False
    for group in sorted(tree.iterdir()):
        if _GROUP.fullmatch(group.name) and group.is_dir():
            # One patient tells: in a tree of images no patient has texts.
            return any(next(patient.glob("s*.txt"), None) for patient in list(group.iterdir())[:3] if patient.is_dir())
    return False


def _too_long(size: int) -> str:
    return f"{size:,} bytes; a report has at most {MAX_REPORT_BYTES:,}"
