"""The lexical judge on pairs worked out by hand: what each difference costs, and what is no difference."""

import pytest

from harness_tasks.judges import Answered, JudgeSettings, get_judge
from harness_tasks.judges.findings import FINDINGS, NORMAL, Claim, claims
from harness_tasks.judges.lexical import agreement
from medforget_dataset.questions.negation import status


REPORT = "Small right pleural effusion. Left lower lobe opacity. No pneumothorax. Cardiomegaly."
# Four claims: effusion right, opacity left lower, no pneumothorax, cardiomegaly.


def mark(reference, answer):
    (found,) = get_judge(JudgeSettings()).marks([Answered("", reference, answer, True)])
    return found.value


def short(text):
    return {(claim.finding, claim.status, claim.side, *sorted(claim.places)) for claim in claims(text)}


@pytest.mark.parametrize(
    "same",
    [
        REPORT,
        REPORT.upper(),
        f"  {REPORT}\n",
        "Cardiomegaly. No pneumothorax. Opacity in the left lower lobe. Right effusion.",
        "There is no pneumothorax. The heart is enlarged. There is a small right-sided effusion, and an infiltrate at "
        "the left base.",
        f"{REPORT} {REPORT}",
        "The right effusion is large. Severe cardiomegaly. Left basilar opacities. Pneumothorax is not seen.",
    ],
)
def test_the_same_findings_have_the_highest_mark(same):
    assert mark(REPORT, same) == mark(same, REPORT) == 10


# Of |R| = 4 claims: 2 · counts / (4 + |A|).
CASES = [
    ("empty", "", 0.0),
    ("sense", "The of and. word word word", 0.0),
    ("missing", "Right effusion. Left lower lobe opacity. No pneumothorax.", 2 * 3 / 7),
    ("added", f"{REPORT} Rib fracture.", 2 * 4 / 9),
    ("negated", "No effusion. Left lower lobe opacity. No pneumothorax. Cardiomegaly.", 2 * 2.5 / 8),
    ("affirmed", "Right effusion. Left lower lobe opacity. Pneumothorax. Cardiomegaly.", 2 * 2.5 / 8),
    ("swapped", "Left effusion. Left lower lobe opacity. No pneumothorax. Cardiomegaly.", 2 * 2.5 / 8),
    ("no side", "Effusion. Left lower lobe opacity. No pneumothorax. Cardiomegaly.", 2 * 3.5 / 8),
    ("other place", "Right effusion. Left upper lobe opacity. No pneumothorax. Cardiomegaly.", 2 * 3.5 / 8),
    ("both sides", "Bilateral effusions. Left lower lobe opacity. No pneumothorax. Cardiomegaly.", 2 * 4 / 9),
    ("both ways", f"{REPORT} No effusion.", 2 * 3.5 / 9),
    ("all wrong", "No effusion. Right opacity. Pneumothorax. No cardiomegaly.", 0.0),
]


@pytest.mark.parametrize(("answer", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_each_difference_costs(answer, expected):
    assert agreement(REPORT, answer) == pytest.approx(expected)
    assert mark(REPORT, answer) == pytest.approx(1 + 9 * expected)


def test_a_contradiction_costs_more_than_an_omission_or_an_addition():
    found = {name: agreement(REPORT, answer) for name, answer, _ in CASES}
    for contradiction in ("negated", "affirmed", "swapped"):
        assert found[contradiction] < min(found["missing"], found["added"], found["no side"])
    # Also more than leaving it out and making something else up.
    assert found["swapped"] < agreement(REPORT, "Left lower lobe opacity. No pneumothorax. Cardiomegaly. Fracture.")


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        # Words that carry content: chest, pa, lateral and portable, chest.
        ("Chest, PA and lateral", "Portable chest", 2 * 1 / 5),
        ("Chest, PA and lateral", "lateral and PA chest chest", 1.0),
        ("Exposure 2.4 mAs. Grid ratio 8:1.", "Exposure 2.5 mAs. Grid ratio 8:1.", 2 * 5 / 12),
        ("Chest, PA and lateral", "Right effusion", 0.0),
        ("+", "+", 1.0),
        ("+", "-", 0.0),
        ("", "", 1.0),
    ],
)
def test_a_reference_without_findings_is_compared_by_its_words(reference, answer, expected):
    assert agreement(reference, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Effusion on the right and atelectasis on the left.", {("effusion", "present", "right"),
                                                               ("atelectasis", "present", "left")}),
        ("Left and right pleural effusions and edema.", {("effusion", "present", "left"),
                                                         ("effusion", "present", "right"), ("edema", "present", "")}),
        ("Right upper and lower lobe opacities, no effusion", {("opacity", "present", "right", "lower", "upper"),
                                                               ("effusion", "absent", "")}),
        ("Bibasilar atelectasis", {("atelectasis", "present", "left", "lower"),
                                   ("atelectasis", "present", "right", "lower")}),
        ("The lungs are clear. Heart size is normal.", {("opacity", "absent", ""), ("cardiomegaly", "absent", "")}),
        ("The heart is not enlarged.", {("cardiomegaly", "absent", "")}),
        ("The heart is mildly enlarged.", {("cardiomegaly", "present", "")}),
        ("The lungs are clear of consolidation.", {("consolidation", "absent", "")}),
        ("Cough for 3 days. Evaluate for pneumonia.", {("cough", "present", ""), ("pneumonia", "asked", "")}),
        ("History of COPD.", {("emphysema", "asked", "")}),
        ("Requested by the chest pain unit.", set()),
        ("No acute cardiopulmonary process.", {("acute process", "absent", "")}),
        ("The effusion has resolved.\nno change in the nodule", {("effusion", "absent", ""),
                                                                ("nodule", "present", "")}),
        ("Subcutaneous emphysema; 8 mm nodular opacity.", {("subcutaneous emphysema", "present", ""),
                                                           ("nodule", "present", "")}),
    ],
)  # fmt: skip
def test_claims(text, expected):
    assert short(text) == expected


def test_every_finding_is_read_as_itself():
    for finding, text in {"effusion": "pleural fluid", "mass": "metastases", "edema": "interstitial edema",
                          "gastric tube": "NG tube", "pacemaker": "ICD", "dyspnea": "shortness of breath",
                          "lung cancer": "lung cancer", "heart failure": "congestive heart failure",
                          "hilar enlargement": "hilar adenopathy", "picc": "PICC line"}.items():  # fmt: skip
        (claim,) = claims(text)
        assert claim.finding == finding or FINDINGS[claim.finding].startswith("(?:breast")
        assert claim.status == "present"
    assert set(NORMAL) <= set(FINDINGS)


def test_asked_is_neither_present_nor_absent():
    assert agreement("Evaluate for pneumonia.", "Pneumonia.") == agreement("Evaluate for pneumonia.", "Fever.") == 0
    assert agreement("Cough. Evaluate for pneumonia.", "Cough. Pneumonia.") == agreement(
        "Cough. Evaluate for pneumonia.", "Cough. Fever."
    )


def test_marks_do_not_depend_on_the_order_of_claims():
    answer = "Left upper lobe opacity. Left hilar opacity. Right effusion."
    sentences = answer.split(". ")
    assert agreement(REPORT, answer) == agreement(REPORT, ". ".join(reversed(sentences)))
    assert claims("Left nodule.") == frozenset({Claim("nodule", "present", "left", frozenset())})


@pytest.mark.parametrize(
    ("sentence", "word", "expected"),
    [
        ("No change in the left effusion.", "effusion", "present"),
        ("Cannot exclude pneumonia.", "pneumonia", "present"),
        ("No pneumothorax; the edema is unchanged.", "edema", "present"),
        ("Neither effusion nor pneumothorax is evident.", "pneumothorax", "absent"),
        ("Fracture: none.", "Fracture", "absent"),
        ("Rule out pneumonia.", "pneumonia", "asked"),
    ],
)
def test_status_of_a_finding(sentence, word, expected):
    start = sentence.index(word)
    assert status(sentence, start, start + len(word)) == expected
