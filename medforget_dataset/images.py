"""Radiographs from files: PNG, JPEG, TIFF and DICOM to 8-bit greyscale, bones bright, upright.

DICOM images are windowed as their headers ask (VOI LUT, or the first window centre and width) and inverted where the
photometric interpretation says so. What has more than 8 bits and no window is stretched from its 0.5th to its 99.5th
percentile, so that markers and collimation edges do not set the range.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .build_log import BuildLog, SourceError
from .errors import UserError


PERCENTILES = (0.5, 99.5)
_SIXTEEN_BITS = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_radiograph(file: Path, log: BuildLog | None = None) -> Image.Image:
    """Read a radiograph of any kind we know.

    Args:
        file (`Path`): PNG, JPEG, TIFF or DICOM, told by its content; DICOM may be gzipped.
        log ([`~medforget_dataset.build_log.BuildLog`], *optional*): Told what had to be converted.

    Returns:
        `PIL.Image.Image`: Mode `"L"`, upright, bones bright, in the file's resolution.

    Raises:
        SourceError: The file is missing, empty, cut short, no image, or in a form that cannot be decoded.
        UserError: It is DICOM, and the packages that read DICOM are not installed.
    """
    log = log or BuildLog()
    try:
        with file.open("rb") as opened:
            head = opened.read(132)
    except OSError as error:
        raise SourceError("missing image", file, error.strerror or str(error)) from error
    if not head:
        raise SourceError("empty image file", file, "the file is empty; get it again")
    if head[128:] == b"DICM" or head[:2] == b"\x1f\x8b" or file.suffix.lower() == ".dcm":
        return _read_dicom(file)
    return _to_grey(_decode(file), file, log)


def read_rgb(file: Any, name: str) -> Image.Image:
    """Read a picture that may be coloured, such as a figure of a publication.

    Args:
        file (`Path` or binary file): What to read.
        name (`str`): What to call it in errors.

    Returns:
        `PIL.Image.Image`: Mode `"RGB"`, upright.

    Raises:
        SourceError: It is empty, cut short or no image.
    """
    return ImageOps.exif_transpose(_decode(file, name)).convert("RGB")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """The whole image on a black square of `size` pixels, its proportions kept."""
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    square = Image.new(image.mode, (size, size))
    corner = ((size - shape[0]) // 2, (size - shape[1]) // 2)
    square.paste(image.resize((shape[0], shape[1]), Image.Resampling.LANCZOS), corner)
    return square


def read_dicom_header(file: Path) -> Any:
    """The header of a DICOM file, gzipped or not, without its pixels.

    Returns:
        `pydicom.Dataset`: Its elements by keyword.

    Raises:
        SourceError: The file is no DICOM file.
    """
    return _dicom(file, stop_before_pixels=True)


def _decode(file: Any, name: str | Path = "") -> Image.Image:
    name = name or file
    try:
        image = Image.open(file)
        image.load()  # opening reads the header only: a file that is cut short shows here
    except UnidentifiedImageError as error:
        raise SourceError("not an image", name, "no image of a kind we know; get it again") from error
    except _BROKEN as error:
        raise SourceError("truncated image", name, f"cut short or damaged ({error}); get it again") from error
    return image


def _to_grey(image: Image.Image, file: Path, log: BuildLog) -> Image.Image:
    if image.getexif().get(0x0112, 1) != 1:
        log.notice("EXIF-rotated image", file, "turned upright as its EXIF tag says")
        image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BITS:
        log.notice("16-bit image", file, f"stretched to 8 bits between the percentiles {PERCENTILES}")
        return Image.fromarray(_stretch(np.asarray(image, dtype=np.float32)))
    if image.mode == "CMYK":
        log.notice("CMYK image", file, "converted to grey")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):
        # Transparent parts are black, as the border of a radiograph is.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("L")


def _stretch(pixels: np.ndarray, within: np.ndarray | None = None) -> np.ndarray:
    """Grey levels of shape `(H, W)` as uint8, stretched between the percentiles of `within` or of all pixels."""
    within = pixels if within is None else within
    low, high = np.percentile(within, PERCENTILES)
    if high <= low:
        low, high = float(within.min()), float(within.max())
    scaled = (pixels - low) / max(high - low, 1e-6)
    return (np.clip(scaled, 0, 1) * 255 + 0.5).astype(np.uint8)


def _dicom(file: Path, **kwargs: Any) -> Any:
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise UserError(f"{file}: DICOM needs pydicom; pip install 'medforget[dicom]'") from error
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as opened:
            return pydicom.dcmread(opened, **kwargs)
    except InvalidDicomError as error:
        raise SourceError("not a DICOM file", file, "has no DICOM header; get it again") from error
    except (OSError, EOFError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise SourceError("damaged DICOM file", file, f"cut short or damaged ({error}); get it again") from error


def _read_dicom(file: Path) -> Image.Image:
    dataset = _dicom(file)
    from pydicom.pixels import apply_modality_lut

    if "PixelData" not in dataset:
        raise SourceError("DICOM without pixels", file, "the file has a header and no image; get it again")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise SourceError("DICOM of several frames", file, f"{dataset.NumberOfFrames} frames; a radiograph has one")
    try:
        pixels = dataset.pixel_array
    except (RuntimeError, ImportError, NotImplementedError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID.name if "TransferSyntaxUID" in dataset.file_meta else "unknown"
        message = f"pixels in {syntax} cannot be decoded ({_first_line(error)}); pip install 'medforget[dicom]'"
        raise SourceError("DICOM that cannot be decoded", file, message) from error
    except (ValueError, AttributeError, KeyError, OSError, EOFError) as error:
        message = f"pixels cut short or damaged ({_first_line(error)}); get it again"
        raise SourceError("truncated DICOM", file, message) from error
    if int(dataset.get("SamplesPerPixel", 1)) > 1:
        colour = Image.fromarray(pixels if pixels.dtype == np.uint8 else _stretch(pixels))
        return colour.convert("L")
    value = dataset.get("PixelPaddingValue", None)
    padding = np.zeros(pixels.shape, dtype=bool) if value is None else pixels == value
    grey = _windowed(pixels, dataset)
    if grey is None:
        values = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
        grey = _stretch(values, values if padding.all() else values[~padding])
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    # Padding is no tissue, whichever way the grey levels run.
    return Image.fromarray(np.where(padding, np.uint8(0), grey))


def _windowed(pixels: np.ndarray, dataset: Any) -> np.ndarray | None:
    """The image as its header's window shows it, of shape `(H, W)`, as uint8; `None` if it has no valid window."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    if "VOILUTSequence" not in dataset and "WindowWidth" not in dataset:
        return None
    try:
        shown = np.asarray(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset), dtype=np.float64)
    except (ValueError, TypeError, IndexError):  # a window of no width, or of another kind than the standard knows
        return None
    # pydicom spreads the window over the range that the stored bits have.
    if "VOILUTSequence" in dataset:
        low, high = 0.0, 2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
    elif "ModalityLUTSequence" in dataset:
        low, high = 0.0, 2.0 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:
        low, high = 0.0, 2.0 ** int(dataset.BitsStored) - 1
        if dataset.PixelRepresentation:
            low, high = -(high + 1) / 2, (high - 1) / 2
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        low, high = low * slope + intercept, high * slope + intercept
    return (np.clip((shown - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
