"""Measures from scores against naive loops, formulas of papers, scipy and scikit-learn."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from medforget_dataset import LEVELS, BuildOptions, UserError
from medforget_dataset.benchmark import Benchmark
from unlearn.measures.cascade import cascade, relations
from unlearn.measures.comparison import auc, bootstrap_auc, forget_quality, privacy_leak
from unlearn.measures.extraction import answer_probability, exact_memorisation, extraction_strength, min_k
from unlearn.measures.intervals import bootstrap_difference, bootstrap_mean, study_draws


def clustered(rng, studies=60, rows=10, spread=1.0):
    """Values with mean 0 whose rows share what their study has."""
    names = np.repeat([f"study{i:03d}" for i in range(studies)], rows)
    return np.repeat(rng.normal(0, spread, studies), rows) + rng.normal(0, 1, studies * rows), names


def test_interval_over_studies_covers_the_mean_and_one_over_rows_does_not():
    rng = np.random.default_rng(0)
    covered, covered_by_rows, wider = [], [], []
    for _ in range(300):
        values, studies = clustered(rng)
        interval = bootstrap_mean(values, studies)
        by_rows = bootstrap_mean(values, np.arange(len(values)), draws=300)
        covered.append(interval.low <= 0 <= interval.high)
        covered_by_rows.append(by_rows.low <= 0 <= by_rows.high)
        wider.append(interval.high - interval.low > by_rows.high - by_rows.low)
    assert 0.91 < np.mean(covered) < 0.98
    assert np.mean(covered_by_rows) < 0.7
    assert all(wider)


def resampled(draw, values, studies, names):
    """The values of one draw of studies, row by row."""
    return [value for times, name in zip(draw, names, strict=True) for value in list(values[studies == name]) * times]


def test_mean_and_difference_are_those_of_rows_resampled_one_by_one():
    rng = np.random.default_rng(1)
    values, studies = clustered(rng, studies=8, rows=3)
    values, studies = values[:-2], studies[:-2]  # studies of different size
    others, other_studies = values[5:] + rng.normal(0, 1, len(values) - 5), studies[5:]
    names = np.unique(studies)
    draws = study_draws(8, 200, 3).astype(int)
    assert draws.shape == (200, 8) and (draws.sum(1) == 8).all()
    means, differences = [], []
    for draw in draws:
        mean = np.mean(resampled(draw, values, studies, names))
        means.append(mean)
        differences.append(mean - np.mean(resampled(draw, others, other_studies, names)))
    own = bootstrap_mean(values, studies, draws=200, seed=3)
    both = bootstrap_difference(values, studies, others, other_studies, draws=200, seed=3)
    for interval, expected, value in (
        (own, means, values.mean()),
        (both, differences, values.mean() - others.mean()),
    ):
        assert (interval.low, interval.high) == pytest.approx(np.quantile(expected, [0.025, 0.975]))
        assert interval.value == pytest.approx(value)
    assert (own.n, own.studies, both.n, both.studies) == (22, 8, 39, 8)


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(2)
    values, studies = clustered(rng, spread=3.0)
    better = values + 0.5 + rng.normal(0, 0.1, len(values))
    paired = bootstrap_difference(better, studies, values, studies)
    unpaired = bootstrap_difference(better, studies, values, [f"other {name}" for name in studies])
    assert paired.low < 0.5 < paired.high
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


def test_missing_values_are_left_out_and_counted():
    interval = bootstrap_mean([1.0, None, 0.0, math.nan, 1.0, 0.0], list("aabbcc"))
    assert interval == replace(bootstrap_mean([1.0, 0.0, 1.0, 0.0], list("abcc")), missing=2)
    both = bootstrap_difference([1.0, None, 1.0], list("abb"), [math.nan, 0.0, 0.0], list("abb"))
    assert (both.value, both.n, both.missing) == (1.0, 4, 2)


def test_degenerate_intervals():
    equal = bootstrap_mean([0.5] * 6, list("aabbcc"))
    assert (equal.value, equal.low, equal.high) == (0.5, 0.5, 0.5)
    one = bootstrap_mean([0.0, 1.0], ["a", "a"])
    assert one.value == 0.5 and math.isnan(one.low) and math.isnan(one.high) and one.studies == 1
    empty = bootstrap_mean([None], ["a"])
    assert math.isnan(empty.value) and math.isnan(empty.low) and (empty.n, empty.missing) == (0, 1)
    one_sided = bootstrap_difference([1.0, 1.0], ["a", "b"], [], [])
    assert math.isnan(one_sided.value) and math.isnan(one_sided.high)
    # One of five studies has rows on the other side: the draws without it are left out, and nothing is said of it.
    few = bootstrap_difference([1.0, 0.0, 1.0, 0.0, 1.0], list("abcde"), [0.0], ["a"])
    assert few.value == pytest.approx(0.6) and math.isnan(few.low)
    with pytest.raises(ValueError, match="2 values, and studies for 3"):
        bootstrap_mean([1.0, 2.0], list("abc"))


def answers(seed=0, rows=50):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, rows)
    greedy = [rng.random(n) < rng.random() for n in lengths]
    return [np.log(rng.random(n)) for n in lengths], [*greedy, np.array([False, False]), np.array([True, True])]


def test_extraction_measures_are_those_of_naive_loops():
    log_probs, greedy = answers()
    for row, strength, share in zip(greedy, extraction_strength(greedy), exact_memorisation(greedy), strict=True):
        size = len(row)
        # Carlini et al.: the shortest prefix after which greedy decoding gives the whole rest.
        shortest = next(k for k in range(size + 1) if all(row[k:]))
        assert strength == pytest.approx(1 - shortest / size)
        assert share == pytest.approx(sum(bool(flag) for flag in row) / size)
        # open-unlearning stops one token earlier.
        theirs = next((k for k in range(size) if all(row[k:])), size - 1)
        assert max(strength, 1 / size) == pytest.approx(1 - theirs / size)
    assert list(extraction_strength(greedy[-2:])) == [0, 1]
    for row, mean in zip(log_probs, min_k(log_probs), strict=True):
        kept = sorted(row)[: max(1, math.floor(0.4 * len(row)))]
        assert mean == pytest.approx(sum(kept) / len(kept))
    for row, p in zip(
        log_probs, answer_probability([r.sum() for r in log_probs], [len(r) for r in log_probs]), strict=True
    ):
        assert p == pytest.approx(math.prod(math.exp(x) for x in row) ** (1 / len(row)))
    for measure in (extraction_strength, exact_memorisation, min_k):
        assert np.isnan(measure([[]])[0])


def test_auc_counts_pairs_and_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 12, 70) / 4 + 0.25, rng.integers(0, 12, 90) / 4  # many ties
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    labels = [1] * len(members) + [0] * len(others)
    assert auc(members, others) == pytest.approx(np.mean(pairs))
    assert auc(members, others) == pytest.approx(roc_auc_score(labels, [*members, *others]))
    assert auc([2, 3], [0, 1]) == 1 and auc([0, 1], [2, 3]) == 0 and auc([1, 1], [1]) == 0.5
    assert math.isnan(auc([], [1.0])) and math.isnan(auc([1.0], []))


@pytest.mark.parametrize("at_a_time", [1, 1 << 22])
def test_bootstrap_auc_is_that_of_rows_resampled_one_by_one(at_a_time, monkeypatch):
    monkeypatch.setattr("unlearn.measures.comparison.PAIRS_AT_A_TIME", at_a_time)
    rng = np.random.default_rng(0)
    members, studies = clustered(rng, studies=6, rows=4)
    others, other_studies = clustered(rng, studies=5, rows=3)
    order = rng.permutation(len(others))  # rows of a study need not stand together
    others, other_studies = others[order].round(1) - 0.5, other_studies[order]
    members = members.round(1)
    interval = bootstrap_auc(members, studies, others, other_studies, draws=100, seed=4)
    values = []
    for draw, other_draw in zip(study_draws(6, 100, 4).astype(int), study_draws(5, 100, 5).astype(int), strict=True):
        own = resampled(draw, members, studies, np.unique(studies))
        rest = resampled(other_draw, others, other_studies, np.unique(other_studies))
        values.append(roc_auc_score([1] * len(own) + [0] * len(rest), [*own, *rest]))
    assert interval.value == pytest.approx(auc(members, others))
    assert (interval.low, interval.high) == pytest.approx(np.quantile(values, [0.025, 0.975]))
    assert (interval.n, interval.studies) == (39, 11)


def test_privacy_leak():
    assert privacy_leak(0.5, 0.5) == 0
    assert privacy_leak(1.0, 0.5) == -100  # every member is recognised
    assert privacy_leak(0.0, 0.5) == 100  # every member is less probable than what was never seen
    assert math.isnan(privacy_leak(1.0, 1.0))


def test_forget_quality_is_the_largest_distance_of_the_distributions():
    rng = np.random.default_rng(0)
    own, retrained = rng.beta(2, 5, 120), rng.beta(2.5, 5, 100)
    points = np.concatenate([own, retrained])
    distance = max(abs((own <= x).mean() - (retrained <= x).mean()) for x in points)
    result = forget_quality(own, retrained)
    assert result.statistic == pytest.approx(distance)
    # Asymptotic distribution of Kolmogorov, from its series.
    root = math.sqrt(120 * 100 / 220) * distance
    expected = 2 * sum((-1) ** (j - 1) * math.exp(-2 * j**2 * root**2) for j in range(1, 50))
    assert result.p_value == pytest.approx(expected, rel=0.25)
    assert forget_quality(own, own).p_value == 1
    assert forget_quality(own, own + 1).p_value < 1e-20
    assert math.isnan(forget_quality([], own).p_value)


@pytest.fixture(scope="module")
def benchmarks():
    """The same small hospital under each selection."""
    return {
        selection: Benchmark(BuildOptions(institutions=4, patients=4, selection=selection), workers=1)
        for selection in ("stratified", "nested", "flat")
    }


# Rows of 64 studies: 3 identity rows and 12 of sections each.
EXPECTED = {
    ("stratified", "institution"): {"forgotten": 240, "sibling": 720},
    ("stratified", "patient"): {"forgotten": 16 * 14, "above": 16, "sibling": 48 * 15},
    ("stratified", "study"): {"forgotten": 16 * 13, "above": 16 * 2, "sibling": 48 * 15},
    ("stratified", "section"): {"forgotten": 64 * 3, "above": 64 * 3, "sibling": 64 * 9},
    ("nested", "institution"): {"forgotten": 240, "sibling": 720},
    ("nested", "patient"): {"forgotten": 16 * 14, "above": 16, "stranger": 720},
    ("nested", "study"): {"forgotten": 16 * 13, "above": 16 * 2, "stranger": 720},
    ("nested", "section"): {"forgotten": 16 * 12, "above": 16 * 3, "stranger": 720},
}


@pytest.mark.parametrize(("selection", "level"), EXPECTED)
def test_relations_where_nodes_are_forgotten(selection, level, benchmarks):
    rows, forgotten = benchmarks[selection].rows, benchmarks[selection].forgotten(level)
    found = relations(rows, level, forgotten)
    assert Counter(found) == EXPECTED[selection, level]
    by_id = dict(zip((row["id"] for row in rows), found, strict=True))
    assert {row_id for row_id, relation in by_id.items() if relation == "forgotten"} == forgotten
    for row in rows:
        if by_id[row["id"]] == "above":
            study = row["id"].rpartition("/")[0]
            assert row["task"] == "identity" and LEVELS.index(row["level"]) < LEVELS.index(level)
            assert any(other.startswith(f"{study}/") for other in forgotten)


@pytest.mark.parametrize("level", LEVELS)
def test_relations_where_rows_are_forgotten(level, benchmarks):
    rows, forgotten = benchmarks["flat"].rows, benchmarks["flat"].forgotten(level)
    found = dict(zip((row["id"] for row in rows), relations(rows, level, forgotten), strict=True))
    touched = {"/".join(row_id.split("/")[:3]) for row_id in forgotten}
    for row_id, relation in found.items():
        beside = "/".join(row_id.split("/")[:3]) in touched
        assert relation == ("forgotten" if row_id in forgotten else "sibling" if beside else "stranger")


def test_relations_of_other_rows(benchmarks):
    rows, forgotten = benchmarks["stratified"].rows, benchmarks["stratified"].forgotten("patient")
    # An unseen patient may have the address of a forgotten one.
    table = pd.DataFrame([*({**row, "set": "finetune"} for row in rows), *({**row, "set": "unseen"} for row in rows)])
    found = relations(table, "patient", forgotten)
    assert found[: len(rows)] == relations(rows, "patient", forgotten)
    assert set(found[len(rows) :]) == {"unseen"}
    with pytest.raises(UserError, match="1 rows that patient level forgets are not among those probed, inst09/pat0"):
        relations(rows, "patient", {"inst09/pat0/study1/patient", *forgotten})
    with pytest.raises(UserError, match="'hospital' does not exist; choose from institution"):
        relations(rows, "hospital", forgotten)


def test_cascade_has_a_cell_for_each_level_and_relation(benchmarks):
    rows, forgotten = benchmarks["stratified"].rows, benchmarks["stratified"].forgotten("patient")
    rng = np.random.default_rng(0)
    probe = pd.DataFrame(rows)[["id", "task", "level"]].assign(
        set="finetune",
        study=["/".join(row["id"].split("/")[:3]) for row in rows],
        exact=rng.random(len(rows)) < 0.7,
        log_prob=-rng.random(len(rows)),
        tokens=rng.integers(1, 9, len(rows)),
    )
    probe = pd.concat([probe, probe.assign(set="unseen", exact=False), probe.assign(set="wrong_image", exact=True)])
    cells = {(cell["level_probed"], cell["relation"]): cell for cell in cascade(probe, "patient", forgotten)}
    assert list(cells) == [
        *(("institution", relation) for relation in ("above", "sibling", "unseen")),
        *((level, relation) for level in LEVELS[1:] for relation in ("forgotten", "sibling", "unseen")),
    ]
    finetune = probe[probe["set"] == "finetune"]
    own = finetune[finetune["id"].isin(forgotten) & (finetune["level"] == "section")]
    cell = cells["section", "forgotten"]
    assert (cell["n"], cell["exact"].n, cell["exact"].studies) == (192, 192, 16)
    assert cell["exact"].value == pytest.approx(own["exact"].mean())
    assert cell["exact"].low < cell["exact"].value < cell["exact"].high
    assert cell["answer_probability"].value == pytest.approx(np.exp(own["log_prob"] / own["tokens"]).mean())
    assert all(cell["exact"].value == 0 for (_, relation), cell in cells.items() if relation == "unseen")
    assert sum(cell["n"] for cell in cells.values()) == 2 * len(rows)
