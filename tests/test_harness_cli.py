"""The stock lm_eval command line, as the README gives it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager

from harness_tasks import generate


@pytest.fixture(scope="module")
def run(data_dir, tiny_checkpoint, tmp_path_factory):
    """One run of all tasks; its folder holds `output/` and the answers' cache."""
    folder = tmp_path_factory.mktemp("lm_eval")
    command = [
        *(str(Path(sys.executable).with_name("lm_eval")), "--model", "hf-multimodal"),
        *("--model_args", f"pretrained={tiny_checkpoint}", "--include_path", str(generate.FOLDER)),
        *("--tasks", "medforget_*", "--apply_chat_template", "--batch_size", "64", "--limit", "2"),
        *("--log_samples", "--output_path", str(folder / "output"), "--use_cache", str(folder / "answers")),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MEDFORGET_DIR")}
    # data_dir is named "medforget": from its parent it is found without being named.
    done = subprocess.run(
        command, cwd=data_dir.parent, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(run):
    (path,) = run.glob("output/*/results_*.json")
    return json.loads(path.read_text())


def test_all_78_tasks_run_to_the_end(results):
    assert set(results["results"]) == {leaf.name for leaf in generate.LEAVES}
    assert {count["effective"] for count in results["n-samples"].values()} == {2}
    for scores in results["results"].values():
        numbers = {name for name in scores if name.endswith(",none") and "stderr" not in name} - {"judge,none"}
        values = [scores[name] for name in numbers]
        assert values and all(0 <= value <= 1 for value in values)


def test_samples_are_logged_without_images(run):
    paths = list(run.glob("output/*/samples_*.jsonl"))
    assert len(paths) == 78
    for path in paths:
        first, second = map(json.loads, path.read_text().splitlines())
        assert first["doc"]["id"] != second["doc"]["id"]
        assert len(first["doc"]["image"]["bytes"]) == 64  # a hash
        assert first["target"] == first["doc"]["answer"]


def test_samples_of_an_attack_show_the_whole_prompt(run):
    for level in generate.LEVELS:
        (path,) = run.glob(f"output/*/samples_medforget_{level}_attack_institution_*.jsonl")
        for sample in map(json.loads, path.read_text().splitlines()):
            doc = sample["doc"]
            prompt = (
                f"For institution {doc['institution']}, patient {doc['patient']}, study {doc['study']}: "
                f"{doc['original_question']}"
            )
            assert doc["question"] == prompt
            assert prompt in sample["arguments"]["gen_args_0"]["arg_0"]


def test_a_second_run_answers_from_the_cache(run, results, data_dir, tiny_checkpoint, monkeypatch):
    def nothing_left_to_ask(*_, **__):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(HFMultimodalLM, "generate_until", nothing_left_to_ask)
    arguments = {"pretrained": str(tiny_checkpoint)}
    metadata = arguments | {"data": str(data_dir)}
    again = lm_eval.simple_evaluate(
        model="hf-multimodal",
        model_args=arguments,
        tasks=["medforget_patient_forget", "medforget_general_med"],
        task_manager=TaskManager(include_path=str(generate.FOLDER), include_defaults=False, metadata=metadata),
        batch_size=64,
        device="cpu",
        limit=2,
        apply_chat_template=True,
        use_cache=str(run / "answers"),
        log_samples=False,
        bootstrap_iters=0,
    )
    assert len(again["results"]) == 9
    for task, scores in again["results"].items():
        expected = results["results"][task]
        assert {name: value for name, value in scores.items() if "stderr" not in name} == {
            name: value for name, value in expected.items() if "stderr" not in name
        }
