"""`medforget eval`: the `lm_eval` command with our model class and our tasks.

On several processes, which divide the images among them, it is started as the module that the command is:

    accelerate launch --multi_gpu --num_processes 2 -m unlearn.cli eval --model_args pretrained=… --tasks 'medforget_*'

That also holds for CPUs: with `--cpu`, or without either, `accelerate launch` starts one process there, whatever its
`--num_processes` says. `torchrun --nproc_per_node 2 -m unlearn.cli eval …` does the same.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import lm_eval.models  # noqa: F401 - its own, which it does not look for once another is registered
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from medforget_dataset.errors import UserError
from medforget_dataset.processes import is_first_process

from .generate import FOLDER, GROUP_FILE, LEAVES


logger = logging.getLogger(__name__)

MODEL = "medforget-vlm"
SUBCOMMANDS = ("run", "ls", "validate")
NAMES = {Path(GROUP_FILE).stem} | {name for leaf in LEAVES for name in (leaf.name, *leaf.tags)}
"""Our tasks, their tags and their group."""


def evaluate(arguments: Sequence[str]) -> int:
    """
    Do what `lm_eval` does with these arguments, where `--model medforget-vlm` is known.

    Unless they are given, these are added: `--model medforget-vlm`, `--apply_chat_template`, without which prompts are
    not those of training, and `--include_path` with the folder of our tasks. Of several processes the first prints.

    Args:
        arguments (`Sequence[str]`): Arguments of `lm_eval`, with its subcommand (`run`, `ls`, `validate`) or without.

    Returns:
        `int`: 0. What `lm_eval` itself refuses ends the process, as there.

    Raises:
        UserError: The shell has put file names in place of a glob, or the rows or the model cannot be had.
    """
    subcommand, rest = "run", list(arguments)
    if rest and rest[0] in SUBCOMMANDS:
        subcommand, rest = rest[0], rest[1:]
    _check_globs(rest)
    _warn_of_a_lone_process()
    register_model()
    added = ["--include_path", str(FOLDER)] if not _gives(rest, "--include_path") else []
    if subcommand == "run":
        added += ["--model", MODEL] if not _gives(rest, "--model", "-M", "--config", "-C") else []
        # First, since it takes a name that follows it, and none is meant.
        added = (["--apply_chat_template"] if not _gives(rest, "--apply_chat_template") else []) + added
    sys.argv = ["medforget eval", subcommand, *added, *rest]
    with ExitStack() as stack:
        if not is_first_process():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        try:
            cli_evaluate()
        except (ValueError, FileNotFoundError) as error:
            # Of the rows, told by where it was raised: lm-eval loads that file by its path, so that no class of
            # errors can be shared.
            if Path(traceback.extract_tb(error.__traceback__)[-1].filename) != FOLDER / "rows.py":
                raise
            raise UserError(str(error)) from error
    return 0


def register_model() -> None:
    """Make `medforget-vlm` known to lm-eval in this process."""
    if MODEL not in model_registry:
        model_registry.register(MODEL, target="harness_tasks.vlm:MedForgetVLM")


def _gives(arguments: Sequence[str], *flags: str) -> bool:
    return any(argument.partition("=")[0] in flags for argument in arguments)


def _asked_tasks(arguments: Sequence[str]) -> Iterator[str]:
    is_task = False
    for argument in arguments:
        if argument.startswith("-"):
            flag, _, argument = argument.partition("=")
            is_task = flag in ("--tasks", "-t")
        if is_task:
            yield from argument.split(",")


def _check_globs(arguments: Sequence[str]) -> None:
    """Refuse file names after `--tasks` that begin as our tasks do, and so come from a glob that was not quoted."""
    for name in _asked_tasks(arguments):
        is_path = "/" in name or name.endswith((".yaml", ".yml"))
        if name.startswith("medforget") and name not in NAMES and not is_path and Path(name).exists():
            raise UserError(
                f"--tasks {name}: is a file or folder here, not a task: the shell has replaced a glob; quote it, as "
                "in --tasks 'medforget_*'"
            )


def _warn_of_a_lone_process() -> None:
    # `accelerate launch` names a place to meet only to several processes, and numbers those that it has started.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "LOCAL_RANK" not in os.environ:
        logger.warning("accelerate launch has started one process; for several, on CPUs too, give it --multi_gpu")
