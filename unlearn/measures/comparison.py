"""How far a model is from one that was trained without the forget set, and from not recognising it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ks_2samp

from .intervals import Interval, percentiles, present, study_draws


MEMBERSHIP_TASKS = ("generation", "cloze")
"""
Tasks on which members are told from others: those whose answers are words of a report. Identity answers are names, and
those of another hospital are rare words for the tokenizer and the model, whether or not anything was learned about the
patients; a letter has too few tokens.
"""

PAIRS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class KSResult:
    """
    Kolmogorov-Smirnov test of two samples.

    Attributes:
        statistic (`float`):
            Largest difference of the two cumulative distributions, 0 to 1.
        p_value (`float`):
            How often samples of one distribution would differ at least as much, were their values independent.
    """

    statistic: float
    p_value: float


def forget_quality(own: Sequence[float] | np.ndarray, retrained: Sequence[float] | np.ndarray) -> KSResult:
    """
    Whether the forget rows' answer probabilities are distributed as those of the model that never saw them.

    TOFU's forget quality (https://arxiv.org/abs/2401.06121) is the p-value of the same test on truth ratios, which
    need wrong and paraphrased answers to every question; here it is made on answer probabilities.

    Args:
        own (`Sequence[float]`):
            Answer probabilities of the forget rows under the unlearned model.
        retrained (`Sequence[float]`):
            The same under the retrained model.

    Returns:
        [`KSResult`]: NaN where a sample is empty; values that are NaN are left out.
    """
    samples = [sample[~np.isnan(sample)] for sample in (np.asarray(own, float), np.asarray(retrained, float))]
    if not all(map(len, samples)):
        return KSResult(math.nan, math.nan)
    result = ks_2samp(*samples)
    return KSResult(float(result.statistic), float(result.pvalue))


def auc(members: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> float:
    """
    Probability that a member has a higher score than a row that is none, ties counted half: the area under the ROC
    curve.

    Args:
        members (`Sequence[float]`):
            Scores of the forget rows, such as [`~unlearn.measures.extraction.min_k`].
        others (`Sequence[float]`):
            Scores of rows that no model was trained on.

    Returns:
        `float`: 0.5 where the two cannot be told apart; NaN where one of them is empty.
    """
    own, sorted_others = np.asarray(members, dtype=float), np.sort(np.asarray(others, dtype=float))
    if not len(own) or not len(sorted_others):
        return math.nan
    below, not_above = (np.searchsorted(sorted_others, own, side=side) for side in ("left", "right"))  # type: ignore
    return float((below + not_above).mean() / 2 / len(sorted_others))


def bootstrap_auc(
    members: Sequence[float] | np.ndarray,
    member_studies: Sequence[str] | np.ndarray,
    others: Sequence[float] | np.ndarray,
    other_studies: Sequence[str] | np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """
    [`auc`] with the percentile interval over resampled studies of both sides.

    Args:
        members (`Sequence[float]`), member_studies (`Sequence[str]`):
            Scores of the forget rows, and the study of each.
        others (`Sequence[float]`), other_studies (`Sequence[str]`):
            The same of rows that no model was trained on. A study of the same name is another one.
        draws (`int`), seed (`int`), confidence (`float`), *optional*:
            As in [`~unlearn.measures.intervals.bootstrap_mean`], which also leaves out values that are missing.
    """
    own, of_own, own_missing = present(members, member_studies)
    rest, of_rest, rest_missing = present(others, other_studies)
    names, codes = np.unique(of_own, return_inverse=True)
    other_names, other_codes = np.unique(of_rest, return_inverse=True)
    n, studies, missing = len(own) + len(rest), len(names) + len(other_names), own_missing + rest_missing
    if not len(own) or not len(rest):
        return Interval(math.nan, math.nan, math.nan, n, studies, missing)
    wins = _wins(own, codes, rest, other_codes)  # (S, T)
    times, other_times = study_draws(len(names), draws, seed), study_draws(len(other_names), draws, seed + 1)
    pairs = (times @ np.bincount(codes)) * (other_times @ np.bincount(other_codes))  # (draws,)
    resampled = ((times @ wins) * other_times).sum(1) / pairs
    low, high = percentiles(resampled, confidence, min(len(names), len(other_names)))
    return Interval(float(wins.sum() / len(own) / len(rest)), low, high, n, studies, missing)


def _wins(own: np.ndarray, codes: np.ndarray, rest: np.ndarray, other_codes: np.ndarray) -> np.ndarray:
    """Pairs in which the row of study s has the higher score than that of study t, ties half, of shape `(S, T)`."""
    order = np.argsort(other_codes, kind="stable")
    rest, starts = rest[order], np.searchsorted(other_codes[order], np.arange(other_codes.max() + 1))
    wins = np.zeros((codes.max() + 1, len(starts)))
    at_a_time = max(1, PAIRS_AT_A_TIME // len(rest))
    for start in range(0, len(own), at_a_time):
        scores = own[start : start + at_a_time, None]
        won = (scores > rest) + 0.5 * (scores == rest)  # (rows, others)
        np.add.at(wins, codes[start : start + at_a_time], np.add.reduceat(won, starts, axis=1))
    return wins


def privacy_leak(auc: float, auc_retrained: float) -> float:
    r"""
    Membership AUC relative to that of the retrained model (PrivLeak of MUSE, https://arxiv.org/abs/2407.06460;
    open-unlearning, `privleak`):

    $$\frac{(1 - A) - (1 - A_r)}{1 - A_r} \cdot 100$$

    Args:
        auc (`float`):
            $A$, [`auc`] of the unlearned model.
        auc_retrained (`float`):
            $A_r$, that of the retrained model.

    Returns:
        `float`: Per cent; 0 as the retrained model, below 0 where members are still recognised, above 0 where they
        stand out by being less probable than what was never seen. NaN where $A_r$ is 1.
    """
    return ((1 - auc) - (1 - auc_retrained)) / (1 - auc_retrained) * 100 if auc_retrained != 1 else math.nan
