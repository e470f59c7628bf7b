"""Miniature copies of MIMIC-CXR in its published layout, with every fault that its adapter must live with.

Names, folders and columns are those of MIMIC-CXR 2.x and MIMIC-CXR-JPG 2.x; texts and images are invented.
"""

import csv
import gzip
import io
import random
import textwrap
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileMetaDataset


COLUMNS = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
METADATA = "mimic-cxr-2.0.0-metadata.csv.gz"
ARCHIVE = "mimic-cxr-reports.zip"
DIVIDER = "_" * 78
# What becomes of each trap of `write_tree`: its kind in the build log, or empty where it is just read right.
TRAPS = {
    "report without any heading": "report without any heading",
    "empty section": "empty section",
    "CRLF line ends": "CRLF line ends",
    "bytes that are not UTF-8": "text that is not UTF-8",
    "report of 2 MB": "report too long",
    "study in two patients' folders": "duplicate study",
    "section headed twice": "repeated section",
    "text file that is no report": "misplaced report",
    "patient with three studies": "patient with too few studies",
    "heading with digits": "",
    "addendum on top": "",
    "mark alone on a line": "",
    "heading without spaces": "",
    "lateral view alone": "",
    "AP image whose id comes before the PA image's": "",
    "two PA images": "",
    "truncated image": "truncated",
    "image without a view position": "",
    "ids that do not tell the order of time": "",
}
ZIP_TRAPS = {
    "member in the parent folder": "member outside its root",
    "member with an absolute path": "member outside its root",
    "member on another drive": "member outside its root",
    "member that is there twice": "duplicate study",
    "member with a wrong checksum": "damaged archive member",
}
JPG_TRAPS = {
    "image of another patient": "duplicate image",
    "image listed twice": "duplicate image",
    "image id that leads elsewhere": "damaged metadata row",
    "metadata row cut short": "damaged metadata row",
    "image that was not downloaded": "missing image",
}
DICOM_TRAPS = {
    "dark bones (MONOCHROME1)": "",
    "file without pixels": "DICOM without pixels",
    "gzipped file": "",
}

_EXAMS = (
    "CHEST (PA AND LAT)", "CHEST (PORTABLE AP)", "CHEST RADIOGRAPH", "DX CHEST PORTABLE PICC LINE PLACEMENT",
    "Chest:  Frontal and lateral views", "CHEST (PRE-OP PA AND LAT)", "PORTABLE CHEST X-RAY",
)  # fmt: skip
_SEXES = ("woman", "man", "female", "male")
_REASONS = (
    "cough and fever // pneumonia?", "shortness of breath // acute process", "chest pain. Assess for pneumothorax.",
    "___ s/p fall with rib pain // rib fracture?", "new onset atrial fibrillation // infiltrate", "sepsis, evaluate",
    "history of COPD and dyspnea // please eval for infiltrate", "hypoxia after intubation // ET tube placement",
    "metastatic breast cancer with increasing pleural effusion", "cirrhosis and altered mental status // aspiration",
    "new left PICC // 48 cm left basilic, ___ IV team", "congestive heart failure // interval change",
)  # fmt: skip
_FINDINGS = (
    "The lungs are clear without focal consolidation, effusion, or edema.",
    "The cardiomediastinal silhouette is within normal limits.",
    "There is no pleural effusion or pneumothorax.",
    "Small bilateral pleural effusions have increased since ___.",
    "Mild cardiomegaly is unchanged.",
    "There is a new opacity in the right lower lobe, concerning for pneumonia.",
    "The right PICC terminates in the mid SVC.",
    "Endotracheal tube tip is 4.5 cm above the carina.",
    "Moderate pulmonary edema has slightly improved compared to the prior study.",
    "Median sternotomy wires and mediastinal clips are again noted.",
    "Left basilar atelectasis is stable.",
    "A 6 mm calcified granuloma is seen in the left upper lobe.",
    "No acute osseous abnormality is identified.",
    "Lung volumes are low, which accentuates the bronchovascular markings.",
    "There are multiple healed left rib fractures.",
    "The nasogastric tube courses below the diaphragm and out of view.",
    "Tiny right apical pneumothorax is smaller than on ___ at 10:20.",
    "Severe emphysema is again seen, with hyperinflation of the lungs.",
)
_IMPRESSIONS = (
    "No acute cardiopulmonary process.",
    "Right lower lobe pneumonia. Follow-up radiographs are recommended in 6 weeks to document resolution.",
    "Slight interval improvement of pulmonary edema.",
    "1. Left basilar atelectasis, unchanged.  2. No pneumothorax.",
    "Increased bilateral pleural effusions with overlying atelectasis.",
    "ET tube in standard position.  Mild cardiomegaly.",
    "Tiny right apical pneumothorax, decreased from ___.",
    "New opacity at the left base may reflect aspiration or pneumonia in the proper clinical setting.",
    "Stable emphysema without evidence of acute infection.",
)


def report_text(number: int) -> str:
    """A report as they are: one leading space, a wide title, `___`, wrapped lines, 1 to 2 kB; always the same."""
    rng = random.Random(number)
    findings = " ".join(rng.sample(_FINDINGS, rng.randint(5, 9)))
    sections = {
        "EXAMINATION": rng.choice(_EXAMS),
        "INDICATION": f"___ year old {rng.choice(_SEXES)} with {rng.choice(_REASONS)}",
        "TECHNIQUE": rng.choice(("Chest PA and lateral", "Portable AP chest radiograph", "Upright AP view")),
        "COMPARISON": rng.choice(("___", "Chest radiograph from ___.", "None.", "Multiple prior studies since ___.")),
        "FINDINGS": f"\n{findings}",
        "IMPRESSION": f"\n{' '.join(rng.sample(_IMPRESSIONS, rng.randint(1, 3)))}",
    }  # fmt: skip
    return _report(sections)


def _report(sections: dict[str, str]) -> str:
    lines = [f"{'FINAL REPORT':>45}"]
    for heading, text in sections.items():
        below = text.startswith("\n")
        lines += [f" {heading}: "] if below else []
        body = " ".join(text.split()) if below else f"{heading}:  {' '.join(text.split())}"
        lines += ([" "] if below else []) + [f" {line}" for line in textwrap.wrap(body, 78)] + [" "]
    return "\n".join(lines) + "\n"


def write_tree(root: Path, *, reports: str = "zip", images: str = "jpg", traps: bool = False) -> dict[str, int]:
    """Write a corpus of 16 patients who have four studies that qualify, no more.

    Args:
        root (`Path`): Folder to make.
        reports (`str`): `"zip"` or `"tree"`.
        images (`str`): `"jpg"` with the metadata of MIMIC-CXR-JPG, or `"dicom"`.
        traps (`bool`): Whether all traps that this form can have are there; the 16 patients are the same.

    Returns:
        `dict[str, int]`: The study that each trap of a report is in.
    """
    tree = _Tree(in_zip=reports == "zip", as_jpg=images == "jpg")
    for patient in range(10_000_000, 10_000_010):
        for _ in range(5):
            tree.study(patient)
    odd_patients = zip(range(11_000_000, 11_000_006), _image_traps(tree.as_jpg), strict=True)
    for patient, (bad, good) in odd_patients:
        for number in range(4 + 3 * traps):
            tree.study(patient, **(bad if number > 3 else good if traps else {}))
    if traps:
        _report_traps(tree)
        if tree.in_zip:
            _zip_traps(tree)
        if tree.as_jpg:
            _metadata_traps(tree)
    tree.write(root)
    return tree.traps


class _Tree:
    """Reports and images, gathered before they are written."""

    def __init__(self, in_zip: bool, as_jpg: bool):
        self.in_zip, self.as_jpg = in_zip, as_jpg
        self.texts: list[tuple[str, bytes]] = []
        self.files: dict[str, bytes] = {}
        self.metadata: list[list] = []
        self.traps: dict[str, int] = {}
        self.damaged = ""
        self.numbers = iter(range(1, 10_000))
        self.patients = iter(range(18_000_000, 19_000_000))

    def study(self, patient: int, content: bytes | None = None, views=("LATERAL", "PA"), **image) -> int:
        """One more study of a patient; its report is a common one unless given."""
        number = next(self.numbers)
        study = 50_000_000 + number * 7919 % 9_999_991
        self.report(patient, study, report_text(number).encode() if content is None else content)
        for position, view in enumerate(views):
            self.image(patient, study, view, position, number, **image)
        return study

    def trap(self, name: str, content: str | bytes) -> int:
        """A patient with one study, which no draw takes, and this report."""
        patient = next(self.patients)
        self.traps[name] = self.study(patient, content if isinstance(content, bytes) else content.encode())
        return patient

    def report(self, patient: int, study: int, content: bytes) -> None:
        self.texts.append((f"p{str(patient)[:2]}/p{patient}/s{study}.txt", content))

    def image(self, patient, study, view, position, number, *, fault="", photometric="MONOCHROME2", gz=False):
        """One image of a study; what it shows and its id depend on the study's number and the position alone."""
        bits = random.Random(f"{number} {position}")
        parts = [f"{position}{bits.getrandbits(28):07x}", *(f"{bits.getrandbits(32):08x}" for _ in range(4))]
        dicom_id = "-".join(parts)
        # The later the number, the older; the published metadata has lost the zeros of the early hours.
        date, time = f"{2190 - number // 9}0{9 - number % 9}15", 10_000 * (1 + number % 20) + 3000 + position / 8
        folder = f"p{str(patient)[:2]}/p{patient}/s{study}"
        pixels = np.random.default_rng(number * 10 + position).integers(0, 4096, (50, 60), dtype=np.uint16)
        if self.as_jpg:
            buffer = io.BytesIO()
            Image.fromarray((pixels >> 4).astype(np.uint8)).save(buffer, format="JPEG")
            self.metadata.append(
                [dicom_id, patient, study, "CHEST (PA AND LAT)", view, 50, 60, date, time, "CHEST", view, "Erect"]
            )
            content, suffix = buffer.getvalue(), "jpg"
        else:
            content = dicom_bytes(pixels, dicom_id, view, date, time, photometric, with_pixels=fault != "no pixels")
            content, suffix = (gzip.compress(content), "dcm.gz") if gz else (content, "dcm")
        if fault != "missing":
            self.files[f"{folder}/{dicom_id}.{suffix}"] = content[: len(content) // 2 if fault == "cut" else None]

    def write(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            _write(root / "files" / name, content)
        if self.as_jpg:
            rows = io.StringIO()
            csv.writer(rows, lineterminator="\n").writerows([COLUMNS, *self.metadata])
            _write(root / METADATA, gzip.compress(rows.getvalue().encode()))
        if self.in_zip:
            self._write_archive(root / ARCHIVE)
            return
        for name, content in self.texts:
            _write(root / "mimic-cxr-reports" / "files" / name, content)

    def _write_archive(self, file: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            warnings.simplefilter("ignore")  # of the name that is there twice
            archive.mkdir("files")
            for name, content in self.texts:
                archive.writestr(f"files/{name}" if name.startswith("p") else name, content)
        if self.damaged:
            place = zipfile.ZipFile(file).getinfo(f"files/{self.damaged}").header_offset + 200
            data = file.read_bytes()
            file.write_bytes(data[:place] + bytes(255 - byte for byte in data[place : place + 9]) + data[place + 9 :])


def dicom_bytes(pixels, dicom_id, view, date, time, photometric="MONOCHROME2", *, with_pixels=True) -> bytes:
    """A radiograph of 12 bits as MIMIC-CXR has them."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[dicom_id])
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.StudyDate, dataset.StudyTime, dataset.Modality = date, f"{time:013.6f}", "DX"
    dataset.ViewPosition = view
    if with_pixels:
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PhotometricInterpretation = photometric
        dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
        dataset.PixelData = (4095 - pixels if photometric == "MONOCHROME1" else pixels).tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _image_traps(as_jpg: bool) -> list[tuple[dict, dict]]:
    """For each of six patients, what is odd about their three bad studies and their four good ones.

    Good and bad are the same in both forms, so that the same studies are chosen.
    """
    return [
        ({"views": ("LATERAL",)}, {}),
        ({"fault": "cut"}, {} if as_jpg else {"photometric": "MONOCHROME1"}),
        ({"fault": "missing"}, {"views": ("AP", "PA")}),
        ({"views": ("", "LL")}, {"views": ("PA", "PA")}),
        ({"fault": "cut" if as_jpg else "no pixels"}, {"views": ("AP",)}),
        ({"views": ("AP LLD", "LPO")}, {} if as_jpg else {"gz": True}),
    ]


def _report_traps(tree: _Tree) -> None:
    usual = report_text(0)
    tree.trap("report without any heading", " Portable chest. The lungs are clear.\n")
    tree.trap("empty section", usual.replace(" TECHNIQUE:", " NOTIFICATION: \n \n TECHNIQUE:"))
    tree.trap("CRLF line ends", usual.replace("\n", "\r\n"))
    tree.trap("bytes that are not UTF-8", b" FINDINGS:  na\xefve effusion\n")
    tree.trap("report of 2 MB", usual + " No change.\n" * 200_000)
    tree.trap("section headed twice", usual.replace(" COMPARISON:", " IMPRESSION:  Preliminary.\n \n COMPARISON:"))
    tree.trap("heading with digits", " CHEST, 2 VIEWS:\n \n The lungs are clear.\n \n IMPRESSION:  Normal.\n")
    tree.trap("addendum on top", f" ADDENDUM:\n \n IMPRESSION:  A nodule.\n {DIVIDER}\n{usual}")
    tree.trap("mark alone on a line", usual.replace(" TECHNIQUE:", " ___\n ___\n \n TECHNIQUE:"))
    tree.trap("heading without spaces", "FINDINGS:Clear lungs.\nIMPRESSION:Normal.\n")
    tree.trap("study in two patients' folders", usual)
    tree.report(next(tree.patients), tree.traps["study in two patients' folders"], usual.encode())
    tree.texts.append(("p10/p10000000/notes.txt", b"mine"))
    patient = next(tree.patients)
    for _ in range(3):
        tree.study(patient)


def _zip_traps(tree: _Tree) -> None:
    for name in ("../p10/p10000032/s51000001.txt", "/p10/p10000032/s51000002.txt", "C:\\p10\\s51000003.txt"):
        tree.texts.append((name, b" FINDINGS:  none\n"))
    patient = tree.trap("member that is there twice", report_text(0))
    tree.report(patient, tree.traps["member that is there twice"], report_text(1).encode())
    tree.trap("member with a wrong checksum", report_text(2))
    tree.damaged = tree.texts[-1][0]


def _metadata_traps(tree: _Tree) -> None:
    usual = list(next(row for row in tree.metadata if row[4] == "PA"))
    tree.metadata += [
        ["9f000000-0-0-0-1", usual[1] + 1, *usual[2:]],
        usual,
        ["../../p10000001/s50000001/x", *usual[1:]],
        usual[:3],
    ]


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
