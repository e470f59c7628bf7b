"""Labelled CT slices: images of the embedded CT and what is in them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from . import volume


PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
WINDOW_HU = (-1000.0, 400.0)


def slice_image(plane: str, position: float, size: int = 224) -> Image.Image:
    """A CT slice as a radiologist views it: patient's right on the image's left, head or front up.

    Args:
        plane (`str`): axial, coronal or sagittal.
        position (`float`): 0 to 1, from feet to head, back to front, or the patient's right to left.
        size (`int`, *optional*, defaults to `224`): pixels a side; the slice is centred on black.

    Returns:
        `PIL.Image.Image`: mode `L`, `size` by `size`, window -1000 to 400 HU.

    Raises:
        ValueError: if `plane` or `position` is out of range.
    """
    ct = volume.load()
    axis, index = _locate(plane, position)
    low, high = WINDOW_HU
    plane_hu = np.take(ct.hu, index, axis).T[::-1]
    image = Image.fromarray(np.round(np.clip((plane_hu - low) / (high - low), 0, 1) * 255).astype(np.uint8), "L")
    width, height = np.delete(ct.extent, axis) / np.delete(ct.extent, axis).max() * size
    image = image.resize((round(width), round(height)), Image.Resampling.BICUBIC)
    square = Image.new("L", (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def slice_structures(plane: str, position: float) -> dict[str, float]:
    """The fraction (0 to 1) of the slice that each structure covers, largest first; absent structures are left out.

    Args:
        plane (`str`): axial, coronal or sagittal.
        position (`float`): as for [`slice_image`].

    Raises:
        ValueError: if `plane` or `position` is out of range.
    """
    axis, index = _locate(plane, position)
    labels = np.take(volume.load().labels, index, axis)
    counts = np.bincount(labels.ravel(), minlength=256)
    covered = {name: counts[list(values)].sum() / labels.size for name, values in volume.STRUCTURES.items()}
    return {name: float(share) for name, share in sorted(covered.items(), key=lambda item: -item[1]) if share > 0}


def _locate(plane: str, position: float) -> tuple[int, int]:
    if plane not in PLANES:
        raise ValueError(f"plane is {plane!r}; it must be one of {', '.join(sorted(PLANES))}")
    if not 0 <= position <= 1:
        raise ValueError(f"position is {position}; it must be between 0 and 1")
    axis = PLANES[plane]
    count = volume.load().hu.shape[axis]
    return axis, min(int(position * count), count - 1)
