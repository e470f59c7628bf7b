"""Questions: what is hidden, what is offered, and that no question gives its answer away."""

from collections import Counter

import pytest

from medforget_dataset import BuildOptions
from medforget_dataset.benchmark import Benchmark
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import Institution, Patient, Section, Study, walk_studies
from medforget_dataset.questions import choose_clozes
from medforget_dataset.questions.classification import KINDS, OTHER, classification_question
from medforget_dataset.questions.cloze import BLANK, MAX_SHARE, candidates
from medforget_dataset.questions.phrasings import CLASSIFICATION, CLOZE, GENERATION, IDENTITY
from medforget_dataset.questions.terms import find_terms


SEEDS = (0, 1, 7, 12345)


@pytest.fixture(scope="module", params=SEEDS)
def benchmark(request):
    return Benchmark(BuildOptions(seed=request.param))


def test_cloze_answers_are_salient_balanced_and_hidden_once(benchmark):
    by_section: dict[str, Counter] = {}
    for row in benchmark.rows:
        if row["task"] != "cloze":
            continue
        assert all(wording.count(BLANK) == 1 for wording in row["training_phrasings"] + row["held_out"])
        assert find_terms(row["answer"]), row["answer"]
        by_section.setdefault(row["section"], Counter())[row["answer"].lower()] += 1
    for section, answers in by_section.items():
        assert max(answers.values()) <= MAX_SHARE * answers.total(), (section, answers.most_common(1))


def test_a_cloze_restores_a_sentence_of_its_section(benchmark):
    texts = {row["id"].rsplit("/", 1)[0]: row["answer"] for row in benchmark.rows if row["task"] == "generation"}
    for row in benchmark.rows:
        if row["task"] == "cloze":
            path = row["id"].rsplit("/", 1)[0]
            restored = row["training_phrasings"][0].split(": ", 1)[1].replace(BLANK, row["answer"])
            assert restored in texts[path]


def test_no_question_contains_its_answer(benchmark):
    for row in benchmark.rows:
        if row["task"] != "classification":
            for wording in row["training_phrasings"] + row["held_out"]:
                assert row["answer"].lower() not in wording.lower(), row["id"]


def test_section_texts_are_distinct(benchmark):
    texts = [row["answer"] for row in benchmark.rows if row["task"] == "generation"]
    assert len(set(texts)) >= 0.9 * len(texts)


def test_letters_are_balanced_and_options_constant(benchmark):
    rows = [row for row in benchmark.rows if row["task"] == "classification"]
    letters = Counter(row["answer"] for row in rows)
    assert max(letters.values()) <= 0.35 * len(rows), letters
    options = {(row["section"], tuple(row["choices"])) for row in rows}
    assert len(options) == len({section for section, _ in options})


def test_a_reader_without_the_image_can_guess_few_blanks(benchmark):
    frames: dict[str, Counter] = {}
    for row in benchmark.rows:
        if row["task"] == "cloze":
            frames.setdefault(row["training_phrasings"][0], Counter())[row["answer"]] += 1
    guessed = sum(max(answers.values()) for answers in frames.values())
    assert guessed / sum(answers.total() for answers in frames.values()) < 0.25


@pytest.mark.parametrize("phrasings", [*IDENTITY.values(), GENERATION, CLOZE, CLASSIFICATION])
def test_held_out_wordings_are_not_trained(phrasings):
    assert len(set(phrasings.training)) >= 4
    assert len(set(phrasings.held_out)) >= 1
    assert not set(phrasings.training) & set(phrasings.held_out)


@pytest.mark.parametrize(
    ("section", "text", "letter"),
    [
        ("findings", "No pneumothorax. There is a small left pleural effusion.", "B"),
        ("findings", "The lungs are clear.", "D"),
        ("findings", "Right upper lobe consolidation with a small effusion.", "A"),
        ("impression", "Small right pneumothorax.", "A"),
        ("technique", "Tube voltage 118 kVp.", "A"),
        ("technique", "Tube voltage 99 kVp.", "B"),
        ("technique", "Portable technique.", "D"),
        ("comparison", "Radiograph from 3 weeks earlier.", "C"),
        ("indication", "Shortness of breath.", "A"),
    ],
)
def test_classification_follows_the_text(section, text, letter):
    assert KINDS[section].answer(text) == letter


def test_sections_of_unknown_kinds_are_classified_too():
    assert classification_question(Section("addendum", "x"))[0] is OTHER


def test_cloze_never_hides_a_word_that_its_sentence_repeats():
    clozes = candidates(Section("findings", "Pneumonia was suspected; pneumonia is likely."))
    assert [cloze.answer for cloze in clozes] == ["suspected", "likely"]


def test_a_section_with_nothing_to_hide_is_refused_by_name():
    section = Section("findings", "___ of the XXXX.")
    study = Study("study000", "s", (section,))
    tree = (Institution("inst00", "I", (Patient("pat000", "P", (study,)),)),)
    with pytest.raises(UserError, match="inst00/pat000/study000/findings"):
        choose_clozes(list(walk_studies(tree)), seed=0)
