"""Reports as hospitals write them: every section can be asked without a leak, and is read as it is meant."""

import random

import pytest
from hospital_files import sections

from medforget_dataset.hierarchy import Institution, Patient, Section, Study, walk_studies
from medforget_dataset.questions import BLANK, can_be_asked, study_rows, template_questions
from medforget_dataset.questions.cloze import candidates
from medforget_dataset.questions.hospital import KINDS, LENGTH, hospital_question
from medforget_dataset.questions.negation import first_affirmed
from medforget_dataset.questions.terms import STOP_WORDS
from medforget_dataset.validate import _row_problems


TEXTS = [
    ("examination", "CHEST (PA AND LAT)"),
    ("examination", "CHEST (PORTABLE AP)"),
    ("examination", "DX CHEST PORT LINE/TUBE PLCMT 3 EXAMS"),
    ("examination", "Chest."),
    ("examination", "XR"),
    ("indication", "___ year old woman with cough // eval for PNA"),
    ("indication", "___F with h/o CHF, p/w SOB x3 days"),
    ("indication", "Hypoxia."),
    ("indication", "XXXX-year-old male, XXXX"),
    ("indication", "Preop"),
    ("technique", "Chest PA and lateral"),
    ("technique", "Portable semi-upright radiograph of the chest."),
    ("comparison", "None."),
    ("comparison", "___"),
    ("comparison", "Chest radiograph ___, CT chest ___."),
    ("comparison", "XXXX, XXXX"),
    ("findings", "PA and lateral views provided. There is no focal consolidation, effusion, or pneumothorax."),
    ("findings", "Cardiomediastinal silhouette is unremarkable. Lungs are clear. Bony structures are intact."),
    ("findings", "NG TUBE TIP IS IN THE STOMACH. LUNG VOLUMES ARE LOW. NO PNEUMOTHORAX."),
    ("findings", "Heart size is normal; the aorta is tortuous. There are {calcified} granulomas [see series 3]."),
    ("findings", "1. 2. 3."),
    ("findings", "12 mm, 14 mm, 3.5 cm"),
    ("findings", "word " * 4000),
    ("findings", "No no no."),
    ("findings", "As above."),
    ("findings", "See the impression section for the missing words; complete the blank image."),
    ("impression", "No acute cardiopulmonary process."),
    ("impression", "Normal."),
    ("impression", "No change."),
    ("impression", "1. Right PICC with tip in the low SVC.\n2. Unchanged small left effusion."),
    ("impression", "AP chest compared to ___ at 5:28 a.m.: Mild edema has cleared."),
    ("notification", "Discussed by Dr. ___ with Dr. ___ by telephone at 3:15 pm, 5 minutes after discovery."),
    ("recommendation", "Follow up chest radiograph in 6 weeks to document resolution."),
    ("clinical_history", "58 y/o M, ESRD on HD"),
    ("gross_description", "Received in formalin is a 3.2 x 2.1 cm ellipse of tan skin."),
    ("microscopic_diagnosis", "Adenocarcinoma, moderately differentiated, margins free."),
    ("befund", "Kein Nachweis eines Pleuraergusses. Das Herz ist grenzwertig groß."),
    ("befund", "Rechtsseitige Verschattung im Unterfeld."),
    ("conclusion", "Scoliose dorsale sans fracture."),
    ("narrative", "I have personally reviewed the images for this examination and agree with the report."),
    ("summary", "4-POSSIBLE SIGNIFICANT ABNORMALITY/CHANGE, MAY NEED ACTION"),
    ("findings", "Ä"),
    ("findings", "心影增大。"),
]  # fmt: skip
NOT_ASKABLE = {"___", "XXXX, XXXX", "No no no.", "As above.", "word " * 4000}


def rows_of(*own: Section) -> list[dict]:
    tree = (Institution("inst00", "Elm Hospital", (Patient("pat000", "A B", (Study("study000", "s_1", own),)),)),)
    nodes = list(walk_studies(tree))
    questions = template_questions(nodes, 0, rendered=False)
    return [row for node in nodes for row in study_rows(node, questions, image="radiograph", seed=0, **MARKS)]


MARKS = {"restricted": False, "source": "test"}


@pytest.mark.parametrize(("key", "text"), TEXTS)
def test_every_section_is_asked_or_told_apart_beforehand(key, text):
    section = Section(key, " ".join(text.split()))
    if text in NOT_ASKABLE:
        assert not can_be_asked(section)
        return
    assert can_be_asked(section)
    rows = rows_of(section)
    assert len(rows) == 6
    assert list(_row_problems(rows, restricted=False)) == []
    cloze = next(row for row in rows if row["task"] == "cloze")
    assert cloze["answer"].lower() not in STOP_WORDS and "___" not in cloze["answer"]
    assert cloze["question"].count(BLANK) == 1


def test_word_salads_never_fail_leak_or_hide_grammar():
    rng = random.Random(5)
    words = [*sorted(STOP_WORDS)[:60], "effusion", "left", "___", "XXXX", "3", "2.1", "no", "cm", "//", "Dr.", "(PA)"]
    words += [
        "section",
        "blank",
        "image",
        "words",
        "complete",
        "radiograph",
        "findings",
        "e.g.",
        "x-ray",
        "{",
        "}",
        "%s",
    ]
    askable = 0
    for _ in range(400):
        text = " ".join(rng.choices(words, k=rng.randrange(1, 14))) + rng.choice([".", "", "!", " ;"])
        section = Section(rng.choice(["findings", "impression", "examination", "odd_one"]), text)
        if not can_be_asked(section):
            continue
        askable += 1
        rows = rows_of(section)
        assert list(_row_problems(rows, restricted=False)) == [], text
        assert rows[4]["answer"].lower() not in STOP_WORDS
    assert askable > 200


def test_a_blank_in_the_text_itself_is_refused():
    assert candidates(Section("findings", f"A small {BLANK} effusion.")) == []


AFFIRMED = "effusion|pneumothorax|consolidation|nodule|edema|pneumonia|opacity"


@pytest.mark.parametrize(
    ("sentence", "finding"),
    [
        ("There is a small effusion.", "effusion"),
        ("No effusion.", None),
        ("No focal consolidation, pleural effusion, or pneumothorax.", None),
        ("There is no evidence of pneumothorax.", None),
        ("Lungs are clear without consolidation or edema.", None),
        ("Pneumothorax is not seen.", None),
        ("Effusion has resolved.", None),
        ("The previously seen nodule is no longer visible.", None),
        ("Rule out pneumonia.", None),
        ("Negative for pneumonia.", None),
        ("The lungs are free of consolidation.", None),
        ("Pneumonia is unlikely.", None),
        ("Interval resolution of the left effusion.", None),
        ("Patient denies edema.", None),
        ("No pneumothorax, but a moderate effusion.", "effusion"),
        ("No effusion; a nodule is seen.", "nodule"),
        ("No consolidation. There is edema.", "edema"),
        ("No change in the right effusion.", "effusion"),
        ("Without significant change in the opacity.", "opacity"),
        ("No interval improvement of the edema.", "edema"),
        ("Pneumonia cannot be excluded.", "pneumonia"),
        ("Cannot exclude a small effusion.", "effusion"),
        ("No pneumothorax although an effusion is present.", "effusion"),
        ("No abnormality except for a nodule.", "nodule"),
        ("The lungs are clear apart from an opacity at the base.", "opacity"),
        ("Effusion is small and pneumothorax is not present.", "effusion"),
        ("An opacity which was not seen before.", "opacity"),
        ("Not only an effusion but a nodule.", "effusion"),
        ("Neither effusion nor edema.", None),
        ("Chest tube removed, no pneumothorax.", None),
        ("Right effusion has nearly cleared.", None),
        ("There is edema and there is no effusion.", "edema"),
        ("Edema, effusion and opacity have all worsened.", "edema"),
        ("Absence of consolidation.", None),
        ("Lack of edema.", None),
        ("NO PNEUMOTHORAX IDENTIFIED.", None),
        ("LARGE EFFUSION.", "effusion"),
        ("New consolidation, not previously identified.", "consolidation"),
        ("No pneumonia. No edema. Nodule.", "nodule"),
        ("Small pneumothorax persists.", "pneumothorax"),
        ("Question of early pneumonia.", "pneumonia"),
        ("History of pneumonia.", None),
        ("Evaluate for effusion.", None),
        ("Edema has resolved; effusion remains.", "effusion"),
        ("No new opacity, however the old nodule has grown.", "nodule"),
        ("Nonspecific opacity.", "opacity"),
        ("Nothing but an effusion.", "effusion"),
        ("Known pneumothorax.", "pneumothorax"),
        ("There has been no progression of the consolidation.", "consolidation"),
        ("Possible consolidation.", "consolidation"),
        ("Pneumothorax was not appreciated on the lateral view.", None),
        ("The nodule is not calcified.", "nodule"),
        ("Opacity does not clear with cough.", "opacity"),
        ("Resolved pneumonia.", None),
        ("The lungs are clear of opacity.", None),
        ("A nodule and no effusion.", "nodule"),
        ("Consolidation without effusion.", "consolidation"),
        ("Fluid overload with edema but no effusion.", "edema"),
        ("No large effusion, no pneumothorax and no edema.", None),
        ("There is neither nodule nor opacity, while edema is mild.", "edema"),
    ],
)
def test_negation(sentence, finding):
    place = first_affirmed(sentence, AFFIRMED)
    assert (sentence[place:].lower().startswith(finding) if place is not None else None) is (True if finding else None)


@pytest.mark.parametrize(
    ("key", "text", "option"),
    [
        ("findings", "No pleural effusion or pneumothorax. Bibasilar atelectasis.", "opacity, nodule or atelectasis"),
        ("findings", "Right PICC ends in the SVC. Small effusion.", "line, tube or device"),
        ("findings", "Lungs are clear. Heart size is normal.", "none of these"),
        ("impression", "No acute cardiopulmonary process.", "none of these"),
        ("impression", "Mild pulmonary edema.", "large heart or congestion"),
        ("impression", "No pneumonia. Trace effusion.", "effusion or pneumothorax"),
        ("examination", "CHEST (PA AND LAT)", "frontal and lateral views"),
        ("examination", "CHEST (PORTABLE AP)", "portable or lying"),
        ("examination", "CT HEAD", "another way"),
        ("technique", "Single frontal view of the chest", "a single view"),
        ("comparison", "None.", "nothing"),
        ("comparison", "Chest radiograph from ___.", "another chest image"),
        ("indication", "cough and fever", "breathing"),
        ("clinical_history", "COPD", "lung disease"),
        ("notification", "Called to Dr. ___ by telephone", "by telephone"),
        ("recommendation", "Chest CT is recommended.", "a CT"),
        ("gross_description", "One sentence.", "one"),
        ("gross_description", "One. Two. Three. Four. Five.", "four or more"),
    ],
)
def test_classification_follows_what_the_text_affirms(key, text, option):
    kind, letter = hospital_question(Section(key, text))
    assert kind.options["ABCD".index(letter)] == option


def test_options_are_constant_distinct_and_decidable():
    for kind in (*KINDS.values(), LENGTH):
        assert len(set(kind.options)) == 4
    for kind in KINDS.values():
        assert kind.patterns.count("") == 1


def test_letters_of_varied_reports_are_spread():
    letters = {}
    for seed in range(400):
        for key, text in sections(seed).items():
            letters.setdefault(key, []).append(hospital_question(Section(key, text))[1])
    for key, found in letters.items():
        assert max(map(found.count, "ABCD")) < 0.75 * len(found), key
