"""Radiographs from files: PNG, JPEG, TIFF and DICOM to 8-bit greyscale, bones bright, upright.

DICOM images are windowed as their headers ask (VOI LUT, or the first window centre and width) and inverted where the
photometric interpretation says so. What has more than 8 bits and no window is stretched from its 0.5th to its 99.5th
percentile, so that markers and collimation edges do not set the range; DICOM's pixel padding counts for nothing there
and is black.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from .build_log import BuildLog, SourceError
from .errors import UserError


PERCENTILES = (0.5, 99.5)
MESSAGE_LENGTH = 100  # what a decoder says may quote the file at length
_GZIP = b"\x1f\x8b"
_ORIENTATION, _PHOTOMETRIC = 0x0112, 0x0106
_SIXTEEN_BITS = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# What Pillow and pydicom raise, one or the other, from damaged bytes.
_BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
)


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
    if head[128:] == b"DICM" or head[:2] == _GZIP or file.suffix.lower() == ".dcm":
        return _read_dicom(file, log)
    return _to_grey(_decode(file, file, log), file, log)


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
    log = BuildLog()
    image = _decode(file, name, log)
    return (_to_grey(image, name, log) if image.mode in _SIXTEEN_BITS else image).convert("RGB")


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


def _decode(file: Any, name: str | Path, log: BuildLog) -> Image.Image:
    """All pixels of a picture, upright, in its own mode."""
    try:
        if isinstance(file, Path):  # by its name, Pillow maps it to memory, and garbles TIFF that lies on its side
            file = io.BytesIO(file.read_bytes())
        image: Image.Image = Image.open(file)
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)  # TIFF loses the tag as it is loaded
        white_is_zero = image.getexif().get(_PHOTOMETRIC) == 0
        image.load()  # opening reads the header only: a file that is cut short shows here
        if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
            image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for Adobe's, whose inks are inverted
        if image.mode.startswith("I;16") and image.format == "TIFF" and white_is_zero:
            image = Image.fromarray(0xFFFF - np.asarray(image))  # zero is white, which Pillow minds in 8 bits alone
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise SourceError("not an image", name, "no image of a kind we know; get it again") from error
    except Image.DecompressionBombError as error:
        raise SourceError("image of too many pixels", name, f"{error}; make it smaller") from error
    except FileNotFoundError as error:
        raise SourceError("missing image", name, error.strerror or str(error)) from error
    except _BROKEN as error:
        message = f"cut short or damaged ({_first_line(error)}); get it again"
        raise SourceError("truncated image", name, message) from error
    if turned:
        log.notice("EXIF-rotated image", name, "turned upright as its EXIF tag says")
    return image


def _to_grey(image: Image.Image, file: str | Path, log: BuildLog) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        log.notice("16-bit image", file, f"stretched to 8 bits between the percentiles {PERCENTILES}")
        return Image.fromarray(_stretch(np.nan_to_num(np.asarray(image, dtype=np.float32))))
    if image.mode == "CMYK":
        log.notice("CMYK image", file, "converted to grey")
        image = image.convert("RGB")
    if image.mode in ("P", "PA", "La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA"):
        # Transparent parts are black, as the border of a radiograph is.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    try:
        return image.convert("L")
    except ValueError as error:
        message = f"colours in the mode {image.mode} cannot be converted; save it as grey or RGB"
        raise SourceError("image in unknown colours", file, message) from error


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
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise UserError(f"{file}: DICOM needs pydicom; pip install 'medforget[dicom]'") from error
    try:
        with file.open("rb") as opened:
            packed = opened.read(2) == _GZIP
            opened.seek(0)
            source: Any = gzip.open(opened) if packed else opened
            if packed and not kwargs:
                source = io.BytesIO(source.read())  # where a stream breaks off, pydicom takes it for the end
            return pydicom.dcmread(source, **kwargs)
    except InvalidDicomError as error:
        raise SourceError("not a DICOM file", file, "has no DICOM header; get it again") from error
    except FileNotFoundError as error:
        raise SourceError("missing image", file, error.strerror or str(error)) from error
    except (*_BROKEN, BytesLengthException) as error:
        message = f"cut short or damaged ({_first_line(error)}); get it again"
        raise SourceError("damaged DICOM file", file, message) from error


def _read_dicom(file: Path, log: BuildLog) -> Image.Image:
    dataset = _dicom(file)
    from pydicom.errors import BytesLengthException

    try:
        return _shown(_pixels(dataset, file), dataset, file, log)
    except (*_BROKEN, BytesLengthException) as error:
        message = f"pixels cut short or damaged ({_first_line(error)}); get it again"
        raise SourceError("truncated DICOM", file, message) from error


def _pixels(dataset: Any, file: Path) -> np.ndarray:
    """The stored values, of shape `(H, W)`, or `(H, W, 3)` in RGB."""
    from pydicom.pixels import get_decoder

    if not dataset.get("PixelData"):
        raise SourceError(
            "DICOM without pixels", file, "a header and no image, or cut short in the header; get it again"
        )
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise SourceError("DICOM of several frames", file, f"{dataset.NumberOfFrames} frames; a radiograph has one")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    try:
        known = syntax is not None and get_decoder(syntax).is_available
    except NotImplementedError:
        known = False
    if not known:
        name = "an unnamed transfer syntax" if syntax is None else f"{syntax.name} ({syntax})"
        message = f"pixels in {name} cannot be decoded by any installed package; pip install 'medforget[dicom]'"
        raise SourceError("DICOM that cannot be decoded", file, message)
    try:
        return dataset.pixel_array
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # a panic of a decoder written in Rust, which is no Exception
            raise
        raise ValueError(str(error)) from error


def _shown(pixels: np.ndarray, dataset: Any, file: Path, log: BuildLog) -> Image.Image:
    """Stored values as the header says that they are displayed."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    bits = int(dataset.BitsStored)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        bits = 8 * pixels.itemsize
    if pixels.ndim == 3:
        return Image.fromarray((pixels * (255 / (2**bits - 1)) + 0.5).astype(np.uint8)).convert("L")
    padding = _padding(pixels, dataset)
    grey = _windowed(pixels, dataset)
    if grey is None:
        if dataset.get("WindowWidth") is not None:
            log.notice("DICOM window of no use", file, f"stretched between the percentiles {PERCENTILES} instead")
        values = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
        grey = _stretch(values, values if padding.all() else values[~padding])
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    # Padding is no tissue, whichever way the grey levels run.
    return Image.fromarray(np.where(padding, np.uint8(0), grey))


def _padding(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Where the stored values of shape `(H, W)` stand for no image at all."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(pixels.shape, dtype=bool)
    low, high = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    return (pixels >= low) & (pixels <= high)


def _windowed(pixels: np.ndarray, dataset: Any) -> np.ndarray | None:
    """The image as its header's window shows it, of shape `(H, W)`, as uint8; `None` if it has no valid window."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    table, modality = (dataset.get(name) for name in ("VOILUTSequence", "ModalityLUTSequence"))
    if not table and None in (dataset.get("WindowCenter"), dataset.get("WindowWidth")):
        return None
    values = apply_modality_lut(pixels, dataset)
    # pydicom spreads a window over the range that the stored bits have.
    if table:
        low, high = 0.0, 2.0 ** int(table[0].LUTDescriptor[2]) - 1
        table[0].LUTDescriptor[2] = 16  # with fewer than 9 bits pydicom looks entries up in 8, and starts over at 256
    elif modality:
        low, high = 0.0, 2.0 ** int(modality[0].LUTDescriptor[2]) - 1
    else:
        low, high = 0.0, 2.0 ** int(dataset.BitsStored) - 1
        if dataset.PixelRepresentation:
            low, high = -(high + 1) / 2, (high - 1) / 2
        if "RescaleSlope" in dataset and "RescaleIntercept" in dataset:
            slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
            low, high = low * slope + intercept, high * slope + intercept
    try:
        shown = np.asarray(apply_voi_lut(values, dataset), dtype=np.float64)
    except (ValueError, TypeError, LookupError):  # of no width, without a centre, or of a kind unknown to the standard
        return None
    return (np.clip((shown - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:MESSAGE_LENGTH]
