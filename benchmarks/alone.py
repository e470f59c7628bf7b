"""Call something alone, in a process of its own, and sum up what it measured.

PyTorch is not imported here: what is measured imports it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from medforget_dataset.errors import UserError


VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Step:
    """
    One step of training.

    Args:
        kind (`str`):
            What it saw: `"all"`, `"forget"`, `"retain"`, or `"mixed"` for both at once.
        rows (`int`):
            Rows that it saw; a row counts as often as it is seen.
        seconds (`float`):
            How long it took, the making of its batch included.
        tokens (`int`, *optional*, defaults to `0`):
            Tokens that passed through the model to be trained, padding not counted.
        flops (`float`, *optional*, defaults to `0.0`):
            Floating-point operations that it needed.
    """

    kind: str
    rows: int
    seconds: float
    tokens: int = 0
    flops: float = 0.0


def summarise(steps: Iterable[Step], warm_up: int, extra_seconds_per_row: float = 0.0) -> dict[str, float]:
    """
    Rows, tokens and operations a second, by the median step of each kind.

    The first `warm_up` steps of each kind are left out. As many rows of each kind are assumed: an epoch of rows to
    forget and one of as many to retain take the sum of both times.

    Args:
        steps (`Iterable[Step]`):
            The steps, in order.
        warm_up (`int`):
            Steps of each kind that are not counted.
        extra_seconds_per_row (`float`, *optional*, defaults to `0.0`):
            What every row costs beside the steps, such as a reference computed before training.
    """
    kinds: dict[str, list[Step]] = {}
    for step in steps:
        kinds.setdefault(step.kind, []).append(step)
    measured = {kind: own[warm_up:] for kind, own in kinds.items()}
    if short := [kind for kind, own in measured.items() if not own]:
        raise UserError(f"no step of kind {short[0]} is left after {warm_up} of warm-up; ask for more steps")

    def per_row(value: Callable[[Step], float]) -> float:
        return statistics.mean(statistics.median(value(step) / step.rows for step in own) for own in measured.values())

    seconds = per_row(lambda step: step.seconds) + extra_seconds_per_row
    return {
        "rows_per_second": 1 / seconds,
        "tokens_per_second": per_row(lambda step: step.tokens) / seconds,
        "flops_per_second": per_row(lambda step: step.flops) / seconds,
        "steps": sum(len(own) for own in measured.values()),
        "seconds_per_step": statistics.mean(statistics.median(s.seconds for s in own) for own in measured.values()),
    }


def run_alone(function: str, argument: Any, *, limit: float, device: str = "cpu") -> dict[str, Any]:
    """
    Call a function of this project in a fresh process.

    Args:
        function (`str`):
            Its module and name, such as `"benchmarks.loops:measure"`; it takes one argument.
        argument (`Any`):
            Something that can be pickled.
        limit (`float`):
            Seconds after which the process is ended.
        device (`str`, *optional*, defaults to `"cpu"`):
            On `"cpu"` the process is forked from one that has only imported the libraries, which saves ten seconds; a
            process that will use a GPU must not be.

    Returns:
        `dict[str, Any]`: What the function returned, or `{"error": reason}`.
    """
    context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device != "cuda":
        context.set_forkserver_preload(["benchmarks.loops"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, argument))
    process.start()
    sender.close()
    if not receiver.poll(limit):
        process.kill()
        process.join()
        return {"error": f"took more than {limit:.0f} seconds"}
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"its process ended with exit status {process.exitcode}, as when memory runs out"}
    process.join()
    return result


def _call(sender: Connection, function: str, argument: Any) -> None:
    # A library's own, about another's names.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(argument)
    except Exception as error:  # the others are still to be measured
        if not isinstance(error, UserError):
            sys.excepthook(*sys.exc_info())
        first_line = str(error).strip().partition("\n")[0]
        result = {"error": f"{type(error).__name__}: {first_line}"}
    sender.send(result)


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """When, where and with what this is measured."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": " ".join(["python -m", _module_name(), *map(shlex.quote, sys.argv[1:])]),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "gpu": _gpu_name() if device == "cuda" else None,
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }


def _module_name() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def _gpu_name() -> str:
    # In a process of its own: this one must not start CUDA before it makes others.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_read_gpu_name)


def _read_gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
