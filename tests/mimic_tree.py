"""A miniature MIMIC-CXR in its published layout, with traps."""

import csv
import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
from hospital_files import encoded, mimic_report, picture, sections, write_dicom


COLUMNS = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
# Studies that must not be drawn, or must be read right, each of one patient more.
TRAPS = (
    "patient with three studies",
    "report without headings",
    "study without findings",
    "empty impression",
    "only a lateral image",
    "frontal image after a lateral one",
    "AP beside PA",
    "CRLF line ends",
    "addendum above the report",
    "view heading with a digit",
    "heading without its leading space",
    "blank view position",
    "section of hidden text only",
)


class MimicTree:
    """Writes the tree: `reports` is "zip" or "tree", `images` is "jpg" or "dicom"."""

    def __init__(self, root: Path, reports: str = "zip", images: str = "jpg", patients: int = 16, traps: bool = True):
        self.root, self.images = root, images
        self.texts: dict[str, bytes] = {}
        self.rows: list[dict] = []
        self.good = [10_000_000 + 317 * number for number in range(patients)]
        for patient in self.good:
            for number in range(4):
                self.add(patient, self.study(patient, number))
        if traps:
            for number, trap in enumerate(TRAPS):
                self.add_trap(19_000_000 + number, trap)
        self.write_reports(reports)
        if images == "jpg":
            self.write_metadata()

    @staticmethod
    def study(patient: int, number: int) -> int:
        return 50_000_000 + (patient * 7 + number * 13) % 9_999_999

    def add(self, patient: int, study: int, text: str | bytes | None = None, views: tuple[str, ...] = ("PA",)) -> None:
        text = mimic_report(sections(study)) if text is None else text
        place = f"files/p{str(patient)[:2]}/p{patient}/s{study}"
        self.texts[f"{place}.txt"] = text.encode() if isinstance(text, str) else text
        for view in views:
            digest = hashlib.sha256(f"{study}{view}".encode()).hexdigest()
            dicom_id = "-".join(digest[start : start + 8] for start in range(0, 40, 8))
            day, time = (
                f"2180{1 + study % 9:02d}{10 + study % 17}",
                f"{study % 24}{study % 60:02d}59.{study % 1000:03d}",
            )
            values = (dicom_id, patient, study, "CHEST", view, 60, 48, day, time, "CHEST", "", "Erect")
            self.rows.append(dict(zip(COLUMNS, values, strict=True)))
            file = self.root / place / dicom_id
            if self.images == "jpg":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".jpg").write_bytes(encoded(picture(f"{study}{view}")))
            else:
                pixels = np.asarray(picture(f"{study}{view}"), dtype=np.uint16) * 16
                inverted = {"PhotometricInterpretation": "MONOCHROME1"} if study % 2 else {}
                when = {"StudyDate": day, "StudyTime": time.zfill(10)}
                shown = 4095 - pixels if inverted else pixels
                write_dicom(file.with_suffix(".dcm"), shown, ViewPosition=view, **when, **inverted)

    def add_trap(self, patient: int, trap: str) -> None:
        studies = [self.study(patient, number) for number in range(3 if trap == "patient with three studies" else 4)]
        for study in studies[:-1]:
            self.add(patient, study)
        study, parts = studies[-1], sections(studies[-1])
        text, views = mimic_report(parts), ("PA",)
        if trap == "report without headings":
            text = " " + " ".join(parts.values()) + "\n"
        elif trap == "study without findings":
            text = mimic_report({key: value for key, value in parts.items() if key != "findings"})
        elif trap == "empty impression":
            text = mimic_report(parts | {"impression": ""})
        elif trap == "only a lateral image":
            views = ("LATERAL",)
        elif trap == "frontal image after a lateral one":
            views = ("LATERAL", "AP")
        elif trap == "AP beside PA":
            views = ("AP", "PA")
        elif trap == "CRLF line ends":
            text = text.replace("\n", "\r\n")
        elif trap == "addendum above the report":
            text = f" ADDENDUM:  Discussed by phone.\n IMPRESSION:  Wrong.\n {'_' * 78}\n{text}"
        elif trap == "view heading with a digit":
            text = mimic_report({"chest, 2 views" if key == "findings" else key: parts[key] for key in parts})
        elif trap == "heading without its leading space":
            text = "\n".join(line.strip() for line in text.split("\n"))
        elif trap == "blank view position":
            views = ("",)
        elif trap == "section of hidden text only":
            text = mimic_report(parts | {"indication": "___"})
        self.add(patient, study, text, views)

    def write_reports(self, kind: str = "zip") -> None:
        if kind == "zip":
            with zipfile.ZipFile(self.root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for place, text in self.texts.items():
                    archive.writestr(place, text)
            return
        for place, text in self.texts.items():
            (self.root / place).parent.mkdir(parents=True, exist_ok=True)
            (self.root / place).write_bytes(text)

    def write_metadata(self, columns: tuple[str, ...] = COLUMNS) -> Path:
        file = self.root / "mimic-cxr-2.0.0-metadata.csv.gz"
        with gzip.open(file, "wt", newline="") as opened:
            writer = csv.DictWriter(opened, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        return file
