"""One patient's body: a reproducible smooth deformation of the embedded CT, its habitus and its heart size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from . import volume


# The field is evaluated on this grid (mm) and interpolated: everything in it varies over centimetres.
FIELD_SPACING = 8.0
# Width and depth of a voxel relative to the CT's, for images of any size and for those up to 112 pixels.
FINE, COARSE = (1, 2), (2, 4)
DISPLACEMENT = 16.0  # mm, standard deviation of the control points, about half of which survives the spline


def generator(*keys: object) -> np.random.Generator:
    """A random generator that depends on `keys` alone, never on what was drawn before."""
    digest = hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@dataclass(frozen=True)
class Body:
    """A patient's deformed volume.

    Args:
        density (`np.ndarray` of shape `(x, y, z)`, float32, relative to water): attenuation per length.
        labels (`np.ndarray` of shape `(x, y, z)`, uint8): the structure of each voxel, see `volume.STRUCTURES`.
        spacing (`np.ndarray` of shape `(3,)`, mm): size of a voxel; axes and centres as in `volume.Volume`.
    """

    density: np.ndarray
    labels: np.ndarray
    spacing: np.ndarray

    def mask(self, structure: str) -> np.ndarray:
        return volume.mask_table(structure)[self.labels]

    def centres(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Voxel centres in mm along the three axes, shaped to broadcast to `(x, y, z)`."""
        x, y, z = ((np.arange(n) + 0.5) * mm for n, mm in zip(self.density.shape, self.spacing, strict=True))
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def bounds(self, mask: np.ndarray) -> np.ndarray:
        """Smallest box around `mask` in mm, shape `(2, 3)`: lower and upper corner."""
        hits = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        return np.array([[h[0] for h in hits], [h[-1] + 1 for h in hits]]) * self.spacing


@dataclass(frozen=True)
class Anatomy:
    """What makes a patient: the same in all of the patient's studies.

    Args:
        key (`str`): the patient; two patients with the same key and seed have the same body.
        seed (`int`, *optional*, defaults to `0`): seed of the corpus.
    """

    key: str
    seed: int = 0

    def body(self, coarse: bool, heart: float = 1.0) -> Body:
        """The patient's volume; the last few are cached.

        Args:
            coarse (`bool`): with larger voxels, enough for images up to 112 pixels.
            heart (`float`, *optional*, defaults to `1.0`): width of the heart relative to the patient's healthy heart.
        """
        return _body(self, coarse, heart)

    def source_of(self, points: np.ndarray, heart: float) -> np.ndarray:
        """Where in the CT (mm) the tissue at the body's `points` (mm), shape `(..., 3)`, comes from."""
        rng = generator(self.seed, "anatomy", self.key)
        template = _template()
        scale = np.array([rng.uniform(0.96, 1.07), rng.uniform(0.92, 1.12), rng.uniform(1.03, 1.16)])
        control = rng.normal(size=(5, 4, 5, 3)) * DISPLACEMENT
        soft_tissue, own_heart = rng.uniform(0.8, 1.5), rng.uniform(0.9, 1.0)
        shift = spline(control, points / template.extent)
        # The CT ends above and below: no part of the body may come from beyond it.
        inside = np.minimum(points[..., 2], template.extent[2] - points[..., 2])
        shift[..., 2] *= np.clip(inside / 80.0, 0, 1)
        source = template.centre + (points - template.centre) / scale + shift
        source = template.thicken(source, soft_tissue)
        return template.enlarge_heart(source, own_heart * heart)


@dataclass(frozen=True)
class _Template:
    """Measurements of the CT that deformations refer to, in mm."""

    centre: np.ndarray
    extent: np.ndarray
    chest_centre: np.ndarray
    chest_radius: np.ndarray
    heart_centre: np.ndarray
    heart_radius: np.ndarray

    def thicken(self, points: np.ndarray, factor: float) -> np.ndarray:
        """Makes the soft tissue outside the rib cage `factor` times as thick."""
        across = (points[..., :2] - self.chest_centre) / self.chest_radius
        radius = np.sqrt((across**2).sum(-1, keepdims=True))
        inner = np.where(radius > 1, (1 + (radius - 1) / factor) / np.maximum(radius, 1), 1.0)
        return np.concatenate([self.chest_centre + across * inner * self.chest_radius, points[..., 2:]], -1)

    def enlarge_heart(self, points: np.ndarray, factor: float) -> np.ndarray:
        """Widens the heart `factor` times; the change fades out towards the chest wall."""
        offset = points - self.heart_centre
        radius = np.sqrt(((offset / self.heart_radius) ** 2).sum(-1, keepdims=True))
        strength = np.exp(-((radius / (1.2 * max(factor, 1))) ** 6))
        # It rests on the diaphragm and lies against the sternum: it can only widen.
        grown = np.array([factor, 1 + 0.15 * (factor - 1), 1 + 0.4 * (factor - 1)])
        return self.heart_centre + offset * (1 + (1 / grown - 1) * strength)


@lru_cache(maxsize=1)
def _template() -> _Template:
    ct = volume.averaged(*COARSE)
    body = Body(ct.hu, ct.labels, ct.spacing)
    lungs = body.bounds(body.mask("right lung") | body.mask("left lung"))
    heart = body.bounds(body.mask("heart"))
    centre, radius = lungs.mean(0), (lungs[1] - lungs[0]) / 2
    return _Template(
        # Scaling keeps the top of the lungs in place: there is little of the neck in the CT to grow into.
        centre=np.array([*centre[:2], lungs[1, 2]]),
        extent=ct.extent,
        chest_centre=centre[:2],
        chest_radius=radius[:2] + 10.0,
        heart_centre=heart.mean(0),
        heart_radius=(heart[1] - heart[0]) / 2,
    )


def spline(control: np.ndarray, points: np.ndarray) -> np.ndarray:
    """A smooth random field: uniform cubic B-spline through a grid of control vectors.

    Args:
        control (`np.ndarray` of shape `(a, b, c, channels)`): control vectors over the unit cube, at least 4 an axis.
        points (`np.ndarray` of shape `(x, y, z, 3)`): a rectangular grid of positions in the unit cube.

    Returns:
        `np.ndarray` of shape `(x, y, z, channels)`.
    """
    field = control
    for axis, positions in enumerate((points[:, 0, 0, 0], points[0, :, 0, 1], points[0, 0, :, 2])):
        knots = np.clip(positions, 0, 1)[:, None] * (field.shape[axis] - 3) + 1 - np.arange(field.shape[axis])
        far, near = np.clip(2 - np.abs(knots), 0, None), np.clip(1 - np.abs(knots), 0, None)
        weights = (far**3 - 4 * near**3) / 6
        # Summed by hand: BLAS may round differently with another number of threads.
        moved = np.moveaxis(field, axis, 0)
        field = np.moveaxis(sum(w[:, None, None, None] * c for w, c in zip(weights.T, moved, strict=True)), 0, axis)
    return field


@lru_cache(maxsize=6)
def _body(anatomy: Anatomy, coarse: bool, heart: float) -> Body:
    ct = volume.averaged(*(COARSE if coarse else FINE))
    grid = _sampling_grid(anatomy, heart, ct.hu.shape)
    density = _resample(_ct_density(coarse), grid, "bilinear")
    labels = _resample(ct.labels.astype(np.float32), grid, "nearest").astype(np.uint8)
    return Body(density, labels, ct.spacing)


def _sampling_grid(anatomy: Anatomy, heart: float, shape: tuple[int, int, int]) -> torch.Tensor:
    """Positions in the CT for `grid_sample`, shape `(1, x, y, z, 3)`: last axis first, -1 to 1 over the extent."""
    extent = volume.load().extent
    nodes = [max(2, round(mm / FIELD_SPACING)) for mm in extent]
    axes = [(np.arange(n) + 0.5) * mm / n for n, mm in zip(nodes, extent, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    source = (anatomy.source_of(points, heart) / extent * 2 - 1)[..., ::-1]
    grid = torch.from_numpy(np.ascontiguousarray(source, np.float32)).permute(3, 0, 1, 2)[None]
    return F.interpolate(grid, size=shape, mode="trilinear", align_corners=False).permute(0, 2, 3, 4, 1)


def _resample(values: np.ndarray, grid: torch.Tensor, mode: str) -> np.ndarray:
    return F.grid_sample(
        torch.from_numpy(values)[None, None], grid, mode=mode, padding_mode="border", align_corners=False
    )[0, 0].numpy()


@lru_cache(maxsize=2)
def _ct_density(coarse: bool) -> np.ndarray:
    return relative_density(volume.averaged(*(COARSE if coarse else FINE)).hu)


def relative_density(hu: np.ndarray) -> np.ndarray:
    """Attenuation relative to water at the softer beam of a radiograph, in which bone stands out more than in CT."""
    return np.maximum(hu + 1000, 0) / np.float32(1000) + np.maximum(hu - 150, 0) * np.float32(0.0002)
