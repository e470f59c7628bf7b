"""The report's sections, in order; a section without its inputs says in one line how to get them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from . import figures, measure_tables, paper_tables
from .comparisons import comparison_records
from .evaluations import ATTACK, Evaluations, main_judge, score_records
from .examples import FLAT_TITLE, choose_examples
from .figures import Picture
from .heat_maps import cascade_figure
from .probes import PROBES, Curve, probe_records, relearning_results, training_curves
from .reading import Metrics, choose_metrics, read
from .records import Record, Records
from .run_folder import RunFolder
from .tables import Table


@dataclass
class Section:
    """
    A part of the report.

    Attributes:
        anchor (`str`):
            Its name in links.
        title (`str`):
            Its title.
        lead (`list[str]`):
            What it is, for a person who has not read the paper.
        blocks (`list`):
            Tables and pictures, in order.
        points (`list[str]`):
            Sentences, a line each.
    """

    anchor: str
    title: str
    lead: list[str]
    blocks: list[Table | Picture] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    examples: list = field(default_factory=list)


class Report:
    """
    Everything that a report shows, computed from the folder of a run.

    Args:
        run ([`~unlearn.report.run_folder.RunFolder`]):
            The run.
    """

    def __init__(self, run: RunFolder):
        self.run, self.records = run, Records()
        evaluations = Evaluations(run)
        score_records(run, evaluations, self.records)
        comparison_records(run, evaluations, self.records)
        probe_records(run, self.records)
        self.curves: list[Curve] = [*relearning_results(run, self.records), *training_curves(run)]
        _section_shares(run, self.records)
        self.examples = choose_examples(run, evaluations)
        self.metrics: Metrics = choose_metrics(self.records)
        judge = main_judge(evaluations)
        self.judge = LEXICAL if judge == "lexical" else judge or "nobody"
        self.reading = read(run, self.records, self.metrics)

    @cached_property
    def sections(self) -> list[Section]:
        """The sections, in the order of the page."""
        return [
            self._reading(),
            self._table3(),
            self._table5(),
            self._accuracy(),
            self._selectivity(),
            self._by_level(),
            self._attack(),
            self._cascade(),
            *self._shares(),
            self._examples(),
            self._probes(),
            self._relearning(),
            self._training(),
            self._stages(),
        ]

    @property
    def _judged(self) -> str:
        if self.metrics.generation == "gen_score":
            return f"Gen is judged by {self.judge}; the paper's judge is DeepSeek-V3."
        return "Nothing was judged: ROUGE-L is shown for Gen."

    @property
    def _no_probe(self) -> str:
        """Why a measure of the probes is not there."""
        if not any((self.run.path / PROBES).glob("*.parquet")):
            return "No checkpoint of this run was probed; `medforget run --preset reproduce` does."
        if self.run.data is None:
            return "Checkpoints were probed, but the run's data cannot be read, which says what was to be forgotten."
        return "Checkpoints were probed, but not those that this needs, or not so that it can be used."

    def _reading(self) -> Section:
        table = measure_tables.verdict_table(self.run, self.records, self.metrics)
        lead = [
            "A model was taught everything (Vanilla) and then made to forget a part by each method, which is "
            "compared with a model that was never taught that part (Retrained).",
            "A good method forgets as much as Retrained does not know, and keeps the rest: the sentences below are "
            "made from the numbers by fixed rules, and nobody has edited them.",
        ]
        return Section("reading", "What the numbers say", lead, [table], self.reading)

    def _table3(self) -> Section:
        lead = [
            "Each row is a model, and each group of columns a set of questions: those to be forgotten, those to be "
            "kept, the forgotten ones in other words and from another angle, and medical questions about nobody in "
            "the data.",
            "Read a row from left to right: Forget should be as low as Retrained's, and all the rest as high.",
        ]
        table = paper_tables.table3(self.run, self.records, self.metrics, self.judge)
        picture = figures.scores_figure(self.run, self.records, self.metrics)
        return Section("table-3", "Scores of every method and level (Table 3)", lead, [table, picture])

    def _table5(self) -> Section:
        lead = [
            "Generated text has two scores: ROUGE-L, how many of its words stand in the reference in the same "
            "order, and factuality, whether it says the same about the patient.",
            "Gen is their weighted mean; who judged factuality decides its level, so scores of different judges are "
            "never put side by side as one scale.",
        ]
        if self.metrics.generation == "gen_score":
            table = paper_tables.table5(self.run, self.records, self.judge)
            return Section("table-5", "The parts of the Gen Score (Table 5)", lead, [table])
        absent = "These evaluations have no Gen Score: `medforget run` makes them again with a judge."
        return Section("table-5", "The parts of the Gen Score (Table 5)", lead, points=[absent])

    def _accuracy(self) -> Section:
        lead = [
            "The paper and the code that its authors published count a right answer differently.",
            "Both are here, so that a reader can compare with either.",
        ]
        table = paper_tables.accuracy_table(self.run, self.records)
        return Section("accuracy", "Both definitions of accuracy", lead, [table])

    def _selectivity(self) -> Section:
        lead = [
            "A model that has lost everything also has a low Forget score, so what matters is the difference to "
            "what should be kept, and to a model that never saw the forgotten rows.",
            "Intervals show how much a number depends on which studies happened to be asked.",
        ]
        blocks: list[Table | Picture] = [
            measure_tables.selectivity_table(self.run, self.records, self.metrics),
            measure_tables.gap_table(self.run, self.records, self.metrics),
            figures.forget_retain_figure(self.run, self.records, self.metrics),
        ]
        points = [] if self.records.of("forget_quality") else [f"There is no test of forget quality. {self._no_probe}"]
        return Section("selectivity", "Selectivity and distance from retraining", lead, blocks, points)

    def _by_level(self) -> Section:
        lead = [
            "To forget an institution takes more away than to forget a section of a report.",
            "Each panel follows the methods from the smallest to the largest thing forgotten.",
        ]
        if len(self.run.levels) < 2:
            one = "This run unlearned one level; `medforget run --preset reproduce` does all four."
            return Section("levels", "Trade-off by level (Figure 5)", lead, points=[one])
        picture = figures.levels_figure(self.run, self.records, self.metrics, self._judged)
        return Section("levels", "Trade-off by level (Figure 5)", lead, [picture])

    def _attack(self) -> Section:
        lead = [
            "An attacker who knows to which study, patient and institution an image belongs puts that into the "
            "question.",
            "If the model then gives the forgotten text, it was hidden and not gone.",
        ]
        title = "Reconstruction attack (Figure 6)"
        if not any(record.split == ATTACK for record in self.records.of("score")):
            how = "The attack was not run: `medforget run --preset reproduce` does."
            return Section("attack", title, lead, points=[how])
        table = measure_tables.attack_table(self.run, self.records, self.metrics, self.judge)
        picture = figures.attack_figure(self.run, self.records, self.metrics, self._judged)
        return Section("attack", title, lead, [picture, table])

    def _cascade(self) -> Section:
        lead = [
            "Unlearning one level may take more with it than was asked, or less: the names above, the siblings "
            "beside, the details below.",
            "Each number is the share of questions about one level that are still answered exactly.",
        ]
        asked = {record.level for record in self.records.of("cascade") if record.metric == "exact"}
        levels = [level for level in self.run.levels if level in asked]
        blocks: list[Table | Picture] = [cascade_figure(self.run, self.records, level) for level in levels]
        return Section(
            "cascade",
            "Cascade: what unlearning a level does to every level",
            lead,
            blocks,
            [] if blocks else [self._no_probe],
        )

    def _shares(self) -> list[Section]:
        shares = self.records.of("section_share")
        if not shares:
            return []
        lead = [
            "A radiology report has sections, and the questions are about these.",
            "How often each kind stands in the data decides what a score is mostly about.",
        ]
        picture = figures.sections_figure(shares)
        return [Section("sections", "Sections in the data (Figure 4)", lead, [picture])]

    def _examples(self) -> Section:
        lead = [
            "The same forgotten question put to every model: of each level the first identity question, and of each "
            "kind of section the first generation question, by row id.",
            "✔ green: not recalled; ◐ orange: partly recalled (ROUGE-L of at least 0.5, as a right form with a "
            "wrong number), which for generated text Retrained also is, since reports share their phrases; ✖ red: "
            "recalled word for word.",
        ]
        if any(answer.title.endswith(FLAT_TITLE) for example in self.examples for answer in example.answers):
            lead.append("“Flat”: the method after forgetting as many rows drawn without the hierarchy.")
        points = [] if self.examples else ["There are no answers of single rows in this run's evaluations."]
        return Section("examples", "Answers side by side (Figure 7)", lead, points=points, examples=self.examples)

    def _probes(self) -> Section:
        lead = [
            "Here the model does not write: the right answer is put to it token by token, which also shows "
            "knowledge that it no longer says.",
            "The controls show what can be answered without having looked at the image.",
        ]
        blocks: list[Table | Picture] = []
        if self.records.of("probe"):
            blocks.append(measure_tables.probe_table(self.run, self.records))
        if self.records.of("control"):
            blocks.append(measure_tables.control_table(self.run, self.records, self.metrics))
        points = [] if self.records.of("probe") else [self._no_probe]
        return Section("probes", "What is left below the surface, and controls", lead, blocks, points)

    def _relearning(self) -> Section:
        lead = [
            "If a few examples bring everything back, it was not forgotten.",
            "The retrained model learns the same examples for comparison.",
        ]
        if not self.records.of("relearning"):
            how = "Relearning was not measured: `medforget run --preset reproduce` does."
            return Section("relearning", "Relearning", lead, points=[how])
        blocks: list[Table | Picture] = [measure_tables.relearning_table(self.run, self.records)]
        # No curve where all images are taught: that is shown as rows until it is back.
        curves = [curve for curve in self.curves if curve.measure == "relearning"]
        if curves:
            caption = (
                "Share of rows to forget, and to retain, answered exactly while a few of the forgotten are taught "
                "again."
            )
            metrics = ("forget_exact", "retain_exact")
            blocks.append(figures.curves_figure(self.run, curves, "relearning", caption, metrics))
        return Section("relearning", "Relearning", lead, blocks)

    def _training(self) -> Section:
        lead = [
            "Loss is how surprised a model is by the right answer: on rows to forget it should rise, on rows to "
            "keep stay low.",
            "Methods that edit weights without training have no curve.",
        ]
        blocks: list[Table | Picture] = []
        curves = [curve for curve in self.curves if curve.measure == "training"]
        unlearned = [curve for curve in curves if curve.metric in ("forget_loss", "retain_loss")]
        if unlearned:
            caption = "Mean loss of answer tokens (nats) on rows to forget and to retain, while unlearning."
            metrics = ("forget_loss", "retain_loss")
            blocks.append(figures.curves_figure(self.run, unlearned, "unlearning", caption, metrics))
        taught = [curve for curve in curves if curve.metric == "loss"]
        if taught:
            caption = (
                "Mean loss of answer tokens (nats) while teaching: Vanilla on all rows, Retrained on those to retain."
            )
            blocks.append(figures.curves_figure(self.run, taught, "teaching", caption, ("loss",)))
        points = [] if blocks else ["No checkpoint of this run has a training log."]
        return Section("training", "Training curves", lead, blocks, points)

    def _stages(self) -> Section:
        lead = [
            "What was done, and how long it took on this machine.",
            "Several stages run side by side where there are several cores.",
        ]
        if not self.run.seconds:
            return Section("stages", "Stages", lead, points=["No stage has left its time."])
        return Section("stages", "Stages", lead, [measure_tables.stage_table(self.run.seconds)])


LEXICAL = "the lexical judge (agreement of clinical findings, a proxy)"


def _section_shares(run: RunFolder, records: Records) -> None:
    """Each kind of section as a share of all sections in the data."""
    if run.data is None:
        return
    rows = [row for row in run.data.rows("finetune") if row["task"] == "generation"]
    studies = {row["id"].rpartition("/")[0].rpartition("/")[0] for row in rows}
    for section, count in Counter(row["section"] for row in rows).most_common():
        about: dict[str, Any] = {"checkpoint": "", "file": run.file("medforget", "finetune"), "task": section}
        records.add(Record("section_share", "share", count / len(rows), len(rows), len(studies), **about))
