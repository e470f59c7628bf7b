"""The plots of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medforget_dataset.atomic import replacing


# Colours that stay apart for colour-blind readers (Okabe and Ito).
FORGET, RETAIN = "#d55e00", "#0072b2"
PALETTE = ("#000000", "#999999", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442")

# Scores between 0 and 1 by method, level, split and task.
Values = dict[tuple[str, str, str, str], float]


def plot_scores(
    values: Values, levels: list[str], methods: list[str], tasks: list[str], titles: dict[str, str], path: Path
) -> None:
    """One panel a level and task: the forget and the retain score of every method, side by side."""
    figure = Figure(figsize=(3.2 * len(tasks), 2.6 * len(levels) + 0.6), layout="constrained")
    for row, level in enumerate(levels):
        for column, task in enumerate(tasks):
            axes = figure.add_subplot(len(levels), len(tasks), row * len(tasks) + column + 1)
            for shift, split, colour in ((-0.2, "forget", FORGET), (0.2, "retain", RETAIN)):
                heights = [100 * values.get((method, level, split, task), float("nan")) for method in methods]
                axes.bar([i + shift for i in range(len(methods))], heights, 0.4, color=colour, label=split)
            axes.set_xticks(range(len(methods)), [titles[method] for method in methods], rotation=45, ha="right")
            axes.set_ylim(0, 105)
            axes.set_title(f"{task}, {level} level", fontsize=10)
            axes.set_ylabel("score (%)" if column == 0 else "")
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    _save(figure, path)


def plot_forget_retain(
    values: Values, levels: list[str], methods: list[str], titles: dict[str, str], path: Path
) -> None:
    """Forget against retain in cloze, one point a method: the upper left corner has forgotten and kept."""
    figure = Figure(figsize=(4.2 * len(levels) + 1.4, 3.8), layout="constrained")
    for number, level in enumerate(levels):
        axes = figure.add_subplot(1, len(levels), number + 1)
        for method, colour in zip(methods, PALETTE * len(methods), strict=False):
            x, y = (values.get((method, level, split, "cloze")) for split in ("forget", "retain"))
            if x is not None and y is not None:
                style: dict[str, Any] = {"color": colour, "label": titles[method]}
                axes.scatter([100 * x], [100 * y], s=70, clip_on=False, zorder=3, **style)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="forget cloze (%)", ylabel="retain cloze (%)")
        axes.set_title(f"{level} level", fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
