"""The pipeline: stages are skipped, resumed and refused as they should be, and the report adds up."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from medforget_dataset import BuildOptions
from medforget_dataset.errors import UserError
from unlearn import pipeline
from unlearn.pipeline import Plan
from unlearn.presets import PRESETS, TinyPreset
from unlearn.stages import Run, Stage


SMALL = TinyPreset(epochs=1, pretrain_epochs=1, images_per_step=8)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run of one epoch with two methods on the data of the other tests; what it scores means nothing."""
    runs = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setitem(PRESETS, "tiny", SMALL)
    patch.setitem(
        pipeline.PLANS,
        "small",
        Plan(BuildOptions(institutions=4, patients=4, image_size=56), ("patient",), ("npo", "manu"), preset="tiny"),
    )
    patch.setattr(pipeline, "build", lambda out, **options: _link(data_dir, out))
    patch.setitem(pipeline.METHODS["npo"].presets, "tiny", {"learning_rate": 1e-4, "max_steps": 2})
    pipeline.run("small", runs=runs, jobs=1)
    yield runs
    patch.undo()


def _link(data_dir, out):
    Path(out).symlink_to(data_dir, target_is_directory=True)


def test_report_holds_every_method_split_and_task(finished):
    report = json.loads((finished / "small" / "report.json").read_text())
    found = {(s["method"], s["split"], s["task"]) for s in report["scores"]}
    for method in ("vanilla", "retrained", "npo", "manu"):
        for split in ("forget", "retain", "rephrase"):
            assert {(method, split, task) for task in ("generation", "cloze", "classification", "identity")} <= found
        assert {(method, "general_med", task) for task in ("generation", "cloze", "classification")} <= found
    assert all(0 <= score["value"] <= 1 and score["n"] > 0 for score in report["scores"] + report["wrong_image"])
    assert {s["n"] for s in report["scores"] if s["split"] == "forget" and s["task"] == "identity"} == {32}


def test_gaps_are_differences_of_the_scores(finished):
    report = json.loads((finished / "small" / "report.json").read_text())
    values = {(s["method"], s["split"], s["task"], s["metric"]): s["value"] for s in report["scores"]}
    for gap in report["gaps"]:
        key = (gap["task"], gap["metric"])
        forget = values[gap["method"], "forget", *key]
        assert gap["selectivity"] == pytest.approx(values[gap["method"], "retain", *key] - forget)
        assert gap["forget_minus_retrained"] == pytest.approx(forget - values["retrained", "forget", *key])


def test_report_says_what_it_is(finished):
    text = (finished / "small" / "report.md").read_text()
    assert "The corpus is rendered" in text
    assert "960 rows" in text
    for name in ("scores.png", "forget-retain.png"):
        assert name in text
        assert (finished / "small" / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_does_nothing_again(finished, monkeypatch):
    for name in ("build", "pretrain", "finetune", "unlearn"):
        monkeypatch.setattr(pipeline, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} ran again"))
    pipeline.run("small", runs=finished, jobs=1)


def test_a_lost_checkpoint_is_made_again_with_what_depends_on_it(finished, monkeypatch):
    ran = []
    original = pipeline.unlearn
    monkeypatch.setattr(
        pipeline, "unlearn", lambda *args, **kwargs: ran.append(kwargs["method"]) or original(*args, **kwargs)
    )
    folder = finished / "small" / "manu-patient"
    folder.rename(finished / "moved")
    pipeline.run("small", runs=finished, jobs=1)
    assert ran == ["manu"]
    assert folder.is_dir()


def test_another_seed_makes_everything_anew(tmp_path):
    plan = pipeline._plan("demo", 3, None, None)
    assert (plan.seed, plan.data.seed) == (3, 3)
    assert dataclasses.asdict(plan) != dataclasses.asdict(pipeline.PLANS["demo"])


def _touch(path):
    path.write_text("made" + path.read_text() if path.exists() else "made")


def _stages(folder, size):
    a = Stage("a", folder / "a", partial(_touch, folder / "a"), inputs={"size": size})
    b = Stage("b", folder / "b", partial(_touch, folder / "b"), after=("a",))
    return [a, b, Stage("c", folder / "c", partial(_touch, folder / "c"))]


@pytest.mark.parametrize("jobs", [1, 2])
def test_stages_follow_their_inputs(tmp_path, jobs):
    folder = tmp_path / "run"

    def made():
        return {name: (folder / name).read_text().count("made") for name in "abc"}

    for size in (1, 1):
        Run(folder, {}).execute(_stages(folder, size), jobs)
    assert made() == {"a": 1, "b": 1, "c": 1}
    Run(folder, {}).execute(_stages(folder, 2), jobs)
    assert made() == {"a": 2, "b": 2, "c": 1}


def _full_disk():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stage_that_fails_is_not_taken_for_done(tmp_path, jobs):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="No space"):
        Run(folder, {}).execute([Stage("a", folder / "a", _full_disk)], jobs)
    Run(folder, {}).execute([Stage("a", folder / "a", partial(_touch, folder / "a"))], jobs)
    assert (folder / "a").read_text() == "made"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run"):
        Run(tmp_path / "mine", {})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_run_of_another_version_is_refused(tmp_path):
    Run(tmp_path / "run", {})
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match=str(path)):
        Run(tmp_path / "run", {})


def test_two_processes_cannot_share_a_run(tmp_path):
    with (
        Run(tmp_path / "run", {}).lock(),
        pytest.raises(UserError, match="another process"),
        Run(tmp_path / "run", {}).lock(),
    ):
        pass


_KILLED = """
import os, sys, time
from functools import partial
from pathlib import Path
from unlearn.stages import Run, Stage
folder = Path(sys.argv[1])

def slow():
    (folder / f".second.partial-{os.getpid()}").write_text("half")
    print("working", flush=True)
    time.sleep(60)

run = Run(folder, {})
with run.lock():
    first = Stage("first", folder / "first", partial((folder / "first").write_text, "done"))
    run.execute([first, Stage("second", folder / "second", slow, after=("first",))])
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(folder)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = []
    run = Run(folder, {})
    with run.lock():
        assert not list(folder.glob(".second*"))
        first = Stage("first", folder / "first", lambda: made.append("first"))
        run.execute([first, Stage("second", folder / "second", lambda: made.append("second"), after=("first",))])
    assert made == ["second"]
