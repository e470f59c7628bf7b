"""What a run does not have, or may not show, is said, and the rest of the report intact."""

import copy
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_runs import FinishedRun, edit, report_of, scored_methods

from medforget_dataset.errors import UserError
from unlearn.pipeline import write_run_report
from unlearn.report.reading import Metrics, verdict
from unlearn.report.records import Record, Records


pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture
def run(report_run, tmp_path):
    """A run that a test may break."""
    return shutil.copytree(report_run.folder, tmp_path / "run", symlinks=True)


def test_a_complete_run_has_no_notes(run):
    report, text = report_of(run)
    assert report["notes"] == [] and report["missing"] == []
    assert "could not be used" not in text
    assert (run / "report.html").read_text().count("<h2>") == 14


def test_a_failed_method_is_a_hole_with_its_reason(run):
    FinishedRun.fail(_Stages(run), "npo-patient", "step 40: the loss is no longer a number")
    report, text = report_of(run)
    assert scored_methods(report) == {"vanilla", "retrained"}
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
    assert "stage evaluate-npo-patient was not done" in report_of(run)[1]


def test_nan_scores_are_named(run):
    task = "medforget_patient_forget_cloze"
    edit(run / "evaluation" / "npo-patient.json", lambda r: r[task]["metrics"].update(exact_match=float("nan")))
    report, text = report_of(run)
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

    edit(run / "evaluation" / "npo-patient.json", means)
    report, text = report_of(run)
    ident = "score/npo-patient/patient/forget/generation/gen_score"
    record = next(record for record in report["records"] if record["id"] == ident)
    assert (record["n"], record["missing"]) == (len(lines) - 3, 3)
    assert f"3 of {len(lines)} marks missing" in text


def test_relearning_of_all_images_alone_is_shown_without_a_curve(run):
    points = [{"rows": rows, "forget_exact": rows / 4} for rows in (0, 3)]
    result = {"curve": points, "recovered_after": points[1], "forget_rows": 4, "examples": 2}
    (run / "relearning").mkdir()
    (run / "relearning" / "npo-patient-all.json").write_text(json.dumps(result))
    report, text = report_of(run)
    assert report["notes"] == [] and "Relearning was not measured" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| NPO | patient | 2 ")]
    assert "| 0.0 | 75.0 |" in row and "figures/relearning" not in text


@pytest.mark.parametrize("plan", [None, [], {"levels": ["patient"]}, {"levels": [], "methods": ["npo"]}])
def test_a_run_without_a_plan_is_refused_in_a_line(run, plan):
    edit(run / "run.json", lambda settings: settings.update(plan=plan))
    with pytest.raises(UserError, match=r"run\.json: has no plan with levels and methods"):
        write_run_report(run)


def test_probabilities_that_are_nan_are_counted_and_named(report_run, run):
    own = copy.copy(report_run)
    own.folder, own.stages = run, dict(report_run.stages)
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
    report, text = report_of(run)
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

    edit(run / "evaluation" / "npo-patient.json", judged)
    report, text = report_of(run)
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
        edit(path, older)
    report, text = report_of(run)
    assert report["notes"] == []
    assert all("low" not in record for record in report["records"] if record["measure"] in ("score", "gap"))
    assert "no answers of single rows" in text
    assert "ROUGE-L is shown for Gen" in text
    assert "<sub>10.99</sub>" in text  # the paper's ROUGE-L of NPO at patient level, not its Gen


def test_restricted_data_is_said_at_the_top(run):
    (run / "npo-patient" / "medforget.json").write_text(json.dumps({"restricted": True}))
    report_of(run)
    page = (run / "report.html").read_text()
    assert 0 < page.index("made with restricted data") < page.index("<nav")
    assert (run / "report.md").read_text().index("made with restricted data") < 200


def test_without_its_data_the_report_says_so(run):
    (run / "medforget").unlink()
    report, text = report_of(run)
    assert scored_methods(report) == {"vanilla", "retrained", "npo"}
    assert "not a MedForget dataset" in text and "treat this report as if it were" in text


def test_probes_without_their_data_are_not_said_to_be_absent(run):
    assert "No checkpoint of this run was probed" in report_of(run)[1]
    (run / "medforget").unlink()
    (run / "probes").mkdir()
    (run / "probes" / "vanilla.parquet").touch()
    text = report_of(run)[1]
    assert "Checkpoints were probed, but the run's data cannot be read" in text
    assert "No checkpoint of this run was probed" not in text


def test_a_metric_that_nothing_says_of_has_no_reference_to_notes(run):
    task = "medforget_patient_forget_cloze"
    edit(run / "evaluation" / "npo-patient.json", lambda results: results.pop(task))
    text = report_of(run)[1]
    assert r"no exact\_match of this in evaluation/npo-patient.json" in text
    assert "see what could not be used" not in text


def test_flat_is_explained_only_where_it_is_shown(run):
    assert "“Flat”" not in report_of(run)[1]
    evaluation = run / "evaluation"
    shutil.copy(evaluation / "npo-patient.json", evaluation / "npo-patient-flat.json")
    shutil.copytree(evaluation / "npo-patient", evaluation / "npo-patient-flat")
    text = report_of(run)[1]
    assert "“Flat”: the method" in text and "NPO, flat" in text


def test_controls_are_those_that_were_asked(run):
    text = report_of(run)[1]
    assert "asked every question and shown another patient's image, in per cent" in text
    assert "shown another patient's image or" not in text


def test_answers_are_text_and_not_markup(run):
    path = run / "evaluation" / "vanilla" / "medforget_patient_forget_identity.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["response"] = "<script>alert('1')</script>"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_of(run)
    page = (run / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page


def test_an_attack_that_vanilla_does_not_answer_is_uninformative(run):
    text = report_of(run)[1]
    assert "uninformative where the vanilla model itself scores under 50 %: patient level with the study's" in text


def test_an_attack_that_vanilla_was_not_asked_tells_nothing(run):
    def not_asked(results):
        for task in [task for task in results if "_attack_" in task]:
            del results[task]

    edit(run / "evaluation" / "vanilla.json", not_asked)
    text = report_of(run)[1]
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
