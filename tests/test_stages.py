"""Stages: skipped, made again, resumed and refused as they should be, in this process and in several."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest

from medforget_dataset.errors import UserError
from unlearn.stages import Run, Stage, stage_failures, stage_seconds


def _touch(path):
    path.write_text("made" + path.read_text() if path.exists() else "made")


def _stages(folder, size):
    a = Stage("a", folder / "a", partial(_touch, folder / "a"), inputs={"size": size})
    b = Stage("b", folder / "b", partial(_touch, folder / "b"), after=("a",))
    return [a, b, Stage("c", folder / "c", partial(_touch, folder / "c"))]


def _execute(folder, stages, jobs):
    run = Run(folder, {})
    with run.lock():
        return run.execute(stages, jobs)


# Two jobs are processes, which take seconds to start.
ONE_OR_TWO = [1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("jobs", ONE_OR_TWO)
def test_stages_follow_their_inputs(tmp_path, jobs):
    folder = tmp_path / "run"

    def made():
        return {name: (folder / name).read_text().count("made") for name in "abc"}

    for size in (1, 1):
        _execute(folder, _stages(folder, size), jobs)
    assert made() == {"a": 1, "b": 1, "c": 1}
    _execute(folder, _stages(folder, 2), jobs)
    assert made() == {"a": 2, "b": 2, "c": 1}
    (folder / "a").unlink()
    _execute(folder, _stages(folder, 2), jobs)
    assert made() == {"a": 1, "b": 3, "c": 1}


def _full_disk():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("jobs", ONE_OR_TWO)
def test_a_stage_that_fails_is_not_taken_for_done(tmp_path, jobs):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="No space"):
        _execute(folder, [Stage("a", folder / "a", _full_disk)], jobs)
    _execute(folder, [Stage("a", folder / "a", partial(_touch, folder / "a"))], jobs)
    assert (folder / "a").read_text() == "made"


def _diverges():
    raise ValueError("the loss is not a number\nat step 3")


def _chain(folder, make, optional):
    """Three stages of which each needs the one before, and one that needs none."""
    return [
        Stage("a", folder / "a", make, optional=optional),
        Stage("b", folder / "b", partial(_touch, folder / "b"), after=("a",), optional=True),
        Stage("c", folder / "c", partial(_touch, folder / "c"), after=("b",), optional=True),
        Stage("d", folder / "d", partial(_touch, folder / "d")),
    ]


@pytest.mark.parametrize("jobs", ONE_OR_TWO)
def test_an_optional_stage_that_fails_leaves_a_hole_and_is_tried_again(tmp_path, jobs):
    folder = tmp_path / "run"
    failures = _execute(folder, _chain(folder, _diverges, True), jobs)
    assert failures == {"a": "the loss is not a number", "b": "a failed", "c": "a failed"}
    assert stage_failures(folder) == failures
    assert list(stage_seconds(folder)) == ["d"]
    assert _execute(folder, _chain(folder, partial(_touch, folder / "a"), True), jobs) == {}
    assert stage_failures(folder) == {}
    assert {name: (folder / name).read_text().count("made") for name in "abcd"} == {"a": 1, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize("jobs", ONE_OR_TWO)
def test_a_stage_that_is_not_optional_ends_the_run(tmp_path, jobs):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="not a number"):
        _execute(folder, _chain(folder, _diverges, False), jobs)
    assert not (folder / "b").exists()


def _dies():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_run_even_in_an_optional_stage(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(BrokenProcessPool):
        _execute(folder, [Stage("a", folder / "a", _dies, optional=True), _chain(folder, _diverges, True)[-1]], 2)


@pytest.mark.slow
def test_the_plan_is_told_first_with_the_time_that_is_left(tmp_path, caplog):
    folder = tmp_path / "run"
    stages = [
        Stage(name, folder / name, partial(_touch, folder / name), kind=kind, seconds=seconds)
        for name, kind, seconds in (("a", "train", 600.0), ("b", "probe", 60.0), ("c", "probe", 60.0))
    ]
    with caplog.at_level("INFO", logger="unlearn.stages"):
        _execute(folder, stages[:1], 1)
        _execute(folder, stages, 2)
    assert [line for line in caplog.messages if "stages to do" in line] == [
        "1 of 1 stages to do (1 × train), 1 at a time; about 10 minutes left",
        "2 of 3 stages to do (2 × probe), 2 at a time; about 1 minutes left",
    ]


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
