"""Runs that are killed, stopped or kept: the same weights as if nothing had happened, or the best there were."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from stand_in import make_model, make_rows
from transformers import TrainerState

from medforget_dataset.errors import UserError
from unlearn.callbacks import COMPLETE
from unlearn.checkpoints import load_checkpoint, save_checkpoint
from unlearn.config import FineTuneConfig, UnlearnConfig
from unlearn.grouping import group_by_image
from unlearn.trainer import FineTuneTrainer, TrainingDiverged, UnlearnTrainer
from unlearn.training import run_trainer
from unlearn.training_folder import TrainingFolder
from unlearn.unlearning import unlearn


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 8


def arguments(lora):
    adapter = {"use_peft": True, "lora_r": 4} if lora else {}
    return {"method": "npo", "level": "section", "max_steps": STEPS, "save_steps": 1, "learning_rate": 1e-3, **adapter}


def start(data, model, out, lora):
    """The run as a process of its own."""
    command = [
        sys.executable,
        "-m",
        "unlearn.cli",
        "unlearn",
        "--data",
        data,
        "--model",
        model,
        "--out",
        out,
        "--resume",
    ]
    for name, value in arguments(lora).items():
        flag = {"use_peft": "lora"}.get(name, name.replace("_", "-"))
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(lora, data_dir, tiny_checkpoint, tmp_path):
    torch.set_num_threads(1)
    out, in_progress = tmp_path / "killed", tmp_path / "killed.training"
    process = start(data_dir, tiny_checkpoint, out, lora)
    deadline = time.monotonic() + 300
    while not list(in_progress.glob(f"checkpoint-[23]/{COMPLETE}")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and in_progress.is_dir()
    given = {"model": tiny_checkpoint, "quiet": True, **arguments(lora)}
    with pytest.raises(UserError, match=r"killed\.training: holds a run that was not finished; add --resume"):
        unlearn(data_dir, out, **given)
    with pytest.raises(UserError, match=r"holds another run: .*arguments.*--overwrite"):
        unlearn(data_dir, out, resume=True, **{**given, "learning_rate": 1e-4})
    resumed = unlearn(data_dir, out, resume=True, **given)
    assert not in_progress.exists()
    info = json.loads((out / "medforget.json").read_text())
    assert info["steps"] == STEPS and info["seed"] == 0

    assert unlearn(data_dir, tmp_path / "whole", **given) == resumed
    assert_same(weights(out), weights(tmp_path / "whole"))
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(out).values(), weights(tiny_checkpoint).values(), strict=True)
    )
    # Asked once more it is done already.
    changed = (out / "model.safetensors").stat().st_mtime_ns
    assert unlearn(data_dir, out, resume=True, **given) == resumed
    assert (out / "model.safetensors").stat().st_mtime_ns == changed


@pytest.mark.slow
def test_a_run_killed_ten_times_at_random_moments(data_dir, tiny_checkpoint, tmp_path):
    began = time.monotonic()
    assert start(data_dir, tiny_checkpoint, tmp_path / "whole", False).wait() == 0
    whole = time.monotonic() - began
    draw, kills = random.Random(0), 0
    while kills < 10:
        process = start(data_dir, tiny_checkpoint, tmp_path / "killed", False)
        time.sleep(draw.uniform(0, whole))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert start(data_dir, tiny_checkpoint, tmp_path / "killed", False).wait() == 0
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert [path.name for path in tmp_path.iterdir() if "training" in path.name] == []


def test_a_checkpoint_that_was_cut_short_is_not_gone_on_from(tmp_path):
    folder = TrainingFolder(tmp_path / "out")
    folder.open({"a": 1}, resume=True, overwrite=False)
    for step in (4, 9, 10):
        (folder.path / f"checkpoint-{step}").mkdir()
    assert folder.last_checkpoint() is None
    for step in (4, 9):
        (folder.path / f"checkpoint-{step}" / COMPLETE).touch()
    assert folder.last_checkpoint().name == "checkpoint-9"


# Keeping the best, and stopping.


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def grouped(rows):
    return group_by_image(rows, [i for i in rows["id"] if "study003" in i or "study001/findings" in i])


@pytest.fixture(scope="module")
def taught(rows, grouped, tmp_path_factory):
    """A checkpoint that knows every row."""
    model, processor = make_model(rows)
    config = FineTuneConfig(
        output_dir=str(tmp_path_factory.mktemp("taught")), use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        max_steps=100, per_device_train_batch_size=6, lr_scheduler_kwargs={"min_lr_rate": 0.02},
    )  # fmt: skip
    FineTuneTrainer(model, config, grouped, processor).train()
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "taught", model, processor, {})


def run(tmp_path, taught, grouped, **arguments):
    model, processor = load_checkpoint(taught)
    folder = TrainingFolder(tmp_path / "out")
    folder.open({}, resume=False, overwrite=True)
    given = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "forget_per_step": 1, "retain_per_step": 2}
    config = UnlearnConfig(output_dir=str(folder.path), **{**given, "selectivity_steps": 1, **arguments})
    trainer = UnlearnTrainer(model, config, grouped, processor)
    return run_trainer(trainer, folder), trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_weights_are_kept(lora, tmp_path, taught, grouped):
    """Ascent alone, in which the model first forgets what it should and then the rest."""
    rate = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2} if lora else {"learning_rate": 1e-3}
    ascent = {"method": "grad_diff", "method_args": {"retain_weight": 0.0}, "max_steps": 16, "retain_per_step": 0}
    trained, trainer = run(tmp_path, taught, grouped, keep_best=True, **ascent, **rate)
    measured = [line for line in trained.log if "selectivity" in line]
    assert [line["step"] for line in measured] == list(range(1, len(measured) + 1))
    best = max(line["selectivity"] for line in measured)
    assert best > max(measured[0]["selectivity"], measured[-1]["selectivity"]) + 0.02
    assert trained.kept_step == next(line["step"] for line in measured if line["selectivity"] == best)
    trainer.model = trained.model
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "Selectivity")
    assert callback.measure()["selectivity"] == pytest.approx(best, abs=1e-6)
    assert len(list((tmp_path / "out.training").glob("best-*"))) <= 2


def test_training_stops_when_too_little_is_retained(tmp_path, taught, grouped):
    arguments = {"method": "grad_diff", "learning_rate": 0.01, "max_steps": 30}
    trained, _ = run(tmp_path, taught, grouped, retain_floor=0.9, keep_best=True, **arguments)
    measured = [line for line in trained.log if "selectivity" in line]
    assert trained.steps < 30 and f"step {trained.steps}" in trained.stopped
    assert all(line["retain_exact"] < 0.9 for line in measured[-2:])
    (kept,) = [line for line in measured if line["step"] == trained.kept_step]
    assert kept["retain_exact"] >= 0.9


def test_a_run_killed_after_its_last_step_does_no_step_more(tmp_path, taught, grouped):
    """The last step is in the middle of an epoch, and one at which a checkpoint is due."""
    arguments = {"method": "npo", "learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole, _ = run(tmp_path, taught, grouped, **arguments)
    folder = TrainingFolder(tmp_path / "out")
    model, processor = load_checkpoint(taught)
    given = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "forget_per_step": 1, "retain_per_step": 2}
    config = UnlearnConfig(output_dir=str(folder.path), **given, **arguments)
    again = run_trainer(UnlearnTrainer(model, config, grouped, processor), folder)
    assert again.steps == whole.steps == 4
    assert_same(again.model.state_dict(), whole.model.state_dict())


def test_a_run_that_stopped_by_itself_stops_again_when_it_goes_on(tmp_path, taught, grouped):
    """The step at which it stops is one at which it would have written a checkpoint."""
    arguments = {"method": "grad_diff", "learning_rate": 0.01, "max_steps": 30, "save_strategy": "steps"}
    arguments |= {"save_steps": 1, "retain_floor": 0.9, "keep_best": True}
    stopped, _ = run(tmp_path, taught, grouped, **arguments)
    folder = TrainingFolder(tmp_path / "out")
    last = folder.last_checkpoint().name
    assert last == f"checkpoint-{stopped.steps - 1}"
    model, processor = load_checkpoint(taught)
    given = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "forget_per_step": 1, "retain_per_step": 2}
    config = UnlearnConfig(output_dir=str(folder.path), selectivity_steps=1, **given, **arguments)
    again = run_trainer(UnlearnTrainer(model, config, grouped, processor), folder)
    assert (again.steps, again.kept_step, again.stopped) == (stopped.steps, stopped.kept_step, stopped.stopped)
    assert_same(again.model.state_dict(), stopped.model.state_dict())


def test_the_best_that_the_last_checkpoint_knows_is_not_removed(tmp_path, taught, grouped):
    """Three new bests after the only checkpoint: a run that goes on from it may come to none of them again."""
    ascent = {"method": "grad_diff", "method_args": {"retain_weight": 0.0}, "max_steps": 16, "retain_per_step": 0}
    run(tmp_path, taught, grouped, keep_best=True, learning_rate=1e-3, save_strategy="steps", save_steps=3, **ascent)
    folder = TrainingFolder(tmp_path / "out")
    state = TrainerState.load_from_json(str(folder.last_checkpoint() / "trainer_state.json"))
    best = max((line for line in state.log_history if "selectivity" in line), key=lambda line: line["selectivity"])
    assert (folder.path / f"best-{best['step']}").is_dir()


def test_what_diverges_ends_with_the_best_if_that_is_kept(tmp_path, taught, grouped):
    arguments = {"method": "grad_diff", "learning_rate": 0.3, "max_steps": 12, "warmup_steps": 2}
    with pytest.raises(TrainingDiverged, match="the model has collapsed"):
        run(tmp_path, taught, grouped, **arguments)
    trained, _ = run(tmp_path, taught, grouped, keep_best=True, **arguments)
    assert trained.kept_step and "the model has collapsed" in trained.stopped
