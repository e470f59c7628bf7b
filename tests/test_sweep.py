"""Sweeps: what a file means, what it is refused for, and that cells run once, fail alone and go on after a kill."""

import argparse
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medforget_dataset import LEVELS, TASKS
from medforget_dataset.errors import UserError
from unlearn.cli import main
from unlearn.stages import Run
from unlearn.sweep import add_arguments, run_command
from unlearn.sweep_grid import read_grid
from unlearn.sweep_table import Outcome, selectivity, write_tables


METHODS = """
  npo: {max_steps: 1, learning_rate: 1e-4, use_peft: [false, true], lora_target_modules: nothing}
  manu: {alpha: 1}
"""
"""Three cells. A LoRA adapter that matches no layer is found out only when the model is there."""


def _write(path, methods, **keys):
    content = {"levels": "[patient]", **keys}
    path.write_text("".join(f"{k}: {v}\n" for k, v in content.items()) + f"methods: {methods}\n")
    return path


def _call(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_command(parser.parse_args([str(argument) for argument in argv]))


def _table(out):
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _written(out):
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}


@pytest.fixture(scope="module")
def finished(data_dir, tiny_checkpoint, tmp_path_factory):
    """A sweep of three cells of which one fails: its file, its folder and its exit status."""
    folder = tmp_path_factory.mktemp("sweep")
    file = _write(folder / "sweep.yaml", METHODS, data=data_dir, model=tiny_checkpoint)
    return file, folder / "out", _call(file, "--out", folder / "out", "--jobs", 1)


def test_a_cell_that_fails_does_not_end_the_sweep(finished):
    _, out, status = finished
    assert status == 1
    rows = _table(out)
    assert [(row["method"], row["use_peft"], row["status"]) for row in rows] == [
        ("npo", "false", "done"),
        ("npo", "true", "failed"),
        ("manu", "", "done"),
    ]
    assert "nothing" in rows[1]["reason"]
    assert not rows[0]["reason"]
    assert "3 cells: 2 done, 1 failed" in (out / "results.md").read_text()


def test_a_sweep_is_not_a_run_and_names_its_own_results(finished, capsys):
    _, out, _ = finished
    assert main(["report", str(out)]) == 2
    assert capsys.readouterr().err == f"medforget report: {out}: is a sweep; its results are in {out}/results.md\n"
    with pytest.raises(UserError, match="cannot share a folder"):
        Run(out, {"plan": {}})


def test_results_say_what_was_run_and_what_it_scored(finished):
    _, out, _ = finished
    for row in _table(out):
        result = json.loads((out / "cells" / row["cell"] / "result.json").read_text())
        assert (result["method"], result["level"], result["status"]) == (row["method"], row["level"], row["status"])
        assert row["seconds"] == str(result["seconds"])
        if row["status"] == "done":
            assert set(result["forget"]) == set(result["retain"]) == set(TASKS)
            gaps = {task: result["retain"][task] - result["forget"][task] for task in TASKS}
            assert float(row["selectivity_cloze"]) == round(gaps["cloze"], 4)
            assert float(row["selectivity"]) == round(sum(gaps.values()) / len(gaps), 4)
            for side, task in itertools.product(("forget", "retain"), TASKS):
                assert float(row[f"{side}_{task}"]) == round(result[side][task], 4)
    npo = json.loads((out / "cells" / _table(out)[0]["cell"] / "result.json").read_text())
    assert npo["arguments"]["learning_rate"] == 1e-4
    assert npo["inputs"]["settings"]["beta"] == 0.9


def test_checkpoints_are_deleted_when_scored(finished):
    _, out, _ = finished
    left = {path.name for path in out.glob("cells/*/*")} | {path.name for path in out.glob("cells/*/.*")}
    assert left == {"result.json"}


def test_only_what_failed_or_is_missing_runs_again(finished, capsys):
    file, out, _ = finished
    before, (done, failed, lost) = _written(out), (row["cell"] for row in _table(out))
    (out / "cells" / lost / "result.json").unlink()
    assert _call(file, "--out", out, "--dry-run") == 0
    assert "3 cells, 1 done before, 2 to do (1 failed before)" in capsys.readouterr().err
    assert lost not in _written(out)
    assert _call(file, "--out", out, "--jobs", 1) == 1
    after = _written(out)
    assert {name for name in before if before[name] != after[name]} == {failed, lost}
    assert after[done] == before[done]
    # Without the failing cell there is nothing to do, and its row is gone.
    smaller = _write(file.with_name("smaller.yaml"), METHODS.replace("[false, true]", "false"), **_inputs(file))
    assert _call(smaller, "--out", out, "--jobs", 1) == 0
    assert _written(out) == after
    assert [row["cell"] for row in _table(out)] == [done, lost]


def _inputs(file):
    return {line.partition(": ")[0]: line.partition(": ")[2] for line in file.read_text().splitlines()[1:3]}


def test_what_cells_depend_on_makes_them_pending(finished, tmp_path, capsys):
    file, out, _ = finished
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(_inputs(file)["model"]).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    other = _write(tmp_path / "sweep.yaml", "{manu: {alpha: 1}}", **_inputs(file) | {"model": model})
    assert _call(other, "--out", out, "--dry-run") == 0
    assert "0 done before, 1 to do" in capsys.readouterr().err
    same = _write(tmp_path / "sweep.yaml", "{manu: {alpha: 1}}", **_inputs(file))
    assert _call(same, "--out", out, "--dry-run") == 0
    assert "1 done before, 0 to do" in capsys.readouterr().err
    assert _call(same, "--out", out, "--dry-run", "--keep-checkpoints") == 0
    assert "0 done before, 1 to do" in capsys.readouterr().err


PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sweep import _call
if __name__ == "__main__":
    sys.exit(_call(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on(data_dir, tiny_checkpoint, tmp_path, jobs):
    keys = {"data": data_dir, "model": tiny_checkpoint}
    file = _write(tmp_path / "sweep.yaml", "{manu: {alpha: [1, 2, 3, 4]}}", **keys)
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, program, file, "--out", out, "--jobs", str(jobs), "--keep-checkpoints"]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 400
    while not (before := _written(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _written(out)
    assert 1 <= len(before) < 4
    result = subprocess.run(command, env=environment, check=False)
    assert result.returncode == 0
    after = _written(out)
    assert len(after) == 4
    assert before.items() <= after.items()
    assert [row["status"] for row in _table(out)] == ["done"] * 4
    assert len(list(out.glob("cells/*/checkpoint/medforget.json"))) == 4
    assert len(list((out / "logs").glob("*.log")) if jobs > 1 else after) == 4


def test_tables_add_up(tmp_path):
    file = _write(tmp_path / "s.yaml", "{npo: {beta: [0.1, 0.5, 0.9]}, manu: }", model="m", levels="[study, patient]")
    grid = read_grid(file)
    outcomes = []
    for number, cell in enumerate(grid.cells, 1):
        scores = {
            "forget": {task: (10 * i + number) / 100 for i, task in enumerate(TASKS)},
            "retain": {task: (90 - 13 * i * number % 40) / 100 for i, task in enumerate(TASKS)},
        }
        result = {"status": "done", "seconds": 1.5, **scores, "selectivity": selectivity(scores)}
        outcomes.append(Outcome(cell, result))
    outcomes[1] = Outcome(grid.cells[1], {"status": "failed", "reason": "a|b"})
    outcomes[2] = Outcome(grid.cells[2], {})
    write_tables(tmp_path, grid, outcomes)
    rows = _table(tmp_path)
    assert list(rows[0])[:5] == ["method", "level", "seed", "beta", "status"]
    assert [row["level"] for row in rows] == ["study"] * 3 + ["patient"] * 3 + ["study", "patient"]
    assert [row["beta"] for row in rows] == ["0.1", "0.5", "0.9"] * 2 + ["", ""]
    mean_gaps = []
    for row, outcome in zip(rows, outcomes, strict=True):
        gaps = []
        for task in TASKS if outcome.status == "done" else ():
            forget, retain = outcome.result["forget"][task], outcome.result["retain"][task]
            assert (float(row[f"forget_{task}"]), float(row[f"retain_{task}"])) == (forget, retain)
            gaps.append(retain - forget)
        mean_gaps.append(sum(gaps) / len(gaps) if gaps else float("-inf"))
        assert row["selectivity"] == (str(round(mean_gaps[-1], 4)) if gaps else "")
        assert row["selectivity_cloze"] == (str(round(gaps[TASKS.index("cloze")], 4)) if gaps else "")
    assert len({gap for gap in mean_gaps if gap > 0}) > 3
    assert [row["status"] for row in rows] == ["done", "failed", "pending", *["done"] * 5]
    text = (tmp_path / "results.md").read_text()
    assert "8 cells: 6 done, 1 failed, 1 pending" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| npo", "| manu"))]
    assert [line[1] for line in lines] == ["patient"] * 4 + ["study"] * 4
    # Best first, what has no score last; the bar of a reason is not the table's.
    best = sorted(range(8), key=lambda i: (grid.cells[i].level == "study", -mean_gaps[i]))
    assert [line[-2] for line in lines] == [grid.cells[i].name for i in best]
    assert "a\\|b" in text


def _cells(tmp_path, methods, **keys):
    return read_grid(_write(tmp_path / "sweep.yaml", methods, model="runs/vanilla", **keys)).cells


def test_a_list_is_a_dimension(tmp_path):
    methods = "{npo: {beta: [0.1, 0.5], learning_rate: [1e-4, 3.0e-4]}, manu: {alpha: [1, 3, 5]}}"
    cells = _cells(tmp_path, methods, levels="[patient, section]", seeds="[0, 1]")
    assert len(cells) == 2 * 2 * 2 * 2 + 2 * 3
    assert len({cell.name for cell in cells}) == len(cells)
    found = {(c.level, c.seed, c.arguments["beta"], c.arguments["learning_rate"]) for c in cells if c.method == "npo"}
    levels, seeds, betas, rates = ("patient", "section"), (0, 1), (0.1, 0.5), (1e-4, 3e-4)
    assert found == {(level, s, b, r) for level in levels for s in seeds for b in betas for r in rates}
    # Nothing is drawn where nothing is trained.
    assert {cell.seed for cell in cells if cell.method == "manu"} == {None}


def test_grids_of_a_method_are_united_and_presets_shown(tmp_path):
    file = _write(
        tmp_path / "sweep.yaml",
        "{grad_diff: [{preset: tiny}, {preset: open-unlearning, learning_rate: 2e-5}]}",
        model="runs/vanilla",
    )
    grid = read_grid(file)
    assert grid.varied == ("preset", "learning_rate")
    assert [cell.shown["preset"] for cell in grid.cells] == ["tiny", "open-unlearning"]
    # The tiny preset's own, and the one given.
    assert [cell.shown["learning_rate"] for cell in grid.cells] == [3e-4, 2e-5]


def test_names_are_stable_and_say_what_a_cell_is(tmp_path):
    (one,) = _cells(tmp_path, "{npo: {beta: 1, preset: tiny}}")
    (two,) = _cells(tmp_path, "{npo: {preset: tiny, beta: 1.0}}")
    assert one.name == two.name
    assert one.name.startswith("npo-patient-")
    assert _cells(tmp_path, "{npo: {preset: tiny, beta: 2}}")[0].name != one.name
    assert _cells(tmp_path, "{npo: {preset: tiny, beta: 1}}", seeds=1)[0].name != one.name


def test_numbers_are_numbers_however_written(tmp_path):
    (cell,) = _cells(
        tmp_path, "{npo: {learning_rate: 1e-4, max_steps: 1e2, lr_scheduler_kwargs: {min_lr_rate: 5e-2}}}"
    )
    assert cell.arguments == {
        "learning_rate": 1e-4,
        "max_steps": 100,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
    }
    assert isinstance(cell.arguments["max_steps"], int)


def test_a_reference_may_name_the_level(tmp_path):
    cells = _cells(tmp_path, '{npo: {preset: paper, reference: "runs/{level}"}}', levels="[patient, study]")
    assert [cell.settings["reference"] for cell in cells] == ["runs/patient", "runs/study"]


def test_merged_keys_may_be_overridden(tmp_path):
    anchors = "\n  npo: &shared {max_steps: 3, learning_rate: 1e-4}\n  kl_min: {<<: *shared, max_steps: 4}"
    cells = _cells(tmp_path, anchors)
    assert {cell.arguments["learning_rate"] for cell in cells} == {1e-4}
    assert [cell.arguments["max_steps"] for cell in cells] == [3, 4]


def test_the_example_is_the_grid_of_the_paper():
    grid = read_grid(Path(__file__).parent.parent / "docs" / "sweep-example.yaml")
    assert len(grid.cells) == 16
    assert {cell.level for cell in grid.cells} == set(LEVELS)
    assert {cell.method for cell in grid.cells} == {"grad_diff", "kl_min", "npo", "manu"}


GOOD = "{model: m, levels: [patient], methods: {manu: {}}}"
MISTAKES = [
    ("", "model, levels and methods"),
    ("- 1", "a list"),
    ("a: [1", "line 1: not valid YAML"),
    ("model: m\nlevels: [patient]\nmodel: n\nmethods: {manu: }", "line 3: not valid YAML: 'model' is given twice"),
    ("model: m\nmethods: {npo: {beta: 1,\n beta: 2}}", "line 3"),
    ("model: m\n\tlevels: x", "line 2"),
    ("model: !!python/name:os.system m", "line 1"),
    ("{levels: [patient], methods: {manu: {}}}", "model is missing"),
    (GOOD.replace("levels: [patient], ", ""), "levels is missing"),
    (GOOD.replace(", methods: {manu: {}}", ""), "methods is missing"),
    (GOOD.replace("model", "base"), "unknown key 'base'"),
    (GOOD.replace("model: m", "model: 7"), "model is 7; it must be text; put it in quotes"),
    (GOOD.replace("model: m", "model: m, model_preset: huge"), "lingshu-7b"),
    (GOOD.replace("model: m", "model: m, max_pixels: 0"), "max_pixels is 0"),
    (GOOD.replace("patient", "ward"), "'ward'; choose from institution"),
    (GOOD.replace("[patient]", "[]"), "levels is an empty list"),
    (GOOD.replace("[patient]", "[patient, patient]"), "'patient' twice"),
    (GOOD.replace("model: m", "model: m, seeds: [0, 0]"), "seeds names 0 twice"),
    (GOOD.replace("model: m", "model: m, seeds: [a]"), "seeds is 'a'; it must be a whole number"),
    (GOOD.replace("model: m", "model: m, seeds: []"), "seeds is an empty list"),
    (GOOD.replace("manu: {}", "npo: {}").replace("model: m", "model: m, seeds: -1"), "seed is -1"),
    (GOOD.replace("{manu: {}}", "[manu]"), "methods must give the arguments of each method"),
    (GOOD.replace("manu: {}", "magic: {}"), "unknown method 'magic'; choose from grad_diff"),
    (GOOD.replace("manu: {}", "manu: []"), "empty list of grids"),
    (GOOD.replace("manu: {}", "npo: tiny"), "tiny is not a grid"),
    (GOOD.replace("manu: {}", "npo: {beta: []}"), "beta is an empty list"),
    (GOOD.replace("manu: {}", "npo: {betta: 1}"), "npo has no argument 'betta'; did you mean beta?"),
    (GOOD.replace("manu: {}", "npo: {title: x}"), "npo has no argument 'title'"),
    (GOOD.replace("manu: {}", "npo: {1: 2}"), "npo has no argument 1"),
    (GOOD.replace("manu: {}", "manu: {max_steps: 1}"), "manu does not train; it has no use for max_steps"),
    (GOOD.replace("manu: {}", "manu: {alpha: 300}"), "alpha is 300.0; it must be between 0 and 100"),
    (GOOD.replace("manu: {}", "npo: {beta: [0.5, -1]}"), "beta is -1.0"),
    (GOOD.replace("manu: {}", "npo: {beta: high}"), "npo: beta is 'high'; it must be a number"),
    (GOOD.replace("manu: {}", "npo: {beta: '1e-4'}"), "beta is '1e-4'; it must be a number; leave out the quotes"),
    (GOOD.replace("manu: {}", "npo: {beta: .nan}"), "it must be a number"),
    (GOOD.replace("manu: {}", "npo: {report_to: &x [*x]}"), "refers to what it is in"),
    ("model: m\n---\nmodel: n", "line 2: not valid YAML: expected a single document"),
    ("[" * 3000, "nested too deeply"),
    (GOOD.replace("manu: {}", "npo: {beta: }"), "npo: beta has no value"),
    (GOOD.replace("manu: {}", "npo: {use_peft: 1}"), "use_peft is 1; it must be true or false"),
    (GOOD.replace("manu: {}", "npo: {max_steps: 1.5}"), "max_steps is 1.5; it must be a whole number"),
    (GOOD.replace("manu: {}", "npo: {log_ratio: yes}"), "log_ratio is true; it must be text; put it in quotes"),
    (GOOD.replace("manu: {}", "npo: {log_ratio: median}"), "log_ratio is 'median'"),
    (GOOD.replace("manu: {}", "npo: {optim: magic}"), "magic"),
    (GOOD.replace("manu: {}", "npo: {learning_rate: [1e-4, 0.0]}"), "learning_rate is 0.0"),
    (GOOD.replace("manu: {}", "npo: {preset: best}"), "npo has no preset 'best'"),
    (GOOD.replace("manu: {}", "npo: {preset: paper}"), "give its folder with reference"),
    (GOOD.replace("manu: {}", "npo: {seed: 1}"), "give seeds beside methods"),
    (GOOD.replace("manu: {}", "npo: {output_dir: x}"), "output_dir cannot be given here"),
    (GOOD.replace("manu: {}", "npo: {beta: [1, 1.0]}"), "two cells are the same run"),
    (GOOD.replace("manu: {}", "npo: [{preset: tiny}, {preset: tiny, beta: 0.5}]"), "two cells are the same run"),
]


@pytest.mark.parametrize(("text", "named"), MISTAKES, ids=[named for _, named in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(text, named, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        _call(file, "--out", tmp_path / "out")
    assert named in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named_before_anything_runs(data_dir, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"

    def refused(methods="{manu: {}}", **keys):
        file = _write(tmp_path / "sweep.yaml", methods, **{"data": data_dir, "model": tiny_checkpoint, **keys})
        with pytest.raises(UserError) as error:
            _call(file, "--out", out)
        assert not (out / "cells").exists()
        return str(error.value)

    assert f"model: no checkpoint folder {tmp_path / 'x'}" in refused(model=tmp_path / "x")
    assert f"{data_dir} is not a checkpoint folder" in refused(model=data_dir)
    assert "model: org/model is no folder here" in refused(model="org/model")
    assert f"no dataset folder {tmp_path / 'x'}" in refused(data=tmp_path / "x")
    assert "not a MedForget dataset" in refused(data=tiny_checkpoint)
    assert "npo: reference: no checkpoint folder /x/patient" in refused('{npo: {reference: "/x/{level}"}}')
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot read the sweep"):
        _call(tmp_path / "nowhere.yaml", "--out", out)
    with pytest.raises(UserError, match="--jobs 0"):
        _call(tmp_path / "sweep.yaml", "--out", out, "--jobs", 0)
    (tmp_path / "sweep.yaml").write_bytes(b"model: \xff")
    with pytest.raises(UserError, match=r"sweep.yaml: not UTF-8"):
        _call(tmp_path / "sweep.yaml", "--out", out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert f"--out {out}: holds something else than a sweep" in refused()
    assert (out / "notes.txt").read_text() == "mine"
    (out / "run.json").write_text(json.dumps({"format": 1, "preset": "demo"}))
    (out / "notes.txt").unlink()
    assert "something else than a sweep" in refused()
