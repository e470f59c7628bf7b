"""What stands under a data use agreement stays on this machine, and says so wherever it goes."""

import json
import socket

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medforget_dataset import UserError, build, load
from medforget_dataset.agreement import check_endpoint, is_loopback
from medforget_dataset.corpora import embedded
from medforget_dataset.hub import push_dataset
from medforget_dataset.validate import validate
from unlearn.cli import main
from unlearn.finetune import finetune
from unlearn.hub import push_model


@pytest.fixture
def no_network(monkeypatch):
    """Fails a test that opens a connection or looks up a name, and lists what was tried."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise AssertionError(f"tried to reach {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried
    assert not tried


@pytest.fixture(scope="module")
def restricted_dir(tmp_path_factory):
    """The embedded corpus as if it stood under an agreement: every path from corpus to checkpoint, without secrets."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"restricted": True, "license": "other", "license_name": "An agreement"}.items():
            patch.setattr(embedded.Corpus, name, value)
        out = tmp_path_factory.mktemp("restricted") / "medforget"
        return build(out, institutions=4, patients=4, image_size=56, workers=1)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost:11434/v1", True),
        ("https://api.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://127.0.0.1@example.org/v1", False),
        ("http://localhost.example.org", False),
        ("http://10.0.0.5:8000/v1", False),
        ("http://0.0.0.0:8000", False),
        ("http://2130706433/v1", False),
        ("http://[127.0.0.1:8000]/v1", False),
        ("http://[::1", False),
    ],
)
def test_loopback_is_told_from_the_address_alone(url, here, no_network):
    assert is_loopback(url) is here


def test_restricted_text_goes_to_no_endpoint_but_this_machine(no_network):
    check_endpoint("http://127.0.0.1:1/v1", restricted=True, complies="")
    check_endpoint("https://api.example.org", restricted=False, complies="")
    check_endpoint("https://api.example.org", restricted=True, complies="J. Doe, zero retention, contract 7")
    with pytest.raises(UserError, match=r"--endpoint https://api\.example\.org: is not this machine") as caught:
        check_endpoint("https://api.example.org", restricted=True, complies=" ")
    assert "\n" not in str(caught.value)


def test_the_mark_stands_in_rows_card_and_record(restricted_dir):
    assert validate(restricted_dir) == []
    for config in ("finetune", "patient_forget_rephrase", "general_med"):
        for split in datasets.get_dataset_split_names(str(restricted_dir), config):
            assert all(load(config, split, data=restricted_dir)["restricted"]), (config, split)
    rows = load("finetune", "train", data=restricted_dir)
    assert rows.info.license == "An agreement"
    assert rows.info.description.startswith("Restricted: ")
    kept = rows.map(lambda row: {"length": len(row["answer"])}).select(range(5))
    assert all(kept["restricted"]) and kept.info.description.startswith("Restricted: ")
    card = huggingface_hub.DatasetCard.load(restricted_dir / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "An agreement")
    assert "**This data is restricted.**" in card.text
    assert "shows no rows and no images" in card.text and not (restricted_dir / "images").exists()
    assert not [text for text in {*rows["answer"], *rows["question"]} if len(text) > 10 and text in card.text]


def test_a_checkpoint_of_restricted_data_says_so(restricted_dir, tiny_checkpoint, tmp_path):
    finetune(restricted_dir, tmp_path / "model", model=tiny_checkpoint, max_steps=1, quiet=True)
    assert json.loads((tmp_path / "model" / "medforget.json").read_text())["restricted"] is True
    card = huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md")
    assert "restricted" in card.data.tags and card.data.license == "other"
    assert "must not be shared" in card.text


@pytest.mark.parametrize("command", ["dataset", "model", "training"])
def test_publishing_is_refused_in_one_line_before_anything_is_sent(
    command, restricted_dir, tiny_checkpoint, tmp_path, no_network, capsys, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if command == "dataset":
        call = ["push", "dataset", str(restricted_dir), "someone/medforget"]
    elif command == "model":
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "medforget.json").write_text('{"restricted": true}')
        call = ["push", "model", str(checkpoint), "someone/model"]
    else:
        call = ["finetune", "--data", str(restricted_dir), "--model", str(tiny_checkpoint), "--out"]
        call += [str(tmp_path / "out"), "--push-to-hub", "someone/model", "--set", "max_steps=1"]
    assert main(call) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "is restricted" in lines[0] and "cannot be published" in lines[0]


def test_a_record_that_was_edited_does_not_free_the_rows(restricted_dir, tmp_path, no_network):
    folder = tmp_path / "medforget"
    folder.mkdir()
    record = json.loads((restricted_dir / "build.json").read_text())
    (folder / "build.json").write_text(json.dumps(record | {"restricted": False}))
    (folder / "finetune").mkdir()
    name = "finetune/train-00000-of-00001.parquet"
    (folder / name).write_bytes((restricted_dir / name).read_bytes())
    with pytest.raises(UserError, match="is restricted"):
        push_dataset(folder, "someone/medforget")


def test_an_endpoint_elsewhere_is_refused_by_the_build(tmp_path, no_network, capsys):
    table = pa.table({name: ["x"] for name in ("institution", "patient", "study", "section", "text", "image")})
    pq.write_table(table, tmp_path / "table.parquet")
    call = ["build", "--corpus", "table", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    call += ["--questions", "llm", "--endpoint", "https://api.example.org/v1", "--llm-model", "m"]
    assert main(call) == 2
    assert "is not this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_say_is_not_published(tmp_path, no_network):
    with pytest.raises(UserError, match="not a MedForget checkpoint"):
        push_model(tmp_path, "someone/model")
    (tmp_path / "medforget.json").write_text("{}")
    with pytest.raises(UserError, match="is restricted"):
        push_model(tmp_path, "someone/model")
