"""The dataset card: what the Hub reads of it, what it shows, and that what it says to type works."""

import ast
import json
import re

import datasets
import duckdb
import pandas
import pytest
from huggingface_hub import DatasetCard

from medforget_dataset import load
from medforget_dataset.benchmark import Benchmark
from medforget_dataset.card_examples import as_cell, choose_examples
from medforget_dataset.hub import push_dataset
from medforget_dataset.options import BuildOptions


# The Hub's own lists (huggingface_hub.DatasetCardData, and the tasks of huggingface.js).
CREATORS = {"found", "crowdsourced", "expert-generated", "machine-generated", "other"}


@pytest.fixture(scope="module")
def card(data_dir):
    return DatasetCard.load(data_dir / "README.md")


def _blocks(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def _evaluate(block, names):
    """What each expression of a block gives."""
    values = []
    for statement in ast.parse(block).body:
        if isinstance(statement, ast.Expr):
            values.append(eval(compile(ast.Expression(statement.value), "card", "eval"), names))
        else:
            exec(compile(ast.Module([statement], []), "card", "exec"), names)
    return values


def test_the_head_has_what_the_hub_lists(card):
    head = card.data
    assert (head.license, head.language, head.pretty_name) == ("cc-by-3.0", ["en"], "MedForget")
    assert head.task_categories == head.task_ids == ["visual-question-answering"]
    assert head.multilinguality == ["monolingual"] and head.source_datasets == ["original"]
    assert set(head.language_creators) <= CREATORS and set(head.annotations_creators) <= CREATORS | {"no-annotation"}
    assert head.size_categories == ["1K<n<10K"]
    assert len(head.configs) == len(head.dataset_info) == 14


def test_pictures_are_small_files_of_the_build_that_the_card_links(card, data_dir):
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card.text)
    assert sorted(linked) == sorted(path.relative_to(data_dir).as_posix() for path in (data_dir / "images").iterdir())
    assert set(linked) <= json.loads((data_dir / "build.json").read_text())["files"].keys()
    stored = {
        image["bytes"]
        for config in ("finetune", "patient_forget_rephrase", "general_med")
        for path in (data_dir / config).glob("*.parquet")
        for image in pandas.read_parquet(path, columns=["image"])["image"]
    }
    assert all((data_dir / name).read_bytes() in stored for name in linked)


def test_example_rows_are_rows_of_one_forgotten_study(card, data_dir):
    rows = {as_cell(row["question"]): row for row in load("finetune", "train", data=data_dir).remove_columns("image")}
    rephrased = set(map(as_cell, load("patient_forget_rephrase", "test", data=data_dir)["question"]))
    shown = re.findall(r"^\| (?:identity|generation|cloze|classification), .*$", card.text, re.MULTILINE)
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in shown]
    assert [cell[0].split(",")[0] for cell in cells] == [*["identity"] * 3, "generation", "cloze", "classification"]
    assert cells[0][2] == "–" and {cell[2] for cell in cells[1:]} <= rephrased
    for _, question, _, answer in cells:
        assert question in rows and answer


def test_what_the_card_says_to_type_works_in_the_folders_parent(card, data_dir, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    names = {}
    local = [block for block in _blocks(card) if "ORG/" not in block]
    loaded, counts, frame = [value for block in local for value in _evaluate(block, names)]
    forget = load("patient_forget", "train", data=data_dir)
    assert loaded["train"].num_rows == 240
    assert isinstance(counts, duckdb.DuckDBPyRelation)
    sections = forget["section"]
    assert dict(counts.fetchall()) == {section: sections.count(section) for section in set(sections)}
    assert list(frame.columns) == ["id", "question", "answer"] and list(frame["id"]) == forget["id"][:]


def test_what_the_card_reads_from_the_hub_is_there(card, data_dir, local_hub):
    push_dataset(data_dir, "hospital/medforget")
    (remote,) = [block for block in _blocks(card) if "ORG/" in block]
    paths = re.findall(r"hf://datasets/ORG/medforget/([^'\"]+)", remote)
    assert len(paths) == 2 and all(list(data_dir.glob(path)) for path in paths)
    # DuckDB would first fetch the extension by which it reads from the Hub.
    lines = remote.replace("ORG/medforget", "hospital/medforget").splitlines(keepends=True)
    kept = "".join(line for line in lines if not line.startswith("duckdb."))
    loaded, frame = _evaluate(kept, {"pandas": pandas, "load_dataset": datasets.load_dataset})
    assert loaded["train"].num_rows == 240
    assert list(frame["id"]) == load("patient_forget", "train", data=data_dir)["id"][:]


def test_a_restricted_corpus_shows_nothing(monkeypatch):
    benchmark = Benchmark(BuildOptions(institutions=4, patients=4, image_size=56), workers=1)
    monkeypatch.setattr(benchmark.corpus, "restricted", True, raising=False)
    monkeypatch.setattr(Benchmark, "examples", lambda *args: pytest.fail("rows were read"))
    examples = choose_examples(benchmark)
    assert not (examples.images or examples.rows or examples.general)
