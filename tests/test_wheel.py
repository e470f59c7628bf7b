"""What `python -m build` makes of the tracked files, and that it works where the repository is not."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from harness_tasks.generate import LEAVES


ROOT = Path(__file__).parents[1]
PACKAGES = ("harness_tasks", "medforget_dataset", "unlearn")
# Written by the build; everything else comes from the repository.
MADE = ("PKG-INFO", "medforget.egg-info/")


def _run(*command, **options):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tracked():
    # In a work tree with changes that are not committed, a file may be gone.
    return {name for name in _run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """The source archive of the tracked files alone, and the wheel that is built from the archive."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def test_the_source_archive_holds_every_tracked_file(built, tracked):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive if not member.isdir()}
        assert not [member.name for member in archive if member.issym() or member.islnk()]
    assert {name for name in names if not name.startswith(MADE)} - {"setup.cfg"} == tracked - {"setup.cfg"}


def test_the_wheel_holds_every_tracked_file_of_the_packages(built, tracked):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked if name.split("/")[0] in PACKAGES}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """`bash`, as a function, in an empty folder where the wheel is installed and the repository cannot be imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # The libraries are those of this environment: of its folders, but none of what their own .pth files add.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv" / "bin" / "python"]
    _run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", built[1])
    environment = os.environ | {
        "PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests" / "no_network"),
    }

    def bash(script):
        # Its script lies in the environment of the libraries.
        lm_eval = 'lm_eval() { python -m lm_eval "$@"; }\n'
        return _run("bash", "-euc", lm_eval + script, cwd=folder, env=environment)

    return bash


@pytest.mark.slow
def test_what_is_installed_is_not_the_repository(installed):
    places = installed(
        "python -c 'import harness_tasks, medforget_dataset, unlearn\nfor package in harness_tasks, "
        "medforget_dataset, unlearn: print(package.__file__)'; medforget tasks-path; pwd"
    )
    *places, folder = places.splitlines()
    assert len(places) == 4
    assert all(place.startswith(f"{folder}/venv/") for place in places)


@pytest.mark.slow
def test_the_commands_teach(installed):
    assert "tasks-path" in installed("medforget --help")
    assert "--model_args" in installed("medforget eval --help")
    assert "--accelerate-config" in installed("medforget unlearn --help")


@pytest.mark.slow
def test_it_builds_what_load_dataset_reads_and_evaluates_on_it(installed, tiny_checkpoint):
    installed("medforget build --institutions 4 --patients 4 --image-size 56 --out medforget")
    installed("medforget validate medforget")
    rows = installed(
        "python -c 'from datasets import load_dataset\n"
        'print(len(load_dataset("medforget", "institution_forget", split="train")))\''
    )
    assert rows.strip() == "240"
    tasks = "--tasks medforget_patient_forget_cloze --limit 2 --batch_size 2"
    assert "exact_match" in installed(f"medforget eval --model_args pretrained={tiny_checkpoint} {tasks}")


@pytest.mark.slow
def test_stock_lm_eval_lists_its_tasks(installed):
    listed = installed('lm_eval ls tasks --include_path "$(medforget tasks-path)"')
    assert len(LEAVES) == 78
    names = {line.split("|")[1].strip() for line in listed.splitlines() if line.startswith("|")}
    assert {leaf.name for leaf in LEAVES} <= names
