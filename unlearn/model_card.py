"""The card of a checkpoint: what it is, what it was to forget, and whether it may be shared."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData


STAGES = {
    "pretrain": "an untrained tiny model that learned general medical questions",
    "finetune": "a model that learned the rows of MedForget's configuration `{config}`",
    "unlearn": "a model that was made to forget the rows of `{level}_forget` with the method `{method}`",
}
RESTRICTED = (
    "**This checkpoint is restricted.** It was trained on data under a data use agreement, may reproduce parts of it, "
    "and must not be shared."
)
LIMITS = (
    "Unlearning is not a guarantee of privacy: scores say what the questions asked still bring back, and no more. Not "
    "for clinical use."
)


def render_model_card(info: dict[str, Any]) -> str:
    """The README of a checkpoint.

    Args:
        info (`dict[str, Any]`): What goes into `medforget.json`: `stage`, `restricted`, and what the stage has.

    Returns:
        `str`: YAML head and text. Names of patients or institutions are never in it.
    """
    restricted = bool(info.get("restricted"))
    license: dict[str, Any] = {"license": "other", "license_name": "data use agreement"} if restricted else {}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["medforget", "machine-unlearning", *(["restricted"] if restricted else [])],
        **license,
    )
    what = STAGES.get(info.get("stage", ""), "a model").format_map({"config": "", "level": "", "method": "", **info})
    text = ["# MedForget checkpoint", f"This is {what}. How it was made is in `medforget.json`.", LIMITS]
    if restricted:
        text.insert(1, RESTRICTED)
    return f"---\n{data}\n---\n\n" + "\n\n".join(text) + "\n"


def card_files(checkpoint, *, repo_id, run=None, base=None, dataset=None):
    import json
    from pathlib import Path

    return {"README.md": render_model_card(json.loads((Path(checkpoint) / "medforget.json").read_text()))}
