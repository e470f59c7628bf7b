"""Partitions: counts, complements, and what forgetting a node reaches."""

import pytest

from medforget_dataset import LEVELS, BuildOptions, UserError
from medforget_dataset.benchmark import Benchmark
from medforget_dataset.partition import forget_ids


PAPER_COUNTS = {"institution": 960, "patient": 896, "study": 832, "section": 768}


@pytest.fixture(scope="module", params=["stratified", "nested", "flat"])
def benchmark(request):
    return Benchmark(BuildOptions(selection=request.param))


def test_forget_counts_are_the_papers(benchmark):
    assert len(benchmark.rows) == 3840
    assert {level: len(benchmark.forgotten(level)) for level in LEVELS} == PAPER_COUNTS


def test_retain_is_the_exact_complement(benchmark):
    for level in LEVELS:
        forget, retain = ({row["id"] for row in benchmark.config_rows(f"{level}_{x}")} for x in ("forget", "retain"))
        assert not forget & retain
        assert forget | retain == {row["id"] for row in benchmark.rows}


def test_identity_rows_above_the_forgotten_node_stay():
    benchmark = Benchmark(BuildOptions())
    for level, above in (
        ("patient", {"institution"}),
        ("study", {"institution", "patient"}),
        ("section", set(LEVELS[:3])),
    ):
        ids = benchmark.forgotten(level)
        forgotten = [row for row in benchmark.rows if row["id"] in ids]
        assert not above & {row["level"] for row in forgotten if row["task"] == "identity"}


def test_stratified_leaves_a_sibling_to_every_forgotten_node():
    benchmark = Benchmark(BuildOptions())
    for level, depth in (("patient", 2), ("study", 3), ("section", 4)):
        forget = {"/".join(id.split("/")[:depth]) for id in benchmark.forgotten(level) if len(id.split("/")) > depth}
        parents = {node.rsplit("/", 1)[0] for node in forget}
        everything = {"/".join(row["id"].split("/")[: depth - 1]) for row in benchmark.rows}
        assert parents == everything
        siblings = {"/".join(row["id"].split("/")[:depth]) for row in benchmark.rows} - forget
        assert {node.rsplit("/", 1)[0] for node in siblings} == everything


def test_nested_levels_lie_in_each_other():
    benchmark = Benchmark(BuildOptions(selection="nested"))
    section, study, patient, institution = (benchmark.forgotten(level) for level in reversed(LEVELS))
    assert section < study < patient < institution


def test_flat_ignores_the_hierarchy():
    benchmark = Benchmark(BuildOptions(selection="flat"))
    studies = {"/".join(id.split("/")[:3]) for id in benchmark.forgotten("patient")}
    assert len(studies) > 200


def test_another_seed_forgets_other_nodes():
    assert Benchmark(BuildOptions(seed=0)).forgotten("patient") != Benchmark(BuildOptions(seed=1)).forgotten("patient")


@pytest.mark.parametrize("count", [0, 3, 6, -4])
@pytest.mark.parametrize("name", ["institutions", "patients", "studies", "sections"])
def test_counts_that_a_quarter_does_not_divide_are_refused(name, count):
    with pytest.raises(UserError, match=f"--{name} {count}"):
        BuildOptions(**{name: count})


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"selection": "random"}, "random"),
        ({"corpus": "nowhere"}, "nowhere"),
        ({"image_size": 8}, "8"),
        ({"seed": -1}, "-1"),
    ],
)
def test_unknown_values_are_named(kwargs, named):
    with pytest.raises(UserError, match=named):
        BuildOptions(**kwargs)


def test_unknown_level_is_named():
    with pytest.raises(UserError, match="ward"):
        forget_ids("ward", [], (), selection="flat", seed=0)
