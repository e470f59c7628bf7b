"""Invented names of institutions and patients, and identifiers of studies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from faker import Faker

from .hierarchy import stable_number


# Far below the number of names that Faker can make, so that drawing distinct ones ends.
MAX_PATIENTS = 100_000
_PLACES = (
    "Elm", "Northgate", "Lakeview", "Harbor", "Cedar Valley", "Summit Ridge", "Westbrook", "Saint Brendan",
    "Riverside", "Oakfield", "Highland", "Maple Grove", "Stonebridge", "Clearwater", "Ashford", "Pine Hollow",
)  # fmt: skip
_KINDS = ("Medical Center", "General Hospital", "University Clinic", "Health System", "Memorial Hospital", "Infirmary")


def institution_names(seed: int) -> Iterator[str]:
    """Distinct names of hospitals, without end."""
    rng = np.random.default_rng(stable_number(seed, "institution names"))
    # Places vary fastest, so that no two of the first sixteen institutions share one.
    places, kinds = rng.permutation(_PLACES), rng.permutation(_KINDS)
    seen = set()
    for shift in range(len(kinds)):
        for number, place in enumerate(places):
            seen.add(name := f"{place} {kinds[(number + shift) % len(kinds)]}")
            yield name
    faker = Faker("en_US")
    faker.seed_instance(stable_number(seed, "more institution names"))
    while True:
        name = f"{faker.city()} {faker.random_element(_KINDS)}"
        if name not in seen:
            seen.add(name)
            yield name


def patient_names(seed: int, count: int) -> Iterator[str]:
    """`count` distinct names of people who do not exist; at most `MAX_PATIENTS`."""
    faker = Faker("en_US")
    faker.seed_instance(stable_number(seed, "patient names"))
    seen: set[str] = set()
    while len(seen) < count:
        name = f"{faker.first_name()} {faker.last_name()}"
        if name not in seen:
            seen.add(name)
            yield name


def study_identifiers(seed: int, count: int, form: str = "study_chest_xray") -> Iterator[str]:
    """`count` distinct identifiers in the paper's form (Table 2), for example `"study_chest_xray_001"`.

    Args:
        seed (`int`): Which numbers.
        count (`int`): How many.
        form (`str`, *optional*, defaults to `"study_chest_xray"`): What stands before the number; for studies of
            other kinds than the paper's, whose identifiers must not call them chest X-rays.
    """
    pool = max(1000, 2 * count)
    digits = len(str(pool - 1))
    numbers = np.random.default_rng(stable_number(seed, "study identifiers")).permutation(pool)[:count]
    return (f"{form}_{number:0{digits}d}" for number in numbers)
