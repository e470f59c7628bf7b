"""What is restricted, or does not say that it is not, never becomes public, whatever the flags."""

import json
import shutil

import huggingface_hub
import pytest
from push_calls import refusal, said

from medforget_dataset import UserError
from unlearn.checkpoint_info import is_marked, is_restricted
from unlearn.checkpoints import load_checkpoint
from unlearn.config import UnlearnConfig
from unlearn.hub import push_model
from unlearn.trainer import UnlearnTrainer
from unlearn.unlearning import forget_and_retain


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "ours")


@pytest.fixture
def free(tiny_checkpoint, tmp_path):
    """One that says that it is free."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "free")


def test_public_is_said_twice_and_comes_last(data_dir, local_hub, capsys):
    lines = said(capsys, ["push", "dataset", str(data_dir), "hospital/open", "--public"])
    assert lines[-1].endswith(", public")
    writes = [name for _, name, _ in local_hub.log if name in ("create", "lfs_put", "commit", "settings", "info")]
    assert writes[:3] == ["info", "create", "info"] and writes[-2:] == ["settings", "info"]
    assert "is public; add --public" in refusal(capsys, "dataset", data_dir, "hospital/open")


@pytest.mark.parametrize("flag", ["", "--public"])
def test_a_hub_that_does_not_keep_it_private_gets_no_file(flag, data_dir, local_hub, capsys):
    local_hub.ignores_private = True
    line = refusal(capsys, "dataset", data_dir, "hospital/medforget", *filter(None, [flag]))
    assert "did not make it private; nothing was sent" in line
    assert not [name for _, name, _ in local_hub.log if name in ("lfs_put", "commit")]


@pytest.fixture
def grouped(data_dir):
    """Free rows to forget and to retain."""
    return forget_and_retain(data_dir, "patient")[0]


@pytest.fixture
def of_patients(grouped):
    """The same rows, as if they stood under an agreement."""
    return grouped.map(lambda example: {"rows": [row | {"restricted": True} for row in example["rows"]]})


@pytest.fixture
def restricted(checkpoint):
    info = checkpoint / "medforget.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"restricted": True}))
    return checkpoint


def test_restricted_data_never_becomes_public(restricted, local_hub, capsys, monkeypatch):
    push_model(restricted, "hospital/ours")  # a Hub on this machine
    assert local_hub.repos["models", "hospital/ours"]["private"]
    assert is_restricted("hospital/ours")
    who = "J. Doe, agreement 7"
    for flags in (["--public"], ["--public", "--replace"], ["--public", "--endpoint-complies", who]):
        line = refusal(capsys, "model", restricted, "hospital/ours", *flags)
        assert "is restricted" in line and "cannot be published" in line
    assert "cannot be published" in refusal(capsys, "model", restricted, "hospital/ours", "--public", "--dry-run")
    huggingface_hub.HfApi().update_repo_settings("hospital/ours", private=False)
    local_hub.log.clear()
    assert "is public, and what would go there is restricted" in refusal(capsys, "model", restricted, "hospital/ours")
    assert local_hub.sent() == []

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.example.org")
    assert "--endpoint-complies" in refusal(capsys, "model", restricted, "hospital/theirs")
    # With somebody's word it would be sent: the guard of all tests stops it.
    assert "no test may reach" in refusal(capsys, "model", restricted, "hospital/theirs", "--endpoint-complies", who)


def test_what_was_restricted_does_not_become_public_by_the_history(restricted, free, local_hub, capsys):
    push_model(restricted, "hospital/shared")
    line = refusal(capsys, "model", free, "hospital/shared", "--replace", "--public")
    assert "its history holds what does not say that it is free" in line
    assert local_hub.repos["models", "hospital/shared"]["private"]
    assert len(local_hub.repos["models", "hospital/shared"]["commits"]) == 2
    push_model(free, "hospital/free")
    assert not push_model(free, "hospital/free", public=True).private


def test_a_repository_that_is_opened_meanwhile_gets_nothing_restricted(restricted, local_hub, capsys):
    def open_it():
        local_hub.repos["models", "hospital/ours"]["private"] = False

    local_hub.on_upload = open_it
    assert "became public meanwhile" in refusal(capsys, "model", restricted, "hospital/ours")
    assert local_hub.repos["models", "hospital/ours"]["commits"][-1]["files"] == {}


def test_restricted_files_for_this_machine_take_no_way_through_another(restricted, local_hub, capsys, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:3128")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert "set NO_PROXY=127.0.0.1" in refusal(capsys, "model", restricted, "hospital/ours")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert push_model(restricted, "hospital/ours").private


def test_the_mark_is_known_or_asked_for(restricted, checkpoint, local_hub, monkeypatch, tmp_path):
    push_model(restricted, "hospital/ours")
    huggingface_hub.hf_hub_download("hospital/ours", "config.json")
    assert is_restricted("hospital/ours")
    assert not is_restricted("") and not is_restricted(tmp_path)  # no checkpoint of ours
    for silent in ('{"stage": "finetune"}', "{}"):
        (checkpoint / "medforget.json").write_text(silent)
        assert is_restricted(checkpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="which says whether it is restricted, cannot be read"):
        is_restricted("hospital/ours")


def test_whose_word_it_was_stands_in_the_commit(restricted, local_hub, monkeypatch):
    monkeypatch.setattr("medforget_dataset.agreement.is_loopback", lambda url: False)
    push_model(restricted, "hospital/ours", complies="J. Doe, agreement 7")
    assert "J. Doe, agreement 7" in local_hub.repos["models", "hospital/ours"]["commits"][-1]["description"]


def test_a_model_made_with_a_restricted_reference_is_restricted(restricted, free, local_hub, tmp_path, grouped):
    model, processor = load_checkpoint(free)
    chosen = {"push_to_hub": True, "hub_model_id": "hospital/npo", "hub_private_repo": False, "level": "patient"}
    args = UnlearnConfig(
        str(tmp_path / "out"), max_steps=1, use_cpu=True, method_args={"reference": str(restricted)}, **chosen
    )
    with pytest.raises(UserError, match="is restricted"):
        UnlearnTrainer(model, args, grouped, processor)
    assert not local_hub.repos


@pytest.mark.parametrize("lora", [False, True])
def test_the_mark_goes_where_a_trainer_saves(lora, restricted, free, tmp_path, grouped, of_patients):
    """Rows or base are restricted; what `save_model` and `save_pretrained` write says so."""
    for name, base, rows in (("rows", free, of_patients), ("base", restricted, grouped), ("free", free, grouped)):
        model, processor = load_checkpoint(base)
        args = UnlearnConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, level="patient", use_peft=lora)
        trainer = UnlearnTrainer(model, args, rows, processor)
        trainer.model.save_pretrained(tmp_path / f"of-{name}-by-hand")
        trainer.save_model(str(tmp_path / f"of-{name}"))
        assert [is_restricted(tmp_path / f"of-{name}{more}") for more in ("", "-by-hand")] == (
            [False] * 2 if name == "free" else [True, not lora or name == "base"]
        )
        (tmp_path / f"of-{name}" / "medforget.json").unlink(missing_ok=True)
    if not lora:
        assert is_restricted(tmp_path / "of-rows")  # by the mark in its configuration alone


@pytest.mark.parametrize("lora", [False, True])
def test_the_mark_goes_with_a_model_from_trainer_to_trainer(lora, free, tmp_path, grouped, of_patients):
    options = {"max_steps": 2, "use_cpu": True, "level": "patient", "use_peft": lora}
    options |= {"save_strategy": "steps", "save_steps": 1}
    model, processor = load_checkpoint(free)
    first = UnlearnTrainer(model, UnlearnConfig(str(tmp_path / "first"), **options), of_patients, processor)
    first.train()
    options["max_steps"] = 3
    again, _ = load_checkpoint(free)
    resumed = UnlearnTrainer(again, UnlearnConfig(str(tmp_path / "resumed"), **options), grouped, processor)
    assert not is_marked(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    trained = first.model.merge_and_unload() if lora else first.model
    trained.save_pretrained(tmp_path / "mine")
    assert is_restricted(tmp_path / "mine")
    next_one = UnlearnTrainer(trained, UnlearnConfig(str(tmp_path / "next"), **options), grouped, processor)
    for trainer, name in ((resumed, "resumed"), (next_one, "next")):
        trainer.save_model(str(tmp_path / name))
        assert is_restricted(tmp_path / name), name


def test_a_record_that_contradicts_the_model_is_refused(restricted, free, local_hub, capsys):
    model, _ = load_checkpoint(restricted)
    model.save_pretrained(free)
    assert is_restricted(free)
    line = refusal(capsys, "model", free, "hospital/free", "--public")
    assert "config.json says that it is restricted, and medforget.json that it is not" in line


def test_a_push_that_fails_leaves_the_mark(free, local_hub, tmp_path, of_patients):
    model, processor = load_checkpoint(free)
    chosen = {"push_to_hub": True, "hub_model_id": "hospital/npo", "use_peft": True, "level": "patient"}
    args = UnlearnConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, **chosen)
    trainer = UnlearnTrainer(model, args, of_patients, processor)
    local_hub.repos["models", "hospital/npo"]["private"] = False
    with pytest.raises(UserError, match="is public, and what would go there is restricted"):
        trainer.save_model(str(tmp_path / "saved"))
    assert is_restricted(tmp_path / "saved")


def test_a_configuration_that_cannot_be_read_is_no_leave(restricted, local_hub, monkeypatch):
    model, processor = load_checkpoint(restricted)
    model.push_to_hub("hospital/plain", private=True)
    assert is_restricted("hospital/plain")
    monkeypatch.setattr("unlearn.checkpoint_info.hub_file", lambda *names: None)
    with pytest.raises(UserError, match="which may say that it is restricted, cannot be read"):
        is_restricted("hospital/plain")


def test_what_a_base_was_is_not_known_when_it_is_gone(free, local_hub, tmp_path, grouped):
    model, processor = load_checkpoint(free)
    model.name_or_path = str(tmp_path / "gone")
    assert is_restricted(tmp_path / "gone")
    chosen = {"push_to_hub": True, "hub_model_id": "hospital/npo", "hub_private_repo": False, "level": "patient"}
    with pytest.raises(UserError, match="is restricted"):
        UnlearnTrainer(model, UnlearnConfig(str(tmp_path / "out"), use_cpu=True, **chosen), grouped, processor)
    assert not local_hub.repos


def test_a_repository_that_is_opened_by_the_commit_is_closed_again(restricted, local_hub, capsys, monkeypatch):
    commit = huggingface_hub.HfApi.create_commit

    def commit_and_open(self, repo_id, *args, **options):
        commit(self, repo_id, *args, **options)
        local_hub.repos["models", repo_id]["private"] = False

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit_and_open)
    assert "was made private again" in refusal(capsys, "model", restricted, "hospital/ours")
    assert local_hub.repos["models", "hospital/ours"]["private"]


@pytest.mark.parametrize("record", ["{", "null", "{}", '{"restricted": "false"}'])
def test_a_history_that_does_not_say_that_it_is_free_is_not_shown(record, free, local_hub, capsys):
    api = huggingface_hub.HfApi()
    api.create_repo("hospital/old", private=True)
    api.upload_file(path_or_fileobj=record.encode(), path_in_repo="medforget.json", repo_id="hospital/old")
    assert record == "{" or is_restricted("hospital/old")
    line = refusal(capsys, "model", free, "hospital/old", "--replace", "--public")
    assert "its history holds what does not say that it is free" in line


def test_the_token_that_is_given_reads_the_history(free, local_hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push_model(free, "hospital/free", token="hf_alice").private
    assert not push_model(free, "hospital/free", token="hf_alice", public=True).private
