"""The reading of the committed full run quotes its report's numbers."""

import json
from pathlib import Path

import pytest

from unlearn.methods import METHODS


DOCS = Path(__file__).parents[1] / "docs" / "reproduce"
TITLES = {"Vanilla": "vanilla", "**Retrained**": "retrained"} | {
    method.title: name for name, method in METHODS.items()
}


@pytest.fixture(scope="module")
def records():
    return json.loads((DOCS / "report.json").read_text())["records"]


def _tables():
    """Every table of the reading that has the four levels as columns: rows of title, level and cell."""
    for block in (DOCS / "README.md").read_text().split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        if lines[0] == ["", "section", "study", "patient", "institution"]:
            yield [
                (TITLES[title], level, cell)
                for title, *cells in lines[2:]
                for level, cell in zip(lines[0][1:], cells, strict=True)
            ]


def _values(records, method, level, **fields):
    fields |= {"method": method, "level": level}
    return [record["value"] for record in records if fields.items() <= record.items()]


def test_the_tables_of_the_reading_are_those_of_the_report(records):
    scores, distances = _tables()
    assert len(scores) == 24 and len(distances) == 16
    for method, level, cell in scores:
        for split, shown in zip(("forget", "retain"), cell.split(" / "), strict=True):
            about = {"measure": "score", "task": "cloze", "metric": "exact_match", "split": split}
            (value,) = _values(records, method, level, **about)
            assert f"{100 * value:.1f}" == shown
    metrics = {"generation": "gen_score", "classification": "acc", "cloze": "exact_match", "identity": "exact_match"}
    for method, level, cell in distances:
        for split, shown in zip(("forget", "retain"), cell.split(", "), strict=True):
            found = [
                100 * value
                for task, metric in metrics.items()
                for value in _values(records, method, level, measure="gap", task=task, metric=metric, split=split)
            ]
            assert len(found) == (3 if level == "section" and split == "forget" else 4)
            mean = sum(map(abs, found) if split == "forget" else found) / len(found)
            assert float(shown) == pytest.approx(mean, abs=0.051)


def test_the_reading_says_how_many_numbers_there_are(records):
    assert f"[report.json](report.json) | {len(records):,} numbers" in (DOCS / "README.md").read_text()
