"""Confidence intervals from resampled studies.

The rows of a study share one image: a model that knows one of them mostly knows the others. Intervals that take rows
for independent are too narrow, so whole studies are drawn (the cluster bootstrap: Field and Welsh, Bootstrapping
clustered data, 2007, https://doi.org/10.1111/j.1467-9868.2007.00593.x).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


NAN = math.nan
Numbers = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """
    A number with its confidence interval.

    Attributes:
        value (`float`):
            The number on all rows; NaN where there are none.
        low (`float`), high (`float`):
            Bounds of the interval; NaN where there are fewer than two studies, from which nothing about their
            variation is known.
        n (`int`):
            Rows; of both sides where two are compared.
        studies (`int`):
            Different studies that they are about.
        missing (`int`):
            Rows left out, since their value is missing (`None` or NaN), such as a judge's mark that could not be read.
    """

    value: float
    low: float
    high: float
    n: int
    studies: int
    missing: int = 0


def bootstrap_mean(
    values: Numbers, studies: Numbers, *, draws: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """
    Mean over rows, with the percentile interval over resampled studies.

    Args:
        values (`Sequence[float]` of length `R`):
            One value a row.
        studies (`Sequence[str]` of length `R`):
            The study of each row.
        draws (`int`, *optional*, defaults to `1000`):
            Samples of studies, drawn with replacement. Enough for percentile intervals (Efron and Tibshirani, An
            introduction to the bootstrap, 1993).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        confidence (`float`, *optional*, defaults to `0.95`):
            Share of intervals that are to hold the true mean.
    """
    numbers, of, missing = present(values, studies)
    names, codes = np.unique(of, return_inverse=True)
    if not len(numbers):
        return Interval(NAN, NAN, NAN, 0, 0, missing)
    sums, counts = np.bincount(codes, numbers), np.bincount(codes)  # (S,), (S,)
    times = study_draws(len(names), draws, seed)  # (draws, S)
    low, high = percentiles((times @ sums) / (times @ counts), confidence, len(names))
    return Interval(float(numbers.mean()), low, high, len(numbers), len(names), missing)


def bootstrap_difference(
    values: Numbers,
    studies: Numbers,
    other_values: Numbers,
    other_studies: Numbers,
    *,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """
    Mean of `values` minus mean of `other_values`. A study that has rows on both sides is drawn for both at once.

    Selectivity is this with the retain rows first; the gap to a retrained model is this with the same rows of two
    models, so that the interval is that of the paired difference.

    Args:
        values (`Sequence[float]`), studies (`Sequence[str]`):
            Values of one side, and the study of each.
        other_values (`Sequence[float]`), other_studies (`Sequence[str]`):
            The same of the other side.
        draws (`int`), seed (`int`), confidence (`float`), *optional*:
            As in [`bootstrap_mean`]. Draws without a row on one of the sides are left out.
    """
    numbers, of, missing = present(values, studies)
    others, of_others, others_missing = present(other_values, other_studies)
    names, codes = np.unique(np.concatenate([of, of_others]), return_inverse=True)
    rows, gone = len(numbers) + len(others), missing + others_missing
    if not len(numbers) or not len(others):
        return Interval(NAN, NAN, NAN, rows, len(names), gone)
    times = study_draws(len(names), draws, seed)  # (draws, S)
    means, fewest = [], len(names)
    for side, of_side in ((numbers, codes[: len(numbers)]), (others, codes[len(numbers) :])):
        counts = np.bincount(of_side, minlength=len(names))  # (S,)
        with np.errstate(invalid="ignore"):
            means.append((times @ np.bincount(of_side, side, len(names))) / (times @ counts))
        fewest = min(fewest, int(np.count_nonzero(counts)))
    low, high = percentiles(means[0] - means[1], confidence, fewest)
    return Interval(float(numbers.mean() - others.mean()), low, high, rows, len(names), gone)


@functools.lru_cache(maxsize=8)
def study_draws(studies: int, draws: int, seed: int) -> np.ndarray:
    """
    How often each study is drawn when as many studies are drawn as there are.

    Args:
        studies (`int`):
            Number of studies, S.
        draws (`int`):
            Number of samples.
        seed (`int`):
            Seed. The same for the same numbers, so that measures on the same studies see the same samples.

    Returns:
        `np.ndarray` of shape `(draws, S)`, float.
    """
    drawn = np.random.default_rng(seed).integers(studies, size=(draws, studies))
    drawn += np.arange(draws)[:, None] * studies  # a number of its own for each study of each sample
    counts = np.bincount(drawn.ravel(), minlength=draws * studies).reshape(draws, studies).astype(float)
    counts.flags.writeable = False
    return counts


def percentiles(statistics: np.ndarray, confidence: float, studies: int) -> tuple[float, float]:
    """Bounds that hold the middle share `confidence` of resampled statistics; NaN for fewer than two studies."""
    finite = statistics[np.isfinite(statistics)]
    if studies < 2 or not len(finite):
        return NAN, NAN
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def present(values: Numbers, studies: Numbers) -> tuple[np.ndarray, np.ndarray, int]:
    """Values that are there, their studies, and how many are not. `None` becomes NaN."""
    numbers, names = np.array(values, dtype=float), np.asarray(studies)
    if numbers.shape != names.shape:
        raise ValueError(f"{len(numbers)} values, and studies for {len(names)}")
    is_there = ~np.isnan(numbers)
    return numbers[is_there], names[is_there], int((~is_there).sum())
