"""Files and folders appear complete or not at all, and worker processes end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medforget_dataset.atomic import replacing, sweep, write_text
from medforget_dataset.errors import UserError


def _folder(path, text):
    path.mkdir(parents=True)
    (path / "content").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path):
    _folder(tmp_path / "data", "old")
    with replacing(tmp_path / "data") as partial:
        _folder(partial, "new")
        assert (tmp_path / "data" / "content").read_text() == "old"
    assert (tmp_path / "data" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_survives_a_failure(tmp_path, error):
    _folder(tmp_path / "data", "old")
    with pytest.raises(type(error)), replacing(tmp_path / "data") as partial:
        _folder(partial, "half")
        raise error
    assert (tmp_path / "data" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interruption_between_the_two_renames_is_undone(tmp_path, monkeypatch):
    _folder(tmp_path / "data", "old")
    rename = Path.rename

    def interrupted(path, target):
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "data") as partial:
        _folder(partial, "new")
    assert (tmp_path / "data" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def _dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_sweeping_puts_right_what_a_killed_process_left(tmp_path):
    pid = _dead_pid()
    _folder(tmp_path / f".half.partial-{pid}", "half")
    _folder(tmp_path / f".lost.retired-{pid}", "the only copy")
    _folder(tmp_path / f".kept.retired-{pid}", "old")
    _folder(tmp_path / "kept", "new")
    _folder(tmp_path / f".busy.partial-{os.getpid()}", "being written")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".busy.partial-{os.getpid()}", "kept", "lost"]
    assert (tmp_path / "lost" / "content").read_text() == "the only copy"
    assert (tmp_path / "kept" / "content").read_text() == "new"


def test_files_are_written_whole(tmp_path):
    write_text(tmp_path / "below" / "x.json", "one")
    write_text(tmp_path / "below" / "x.json", "two")
    assert (tmp_path / "below" / "x.json").read_text() == "two"
    assert len(list((tmp_path / "below").iterdir())) == 1


_PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from medforget_dataset.processes import start_worker
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=start_worker, initargs=(os.getpid(), 1))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_what_has_no_name_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give the folder's name"), replacing(Path(path)):
        pytest.fail("it was begun")
    assert list(tmp_path.iterdir()) == []


def test_a_worker_does_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{worker}/stat").exists():
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.2)
    assert not Path(f"/proc/{worker}").exists()
