"""Training on two processes over gloo equals training on one with the same images a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
