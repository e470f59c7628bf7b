"""The honest reading: what the numbers say, in sentences made from them by rule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness_tasks.generate import CONTEXTS

from ..methods import METHODS
from . import paper
from .comparisons import NOT_ASKED, NOT_SHOWN, UNINFORMATIVE, why_uninformative
from .evaluations import ATTACK
from .records import Record, Records, mean
from .run_folder import RunFolder


TITLES = {"vanilla": "Vanilla", "retrained": "Retrained"} | {name: method.title for name, method in METHODS.items()}
VERDICTS = {
    "near": "✔ as retrained",
    "over": "◐ over-forgets",
    "left": "◐ still above",
    "apart": "◐ separates",
    "not": "✖ does not separate",
}
"""
What is said of a model and a kind of question. It separates if the 95 % interval of retain minus forget lies above 0;
it is told apart from retrained if that of its gap on the forget rows leaves 0 out.
"""


@dataclass(frozen=True)
class Metrics:
    """
    The metric that stands for each kind of question.

    Attributes:
        generation (`str`):
            `"gen_score"`, or `"rouge_l"` where nothing was judged.
    """

    generation: str

    def items(self) -> Iterable[tuple[str, str]]:
        """Kinds of questions and their metrics, in the order of tables."""
        names = ("classification", "acc"), ("cloze", "exact_match"), ("identity", "exact_match")
        return ("generation", self.generation), *names

    def of(self, kind: str) -> str:
        """The metric of a kind of question."""
        return dict(self.items())[kind]


def choose_metrics(records: Records) -> Metrics:
    """Gen Score where there is one."""
    judged = any(record.metric == "gen_score" for record in records.of("score"))
    return Metrics("gen_score" if judged else "rouge_l")


def verdict(records: Records, method: str, level: str, kind: str, metric: str) -> str | None:
    """A key of `VERDICTS`; nothing where there is no interval."""
    selectivity = records.find("selectivity", method, level, "", kind, metric)
    if selectivity is None or selectivity.low is None:
        return None
    if selectivity.low <= 0:
        return "not"
    gap = records.find("gap", method, level, "forget", kind, metric)
    if gap is None or gap.low is None or gap.high is None:
        return "apart"
    if gap.low <= 0 <= gap.high:
        return "near"
    return "over" if gap.high < 0 else "left"


def read(run: RunFolder, records: Records, metrics: Metrics) -> list[str]:
    """Sentences on which methods separate, how far they are from retraining, and what the attack recovers."""
    verdicts = {
        (method, level, kind): verdict(records, method, level, kind, metric)
        for method in run.methods
        for level in run.levels
        for kind, metric in metrics.items()
    }
    known = {key: value for key, value in verdicts.items() if value is not None}
    if not known:
        return [
            "There are no answers of single rows in this run's evaluations, so nothing can be said with intervals."
        ]
    return [
        *_separation(known, run.levels),
        *_arrival(known, records, metrics),
        *_distance(run, records, metrics),
        *_kept(run, records, metrics),
        *_attack(run, records, metrics),
        *_paper_selectivity(),
        "Intervals are over studies of one run with one seed: another seed of training can move a number by more. "
        "No score here is a guarantee of privacy.",
    ]


def _separation(known: dict[tuple[str, str, str], str], levels: Sequence[str]) -> list[str]:
    of_model: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (method, level, _), value in known.items():
        of_model[method, level].append(value)
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for model, values in of_model.items():
        separate = sum(value != "not" for value in values)
        groups["all" if separate == len(values) else "some" if separate else "none"].append(model)
    said = {
        "all": "separate in every kind of question (forget below retain beyond chance)",
        "some": "separate in some kinds of questions and not in others",
        "none": "separate in none: what was kept and what was to be forgotten score alike",
    }
    parts = [
        f"{len(groups[key])} {words} ({_names(groups[key], levels)})" for key, words in said.items() if groups[key]
    ]
    return [f"Of {_count(len(of_model), 'unlearned model')}, " + "; ".join(parts) + "."]


def _arrival(known: dict[tuple[str, str, str], str], records: Records, metrics: Metrics) -> list[str]:
    separated = {key: value for key, value in known.items() if value in ("near", "over", "left")}
    if not separated:
        return []
    count = {value: sum(v == value for v in separated.values()) for value in ("near", "over", "left")}
    lines = [
        f"Of the {_count(len(separated), 'pair')} of a model and a kind of question that separate, {count['near']} "
        "are on the forget rows not told apart from the model retrained without them, where a method should arrive; "
        f"{count['over']} score below it, which is over-forgetting and itself a trace; {count['left']} still score "
        "above it."
    ]
    gaps = [(key, _gap(records, metrics, *key)) for key in known if known[key] != "near"]
    for sign, words in ((-1, "below"), (1, "above")):
        of_sign = [(key, gap) for key, gap in gaps if gap is not None and sign * gap.value > 0]
        if of_sign:
            (method, level, kind), gap = max(of_sign, key=lambda pair: abs(pair[1].value))
            lines.append(
                f"Furthest {words} retraining on forget rows: {TITLES[method]} at {level} level in "
                f"{kind}, by {_points(abs(gap.value))} {_interval(gap, sign)}."
            )
    return lines


def _gap(records: Records, metrics: Metrics, method: str, level: str, kind: str) -> Record | None:
    return records.find("gap", method, level, "forget", kind, metrics.of(kind))


def _distance(run: RunFolder, records: Records, metrics: Metrics) -> list[str]:
    distances = {}
    for method in run.methods:
        for level in run.levels:
            gaps = [_gap(records, metrics, method, level, kind) for kind, _ in metrics.items()]
            distance = mean(abs(gap.value) for gap in gaps if gap is not None)
            if math.isfinite(distance):
                distances[method, level] = distance
    if not distances:
        return ["No retrained model was evaluated: how far the methods are from retraining is not known."]
    near, far = min(distances, key=distances.__getitem__), max(distances, key=distances.__getitem__)
    if len(distances) == 1:
        return [f"Mean distance from retraining over kinds of questions: {_points(distances[near])}."]
    return [
        "Mean distance from retraining on forget rows, over kinds of questions: least with "
        f"{_name(near)} ({_points(distances[near])}), most with {_name(far)} ({_points(distances[far])})."
    ]


def _kept(run: RunFolder, records: Records, metrics: Metrics) -> list[str]:
    lost = []
    for method in run.methods:
        for level in run.levels:
            for kind, metric in metrics.items():
                gap = records.find("gap", method, level, "retain", kind, metric)
                if gap is not None:
                    lost.append((gap, kind))
    if not lost:
        return []
    worst, kind = min(lost, key=lambda pair: pair[0].value)
    if worst.value >= 0:
        return ["On retained rows no method scores below the retrained model."]
    return [
        f"The most collateral damage on retained rows: {_name((worst.method, worst.level))} in {kind}, "
        f"{_points(-worst.value)} below the retrained model {_interval(worst, -1)}."
    ]


def _attack(run: RunFolder, records: Records, metrics: Metrics) -> list[str]:
    metric = metrics.generation
    asked = [
        (level, context)
        for level in run.levels
        for context in CONTEXTS
        if any(records.find("score", method, level, ATTACK, context, metric) for method in run.methods)
    ]
    if not asked:
        return ["The reconstruction attack was not run."]
    reasons = {pair: why_uninformative(records, *pair, metric) for pair in asked}
    useful = [pair for pair in asked if not reasons[pair]]
    lines = []
    for why, words in (
        (UNINFORMATIVE, "The attack is uninformative where the vanilla model itself scores under 50 %"),
        (NOT_ASKED, f"In the attack {NOT_ASKED}"),
        (NOT_SHOWN, f"In the attack {NOT_SHOWN}"),
    ):
        of_reason = [
            f"{level} level with {_context(context)}" for (level, context) in asked if reasons[level, context] == why
        ]
        if of_reason:
            lines.append(f"{words}: {', '.join(of_reason)}.")
    identified = [(level, context) for level, context in useful if context != "none"]
    leaks = [
        leak
        for level, context in identified
        for method in run.methods
        if (leak := records.find("leak", method, level, ATTACK, context, metric)) is not None
    ]
    if not leaks:
        return [*lines, "No form of the attack with identifiers can be read against a retrained model."]
    most = max(leaks, key=lambda leak: leak.value)
    above = sum(leak.low is not None and leak.low > 0 for leak in leaks)
    recovered = records.find("score", most.method, most.level, ATTACK, most.task, "exact_match")
    exact = "" if recovered is None else f"; {_percent(recovered.value)} of its answers are recovered word for word"
    lines.append(
        f"With identifiers in the prompt {above} of {len(leaks)} readings of unlearned models lie above the retrained "
        f"model beyond chance. The highest is {_name((most.method, most.level))} with {_context(most.task)}: "
        f"{_points(abs(most.value))} {'above' if most.value >= 0 else 'below'} it {_interval(most)}{exact}."
    )
    return lines


def _context(context: str) -> str:
    return {
        "none": "no identifier",
        "study": "the study's",
        "patient": "the study's and the patient's",
        "institution": "the study's, the patient's and the institution's",
    }[context] + (" identifier" if context == "study" else " identifiers" if context != "none" else "")


def _paper_selectivity() -> list[str]:
    """The same question put to the paper's own Table 3."""
    cells = paper.printed(3)
    ranges = []
    for title, task, metric in (
        ("Gen", "generation", "gen_score"),
        ("Class", "classification", "acc"),
        ("Cloze", "cloze", "exact_match"),
    ):
        differences = [
            100 * (cells[method, level, "retain", kind, name].value - printed.value)
            for (method, level, split, kind, name), printed in cells.items()
            if split == "forget" and (kind, name) == (task, metric) and method != "vanilla"
        ]
        ranges.append(f"{min(differences):+.2f} to {max(differences):+.2f} in {title}")
    return [
        f"For comparison, retain minus forget of the {len(differences)} models in the paper's Table 3, in points: "
        f"{', '.join(ranges)}."
    ]


def _names(models: Sequence[tuple[str, str]], levels: Sequence[str]) -> str:
    of_method: dict[str, list[str]] = defaultdict(list)
    for method, level in models:
        of_method[method].append(level)
    return "; ".join(
        f"{TITLES[method]}" + (" at every level" if len(own) == len(levels) > 1 else f" at {_listed(own)} level")
        for method, own in of_method.items()
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _name(model: tuple[str, str]) -> str:
    return f"{TITLES[model[0]]} at {model[1]} level"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(record: Record, sign: int = 1) -> str:
    if record.low is None or record.high is None:
        return "(no interval)"
    low, high = sorted((sign * record.low, sign * record.high))
    return f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
