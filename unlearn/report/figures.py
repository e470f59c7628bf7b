"""Drawing: what all figures share, and the figures of scores by level."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from harness_tasks.generate import CONTEXTS

from .comparisons import why_uninformative
from .evaluations import ATTACK
from .paper_tables import METRIC_TITLES, SPLITS
from .probes import Curve
from .reading import TITLES, Metrics
from .records import Record, Records
from .run_folder import RunFolder


# Colours that stay apart for colour-blind readers (Okabe and Ito); the paper's four methods near its own (Figure 6).
FORGET, RETAIN = "#d55e00", "#0072b2"
COLOURS = {
    "vanilla": "#000000",
    "retrained": "#777777",
    "manu": "#e69f00",
    "grad_diff": "#009e73",
    "kl_min": "#8c510a",
    "npo": "#aa4499",
}
OTHERS = ("#56b4e9", "#0072b2", "#d55e00", "#f0e442", "#332288", "#882255")
MARKERS = "osD^vPX*"
LEVEL_TICKS = {"section": "Sec.", "study": "Stu.", "patient": "Pat.", "institution": "Inst."}
DPI = 150


@dataclass(frozen=True)
class Picture:
    """
    A drawn figure.

    Attributes:
        name (`str`):
            Name of its files.
        caption (`str`):
            What it shows and how to read it.
        alt (`str`):
            What it is, for who cannot see it.
        svg (`bytes`), png (`bytes`):
            The figure.
    """

    name: str
    caption: str
    alt: str
    svg: bytes
    png: bytes
    kind: str = "picture"

    @property
    def uri(self) -> str:
        """The figure as the `src` of an HTML image."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def picture(name: str, caption: str, alt: str, figure: Figure) -> Picture:
    """Save a figure in both formats; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    # What was laid out for one format fits the other, and takes longer than drawing.
    figure.set_layout_engine("none")
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(name, caption, alt, svg.getvalue(), png.getvalue())


def style(run: RunFolder, method: str) -> dict[str, Any]:
    """Colour, marker and dash of a method: the baselines are dashed, and no two methods differ in colour alone."""
    others = [name for name in run.methods if name not in COLOURS]
    colour = COLOURS.get(method) or OTHERS[others.index(method) % len(OTHERS)]
    marker = MARKERS[run.all_methods.index(method) % len(MARKERS)]
    dash = {"vanilla": ":", "retrained": "--"}.get(method, "-")
    return {"color": colour, "marker": marker, "linestyle": dash, "label": TITLES[method], "markersize": 5}


def tidy(axes: Axes) -> None:
    """A light grid, and no frame where nothing is read off."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, columns: int = 8) -> None:
    """One legend for all panels."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def levels_figure(run: RunFolder, records: Records, metrics: Metrics, judge: str) -> Picture:
    """The paper's Figure 5: each split a column, each kind of question a row, the level unlearned along x."""
    kinds = [(kind, metric) for kind, metric in metrics.items() if kind != "identity"]
    figure = Figure(figsize=(11, 2.3 * len(kinds) + 0.7), layout="constrained")
    grid = figure.subplots(len(kinds), len(SPLITS), sharex=True, sharey=True, squeeze=False)
    for row, (kind, metric) in zip(grid, kinds, strict=True):
        for axes, (split, title) in zip(row, SPLITS.items(), strict=True):
            for method in run.all_methods:
                found = [records.find("score", method, level, split, kind, metric) for level in run.levels]
                _line(axes, found, style(run, method))
            axes.set_ylim(-3, 103)
            axes.set_xlim(-0.4, len(run.levels) - 0.6)
            axes.set_xticks(range(len(run.levels)), [LEVEL_TICKS[level] for level in run.levels])
            tidy(axes)
            if kind == kinds[0][0]:
                axes.set_title(title, fontsize=10)
            if split == "forget":
                axes.set_ylabel(f"{METRIC_TITLES[metric]} (%)")
    legend_below(figure)
    caption = (
        "Scores by unlearned level (Figure 5 of the paper): Forget and Rephrase should fall to the dashed line of the "
        f"retrained model, Retain and General Med stay with it. Bars are 95 % intervals over studies. {judge}"
    )
    return picture("levels", caption, "Lines of scores by unlearned level, one panel a split and metric", figure)


def _line(axes: Axes, found: Sequence[Record | None], look: dict[str, Any]) -> None:
    heights = [math.nan if record is None else 100 * record.value for record in found]
    axes.plot(range(len(found)), heights, linewidth=1.4, clip_on=False, **look)
    for place, record in enumerate(found):
        if record is not None and record.low is not None and record.high is not None:
            axes.vlines(place, 100 * record.low, 100 * record.high, color=look["color"], linewidth=0.8, alpha=0.6)


def attack_figure(run: RunFolder, records: Records, metrics: Metrics, judge: str) -> Picture:
    """The paper's Figure 6: each form of prompt a panel, the level unlearned along x."""
    titles = ("no context", "study", "+ patient", "+ institution")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    metric = metrics.generation
    for axes, context, title in zip(figure.subplots(1, 4, sharey=True), CONTEXTS, titles, strict=True):
        for method in run.all_methods:
            found = [records.find("score", method, level, ATTACK, context, metric) for level in run.levels]
            _line(axes, found, style(run, method))
        for place, level in enumerate(run.levels):
            if why_uninformative(records, level, context, metric):
                axes.axvspan(place - 0.5, place + 0.5, facecolor="#eeeeee", edgecolor="#999999", hatch="///", zorder=0)
        axes.set(xlim=(-0.5, len(run.levels) - 0.5), ylim=(-3, 103))
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(run.levels)), [LEVEL_TICKS[level] for level in run.levels])
        tidy(axes)
    figure.axes[0].set_ylabel(f"{METRIC_TITLES[metric]} (%)")
    legend_below(figure)
    caption = (
        "The reconstruction attack by unlearned level (Figure 6 of the paper), one panel a form of prompt. Above "
        "the dashed line of the retrained model, which cannot leak, something is recovered. Hatched: the vanilla "
        f"model itself scores under 50 % there, or was not asked, so the form tells nothing. {judge}"
    )
    return picture("attack", caption, "Lines of attack scores by unlearned level, one panel a form of prompt", figure)


def scores_figure(run: RunFolder, records: Records, metrics: Metrics) -> Picture:
    """Forget and retain of every method side by side, one panel a level and kind of question."""
    kinds = list(metrics.items())
    figure = Figure(figsize=(3.2 * len(kinds), 2.6 * len(run.levels) + 0.6), layout="constrained")
    grid = figure.subplots(len(run.levels), len(kinds), squeeze=False, sharex=True, sharey=True)
    methods = run.all_methods
    for row, level in zip(grid, run.levels, strict=True):
        for axes, (kind, metric) in zip(row, kinds, strict=True):
            for shift, split, colour in ((-0.2, "forget", FORGET), (0.2, "retain", RETAIN)):
                heights = [100 * records.value("score", m, level, split, kind, metric) for m in methods]
                axes.bar([i + shift for i in range(len(methods))], heights, 0.4, color=colour, label=split)
            axes.set_xticks(range(len(methods)), [TITLES[method] for method in methods], rotation=45, ha="right")
            axes.set_ylim(0, 105)
            axes.set_title(f"{kind}, {level} level", fontsize=10)
            axes.set_ylabel("score (%)" if kind == "generation" else "")
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    caption = "Forget (to fall) beside retain (to stay), in per cent."
    return picture("scores", caption, "Bars of forget and retain scores of every method", figure)


def forget_retain_figure(run: RunFolder, records: Records, metrics: Metrics) -> Picture:
    """Forget against retain in cloze, one point a method: the upper left corner has forgotten and kept."""
    metric = metrics.of("cloze")
    figure = Figure(figsize=(3.1 * len(run.levels) + 1.4, 3.6), layout="constrained")
    for axes, level in zip(figure.subplots(1, len(run.levels), squeeze=False)[0], run.levels, strict=True):
        for method in run.all_methods:
            point = [
                100 * records.value("score", method, level, split, "cloze", metric) for split in ("forget", "retain")
            ]
            look = style(run, method)
            axes.scatter(
                *point, s=70, clip_on=False, zorder=3, color=look["color"], marker=look["marker"], label=look["label"]
            )
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="forget cloze (%)")
        axes.set_title(f"{level} level", fontsize=10)
        tidy(axes)
    figure.axes[0].set_ylabel("retain cloze (%)")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)
    caption = "Forget against retain in cloze: the upper left corner has forgotten and kept."
    return picture("forget-retain", caption, "Points of forget and retain scores of every method", figure)


def sections_figure(shares: Sequence[Record]) -> Picture:
    """The paper's Figure 4."""
    figure = Figure(figsize=(6.4, 0.36 * len(shares) + 0.8), layout="constrained")
    axes = figure.subplots()
    names = [record.task.replace("_", " ") for record in shares]
    bars = axes.barh(names, [100 * record.value for record in shares], color=RETAIN)
    axes.bar_label(bars, [f"{100 * record.value:.1f} %" for record in shares], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("share of sections (%)")
    axes.set_xlim(0, 118 * max(record.value for record in shares))
    axes.spines[["top", "right"]].set_visible(False)
    caption = (
        "Share of each kind of report section in the data (Figure 4 of the paper, where Impression has 23.6 %, "
        "Findings 20.1 %, Technique 19.5 %, Indication 17.1 % and Examination 13.4 %)."
    )
    return picture("sections", caption, "Bars of the share of each kind of section", figure)


def curves_figure(run: RunFolder, curves: Sequence[Curve], name: str, caption: str, metrics: Sequence[str]) -> Picture:
    """Lines over steps or rows, one panel a level and metric, one line a method."""
    levels = [level for level in ("", *run.levels) if any(curve.level == level for curve in curves)]
    figure = Figure(figsize=(3.4 * len(metrics), 2.4 * len(levels) + 0.6), layout="constrained")
    grid = figure.subplots(len(levels), len(metrics), squeeze=False)
    for row, level in zip(grid, levels, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for curve in curves:
                if curve.level == level and curve.metric == metric:
                    look = style(run, curve.method) | {"markersize": 3}
                    axes.plot(curve.x, curve.y, linewidth=1.2, **look)
            axes.set_title(f"{metric.replace('_', ' ')}, {level or 'all rows'}{' level' if level else ''}", fontsize=9)
            tidy(axes)
    for axes in grid[-1]:
        axes.set_xlabel("rows learned" if name == "relearning" else "step")
    legend_below(figure)
    return picture(name, caption, f"Lines of {', '.join(metrics)}", figure)
