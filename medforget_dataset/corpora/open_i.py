"""Open-i: the chest radiographs of Indiana University with their reports, open to everybody.

Reports are XML files, `ecgen-radiology/1.xml`; images are PNG files named by the reports. Every report is of another
person, so that a patient of the hierarchy is a group of studies drawn at random.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from tqdm import tqdm

from ..build_log import SourceError
from ..errors import UserError
from ..hierarchy import Section
from ..questions import can_be_asked
from ._hospital import HospitalCorpus, StudyEntry, section_key


REPORT_FOLDERS = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", "NLMCXR_reports", "")
IMAGE_FOLDERS = ("NLMCXR_png", "images", "")
SUFFIXES = (".png", ".jpg", ".jpeg")
# Reports of the collection have some 5,000 bytes.
MAX_REPORT_BYTES = 1_000_000
_LATERAL = re.compile(r"\blat(?:eral)?\b", re.IGNORECASE)
# The better first.
_FRONTAL = (re.compile(r"\b(?:pa|frontal)\b", re.IGNORECASE), re.compile(r"\b(?:ap|portable)\b", re.IGNORECASE))


class _Report(NamedTuple):
    """A report's own id, its sections, and the ids of its images that may be frontal, the likeliest first."""

    id: str
    sections: dict[str, str]
    images: list[str]


class Corpus(HospitalCorpus):
    """Open-i's chest radiographs; see [`~medforget_dataset.corpora.CorpusProtocol`].

    Raises:
        UserError: There are no reports or no images below `root`.
    """

    name = "open-i"
    restricted = False
    license = "cc-by-nc-nd-4.0"
    attribution = (
        "Reports and images are from the Indiana University Chest X-ray Collection (Demner-Fushman et al., Preparing "
        "a collection of radiology examinations for distribution and retrieval, JAMIA 23(2), 2016), Open-i, U.S. "
        "National Library of Medicine, CC BY-NC-ND 4.0: no commercial use, and adapted material, which this dataset "
        "is, must not be shared without the rights holders' permission."
    )
    standard_sections = ("comparison", "indication", "findings", "impression")
    grouping_note = (
        "The collection has one study of each person and tells nothing of who they are: **a patient is a group of "
        "studies of different people**, drawn at random. What is asked at patient level is a name given to such a "
        "group, and there is no longitudinal knowledge to forget."
    )

    def scan(self) -> Iterator[StudyEntry]:
        """Studies with the sections asked for and an image, in groups of as many as a patient has."""
        studies = sorted(self._qualifying(), key=lambda study: self._order("group", study))
        size = self.options.studies
        for start in range(0, len(studies) - size + 1, size):
            for study in studies[start : start + size]:
                yield StudyEntry(f"group {start // size + 1}", study)

    def sections(self, entry: StudyEntry) -> Mapping[str, str]:
        """The labelled parts of a report's abstract."""
        return _read_report(self._file_of[entry.study]).sections

    def image_file(self, entry: StudyEntry) -> Path | None:
        """The image that is likeliest frontal."""
        return self._first_image(_read_report(self._file_of[entry.study]), self._file_of[entry.study])

    def _qualifying(self) -> list[str]:
        """Ids of the studies with the sections asked for, all of which can be asked, and an image that is there."""
        self._images  # noqa: B018 - missing images are told before the reports are read
        found = []
        for file in tqdm(self._report_files, desc="reading reports", unit="report"):
            try:
                report = _read_report(file)
                if report.id in self._file_of:
                    message = f"{report.id} is the report {self._file_of[report.id].name} as well; remove one"
                    raise SourceError("duplicate study", file, message)
                self._file_of[report.id] = file
                if self._usable(report, file):
                    found.append(report.id)
            except SourceError as error:
                self.log.fault(error)
        return found

    def _usable(self, report: _Report, file: Path) -> bool:
        if not report.sections:
            self.log.notice("report without any heading", file, "no part of its abstract has text", report.id)
        if missing := [key for key in self.standard_sections if key not in report.sections]:
            self.log.notice("empty section", file, f"{', '.join(missing)}; study passed over", report.id)
        if not self.qualifies(report.sections):
            return False
        if hidden := [key for key, text in report.sections.items() if not can_be_asked(Section(key, text))]:
            message = f"{', '.join(hidden)}: nothing in it that can be asked; study passed over"
            self.log.notice("section that cannot be asked", file, message, report.id)
            return False
        if self._first_image(report, file) is None:
            self.log.notice("no frontal image", file, "names no image that may be frontal; passed over", report.id)
            return False
        return True

    def _first_image(self, report: _Report, file: Path) -> Path | None:
        if not report.images:
            return None
        if (stem := report.images[0]) not in self._images:
            raise SourceError("missing image", file, f"no {stem}.png in {self._image_folder}", report.id)
        return self._images[stem]

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """Where the report of a study stands."""
        return {}

    @cached_property
    def _report_files(self) -> list[Path]:
        for name in REPORT_FOLDERS:
            if files := list((self.root / name).glob("*.xml")):
                return sorted(files, key=lambda file: (len(file.stem), file.stem))
        raise UserError(
            f"--root {self.root}: no reports: no ecgen-radiology/1.xml in it; unpack NLMCXR_reports.tgz there"
        )

    @cached_property
    def _images(self) -> dict[str, Path]:
        """Every image by its name without the ending: only files that are listed here are ever opened."""
        files = sorted(
            (file for file in self._image_folder.iterdir() if file.suffix.lower() in SUFFIXES),
            key=lambda file: SUFFIXES.index(file.suffix.lower()),
            reverse=True,
        )
        return {file.stem: file for file in files}

    @cached_property
    def _image_folder(self) -> Path:
        for name in IMAGE_FOLDERS:
            folder = self.image_root / name
            if folder.is_dir() and any(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(folder)):
                return folder
        raise UserError(
            f"--root {self.root}: no images: no PNG files in {self.image_root}, NLMCXR_png or images below it; unpack "
            "NLMCXR_png.tgz there, or name their folder with --images"
        )


def _read_report(file: Path) -> _Report:
    """Read one report.

    Raises:
        SourceError: It is no report of the collection, or no sound XML.
    """
    if (size := file.stat().st_size) > MAX_REPORT_BYTES:
        message = f"{size:,} bytes; a report has at most {MAX_REPORT_BYTES:,}"
        raise SourceError("report too long", file, message)
    try:
        root = fromstring(file.read_bytes())
    except DefusedXmlException as error:
        raise SourceError("XML with entities", file, f"not read: {type(error).__name__}; remove its DTD") from error
    except (ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise SourceError("damaged XML", file, f"{error}; get it again") from error
    study = root.find(".//uId")
    if root.tag != "eCitation" or study is None or not study.get("id"):
        raise SourceError("not a report", file, "no eCitation with a uId; remove the file")
    sections: dict[str, str] = {}
    for part in root.iter("AbstractText"):
        key, text = section_key(part.get("Label", "")), " ".join("".join(part.itertext()).split())
        if key and text:
            sections[key] = f"{sections[key]} {text}" if key in sections else text
    return _Report(str(study.get("id")), sections, _frontal_first(root))


def _frontal_first(root: Element) -> list[str]:
    """Ids of the images that may be frontal: by caption where it tells, else by the number that ends the id.

    Most captions name both views of the study ("PA and Lateral") and so tell nothing of one image. The ids end in the
    number of the series (1001, 2001, …), of which the lowest is the frontal one in most studies.
    """
    ranked = []
    for image in root.iter("parentImage"):
        caption, id = image.findtext("caption") or "", image.get("id", "")
        lateral = bool(_LATERAL.search(caption))
        frontal = next((rank for rank, words in enumerate(_FRONTAL) if words.search(caption)), None)
        if not id or (lateral and frontal is None):
            continue
        number = re.search(r"\d+$", id)
        rank = len(_FRONTAL) if lateral or frontal is None else frontal
        ranked.append((rank, int(number[0]) if number else 0, id))
    return [id for _, _, id in sorted(ranked)]
