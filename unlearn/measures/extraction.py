"""How much of an answer comes out of a model: measures of one row, from its teacher-forced tokens.

An answer's tokens are those of its text and the token that ends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


Rows = Sequence[Sequence] | Sequence[np.ndarray] | np.ndarray


def answer_probability(log_prob: Sequence[float] | np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    r"""
    Probability of the answer, normalised for its length as TOFU does (https://arxiv.org/abs/2401.06121;
    open-unlearning, `probability`):

    $$P(a|q)^{1/|a|} = \exp\left(\tfrac{1}{|a|} \sum_i \log p(a_i | q, a_{<i})\right)$$

    Args:
        log_prob (`Sequence[float]` of length `R`, nats):
            Log-probability of each row's answer, summed over its tokens.
        tokens (`Sequence[int]` of length `R`):
            Number of these tokens.

    Returns:
        `np.ndarray` of shape `(R,)`: Between 0 and 1.
    """
    return np.exp(np.asarray(log_prob, dtype=float) / np.asarray(tokens, dtype=float))


def extraction_strength(greedy: Rows) -> np.ndarray:
    r"""
    Share of the answer that the model completes by itself (Carlini et al., https://arxiv.org/abs/2012.07805, as a
    strength in https://arxiv.org/abs/2406.09179 and open-unlearning):

    $$1 - \tfrac{1}{|a|} \min \{k : f(q, a_{<k}) = a_{\geq k}\}$$

    that is, the part of it after the last token that greedy decoding would get wrong. open-unlearning
    (`extraction_strength`) tries k below |a| only and so never gives less than 1/|a|; here an answer whose last token
    is wrong too has 0.

    Args:
        greedy (`Sequence[Sequence[bool]]` of length `R`):
            For each token of each row's answer, whether it is the most probable one after the right ones before it.

    Returns:
        `np.ndarray` of shape `(R,)`: Between 0 and 1; NaN for a row without tokens.
    """
    return np.array([_after_last_wrong(np.asarray(flags, dtype=bool)) for flags in greedy], dtype=float)


def _after_last_wrong(flags: np.ndarray) -> float:
    if not len(flags):
        return math.nan
    wrong = np.flatnonzero(~flags)
    return 1 - (wrong[-1] + 1) / len(flags) if len(wrong) else 1.0


def exact_memorisation(greedy: Rows) -> np.ndarray:
    """
    Share of the answer's tokens that are the most probable ones after the right ones before them (Tirumala et al.,
    https://arxiv.org/abs/2205.10770; open-unlearning, `exact_memorization`).

    Args:
        greedy (`Sequence[Sequence[bool]]` of length `R`):
            As in [`extraction_strength`].

    Returns:
        `np.ndarray` of shape `(R,)`: Between 0 and 1; NaN for a row without tokens.
    """
    return np.array([np.mean(flags) if len(flags) else math.nan for flags in greedy], dtype=float)


def min_k(token_log_probs: Rows, k: float = 0.4) -> np.ndarray:
    """
    Mean log-probability of the least probable tokens of an answer (Min-k% Prob, Shi et al.,
    https://arxiv.org/abs/2310.16789). What a model was trained on has few surprising tokens.

    open-unlearning (`MinKProbAttack`) takes as many tokens and turns the sign.

    Args:
        token_log_probs (`Sequence[Sequence[float]]` of length `R`, nats):
            Log-probability of each token of each row's answer.
        k (`float`, *optional*, defaults to `0.4`):
            Share of the tokens, rounded down, but at least one. open-unlearning,
            `configs/eval/tofu_metrics/mia_min_k.yaml`.

    Returns:
        `np.ndarray` of shape `(R,)`, nats: Larger for what is more likely a member; NaN for a row without tokens, or
        with a token that is NaN.
    """
    return np.array([_mean_of_lowest(np.asarray(row, dtype=float), k) for row in token_log_probs], dtype=float)


def _mean_of_lowest(row: np.ndarray, k: float) -> float:
    # Sorting puts NaN last, where it would not be among the lowest.
    if not len(row) or np.isnan(row).any():
        return math.nan
    return float(np.sort(row)[: max(1, int(len(row) * k))].mean())
