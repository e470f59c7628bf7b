"""The cascade matrix drawn: what unlearning one level did to the knowledge of every level."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from medforget_dataset.hierarchy import LEVELS

from ..measures.cascade import RELATIONS
from .figures import Picture, picture
from .reading import TITLES
from .records import Records
from .run_folder import RunFolder


# From white to dark blue: the order is the same in grey print and for colour-blind readers.
COLOURS = colormaps["Blues"]
COLUMN_WORDS = {
    "forgotten": "should be as pale as Retrained's",
    "above": "an identity above a forgotten node, kept",
    "sibling": "beside a forgotten node under the same parent, kept",
    "stranger": "neither of these, kept",
    "unseen": "of patients nobody was trained on, what guessing gives",
}


def cascade_figure(run: RunFolder, records: Records, level: str) -> Picture:
    """
    One panel a method: rows are the level asked about, columns how the rows stand to what was forgotten. Rows and
    columns of which no panel has a number are left out.
    """
    found = [r for r in records.of("cascade") if r.level == level and r.metric == "exact"]
    methods = [method for method in run.all_methods if any(r.method == method for r in found)]
    probed = [name for name in LEVELS if any(r.task == name for r in found)]
    related = [name for name in RELATIONS if any(r.split == name for r in found)]
    across = min(3, len(methods))
    down = math.ceil(len(methods) / across)
    layout = ConstrainedLayoutEngine(wspace=0.08, hspace=0.08)
    figure = Figure(figsize=(3.6 * across, 2.3 * down + 0.2), layout=layout)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for number, axes in enumerate(panels):
        if number < len(methods):
            _panel(axes, records, methods[number], level, probed, related, with_rows=number % across == 0)
        else:
            axes.set_visible(False)
    caption = (
        f"Cascade of unlearning at {level} level: per cent of rows answered exactly. Rows: the level that the "
        f"question is about. Columns: how the row stands to what was forgotten – "
        f"{'; '.join(f'{name}, {COLUMN_WORDS[name]}' for name in related)}. Kept should be dark. A dot: there are no "
        "such rows."
    )
    if run.data is not None and run.data.options["selection"] == "stratified":
        caption += (
            " Under the stratified selection, which forgets a quarter of the children of every node, every retained "
            "node is a sibling of a forgotten one."
        )
    return picture(
        f"cascade-{level}", caption, f"Heat maps of what is known after unlearning at {level} level", figure
    )


def _panel(
    axes: Axes,
    records: Records,
    method: str,
    level: str,
    probed: Sequence[str],
    related: Sequence[str],
    *,
    with_rows: bool,
) -> None:
    values = [
        [100 * records.value("cascade", method, level, r, name, "exact", _set(r)) for r in related] for name in probed
    ]
    axes.set_facecolor("#f3f3f3")
    axes.imshow(values, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            is_known = math.isfinite(value)
            colour = "white" if is_known and value > 55 else "#222222" if is_known else "#aaaaaa"
            axes.text(x, y, f"{value:.0f}" if is_known else "·", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(related)), related, fontsize=7.5, rotation=25)
    axes.set_yticks(range(len(probed)), probed if with_rows else [""] * len(probed), fontsize=8)
    axes.set_title(TITLES[method], fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _set(relation: str) -> str:
    return "unseen" if relation == "unseen" else "finetune"
