"""Table 3 and Table 5 in the paper's layout, ours beside the paper's, and accuracy by both definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import paper
from .reading import TITLES, Metrics
from .records import Records
from .run_folder import Model, RunFolder
from .tables import Cell, Notes, Table, head, score_cell


SPLITS = {"forget": "Forget ↓", "retain": "Retain ↑", "rephrase": "Rephrase ↓", "general_med": "General Med ↑"}
METRIC_TITLES = {
    "gen_score": "Gen",
    "rouge_l": "ROUGE-L",
    "factuality": "Fact.",
    "acc": "Class",
    "exact_match": "Cloze",
}
# Split, kind of question and metric of a column.
Column = tuple[str, str, str]


def model_rows(run: RunFolder) -> list[Model]:
    """Rows of the paper's tables: the baselines, then method by method, each from the smallest level up."""
    models = [Model("vanilla", "vanilla", level) for level in run.levels]
    return models + [model for model in run.models if model.method != "vanilla"]


def why_no_score(run: RunFolder, records: Records, model: Model, column: Column) -> str:
    """The reason for a dash in a table of scores."""
    split, kind, metric = column
    hole = records.hole("score", model.method, model.level, split, kind, metric)
    if hole is not None:
        return hole
    if not _is_evaluated(records, model):
        return run.why_missing(model.name)
    if not any(record.metric == metric for record in records.of("score")):
        return f"no {metric} in this run's evaluations; `medforget run` scores them again"
    files = tuple(f"evaluation/{model.name}{end}" for end in (".json", "/"))
    at_fault = any(note.startswith(files) for note in run.notes)
    return f"no {metric} of this in evaluation/{model.name}.json" + (
        "; see what could not be used" if at_fault else ""
    )


def _is_evaluated(records: Records, model: Model) -> bool:
    return any(record.checkpoint == model.name for record in records.of("score"))


def table3(run: RunFolder, records: Records, metrics: Metrics, judge: str) -> Table:
    """The paper's Table 3, identity beside its three tasks."""
    columns = [
        (split, kind, metric)
        for split in SPLITS
        for kind, metric in metrics.items()
        if (split, kind) != ("general_med", "identity")
    ]
    titles = ["Identity" if kind == "identity" else METRIC_TITLES[metric] for _, kind, metric in columns]
    gen = "No judge was asked: ROUGE-L is shown for Gen, and the paper's ROUGE-L from its Table 5."
    if metrics.generation == "gen_score":
        gen = f"Gen is judged by {judge}; the paper's by DeepSeek-V3, so the two are not one scale."
    caption = (
        "Scores in per cent (Table 3 of the paper). Large: this run; small and grey: the paper, Lingshu-7B on "
        f"MIMIC-CXR, another model and other data. {gen} Class: the most probable option; Cloze and Identity: exact "
        "string. The paper has no Identity. ↓ lower is better, ↑ higher is better; Retrained never saw the "
        "forgotten rows and is where a method should arrive. Letters at the paper's numbers: where it contradicts "
        "itself."
    )

    def printed(model: Model, column: Column) -> paper.Printed | None:
        split, kind, metric = column
        # Where nothing is judged, what is comparable is the ROUGE-L of Table 5.
        return paper.find(5 if metric == "rouge_l" else 3, model.method, model.level, split, kind, metric)

    return _score_table(run, records, "table3", caption, columns, titles, printed)


def table5(run: RunFolder, records: Records, judge: str) -> Table:
    """The paper's Table 5."""
    columns = [(split, "generation", metric) for split in SPLITS for metric in ("rouge_l", "factuality", "gen_score")]
    caption = (
        "The parts of Gen in per cent (Table 5 of the paper): Gen = 0.75 × Fact. + 0.25 × ROUGE-L of each row. "
        f"Large: this run, judged by {judge}; small and grey: the paper, judged by DeepSeek-V3."
    )
    titles = [METRIC_TITLES[metric] for _, _, metric in columns]

    def printed(model: Model, column: Column) -> paper.Printed | None:
        return paper.find(5, model.method, model.level, *column)

    return _score_table(run, records, "table5", caption, columns, titles, printed)


def _score_table(
    run: RunFolder,
    records: Records,
    name: str,
    caption: str,
    columns: Sequence[Column],
    titles: list[str],
    printed: Callable[[Model, Column], paper.Printed | None],
) -> Table:
    notes, rows = Notes(), []
    for model in model_rows(run):
        cells = [head(TITLES[model.method]), head(model.level)]
        for column in columns:
            cells.append(_score(run, records, model, column, printed(model, column), notes))
        rows.append(cells)
    spans = [(title, sum(column[0] == split for column in columns)) for split, title in SPLITS.items()]
    return Table(name, caption, ["Method", "Level", *titles], rows, [("", 2), *spans], notes)


def _score(
    run: RunFolder, records: Records, model: Model, column: Column, printed: paper.Printed | None, notes: Notes
) -> Cell:
    split, kind, metric = column
    if model.level == "section" and kind == "identity" and split in ("forget", "rephrase"):
        return Cell("–", marks=notes.mark("forgetting sections forgets no identity"))
    record = records.find("score", model.method, model.level, split, kind, metric)
    why = "" if record else why_no_score(run, records, model, column)
    cell = score_cell(record, why, notes)
    if printed is None:
        return cell
    marks = notes.mark(f"the paper: {printed.note}") if printed.note else ""
    return Cell(**{**vars(cell), "paper": printed.text, "paper_marks": marks})


ACCURACIES = (
    ("generation", "exact_match", "exact_match_authors_code", "Gen"),
    ("classification", "acc", "acc_authors_code", "Class"),
    ("cloze", "exact_match", "exact_match_authors_code", "Cloze"),
    ("identity", "exact_match", "exact_match_authors_code", "Identity"),
)


def accuracy_table(run: RunFolder, records: Records) -> Table:
    """Accuracy as the paper defines it beside accuracy as the authors' code counts it, on forget and retain."""
    columns: list[Column] = []
    titles, spans = [], []
    for kind, ours, authors, title in ACCURACIES:
        text_kind = "classification_text" if kind == "classification" else kind
        for split in ("forget", "retain"):
            columns += [(split, kind, ours), (split, text_kind, authors)]
            titles += ["paper", "code"]
            spans.append((f"{title} {split}", 2))
    caption = (
        "Accuracy in per cent by two definitions. Paper: the most probable option, or the exact string but for "
        "case, white space and final punctuation. Code: the definition in the authors' published code, ROUGE-L of "
        "exactly 1 on freely generated text, which takes “effusion” and “Effusions” for the same and a letter with "
        "its option for another answer."
    )
    notes, rows = Notes(), []
    for model in model_rows(run):
        cells = [head(TITLES[model.method]), head(model.level)]
        cells += [_score(run, records, model, column, None, notes) for column in columns]
        rows.append(cells)
    return Table("accuracy", caption, ["Method", "Level", *titles], rows, [("", 2), *spans], notes)
