"""A run that cannot go on says in one line why and how to go on, and leaves nothing that is in the way."""

import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_calls import assert_one_line, assert_refused, caller, make_inputs

from unlearn.memory import in_batches_that_fit
from unlearn.trainer import FineTuneTrainer


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("right"))


@pytest.fixture(scope="module")
def data(inputs):
    return inputs[1]


@pytest.fixture(scope="module")
def base(inputs):
    return inputs[2]


@pytest.fixture
def call(data, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return caller(data, base, tmp_path, capsys)


# The folder that is written.


def test_what_the_run_reads_is_not_written_over(base, data, call, tmp_path):
    before = (base / "model.safetensors").stat().st_mtime_ns
    for command in ("unlearn", "finetune"):
        code, said, _ = call(command, "--overwrite", out=f"{base}/")
        assert code == 2 and "is the checkpoint that the run reads" in assert_one_line(said, command)
    reference = shutil.copytree(base, tmp_path / "reference")
    code, said, _ = call("unlearn", "--reference", reference, "--overwrite", out=reference)
    assert code == 2 and "is the checkpoint that the run reads" in assert_one_line(said, "unlearn")
    code, said, _ = call("unlearn", "--overwrite", out=data)
    assert code == 2 and f"{data}: holds something else" in assert_one_line(said, "unlearn")
    assert (base / "model.safetensors").stat().st_mtime_ns == before and (data / "build.json").is_file()


@pytest.mark.parametrize("method", ["npo", "manu"])
def test_a_place_where_nothing_can_be_written(method, base, call):
    for out, place in (("/proc/nowhere/out", "/proc"), (base / "config.json" / "out", base / "config.json")):
        code, said, _ = call("unlearn", out=out, method=method)
        assert code == 1
        assert f"--out {out}: cannot write in {place}" in assert_one_line(said, "unlearn")


def test_a_folder_beside_it_that_is_no_run_is_left_alone(call, tmp_path):
    notes = tmp_path / "place" / "out.training" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for flag in ("--resume", "--overwrite"):
        code, said, _ = call("unlearn", flag)
        assert code == 2 and f"{notes.parent}: holds something else" in assert_one_line(said, "unlearn")
    assert notes.read_text() == "mine"


def test_another_run_is_not_written_over_and_a_finished_one_is_not_done_again(call):
    code, said, out = call("unlearn", "--resume")
    assert code == 0 and not out.with_name("out.training").exists(), said
    written = (out / "model.safetensors").stat().st_mtime_ns
    out.with_name("out.training").mkdir()
    code, again, _ = call("unlearn", "--resume", "--report-to", "none")
    assert code == 0 and again == said[said.index(f"{out}: rows") :]
    assert not out.with_name("out.training").exists()
    for flags in (["--learning-rate", "1e-3"], ["--resume", "--learning-rate", "1e-3"]):
        code, said, _ = call("unlearn", *flags)
        assert code == 2 and "another run (unlearn)" in assert_one_line(said, "unlearn")
    code, said, _ = call("finetune")
    assert code == 2 and f"{out}: holds the checkpoint of another run" in assert_one_line(said, "finetune")
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# The machine.


def breaks(monkeypatch, step, act):
    """Have training do something before a step, which is counted from 0."""
    original = FineTuneTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FineTuneTrainer, "training_step", training_step)


def gpu_runs_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_runs_out():
    torch.empty(1 << 50)


@pytest.mark.parametrize("runs_out", [gpu_runs_out, cpu_runs_out])
def test_out_of_memory_says_what_to_lower_and_leaves_nothing(runs_out, call, monkeypatch):
    with monkeypatch.context() as patch:
        breaks(patch, 0, runs_out)
        answer = call("unlearn", "--forget-per-step", 2)
        names = ["out of memory", "--forget-per-step", "--accumulation", "activation_checkpointing", "--max-pixels"]
        assert_refused(answer, "unlearn", *names, "--lora", early=False)
        answer = call("finetune", "--lora")
        assert "or --lora" not in assert_refused(answer, "finetune", "--images-per-step", "--max-pixels", early=False)


STEPS = ["--max-steps", 4, "--save-steps", 1, "--learning-rate", 0.1, "--set", "optim=sgd"]


def test_a_run_that_ran_out_of_memory_goes_on_with_smaller_batches(call, base, monkeypatch, tmp_path):
    batch = ["--forget-per-step", 2, "--retain-per-step", 2]
    with monkeypatch.context() as patch:
        breaks(patch, 2, gpu_runs_out)
        code, said, out = call("unlearn", *STEPS, *batch)
    line = assert_one_line(said, "unlearn", early=False)
    training = out.with_name("out.training")
    assert code == 2 and f"{training} holds the run up to step 2" in line and "--resume" in line, line
    assert [path.name for path in out.parent.iterdir()] == ["out.training"]

    code, said, _ = call("unlearn", *STEPS, *batch)
    assert code == 2 and f"{training}: holds a run that was not finished" in assert_one_line(said, "unlearn")
    code, said, _ = call("unlearn", *STEPS, "--retain-per-step", 1, "--resume")
    assert code == 2 and "images_per_step was [2, 2], now it is [2, 1]" in assert_one_line(said, "unlearn")

    smaller = ["--forget-per-step", 1, "--retain-per-step", 1, "--accumulation", 2]
    code, said, _ = call("unlearn", *STEPS, *smaller, "--resume", "--set", "activation_checkpointing=true")
    assert code == 0, said
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert call("unlearn", *STEPS, *batch, out=tmp_path / "whole")[0] == 0
    whole, resumed, before = (load_file(f / "model.safetensors") for f in (tmp_path / "whole", out, base))
    assert max(float((value - before[name]).abs().max()) for name, value in whole.items()) > 0.01
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_scoring_takes_smaller_batches_where_the_memory_does_not_suffice():
    tried = []

    def score(images):
        tried.append(images)
        if images > 4:
            cpu_runs_out()
        return images

    assert in_batches_that_fit(score) == 4
    assert tried == [16, 8, 4]
    with pytest.raises(RuntimeError, match="allocate"):
        in_batches_that_fit(lambda images: cpu_runs_out())
    with pytest.raises(RuntimeError, match="shape"):
        in_batches_that_fit(lambda images: torch.zeros(images).view(3, 5))


TWO_STEPS = ("--max-steps", 2, "--save-steps", 1)


@pytest.fixture
def full_disk():
    """Fill the disk, and make room again; what fails is every write beyond 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_at_the_first_checkpoint(call, monkeypatch, full_disk):
    breaks(monkeypatch, 0, full_disk)
    code, said, out = call("unlearn", *TWO_STEPS)
    line = assert_one_line(said, "unlearn", early=False)
    assert code == 1 and f"{out}.training: cannot write a checkpoint" in line and "arge" in line
    assert list(out.parent.iterdir()) == []


def test_a_disk_that_is_full_at_the_end(call, monkeypatch, full_disk):
    import unlearn.unlearning as module

    original = module.exact_match_by_side
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "exact_match_by_side", lambda *a, **k: full_disk() or original(*a, **k))
        code, said, out = call("unlearn", *TWO_STEPS)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = assert_one_line(said, "unlearn", early=False)
    assert code == 1 and str(out) in line and "step 1" in line and "--resume" in line
    assert [path.name for path in out.parent.iterdir()] == ["out.training"]
    assert call("unlearn", *TWO_STEPS, "--resume")[0] == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_diverges_says_how_to_start_again(call):
    code, said, out = call(
        "unlearn", "--max-steps", 4, "--save-steps", 1, "--learning-rate", 1e30, "--set", "optim=sgd"
    )
    line = assert_one_line(said, "unlearn", early=False)
    assert code == 2 and "the loss is" in line and "lower the learning rate" in line
    if out.with_name("out.training").exists():
        assert "--overwrite" in line and "--resume" not in line
