"""Files of a run that are damaged, or of something else, are a line each, and the rest of the report intact."""

import json
import shutil

import pytest
from report_runs import edit, report_of, scored_methods


pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture
def run(report_run, tmp_path):
    """A run that a test may break."""
    return shutil.copytree(report_run.folder, tmp_path / "run", symlinks=True)


def _other_tasks(run):
    edit(run / "evaluation" / "npo-patient.json", lambda r: r.update(mmlu={"metrics": {"acc": 0.2}, "n": 3}, x=1))
    return "evaluation/npo-patient.json: 2 results are not of this benchmark (mmlu, x)", {"npo"}


def _relabelled(run, version):
    def relabel(results):
        for result in results.values():
            result["version"] = version

    edit(run / "evaluation" / "npo-patient.json", relabel)
    return "npo-patient.json: 22 results are of another version of the tasks", set()


def _other_version(run):
    return _relabelled(run, 1.0)


def _version_of_nobody(run):
    return _relabelled(run, 9.9)


def _damaged(run):
    (run / "evaluation" / "npo-patient.json").write_text('{"medforget_')
    return "evaluation/npo-patient.json: damaged", set()


def _cut_short(run):
    path = run / "evaluation" / "npo-patient" / "medforget_patient_forget_cloze.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    return "medforget_patient_forget_cloze.jsonl: holds 5 answers, where the evaluation counted 64", {"npo"}


def _other_means(run):
    task = "medforget_patient_forget_cloze"
    edit(run / "evaluation" / "npo-patient.json", lambda r: r[task]["metrics"].update(exact_match=0.99))
    return "exact_match of its rows is", {"npo"}


def _other_data(run):
    path = run / "evaluation" / "npo-patient" / "medforget_patient_forget_cloze.jsonl"
    path.write_text(path.read_text().replace("inst00/", "inst77/"))
    return "is not in the run's data", {"npo"}


def _stranger(run):
    shutil.copy(run / "evaluation" / "vanilla.json", run / "evaluation" / "simnpo-study.json")
    return "evaluation/simnpo-study.json: not of a checkpoint of this run", {"npo"}


def _result(run, **fields):
    results = run / "evaluation" / "npo-patient.json"
    edit(results, lambda content: content["medforget_patient_forget_generation"].update(fields))


def _rows_are_no_number(run):
    _result(run, n="many")
    return 'npo-patient.json: n is "many" and no number of rows', {"npo"}


def _rows_are_null(run):
    _result(run, n=None)
    return "npo-patient.json: n is null and no number of rows", {"npo"}


def _judges_are_a_list(run):
    _result(run, judge=["lexical"])
    return 'npo-patient.json: judge is ["lexical"] and no name', {"npo"}


def _edit_answers(run, change, kind="generation"):
    path = run / "evaluation" / "npo-patient" / f"medforget_patient_forget_{kind}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _scores_are_text(run):
    _edit_answers(run, lambda line: line.update(exact_match="yes"))
    return "forget_generation.jsonl: exact_match of a row is 'yes', which is no number", {"npo"}


def _rows_without_question(run):
    _edit_answers(run, lambda line: line.pop("question"))
    return "forget_generation.jsonl: holds lines without one of id, question, answer, response", {"npo"}


def _rows_without_response(run):
    _edit_answers(run, lambda line: line.pop("response"), "identity")
    return "forget_identity.jsonl: holds lines without one of id, question, answer, response", {"npo"}


def _relearned(run, content):
    (run / "relearning").mkdir()
    (run / "relearning" / "npo-patient.json").write_text(json.dumps(content))


def _relearning_of_numbers(run):
    _relearned(run, {"curve": [1, 2], "recovered_after": 5})
    return "relearning/npo-patient.json: not what relearning writes", {"npo"}


def _relearning_without_rows(run):
    _relearned(run, {"curve": [{"forget_exact": 0.5}]})
    return "relearning/npo-patient.json: not what relearning writes", {"npo"}


def _relearning_nan(run):
    points = [{"rows": rows, "forget_exact": 0.5, "retain_exact": 1.0} for rows in range(4)]
    points[1]["forget_exact"] = float("nan")
    _relearned(run, {"curve": points, "rows_per_minute": float("inf"), "forget_rows": 4, "examples": 2})
    return "relearning/npo-patient.json: 1 of 4 points of forget_exact are not finite numbers", {"npo"}


def _log_of_words(run):
    edit(run / "npo-patient" / "medforget.json", lambda info: info.update(log=["x"]))
    return "npo-patient/medforget.json: its log is not what training writes", {"npo"}


def _log_nan(run):
    edit(run / "npo-patient" / "medforget.json", lambda info: info["log"][-1].update(forget_loss=float("nan")))
    return "npo-patient/medforget.json: 1 of 8 points of forget_loss are not finite numbers", {"npo"}


def _unknown_method(run):
    edit(run / "run.json", lambda settings: settings["plan"]["methods"].append("forget_me_not"))
    return "run.json: method 'forget_me_not' is not one of this version", {"npo"}


def _seconds_are_text(run):
    edit(run / ".stages" / "vanilla.json", lambda stage: stage.update(seconds="x"))
    return ".stages/vanilla.json: its seconds are no number", {"npo"}


DAMAGES = [
    _other_tasks, _other_version, _version_of_nobody, _damaged, _cut_short, _other_means, _other_data, _stranger,
    _rows_are_no_number, _rows_are_null, _judges_are_a_list, _scores_are_text, _rows_without_question,
    _rows_without_response, _relearning_of_numbers, _relearning_without_rows, _relearning_nan, _log_of_words,
    _log_nan, _unknown_method, _seconds_are_text,
]  # fmt: skip


@pytest.mark.parametrize("breaks", DAMAGES)
def test_what_cannot_be_used_is_a_line_and_the_rest_is_there(run, breaks):
    line, there = breaks(run)
    report, text = report_of(run)
    assert len(report["notes"]) == 1 and line in report["notes"][0]
    assert "What could not be used" in text and report["notes"][0] in text
    assert scored_methods(report) == {"vanilla", "retrained"} | there
