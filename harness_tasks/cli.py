"""`medforget eval`: the `lm_eval` command with our model class and our tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from medforget_dataset.errors import UserError

from .generate import FOLDER, LEAVES


MODEL = "medforget-vlm"
SUBCOMMANDS = ("run", "ls", "validate")


def evaluate(arguments: Sequence[str]) -> int:
    """
    Do what `lm_eval` does with these arguments, where `--model medforget-vlm` is known.

    Unless they are given, these are added: `--model medforget-vlm`, `--apply_chat_template`, without which prompts are
    not those of training, and `--include_path` with the folder of our tasks.

    Args:
        arguments (`Sequence[str]`): Arguments of `lm_eval`, with its subcommand (`run`, `ls`, `validate`) or without.

    Returns:
        `int`: 0. What `lm_eval` itself refuses ends the process, as there.

    Raises:
        UserError: The shell has put file names in place of a glob.
    """
    subcommand, rest = "run", list(arguments)
    if rest and rest[0] in SUBCOMMANDS:
        subcommand, rest = rest[0], rest[1:]
    _check_globs(rest)
    if MODEL not in model_registry:
        model_registry.register(MODEL, target="harness_tasks.vlm:MedForgetVLM")
    added = ["--include_path", str(FOLDER)] if not _gives(rest, "--include_path") else []
    if subcommand == "run":
        added += ["--model", MODEL] if not _gives(rest, "--model", "-M", "--config", "-C") else []
        # First, since it takes a name that follows it, and none is meant.
        added = (["--apply_chat_template"] if not _gives(rest, "--apply_chat_template") else []) + added
    sys.argv = ["medforget eval", subcommand, *added, *rest]
    cli_evaluate()
    return 0


def _gives(arguments: Sequence[str], *flags: str) -> bool:
    return any(argument.partition("=")[0] in flags for argument in arguments)


def _check_globs(arguments: Sequence[str]) -> None:
    """Refuse file names after `--tasks` that begin as our tasks do, and so come from a glob that was not quoted."""
    is_task = False
    for argument in arguments:
        if argument.startswith("-"):
            flag, _, argument = argument.partition("=")
            is_task = flag in ("--tasks", "-t")
        for name in argument.split(",") if is_task else ():
            is_ours = (FOLDER / f"{name}.yaml").is_file()
            if name.startswith("medforget") and "/" not in name and not is_ours and Path(name).exists():
                if not name.endswith((".yaml", ".yml")) and not _is_tag(name):
                    raise UserError(
                        f"--tasks {name}: is a file or folder here, not a task: the shell has replaced a glob; quote "
                        "it, as in --tasks 'medforget_*'"
                    )


def _is_tag(name: str) -> bool:
    return any(name in leaf.tags for leaf in LEAVES)
