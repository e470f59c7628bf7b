"""`medforget eval`: lm_eval with our model class."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from harness_tasks.evaluate import TASKS_FOLDER, evaluate_checkpoint
from harness_tasks.vlm import MedForgetVLM
from medforget_dataset.errors import UserError
from unlearn.cli import main


TASKS = ["medforget_patient", "medforget_general_med"]
LIMIT = 4


@pytest.fixture
def command(data_dir, tiny_checkpoint, tmp_path):
    """Arguments of an evaluation after the interpreter, whose results go to a folder `out`."""
    arguments = ["-m", "unlearn.cli", "eval", "--tasks", *TASKS, "--limit", str(LIMIT)]
    arguments += [
        "--model_args",
        f"pretrained={tiny_checkpoint},dtype=float32",
        "--output_path",
        str(tmp_path / "out"),
    ]
    return [*arguments, "--metadata", f"data={data_dir}"]


def start(command):
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results_of(command, folder):
    """What an evaluation wrote, and what it printed."""
    run = start(command)
    printed, log = run.communicate(timeout=300)
    assert run.returncode == 0, log[-3000:]
    (file,) = folder.glob("out/*/results_*.json")
    return json.loads(file.read_text()), printed, log


def kept_in(database):
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as opened:
            return opened.execute("SELECT COUNT(*) FROM unnamed").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


@pytest.fixture(scope="module")
def stock(data_dir, tiny_checkpoint):
    """What lm-eval's own `hf-multimodal` scores."""
    metadata = {"data": str(data_dir), "pretrained": str(tiny_checkpoint)}
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(
        model="hf-multimodal",
        model_args={"pretrained": str(tiny_checkpoint), "dtype": "float32"},
        tasks=TASKS,
        task_manager=manager,
        limit=LIMIT,
        device="cpu",
        batch_size=16,
        apply_chat_template=True,
        bootstrap_iters=0,
    )


def scores_of(results):
    return {
        task: {name: value for name, value in scores.items() if "_stderr" not in name}
        for task, scores in results["results"].items()
    }


def assert_scores(results, stock):
    assert results["config"]["model"] == "medforget-vlm"
    assert results["n-samples"] == stock["n-samples"]
    scores = scores_of(results)
    assert scores.keys() == scores_of(stock).keys()
    for task, expected in scores_of(stock).items():
        assert scores[task] == pytest.approx(expected), task


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_scores_as_hf_multimodal(command, stock, tmp_path):
    command += ["--use_cache", str(tmp_path / "answers")]
    database = tmp_path / "answers_rank0.db"
    killed = start([*command, "--batch_size", "1"])
    deadline = time.monotonic() + 240
    while not kept_in(database) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    kept = kept_in(database)
    rows = sum(counts["effective"] for counts in stock["n-samples"].values())
    assert 0 < kept < rows
    results, _, log = results_of([*command, "--batch_size", "16"], tmp_path)
    assert_scores(results, stock)
    counts = re.search(r"Cached requests: (\d+), Requests remaining: (\d+)", log)
    assert counts
    cached, remaining = map(int, counts.groups())
    # What several tasks ask is kept once.
    assert cached >= kept and cached + remaining == rows


@pytest.mark.slow
def test_two_processes_score_as_hf_multimodal(command, stock, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    results, printed, log = results_of([*launch, *command, "--batch_size", "16"], tmp_path)
    assert_scores(results, stock)
    assert printed.count("medforget_patient_forget_cloze") == 1
    assert log.count("Running generate_until requests") == 1


def test_the_function_of_the_pipeline_scores_as_hf_multimodal(data_dir, tiny_checkpoint, stock):
    scored = evaluate_checkpoint(tiny_checkpoint, data_dir, TASKS, limit=LIMIT)
    assert scored.keys() == stock["results"].keys()
    for task, scores in scored.items():
        expected = {name: stock["results"][task][f"{name},none"] for name in scores["metrics"]}
        assert scores["metrics"] == pytest.approx(expected), task
        assert scores["n"] == stock["n-samples"][task]["effective"]


@pytest.mark.slow
def test_the_models_of_lm_eval_stay_known():
    program = (
        "from harness_tasks.cli import register_model; from lm_eval.api.registry import get_model; register_model(); "
        "print(get_model('hf-multimodal').__name__, get_model('medforget-vlm').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["HFMultimodalLM", "MedForgetVLM"], done.stderr[-2000:]


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


@pytest.mark.parametrize("name", ["medforget_patient", "medforget", "medforget_patient_forget_cloze"])
def test_a_task_that_is_also_a_folder_is_a_task(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("harness_tasks.cli.cli_evaluate", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["medforget"])
    assert main(["eval", "--tasks", name, "--model", "hf-multimodal"]) == 0
    assert seen[0][:2] == ["medforget eval", "run"] and seen[0].count("--model") == 1


def without(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def adapter(**config):
    def damage(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))

    return damage


def text_model(folder):
    (folder / "processor_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


DAMAGES = {
    "no folder": (shutil.rmtree, "model: no such checkpoint folder"),
    "no config": (without("config.json"), "model: not a checkpoint: it has no config.json"),
    "no processor": (
        without("processor_config.json"),
        "model: no processor that can be read (Can't load image processor",
    ),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        "model: the processor is not this model's: its image token is ",
    ),
    "a model of text": (text_model, " but no processor of text and images; save the processor"),
    "a cut tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version":'),
        "model: no processor that can be read (",
    ),
    "an adapter without its base": (
        adapter(base_model_name_or_path="/gone/base"),
        "model: the model that this adapter belongs to: /gone/base: no such checkpoint folder",
    ),
    "an adapter of nothing": (adapter(), "adapter_config.json: does not say which model the adapter belongs to"),
    "a cut adapter": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type":'),
        "adapter_config.json: cannot be read: ",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_told_in_one_line(damage, message, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError) as told:
        MedForgetVLM(str(folder), device="cpu")
    assert message in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("chat_template.jinja", "model: the processor has no chat template; save the processor"),
        ("config.json", "model: not a checkpoint: it has no config.json"),
    ],
)
def test_the_command_tells_it_in_one_line(missing, message, data_dir, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / missing).unlink()
    monkeypatch.setattr(sys, "argv", ["medforget"])
    arguments = ["--model_args", f"pretrained={folder}", "--tasks", "medforget_patient_forget_cloze"]
    assert main(["eval", *arguments, "--metadata", f"data={data_dir}"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("medforget eval: ") and message in last


def test_rows_that_cannot_be_had_are_told(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medforget"])
    arguments = ["--model_args", f"pretrained={tiny_checkpoint}", "--tasks", "medforget_patient_forget_cloze"]
    assert main(["eval", *arguments, "--metadata", f"data={tmp_path / 'gone'}"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("medforget eval: MedForget data: ") and "gone, named by data, does not exist" in last


def test_accelerate_that_starts_one_process_for_two_is_told(monkeypatch, caplog):
    monkeypatch.setattr("harness_tasks.cli.cli_evaluate", lambda: None)
    monkeypatch.setattr(sys, "argv", ["medforget"])
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--no_python", "env"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    given = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.setenv(name, given[name])
    assert "LOCAL_RANK" not in given
    assert main(["eval", "--tasks", "medforget_patient"]) == 0
    assert "accelerate launch has started one process" in caplog.text
