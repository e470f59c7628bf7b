"""Scores of one answer, each between 0 and 1, higher is better.

lm-eval imports this file by its path, from wherever the folder was copied to, so it imports nothing of the project,
but for the judge: without the project generated sections are scored without one.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from rouge_score import rouge_scorer


def exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """
    Score a cloze or identity answer: `exact_match` after [`normalize`], and `exact_match_authors_code`.

    The authors' code (fengli-wu/MedForget, eval.py) calls an answer exact when its ROUGE-L is 1: equal in letters and
    digits, after stemming.
    """
    return _exact(doc["answer"], results[0], rouge_l(doc["answer"], results[0]))


def generated(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """
    Score a generated section: `rouge_l`, `exact_match` and `exact_match_authors_code`, and of the judge that the
    column `judge` names, `factuality` and `gen_score`.

    The last two are numbers, or wait for the aggregation, which asks about all rows at once (`judge_failed` counts
    the rows without a mark). `judge` is the judge's name, so that it stands beside its numbers.
    """
    reference, answer = doc["answer"], results[0]
    rouge = rouge_l(reference, answer)
    return {"rouge_l": rouge, **_exact(reference, answer, rouge), **_judged(doc, answer, rouge)}


def chosen(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a forced choice: `acc`, whether the most probable option letter is the answer."""
    return {"acc": float(results[0].strip() == doc["answer"])}


def chosen_text(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a choice that was written freely, as the authors' code does: `acc_authors_code`, whether ROUGE-L is 1."""
    return {"acc_authors_code": float(rouge_l(doc["answer"], results[0]) == 1.0)}


def rouge_l(reference: str, answer: str) -> float:
    """
    ROUGE-L as in the authors' code: the F1 of `rouge_score` with its stemmer.

    It looks at letters and digits only, and its stemmer makes "effusion" and "effusions" equal.
    """
    return _scorer().score(reference, answer)["rougeL"].fmeasure


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


def check_judge(rows: Any) -> Any:
    """
    Refuse a judge that cannot be asked about these rows, before a model is; the `process_docs` of generation tasks.

    Args:
        rows (`datasets.Dataset`): Rows with the columns `restricted` and `judge`, the judge's settings as JSON.

    Returns:
        `datasets.Dataset`: The same rows.

    Raises:
        ValueError: The judge is unknown, its settings are wrong, or it must not be asked about these rows.
    """
    settings = rows[:1]["judge"][0] if "judge" in rows.column_names else "{}"
    judges = _judges(settings)
    if judges:
        judges.get_judge(_settings(settings)).check(restricted=any(rows["restricted"][:]))
    return rows


def mean_factuality(items: Sequence[Any]) -> float | str:
    """Mean of the rows that have a mark; `"N/A"` if none has."""
    return _mean("factuality", items)


def mean_gen_score(items: Sequence[Any]) -> float | str:
    """Mean of the rows that have a mark; `"N/A"` if none has."""
    return _mean("gen_score", items)


def count_failed(items: Sequence[Any]) -> int:
    """Number of rows without a mark."""
    return len(items) - len(_values("factuality", items))


def only_name(items: Sequence[str]) -> str:
    """The judge's name, which all rows of a task share; lm-eval's table shows text as it is."""
    return ", ".join(sorted(set(items)))


def _exact(reference: str, answer: str, rouge: float) -> dict[str, float]:
    same = normalize(answer) == normalize(reference)
    return {"exact_match": float(same), "exact_match_authors_code": float(rouge == 1.0)}


def _judged(doc: dict[str, Any], answer: str, rouge: float) -> dict[str, Any]:
    judges = _judges(doc.get("judge", "{}"))
    if judges is None:
        return {"judge": "none: needs medforget installed"}
    settings = _settings(doc.get("judge", "{}"))
    answered = judges.Answered(doc["question"], doc["answer"], answer, doc.get("restricted", True))
    waiting = judges.Awaited(settings, answered, rouge)
    if settings.judge == "llm":
        return {"factuality": waiting, "gen_score": waiting, "judge_failed": waiting, "judge": settings.name}
    judges.settle([waiting])
    return {"factuality": waiting["factuality"], "gen_score": waiting["gen_score"], "judge": settings.name}


def _judges(settings: str) -> Any:
    """The judges of the project; `None` without it, unless one was asked for."""
    try:
        from harness_tasks import judges
    except ImportError as error:
        if settings != "{}":
            raise ValueError(f"judge settings {settings}: need the project: pip install medforget") from error
        return None
    return judges


@functools.cache
def _settings(settings: str) -> Any:
    return _judges(settings).JudgeSettings.from_metadata(json.loads(settings))


def _values(name: str, items: Sequence[Any]) -> list[float]:
    if not all(isinstance(item, float) for item in items):
        _judges("llm").settle(items)
    values = [item if isinstance(item, float) else item[name] for item in items]
    return [value for value in values if value is not None]


def _mean(name: str, items: Sequence[Any]) -> float | str:
    values = _values(name, items)
    return sum(values) / len(values) if values else "N/A"


@functools.cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
