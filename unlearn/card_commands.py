"""The commands that make a checkpoint again, and its arguments in words; nothing here names a place on a machine."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from medforget_dataset.hub_files import has_hub_form
from medforget_dataset.options import BuildOptions, command

from .argument_types import as_text


# What a training argument is called that changes nothing in the weights, or says who trained it.
_NOT_SHOWN = re.compile(r"hub_.*|push_to_hub|run_name|project|.*_dir|report_to|trackio_.*|disable_tqdm|.*token")
_PATH = re.compile(r"/|^~|^[A-Za-z]:\\")


def portable(name: str, value: Any) -> str:
    r"""
    A value as it is shown to others: of a path only which argument it is.

    >>> portable("beta", 0.5), portable("reference", "/home/me/retrained"), portable("targets", r".*\.q_proj")
    ('0.5', 'REFERENCE', '.*\\.q_proj')
    """
    text = as_text(value)
    return name.upper() if isinstance(value, str) and _PATH.search(value) else text


def hub_base(info: dict[str, Any]) -> str | None:
    """The Hub id that a checkpoint was made from, if it was none of a folder: its files' digest is then its name."""
    base = info.get("base")
    return base if base and base == info.get("base files") and has_hub_form(base) else None


def shown_arguments(info: dict[str, Any]) -> dict[str, Any]:
    """Training arguments of a checkpoint that tell how it was trained."""
    arguments = info.get("arguments") or {}
    return {name: value for name, value in arguments.items() if not _NOT_SHOWN.fullmatch(name)}


def stage_name(info: dict[str, Any]) -> str:
    """What a checkpoint is called in the commands."""
    stage, config = info.get("stage"), str(info.get("config", ""))
    if stage == "unlearn":
        return f"{info.get('method')}-{info.get('level')}"
    if stage == "finetune":
        return "vanilla" if config == "finetune" else f"retrained-{config.removesuffix('_retain')}"
    return "pretrained" if stage == "pretrain" else "checkpoint"


def stage_commands(
    stages: Sequence[dict[str, Any]], *, base: str | None, is_tiny: bool, record: dict[str, Any] | None
) -> Iterator[str]:
    """
    The commands that make a checkpoint, from the dataset on.

    Args:
        stages (`Sequence[dict]`):
            What `medforget.json` of each stage says.
        base (`str`, *optional*):
            Hub id of the model that the first stage started from.
        is_tiny (`bool`):
            Whether it started from nothing.
        record (`dict`, *optional*):
            What `build.json` of the dataset says.
    """
    if record:
        yield _build_command(record["options"])
    model = None if is_tiny else base or "BASE"
    names = Counter[str]()
    for info in stages:
        name = stage_name(info)
        names[name] += 1
        # Not into the folder of the model that it is made from.
        name += f"-{names[name]}" if names[name] > 1 else ""
        if info.get("stage") == "pretrain":
            words = ["medforget", "pretrain", *_flags(preset=info.get("preset"), seed=info.get("seed"))]
        elif info.get("stage") in ("finetune", "unlearn"):
            words = ["medforget", info["stage"], *_training(info, model)]
        else:
            continue
        yield " ".join([*words, "--data", "medforget", "--out", name])
        model = name


def _build_command(options: dict[str, Any]) -> str:
    known = {field.name: options[field.name] for field in fields(BuildOptions) if field.name in options}
    known |= {name: name.upper() for name in ("endpoint", "endpoint_complies") if known.get(name)}
    return f"{command(BuildOptions(**known))} --out medforget"


def _training(info: dict[str, Any], model: str | None) -> list[str]:
    is_unlearning = info["stage"] == "unlearn"
    words = _flags(model=model, method=info.get("method"), level=info.get("level"))
    words += [] if is_unlearning else _flags(config=info.get("config"))
    words += _flags(preset=info.get("preset"), max_pixels=info.get("max_pixels"), seed=info.get("seed"))
    words += _flags(**(info.get("method_arguments") or {}))
    words += ["--save-adapter"] if info.get("save_adapter") else []
    for name, value in shown_arguments(info).items():
        if name != "seed" and value is not None:
            words += ["--set", shlex.quote(f"{name}={portable(name, value)}")]
    return words


def _flags(**values: Any) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            text = value if name == "model" else portable(name, value)
            words += [f"--{name.replace('_', '-')}", shlex.quote(text)]
    return words
