"""Fixtures that all tests share; no test leaves this machine or touches the user's caches."""

import os
import tempfile


_HOME = tempfile.TemporaryDirectory(prefix="medforget-tests-")
# Read when the libraries are imported, so set before any of them is.
os.environ.update(
    HF_HOME=_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    MEDFORGET_CACHE=os.path.join(_HOME.name, "medforget"),
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("MEDFORGET_DIR", None)

import pytest  # noqa: E402


# A program of its own, which a test runs; importing it would run it.
collect_ignore = ["svdrr_stand_in.py"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The smallest dataset that 25 % divides at every level: 64 studies, 960 rows, images of 56 × 56 pixels."""
    from medforget_dataset import build

    return build(tmp_path_factory.mktemp("data") / "medforget", institutions=4, patients=4, image_size=56)


@pytest.fixture(scope="session")
def tiny_checkpoint(data_dir, tmp_path_factory):
    """An untrained tiny model with the processor of `data_dir`."""
    from medforget_dataset import load
    from unlearn.checkpoints import save_checkpoint
    from unlearn.models import tiny_model

    rows = load("finetune", "train", data=data_dir)
    model, processor = tiny_model([*rows["question"], *rows["answer"]])
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", model, processor, {})


@pytest.fixture(scope="session")
def report_run(data_dir, tmp_path_factory):
    """A finished run of one level and one method without probes."""
    from report_runs import FinishedRun

    return FinishedRun(tmp_path_factory.mktemp("report") / "run", data_dir, ("patient",), ("npo",), probed=False)


@pytest.fixture
def without_figures(monkeypatch):
    """A report without drawing: figures take most of the time, and are drawn in other tests."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"<svg/>"))
