"""Files as hospitals publish them: report texts of our own, pictures, DICOM; for miniature trees of every corpus."""

import io
import random
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image


LUNGS = (
    "The lungs are clear.",
    "There is a {size} opacity in the {side} {lobe} lobe, new since the prior study.",
    "Patchy {side} basilar atelectasis is unchanged.",
    "A {mm} mm nodule projects over the {side} {lobe} lobe.",
    "Low lung volumes accentuate the bronchovascular markings.",
)
PLEURA = (
    "No pleural effusion or pneumothorax.",
    "There is a {size} {side} pleural effusion without pneumothorax.",
    "A {size} {side} apical pneumothorax persists.",
    "Blunting of the {side} costophrenic angle is again seen.",
)
HEART = (
    "The cardiomediastinal silhouette is within normal limits.",
    "The heart is {size}ly enlarged.",
    "Mild vascular congestion without frank edema.",
)
DEVICES = (
    "A {side} PICC terminates in the mid SVC.",
    "Median sternotomy wires are intact.",
    "The endotracheal tube ends {mm} mm above the carina.",
    "",
)
EXAMINATIONS = ("CHEST (PA AND LAT)", "CHEST (PORTABLE AP)", "DX CHEST PORT LINE/TUBE PLCMT", "CHEST RADIOGRAPH")
REASONS = (
    "___ year old {sex} with cough and fever // evaluate for pneumonia",
    "___-year-old {sex} with shortness of breath. Rule out effusion.",
    "History: ___{letter} with chest pain, {mm} pack years",
    "___ {sex} s/p fall, {side} rib pain",
)
IMPRESSIONS = (
    "No acute cardiopulmonary process.",
    "1. {size} {side} pleural effusion. 2. No pneumothorax.",
    "{side} {lobe} lobe pneumonia. Follow-up radiographs in {weeks} weeks are recommended.",
    "Interval placement of a {side} PICC, in satisfactory position.",
    "Stable {size} cardiomegaly without edema.",
)


def sections(seed: object, *keys: str) -> dict[str, str]:
    """Sections of one report: examination, indication, findings, impression, or those asked for."""
    rng = random.Random(str(seed))
    words = {
        "size": rng.choice(["small", "moderate", "large", "mild"]),
        "side": rng.choice(["right", "left"]),
        "lobe": rng.choice(["upper", "middle", "lower"]),
        "mm": rng.randrange(4, 60),
        "sex": rng.choice(["man", "woman"]),
        "letter": rng.choice("MF"),
        "weeks": rng.randrange(2, 9),
    }
    parts = [rng.choice(pool).format(**words) for pool in (LUNGS, PLEURA, HEART, DEVICES)]
    rng.shuffle(parts)
    known = {
        "examination": rng.choice(EXAMINATIONS),
        "indication": rng.choice(REASONS).format(**words),
        "clinical_history": rng.choice(REASONS).format(**words),
        "technique": rng.choice(["PA and lateral views of the chest", "Single frontal view of the chest"]),
        "comparison": rng.choice(["None.", "Chest radiograph from ___.", f"CT from {words['weeks']} weeks earlier."]),
        "findings": " ".join(part for part in parts if part),
        "impression": rng.choice(IMPRESSIONS).format(**words),
    }
    return {key: known[key] for key in keys or ("examination", "indication", "findings", "impression")}


def mimic_report(parts: dict[str, str]) -> str:
    """A report as MIMIC-CXR prints it: a centred title, a space before each line, lines of at most 79 characters."""
    lines = ["FINAL REPORT".center(78)]
    for key, text in parts.items():
        lines += ["", *textwrap.wrap(f"{key.replace('_', ' ').upper()}:  {text}", 77)]
    return "".join(f" {line}\n" for line in lines)


def picture(seed: object, size: tuple[int, int] = (48, 60)) -> Image.Image:
    """A small grey picture of its own."""
    rng = np.random.default_rng(list(str(seed).encode()))
    coarse = rng.integers(20, 220, (6, 6), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def write_dicom(file: Path, pixels: np.ndarray, **elements) -> Path:
    """A DICOM file of 12-bit pixels; elements by keyword replace or, where they are None, remove the defaults."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(file)])
    defaults = {
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelData": pixels.astype("<u2").tobytes(),
    }
    for name, value in (defaults | elements).items():
        if value is not None:
            setattr(dataset, name, value)
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return file
