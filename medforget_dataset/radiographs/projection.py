"""From a body to a radiograph: line integrals along a diverging beam, and the detector's response."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .anatomy import Body


SOURCE_DISTANCE = 1700.0  # mm from the X-ray source to the middle of the chest: a 1.8 m film distance
APEX_MARGIN = 13.0  # mm of neck above the lungs


@dataclass(frozen=True)
class Pose:
    """How the patient stood in this study; angles in degrees, lengths in mm.

    Args:
        yaw (`float`): turn about the body's long axis. Positive angles turn the patient's right front towards the
            detector (right anterior oblique).
        tilt (`float`): forward lean.
        right, up (`float`): displacement of the beam's centre on the image.
        zoom (`float`): side of the exposed field relative to the patient's own field.
    """

    yaw: float = 0.0
    tilt: float = 0.0
    right: float = 0.0
    up: float = 0.0
    zoom: float = 1.0


@dataclass(frozen=True)
class Field:
    """The exposed square: its centre in the body (mm, shape `(3,)`) and its side (mm) in the centre's plane."""

    centre: np.ndarray
    side: float


def field_of(body: Body) -> Field:
    """The square that a technologist would expose for this patient: both lungs, apex to costophrenic angle."""
    lungs = body.bounds(body.mask("right lung") | body.mask("left lung"))
    width, _, height = lungs[1] - lungs[0]
    side = max(1.14 * width, 0.98 * height)
    centre = lungs.mean(0)
    centre[2] = lungs[1, 2] + APEX_MARGIN - side / 2
    return Field(centre, float(side))


def project(body: Body, field: Field, pose: Pose, size: int) -> np.ndarray:
    """Beer-Lambert line integrals of a posteroanterior view with perspective.

    Args:
        body (`Body`): density and spacing.
        field (`Field`): what is exposed.
        pose (`Pose`): rotation, lean, displacement and zoom.
        size (`int`): pixels along each side.

    Returns:
        `np.ndarray` of shape `(size, size)`, float32, centimetres of water. The first row is the top of the image,
        the first column the patient's right.
    """
    nx, ny, nz = body.density.shape
    # A border of air lets rays that miss the volume read zero.
    columns = np.pad(body.density, ((1, 1), (1, 1), (0, 0))).reshape(-1, nz)
    pixels = ((np.arange(size) + 0.5) / size - 0.5) * field.side * pose.zoom
    angle, lean = np.deg2rad(pose.yaw), np.tan(np.deg2rad(pose.tilt))
    half = 0.5 * (abs(np.cos(angle)) * ny * body.spacing[1] + abs(np.sin(angle)) * nx * body.spacing[0])
    count = int(np.ceil(2 * half / body.spacing[1]))
    image = np.zeros((size, size), np.float32)
    for depth in np.linspace(-half, half, count):
        spread = 1 + depth / SOURCE_DISTANCE
        across = (pixels + pose.right) * spread
        x = field.centre[0] + np.cos(angle) * across - np.sin(angle) * depth
        y = 0.5 * ny * body.spacing[1] + np.sin(angle) * across + np.cos(angle) * depth
        plane = _rows(columns, x / body.spacing[0] + 0.5, y / body.spacing[1] + 0.5, (nx + 2, ny + 2))
        z = field.centre[2] + (pixels[::-1] + pose.up) * spread + lean * depth
        image += _levels(plane, z / body.spacing[2] - 0.5).T
    return image * np.float32(2 * half / max(count - 1, 1) / 10)


def _rows(columns: np.ndarray, x: np.ndarray, y: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear samples of `columns`, one row of all heights for each `(x, y)`: shape `(len(x), z)`."""
    x, y = np.clip(x, 0, shape[0] - 1.001), np.clip(y, 0, shape[1] - 1.001)
    left, back = x.astype(np.int64), y.astype(np.int64)
    right_share = (x - left).astype(np.float32)[:, None]
    front_share = (y - back).astype(np.float32)[:, None]
    first = left * shape[1] + back
    near = columns[first] * (1 - front_share) + columns[first + 1] * front_share
    first = first + shape[1]
    far = columns[first] * (1 - front_share) + columns[first + 1] * front_share
    return near * (1 - right_share) + far * right_share


def _levels(plane: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Linear samples of `plane` at heights `z`; above and below the volume its last slices go on."""
    z = np.clip(z, 0, plane.shape[1] - 1.001)
    below = z.astype(np.int64)
    share = (z - below).astype(np.float32)
    return plane[:, below] * (1 - share) + plane[:, below + 1] * share


@dataclass(frozen=True)
class Response:
    """Line integrals (cm of water) to grey levels; fixed per patient, so that findings cannot shift the window.

    Args:
        dark, bright (`float`, cm of water): integrals shown near black and near white.
        gamma, contrast (`float`): the study's exposure.
    """

    dark: float
    bright: float
    gamma: float = 1.0
    contrast: float = 1.0

    def __call__(self, integrals: np.ndarray) -> np.ndarray:
        """Grey levels 0 to 255, float, of the same shape as `integrals`."""
        level = (integrals - self.dark) / (self.bright - self.dark)
        level = np.clip(level, 0, None) ** self.gamma
        # A film's S-shaped curve keeps some slope in the densest parts instead of clipping them.
        level = 0.5 + 0.5 * np.tanh(2 * self.contrast * (level - 0.5)) / np.tanh(self.contrast)
        return np.clip(level, 0, 1.02) / 1.02 * 255


def enhance(integrals: np.ndarray) -> np.ndarray:
    """What a detector's processing does: fine detail raised, slow differences of thickness lowered.

    Args:
        integrals (`np.ndarray` of shape `(size, size)`, cm of water).
    """
    size = integrals.shape[0]
    sharp = integrals - blur(integrals, max(0.012 * size, 0.6))
    local = integrals - blur(integrals, 0.05 * size)
    return integrals + 0.7 * sharp + 0.45 * local


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of `sigma` pixels with mirrored borders, shape `(size, size)`."""
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        padded = np.moveaxis(
            np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], "reflect"), axis, 0
        )
        image = np.moveaxis(sum(w * padded[i : i + image.shape[axis]] for i, w in enumerate(weights)), 0, axis)
    return image


def window_of(reference: np.ndarray) -> tuple[float, float]:
    """Integrals shown near black and near white for a patient whose reference projection (no findings) is given."""
    inner = reference[
        reference.shape[0] // 12 : -reference.shape[0] // 12, reference.shape[1] // 8 : -reference.shape[1] // 8
    ]
    dark, bright = np.percentile(inner, [1, 99])
    return float(dark - 0.03 * (bright - dark)), float(bright)
