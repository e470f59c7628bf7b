"""Publishing on a Hub of the test's own, by the clients that users have: what is sent, refused, and read back."""

import json
import os
import shutil
import socket
import subprocess
import sys

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import PeftModel
from push_calls import refusal, said

from medforget_dataset import UserError, load
from medforget_dataset.publishing import check_name
from unlearn.checkpoints import load_checkpoint
from unlearn.cli import main
from unlearn.config import UnlearnConfig
from unlearn.hub import push_model
from unlearn.preconditions import OWNED, OWNED_BY_UNLEARNING
from unlearn.trainer import UnlearnTrainer
from unlearn.unlearning import forget_and_retain, unlearn


@pytest.fixture(scope="module")
def checkpoints(data_dir, tiny_checkpoint, tmp_path_factory):
    """An unlearned adapter and an unlearned whole model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    chosen = {"model": tiny_checkpoint, "method": "npo", "level": "patient", "max_steps": 1, "quiet": True}
    chosen |= {"learning_rate": 0.01, "warmup_steps": 0}
    unlearn(data_dir, folder / "full", **chosen)
    unlearn(data_dir, folder / "lora", use_peft=True, save_adapter=True, **chosen)
    return folder


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A whole model, and a copy of it at that: a test may change it."""
    return shutil.copytree(checkpoints / "full", tmp_path / "npo-patient")


def test_a_dataset_is_read_back_by_name_row_by_row(data_dir, local_hub, capsys):
    lines = said(capsys, ["push", "dataset", str(data_dir), "hospital/medforget"])
    assert lines[-1].endswith(f"{local_hub.url}/datasets/hospital/medforget, private")
    stored = local_hub.repos["datasets", "hospital/medforget"]
    assert stored["private"]
    stored = {name: oid for name, (oid, _, _) in stored["commits"][-1]["files"].items()}
    record = json.loads((data_dir / "build.json").read_text())
    assert set(stored) == {"build.json", *record["files"]}
    assert all(stored[name] == built["sha256"] for name, built in record["files"].items())
    for config, split in (("patient_forget", "train"), ("institution_forget_rephrase", "test")):
        built = pq.read_table(next((data_dir / config).glob(f"{split}-*.parquet")))
        rows = datasets.load_dataset("hospital/medforget", config, split=split)
        assert rows.data.table.cast(built.schema).equals(built)  # images too, byte by byte
        streamed = datasets.load_dataset("hospital/medforget", config, split=split, streaming=True)
        undecoded = streamed.cast_column("image", datasets.Image(decode=False))
        images = built["image"].to_pylist()
        for row, image, id in zip(undecoded, images, built["id"].to_pylist(), strict=True):
            assert (row["image"]["bytes"], row["id"]) == (image["bytes"], id)
    assert datasets.get_dataset_config_names("hospital/medforget") == datasets.get_dataset_config_names(str(data_dir))
    assert load("section_retain", "train", data="hospital/medforget")["id"][:3]


def test_the_environment_alone_names_the_hub(data_dir, local_hub, tmp_path):
    """As users have it: two programs of their own, the second with an empty cache."""
    environment = os.environ | local_hub.environment | {"HF_TOKEN": "hf_alice"}
    medforget = [sys.executable, "-m", "unlearn.cli", "push", "dataset", str(data_dir), "hospital/medforget"]
    done = subprocess.run(medforget, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = "import datasets as d; print(d.load_dataset('hospital/medforget', 'institution_forget', split='train'))"
    for token, found in (("hf_alice", True), ("hf_bob", False)):
        environment |= {"HF_TOKEN": token, "HF_HOME": str(tmp_path / f"home-{token}")}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) is found, done.stderr
        assert (
            "num_rows: 240" if found else "doesn't exist on the Hub or cannot be accessed"
        ) in done.stdout + done.stderr


def test_a_second_push_uploads_nothing(data_dir, checkpoint, local_hub, capsys):
    for kind, folder in (("dataset", data_dir), ("model", checkpoint)):
        call = ["push", kind, str(folder), f"hospital/{kind}"]
        assert "files sent" in said(capsys, call)[0]
        commits = len(local_hub.repos[f"{kind}s", f"hospital/{kind}"]["commits"])
        local_hub.log.clear()
        assert "nothing was sent" in said(capsys, call)[0]
        assert local_hub.sent() == []
        assert len(local_hub.repos[f"{kind}s", f"hospital/{kind}"]["commits"]) == commits


def test_a_dry_run_lists_files_and_sizes_and_reaches_nothing(data_dir, checkpoint, local_hub, capsys):
    for kind, folder in (("dataset", data_dir), ("model", checkpoint)):
        assert main(["push", kind, str(folder), f"hospital/{kind}", "--dry-run"]) == 0
        printed = capsys.readouterr()
        listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in printed.out.splitlines()}
        assert local_hub.log == []
        assert f"{len(listed)} files, {sum(listed.values()):,} bytes, private; nothing was sent" in printed.err
        main(["push", kind, str(folder), f"hospital/{kind}"])
        files = local_hub.repos[f"{kind}s", f"hospital/{kind}"]["commits"][-1]["files"]
        assert listed == {name: size for name, (_, size, _) in files.items()}
        capsys.readouterr()
        local_hub.log.clear()


def test_a_dropped_connection_is_gone_on_with(data_dir, local_hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    local_hub.uploads_left = 5
    line = refusal(capsys, "dataset", data_dir, "hospital/medforget")
    assert "the connection failed" in line and "run the same command again" in line
    stored = local_hub.repos["datasets", "hospital/medforget"]
    assert stored["commits"][-1]["files"] == {}  # nobody sees half of it
    arrived = {path for path in local_hub.sent() if path.startswith("/lfs/")}
    arrived = {path for path in arrived if (local_hub.blobs / path.rpartition("/")[2]).exists()}
    assert len(arrived) == 5
    local_hub.uploads_left = None
    local_hub.log.clear()
    said(capsys, ["push", "dataset", str(data_dir), "hospital/medforget"])
    assert not arrived.intersection(local_hub.sent())
    assert load("finetune", "train", data="hospital/medforget")["id"] == load("finetune", "train", data=data_dir)["id"]


def logits(model, processor, data_dir):
    row = load("finetune", "train", data=data_dir)[0]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with torch.no_grad():
        return model(**processor(text=[text], images=[row["image"]], return_tensors="pt")).logits


def test_checkpoints_come_back_with_the_same_logits(data_dir, checkpoints, tiny_checkpoint, local_hub, capsys):
    vanilla = shutil.copytree(tiny_checkpoint, checkpoints / "vanilla", dirs_exist_ok=True)
    (vanilla / "medforget.json").write_text('{"stage": "finetune", "restricted": false}')
    push_model(vanilla, "hospital/vanilla")
    push_model(checkpoints / "full", "hospital/full", base="hospital/vanilla", dataset="hospital/medforget")
    note = " ".join(said(capsys, ["push", "model", str(checkpoints / "lora"), "hospital/of-a-folder"]))
    assert "on this machine alone" in note and str(tiny_checkpoint) in note
    push_model(checkpoints / "lora", "hospital/lora", base="hospital/vanilla")
    for name in ("full", "lora"):
        files = local_hub.repos["models", f"hospital/{name}"]["commits"][-1]["files"]
        assert not {path for path in files if path.endswith((".bin", ".pt", ".pkl"))}
        for path in files:
            if path.endswith(".json"):
                blob = (local_hub.blobs / files[path][0]).read_text()
                assert str(checkpoints) not in blob and str(data_dir) not in blob, path
        expected = logits(*load_checkpoint(checkpoints / name), data_dir)
        model, processor = load_checkpoint(f"hospital/{name}")
        torch.testing.assert_close(logits(model, processor, data_dir), expected, rtol=0, atol=0)
    # As a user of PEFT loads it, who has never heard of us.
    base, processor = load_checkpoint("hospital/vanilla")
    adapted = PeftModel.from_pretrained(base, "hospital/lora").eval()
    torch.testing.assert_close(logits(adapted, processor, data_dir), expected, rtol=1e-4, atol=1e-4)
    before = logits(*load_checkpoint(tiny_checkpoint), data_dir)
    assert not torch.allclose(expected, before, atol=1e-2)


def test_strangers_are_refused(data_dir, checkpoint, local_hub, monkeypatch):
    (checkpoint / "training_args.bin").write_bytes(b"not ours")
    push_model(checkpoint, "hospital/private")
    assert "training_args.bin" not in local_hub.repos["models", "hospital/private"]["commits"][-1]["files"]
    push_model(checkpoint, "hospital/gated", public=True)
    huggingface_hub.HfApi().update_repo_settings("hospital/gated", gated="manual")
    assert not local_hub.repos["models", "hospital/gated"]["private"]
    for token in ("hf_bob", "hf_nobody"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.hf_hub_download("hospital/private", "model.safetensors")
        with pytest.raises(GatedRepoError):
            huggingface_hub.hf_hub_download("hospital/gated", "model.safetensors")
        with pytest.raises(UserError, match=r"^hospital/private: "):
            load_checkpoint("hospital/private")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert load_checkpoint("hospital/gated")


def test_what_cannot_be_pushed_is_refused_in_one_line(data_dir, checkpoint, local_hub, capsys, monkeypatch, tmp_path):
    for name in ("medforget", "a/b/c", "hospital/med forget", "hospital/x..y"):
        assert refusal(capsys, "dataset", data_dir, name).startswith(f"medforget push: {name}: ")
    assert "write access to clinic" in refusal(capsys, "dataset", data_dir, "clinic/medforget")
    assert "--base: only for `medforget push model`" in refusal(
        capsys, "dataset", data_dir, "hospital/x", "--base", "a/b"
    )
    assert "not a MedForget dataset" in refusal(capsys, "dataset", tmp_path, "hospital/x")
    assert "not a MedForget checkpoint" in refusal(capsys, "model", data_dir, "hospital/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept the token" in refusal(capsys, "dataset", data_dir, "hospital/medforget")
    monkeypatch.setenv("HF_TOKEN", "“hf_alice”")
    assert "has a character that no token has" in refusal(capsys, "dataset", data_dir, "hospital/medforget")
    monkeypatch.delenv("HF_TOKEN")
    assert "no Hub token; run `hf auth login`" in refusal(capsys, "dataset", data_dir, "hospital/medforget")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(capsys, "dataset", data_dir, "hospital/medforget")
    assert not local_hub.repos


def test_a_folder_that_breaks_an_invariant_is_not_published(data_dir, local_hub, capsys, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "medforget")
    card = folder / "README.md"
    card.write_text(card.read_text() + "More.\n")
    assert "README.md" in refusal(capsys, "dataset", folder, "hospital/medforget")
    record = json.loads((folder / "build.json").read_text())
    record["options"]["institutions"] += 4
    (folder / "build.json").write_text(json.dumps(record))
    shutil.copy(data_dir / "README.md", card)
    assert "medforget validate" in refusal(capsys, "dataset", folder, "hospital/medforget")
    assert not local_hub.repos


def test_other_content_is_replaced_only_when_asked(data_dir, checkpoint, local_hub, capsys):
    api = huggingface_hub.HfApi()
    api.create_repo("hospital/taken", repo_type="dataset", private=True)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="hospital/taken", repo_type="dataset")
    line = refusal(capsys, "dataset", data_dir, "hospital/taken")
    assert "holds something else (notes.txt)" in line and "--replace" in line
    assert "removed" in said(capsys, ["push", "dataset", str(data_dir), "hospital/taken", "--replace"])[0]
    files = local_hub.repos["datasets", "hospital/taken"]["commits"][-1]["files"]
    assert "notes.txt" not in files and "README.md" in files

    push_model(checkpoint, "hospital/model")
    card = checkpoint / "medforget.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"seed": 7}))
    assert push_model(checkpoint, "hospital/model").sent  # what only describes the weights may be brought up to date
    weights = checkpoint / "generation_config.json"
    weights.write_text(weights.read_text() + "\n")
    assert "holds something else (generation_config.json)" in refusal(capsys, "model", checkpoint, "hospital/model")


def test_a_repository_that_changes_meanwhile_is_told(checkpoint, local_hub, capsys):
    api = huggingface_hub.HfApi()
    api.create_repo("hospital/model", private=True)

    def change():
        local_hub.on_upload = None
        commits = local_hub.repos["models", "hospital/model"]["commits"]
        commits.append(commits[-1] | {"sha": "0" * 40})

    local_hub.on_upload = change
    assert "was changed meanwhile" in refusal(capsys, "model", checkpoint, "hospital/model")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "adapter_model.safetensors"])
def test_files_of_weights_that_are_not_the_checkpoints_are_refused(name, checkpoint, local_hub, capsys):
    shutil.copy(checkpoint / "model.safetensors", checkpoint / name)
    assert f"{name} is not among its weights (model.safetensors)" in refusal(capsys, "model", checkpoint, "hospital/m")


def test_shards_go_up_as_their_index_says(checkpoint, local_hub, capsys, tmp_path):
    model, _ = load_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="1MB")
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    push_model(checkpoint, "hospital/shards")
    files = local_hub.repos["models", "hospital/shards"]["commits"][-1]["files"]
    assert len(shards) > 2 and sorted(path for path in files if path.endswith(".safetensors")) == shards
    (checkpoint / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert f"{shards[0]} is not among its weights (model.safetensors.index.json)" in refusal(
        capsys, "model", checkpoint, "hospital/shards"
    )
    (checkpoint / "model.safetensors.index.json").unlink()
    assert f"{shards[0]} is not among its weights" in refusal(capsys, "model", checkpoint, "hospital/shards")


def test_a_file_here_that_cannot_be_read_is_not_the_connections_fault(checkpoint, local_hub, capsys, monkeypatch):
    def fail(self, repo_id, additions, **options):
        open(checkpoint / "gone.safetensors")

    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", fail)
    line = refusal(capsys, "model", checkpoint, "hospital/model")
    assert "gone.safetensors: cannot be read (No such file" in line and "connection" not in line


def test_names_that_the_hub_takes():
    check_name("hospital/medforget-2.0")


def test_training_pushes_what_it_has_written(data_dir, tiny_checkpoint, local_hub, tmp_path, capsys):
    out = tmp_path / "npo"
    call = [
        "unlearn",
        "--data",
        str(data_dir),
        "--model",
        str(tiny_checkpoint),
        "--method",
        "npo",
        "--level",
        "patient",
    ]
    call += ["--max-steps", "1", "--out", str(out), "--push-to-hub"]
    assert "give ORG/NAME" in said(capsys, [*call, "npo"], status=2)[-1]
    assert main([*call, "hospital/npo"]) == 0
    stored = local_hub.repos["models", "hospital/npo"]
    assert stored["private"] and "model.safetensors" in stored["commits"][-1]["files"]
    assert "training_args.bin" not in stored["commits"][-1]["files"]
    assert main([*call, "hospital/again", "--resume"]) == 0  # there is nothing to train any more
    again = local_hub.repos["models", "hospital/again"]["commits"][-1]["files"]
    assert again["model.safetensors"] == stored["commits"][-1]["files"]["model.safetensors"]
    # Before a step is made.
    shutil.rmtree(out)
    assert "choose another name" in said(capsys, [*call, "hospital/npo"], status=2)[-1]
    assert not out.exists()


def test_a_trainer_pushes_its_adapter(data_dir, tiny_checkpoint, local_hub, tmp_path, monkeypatch):
    grouped, _ = forget_and_retain(data_dir, "patient")
    model, processor = load_checkpoint(tiny_checkpoint, dtype=torch.float32)
    chosen = {
        "push_to_hub": True,
        "hub_model_id": "hospital/adapter",
        "use_peft": True,
        "learning_rate": 0.1,
        "warmup_steps": 0,
    }
    chosen |= {"hub_token": "hf_alice", "hub_private_repo": None}
    monkeypatch.delenv("HF_TOKEN")
    args = UnlearnConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, level="patient", **chosen)
    trainer = UnlearnTrainer(model, args, grouped, processor)
    trainer.train()
    assert trainer.push_to_hub() == f"{local_hub.url}/hospital/adapter"
    assert local_hub.repos["models", "hospital/adapter"]["private"]
    files = local_hub.repos["models", "hospital/adapter"]["commits"][-1]["files"]
    assert "adapter_model.safetensors" in files and "training_args.bin" not in files
    info = json.loads((local_hub.blobs / files["medforget.json"][0]).read_text())
    assert (info["method"], info["level"], info["restricted"]) == ("npo", "patient", False)
    assert info["arguments"]["learning_rate"] == 0.1 and "hub_token" not in info["arguments"]
    assert info["save_adapter"] and not (OWNED | OWNED_BY_UNLEARNING).keys() & info["arguments"].keys()
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    pushed, _ = load_checkpoint("hospital/adapter")
    trained = trainer.model.merge_and_unload()
    for (name, a), (_, b) in zip(pushed.named_parameters(), trained.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_clients_own_pushes_find_a_hub(data_dir, tiny_checkpoint, local_hub):
    rows = load("patient_forget", "train", data=data_dir).select(range(4))
    rows.push_to_hub("hospital/rows", private=True)
    again = datasets.load_dataset("hospital/rows", split="train")
    assert again["id"] == rows["id"] and again[0]["image"].tobytes() == rows[0]["image"].tobytes()
    model, _ = load_checkpoint(tiny_checkpoint)
    model.push_to_hub("hospital/model", private=True)
    pushed = type(model).from_pretrained("hospital/model")
    for (name, a), (_, b) in zip(pushed.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    api = huggingface_hub.HfApi()
    assert api.whoami()["name"] == "alice"
    (weights,) = api.get_paths_info("hospital/model", "model.safetensors")
    assert weights.lfs.size == weights.size > 1_000_000
    api.delete_folder("data", "hospital/rows", repo_type="dataset")
    assert not [file for file in api.list_repo_files("hospital/rows", repo_type="dataset") if file.startswith("data/")]
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="Repository Not Found"):
        api.delete_repo("hospital/model", token="hf_bob")
    api.delete_repo("hospital/model")
    assert not api.repo_exists("hospital/model")


ELSEWHERE = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"


def test_no_test_reaches_another_machine():
    with pytest.raises(OSError, match=r"no test may reach 192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    with pytest.raises(OSError, match=r"no test may reach hub\.example\.org"):
        socket.getaddrinfo("hub.example.org", 443)
    started = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True)
    assert "no test may reach 192.0.2.1" in started.stderr
