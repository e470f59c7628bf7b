"""The Gen Score from end to end: as a metric of `evaluate`, in `evaluate_checkpoint`, and in the `lm_eval` command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from judging import judge_server
from openai_server import of_handler

from harness_tasks import generate, scores
from harness_tasks.evaluate import evaluate_checkpoint
from harness_tasks.judges import JudgeSettings, llm
from harness_tasks.judges.llm import budget
from medforget_dataset.errors import UserError
from medforget_dataset.llm import client


ROOT = Path(__file__).parents[1]
TASK = "medforget_patient_forget_generation"
METRICS = {"rouge_l", "exact_match", "exact_match_authors_code", "factuality", "gen_score"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch, tmp_path):
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("MEDFORGET_CACHE", str(tmp_path / "cache"))
    budget.cache_clear()


@of_handler
def prose(handler, fields):
    handler.complete("It is quite good.")


def answers_of(folder):
    return [json.loads(line) for line in (folder / f"{TASK}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        return evaluate.load(str(ROOT / "harness_tasks/gen_score"))


def test_the_metric_gives_what_the_tasks_give(metric):
    references = ["Left pleural effusion. No pneumothorax.", "No effusion.", "Chest, PA and lateral"]
    predictions = ["Left pleural effusion.", "", "PA chest"]
    found = metric.compute(predictions=predictions, references=references)
    docs = [{"question": "", "answer": reference} for reference in references]
    rows = [scores.generated(row, [answer]) for row, answer in zip(docs, predictions, strict=True)]
    for name in ("rouge_l", "factuality", "gen_score"):
        assert found[name] == pytest.approx(sum(row[name] for row in rows) / 3)
    assert found["judge"] == "lexical" and found["judge_failed"] == 0


def test_the_metric_asks_a_language_model(metric):
    def script(number, body):
        return prose if "vague" in body["messages"][1]["content"] else None

    with judge_server(script) as server:
        settings = {"judge": "llm", "judge_endpoint": server.url, "judge_model": "stub"}
        texts = {"references": ["No effusion."] * 3, "questions": ["What is seen?"] * 3}
        found = metric.compute(predictions=["is 8", "is 4", "vague"], **texts, **settings)
        assert {json.loads(body["messages"][1]["content"])["question"] for body in server.bodies} == {"What is seen?"}
        none = metric.compute(predictions=["vague"] * 3, **texts, **settings)
    assert found["factuality"] == pytest.approx(0.6) and found["judge_failed"] == 1 and found["judge"] == "llm:stub"
    assert none["gen_score"] is None and none["judge_failed"] == 3


def test_the_metric_takes_texts_for_restricted_and_refuses_unknown_judges(metric):
    texts = {"predictions": ["a"], "references": ["b"]}
    remote = {"judge": "llm", "judge_endpoint": "https://api.example.org/v1", "judge_model": "m"}
    with pytest.raises(UserError, match="is not this machine"):
        metric.compute(**texts, **remote)
    with pytest.raises(UserError, match="judge gpt: unknown; choose from"):
        metric.compute(**texts, judge="gpt")


def test_a_checkpoint_is_judged_lexically_by_default(data_dir, tiny_checkpoint, tmp_path):
    scored = evaluate_checkpoint(tiny_checkpoint, data_dir, [TASK], limit=4, output_path=tmp_path)[TASK]
    assert set(scored) == {"metrics", "n", "version", "judge"} and scored["judge"] == "lexical" and scored["n"] == 4
    rows = answers_of(tmp_path)
    assert set(scored["metrics"]) == METRICS
    for row in rows:
        assert set(row) == {"id", "question", "answer", "response"} | METRICS
        assert row["gen_score"] == pytest.approx(0.75 * row["factuality"] + 0.25 * row["rouge_l"])


def test_rows_without_a_mark_are_missing_and_shown(data_dir, tiny_checkpoint, tmp_path):
    seen = []

    def script(number, body):
        asked = json.loads(body["messages"][1]["content"])
        if asked["reference"] not in seen:
            seen.append(asked["reference"])
        return prose if asked["reference"] == seen[0] else lambda fields: {"score": 6, "reasoning": "ok"}

    with judge_server(script) as server:
        judge = JudgeSettings("llm", server.url, "stub", concurrency=1)
        arguments = (tiny_checkpoint, data_dir, [TASK, "medforget_patient_forget_cloze"])
        scored = evaluate_checkpoint(*arguments, limit=4, output_path=tmp_path, judge=judge)
        asked = len(server.bodies)
        assert evaluate_checkpoint(*arguments, limit=4, judge=judge) == scored
        assert len(server.bodies) == asked == 6
    of_task = scored[TASK]
    assert of_task["judge"] == "llm:stub" and of_task["missing"] == {"factuality": 1, "gen_score": 1}
    assert of_task["n"] == 4 and of_task["metrics"]["factuality"] == pytest.approx(0.6)
    rows = answers_of(tmp_path)
    assert [row["factuality"] for row in rows] == [None, 0.6, 0.6, 0.6]
    assert rows[0]["gen_score"] is None and rows[0]["rouge_l"] is not None
    marked = [row["gen_score"] for row in rows[1:]]
    assert of_task["metrics"]["gen_score"] == pytest.approx(sum(marked) / 3)
    assert "judge" not in scored["medforget_patient_forget_cloze"]


def test_without_any_mark_a_metric_is_none(data_dir, tiny_checkpoint, tmp_path):
    with judge_server(lambda number, body: prose) as server:
        judge = JudgeSettings("llm", server.url, "stub")
        scored = evaluate_checkpoint(tiny_checkpoint, data_dir, [TASK], limit=2, output_path=tmp_path, judge=judge)
    assert scored[TASK]["metrics"]["gen_score"] is None and scored[TASK]["missing"]["gen_score"] == 2
    assert "NaN" not in json.dumps(scored)


def test_an_endpoint_that_refuses_ends_the_evaluation_with_one_line(data_dir, tiny_checkpoint, tmp_path):
    with judge_server(lambda number, body: 401) as server:
        judge = JudgeSettings("llm", server.url, "stub")
        with pytest.raises(UserError, match=rf"judge_endpoint {server.url}: .*401.*2 of 2 answers have no mark") as it:
            evaluate_checkpoint(tiny_checkpoint, data_dir, [TASK], limit=2, output_path=tmp_path / "out", judge=judge)
    assert "\n" not in str(it.value) and not (tmp_path / "out").exists()


class Rows(dict):
    """Columns, as `datasets.Dataset` gives them."""

    column_names = ("restricted", "judge")

    def __getitem__(self, key):
        return self if isinstance(key, slice) else super().__getitem__(key)


def test_restricted_rows_are_refused_before_a_model_answers(monkeypatch):
    monkeypatch.setattr(llm, "_connect", lambda endpoint, folder: None)
    remote = JudgeSettings("llm", "https://api.example.org/v1", "m").metadata()
    settings = json.dumps(remote)
    rows = Rows(restricted=[False, False], judge=[settings] * 2)
    assert scores.check_judge(rows) is rows
    with pytest.raises(UserError, match="judge_endpoint https://api.example.org/v1: is not this machine"):
        scores.check_judge(Rows(restricted=[False, True], judge=[settings] * 2))
    with pytest.raises(UserError, match="judge gpt: unknown"):
        scores.check_judge(Rows(restricted=[False], judge=['{"judge": "gpt"}']))


def test_a_judge_that_is_down_is_told_before_a_model_is_loaded(data_dir, tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDFORGET_CACHE", str(tmp_path))
    monkeypatch.setattr("harness_tasks.evaluate._model", lambda *_: pytest.fail("the model was loaded"))
    with judge_server() as server:
        pass
    with pytest.raises(UserError, match=rf"judge_endpoint {server.url}: no connection"):
        evaluate_checkpoint(tiny_checkpoint, data_dir, [TASK], judge=JudgeSettings("llm", server.url, "stub"))


@pytest.mark.slow
def test_the_stock_command_shows_the_judge(data_dir, tiny_checkpoint, tmp_path):
    def script(number, body):
        return prose if number < 3 else None

    command = [sys.executable, "-m", "lm_eval", "--model", "hf-multimodal", "--include_path", str(generate.FOLDER)]
    command += ["--model_args", f"pretrained={tiny_checkpoint}", "--tasks", TASK, "--apply_chat_template"]
    command += ["--limit", "4", "--batch_size", "4", "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEDFORGET_DIR": str(data_dir)}
    with judge_server(script) as server:
        metadata = f"judge=llm,judge_endpoint={server.url},judge_model=stub,judge_concurrency=1"
        done = subprocess.run(
            [*command, "--metadata", metadata], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 4 answers have no mark: no usable reply in 3, last: not JSON" in done.stderr
    lines = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    shown = {line[5]: (line[6], line[7]) for line in lines}
    assert shown["judge"] == ("", "llm:stub") and shown["judge_failed"] == ("↓", "1")
    assert shown["factuality"] == ("↑", "0.7000")
    (file,) = tmp_path.glob("out/*/results_*.json")
    found = json.loads(file.read_text())["results"][TASK]
    assert found["judge,none"] == "llm:stub" and found["judge_failed,none"] == 1
    (file,) = tmp_path.glob("out/*/samples_*.jsonl")
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["factuality"]["factuality"] for row in logged] == [None, 0.7, 0.7, 0.7]
    assert {row["judge"] for row in logged} == {"llm:stub"}
