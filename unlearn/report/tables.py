"""A table once, and the same table as Markdown, CSV and LaTeX; the HTML is made by the page's template."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field

from .records import Record


NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """
    What stands in one place of a table.

    Attributes:
        text (`str`):
            As it is read.
        number (`float`, *optional*), low (`float`, *optional*), high (`float`, *optional*):
            The same for the CSV, with its interval.
        marks (`str`):
            Letters of footnotes.
        paper (`str`), paper_marks (`str`):
            The paper's number as printed, and letters of its footnotes.
        record (`str`):
            Id of the record that it shows.
        is_head (`bool`):
            Whether it names its row.
        tone (`str`):
            How it is tinted: `"good"`, `"bad"`, `"unsure"` or nothing. Words or signs say the same.
    """

    text: str
    number: float | None = None
    low: float | None = None
    high: float | None = None
    marks: str = ""
    paper: str = ""
    paper_marks: str = ""
    record: str = ""
    is_head: bool = False
    tone: str = ""

    @property
    def interval(self) -> str:
        """Bounds in small print, where the cell has any."""
        if self.low is None or self.high is None:
            return ""
        return f"{_signless(self.low)} to {_signless(self.high)}"


def _signless(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def head(text: str) -> Cell:
    """A cell that names its row."""
    return Cell(text, is_head=True)


@dataclass
class Notes:
    """Footnotes of a table: the same words get the same letter."""

    lines: dict[str, str] = field(default_factory=dict)

    def mark(self, words: str) -> str:
        """The letter of a footnote."""
        if words not in self.lines:
            number, letters = len(self.lines), ""
            while number >= 0:
                letters = chr(ord("a") + number % 26) + letters
                number = number // 26 - 1
            self.lines[words] = letters
        return self.lines[words]


@dataclass
class Table:
    """
    A table.

    Attributes:
        name (`str`):
            Name of its files.
        caption (`str`):
            What it shows and how to read it.
        columns (`list[str]`):
            Titles, those of the columns that name rows first.
        rows (`list[list[Cell]]`):
            One cell a column.
        groups (`list[tuple[str, int]]`):
            Titles over several columns, left to right, empty where there is none.
        notes (`Notes`):
            Footnotes.
        shows_intervals (`bool`):
            Whether bounds stand below numbers.
    """

    name: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int]] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    shows_intervals: bool = False
    kind: str = "table"

    @property
    def footnotes(self) -> list[tuple[str, str]]:
        """Letter and words of each."""
        return [(letter, words) for words, letter in self.notes.lines.items()]

    def titles(self) -> list[str]:
        """Titles of columns, each with its group's."""
        groups = [title for title, span in self.groups for _ in range(span)] or [""] * len(self.columns)
        return [f"{group} {column}".strip() for group, column in zip(groups, self.columns, strict=True)]


def score_cell(record: Record | None, why: str, notes: Notes, *, scale: float = 100, sign: bool = False) -> Cell:
    """
    A cell of a record in per cent, or a dash with a footnote that says why there is none.

    Args:
        record (`Record`, *optional*):
            What is shown.
        why (`str`):
            Why there is none.
        notes (`Notes`):
            Footnotes of the table.
        scale (`float`, *optional*, defaults to `100`):
            What the value is multiplied with.
        sign (`bool`, *optional*, defaults to `False`):
            Show the sign of positive numbers too.
    """
    if record is None:
        return Cell(NOTHING, marks=notes.mark(why) if why else "")
    what = "marks" if record.judge else "values"
    marks = notes.mark(f"{record.missing} of {record.missing + record.n} {what} missing") if record.missing else ""
    value = scale * record.value
    return Cell(
        f"{value:{'+' if sign else ''}.1f}".replace("-", "−"),
        number=value,
        low=None if record.low is None else scale * record.low,
        high=None if record.high is None else scale * record.high,
        marks=marks,
        record=record.id,
    )


def as_markdown(table: Table) -> str:
    """The table in GitHub's Markdown, with the paper's numbers small below ours."""
    lines = [_line([_md(title) for title in table.titles()])]
    lines.append(_line(["---" if cell.is_head else "---:" for cell in table.rows[0]]) if table.rows else "")
    lines += [_line([_markdown_cell(cell, table.shows_intervals) for cell in row]) for row in table.rows]
    notes = "; ".join(f"{letter}: {_md(words)}" for letter, words in table.footnotes)
    return "\n".join(lines) + (f"\n\n{notes}." if notes else "")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md(text: str) -> str:
    for character in "\\|*_`<>[]":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _markdown_cell(cell: Cell, shows_intervals: bool) -> str:
    text = _md(cell.text) + (f"<sup>{cell.marks}</sup>" if cell.marks else "")
    if shows_intervals and cell.interval:
        text += f"<br><sub>{cell.interval}</sub>"
    if cell.paper:
        text += f"<br><sub>{cell.paper}{f'<sup>{cell.paper_marks}</sup>' if cell.paper_marks else ''}</sub>"
    return text


def as_csv(table: Table) -> str:
    """The table's numbers, with the paper's and the bounds of intervals in columns of their own."""
    titles = table.titles()
    has_paper, has_interval = (
        [any(getattr(row[i], name) not in ("", None) for row in table.rows) for i in range(len(titles))]
        for name in ("paper", "low")
    )
    header = []
    for i, title in enumerate(titles):
        header += [title, *([f"{title} low", f"{title} high"] if has_interval[i] else [])]
        header += [f"{title} (paper)"] if has_paper[i] else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        line: list[str] = []
        for i, cell in enumerate(row):
            line.append(
                _csv_number(cell.number) if cell.number is not None else "" if cell.text == NOTHING else cell.text
            )
            line += [_csv_number(cell.low), _csv_number(cell.high)] if has_interval[i] else []
            line += [cell.paper] if has_paper[i] else []
        writer.writerow(line)
    return out.getvalue()


def _csv_number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "–": "--", "−": "$-$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "…": r"\dots{}",
    "✔": r"$+$", "✖": r"$-$", "◐": r"$\pm$",
}  # fmt: skip


def tex(text: str) -> str:
    """Text as LaTeX shows it.

    Example:
        >>> tex("50 % of a_b ↓")
        '50 \\\\% of a\\\\_b $\\\\downarrow$'
    """
    return "".join(_TEX.get(character, character) for character in text)


def as_latex(table: Table) -> str:
    """The table as a `table*` with booktabs rules, narrow enough for A4 landscape."""
    heads = sum(cell.is_head for cell in table.rows[0]) if table.rows else 0
    lines = [
        "% needs the packages booktabs and xcolor; for A4 landscape",
        r"\begin{table*}[p]\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{tex(table.caption)}}}\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * heads}{'r' * (len(table.columns) - heads)}}}",
        r"\toprule",
        *_latex_groups(table),
        " & ".join(tex(column) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    for previous, row in zip([None, *table.rows], table.rows, strict=False):
        if previous and row[0].is_head and row[0].text != previous[0].text:
            lines.append(r"\addlinespace")
        lines.append(" & ".join(_latex_cell(cell, table.shows_intervals) for cell in row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.footnotes:
        notes = "; ".join(rf"\textsuperscript{{{letter}}}\,{tex(words)}" for letter, words in table.footnotes)
        lines.append(rf"\par\smallskip\parbox{{0.95\linewidth}}{{\tiny {notes}.}}")
    return "\n".join([*lines, r"\end{table*}", ""])


def _latex_groups(table: Table) -> list[str]:
    if not table.groups:
        return []
    cells, rules, first = [], [], 1
    for title, span in table.groups:
        cells.append(rf"\multicolumn{{{span}}}{{c}}{{{tex(title)}}}")
        if title:
            rules.append(rf"\cmidrule(lr){{{first}-{first + span - 1}}}")
        first += span
    return [" & ".join(cells) + r" \\", "".join(rules)]


def _latex_cell(cell: Cell, shows_intervals: bool) -> str:
    text = tex(cell.text) + (rf"\textsuperscript{{{cell.marks}}}" if cell.marks else "")
    if shows_intervals and cell.interval:
        text += rf" {{\tiny [{tex(cell.interval)}]}}"
    if cell.paper:
        marks = rf"\textsuperscript{{{cell.paper_marks}}}" if cell.paper_marks else ""
        text += rf" {{\tiny\color{{gray}}{cell.paper}{marks}}}"
    return text
