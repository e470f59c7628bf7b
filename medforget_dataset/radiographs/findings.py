"""What a study can show, and where in the patient's volume it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .anatomy import Body, generator
from .devices import CentralLine, Pacemaker
from .lesions import Nodule, Opacity
from .pleura import Effusion, Pneumothorax
from .volume import LOBES


SIDES = ("right", "left")
SIZES = ("small", "moderate", "large")
HEART_SIZES = {"mild": 1.2, "moderate": 1.33, "marked": 1.46}
DIAMETERS_MM = (10, 30)


class Placement(Protocol):
    """A finding at its place in one body.

    `heart` is the width that it gives the heart; lower `layer`s are drawn first.
    """

    @property
    def heart(self) -> float: ...

    @property
    def layer(self) -> int: ...

    def apply(self, body: Body, density: np.ndarray) -> None:
        """Writes the finding into `density`, shape `(x, y, z)`, which is a copy of the body's."""

    def free_labels(self, body: Body) -> np.ndarray:
        """The body's labels without the part of the lung that this finding already fills."""


Placer = Callable[["Finding", Body, np.random.Generator], Placement]


@dataclass(frozen=True)
class Cardiomegaly:
    """A wider heart: the body is deformed with it, nothing is written into the densities."""

    heart: float
    layer: int = 0

    @classmethod
    def place(cls, finding: Finding, body: Body, rng: np.random.Generator) -> Cardiomegaly:
        return cls(HEART_SIZES[finding.size] * rng.uniform(0.98, 1.02))

    def apply(self, body: Body, density: np.ndarray) -> None:
        pass

    def free_labels(self, body: Body) -> np.ndarray:
        return body.labels


# kind -> (function that places it, allowed places, allowed sizes)
KINDS: dict[str, tuple[Placer, tuple[str, ...], tuple[str, ...]]] = {
    "cardiomegaly": (Cardiomegaly.place, ("",), tuple(HEART_SIZES)),
    "pneumothorax": (Pneumothorax.place, SIDES, SIZES),
    "effusion": (Effusion.place, SIDES, SIZES),
    "opacity": (Opacity.place, LOBES, SIZES),
    "nodule": (Nodule.place, LOBES, ("",)),
    "pacemaker": (Pacemaker.place, SIDES, ("",)),
    "central line": (CentralLine.place, SIDES, ("",)),
}


@dataclass(frozen=True)
class Finding:
    """One radiological finding.

    Args:
        kind (`str`): a key of `KINDS`.
        place (`str`, *optional*, defaults to `""`): a lobe for an opacity or nodule, a side for an effusion,
            pneumothorax, pacemaker or central line, nothing for cardiomegaly.
        size (`str`, *optional*, defaults to `""`): small, moderate or large; for cardiomegaly mild, moderate or
            marked; nothing for a nodule or a device.
        diameter_mm (`float`, *optional*, defaults to `0`): of a nodule, 10 to 30.

    Raises:
        ValueError: if a field does not fit the kind; the message names it and the valid values.

    Example:

    ```python
    >>> Finding("opacity", "right lower lobe", "small").place
    'right lower lobe'

    ```
    """

    kind: str
    place: str = ""
    size: str = ""
    diameter_mm: float = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"finding kind {self.kind!r} is not one of {', '.join(KINDS)}")
        _, places, sizes = KINDS[self.kind]
        for name, value, valid in (("place", self.place, places), ("size", self.size, sizes)):
            if value not in valid:
                options = ", ".join(valid) if valid != ("",) else "empty"
                raise ValueError(f"{name} of a {self.kind} is {value!r}; it must be {options}")
        low, high = DIAMETERS_MM if self.kind == "nodule" else (0, 0)
        if not low <= self.diameter_mm <= high:
            raise ValueError(f"diameter_mm of a {self.kind} is {self.diameter_mm}; it must be {low} to {high}")


def place(findings: Sequence[Finding], body: Body, *keys: object) -> list[Placement]:
    """Places every finding in `body`, larger ones first, so that a nodule is not drowned in an effusion.

    Args:
        findings (`Sequence[Finding]`): what the study shows.
        body (`Body`): the patient, with the heart size of this study.
        keys: what the random numbers depend on, beside the finding itself: seed, patient and study.

    Returns:
        `list[Placement]`: in the order of `findings`.

    Raises:
        ValueError: if two findings leave each other no room: two of a kind that fills its place, or a lobe drowned in
            a large effusion that should also show an opacity or nodule.
    """
    for number, finding in enumerate(findings):
        if finding.kind != "nodule" and any(
            (f.kind, f.place) == (finding.kind, finding.place) for f in findings[:number]
        ):
            raise ValueError(f"a study can show only one {finding.kind} {finding.place}".rstrip())
    placements: dict[int, Placement] = {}
    kinds = list(KINDS)
    for number in sorted(range(len(findings)), key=lambda n: kinds.index(findings[n].kind)):
        finding = findings[number]
        repeat = findings[:number].count(finding)
        rng = generator(*keys, finding.kind, finding.place, finding.size, finding.diameter_mm, repeat)
        placements[number] = KINDS[finding.kind][0](finding, body, rng)
        body = Body(body.density, placements[number].free_labels(body), body.spacing)
    return [placements[number] for number in range(len(findings))]


def insert(placements: Sequence[Placement], body: Body) -> Body:
    """`body` with the placed findings in its densities."""
    density = body.density.copy()
    for placement in sorted(placements, key=lambda p: p.layer):
        placement.apply(body, density)
    return Body(density, body.labels, body.spacing)
