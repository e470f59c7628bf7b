"""Unlearn a level of the hierarchy from a checkpoint, by any method of `unlearn.methods`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset import LEVELS, load
from medforget_dataset.agreement import check_sharing
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data

from .answers import score_dataset
from .config import UnlearnConfig, make_config, resolve
from .methods import EditingMethod, GradientMethod
from .models import check_output, is_restricted, load_checkpoint, save_checkpoint
from .packing import PackedCollator, group_by_image
from .presets import PRESETS, TinyPreset
from .trainer import UnlearnTrainer


def unlearn(
    data: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike,
    method: str,
    level: str,
    preset: str | None = None,
    views: Path | None = None,
    workers: int | None = None,
    quiet: bool = False,
    **chosen: Any,
) -> dict[str, dict[str, float]]:
    """Make a checkpoint forget a level's forget rows.

    Args:
        data (`str` or `os.PathLike`, *optional*): The dataset folder, found as [`~medforget_dataset.load`] does.
        out (`str` or `os.PathLike`): Checkpoint folder to write.
        model (`str` or `os.PathLike`): Checkpoint that knows everything.
        method (`str`): A method of `unlearn.methods`.
        level (`str`): `"institution"`, `"patient"`, `"study"` or `"section"`.
        preset (`str`, *optional*): A preset of the method. One that is named after a tiny preset of `unlearn.presets`
            also draws wordings and views as that one does.
        views (`Path`, *optional*): File in which turned views are kept, for presets that use them.
        workers (`int`, *optional*): Processes that render turned views.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
        **chosen: Hyper-parameters of the method and fields of [`~unlearn.config.UnlearnConfig`]; they override the
            preset.

    Returns:
        `dict[str, dict[str, float]]`: Exact match for each task on the `forget` and on the `retain` rows.

    Raises:
        UserError: Unknown method, preset, level or argument, or a checkpoint or dataset that cannot be used.
    """
    if level not in LEVELS:
        raise UserError(f"--level {level}: unknown level; choose from {', '.join(LEVELS)}")
    instance, training = resolve(method, preset, **chosen)
    if check_output(out).resolve() == Path(model).resolve():
        raise UserError(f"--out {out}: is the checkpoint that is unlearned; choose another folder")
    if isinstance(instance, GradientMethod):
        # Before the hours of work that a wrong argument would end.
        make_config(UnlearnConfig, output_dir=tempfile.gettempdir(), method=method, **training)
    folder = find_data(data)
    recipe = PRESETS.get(preset or "", TinyPreset())
    recipe.check_folder(folder)
    forget = load(f"{level}_forget", "train", data=folder)
    restricted = any(forget["restricted"]) or is_restricted(model)
    check_sharing("the checkpoint", restricted=restricted and bool(training.get("push_to_hub")), target="push_to_hub")
    grouped = group_by_image(load("finetune", "train", data=folder), forget)
    base, processor = load_checkpoint(model)
    info: dict[str, Any] = {
        "stage": "unlearn",
        "base": str(model),
        "data": str(folder),
        "level": level,
        "method": method,
        "method_arguments": instance.arguments(),
        "preset": preset,
        "arguments": training,
        "restricted": restricted,
    }
    if isinstance(instance, EditingMethod):
        info["edit"] = instance.edit(base, processor, grouped)
    elif isinstance(instance, GradientMethod):
        collator = recipe.collator(
            processor,
            folder,
            views=views,
            workers=workers,
            seed=int(training.get("seed", 0)),
            max_length=training.get("max_length"),
        )
        info["log"] = _train(base, processor, grouped, collator, instance, level, disable_tqdm=quiet, **training)
    scores = exact_match_by_side(base, processor, grouped)
    save_checkpoint(out, base, processor, info | {"exact_match": scores})
    return scores


def _train(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    grouped: datasets.Dataset,
    collator: PackedCollator,
    method: GradientMethod,
    level: str,
    **training: Any,
) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="medforget-") as scratch:
        args = make_config(
            UnlearnConfig,
            output_dir=scratch,
            method=method.name,
            method_args=json.dumps(method.arguments()),
            level=level,
            **training,
        )
        trainer = UnlearnTrainer(model, args, grouped, processor, data_collator=collator)
        trainer.train()
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def exact_match_by_side(
    model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset
) -> dict[str, dict[str, float]]:
    """Exact match for each task, on rows to forget and on rows to retain."""
    exact: dict[str, dict[str, list[bool]]] = {"forget": {}, "retain": {}}
    for result in score_dataset(model, processor, grouped, batch_size=16):
        side = exact["forget" if result["forget"] else "retain"]
        side.setdefault(result["task"], []).append(result["exact"])
    return {
        name: {task: sum(values) / len(values) for task, values in sorted(side.items())}
        for name, side in exact.items()
    }
