"""Findings inside the lung: airspace opacity and nodule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import volume
from .anatomy import Body, spline


if TYPE_CHECKING:
    from .findings import Finding

RADIUS_MM = {"small": 21.0, "moderate": 33.0, "large": 48.0}
# The part of the lung's height where a radiologist looks for a lobe; the dome of the diaphragm stands at about 0.4.
ZONES = {"upper": (0.72, 1.0), "middle": (0.42, 0.62), "lower": (0.38, 0.58)}
SHADOWS = ("heart", "aorta", "liver", "spleen", "stomach", "spine")


def shadow(body: Body) -> np.ndarray:
    """Millimetres of heart, great vessels, upper abdomen and spine in front of or behind each `(x, z)`."""
    opaque = np.logical_or.reduce([body.mask(name) for name in SHADOWS])
    return opaque.sum(1) * body.spacing[1]


def visible_centre(body: Body, lobe: str, radius: float, rng: np.random.Generator) -> np.ndarray:
    """A point (mm) in `lobe`, in its zone, with a ball of `radius` mm around it in the lobe and clear of the heart.

    Where the lobe has no such point, the clearest and deepest points are taken.

    Raises:
        ValueError: if nothing is left of the lobe.
    """
    inside = body.mask(lobe)
    if not inside.any():
        raise ValueError(f"no air is left in the {lobe}: the study's other findings fill it")
    depth = np.zeros(inside.shape, np.float32)
    reach = np.maximum(np.round(radius * np.array([0.35, 0.6, 0.85, 1.0])[:, None] / body.spacing), 1).astype(int)
    for steps in reach:
        still = inside.copy()
        for axis, step in enumerate(steps):
            still &= np.roll(inside, step, axis) & np.roll(inside, -step, axis)
        depth += still
    side, zone, _ = lobe.split()
    lung = body.bounds(body.mask(f"{side} lung"))[:, 2]
    height = (body.centres()[2] - lung[0]) / (lung[1] - lung[0])
    outside = np.maximum(ZONES[zone][0] - height, 0) + np.maximum(height - ZONES[zone][1], 0)
    hidden = np.minimum(shadow(body), 100)[:, None, :] / 25
    score = np.where(inside, depth - hidden - 12 * outside, -np.inf)
    best = np.argwhere(score >= score.max() - 0.75)
    jitter = rng.uniform(-0.5, 0.5, 3)
    return (best[rng.integers(len(best))] + 0.5 + jitter) * body.spacing


@dataclass(frozen=True)
class Blob:
    """An irregular ball of tissue in one lobe.

    Args:
        lobe (`str`): it does not cross the lobe's fissures.
        centre, radius (`np.ndarray` of shape `(3,)`, mm).
        bumps (`np.ndarray` of shape `(n, n, n, 1)`): control points of the irregular outline.
        density (`float`, relative to water): of its core.
        edge (`float`): width of the rim relative to the radius.
    """

    lobe: str
    centre: np.ndarray
    radius: np.ndarray
    bumps: np.ndarray
    density: float
    edge: float
    heart: float = 1.0
    layer: int = 0

    def apply(self, body: Body, density: np.ndarray) -> None:
        box, share = self._share(body)
        before = density[box]
        density[box] = before + share * np.maximum(self.density - before, 0)

    def free_labels(self, body: Body) -> np.ndarray:
        box, share = self._share(body)
        labels = body.labels.copy()
        labels[box][share > 0.05] = 0
        return labels

    def _share(self, body: Body) -> tuple[tuple[slice, ...], np.ndarray]:
        """A box around the ball and the share of tissue (0 to 1) in each of its voxels."""
        low = np.maximum(np.floor((self.centre - 1.6 * self.radius) / body.spacing), 0).astype(int)
        high = np.minimum(np.ceil((self.centre + 1.6 * self.radius) / body.spacing) + 1, body.labels.shape).astype(int)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        axes = [(np.arange(a, b) + 0.5) * mm for a, b, mm in zip(low, high, body.spacing, strict=True)]
        offset = (np.stack(np.meshgrid(*axes, indexing="ij"), -1) - self.centre) / self.radius
        distance = np.sqrt((offset**2).sum(-1)) + spline(self.bumps, offset / 3.2 + 0.5)[..., 0]
        share = np.clip(0.5 + (1 - distance) / self.edge, 0, 1) * volume.mask_table(self.lobe)[body.labels[box]]
        return box, share.astype(np.float32)


class Opacity:
    """Airspace opacity (consolidation): a soft-edged, irregular part of a lobe filled with fluid."""

    @staticmethod
    def place(finding: Finding, body: Body, rng: np.random.Generator) -> Blob:
        radius = RADIUS_MM[finding.size] * rng.uniform(0.92, 1.08, 3)
        centre = visible_centre(body, finding.place, 0.5 * radius.mean(), rng)
        return Blob(finding.place, centre, radius, 0.8 * rng.normal(size=(8, 8, 8, 1)), 0.92, 0.8)


class Nodule:
    """A solid, well-defined, slightly lobulated nodule."""

    @staticmethod
    def place(finding: Finding, body: Body, rng: np.random.Generator) -> Blob:
        radius = np.full(3, finding.diameter_mm / 2)
        centre = visible_centre(body, finding.place, 1.3 * radius[0], rng)
        return Blob(finding.place, centre, radius, 0.12 * rng.normal(size=(5, 5, 5, 1)), 1.08, 2.5 / radius[0])
