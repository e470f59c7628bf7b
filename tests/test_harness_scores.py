"""The scores of single answers, against values worked out by hand."""

import pytest

from harness_tasks import scores


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Left lower lobe", "left  lower\n lobe."),
        ("pleural effusion", " Pleural effusion .\n"),
        ("5%", "5%."),
        ("Dr. Adams", "dr. adams"),
        ("caf\u00e9", "cafe\u0301"),
        ("yes", "Yes!"),
    ],
)
def test_normalization_ignores_case_space_final_punctuation_and_unicode_form(answer, same):
    assert scores.exact({"answer": answer}, [same]) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ("PA", "portable"),
        ("PA", "P.A."),
        ("effusion", "effusions"),
        ("portable", "portability"),
        ("study_021", "study 021"),
        ("1.5 cm", "15 cm"),
        ("right", "the right"),
        ("-3", "3"),
        ("m\u00b2", "m2"),
        ("left", ""),
        ("+", ""),
        ("?", "."),
    ],
)
def test_different_words_never_match(answer, other):
    assert scores.exact({"answer": answer}, [other]) == {"exact_match": 0.0}


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_stems():
    # Stems: [no, pleural, effus] and [small, pleural, effus, seen]; common subsequence 2, so P = 2/4 and R = 2/3.
    result = scores.generated({"answer": "No pleural effusions."}, ["Small pleural effusion seen"])
    assert result == {"rouge_l": pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)), "exact_match": 0.0}


def test_generated_text_that_is_equal_scores_one():
    assert scores.generated({"answer": "No effusion."}, ["No effusion."]) == {"rouge_l": 1.0, "exact_match": 1.0}
    assert scores.generated({"answer": "No effusion."}, [""]) == {"rouge_l": 0.0, "exact_match": 0.0}


def test_choice():
    assert scores.chosen({"answer": "B"}, ["B"]) == {"acc": 1.0}
    assert scores.chosen({"answer": "B"}, ["A"]) == {"acc": 0.0}
