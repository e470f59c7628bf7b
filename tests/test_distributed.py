"""Training on two processes over gloo equals training on one with the same images a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unlearn.methods import METHODS, GradientMethod


GRADIENT_METHODS = [name for name, method in METHODS.items() if issubclass(method, GradientMethod)]
PROGRAM = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process wrote: of the run with one process, and of both of the run with two."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROGRAM.parents[1]}:{PROGRAM.parent}"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = [
        subprocess.Popen(
            [sys.executable, *command, str(PROGRAM), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in ([], launch)
    ]
    for run in runs:
        printed, _ = run.communicate(timeout=570)
        assert run.returncode == 0, printed[-3000:]
    return {name: torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["finetune", *GRADIENT_METHODS])
def test_two_processes_train_as_one(kind, lora, results):
    one, *two = (results[name][f"{kind}-{lora}"] for name in ("1-0", "2-0", "2-1"))
    assert one["world"] == 1 and {run["world"] for run in two} == {2}
    # In the first step each process has its own images, and together they have those of the one.
    first = [run["images"][:2] for run in two]
    assert not set(first[0]) & set(first[1])
    assert sorted(first[0] + first[1]) == sorted(one["images"][:4])
    assert len(one["log"]) == 3
    for run in two:
        for line, expected in zip(run["log"], one["log"], strict=True):
            assert line.keys() == expected.keys()
            for name in expected.keys() - {"grad_norm"}:
                assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
        assert_same_weights(run["weights"], one["weights"])


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_sharded_step_is_a_whole_one(method, results):
    one, *two = (results[name][f"{method}-fsdp2"] for name in ("1-0", "2-0", "2-1"))
    assert one["world"] == 1 and {run["world"] for run in two} == {2}
    first, second = (run["shards"] for run in two)
    assert first.keys() == second.keys() == one["weights"].keys()
    for name, shard in first.items():
        # Norms and biases begin as ones and zeros, the same on both.
        assert shard.dim() == 1 or not torch.equal(shard, second[name]), name
        assert shard.numel() + second[name].numel() == one["weights"][name].numel(), name
    for run in two:
        assert run["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert_same_weights(run["weights"], one["weights"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "finetune --config patient_retain --images-per-step 2",
        "unlearn --method npo --level patient",
    ],
    ids=["finetune", "unlearn"],
)
def test_the_commands_train_on_two_processes_as_on_one(command, data_dir, tiny_checkpoint, tmp_path):
    """By our configuration for DDP, with two processes; where there is no GPU, on the CPU."""
    ours = PROGRAM.parents[1] / "unlearn" / "accelerate_configs" / "ddp.yaml"
    config = tmp_path / "ddp.yaml"
    config.write_text(ours.read_text().replace("num_processes: 8", "num_processes: 2").replace("bf16", "'no'"))
    common = [*command.split(), "--max-steps", "4", "--learning-rate", "0.1", "--set", "optim=sgd"]
    common += ["--data", str(data_dir), "--model", str(tiny_checkpoint)]
    weights = {}
    for name, argv in (("two", ["--accelerate-config", str(config)]), ("one", ["--accumulation", "2"])):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-m", "unlearn.cli", *common, *argv, "--out", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("rows answered exactly") == 1
        assert "parallel_mode != ParallelMode.DISTRIBUTED" not in done.stderr
        weights[name] = load_file(out / "model.safetensors")
    before = load_file(tiny_checkpoint / "model.safetensors")
    assert any(not torch.equal(value, before[name]) for name, value in weights["one"].items())
    assert_same_weights(weights["two"], weights["one"])


@pytest.mark.slow
def test_the_tiny_model_is_not_made_on_several_processes(data_dir, tmp_path):
    """Its pre-training would wait for ever for the other processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "unlearn.cli"]
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            "finetune",
            "--preset",
            "tiny",
            "--data",
            str(data_dir),
            "--out",
            str(tmp_path / "out"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode
    assert "--preset tiny: the tiny model is made on one process; give --model" in done.stderr
    assert list(tmp_path.iterdir()) == []
