"""Tables that the paper does not have: selectivity, distance from retraining, the attack, probes, controls, stages."""

from __future__ import annotations

from itertools import groupby

from harness_tasks.generate import CONTEXTS

from .comparisons import why_uninformative
from .evaluations import ATTACK
from .paper_tables import METRIC_TITLES, model_rows, why_no_score
from .probes import PROBES
from .reading import TITLES, VERDICTS, Metrics, verdict
from .records import Records
from .run_folder import CONTROLS, Model, RunFolder
from .tables import Cell, Notes, Table, head, score_cell


TONES = {"near": "good", "over": "unsure", "left": "unsure", "apart": "", "not": "bad"}
NO_ROWS = "no interval: the answers of single rows are not there"


def _kind_title(kind: str, metric: str) -> str:
    return "Identity" if kind == "identity" else METRIC_TITLES[metric]


def _why(run: RunFolder, records: Records, model: Model, kind: str, metric: str, split: str) -> str:
    if model.level == "section" and kind == "identity" and split != "retain":
        return "forgetting sections forgets no identity"
    retrained = run.model("retrained", model.level)
    asked = (model,) if split == "retain" else (model, retrained)
    missing = [m for m in asked if records.find("score", m.method, m.level, split, kind, metric) is None]
    return why_no_score(run, records, missing[0], (split, kind, metric)) if missing else ""


def selectivity_table(run: RunFolder, records: Records, metrics: Metrics) -> Table:
    """Retain minus forget for every model and kind of question."""
    notes, rows = Notes(), []
    for model in model_rows(run):
        cells = [head(TITLES[model.method]), head(model.level)]
        for kind, metric in metrics.items():
            record = records.find("selectivity", model.method, model.level, "", kind, metric)
            own = Model(model.name, model.method, model.level)
            why = "" if record else _why(run, records, own, kind, metric, "forget")
            cells.append(score_cell(record, why or run.why_missing(model.name), notes, sign=True))
        rows.append(cells)
    caption = (
        "Selectivity: retain minus forget, in points, with 95 % intervals from 1,000 resamplings of whole studies "
        "(rows about one image are not independent). An interval above 0 says that a method removed more from what "
        "it had to forget than from the rest. Retrained shows what is possible, Vanilla what is there before."
    )
    titles = [_kind_title(kind, metric) for kind, metric in metrics.items()]
    return Table("selectivity", caption, ["Method", "Level", *titles], rows, notes=notes, shows_intervals=True)


def gap_table(run: RunFolder, records: Records, metrics: Metrics) -> Table:
    """Distance from the retrained model on forget and retain rows, and the test of forget quality."""
    notes, rows = Notes(), []
    quality = bool(records.of("forget_quality"))
    columns = [(split, kind, metric) for split in ("forget", "retain") for kind, metric in metrics.items()]
    for model in model_rows(run):
        if model.method == "retrained":
            continue
        cells = [head(TITLES[model.method]), head(model.level)]
        for split, kind, metric in columns:
            record = records.find("gap", model.method, model.level, split, kind, metric)
            why = "" if record else _why(run, records, model, kind, metric, split)
            why = why or run.why_missing(run.model("retrained", model.level).name)
            cells.append(score_cell(record, why, notes, sign=True))
        if quality:
            for kind, metric in metrics.items():
                why = _why(run, records, model, kind, metric, "forget")
                cells.append(_p_value(records, model, kind, why, notes))
        rows.append(cells)
    titles = [_kind_title(kind, metric) for _, kind, metric in columns]
    count = len(titles) // 2
    groups = [("", 2), ("Forget minus Retrained", count), ("Retain minus Retrained", count)]
    caption = (
        "Gap to the model retrained without the forgotten rows, in points on the same rows, with 95 % intervals "
        "over studies. On forget rows 0 is the goal: above it something is still recalled, below it the model "
        "over-forgets. On retain rows a negative gap is collateral damage."
    )
    if quality:
        groups, titles = [*groups, ("KS p", count)], [*titles, *(kind.capitalize() for kind, _ in metrics.items())]
        caption += (
            " KS p: Kolmogorov-Smirnov test of the forget rows' answer probabilities against the retrained model's "
            "(TOFU's forget quality, here on answer probability and by kind of question, since kinds differ more than "
            "models do); small means different. It takes rows for independent."
        )
    return Table("gap", caption, ["Method", "Level", *titles], rows, groups, notes, shows_intervals=True)


def _p_value(records: Records, model: Model, kind: str, why: str, notes: Notes) -> Cell:
    about = ("forget_quality", model.method, model.level, "forget", kind, "ks_p_value", "finetune")
    record, why = records.find(*about), records.hole(*about) or why
    if record is None:
        return Cell("–", marks=notes.mark(why or "this checkpoint or the retrained one was not probed"))
    text = f"{record.value:.2f}" if record.value >= 0.01 else f"{record.value:.0e}" if record.value else "0"
    return Cell(text.replace("-", "−"), number=record.value, record=record.id)


def verdict_table(run: RunFolder, records: Records, metrics: Metrics) -> Table:
    """What is said of each model and kind of question, by rule."""
    rows, notes = [], Notes()
    for method in run.methods:
        for level in run.levels:
            cells = [head(TITLES[method]), head(level)]
            for kind, metric in metrics.items():
                said = verdict(records, method, level, kind, metric)
                if said is None:
                    model = run.model(method, level)
                    why = _why(run, records, model, kind, metric, "forget") or NO_ROWS
                    cells.append(Cell("–", marks=notes.mark(why)))
                else:
                    cells.append(Cell(VERDICTS[said], tone=TONES[said]))
            rows.append(cells)
    caption = (
        "The reading of every model, by rule. ✖: the 95 % interval of retain minus forget does not lie above 0, so "
        "it does not separate. ◐ over-forgets, still above: it separates, and on forget rows the interval of its "
        "gap to Retrained lies below or above 0. ✔: it separates and is not told apart from Retrained; with few "
        "rows that says little."
    )
    titles = [_kind_title(kind, metric) for kind, metric in metrics.items()]
    return Table("reading", caption, ["Method", "Level", *titles], rows, notes=notes)


def attack_table(run: RunFolder, records: Records, metrics: Metrics, judge: str) -> Table:
    """The attack's scores, exact recovery and leak relative to the retrained model."""
    metric, notes, rows = metrics.generation, Notes(), []
    for model in model_rows(run):
        cells = [head(TITLES[model.method]), head(model.level)]
        for measure, name in (("score", metric), ("score", "exact_match"), ("leak", metric)):
            for context in CONTEXTS:
                record = records.find(measure, model.method, model.level, ATTACK, context, name)
                if measure == "leak" and model.method == "retrained":
                    cells.append(Cell("0"))
                    continue
                missing = "" if record else why_no_score(run, records, model, (ATTACK, context, name))
                cell = score_cell(record, missing, notes, sign=measure == "leak")
                greyed = why_uninformative(records, model.level, context, metric)
                if record and greyed:
                    cell = Cell(**{**vars(cell), "marks": cell.marks + notes.mark(greyed), "tone": "unsure"})
                cells.append(cell)
        rows.append(cells)
    titles = [*("none", "+ study", "+ patient", "+ institution")] * 3
    generation = METRIC_TITLES[metric]
    caption = (
        f"The reconstruction attack (Figure 6 and Table 6 of the paper): forgotten sections asked for again with "
        f"identifiers before the question, each column adding one. {generation}"
        + (f" (judged by {judge})" if metric == "gen_score" else "")
        + " and exact recovery in per cent; leak: the same score minus that of the retrained model, in points, which "
        "never saw the rows and cannot leak them."
    )
    groups = [("", 2), (generation, 4), ("Exact recovery", 4), (f"Leak in {generation}", 4)]
    return Table("attack", caption, ["Method", "Level", *titles], rows, groups, notes)


PROBE_COLUMNS = (
    ("probe", "answer_probability", "finetune", "forget", "all", "Answer probability", "forget"),
    ("probe", "answer_probability", "finetune", "retain", "all", "Answer probability", "retain"),
    ("probe", "extraction_strength", "finetune", "forget", "all", "Extraction strength", "forget"),
    ("probe", "extraction_strength", "finetune", "retain", "all", "Extraction strength", "retain"),
    ("probe", "exact_memorisation", "finetune", "forget", "all", "Exact memorisation", "forget"),
    ("probe", "exact_memorisation", "finetune", "retain", "all", "Exact memorisation", "retain"),
    ("membership", "membership_auc", "finetune", "forget", "generation", "Membership AUC", "generation"),
    ("membership", "membership_auc", "finetune", "forget", "cloze", "Membership AUC", "cloze"),
    ("probe", "exact", "finetune", "forget", "all", "Forget rows rephrased", "as taught"),
    ("probe", "exact", "rephrase_wording", "forget", "all", "Forget rows rephrased", "wording"),
    ("probe", "exact", "rephrase_view", "forget", "all", "Forget rows rephrased", "view"),
    ("probe", "exact", "rephrase_both", "forget", "all", "Forget rows rephrased", "both"),
    ("probe", "exact", "wrong_image", "retain", "all", "Retain rows, exact", "wrong image"),
    ("probe", "exact", "text_only", "retain", "all", "Retain rows, exact", "no image"),
)


def probe_table(run: RunFolder, records: Records) -> Table:
    """Measures on answer tokens, membership, and the rephrase score in its parts."""
    notes, rows = Notes(), []
    probed = {record.checkpoint for record in records.of("probe")}
    for model in model_rows(run):
        cells = [head(TITLES[model.method]), head(model.level)]
        is_probed = model.name in probed or (run.path / PROBES / f"{model.name}.parquet").is_file()
        why = "no such rows in the probe" if is_probed else run.why_missing(model.name, "probe")
        for measure, metric, name, split, task, _, _ in PROBE_COLUMNS:
            record = records.find(measure, model.method, model.level, split, task, metric, name)
            hole = records.hole(measure, model.method, model.level, split, task, metric, name)
            cells.append(score_cell(record, hole or why, notes))
        rows.append(cells)
    spans = [(title, len(list(columns))) for title, columns in groupby(column[5] for column in PROBE_COLUMNS)]
    caption = (
        "Teacher-forced measures on answer tokens, in per cent. Answer probability is the geometric mean over "
        "tokens; extraction strength the share of the answer that the model completes by itself; exact memorisation "
        "the share of tokens it would choose. Membership AUC (Min-k) tells forget rows from rows of patients nobody "
        "was trained on: as Retrained's, near 50, is the goal, and both ends are failures, 100 because members are "
        "recognised, 0 because they stand out as suppressed. Then shares of forget rows answered exactly: as taught, "
        "in other words, from another angle, and both; and of retain rows with another patient's image, and with "
        "none: what is answered there was not seen."
    )
    titles = [column[6] for column in PROBE_COLUMNS]
    return Table("probes", caption, ["Method", "Level", *titles], rows, [("", 2), *spans], notes)


def control_table(run: RunFolder, records: Records, metrics: Metrics) -> Table:
    """What the vanilla model answers about what it is shown instead of the image."""
    notes, rows = Notes(), []
    kinds = list(metrics.items())
    controls = {name: words for name, words in CONTROLS.items() if any(r.set == name for r in records.of("control"))}
    for level in run.levels:
        for name, words in ({"": "its own image"} | controls).items():
            cells = [head(level), head(words)]
            for split in ("forget", "retain"):
                for kind, metric in kinds:
                    measure = "control" if name else "score"
                    record = records.find(measure, "vanilla", level, split, kind, metric, name)
                    cells.append(score_cell(record, "not asked", notes))
            rows.append(cells)
    titles = [_kind_title(kind, metric) for kind, metric in kinds]
    caption = (
        f"Controls: the vanilla model asked every question and shown {' or '.join(controls.values())}, in per cent. "
        "What is answered there was not read from the image: for classification guessing gives 25, and generated text "
        "shares its phrases with other reports. What every model answers without an image, by teacher forcing, is in "
        "the table of probes under “Retain rows, exact / no image”."
    )
    groups = [("", 2), ("Forget", len(kinds)), ("Retain", len(kinds))]
    return Table("controls", caption, ["Level", "Shown", *titles * 2], rows, groups, notes)


def relearning_table(run: RunFolder, records: Records) -> Table:
    """How fast the forgotten rows are back."""
    notes, rows = Notes(), []
    for model, taught in [(model, taught) for model in run.models for taught in ("some", "all")]:
        of_model = [record for record in records.of("relearning") if record.checkpoint == model.name]
        found = {record.metric: record for record in of_model if record.set == taught}
        if not found:
            continue
        images = next(iter(found.values())).examples
        shown = Cell("–", marks=notes.mark("not recorded")) if images is None else Cell(str(images), number=images)
        cells = [head(TITLES[model.method]), head(model.level), shown]
        for metric, scale in (
            ("forget_exact_before", 100),
            ("forget_exact_after", 100),
            ("others_exact_most", 100),
            ("rows_to_recovery", 1),
            ("rows_per_minute", 1),
        ):
            never = {
                "rows_to_recovery": "not back at the end of the measurement",
                "others_exact_most": "all images were taught" if taught == "all" else "not measured",
            }.get(metric, "not measured")
            hole = records.hole("relearning", model.method, model.level, "", "", metric, taught)
            cells.append(score_cell(found.get(metric), hole or never, notes, scale=scale))
        rows.append(cells)
    caption = (
        "Relearning: the forgotten rows of a few images, or of all, are taught again, and all of them are asked. A "
        "model that only hides what it knew gives it all back after few rows; the retrained model, taught the same, "
        "shows what those rows teach by themselves. Compare the rows until they are back: rows a minute are the "
        "throughput of training on a machine that other stages share, and say nothing of forgetting."
    )
    titles = [
        "Exact before, %",
        "At the end, %",
        "Most of untaught images, %",
        "Rows until 0.9 × vanilla's cloze are back",
        "Rows a minute",
    ]
    return Table("relearning", caption, ["Method", "Level", "Images taught", *titles], rows, notes=notes)


def stage_table(seconds: dict[str, float]) -> Table:
    """How long each stage took."""
    rows = [[head(name), Cell(f"{value:.0f}", number=value)] for name, value in seconds.items()]
    return Table("stages", "Seconds of each stage, in the order in which they ended.", ["Stage", "Seconds"], rows)
