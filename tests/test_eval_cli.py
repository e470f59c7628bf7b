"""`medforget eval`: lm_eval with our model class."""

import json
import os
import subprocess
import sys

import pytest

from harness_tasks.evaluate import evaluate_checkpoint
from unlearn.cli import main


TASKS = ["medforget_patient", "medforget_general_med"]


def test_scores_are_those_of_hf_multimodal(data_dir, tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "unlearn.cli", "eval", "--tasks", *TASKS, "--limit", "4", "--batch_size", "16"]
    command += ["--model_args", f"pretrained={tiny_checkpoint},dtype=float32", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--metadata", f"data={data_dir}", "--use_cache", str(tmp_path / "answers")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("out/*/results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model"] == "medforget-vlm"
    expected = evaluate_checkpoint(tiny_checkpoint, data_dir, TASKS, limit=4)
    assert expected.keys() == results["results"].keys()
    for task, scores in expected.items():
        for metric, value in scores["metrics"].items():
            assert results["results"][task][f"{metric},none"] == pytest.approx(value), (task, metric)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_is_that_of_lm_eval(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", *arguments])
    assert ended.value.code == 0
    assert "--log_samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--tasks", "medforget_dataset"], ["--limit", "1", "--tasks=x,medforget.egg-info"]]
)
def test_a_glob_that_the_shell_replaced_is_told(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("medforget_dataset", "medforget.egg-info"):
        (tmp_path / name).mkdir()
    assert main(["eval", *arguments]) == 2
    assert "the shell has replaced a glob; quote it" in capsys.readouterr().err


def test_a_tag_that_is_also_a_folder_is_a_tag(tmp_path, monkeypatch):
    (tmp_path / "medforget_patient").mkdir()
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("harness_tasks.cli.cli_evaluate", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["medforget"])
    assert main(["eval", "--tasks", "medforget_patient", "--model", "hf-multimodal"]) == 0
    assert seen[0][:2] == ["medforget eval", "run"] and seen[0].count("--model") == 1
