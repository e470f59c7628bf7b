"""The tables of a checkpoint's card, made by the report's own functions from the report's own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness_tasks.generate import CONTEXTS

from .card_numbers import METRIC_NAMES, RunNumbers, Score
from .report.comparisons import why_uninformative
from .report.evaluations import ATTACK
from .report.reading import VERDICTS, verdict
from .report.records import Record
from .report.tables import Cell, Notes, Table, as_markdown, head, score_cell


_TITLES = {"retrained": "Retrained", "vanilla": "Vanilla, taught everything"}
_IDENTIFIERS = {
    "none": "none",
    "study": "the study's",
    "patient": "the study's and the patient's",
    "institution": "the study's, the patient's and the institution's",
}
_SCORES_TEXT = (
    "On forget and rephrase rows a good method scores as the retrained model does, which never saw them; on retain "
    "and general-med rows as high as before. A gap above 0 on forget rows: something is still recalled; below: "
    "over-forgetting, itself a trace. A negative gap on retain rows is collateral damage."
)
_SELECTIVITY_TEXT = "An interval above 0: more was removed from what was to be forgotten than from the rest."
_VERDICTS_TEXT = (
    " ✔: and the forget score is not told apart from the retrained model's. ◐: it is above or below. ✖: the interval "
    "is not above 0."
)
_ATTACK_TEXT = (
    "An attacker who knows to which study, patient and institution an image belongs puts that into the question and "
    "asks for a forgotten section. What exceeds the retrained model, which never saw it, was hidden and not "
    "forgotten. A form of prompt on which the model that knows everything scores under 50 % is uninformative."
)


@dataclass(frozen=True)
class CardTable:
    """A table of the card: its title, how to read it, and itself as Markdown."""

    title: str
    text: str
    markdown: str


def lead(numbers: RunNumbers) -> str:
    """What all tables have in common."""
    names = [
        "the lexical judge (agreement of clinical findings, a proxy)" if j == "lexical" else j for j in numbers.judges
    ]
    judged = (
        f"Gen Score: judged by {', '.join(sorted(names))}" if names else "Nothing was judged: ROUGE-L for generation"
    )
    return (
        f"From `medforget run --preset {numbers.report['run'].get('preset')}`. Per cent; small: 95 % intervals over "
        f"resampled studies, since rows about one image are not independent; n: rows asked. {judged}. Accuracy: the "
        "most probable option. Exact match: the whole string."
    )


def card_tables(numbers: RunNumbers) -> list[CardTable]:
    """Scores, and of all but the model that knows everything selectivity and attack."""
    tables = [_scores(numbers)]
    if numbers.method != "vanilla":
        tables += [table for table in (_selectivity(numbers), _attack(numbers)) if table is not None]
    return tables


def _scores(numbers: RunNumbers) -> CardTable:
    notes, rows, method, find = Notes(), [], numbers.method, numbers.records.find
    others = [name for name in _TITLES if name != method != "vanilla" and numbers.has(name)]
    is_compared = "retrained" in others
    for score in numbers.scores:
        cells = [head(_questions(numbers, score)), head(f"{score.kind} ({METRIC_NAMES[score.metric]})")]
        cells += [_count(score.record), score_cell(score.record, "", notes)]
        if is_compared:
            is_general = score.split == "general_med"
            why = "no gap for questions that know no hospital" if is_general else "not computed"
            cells.append(score_cell(find("gap", method, *score.about), why, notes, sign=True))
        cells += [score_cell(find("score", other, *score.about), "not asked", notes) for other in others]
        rows.append(cells)
    gap = ["Gap to retrained, points"] if is_compared else []
    columns = ["Questions", "Task", "n", "This model", *gap, *(_TITLES[other] for other in others)]
    return _table("Scores", _SCORES_TEXT if is_compared else "", columns, rows, notes)


def _questions(numbers: RunNumbers, score: Score) -> str:
    if score.split == "general_med":
        return "general-med"
    return score.split if len(numbers.levels) < 2 else f"{score.split}, {score.level}"


def _count(record: Record | None) -> Cell:
    return Cell(str(record.n), number=record.n) if record else Cell("–")


def _table(title: str, text: str, columns: list[str], rows: list[list[Cell]], notes: Notes) -> CardTable:
    return CardTable(title, text, as_markdown(Table(title, "", columns, rows, notes=notes, shows_intervals=True)))


def _selectivity(numbers: RunNumbers) -> CardTable | None:
    notes, rows, method, records = Notes(), [], numbers.method, numbers.records
    is_unlearned = method != "retrained"
    for kind, metric in numbers.metrics.items():
        about = (numbers.level, "", kind, metric)
        record = records.find("selectivity", method, *about)
        if record is None:
            continue
        cells = [head(kind), score_cell(record, "", notes, sign=True)]
        if is_unlearned:
            said = verdict(records, method, numbers.level, kind, metric)
            other = records.find("selectivity", "retrained", *about)
            cells += [score_cell(other, "not asked", notes, sign=True), Cell(VERDICTS[said] if said else "–")]
        rows.append(cells)
    if not rows:
        return None
    columns = ["Task", "Retain minus forget, points", *(["Retrained", "Reading"] if is_unlearned else [])]
    text = _SELECTIVITY_TEXT + (_VERDICTS_TEXT if is_unlearned else "")
    return _table("Selectivity", text, columns, rows, notes)


def _attack(numbers: RunNumbers) -> CardTable | None:
    if not numbers.is_attacked:
        return None
    notes, rows, method, find = Notes(), [], numbers.method, numbers.records.find
    metric = numbers.metrics.generation
    for context in CONTEXTS:
        about = (method, numbers.level, ATTACK, context)
        record, exact, leak = (
            find("score", *about, metric),
            find("score", *about, "exact_match"),
            find("leak", *about, metric),
        )
        cells = [head(_IDENTIFIERS[context]), _count(record)]
        cells += [score_cell(record, "not asked", notes), score_cell(exact, "not asked", notes)]
        if method != "retrained":
            cells.append(score_cell(leak, "no retrained model was asked", notes, sign=True))
        rows.append([*cells, Cell(_attack_reading(numbers, context, leak))])
    beyond = [] if method == "retrained" else ["Beyond retrained, points"]
    columns = ["Identifiers in the prompt", "n", METRIC_NAMES[metric], "Word for word", *beyond, "Reading"]
    return _table("Reconstruction attack", _ATTACK_TEXT, columns, rows, notes)


def _attack_reading(numbers: RunNumbers, context: str, leak: Record | None) -> str:
    if why := why_uninformative(numbers.records, numbers.level, context, numbers.metrics.generation):
        return why.partition(":")[0]
    if numbers.method == "retrained":
        return "informative"
    if leak is None or leak.low is None or leak.high is None:
        return "informative, but not compared"
    return "beyond retrained" if leak.low > 0 else "below retrained" if leak.high < 0 else "as retrained"


def more_measures(numbers: RunNumbers) -> Iterator[str]:
    """Probes and relearning, a line each, where they were measured of a model that is about one level."""
    if numbers.method == "vanilla" or not numbers.level:
        return
    of_level, find = (numbers.level, "forget"), numbers.records.find
    for measure, metric, task, words in (
        ("probe", "answer_probability", "all", "Mean probability of the right answers' tokens on forget rows"),
        ("membership", "membership_auc", "generation", "Forgotten sections told from unseen ones (membership AUC)"),
    ):
        about = (*of_level, task, metric, "finetune")
        own, other = (find(measure, method, *about) for method in (numbers.method, "retrained"))
        quality = find("forget_quality", numbers.method, *of_level, "all", "ks_p_value", "finetune")
        if own is not None:
            compared = f"; retrained {_percent(other)}" if other and numbers.method != "retrained" else ""
            if quality and measure == "probe":
                compared += (
                    f"; Kolmogorov-Smirnov test against it p = {quality.value:.1g} "
                    "(a small p: told apart from the retrained model)"
                )
            yield f"{words}: {_percent(own)}, n = {own.n}{compared}."
    for taught in ("some", "all"):
        before, after = (
            find("relearning", numbers.method, numbers.level, "", "", f"forget_exact_{when}", taught)
            for when in ("before", "after")
        )
        if before and after:
            images = f"{before.examples or 'a few'}" if taught == "some" else "all"
            yield (
                f"Relearning: taught the forgotten rows of {images} images again, it answers {_percent(after)} of all "
                f"{before.n} forgotten rows exactly; {_percent(before)} before."
            )


def _percent(record: Record) -> str:
    if record.low is None or record.high is None:
        return f"{100 * record.value:.1f} %"
    return f"{100 * record.value:.1f} % ({100 * record.low:.1f} to {100 * record.high:.1f})"
