"""The command line: what it teaches, and what it says to mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn.cli import main
from unlearn.methods import METHODS, method_arguments


COMMANDS = "build validate push pretrain finetune unlearn sweep run report browse tasks-path".split()


def _help(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(command, capsys):
    assert command in _help(capsys)
    text = _help(capsys, command)
    assert "usage: medforget" in text
    assert main.__globals__["_COMMANDS"][command][0] in _help(capsys)
    assert len(text.split("options:")[0].splitlines()) > 3


def test_unlearn_help_lists_every_argument_of_every_method(capsys):
    text = _help(capsys, "unlearn")
    for method in METHODS:
        for name in method_arguments(method):
            assert f"--{name.replace('_', '-')}" in text


def test_the_console_script_is_installed():
    result = subprocess.run(
        [sys.executable, "-m", "unlearn.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "medforget run --preset demo" in result.stdout


def test_tasks_path_prints_a_folder_and_nothing_else(capsys):
    assert main(["tasks-path"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert Path(captured.out.removesuffix("\n"), "medforget.yaml").is_file()


MISTAKES = [
    (["build", "--institutions", "6"], "--institutions 6"),
    (["build", "--patients", "0"], "--patients 0"),
    (["build", "--sections", "8"], "--sections 8"),
    (["build", "--selection", "best"], "stratified"),
    (["build", "--corpus", "mimic"], "embedded"),
    (["build", "--image-size", "5"], "--image-size 5"),
    (["build", "--workers", "0"], "--workers 0"),
    (["build", "--seed", "-3"], "--seed -3"),
    (["validate", "nowhere"], "nowhere"),
    (["finetune", "--out", "x"], "--preset tiny"),
    (["finetune", "--out", "x", "--preset", "huge"], "tiny-robust"),
    (["pretrain", "--out", "x", "--preset", "huge"], "tiny-robust"),
    (["finetune", "--out", "x", "--preset", "tiny", "--config", "patient_forget"], "patient_retain"),
    (["finetune", "--out", "x", "--preset", "tiny", "--config", "ward"], "patient_retain"),
    (["finetune", "--out", "x", "--preset", "tiny", "--data", "nowhere"], "nowhere"),
    (["finetune", "--out", "x", "--preset", "tiny", "--set", "speed=9"], "speed=9"),
    (["unlearn", "--out", "x", "--model", "m", "--method", "magic", "--level", "patient"], "grad_diff"),
    (["unlearn", "--out", "x", "--model", "m", "--method", "npo", "--level", "ward"], "institution"),
    (
        ["unlearn", "--out", "x", "--model", "m", "--method", "npo", "--level", "patient", "--preset", "paper"],
        "--reference",
    ),
    (["unlearn", "--out", "x", "--model", "m", "--method", "npo", "--level", "patient", "--preset", "best"], "paper"),
    (["unlearn", "--out", "x", "--model", "m", "--method", "npo", "--level", "patient", "--beta", "-1"], "beta"),
    (["unlearn", "--out", "x", "--model", "m", "--method", "manu", "--level", "patient", "--beta", "1"], "beta"),
    (
        ["unlearn", "--out", "x", "--model", "m", "--method", "manu", "--level", "patient", "--max-steps", "3"],
        "--max-steps",
    ),
    (
        ["unlearn", "--out", "x", "--model", "m", "--method", "npo", "--level", "patient", "--max-steps", "-3"],
        "--max-steps",
    ),
    (["unlearn", "--out", "x", "--model", "x", "--method", "npo", "--level", "patient"], "--out x"),
    (["finetune", "--out", "x", "--preset", "tiny", "--epochs", "0"], "--epochs is 0"),
    (["finetune", "--out", "x", "--preset", "tiny", "--learning-rate", "nan"], "--learning-rate is nan"),
    (["finetune", "--out", "x", "--preset", "tiny", "--images-per-step", "0"], "--images-per-step is 0"),
    (["finetune", "--out", "x", "--preset", "tiny", "--seed", "-1"], "seed"),
    (["finetune", "--out", "x", "--preset", "tiny", "--set", "optim=magic"], "magic"),
    (["finetune", "--out", "x", "--preset", "tiny", "--set", "output_dir=y"], "output_dir"),
    (["build", "--colour", "red"], "--colour"),
    (["build", "--imagesize", "56"], "did you mean --image-size?"),
    (["run", "--preset", "demo", "--jobs", "0"], "--jobs 0"),
    (["run", "--preset", "holiday"], "demo"),
    (["run", "--preset", "demo", "--levels", "ward"], "institution"),
    (["run", "--preset", "demo", "--methods", "magic"], "npo"),
    (["report", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(
    ("argv", "named"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_that_names_it(argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["build", "--seed", "many"], ["holiday"], ["unlearn", "--method", "npo"], []])
def test_what_the_parser_refuses_is_one_line_too(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--help" in captured.err


def test_validate_exits_with_1_when_something_is_wrong(data_dir, tmp_path, capsys):
    assert main(["validate", str(data_dir)]) == 0
    copy = tmp_path / "medforget"
    copy.mkdir()
    for path in data_dir.rglob("*"):
        target = copy / path.relative_to(data_dir)
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    (copy / "study_forget" / "train-00000-of-00001.parquet").unlink()
    capsys.readouterr()
    assert main(["validate", str(copy)]) == 1
    assert "study_forget" in capsys.readouterr().err


def test_a_checkpoint_without_a_processor_is_named(data_dir, tiny_checkpoint, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_checkpoint.iterdir():
        if not path.name.startswith(("processor", "preprocessor", "tokenizer", "chat", "video")):
            (model / path.name).write_bytes(path.read_bytes())
    argv = ["unlearn", "--data", str(data_dir), "--out", str(tmp_path / "out"), "--model", str(model)]
    assert main([*argv, "--method", "npo", "--level", "patient"]) == 2
    assert str(model) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_another_version_is_named(data_dir, tmp_path, capsys):
    folder = tmp_path / "medforget"
    folder.mkdir()
    record = json.loads((data_dir / "build.json").read_text()) | {"version": "0.0.1"}
    (folder / "build.json").write_text(json.dumps(record))
    assert main(["finetune", "--data", str(folder), "--out", str(tmp_path / "x"), "--preset", "tiny"]) == 2
    assert "0.0.1" in capsys.readouterr().err
