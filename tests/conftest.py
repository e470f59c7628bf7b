"""Fixtures that all tests share; no test leaves this machine or touches the user's caches."""

import os
import sys
import tempfile
from pathlib import Path


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
for _name in ("MEDFORGET_DIR", "HF_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
# In this process and in all that it starts.
_NO_NETWORK = str(Path(__file__).with_name("no_network"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_NO_NETWORK, os.environ.get("PYTHONPATH"))))
sys.path.insert(0, _NO_NETWORK)
sys.modules.pop("sitecustomize", None)
import pytest  # noqa: E402
import sitecustomize  # noqa: E402, F401


# A program of its own, which a test runs; importing it would run it.
collect_ignore = ["svdrr_stand_in.py", "no_network"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The smallest dataset that 25 % divides at every level: 64 studies, 960 rows, images of 56 × 56 pixels."""
    from medforget_dataset import build

    return build(tmp_path_factory.mktemp("data") / "medforget", institutions=4, patients=4, image_size=56, workers=1)


@pytest.fixture(scope="session")
def tiny_checkpoint(data_dir, tmp_path_factory):
    """An untrained tiny model with the processor of `data_dir`."""
    from medforget_dataset import load
    from unlearn.checkpoints import save_checkpoint
    from unlearn.models import tiny_model

    rows = load("finetune", "train", data=data_dir)
    model, processor = tiny_model([*rows["question"], *rows["answer"]])
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", model, processor, {"restricted": False})


@pytest.fixture(scope="session")
def report_run(data_dir, tmp_path_factory):
    """A finished run of one level and one method without probes."""
    from report_runs import FinishedRun

    return FinishedRun(tmp_path_factory.mktemp("report") / "run", data_dir, ("patient",), ("npo",), probed=False)


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """A Hub of this test alone, to which this process is logged in as alice, who may write for hospital."""
    import datasets
    import huggingface_hub.constants as hub_constants
    from hub_server import Hub

    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(hub_constants, name, value)
    for module, name in ((hub_constants, "HF_HUB_CACHE"), (datasets.config, "HF_DATASETS_CACHE")):
        monkeypatch.setattr(module, name, str(tmp_path / name))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    # A client that remembers the Hub of the test before.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    tokens = {"hf_alice": "alice", "hf_bob": "bob"}
    with Hub(tmp_path / "hub", tokens, members={"hospital": {"alice"}}) as hub:
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        hub.environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        yield hub


@pytest.fixture
def without_figures():
    """A report without drawing."""
    from report_runs import undrawn

    with undrawn():
        yield
