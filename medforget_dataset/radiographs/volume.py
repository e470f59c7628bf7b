"""The chest CT that all rendered patients are deformed from: densities, labels and the names of the labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np


ASSET = Path(__file__).parent.parent / "assets" / "chest_ct.npz"

# Label values of the asset: TotalSegmentator's, as in the source's structures.csv.
STRUCTURES: dict[str, tuple[int, ...]] = {
    "right upper lobe": (12,),
    "right middle lobe": (13,),
    "right lower lobe": (14,),
    "left upper lobe": (10,),
    "left lower lobe": (11,),
    "right lung": (12, 13, 14),
    "left lung": (10, 11),
    "heart": (51, 61),
    "aorta": (52,),
    "pulmonary vein": (53,),
    "superior vena cava": (62,),
    "inferior vena cava": (63,),
    "portal vein": (64,),
    "right brachiocephalic vein": (60,),
    "left brachiocephalic vein": (59,),
    "trachea": (16,),
    "esophagus": (15,),
    "thyroid": (17,),
    "liver": (5,),
    "spleen": (1,),
    "stomach": (6,),
    "pancreas": (7,),
    "gallbladder": (4,),
    "duodenum": (19,),
    "small bowel": (18,),
    "colon": (20,),
    "right kidney": (2,),
    "left kidney": (3,),
    "right adrenal gland": (8,),
    "left adrenal gland": (9,),
    "spine": tuple(range(29, 47)),
    "spinal cord": (79,),
    "sternum": (116,),
    "right ribs": tuple(range(104, 116)),
    "left ribs": tuple(range(92, 104)),
    "costal cartilages": (118,),
    "right scapula": (72,),
    "left scapula": (71,),
    "right clavicle": (74,),
    "left clavicle": (73,),
    "right humerus": (70,),
    "left humerus": (69,),
}
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
LUNGS = STRUCTURES["right lung"] + STRUCTURES["left lung"]


@dataclass(frozen=True)
class Volume:
    """Voxel grids whose axes run from the patient's right to left, back to front, and feet to head.

    Args:
        hu (`np.ndarray` of shape `(x, y, z)`, float32, Hounsfield units): densities.
        labels (`np.ndarray` of shape `(x, y, z)`, uint8): the structure of each voxel, see `STRUCTURES`; 0 is none.
        spacing (`np.ndarray` of shape `(3,)`, mm): size of a voxel. Voxel `i` is centred at `(i + 0.5) * spacing`.
    """

    hu: np.ndarray
    labels: np.ndarray
    spacing: np.ndarray

    @property
    def extent(self) -> np.ndarray:
        """Size of the whole volume in mm, shape `(3,)`."""
        return self.spacing * self.hu.shape


@lru_cache(maxsize=1)
def load() -> Volume:
    """The embedded CT at its full resolution."""
    with np.load(ASSET) as asset:
        step, offset = (float(number) for number in asset["hu_step_and_offset"])
        hu = asset["hu"].astype(np.float32) * np.float32(step) + np.float32(offset)
        return Volume(hu, asset["labels"], asset["spacing_mm"])


@lru_cache(maxsize=2)
def averaged(width: int, depth: int) -> Volume:
    """The CT with voxels `width` times as wide and `depth` times as deep, the labels thinned out alike.

    A projection sums over the depth, so that its resolution matters less than that of the width and the height.
    """
    ct = load()
    x, y, z = ct.hu.shape
    hu = ct.hu.reshape(x // width, width, y // depth, depth, z).mean((1, 3))
    labels = np.ascontiguousarray(ct.labels[width // 2 :: width, depth // 2 :: depth])
    return Volume(hu, labels, ct.spacing * (width, depth, 1))


@lru_cache(maxsize=64)
def mask_table(structure: str) -> np.ndarray:
    """A boolean look-up table of shape `(256,)`: `mask_table("heart")[labels]` is the mask of the heart."""
    table = np.zeros(256, bool)
    table[list(STRUCTURES[structure])] = True
    return table
