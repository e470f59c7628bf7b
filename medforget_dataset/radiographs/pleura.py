"""Findings in the pleural space: effusion with its meniscus, pneumothorax with its visceral line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from .anatomy import Body


if TYPE_CHECKING:
    from .findings import Finding

FLUID, AIR, PLEURA = 1.02, 0.0, 1.0
LATERAL_LEVEL_MM = {"small": -16.0, "moderate": 26.0, "large": 78.0}  # above the dome of the diaphragm
MENISCUS_MM = {"small": 30.0, "moderate": 42.0, "large": 50.0}  # how much lower the level is towards the mediastinum
LATERAL_GAP_MM = {"small": 11.0, "moderate": 24.0, "large": 46.0}
DOME = 0.4  # of the lung's height: below it the lung stays against the chest wall and the diaphragm
APICAL_GAP_MM = {"small": 20.0, "moderate": 38.0, "large": 65.0}


@dataclass(frozen=True)
class Effusion:
    """Free fluid of an upright patient: a surface that climbs towards the chest wall.

    Args:
        side (`str`): right or left.
        level (`float`, mm): height of the fluid at the lateral chest wall.
        meniscus (`float`, mm): how much lower the middle of the hemithorax is.
    """

    side: str
    level: float
    meniscus: float
    heart: float = 1.0
    layer: int = 2

    @classmethod
    def place(cls, finding: Finding, body: Body, rng: np.random.Generator) -> Effusion:
        if finding.place == "right":
            dome = body.bounds(body.mask("liver"))[1, 2]
        else:  # fat lies between the stomach and the diaphragm
            dome = body.bounds(body.mask("stomach") | body.mask("spleen"))[1, 2] + 12.0
        level = dome + LATERAL_LEVEL_MM[finding.size] + rng.uniform(-4, 4)
        return cls(finding.place, float(level), MENISCUS_MM[finding.size])

    def apply(self, body: Body, density: np.ndarray) -> None:
        density += self._share(body) * np.maximum(FLUID - density, 0)

    def free_labels(self, body: Body) -> np.ndarray:
        return np.where(self._share(body) > 0.05, 0, body.labels).astype(np.uint8)

    def _share(self, body: Body) -> np.ndarray:
        """The share of fluid (0 to 1) in every voxel."""
        lung = body.mask(f"{self.side} lung")
        x, y, z = body.centres()
        # How far out towards the lateral wall, the back and the front a voxel lies, at its own height.
        left, right = span(np.any(lung, 1), body.spacing[0])
        back, front = span(np.any(lung, 0), body.spacing[1])
        out = (right - x) / (right - left) if self.side == "right" else (x - left) / (right - left)
        around = np.abs(2 * (y - back) / (front - back) - 1)
        climb = np.maximum(np.clip(out, 0, 1) ** 3, 0.75 * np.clip(around, 0, 1) ** 6)
        surface = self.level - self.meniscus * (1 - climb)
        # Seen end on, the bowl of fluid fades out upwards except where it meets the wall.
        blur = 8.0 + 26.0 * (1 - climb)
        return (np.clip(0.5 + (surface - z) / blur, 0, 1) * lung).astype(np.float32)


def span(mask: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """First and last position (mm) of `mask`, shape `(n, z)`, along its first axis: two arrays of shape `(z,)`."""
    first, last = mask.argmax(0), mask.shape[0] - mask[::-1].argmax(0)
    return first * spacing, last * spacing


@dataclass(frozen=True)
class Pneumothorax:
    """Air beside and above a lung that has retracted towards the mediastinum and the diaphragm.

    Args:
        side (`str`): right or left.
        lateral, apical (`float`, mm): width of the air at the upper lateral wall and above the apex.
    """

    side: str
    lateral: float
    apical: float
    heart: float = 1.0
    layer: int = 1

    @classmethod
    def place(cls, finding: Finding, body: Body, rng: np.random.Generator) -> Pneumothorax:
        share = rng.uniform(0.9, 1.15)
        return cls(finding.place, LATERAL_GAP_MM[finding.size] * share, APICAL_GAP_MM[finding.size] * share)

    def apply(self, body: Body, density: np.ndarray) -> None:
        lung = body.mask(f"{self.side} lung")
        bounds = body.bounds(lung)
        low, high = (np.round(corner / body.spacing).astype(int) for corner in bounds)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        source, squeeze, moved = self._source(
            [(np.arange(n) + 0.5) * mm for n, mm in zip(high - low, body.spacing, strict=True)]
        )
        grid = torch.from_numpy((source * 2 - 1)[..., ::-1].astype(np.float32))[None]
        inside = smooth(lung[box].astype(np.float32), body.spacing)
        values = torch.from_numpy(np.stack([np.where(lung[box], density[box], 0.2), inside]))[None]
        tissue, covered = F.grid_sample(values, grid, padding_mode="zeros", align_corners=False)[0].numpy()
        # The blurred mask falls from 1 to 0 across the surface of the retracted lung: the visceral pleura.
        pleura = np.clip(1 - np.abs(covered - 0.4) / 0.25, 0, 1) * np.clip((moved - 3) / 4, 0, 1)
        retracted = np.where(covered > 0.4, tissue * squeeze, AIR) * (1 - pleura) + PLEURA * pleura
        share = np.clip((inside - 0.3) / 0.3, 0, 1)
        density[box] += (share * (retracted - density[box])).astype(np.float32)

    def free_labels(self, body: Body) -> np.ndarray:
        return body.labels

    def _source(self, axes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where in the lung's box (0 to 1) the tissue at `axes` (mm from the box's corner) was before it retracted.

        Returns:
            Positions of shape `(x, y, z, 3)`; how much denser the tissue has become and how far it has moved to the
            side and down (mm), both of shape `(x, y, z)`.
        """
        x, y, z = np.meshgrid(*axes, indexing="ij")
        width, depth, height = (axis[-1] + axis[0] for axis in axes)
        out, up = (1 - x / width if self.side == "right" else x / width), z / height
        upper = np.clip((up - DOME) / (1 - DOME), 0, 1)
        shrink_z = 1 - self.apical / height * upper**2
        shrink_x = 1 - self.lateral / width * np.clip(2 * upper, 0, 1)
        source_out, source_up = out / shrink_x, up / shrink_z
        moved = np.hypot((source_out - out) * width, (source_up - up) * height)
        source_x = 1 - source_out if self.side == "right" else source_out
        source_y = 0.5 + (y / depth - 0.5) * (1 + 0.3 * (1 / shrink_x - 1))
        return np.stack([source_x, source_y, source_up], -1), 1 / (shrink_x * shrink_z), moved


def smooth(mask: np.ndarray, spacing: np.ndarray, reach: float = 3.0) -> np.ndarray:
    """`mask` (0 to 1) blurred with a triangle of `reach` mm to either side, the outside of the box being 0."""
    for axis, mm in enumerate(spacing):
        steps = int(reach // mm)
        weights = [max(0.0, 1 - abs(step) * mm / (reach + mm)) for step in range(-steps, steps + 1)]
        padded = np.pad(mask, [(steps, steps) if a == axis else (0, 0) for a in range(3)])
        moved = np.moveaxis(padded, axis, 0)
        count = mask.shape[axis]
        total = sum(w * moved[i : i + count] for i, w in enumerate(weights)) / sum(weights)
        mask = np.moveaxis(total, 0, axis).astype(np.float32)
    return mask
