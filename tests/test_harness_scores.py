"""The scores of single answers, against values worked out by hand."""

import pytest

from harness_tasks import scores
from harness_tasks.judges import Answered, Awaited, JudgeSettings, Mark


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Left lower lobe", "left  lower\n lobe."),
        ("pleural effusion", " Pleural effusion .\n"),
        ("5%", "5%."),
        ("Dr. Adams", "dr. adams"),
        ("yes", "Yes!"),
    ],
)
def test_normalization_ignores_case_space_and_final_punctuation(answer, same):
    expected = {"exact_match": 1.0, "exact_match_authors_code": 1.0}
    assert scores.exact({"answer": answer}, [same]) == expected


def test_normalization_ignores_the_unicode_form():
    assert scores.exact({"answer": "caf\u00e9"}, ["cafe\u0301"])["exact_match"] == 1.0


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
    assert scores.exact({"answer": answer}, [other])["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("answer", "other", "same"),
    [
        ("effusion", "Effusions", True),
        ("portable", "portability", True),
        ("study_chest_021", "study chest 021", True),
        ("PA", "pa.", True),
        ("PA", "P.A.", False),
        ("right", "the right", False),
        ("left", "", False),
        # No letter and no digit is left to compare.
        ("+", "+", False),
    ],
)
def test_the_authors_code_takes_a_rouge_l_of_one_for_exact(answer, other, same):
    assert scores.exact({"answer": answer}, [other])["exact_match_authors_code"] == float(same)
    assert scores.chosen_text({"answer": answer}, [other]) == {"acc_authors_code": float(same)}


def test_a_letter_written_freely_is_exact_only_alone():
    assert scores.chosen_text({"answer": "B"}, ["b"]) == {"acc_authors_code": 1.0}
    assert scores.chosen_text({"answer": "B"}, ["B) Chest PA"]) == {"acc_authors_code": 0.0}


def doc(answer, **others):
    return {"question": "What do the findings say?", "answer": answer, "restricted": False, **others}


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_stems():
    # Stems: [no, pleural, effus] and [small, pleural, effus, seen]; common subsequence 2, so P = 2/4 and R = 2/3.
    result = scores.generated(doc("No pleural effusions."), ["Small pleural effusion seen"])
    assert result["rouge_l"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert result["exact_match"] == result["exact_match_authors_code"] == 0.0


def test_gen_score_is_three_quarters_factuality_and_one_quarter_rouge_l():
    # One of two claims is there: F1 = 2/3, mark 1 + 9 · 2/3 = 7; three of four words, all right: P = 1, R = 3/5.
    result = scores.generated(doc("Left pleural effusion. No pneumothorax."), ["Left pleural effusion."])
    assert result["rouge_l"] == pytest.approx(0.75) and result["factuality"] == pytest.approx(0.7)
    assert result["gen_score"] == pytest.approx(0.75 * 0.7 + 0.25 * 0.75)
    assert result["judge"] == "lexical" and "judge_failed" not in result


def test_generated_text_that_is_equal_scores_one_and_nothing_the_lowest_mark():
    ones = dict.fromkeys(("rouge_l", "exact_match", "exact_match_authors_code", "factuality", "gen_score"), 1.0)
    assert scores.generated(doc("No effusion."), ["No effusion."]) == ones | {"judge": "lexical"}
    zeros = dict.fromkeys(("rouge_l", "exact_match", "exact_match_authors_code"), 0.0)
    lowest = {"factuality": 0.1, "gen_score": pytest.approx(0.075), "judge": "lexical"}
    assert scores.generated(doc("No effusion."), [""]) == zeros | lowest


def test_choice():
    assert scores.chosen({"answer": "B"}, ["B"]) == {"acc": 1.0}
    assert scores.chosen({"answer": "B"}, ["A"]) == {"acc": 0.0}


def awaited(*marks):
    settings = JudgeSettings("llm", "http://127.0.0.1:9/v1", "m")
    items = [Awaited(settings, Answered("q", "r", "a", True), 0.4) for _ in marks]
    for item, mark in zip(items, marks, strict=True):
        item.take(Mark(mark, "why"))
    return items


def test_means_are_over_the_rows_that_have_a_mark():
    items = awaited(8, None, 4)
    assert scores.mean_factuality(items) == pytest.approx(0.6)
    assert scores.mean_gen_score(items) == pytest.approx(0.75 * 0.6 + 0.25 * 0.4)
    assert scores.count_failed(items) == 1 and scores.only_name(["llm:m"] * 3) == "llm:m"
    assert scores.mean_factuality([0.1, 0.2]) == pytest.approx(0.15)


def test_without_any_mark_there_is_no_mean():
    items = awaited(None, None)
    assert scores.mean_factuality(items) == scores.mean_gen_score(items) == "N/A" and scores.count_failed(items) == 2
