"""What the browser's page shows and refuses, without Gradio and without a page."""

import json
import os
import shutil
import socket
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from browse_pages import make_run, put_dataset

from harness_tasks.evaluate import evaluate_checkpoint
from medforget_dataset import load
from medforget_dataset.benchmark import CONFIGS
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import LEVELS, TASKS
from medforget_dataset.writer import parquet_path
from unlearn.answers import score_dataset
from unlearn.browse import app, cards
from unlearn.browse.catalogue import Catalogue, Place, by_image
from unlearn.browse.exposure import check_exposure, free_port
from unlearn.browse.models import Models, Question
from unlearn.browse.sources import find_restricted, open_data, open_run
from unlearn.checkpoints import load_checkpoint
from unlearn.cli import main
from unlearn.grouping import group_by_image


@pytest.fixture(scope="module")
def catalogue(data_dir):
    return Catalogue(data_dir)


def _parquet(data_dir, config, split="train"):
    return pq.read_table(data_dir / parquet_path(config, split)).to_pylist()


def test_states_are_what_the_configurations_say(catalogue, data_dir):
    for level in LEVELS:
        forget, retain = ({row["id"] for row in _parquet(data_dir, f"{level}_{s}")} for s in ("forget", "retain"))
        states = {row_id: catalogue.states(row_id)[level] for row_id in catalogue.taught}
        assert {row_id for row_id, state in states.items() if state == "forgotten"} == forget
        assert {row_id for row_id, state in states.items() if state == "retained"} == retain
        assert all(catalogue.states(f"{row_id}/rephrase")[level] == "forgotten" for row_id in forget)


def test_every_configuration_has_the_rows_of_its_files(catalogue, data_dir):
    assert catalogue.sizes["finetune"] == 960
    for config in CONFIGS:
        splits = {"general_med": ("train", "test")}.get(config, ("test",) if "rephrase" in config else ("train",))
        wanted = [row for split in splits for row in _parquet(data_dir, config, split)]
        found = catalogue.rows(Place(config))
        assert [row["id"] for row in found] == [row["id"] for row in wanted], config
        for name in ("question", "answer", "choices", "view_angle", "original_question"):
            assert [row[name] for row in found] == [row[name] for row in wanted], (config, name)


def test_the_hierarchy_is_walked_down_to_a_section(catalogue):
    place = Place()
    for level, counts in zip(LEVELS, ((4, 240), (4, 60), (4, 15), (5, 3)), strict=True):
        nodes = catalogue.children(place, level)
        assert (len(nodes), nodes[0][2]) == counts
        place = place._replace(**{level: nodes[-1][0]})
    rows = catalogue.rows(place)
    assert [row["task"] for row in rows] == ["generation", "cloze", "classification"]
    assert {row["section"] for row in rows} == {place.section}
    assert all(row["id"].startswith(place.study) for row in rows)
    # What is chosen further down does not narrow what can be chosen above.
    assert len(catalogue.children(place, "institution")) == 4
    assert [row["task"] for row in catalogue.rows(place._replace(task="cloze"))] == ["cloze"]


def test_general_med_has_images_and_no_hierarchy(catalogue):
    place = Place("general_med")
    assert catalogue.children(place, "institution") == catalogue.children(place, "patient") == []
    images = catalogue.children(place, "study")
    assert len(images) == len(by_image(catalogue.rows(place))) > 100
    row = catalogue.rows(place._replace(study=images[0][0]))[0]
    assert catalogue.states(row["id"]) == {}
    page = cards.study(catalogue, [row], "Image 1")
    assert row["answer"] in page and "mf-chip" not in page and "<figure>" in page


def test_images_are_those_of_the_rows(catalogue, data_dir):
    for config in ("finetune", "patient_forget_rephrase", "general_med"):
        split = "train" if config == "finetune" else "test"
        for row in _parquet(data_dir, config, split)[::97]:
            assert catalogue.image(catalogue.row(row["id"])) == row["image"]["bytes"]
            if "rephrase" in config:
                assert catalogue.turned(catalogue.row(row["id"])).angle == row["view_angle"]


def test_a_card_has_all_that_a_row_says(catalogue):
    row = next(row for row in catalogue.rows(Place("study_forget")) if row["task"] == "classification")
    shown = cards.card(catalogue, row)
    assert row["question"] in shown and catalogue.rephrased[row["id"]]["question"] in shown
    assert all(f") {choice}" in shown for choice in row["choices"])
    right = row["choices"]["ABCD".index(row["answer"])]
    assert f"<b>{row['answer']}) {right} ✓</b>" in shown
    for level, state in catalogue.states(row["id"]).items():
        assert cards.chip(level, state) in shown
    assert 'mf-forgotten" data-level="study"' in shown


def test_what_a_row_says_cannot_become_markup(catalogue):
    row = next(iter(catalogue.taught.values())) | {"question": "<script>x</script>", "answer": '"><img src=x>'}
    shown = cards.card(catalogue, row)
    assert "<script" not in shown and "<img" not in shown and "&lt;script&gt;" in shown


def test_nothing_chosen_says_what_to_do(catalogue):
    place = Place("section_forget", task="identity")
    assert catalogue.rows(place) == []
    assert "No row matches" in cards.study(catalogue, [], "")


def test_a_damaged_file_is_named(data_dir, tmp_path):
    folder = tmp_path / "medforget"
    shutil.copytree(data_dir, folder)
    path = folder / parquet_path("patient_retain", "train")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"patient_retain/train.*cut short"):
        Catalogue(folder).states("x")


def test_restricted_is_found_in_the_record_and_in_any_row(data_dir, tmp_path):
    assert not Catalogue(data_dir).is_restricted
    folder = shutil.copytree(data_dir, tmp_path / "medforget")
    record = json.loads((folder / "build.json").read_text())
    (folder / "build.json").write_text(json.dumps(record | {"restricted": True}))
    assert Catalogue(folder).is_restricted
    (folder / "build.json").write_text(json.dumps(record))
    file = folder / parquet_path("study_forget_rephrase", "test")
    table = pq.read_table(file)
    marks = pa.array([False] * (len(table) - 1) + [True])
    pq.write_table(table.set_column(table.column_names.index("restricted"), "restricted", marks), file)
    assert Catalogue(folder).is_restricted


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"host": "127.0.0.1", "share": True}, "--share"),
        ({"host": "0.0.0.0", "share": False}, "--host 0.0.0.0"),
        ({"host": "ward-pc", "share": False}, "--host ward-pc"),
        ({"host": "127.0.0.1", "share": False, "on_space": True}, "a Space cannot show it"),
    ],
)
def test_restricted_stays_on_this_machine(arguments, named):
    check_exposure([], **arguments)
    with pytest.raises(UserError, match="data use agreement") as refused:
        check_exposure(["runs/x/vanilla"], **arguments)
    assert named in str(refused.value) and "runs/x/vanilla" in str(refused.value)
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(["runs/x/vanilla"], host=host, share=False)


@pytest.fixture(scope="module")
def asked_run(report_run, tiny_checkpoint, tmp_path_factory):
    """The run's report, and one checkpoint under three names."""
    return make_run(tmp_path_factory.mktemp("asked") / "run", report_run, tiny_checkpoint)


def test_the_report_is_shown_section_by_section(asked_run):
    run = open_run(asked_run)
    report = (asked_run / "report.html").read_text()
    assert [section.anchor for section in run.sections][:2] == ["reading", "table-3"]
    assert len(run.sections) == report.count("<section id=")
    assert all(section.body in report for section in run.sections)
    assert "<table>" in run.sections[1].body and "figcaption" in run.sections[1].body
    assert run.style in report


def test_checkpoints_that_do_not_say_that_they_are_free_count_as_restricted(asked_run, data_dir):
    run = open_run(asked_run)
    assert list(run.checkpoints) == ["vanilla", "retrained-patient", "npo-patient"]
    records = [folder / "medforget.json" for folder in run.checkpoints.values()]
    said = [record.read_text() for record in records]
    for record in records:
        info = json.loads(record.read_text())
        del info["restricted"]
        record.write_text(json.dumps(info))
    unknown = find_restricted(Catalogue(data_dir), open_run(asked_run))
    assert [os.path.basename(path) for path in unknown] == list(run.checkpoints)
    for record, text in zip(records, said, strict=True):
        record.write_text(text)
    assert open_run(asked_run).restricted == []


def test_a_run_without_a_report_and_a_folder_that_is_none(asked_run, tmp_path):
    (tmp_path / "run.json").write_text((asked_run / "run.json").read_text())
    assert open_run(tmp_path).sections == []
    (tmp_path / "report.html").write_text("<section id=x>")
    with pytest.raises(UserError, match="medforget report"):
        open_run(tmp_path)
    with pytest.raises(UserError, match=r"run\.json"):
        open_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ('<b onclick="y()">z</b>', True),
        ('<b title=">" onclick="y()">z</b>', True),
        ("<svg/onload=y()>", True),
        ("<SCRIPT src=x></SCRIPT>", True),
        ('<iframe srcdoc="&lt;script&gt;"></iframe>', True),
        ('<a href="&#106;ava\tscript:y()">z</a>', True),
        ('<a href="#x" title="once = 1">one = javascript: two</a>', False),
    ],
)
def test_a_report_that_would_run_something_is_refused(text, runs, asked_run, tmp_path):
    (tmp_path / "run.json").write_text((asked_run / "run.json").read_text())
    body = f'<section id="reading" class="">\n<h2>T</h2><p>{text}</p>\n</section>'
    (tmp_path / "report.html").write_text(f"<style></style>{body}")
    if runs:
        with pytest.raises(UserError, match="holds a script"):
            open_run(tmp_path)
    else:
        assert len(open_run(tmp_path).sections) == 1


def test_answers_and_probabilities_are_those_of_the_evaluation(asked_run, tiny_checkpoint, data_dir, catalogue):
    out = asked_run.parent / "answers"
    names = [f"medforget_patient_forget_{task}" for task in TASKS]
    evaluate_checkpoint(tiny_checkpoint, data_dir, names, limit=2, output_path=out)
    lines = [json.loads(line) for name in names for line in (out / f"{name}.jsonl").read_text().splitlines()]
    model, processor = load_checkpoint(tiny_checkpoint)
    rows = load("finetune", "train", data=data_dir)
    kept = {line["id"] for line in lines}
    asked = rows.filter(lambda row_id: row_id in kept, input_columns="id")
    probed = score_dataset(model, processor, group_by_image(asked))
    models = Models({"vanilla": tiny_checkpoint})
    assert len(kept) == len(probed) == 8 and not models.is_loaded("vanilla")
    for line, score in zip(sorted(lines, key=lambda x: x["id"]), sorted(probed, key=lambda x: x["id"]), strict=True):
        row = catalogue.row(line["id"])
        reply = models.ask("vanilla", Question(row["question"], row["answer"], row["task"], catalogue.image(row)))
        assert reply.text == line["response"].strip()
        assert reply.is_right == (line.get("exact_match", line.get("acc")) == 1)
        assert (reply.log_prob, reply.tokens) == (pytest.approx(score["log_prob"], abs=1e-4), score["tokens"])
        assert reply.plain_probability == pytest.approx(reply.probability**reply.tokens)


def test_a_checkpoint_that_does_not_fit_beside_another_is_told(tiny_checkpoint, catalogue, monkeypatch):
    models, row = Models({"vanilla": tiny_checkpoint, "npo": tiny_checkpoint}), next(iter(catalogue.taught.values()))
    question = Question(row["question"], row["answer"], row["task"], catalogue.image(row))
    models.ask("vanilla", question)

    def full(folder):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("unlearn.browse.models._load", full)
    with pytest.raises(UserError, match=f"{tiny_checkpoint}: does not fit in memory beside vanilla; start again"):
        models.ask("npo", question)
    assert models.ask("vanilla", question)


def test_without_the_extra_the_command_says_one_line(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for more in ([], ["--space", str(tmp_path / "space")]):
        assert main(["browse", str(data_dir), *more]) == 2
        assert capsys.readouterr().err == "medforget browse: needs Gradio: pip install 'medforget[app]'\n"


def test_a_space_without_the_extra_says_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"app.py: needs Gradio: pip install 'medforget\[app\]'"):
        app.main()
    monkeypatch.setitem(sys.modules, "medforget_dataset.errors", None)
    with pytest.raises(SystemExit, match=r"app.py: needs MedForget and Gradio"):
        app.main()


@pytest.mark.parametrize("settings", ["{", "{}", "[]"])
def test_damaged_settings_of_a_space_are_told(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "__file__", str(tmp_path / "app.py"))
    (tmp_path / "space.json").write_text(settings)
    with pytest.raises(SystemExit, match=r"app\.py: .*space\.json is damaged"):
        app.main()


def test_a_taken_port_and_a_foreign_address_are_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: taken"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    for host, port, named in (("127.0.0.1", 0, "--port 0"), ("203.0.113.7", None, "--host 203.0.113.7")):
        with pytest.raises(UserError, match=named):
            free_port(host, port)


def test_a_dataset_of_the_hub_is_as_it_was_built(data_dir, local_hub):
    put_dataset(data_dir)
    found = open_data("alice/medforget")
    with pytest.raises(UserError, match="alice/nothing is neither"):
        open_data("alice/nothing")
    assert found.name == "alice/medforget" and found.record == Catalogue(data_dir).record
    assert len(found.rows(Place())) == 960
