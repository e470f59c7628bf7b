"""Draw the pictures of the documentation from a built dataset and a finished run: `make figures`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from medforget_dataset import LEVELS, TASKS, load
from unlearn.report.figures import COLOURS, FORGET, RETAIN


DOCS = Path(__file__).parent
COLUMNS, ROWS = 5, 2
INK, QUIET, BOTH = "#1d2733", "#5d6b7a", "#b9c4ce"
# Width and height of the pipeline, in the units of its boxes.
WIDTH, HEIGHT = 160, 54


def radiographs(data: Path) -> None:
    """A page of radiographs, each with the finding that its report names first, no two of a kind and place."""
    shown: dict[str, tuple] = {}
    for row in load("finetune", "train", data=data):
        if row["section"] == "findings" and row["task"] == TASKS.index("generation"):
            finding = row["answer"].split(". ")[0].removeprefix("There is ")
            shown.setdefault(" ".join(finding.split()[-2:]), (row["image"], finding))
    figure = Figure(figsize=(2.2 * COLUMNS, 2.6 * ROWS), layout="constrained")
    for number, (image, finding) in enumerate(list(shown.values())[: COLUMNS * ROWS]):
        axes = figure.add_subplot(ROWS, COLUMNS, number + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(textwrap.fill(finding, 26), fontsize=8)
        axes.axis("off")
    _save(figure, "radiographs")


def pipeline(data: Path) -> None:
    """From the hierarchy to the report, with a real row, in the colours of the report."""
    cloze = TASKS.index("cloze")
    rows = load("patient_forget", "train", data=data)
    row = next(row for row in rows if row["task"] == cloze and row["section"] == "impression")
    figure = Figure(figsize=(12, 12 * HEIGHT / WIDTH))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    for x, title in ((20, "hospital"), (57, "rows"), (100, "models"), (141, "scores")):
        axes.text(x, 50, title, ha="center", fontsize=14, weight="bold", color=INK)
    _hierarchy(axes)
    _arrow(axes, 30, 36, 25)
    axes.imshow(row["image"], cmap="gray", vmin=0, vmax=255, extent=(38, 52, 31, 45), zorder=2)
    axes.text(54, 45, textwrap.fill(row["question"], 30), fontsize=7.5, va="top", color=INK)
    axes.text(54, 31, textwrap.fill(row["answer"], 28), fontsize=7.5, va="bottom", color=INK, weight="bold")
    for y, name, colour in (
        (22, "forget", FORGET),
        (15, "retain", RETAIN),
        (8, "forget, rephrased", FORGET),
        (1, "general medicine", QUIET),
    ):
        _box(axes, 38, y, 38, 5, name, colour)
    _arrow(axes, 78, 84, 25)
    _box(axes, 85, 36, 30, 7, "vanilla\nlearned all rows", COLOURS["vanilla"])
    _box(axes, 85, 5, 30, 7, "retrained\nnever saw the forget rows", COLOURS["retrained"])
    _box(axes, 85, 19, 30, 9, "unlearned\nGradDiff, KL-Min, NPO, MANU", COLOURS["npo"])
    axes.annotate("", (100, 29.4), (100, 35), arrowprops={"arrowstyle": "-|>", "color": QUIET, "lw": 1.6})
    axes.annotate("", (100, 13.4), (100, 18), arrowprops={"arrowstyle": "<|-|>", "color": QUIET, "lw": 1.2, "ls": ":"})
    axes.text(101.5, 15.6, "how far apart?", fontsize=8, color=QUIET, va="center")
    _arrow(axes, 117, 123, 25)
    for y, name in (
        (38, "generation, cloze, choice, identity"),
        (30, "selectivity: retain minus forget"),
        (22, "distance from retraining"),
        (14, "attack, membership, relearning"),
        (6, "each level: what else was lost"),
    ):
        _box(axes, 124, y, 35, 5, name, RETAIN, filled=False)
    _save(figure, "pipeline")


def _hierarchy(axes: Axes) -> None:
    """An institution with two patients, of whom one is forgotten with everything beneath."""
    axes.plot([20], [42], "o", ms=17, color=BOTH, zorder=2)
    for x, colour, fate in ((14, FORGET, "to forget"), (26, RETAIN, "to retain")):
        axes.plot([20, x, x], [42, 32, 22], color=BOTH, lw=1.5, zorder=1)
        axes.plot([x - 2.6, x, x + 2.6], [12, 22, 12], color=BOTH, lw=1.5, zorder=1)
        axes.plot([x, x], [32, 22], "o", ms=17, color=colour, zorder=2)
        axes.plot([x - 2.6, x + 2.6], [12, 12], "o", ms=11, color=colour, zorder=2)
        axes.text(x, 5.5, fate, ha="center", fontsize=9, color=colour)
    for y, name in zip((42, 32, 22, 12), LEVELS, strict=True):
        axes.text(1, y, name, va="center", fontsize=8.5, color=INK)


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, *, filled=True) -> None:
    shape = "round,pad=0,rounding_size=1.2"
    face = colour if filled else "white"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=face, edgecolor=colour, lw=1.4))
    centre = (x + width / 2, y + height / 2)
    axes.text(*centre, text, ha="center", va="center", fontsize=8.5, color="white" if filled else INK, linespacing=1.4)


def _arrow(axes: Axes, start: float, end: float, y: float) -> None:
    axes.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 2.2})


def _save(figure: Figure, name: str) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(DOCS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    radiographs(Path(sys.argv[1]))
    pipeline(Path(sys.argv[1]))
    for picture in ("scores", "forget-retain"):
        shutil.copyfile(Path(sys.argv[2]) / "figures" / f"{picture}.png", DOCS / f"demo-{picture}.png")
