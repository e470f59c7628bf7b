"""Gen Score of generated report sections, for `evaluate.load("harness_tasks/gen_score")`, offline too."""

import datasets
import evaluate

from harness_tasks import judges, scores


_DESCRIPTION = """\
Gen Score of MedForget (arXiv 2512.09867, section 4.1), the mean over rows of 0.75 factuality + 0.25 ROUGE-L, all
between 0 and 1. Factuality is a judge's mark from 1 to 10, divided by 10.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): What a model wrote.
    references (list of str): What the reports say.
    questions (list of str, optional): What was asked; a language model as the judge reads it.
    judge (str, optional): "lexical" (the default), a proxy that compares findings, or "llm".
    restricted (bool, optional): Whether the texts stand under a data use agreement, and must not go to an endpoint
        that is not this machine. True unless you state otherwise.
    judge_endpoint, judge_model, judge_max_requests, judge_complies, judge_cache, judge_concurrency (optional): Of the
        judge "llm"; see docs/gen-score.md.
Returns:
    gen_score, factuality (over the rows with a mark; None if there are none), rouge_l, judge (its name), judge_failed
    (rows without a mark).
Example:
    >>> metric = evaluate.load("harness_tasks/gen_score")
    >>> metric.compute(predictions=["Left effusion."], references=["Left effusion."])["gen_score"]
    1.0
"""
_CITATION = """\
@article{medforget2025,
  title  = {MedForget: Hierarchy-Aware Multimodal Unlearning Testbed for Medical AI},
  author = {Fengli Wu and Vaidehi Patil and Jaehong Yoon and Yue Zhang and Mohit Bansal},
  eprint = {2512.09867},
  archivePrefix = {arXiv},
  year   = {2025}
}
"""
_TEXT = datasets.Value("string")


class GenScore(evaluate.Metric):
    """Gen Score with the judge of your choice."""

    def _info(self):
        texts = {"predictions": _TEXT, "references": _TEXT}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[datasets.Features(texts), datasets.Features(texts | {"questions": _TEXT})],
        )

    def _compute(self, predictions, references, questions=None, restricted=True, **settings):
        chosen = judges.JudgeSettings.from_metadata(settings)
        rows = []
        for question, reference, answer in zip(
            questions or [""] * len(references), references, predictions, strict=True
        ):
            rows.append(
                judges.Awaited(
                    chosen,
                    judges.Answered(question, reference, answer, restricted),
                    scores.rouge_l(reference, answer),
                )
            )
        judges.settle(rows)
        marked = [row for row in rows if row["gen_score"] is not None]
        return {
            "gen_score": _mean([row["gen_score"] for row in marked]),
            "factuality": _mean([row["factuality"] for row in marked]),
            "rouge_l": _mean([row.rouge_l for row in rows]),
            "judge": chosen.name,
            "judge_failed": len(rows) - len(marked),
        }


def _mean(values):
    return sum(values) / len(values) if values else None
