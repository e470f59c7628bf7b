"""What is missing, damaged, of another version or restricted: a line each, and the rest of the report intact."""

import copy
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_runs import FinishedRun

from medforget_dataset.errors import UserError
from unlearn.pipeline import write_run_report
from unlearn.report.reading import Metrics, verdict
from unlearn.report.records import Record, Records


@pytest.fixture(scope="module")
def small(data_dir, tmp_path_factory):
    """A run of one level and one method without probes."""
    return FinishedRun(tmp_path_factory.mktemp("holes") / "run", data_dir, ("patient",), ("npo",), probed=False)


@pytest.fixture
def run(small, tmp_path):
    """A copy of it that a test may break."""
    folder = tmp_path / "run"
    shutil.copytree(small.folder, folder, symlinks=True)
    return folder


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Figures take most of the time, and are drawn in the other tests."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"<svg/>"))


def _report(folder):
    write_run_report(folder)
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _methods(report):
    return {record["method"] for record in report["records"] if record["measure"] == "score"}


def test_a_complete_run_has_no_notes(run):
    report, text = _report(run)
    assert report["notes"] == [] and report["missing"] == []
    assert "could not be used" not in text
    assert (run / "report.html").read_text().count("<h2>") == 14


def test_a_failed_method_is_a_hole_with_its_reason(run):
    FinishedRun.fail(_Stages(run), "npo-patient", "step 40: the loss is no longer a number")
    report, text = _report(run)
    assert _methods(report) == {"vanilla", "retrained"}
    assert "npo-patient failed: step 40: the loss is no longer a number" in text
    assert "| NPO | patient | –<sup>a</sup>" in text


class _Stages:
    """As much of a finished run as `FinishedRun.fail` needs."""

    def __init__(self, folder):
        self.folder = folder
        self.failures = {}
        self.stages = {p.stem: json.loads(p.read_text())["seconds"] for p in (folder / ".stages").iterdir()}

    write_stages = FinishedRun.write_stages


def test_a_stage_that_was_not_reached_is_said_to_be(run):
    for path in (run / ".stages" / "evaluate-npo-patient.json", run / "evaluation" / "npo-patient.json"):
        path.unlink()
    assert "stage evaluate-npo-patient was not done" in _report(run)[1]


def test_nan_scores_are_named(run):
    task = "medforget_patient_forget_cloze"
    _edit(run / "evaluation" / "npo-patient.json", lambda r: r[task]["metrics"].update(exact_match=float("nan")))
    report, text = _report(run)
    why = f"exact_match is nan in evaluation/npo-patient/{task}.jsonl"
    assert why.replace("_", r"\_") in text
    assert [(hole["method"], hole["task"], hole["why"]) for hole in report["missing"]] == [("npo", "cloze", why)]
    assert "NaN" not in (run / "report.json").read_text()


def test_marks_that_a_judge_did_not_give_are_counted(run):
    path = run / "evaluation" / "npo-patient" / "medforget_patient_forget_generation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:3]:
        line["gen_score"] = line["factuality"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def means(results):
        metrics = results["medforget_patient_forget_generation"]["metrics"]
        for metric in ("gen_score", "factuality"):
            metrics[metric] = sum(line[metric] for line in lines[3:]) / len(lines[3:])

    _edit(run / "evaluation" / "npo-patient.json", means)
    report, text = _report(run)
    ident = "score/npo-patient/patient/forget/generation/gen_score"
    record = next(record for record in report["records"] if record["id"] == ident)
    assert (record["n"], record["missing"]) == (len(lines) - 3, 3)
    assert f"3 of {len(lines)} marks missing" in text


def _other_tasks(run):
    _edit(run / "evaluation" / "npo-patient.json", lambda r: r.update(mmlu={"metrics": {"acc": 0.2}, "n": 3}, x=1))
    return "evaluation/npo-patient.json: 2 results are not of this benchmark (mmlu, x)", {"npo"}


def _relabelled(run, version):
    def relabel(results):
        for result in results.values():
            result["version"] = version

    _edit(run / "evaluation" / "npo-patient.json", relabel)
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
    _edit(run / "evaluation" / "npo-patient.json", lambda r: r[task]["metrics"].update(exact_match=0.99))
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
    _edit(results, lambda content: content["medforget_patient_forget_generation"].update(fields))


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
    _edit(run / "npo-patient" / "medforget.json", lambda info: info.update(log=["x"]))
    return "npo-patient/medforget.json: its log is not what training writes", {"npo"}


def _log_nan(run):
    _edit(run / "npo-patient" / "medforget.json", lambda info: info["log"][-1].update(forget_loss=float("nan")))
    return "npo-patient/medforget.json: 1 of 8 points of forget_loss are not finite numbers", {"npo"}


def _unknown_method(run):
    _edit(run / "run.json", lambda settings: settings["plan"]["methods"].append("forget_me_not"))
    return "run.json: method 'forget_me_not' is not one of this version", {"npo"}


def _seconds_are_text(run):
    _edit(run / ".stages" / "vanilla.json", lambda stage: stage.update(seconds="x"))
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
    report, text = _report(run)
    assert len(report["notes"]) == 1 and line in report["notes"][0]
    assert "What could not be used" in text and report["notes"][0] in text
    assert _methods(report) == {"vanilla", "retrained"} | there


@pytest.mark.parametrize("plan", [None, [], {"levels": ["patient"]}, {"levels": [], "methods": ["npo"]}])
def test_a_run_without_a_plan_is_refused_in_a_line(run, plan):
    _edit(run / "run.json", lambda settings: settings.update(plan=plan))
    with pytest.raises(UserError, match=r"run\.json: has no plan with levels and methods"):
        write_run_report(run)


def test_probabilities_that_are_nan_are_counted_and_named(small, run):
    own = copy.copy(small)
    own.folder, own.stages = run, dict(small.stages)
    for method in ("retrained", "npo"):
        own.probe(f"{method}-patient", method, "patient")
    path = run / "probes" / "npo-patient.parquet"
    rows = pq.read_table(path).to_pylist()
    asked = [
        row for row in rows if row["set"] == "finetune" and row["id"] in {r["id"] for r in own.rows["patient_forget"]}
    ]
    asked[0]["log_prob"] = float("nan")
    for row in rows:
        if row["set"] == "rephrase_wording":
            row["log_prob"] = float("nan")
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    report, text = _report(run)
    records = {record["id"]: record for record in report["records"]}
    about = "npo-patient/patient/finetune/forget/all/answer_probability"
    for measure, missing in (("probe", 1), ("probe_gap", 1)):
        assert (records[f"{measure}/{about}"]["n"], records[f"{measure}/{about}"]["missing"]) == (
            len(asked) - 1,
            missing,
        )
    kind = {0: "generation", 1: "cloze", 2: "classification"}.get(asked[0]["task"], asked[0]["task"])
    quality = records[f"forget_quality/npo-patient/patient/finetune/forget/{kind}/ks_p_value"]
    assert quality["missing"] == 1 and 0 <= quality["value"] <= 1
    assert f"1 of {len(asked)} values missing" in text
    why = "answer_probability is nan in probes/npo-patient.parquet"
    holes = [(hole["set"], hole["why"]) for hole in report["missing"] if hole["measure"] == "probe"]
    assert holes == [("rephrase_wording", why)]


def test_judges_are_never_mixed(run):
    def judged(results):
        for result in results.values():
            result |= {"judge": "llm:deepseek-chat"} if "judge" in result else {}

    _edit(run / "evaluation" / "npo-patient.json", judged)
    report, text = _report(run)
    assert {record.get("judge") for record in report["records"] if record["metric"] == "gen_score"} == {"lexical"}
    assert "judged by llm:deepseek-chat, the others by lexical" in text
    rouge = [r for r in report["records"] if r.get("method") == "npo" and r["metric"] == "rouge_l"]
    assert rouge


def test_results_without_answers_have_no_intervals_and_say_so(run):
    for path in (run / "evaluation").iterdir():
        if path.is_dir():
            shutil.rmtree(path)

    def older(results):
        for result in results.values():
            for metric in ("gen_score", "factuality", "exact_match_authors_code"):
                result["metrics"].pop(metric, None)

    for path in (run / "evaluation").glob("*.json"):
        _edit(path, older)
    report, text = _report(run)
    assert report["notes"] == []
    assert all("low" not in record for record in report["records"] if record["measure"] in ("score", "gap"))
    assert "no answers of single rows" in text
    assert "ROUGE-L is shown for Gen" in text
    assert "<sub>10.99</sub>" in text  # the paper's ROUGE-L of NPO at patient level, not its Gen


def test_restricted_data_is_said_at_the_top(run):
    (run / "npo-patient" / "medforget.json").write_text(json.dumps({"restricted": True}))
    _report(run)
    page = (run / "report.html").read_text()
    assert 0 < page.index("made with restricted data") < page.index("<nav")
    assert (run / "report.md").read_text().index("made with restricted data") < 200


def test_without_its_data_the_report_says_so(run):
    (run / "medforget").unlink()
    report, text = _report(run)
    assert _methods(report) == {"vanilla", "retrained", "npo"}
    assert "not a MedForget dataset" in text and "treat this report as if it were" in text


def test_probes_without_their_data_are_not_said_to_be_absent(run):
    assert "No checkpoint of this run was probed" in _report(run)[1]
    (run / "medforget").unlink()
    (run / "probes").mkdir()
    (run / "probes" / "vanilla.parquet").touch()
    text = _report(run)[1]
    assert "Checkpoints were probed, but the run's data cannot be read" in text
    assert "No checkpoint of this run was probed" not in text


def test_a_metric_that_nothing_says_of_has_no_reference_to_notes(run):
    task = "medforget_patient_forget_cloze"
    _edit(run / "evaluation" / "npo-patient.json", lambda results: results.pop(task))
    text = _report(run)[1]
    assert r"no exact\_match of this in evaluation/npo-patient.json" in text
    assert "see what could not be used" not in text


def test_flat_is_explained_only_where_it_is_shown(run):
    assert "“Flat”" not in _report(run)[1]
    evaluation = run / "evaluation"
    shutil.copy(evaluation / "npo-patient.json", evaluation / "npo-patient-flat.json")
    shutil.copytree(evaluation / "npo-patient", evaluation / "npo-patient-flat")
    text = _report(run)[1]
    assert "“Flat”: the method" in text and "NPO, flat" in text


def test_controls_are_those_that_were_asked(run):
    text = _report(run)[1]
    assert "asked every question and shown another patient's image, in per cent" in text
    assert "shown another patient's image or" not in text


def test_answers_are_text_and_not_markup(run):
    path = run / "evaluation" / "vanilla" / "medforget_patient_forget_identity.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["response"] = "<script>alert('1')</script>"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _report(run)
    page = (run / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page


def test_an_attack_that_vanilla_does_not_answer_is_uninformative(run):
    text = _report(run)[1]
    assert "uninformative where the vanilla model itself scores under 50 %: patient level with the study's" in text


def test_an_attack_that_vanilla_was_not_asked_tells_nothing(run):
    def not_asked(results):
        for task in [task for task in results if "_attack_" in task]:
            del results[task]

    _edit(run / "evaluation" / "vanilla.json", not_asked)
    text = _report(run)[1]
    assert "vanilla was not asked, so nobody knows what the form tells: patient level with no identifier" in text
    assert "No form of the attack with identifiers can be read" in text
    assert "vanilla was not asked, so nobody knows what the form tells." in text.partition("## Cascade")[0]


def _records(selectivity, gap):
    records = Records()
    about = {"n": 8, "studies": 4, "checkpoint": "npo-patient", "file": "f", "method": "npo", "level": "patient"}
    for measure, split, (low, high) in (("selectivity", "", selectivity), ("gap", "forget", gap)):
        value = (low + high) / 2
        records.add(Record(measure, "acc", value, split=split, task="classification", low=low, high=high, **about))
    return records


@pytest.mark.parametrize(
    ("selectivity", "gap", "said"),
    [
        ((0.2, 0.4), (-0.1, 0.1), "near"),
        ((0.2, 0.4), (-0.3, -0.1), "over"),
        ((0.2, 0.4), (0.1, 0.3), "left"),
        ((0.0, 0.4), (-0.1, 0.1), "not"),
        ((-0.4, -0.2), (-0.1, 0.1), "not"),
    ],
)
def test_verdicts_follow_the_intervals(selectivity, gap, said):
    records = _records(selectivity, gap)
    assert verdict(records, "npo", "patient", "classification", Metrics("rouge_l").of("classification")) == said
