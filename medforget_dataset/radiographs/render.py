"""From a patient, a study and its findings to a radiograph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from .anatomy import Anatomy, Body, generator
from .findings import Finding, Placement, insert, place
from .projection import Field, Pose, Response, enhance, field_of, project, window_of


COARSE_UP_TO = 112  # pixels a side; larger images use the full-resolution CT
REFERENCE_SIZE = 64


def render(
    patient_key: str,
    study_key: str,
    findings: Sequence[Finding] = (),
    *,
    view_angle: float = 0.0,
    size: int = 224,
    seed: int = 0,
) -> Image.Image:
    """A posteroanterior chest radiograph, the patient's right on the image's left.

    The image is a function of the arguments alone: the same for any order of calls and any number of threads.

    Args:
        patient_key (`str`): body of the patient: deformation, habitus and heart size, the same in all studies.
        study_key (`str`): pose, exposure and places of the findings.
        findings (`Sequence[Finding]`, *optional*, defaults to `()`): what the study shows.
        view_angle (`float`, *optional*, defaults to `0.0`): degrees by which the patient is turned about the long axis
            of the body; positive angles turn the right front of the chest towards the detector.
        size (`int`, *optional*, defaults to `224`): pixels a side.
        seed (`int`, *optional*, defaults to `0`): seed of the corpus.

    Returns:
        `PIL.Image.Image`: mode `L`, `size` by `size`.

    Raises:
        ValueError: if `size` is below 16.
    """
    if size < 16:
        raise ValueError(f"size is {size}; a radiograph needs at least 16 pixels a side")
    study = _Study(patient_key, study_key, tuple(findings), seed)
    levels = study.levels(study.placements(), view_angle, size)
    return Image.fromarray(np.round(levels).astype(np.uint8), "L")


def visible_change(
    patient_key: str,
    study_key: str,
    findings: Sequence[Finding],
    index: int,
    *,
    view_angle: float = 0.0,
    size: int = 224,
    seed: int = 0,
) -> float:
    """The largest grey-level change (0 to 255) that the finding at `index` makes: the study with and without it.

    Args:
        findings (`Sequence[Finding]`): what the study shows.
        index (`int`): which of `findings` is left out.
        patient_key, study_key, view_angle, size, seed: as for [`render`].
    """
    study = _Study(patient_key, study_key, tuple(findings), seed)
    shown = study.placements()
    without = [placement for i, placement in enumerate(shown) if i != index % len(shown)]
    change = study.levels(shown, view_angle, size) - study.levels(without, view_angle, size)
    return float(np.abs(change).max())


class _Study:
    def __init__(self, patient: str, study: str, findings: tuple[Finding, ...], seed: int):
        self.anatomy = Anatomy(patient, seed)
        self.findings = findings
        self.keys = (seed, patient, study)

    def placements(self) -> list[Placement]:
        # Always in the coarse body, so that an image's size does not move its findings.
        body = self.anatomy.body(coarse=True)
        large = place([finding for finding in self.findings if finding.kind == "cardiomegaly"], body, *self.keys)
        if large:
            body = self.anatomy.body(coarse=True, heart=max(placement.heart for placement in large))
        return place(self.findings, body, *self.keys)

    def levels(self, placements: Sequence[Placement], view_angle: float, size: int) -> np.ndarray:
        """Grey levels 0 to 255, float, shape `(size, size)`."""
        field, (dark, bright) = _reference(self.anatomy)
        heart = max((p.heart for p in placements), default=1.0)
        body = self.anatomy.body(coarse=size <= COARSE_UP_TO, heart=heart)
        rng = generator(*self.keys, "pose")
        pose = Pose(
            yaw=view_angle + rng.uniform(-3, 3),
            tilt=rng.uniform(-3, 3),
            right=rng.uniform(-7, 7),
            up=rng.uniform(-4, 4),
            zoom=rng.uniform(0.98, 1.04),
        )
        response = Response(dark, bright, gamma=rng.uniform(0.66, 0.8), contrast=rng.uniform(0.65, 0.95))
        return response(enhance(project(insert(placements, body), field, pose, size)))


@lru_cache(maxsize=16)
def _reference(anatomy: Anatomy) -> tuple[Field, tuple[float, float]]:
    body: Body = anatomy.body(coarse=True)
    field = field_of(body)
    return field, window_of(enhance(project(body, field, Pose(), REFERENCE_SIZE)))
