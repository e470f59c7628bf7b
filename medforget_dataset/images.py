"""Radiographs from files: PNG, JPEG and DICOM to 8-bit greyscale."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from .build_log import BuildLog, SourceError


def read_radiograph(file: Path, log: BuildLog | None = None) -> Image.Image:
    """Read a radiograph of any kind we know.

    Args:
        file (`Path`): The file.
        log ([`~medforget_dataset.build_log.BuildLog`], *optional*): Told what had to be converted.

    Returns:
        `PIL.Image.Image`: Mode `"L"`, upright, bones bright, in the file's resolution.

    Raises:
        SourceError: The file is missing, empty, cut short or no image.
    """
    try:
        with Image.open(file) as image:
            return image.convert("L")
    except (OSError, SyntaxError, ValueError) as error:
        raise SourceError("unreadable image", file, str(error)) from error


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """The whole image on a black square of `size` pixels, its proportions kept."""
    return ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color=0)
