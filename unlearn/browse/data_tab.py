"""The tab that walks Institution, Patient, Study and Section."""

from __future__ import annotations

from typing import Any

import gradio as gr

from medforget_dataset.benchmark import CONFIGS
from medforget_dataset.hierarchy import LEVELS, TASKS

from . import cards
from .catalogue import GENERAL, Catalogue, Place, Row, by_image


ALL = "all"


class DataTab:
    """
    The components of the tab. `shown` holds the ids of the rows that it shows, which other tabs ask about.

    Args:
        catalogue ([`~unlearn.browse.catalogue.Catalogue`]):
            The dataset.
    """

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue
        # An image a page, so that a page is quick however much is chosen.
        start = self._page(Place(), 0)
        with gr.Row(elem_classes="mf-filters"):
            self.config = gr.Dropdown(self._configs(), value=CONFIGS[0], label="Configuration", scale=2, min_width=260)
            self.task = gr.Dropdown([("all tasks", ""), *((task, task) for task in TASKS)], value="", label="Task")
        with gr.Row(elem_classes="mf-filters"):
            self.nodes = [
                gr.Dropdown(self._choices(Place(), level), value="", label=level.title(), elem_id=f"mf-{level}")
                for level in LEVELS
            ]
        self.counts = gr.HTML(start[1], padding=False, apply_default_css=False)
        with gr.Row(elem_classes="mf-pager"):
            self.before = gr.Button("◀ Previous image", size="sm", scale=0, min_width=140)
            self.after = gr.Button("Next image ▶", size="sm", scale=0, min_width=140)
            self.ask = gr.Button("Ask the models about it →", size="sm", variant="primary", scale=0, min_width=210)
        self.study = gr.HTML(start[2], padding=False, apply_default_css=False)
        self.number, self.shown = gr.State(0), gr.State(start[3])
        self._connect()

    def _connect(self) -> None:
        filters = [self.config, self.task, *self.nodes]
        page = [self.number, self.counts, self.study, self.shown]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for changed in (self.config, self.task):
            changed.input(self._filtered, filters, [*self.nodes, *page], **quiet)
        for depth, node in enumerate(self.nodes):
            below = self.nodes[depth + 1 :]
            node.input(self._narrowed(depth), filters, [*below, *page], **quiet)
        for button, step in ((self.before, -1), (self.after, 1)):
            button.click(self._turned(step), [*filters, self.number], page, **quiet)

    def _configs(self) -> list[tuple[str, str]]:
        return [(f"{config} ({self.catalogue.sizes[config]:,} rows)", config) for config in CONFIGS]

    def _choices(self, place: Place, level: str) -> list[tuple[str, str]]:
        children = self.catalogue.children(place, level)
        if not children:
            return [("no hierarchy" if place.config == GENERAL else "none", "")]
        forgotten = self.catalogue.forgotten_nodes
        # A section has an address only below a study.
        above = f"{place.study}/" if level == "section" and place.study else ""
        choices = [(f"{ALL} ({len(children):,})", "")]
        for key, name, count in children:
            mark = " · forgotten" if above + key in forgotten else ""
            choices.append((f"{name} · {count:,} rows{mark}", key))
        return choices

    def _page(self, place: Place, number: int) -> tuple[int, str, str, list[str]]:
        rows = self.catalogue.rows(place)
        images = by_image(rows)
        number = min(max(number, 0), max(len(images) - 1, 0))
        shown: list[Row] = list(images.values())[number] if images else []
        position = f"Image {number + 1} of {len(images):,}"
        counts = cards.counts(self.catalogue, rows, len(images), place)
        return number, counts, cards.study(self.catalogue, shown, position), [row["id"] for row in shown]

    def _filtered(self, *values: str) -> list[Any]:
        """A configuration or task was chosen: nodes that are no longer there fall back to all."""
        place = Place(*values)
        updates = []
        for level in LEVELS:
            choices = self._choices(place, level)
            if getattr(place, level) not in [value for _, value in choices]:
                place = place._replace(**dict.fromkeys(LEVELS[LEVELS.index(level) :], ""))
                choices = self._choices(place, level)
            updates.append(gr.Dropdown(choices, value=getattr(place, level)))
        return [*updates, *self._page(place, 0)]

    def _narrowed(self, depth: int) -> Any:
        """A node was chosen: what is below it begins at all."""
        below = LEVELS[depth + 1 :]

        def update(*values: str) -> list[Any]:
            place = Place(*values)._replace(**dict.fromkeys(below, ""))
            return [*(gr.Dropdown(self._choices(place, level), value="") for level in below), *self._page(place, 0)]

        return update

    def _turned(self, step: int) -> Any:
        def update(*values: Any) -> tuple:
            *filters, number = values
            return self._page(Place(*filters), number + step)

        return update
