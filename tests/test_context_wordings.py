"""Training may ask by name for sections that no level forgets, and for no others."""

import shutil

import pyarrow.parquet as pq
import pytest

from medforget_dataset import LEVELS, BuildOptions
from medforget_dataset.benchmark import Benchmark
from medforget_dataset.questions.phrasings import GENERATION
from medforget_dataset.validate import validate


@pytest.fixture(scope="module", params=["stratified", "nested", "flat"])
def benchmark(request):
    return Benchmark(BuildOptions(institutions=4, patients=4, selection=request.param))


def names_of(row):
    return [row[level] for level in ("institution", "patient", "study")]


def test_named_are_the_sections_that_are_retained_at_all_levels(benchmark):
    retained = set.intersection(*({row["id"] for row in benchmark.config_rows(f"{level}_retain")} for level in LEVELS))
    named = {row["id"] for row in benchmark.rows if any(row["study"] in text for text in row["training_phrasings"])}
    sections = {row["id"] for row in benchmark.rows if row["task"] == "generation"} & retained
    if benchmark.options.selection == "flat":  # a section may be kept while the name of its study is forgotten
        sections = {
            id
            for id in sections
            if all(f"{id.rsplit('/', 2)[0]}/{level}" in retained for level in ("institution", "patient", "study"))
        }
    assert named == sections
    # Three quarters of the children of each of four levels; of the institutions; of the rows, by chance.
    assert len(named) == {"stratified": 81, "nested": 192, "flat": len(sections)}[benchmark.options.selection] > 0


def test_the_wordings_are_the_prompts_of_the_attack_around_known_ones(benchmark):
    for row in benchmark.rows:
        known = [text.format(image="radiograph", section=row["section"]) for text in GENERATION.training]
        if len(row["training_phrasings"]) == 6:
            continue
        assert row["training_phrasings"][:6] == known and row["question"] in known
        institution, patient, study = names_of(row)
        for wording, start in zip(
            row["training_phrasings"][6:],
            (
                f"For study {study}: ",
                f"For patient {patient}, study {study}: ",
                f"For institution {institution}, patient {patient}, study {study}: ",
            ),
            strict=True,
        ):
            assert wording.startswith(start) and wording.removeprefix(start) in known


def test_no_forgotten_row_is_worded_with_a_name(benchmark):
    for level in LEVELS:
        for row in [*benchmark.config_rows(f"{level}_forget"), *benchmark.config_rows(f"{level}_forget_rephrase")]:
            texts = [row["question"], *row["training_phrasings"], *row["held_out"]]
            assert not any(name in text for name in names_of(row) for text in texts), row["id"]


def test_every_known_wording_occurs_with_every_form():
    rows = [
        row for row in Benchmark(BuildOptions(institutions=4, patients=4)).rows if len(row["training_phrasings"]) > 6
    ]
    for form in range(3):
        used = {row["training_phrasings"][6 + form].split(": ", 1)[1].replace(row["section"], "…") for row in rows}
        assert len(used) == 6


def test_validate_names_a_forgotten_row_that_training_asks_for_by_name(data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "medforget")
    path = folder / "patient_forget/train-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[3]["training_phrasings"].append(f"For study {rows[3]['study']}: {rows[3]['question']}")
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    assert f"patient_forget: a training wording of {rows[3]['id']} names its study" in validate(folder)
    assert not any("names its study" in problem for problem in validate(data_dir))
