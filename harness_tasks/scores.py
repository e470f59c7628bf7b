"""Scores of one answer, each between 0 and 1, higher is better.

lm-eval imports this file by its path, from wherever the folder was copied to, so it imports nothing of the project.
"""

import functools
import re
import unicodedata
from typing import Any

from rouge_score import rouge_scorer


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a cloze or identity answer: `exact_match` after [`normalize`]."""
    return {"exact_match": float(normalize(results[0]) == normalize(doc["answer"]))}


def generated(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """
    Score a generated section: `rouge_l`, and `exact_match` after [`normalize`].

    ROUGE-L is the F1 of `rouge_score` with its stemmer, as in the authors' code (fengli-wu/MedForget, eval.py). It
    looks at letters and digits only, and its stemmer makes "effusion" and "effusions" equal.
    """
    rouge = _scorer().score(doc["answer"], results[0])["rougeL"].fmeasure
    return {"rouge_l": rouge, **exact(doc, results)}


def chosen(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a forced choice: `acc`, whether the most probable option letter is the answer."""
    return {"acc": float(results[0].strip() == doc["answer"])}


def normalize(text: str) -> str:
    """
    Remove what does not make an answer a different one: case, white space runs and ends, final punctuation, and the
    Unicode form (NFC). Different words stay different: no stemming, no punctuation inside, no articles removed.

    Example:
        >>> normalize("  Left  lower\\nlobe. ")
        'left lower lobe'
        >>> normalize("PA") == normalize("P.A.")
        False
    """
    text = " ".join(unicodedata.normalize("NFC", text.lower()).split())
    return re.sub(r"(?<=[^\s.,;:!?])[\s.,;:!?]+$", "", text)


@functools.cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
