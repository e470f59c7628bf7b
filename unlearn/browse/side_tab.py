"""The tab that asks several checkpoints the same question about the same image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from medforget_dataset.errors import UserError

from . import cards
from .catalogue import Catalogue, Row, base_id
from .run import ReportedRun


if TYPE_CHECKING:
    from .models import Models

UPRIGHT, TURNED = "as taught", "turned"
OTHER_DATA = (
    '<p class="mf-note mf-restricted">This run was made with other data than the dataset shown: its models have not '
    "seen these images.</p>"
)
NOTHING_ASKED = '<div class="mf-empty"><p>Choose checkpoints and press “Ask”.</p></div>'


class SideTab:
    """
    The components of the tab, if there is something to ask.

    Args:
        catalogue ([`~unlearn.browse.catalogue.Catalogue`]):
            The dataset.
        run ([`~unlearn.browse.run.ReportedRun`], *optional*):
            The run whose checkpoints are asked.
        shown (`gradio.State`):
            Ids of the rows that the first tab shows.
    """

    def __init__(self, catalogue: Catalogue, run: ReportedRun | None, shown: gr.State):
        self.catalogue, self.folders = catalogue, run.checkpoints if run else {}
        self._models: Models | None = None
        if run is None or not run.checkpoints:
            gr.HTML(_nothing_to_ask(run), padding=False, apply_default_css=False)
            return
        if run.options not in (None, catalogue.record["options"]):
            gr.HTML(OTHER_DATA, padding=False, apply_default_css=False)
        row = self.catalogue.row(shown.value[0])
        with gr.Row():
            with gr.Column(scale=2, min_width=240):
                self.image = gr.HTML(self._image(row, UPRIGHT), padding=False, apply_default_css=False)
                self.view = gr.Radio(self._views(row), value=UPRIGHT, label="Image")
            with gr.Column(scale=5, min_width=300):
                self.row = gr.Dropdown(self._rows(shown.value), value=row["id"], label="Question of the dataset")
                self.question = gr.Textbox(row["question"], label="Question, as it is asked", lines=2)
                self.answer = gr.Textbox(row["answer"], label="Right answer, whose probability is computed")
                self.names = gr.CheckboxGroup(
                    list(self.folders), value=_first(list(self.folders)), label="Checkpoints", elem_id="mf-checkpoints"
                )
                self.button = gr.Button("Ask", variant="primary", elem_id="mf-ask")
        self.result = gr.HTML(NOTHING_ASKED, padding=False, apply_default_css=False, elem_id="mf-replies")
        self._connect(shown)

    def _connect(self, shown: gr.State) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        about_row = [self.question, self.answer, self.view, self.image, self.result]
        shown.change(self._other_image, shown, [self.row, *about_row], **quiet)
        self.row.input(self._other_row, self.row, about_row, **quiet)
        self.view.input(self._other_view, [self.row, self.view], [self.question, self.image, self.result], **quiet)
        asked = [self.row, self.view, self.question, self.answer, self.names]
        gr.on(
            [self.button.click, self.question.submit],
            self._ask,
            asked,
            self.result,
            concurrency_limit=1,
            **quiet,
        )

    def _rows(self, ids: Sequence[str]) -> list[tuple[str, str]]:
        rows = [self.catalogue.row(row_id) for row_id in ids]
        return [(f"{row['section'] or row['level']} · {row['task']}: {row['question']}", row["id"]) for row in rows]

    def _views(self, row: Row) -> list[tuple[str, str]]:
        general = row["id"].startswith("general/")
        turned = None if general else self.catalogue.turned(row)
        return [("radiograph", UPRIGHT)] + ([(f"turned by {cards.degrees(turned.angle)}", TURNED)] if turned else [])

    def _bytes(self, row: Row, view: str) -> bytes:
        turned = self.catalogue.turned(row) if view == TURNED else None
        return turned.image if turned else self.catalogue.upright(row)

    def _image(self, row: Row, view: str) -> str:
        names = " › ".join(escape(row[level]) for level in ("institution", "patient", "study") if row[level])
        image = f'<img src="{cards.data_uri(self._bytes(row, view))}" alt="The image that is asked about">'
        states = "".join(cards.chip(level, state) for level, state in self.catalogue.states(row["id"]).items())
        return (
            f'<div class="mf-study-image">{image}<p class="mf-quiet">{names}</p>'
            f'<p class="mf-states">{states}</p></div>'
        )

    def _other_image(self, ids: Sequence[str]) -> list[Any]:
        if not ids:
            return [gr.skip()] * 6
        return [gr.Dropdown(self._rows(ids), value=ids[0]), *self._other_row(ids[0])]

    def _other_row(self, row_id: str) -> list[Any]:
        row = self.catalogue.row(row_id)
        view = TURNED if row["original_question"] else UPRIGHT
        views = gr.Radio(self._views(row), value=view)
        return [row["question"], row["answer"], views, self._image(row, view), NOTHING_ASKED]

    def _other_view(self, row_id: str, view: str) -> list[Any]:
        row = self.catalogue.row(row_id)
        known = base_id(row_id)
        asked = self.catalogue.rephrased.get(known, row) if view == TURNED else self.catalogue.taught.get(known, row)
        return [asked["question"], self._image(row, view), NOTHING_ASKED]

    def _ask(self, row_id: str, view: str, text: str, right: str, names: Sequence[str]) -> Iterator[str]:
        text, right = text.strip(), right.strip()
        missing = "a question" if not text else "a right answer" if not right else "a checkpoint" if not names else ""
        if missing:
            yield f'<div class="mf-empty"><p>Give {missing} first.</p></div>'
            return
        row = self.catalogue.row(row_id)
        known = [row, *filter(None, (table.get(base_id(row_id)) for table in self._wordings))]
        # A free question is decoded as text, whatever the row asks.
        task = row["task"] if text in [other["question"] for other in known] else "generation"
        image = self._bytes(row, view)
        found: dict[str, Any] = {}
        for number, name in enumerate(names):
            waiting = names[number:]
            yield cards.replies(found, waiting, right, self._status(name))
            found[name] = self._reply(name, text, right, task, image)
        yield cards.replies(found, [], right, "")

    @property
    def _wordings(self) -> tuple[dict[str, Row], dict[str, Row]]:
        return self.catalogue.taught, self.catalogue.rephrased

    def _status(self, name: str) -> str:
        if self._models is not None and self._models.is_loaded(name):
            return f"Asking {name} …"
        return f"Loading {name} …"

    def _reply(self, name: str, text: str, right: str, task: str, image: bytes) -> Any:
        from .models import Models, Question

        if self._models is None:
            self._models = Models(self.folders)
        try:
            return self._models.ask(name, Question(text, right, task, image))
        except UserError as error:
            return str(error)


def _first(names: Sequence[str]) -> list[str]:
    """One of each kind: vanilla, retrained, and the first that was unlearned."""
    chosen = [name for name in names if name == "vanilla"]
    retrained = [name for name in names if name.startswith("retrained")][:1]
    unlearned = [name for name in names if name not in chosen and not name.startswith("retrained")][:1]
    return [*chosen, *retrained, *unlearned]


def _nothing_to_ask(run: ReportedRun | None) -> str:
    if run is None:
        why = "No run was given, so there are no checkpoints to ask."
        how = (
            "<code>medforget run --preset demo</code> makes some; "
            "<code>medforget browse runs/demo/medforget runs/demo</code> asks them."
        )
    else:
        why = f"{escape(str(run.folder))} holds no checkpoints."
        how = "They are asked where the run was made: <code>medforget browse DATASET RUN</code>."
    return f'<div class="mf-empty"><p>{why}</p><p>{how}</p></div>'
