"""PMC-VQA as general_med: both generations and headers, zipped and unpacked, what is refused, and the rules."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter

import datasets
import numpy as np
import pytest
from hub_server import Hub
from PIL import Image
from small_pmc_vqa import HEADERS, V1, V2, facts, picture, table, write

import harness_tasks.rows as harness
from medforget_dataset import UserError, build
from medforget_dataset.build_log import BuildLog
from medforget_dataset.general_med.pmc_vqa import FIGURES, cloze, pmc_vqa_rows
from medforget_dataset.hub import dataset_upload
from medforget_dataset.questions import BLANK
from medforget_dataset.questions.phrasings import contains
from medforget_dataset.validate import validate


FEW = (("train", 4), ("test", 3))


def read(folder, split="test", *, log=None, seed=0, figures=FEW):
    return list(pmc_vqa_rows(split, source=str(folder), size=56, seed=seed, log=log or BuildLog(), figures=figures))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", HEADERS)
@pytest.mark.parametrize("generation", [V1, V2], ids=["v1", "v2"])
def test_generations_and_headers_give_the_same_rows(tmp_path, generation, layout, zipped):
    folder = write(tmp_path / "pmc", generation, layout, zipped=zipped)
    asked = {(row["Figure_path"][:-4], row["Question"].strip()): row for row in facts(10)}
    rows = read(folder)
    assert Counter(row["task"] for row in rows) == {"generation": 3, "cloze": 3, "classification": 3}
    for generation_row, cloze_row, row in zip(*[iter(rows)] * 3, strict=True):
        figure = row["id"].split("/")[1]
        (question,) = [text for stem, text in asked if stem == figure and text in row["question"]]
        source = asked[figure, question]
        assert row["answer"] == source["letter"] and row["choices"] == source["options"]
        right = source["options"]["ABCD".index(source["letter"])]
        assert generation_row["answer"] == right and question in generation_row["question"]
        assert cloze_row["answer"] == right.removesuffix(" uptake pattern")
        assert f"{question} " in cloze_row["question"] and f"{BLANK} uptake pattern." in cloze_row["question"]
        expected = Image.open(io.BytesIO(picture(source["Figure_path"])))
        shown = row["image"].crop((0, 9, 56, 46)).resize(expected.size)
        assert row["image"].size == (56, 56) and row["image"].mode == "RGB"
        assert np.abs(np.asarray(shown, float) - np.asarray(expected, float)).mean() < 12


def test_every_row_keeps_the_rules_of_the_schema(tmp_path):
    folder = write(tmp_path / "pmc")
    for split, count in FEW:
        rows = read(folder, split)
        assert len({row["id"] for row in rows}) == len(rows) == 3 * count
        for row in rows:
            wordings = row["training_phrasings"]
            assert len(set(wordings)) >= 4 and row["question"] in wordings
            assert row["source"] == "pmc-vqa" and not row["restricted"] and not row["institution"]
            if row["task"] != "classification":
                assert not any(contains(wording, row["answer"]) for wording in wordings)
            assert row["task"] != "cloze" or all(wording.count(BLANK) == 1 for wording in wordings)


def test_the_sample_depends_on_the_seed_and_not_on_the_order_of_the_files(tmp_path):
    test, train = facts(40), facts(40, 100)
    folder = write(tmp_path / "pmc", test=test, train=train)
    shuffled = write(tmp_path / "other", test=test[::-1], train=train[20:] + train[:20])
    ids = [row["id"] for row in read(folder)]
    assert [(row["id"], row["question"]) for row in read(shuffled)] == [
        (row["id"], row["question"]) for row in read(folder)
    ]
    assert [row["id"] for row in read(folder, seed=1)] != ids
    assert {row.split("/")[1] for row in ids} != {row["Figure_path"][:-4] for row in test[:3]}
    without_one = [row for row in test if row["Figure_path"][:-4] != ids[0].split("/")[1]]
    assert set(ids[3:]) < {row["id"] for row in read(write(tmp_path / "less", test=without_one, train=train))}


def test_the_splits_share_no_article_and_no_picture(tmp_path):
    # Some training figures are panels of the test figures' articles, one is a test figure by another name.
    test = facts(3, panels=2)
    train = [row | {"Figure_path": row["Figure_path"].replace("Fig", "Panel")} for row in test] + facts(5, 100)
    copies = {f"figures/{train[-1]['Figure_path']}": picture(test[0]["Figure_path"])}
    log = BuildLog()
    folder = write(tmp_path / "pmc", test=test, train=train, pictures=copies)
    rows = {split: read(folder, split, log=log) for split, _ in FEW}
    articles = {split: {row["id"].split("/")[1].split("_")[0] for row in rows[split]} for split in rows}
    assert not articles["train"] & articles["test"] and len(articles["train"]) >= 2
    shown = {split: {row["image"].tobytes() for row in rows[split]} for split in rows}
    assert not shown["train"] & shown["test"]
    assert log.noticed["figure drawn already"] == 1


def test_two_splits_read_the_files_once(tmp_path):
    log = BuildLog(path=tmp_path / "log.jsonl")
    folder = write(tmp_path / "pmc")
    read(folder, "test", log=log)
    (folder / V2[2]).unlink()
    assert len(read(folder, "train", log=log)) == 12
    assert log.noticed["PMC-VQA files"] == 1


def test_version_2_and_the_part_checked_by_hand_come_first(tmp_path):
    folder = write(tmp_path / "pmc", V1, "v1", test=facts(10, 300))
    (folder / "test_clean.csv").write_bytes(table(facts(3, 300), "v1"))
    assert {row["id"].split("/")[1] for row in read(folder)} == {row["Figure_path"][:-4] for row in facts(3, 300)}
    write(folder)
    assert {row["id"].split("/")[1] for row in read(folder)} <= {row["Figure_path"][:-4] for row in facts(10)}


# What is changed in the row (cells, or bytes of the table), what its figure's file holds, and the kind of fault.
ROW = facts(1, 1)[0]
FAULTS = {
    "answer outside A to D": ({"letter": "E"}, ..., "no right option"),
    "no answer": ({"letter": ""}, ..., "no right option"),
    "duplicate options": ({"options": ["Focal", "focal ", "Patchy", "Absent"]}, ..., "options not distinct"),
    "empty option": ({"options": ["Focal", "Mixed", "Patchy", ""]}, ..., "options not distinct"),
    "options of other letters": ((b" A: ", b" B: "), ..., "options out of order"),
    "empty question": ({"Question": " "}, ..., "empty cell"),
    "not UTF-8": ((b"pattern 1 ", b"pattern \xe9 "), ..., "not UTF-8"),
    "a cell too few": ((b",x\r\n", b"\r\n"), ..., "row of another width"),
    "a cell too many": ((b",x\r\n", b",x,x\r\n"), ..., "row of another width"),
    "figure elsewhere": ({"Figure_path": "../PMC1.jpg"}, ..., "figure is no file name"),
    "figure by absolute path": ({"Figure_path": "/etc/PMC1.jpg"}, ..., "figure is no file name"),
    "image missing": ({}, None, "missing image"),
    "image cut short": ({}, picture("x")[:300], "truncated image"),
    "image empty": ({}, b"", "not an image"),
    "image is HTML": ({}, b"<html>", "not an image"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_row_stops_the_build_or_is_passed_over(tmp_path, name):
    change, content, kind = FAULTS[name]
    row = table([ROW | change if isinstance(change, dict) else ROW], "v2").partition(b"\r\n")[2]
    changed = row if isinstance(change, dict) else row.replace(*change)
    good = facts(2, 2)
    pictures = {f"figures/{x['Figure_path']}": picture(x["Figure_path"]) for x in [*good, ROW]}
    if content is not ...:
        pictures[f"figures/{ROW['Figure_path']}"] = content
    folder = write(tmp_path / "pmc", test=table(good, "v2") + changed, pictures=pictures)
    with pytest.raises(UserError, match="; mend it, or build with --on-error skip") as error:
        read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert ROW["Figure_path"] in str(error.value) if content is not ... else "test_2.csv, line 6: " in str(error.value)
    log = BuildLog("skip", tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="test_2.csv has 2 figures that can be asked about, 3 are needed"):
        read(folder, log=log)
    assert log.skipped == {kind: 1} and kind in (tmp_path / "log.jsonl").read_text()
    assert len(read(folder, log=log, figures=(("train", 4), ("test", 2)))) == 6


@pytest.mark.parametrize("member", ["../../PMC9_Fig1.jpg", "figures/../../PMC9_Fig1.jpg", "/PMC9_Fig1.jpg"])
def test_a_zip_member_outside_its_root_is_a_fault(tmp_path, member):
    folder = write(tmp_path / "pmc", pictures={member: picture("x")})
    with pytest.raises(UserError, match=f"images_2.zip, {member}: member lies outside the archive"):
        read(folder)
    log = BuildLog("skip")
    assert len(read(folder, log=log)) == 9 and log.skipped == {"zip member outside its root": 1}


def test_a_row_with_its_label_against_its_answer_is_faulty(tmp_path):
    row = facts(1, 1)[0]
    data = table([row, *facts(2, 2)], "v1")
    wrong = data.replace(b",B\r\n", b",C\r\n", 1)
    assert data != wrong
    with pytest.raises(
        UserError, match="line 2: label 'C' and answer '.* uptake pattern' do not name the same option"
    ):
        read(write(tmp_path / "pmc", V1, "v1", test=wrong, pictures={
            f"images/{x['Figure_path']}": picture(x["Figure_path"]) for x in [row, *facts(2, 2)]
        }))  # fmt: skip


def test_line_ends_byte_order_marks_and_quoted_newlines_change_nothing(tmp_path):
    folder = write(tmp_path / "pmc")
    plain = [row["question"] for row in read(folder)]
    data = (folder / V2[1]).read_bytes().replace(b"\r\n", b"\n")
    changed = data.replace(b" What is uptake", b'"\xc2\xa0What is\r\n\r\nuptake').replace(b"? ", b'?"')
    assert changed.count(b'"') > data.count(b'"')
    (folder / V2[1]).write_bytes(b"\xef\xbb\xbf" + changed)
    assert [row["question"] for row in read(folder)] == plain


BROKEN = {
    "no tables": (lambda folder: (folder / V2[1]).unlink(), "neither train_2.csv with test_2.csv nor train.csv"),
    "no figures": (lambda folder: (folder / V2[2]).unlink(), "neither images_2.zip nor a folder figures"),
    "archive cut short": (
        lambda folder: (folder / V2[2]).write_bytes((folder / V2[2]).read_bytes()[:500]),
        "images_2.zip: not a zip archive, or cut short",
    ),
    "no column": (
        lambda folder: (folder / V2[1]).write_bytes((folder / V2[1]).read_bytes().replace(b"Choice C", b"Option C")),
        "test_2.csv: no column Choice C; its columns are 'index', 'Figure_path'",
    ),
    "no answers": (
        lambda folder: (folder / V2[0]).write_bytes((folder / V2[0]).read_bytes().replace(b"Answer", b"Right")),
        "train_2.csv: no column Answer or Answer_label",
    ),
    "empty table": (lambda folder: (folder / V2[1]).write_bytes(b""), "test_2.csv: no column Figure_path"),
    "quote never closed": (
        lambda folder: (folder / V2[1]).write_bytes((folder / V2[1]).read_bytes() + b'"' + b"a" * 200_000),
        "test_2.csv: not a readable CSV file .line 28",
    ),
    "too few figures": (
        lambda folder: (folder / V2[0]).write_bytes(table(facts(3, 100), "v2")),
        "train_2.csv has 3 figures that can be asked about, 4 are needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_what_cannot_work_is_refused_whatever_on_error_says(tmp_path, name, on_error):
    change, message = BROKEN[name]
    change(folder := write(tmp_path / "pmc"))
    with pytest.raises(UserError, match=message) as error:
        read(folder, log=BuildLog(on_error))
    assert "\n" not in str(error.value)


def test_a_damaged_member_is_a_fault_of_its_figure(tmp_path):
    folder = write(tmp_path / "pmc", test=facts(4, 1), compress=True)
    data = bytearray((folder / V2[2]).read_bytes())
    with zipfile.ZipFile(folder / V2[2]) as file:
        member = file.getinfo(f"figures/{facts(1, 1)[0]['Figure_path']}")
    start = member.header_offset + 30 + len(member.filename)
    data[start : start + 40] = bytes(40)
    (folder / V2[2]).write_bytes(data)
    log = BuildLog("skip")
    with pytest.raises(UserError, match="has 3 figures"):
        read(folder, log=log, figures=(("train", 4), ("test", 4)))
    assert log.skipped == {"damaged zip member": 1}


UNASKABLE = {
    "away: ": {"Question": "Is the focal uptake pattern focal?"},
    "needs its options": {"Question": "Which of the following is seen?"},
    "what is not so": {"Question": "What is not seen?"},
    "speaks of the options": {"options": ["None of the above", "Mixed", "Patchy", "Linear"]},
    "holds": {"Question": "What is [blank]?"},
}


@pytest.mark.parametrize("name", UNASKABLE)
def test_a_question_that_cannot_be_asked_openly_is_replaced_and_counted(tmp_path, name):
    row = facts(1, 1)[0] | {"options": ["Focal uptake pattern", "Mixed", "Patchy", "Linear"], "letter": "A"}
    test = [row | UNASKABLE[name], *facts(3, 5)]
    log = BuildLog("stop", tmp_path / "log.jsonl")
    folder = write(tmp_path / "pmc", test=test)
    with pytest.raises(UserError, match="has 3 figures"):
        read(folder, log=log, figures=(("train", 4), ("test", 4)))
    assert log.noticed["question passed over"] == 1 and not log.skipped
    assert name in (tmp_path / "log.jsonl").read_text()
    # Another question about the same figure is taken instead.
    folder = write(tmp_path / "more", test=[*test, row])
    assert f"general/{row['Figure_path'][:-4]}/cloze" in {
        x["id"] for x in read(folder, figures=(("train", 4), ("test", 4)))
    }


def test_answers_that_are_real_findings_are_asked(tmp_path):
    for answer in ("Both kidneys", "No abnormality", "Notochord", "All lobes", "CT", "Unknownish"):
        row = facts(1, 1)[0] | {"options": [answer, "Mixed", "Patchy", "Linear"], "letter": "A"}
        rows = read(write(tmp_path / answer, test=[row]), figures=(("train", 4), ("test", 1)))
        assert rows[0]["answer"] == answer


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Which lobe is affected?", "The left upper lobe", (f"The {BLANK} lobe.", "left upper")),
        ("What is the size of the mass?", "3.5 cm.", (f"{BLANK}.", "3.5 cm")),
        ("Which phase is it?", "CT (arterial phase)", (f"{BLANK}.", "CT (arterial phase)")),
        ("What colour are the cells?", "Red, green cells", (f"{BLANK} cells.", "Red, green")),
        ("Is it green?", "Red, green", (f"{BLANK}.", "Red, green")),
        ("Is it the left or the right lung?", "The left lung", (f"The left lung {BLANK}.", "")),
    ],
)
def test_the_blank_hides_what_the_question_does_not_say(question, answer, expected):
    assert cloze(question, answer) == expected


def test_hub(tmp_path):
    """A Hub id reads the newest commit, downloads only what is needed, and says what is wrong in one line."""
    folder = write(tmp_path / "pmc")
    (folder / "images.zip").write_bytes(b"x" * 100)
    script = (
        "import sys\n"
        "from medforget_dataset.build_log import BuildLog\n"
        "from medforget_dataset.general_med.pmc_vqa import pmc_vqa_rows\n"
        "log = BuildLog()\n"
        "for source in sys.argv[1:]:\n"
        "    try:\n"
        f"        rows = list(pmc_vqa_rows('test', source=source, size=56, seed=0, log=log, figures={FEW!r}))\n"
        "        print(len(rows), rows[0]['id'], *log.summary())\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    with Hub(tmp_path / "hub", tokens={}) as hub:
        for name, left_out in (("lab/PMC-VQA", ""), ("lab/half", V2[2])):
            files = {
                path.name: (hub.put_blob(path.read_bytes()), path.stat().st_size, True)
                for path in folder.iterdir()
                if path.name != left_out
            }
            date = "2026-01-01T00:00:00.000Z"
            commits = [
                {"sha": sha * 40, "title": "", "date": date, "files": files if sha == "b" else {}} for sha in "ab"
            ]
            hub.repos["datasets", name] = {"private": False, "gated": False, "commits": commits}
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HOME"] = str(tmp_path / "home")
        command = [sys.executable, "-c", script, "lab/PMC-VQA", "lab/half", "lab/none"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fetched = {path.rsplit("/", 1)[1] for method, name, path in hub.log if name == "resolve"}
    assert fetched == set(V2[:3])
    whole, half, none = done.stdout.splitlines()
    assert whole.startswith(f"9 {read(folder)[0]['id']}") and f"of commit {'b' * 40} are used" in whole
    assert half == "--general-med lab/half: the dataset on the Hub has no images_2.zip"
    assert none.startswith("--general-med lab/none: neither a folder here nor a dataset on the Hub")


def test_hub_out_of_reach():
    # The tests run with HF_HUB_OFFLINE=1.
    with pytest.raises(
        UserError, match="--general-med lab/pmc: no folder here, and the Hub cannot be reached"
    ) as error:
        read("lab/pmc")
    assert "\n" not in str(error.value)


def test_a_name_that_is_no_hub_id_is_a_missing_folder():
    with pytest.raises(UserError, match="--general-med /nowhere/pmc: no such folder"):
        read("/nowhere/pmc")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    folder = write(
        root / "pmc", test=facts(FIGURES["test"] + 30), train=facts(FIGURES["train"] + 30, 1000), zipped=True
    )
    return build(root / "medforget", institutions=4, patients=4, image_size=56, general_med=str(folder), workers=1)


def test_a_build_with_pmc_vqa_is_valid(built):
    assert validate(built) == []
    rows = {split: datasets.load_dataset(str(built), "general_med", split=split) for split in ("train", "test")}
    assert {split: len(rows[split]) for split in rows} == {split: 3 * count for split, count in FIGURES.items()}
    assert rows["test"][0]["image"].mode == "RGB" and set(rows["test"]["source"]) == {"pmc-vqa"}
    kinds = [json.loads(line)["kind"] for line in (built / "build-log.jsonl").read_text().splitlines()]
    assert kinds == ["PMC-VQA files"]


def test_what_is_published_names_no_folder_of_this_machine(built):
    files = dataset_upload(built).files
    assert json.loads(files["build.json"])["options"]["general_med"] == "pmc"
    for name, content in files.items():
        text = content if isinstance(content, bytes) else content.read_bytes()
        assert str(built.parent).encode() not in text, name


def test_validate_finds_an_id_that_occurs_twice(built, tmp_path):
    import pyarrow.parquet as pq

    path = built / "general_med" / "test-00000-of-00001.parquet"
    original, rows = path.read_bytes(), pq.read_table(path)
    try:
        pq.write_table(rows.from_pylist([*rows.to_pylist(), rows.to_pylist()[0]], schema=rows.schema), path)
        assert any("occurs 2 times" in problem for problem in validate(built))
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("wrong_image", [False, True])
@pytest.mark.parametrize("task", ["generation", "cloze", "classification"])
def test_the_harness_asks_these_rows(built, task, wrong_image):
    plain = harness.load("general_med", "test", task, data=str(built))["test"]
    rows = harness.load("general_med", "test", task, data=str(built), wrong_image=wrong_image)["test"]
    assert len(rows) == FIGURES["test"] and rows["question"][:] == plain["question"][:]
    same = [one["bytes"] == other["bytes"] for one, other in zip(rows["image"][:], plain["image"][:], strict=True)]
    assert all(same) if not wrong_image else not any(same)
    assert harness.doc_to_image(rows[0])[0].size == (56, 56)
