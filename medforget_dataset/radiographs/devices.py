"""Implanted and inserted devices: pacemaker with two leads, central venous line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .anatomy import Body


if TYPE_CHECKING:
    from .findings import Finding

METAL = 7.0  # relative to water, of a generator
GENERATOR_MM = (44.0, 11.0, 38.0)
LEAD_STRENGTH = 55.0  # mm^2 of water per mm of lead: attenuation times cross-section
LINE_STRENGTH = 50.0


@dataclass(frozen=True)
class Device:
    """Thin tubes, and a metal box when there is a generator.

    Args:
        tubes (`tuple[np.ndarray, ...]`): paths of shape `(points, 3)`, mm, a point every half millimetre.
        strength (`float`, mm^2): attenuation times cross-section of a tube, relative to water.
        generator (`np.ndarray` of shape `(3,)`, mm, *optional*): centre of the box.
    """

    tubes: tuple[np.ndarray, ...]
    strength: float
    generator: np.ndarray | None = None
    heart: float = 1.0
    layer: int = 3

    def free_labels(self, body: Body) -> np.ndarray:
        return body.labels

    def apply(self, body: Body, density: np.ndarray) -> None:
        for tube in self.tubes:
            draw(tube, self.strength, body, density)
        if self.generator is not None:
            x, y, z = (
                np.abs(axis - c) / (size / 2)
                for axis, c, size in zip(body.centres(), self.generator, GENERATOR_MM, strict=True)
            )
            rounded = (x**4 + z**4) ** 0.25
            share = np.clip(0.5 + (1 - rounded) * 10, 0, 1) * np.clip(0.5 + (1 - y) * 1.3, 0, 1)
            density += share.astype(np.float32) * np.maximum(METAL - density, 0)


def draw(path: np.ndarray, strength: float, body: Body, density: np.ndarray) -> None:
    """Adds a tube of given line strength, spread over the nearest voxels so that its shadow has no steps."""
    index = path / body.spacing - 0.5
    base = np.floor(index).astype(int)
    share = index - base
    amount = strength * 0.5 / body.spacing.prod()
    for corner in np.ndindex(2, 2, 2):
        at = base + corner
        weight = np.prod(np.where(corner, share, 1 - share), -1) * amount
        ok = ((at >= 0) & (at < density.shape)).all(-1)
        np.add.at(density, tuple(at[ok].T), weight[ok].astype(np.float32))


def smooth_path(points: list[np.ndarray]) -> np.ndarray:
    """A smooth curve near `points` (mm), sampled every half millimetre."""
    path = np.asarray(points, float)
    for _ in range(4):  # corner cutting (Chaikin); the ends stay
        cut = np.stack([0.75 * path[:-1] + 0.25 * path[1:], 0.25 * path[:-1] + 0.75 * path[1:]], 1).reshape(-1, 3)
        path = np.concatenate([path[:1], cut, path[-1:]])
    window = np.hanning(23)[1:-1]
    padded = np.pad(path, ((10, 10), (0, 0)), "reflect", reflect_type="odd")
    path = sum(w * padded[i : i + len(path)] for i, w in enumerate(window / window.sum()))
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    at = np.arange(0, length[-1], 0.5)
    return np.stack([np.interp(at, length, path[:, axis]) for axis in range(3)], -1)


def centre_of(body: Body, structure: str, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Mean position (mm) of the part of `structure` between two fractions of its height."""
    mask = body.mask(structure)
    z = np.flatnonzero(mask.any((0, 1)))
    bottom, top = z[0] + low * (z[-1] + 1 - z[0]), z[0] + high * (z[-1] + 1 - z[0])
    part = np.zeros_like(mask)
    first = int(bottom)
    last = max(int(np.ceil(top)), first + 1)
    part[..., first:last] = mask[..., first:last]
    return (np.argwhere(part).mean(0) + 0.5) * body.spacing


def vein_to_heart(body: Body, side: str) -> list[np.ndarray]:
    """From the brachiocephalic vein of a side through the superior vena cava to its lower end."""
    vein = f"{side} brachiocephalic vein"
    upper = [centre_of(body, vein, 0.75, 1.0)]
    if side == "left":
        upper.append(centre_of(body, vein, 0.3, 0.6))
    cava = [centre_of(body, "superior vena cava", low, low + 0.15) for low in (0.8, 0.5, 0.15)]
    return upper + cava


def under_clavicle(body: Body, side: str, lateral: float) -> np.ndarray:
    """A point (mm) behind the clavicle, at a fraction of its length from the sternal end."""
    clavicle = np.argwhere(body.mask(f"{side} clavicle"))
    x = clavicle[:, 0]
    inner, outer = (x.max(), x.min()) if side == "right" else (x.min(), x.max())
    near = clavicle[np.abs(x - (inner + lateral * (outer - inner))) <= 2].mean(0)
    return (near + 0.5) * body.spacing - (0, 6.0, 6.0)


class Pacemaker:
    """A dual-chamber pacemaker: generator in front of the upper chest, leads to right atrium and right ventricle."""

    @staticmethod
    def place(finding: Finding, body: Body, rng: np.random.Generator) -> Device:
        side = finding.place
        sign = -1 if side == "right" else 1
        lungs = body.bounds(body.mask(f"{side} lung"))
        middle = 0.5 * (lungs[0, 0] + lungs[1, 0])
        clavicle = under_clavicle(body, side, 0.5)
        box = np.array([middle + sign * rng.uniform(14, 24), 0.0, lungs[1, 2] - rng.uniform(52, 66)])
        box[1] = front_of_chest(body, box) - GENERATOR_MM[1]
        heart = body.bounds(body.mask("heart"))
        size = heart[1] - heart[0]
        atrium = heart[0] + size * (0.22, 0.62, 0.55)
        ventricle = heart[0] + size * (rng.uniform(0.66, 0.76), 0.8, rng.uniform(0.1, 0.18))
        start = box + (-sign * 10, -3, GENERATOR_MM[2] / 2 - 2)
        way = [start, start + (-sign * 4, -5, 14), clavicle, *vein_to_heart(body, side)]
        inlet = heart[0] + size * (0.2, 0.5, 0.42)
        leads = (
            smooth_path([*way, inlet, atrium - (0, 6, 14), atrium + (6, 8, 4)]),
            smooth_path([*way, inlet + (2, 0, 0), heart[0] + size * (0.35, 0.62, 0.16), ventricle]),
        )
        return Device(leads, LEAD_STRENGTH, box)


class CentralLine:
    """A central venous line from the side's internal jugular vein to the lower superior vena cava."""

    @staticmethod
    def place(finding: Finding, body: Body, rng: np.random.Generator) -> Device:
        side = finding.place
        sign = -1 if side == "right" else 1
        veins = vein_to_heart(body, side)
        top = body.spacing[2] * body.density.shape[2]
        neck = veins[0] + (sign * rng.uniform(10, 18), -4, 0)
        neck[2] = top - 1
        outside = neck + (sign * rng.uniform(8, 20), 0, 20)
        tip = veins[-1] - (0, 0, rng.uniform(0, 12))
        return Device((smooth_path([outside, neck, *veins, tip]),), LINE_STRENGTH)


def front_of_chest(body: Body, point: np.ndarray) -> float:
    """Height (mm, from the back) of the skin in front of `point`."""
    x, _, z = np.clip((point / body.spacing).astype(int), 0, np.array(body.density.shape) - 1)
    tissue = np.flatnonzero(body.density[x, :, z] > 0.5)
    return float((tissue[-1] + 1) * body.spacing[1])
