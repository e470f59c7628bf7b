"""Unlearn a level of the hierarchy from a checkpoint, by any method of `unlearn.methods`."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset import LEVELS
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data

from .answers import score_dataset
from .checkpoint_info import is_restricted, read_info
from .checkpoints import check_checkpoint, load_checkpoint, save_checkpoint
from .config import UnlearnConfig, make_config, resolve
from .grouping import group_by_image
from .hub import check_push, push_finished
from .methods import INITIAL, EditingMethod, GradientMethod
from .packing import PackedCollator
from .preconditions import (
    OWNED,
    OWNED_BY_UNLEARNING,
    check_adapter,
    check_arguments,
    check_chosen,
    check_output_place,
    check_reference,
    check_targets,
    check_writable,
    images_per_step,
    load_rows,
)
from .presets import TINY_PRESETS, TinyPreset, get_model_preset
from .processes import is_main_process, processes
from .trainer import UnlearnTrainer
from .training import (
    RESUMABLE,
    Output,
    Trained,
    fingerprint,
    run_trainer,
    telling_out_of_memory,
    what_matters,
)


ZEROED_CHANNELS = "zeroed_channels.json"
"""File beside a checkpoint that names, for each MLP, the channels that an editing method has zeroed."""


def unlearn(
    data: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike,
    method: str,
    level: str,
    preset: str | None = None,
    model_preset: str | None = None,
    views: Path | None = None,
    workers: int | None = None,
    max_pixels: int | None = None,
    save_adapter: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **chosen: Any,
) -> dict[str, dict[str, float]]:
    """Make a checkpoint forget a level's forget rows.

    Args:
        data (`str` or `os.PathLike`, *optional*): The dataset folder, found as [`~medforget_dataset.load`] does.
        out (`str` or `os.PathLike`): Checkpoint folder to write. Until it is, `OUT.training` holds what a stopped run
            goes on from.
        model (`str` or `os.PathLike`): Checkpoint that knows everything.
        method (`str`): A method of `unlearn.methods`.
        level (`str`): `"institution"`, `"patient"`, `"study"` or `"section"`.
        preset (`str`, *optional*): A preset of the method. One that is named after a tiny preset of `unlearn.presets`
            also draws wordings and views as that one does.
        model_preset (`str`, *optional*): A model of `unlearn.presets`, of which what it takes on one GPU is used; the
            checkpoint is `model`.
        views (`Path`, *optional*): File in which turned views are kept, for presets that use them.
        workers (`int`, *optional*): Processes that render turned views.
        max_pixels (`int`, *optional*): Most pixels of an image; larger ones are made smaller.
        save_adapter (`bool`, *optional*, defaults to `False`): Write a LoRA adapter alone, not merged.
        resume (`bool`, *optional*, defaults to `False`): Go on with the same run where it was stopped.
        overwrite (`bool`, *optional*, defaults to `False`): Replace another run's checkpoint in `out`.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
        **chosen: Hyper-parameters of the method and fields of [`~unlearn.config.UnlearnConfig`]; they override the
            presets.

    Returns:
        `dict[str, dict[str, float]]`: Exact match for each task on the `forget` and on the `retain` rows.

    Raises:
        UserError: Unknown method, preset, level or argument, a checkpoint or dataset that cannot be used, or too
            little memory.
        OSError: The checkpoint cannot be written.
        TrainingDiverged: The loss is no longer a number, or what was to be retained is lost.
    """
    if level not in LEVELS:
        raise UserError(f"--level {level}: unknown level; choose from {', '.join(LEVELS)}")
    sizes = get_model_preset(model_preset) if model_preset else None
    instance, training = resolve(method, preset, sizes.unlearn_arguments if sizes else {}, **chosen)
    training = {"seed": 0} | training
    check_chosen(chosen, OWNED | OWNED_BY_UNLEARNING)
    check_adapter(save_adapter, chosen, training)
    args, reference = None, None
    if isinstance(instance, GradientMethod):
        reference = instance.reference if instance.reference != INITIAL else None
        args = _config(instance, level, RESUMABLE | training, tempfile.gettempdir())
        check_arguments(args)
    if max_pixels is None and sizes:
        max_pixels = sizes.max_pixels
    check_output_place(out, model, reference)
    if views is not None:
        check_writable("--views", views)
    check_checkpoint(model, max_pixels=max_pixels)
    if args:
        check_targets(args, model)
    check_reference(reference, model)
    folder = find_data(data)
    recipe = TINY_PRESETS.get(preset or "", TinyPreset())
    recipe.check_folder(folder)
    grouped, restricted = forget_and_retain(folder, level)
    restricted = restricted or is_restricted(model) or is_restricted(reference)
    if args:
        check_push(args, restricted=restricted)
    plan = {
        "stage": "unlearn",
        "base": str(model),
        "base files": fingerprint(model),
        "data": str(folder),
        "data files": fingerprint(folder),
        "level": level,
        "method": method,
        "method_arguments": instance.arguments(),
        "preset": preset,
        "arguments": what_matters(training),
        "images_per_step": images_per_step(args) if args else None,
        "seed": training["seed"],
        "max_pixels": max_pixels,
        "save_adapter": save_adapter,
    }
    output = Output(out, plan, resume=resume, overwrite=overwrite)
    if output.is_done:
        if is_main_process():
            push_finished(out, args)
        return read_info(out)["exact_match"]
    info: dict[str, Any] = plan | {"arguments": training, "restricted": restricted, "run": output.digest}
    info["forgotten"] = forgotten_counts(grouped, level)
    files: dict[str, Any] = {}
    with telling_out_of_memory(args), output.in_progress() if args else nullcontext() as in_progress:
        if isinstance(instance, EditingMethod):
            base, processor = load_checkpoint(model, max_pixels=max_pixels)
            PackedCollator(processor, cache_bytes=0).check(grouped, quiet=quiet or not is_main_process())
            base.to(processes().device)
            edited = instance.edit(base, processor, grouped)
            if zeroed := {name: edited.pop(name) for name in ("channels", "scores") if name in edited}:
                files[ZEROED_CHANNELS] = zeroed
            info["edit"], trained = edited, Trained(base, [])
        else:
            assert isinstance(instance, GradientMethod) and in_progress
            args = _config(instance, level, RESUMABLE | training, str(in_progress.path), quiet=quiet)
            base, processor = load_checkpoint(model, max_pixels=max_pixels, **args.load_arguments())
            collator = recipe.collator(processor, folder, args, views=views, workers=workers)
            collator.check(grouped, quiet=bool(args.disable_tqdm))
            trained = run_trainer(UnlearnTrainer(base, args, grouped, processor, collator), in_progress)
            info |= {
                "log": trained.log,
                "steps": trained.steps,
                "kept_step": trained.kept_step,
                "stopped": trained.stopped,
            }
        scores = exact_match_by_side(trained.model, processor, grouped)
        with output.writing() as is_writer:
            if is_writer:
                info["exact_match"] = scores
                save_checkpoint(out, trained.model, processor, info, adapter=save_adapter, files=files)
                push_finished(out, args)
    return scores


def _config(
    method: GradientMethod, level: str, training: dict[str, Any], folder: str, *, quiet: bool = False
) -> UnlearnConfig:
    return make_config(
        UnlearnConfig,
        output_dir=folder,
        method=method.name,
        method_args=json.dumps(method.arguments()),
        level=level,
        **{"disable_tqdm": quiet or not is_main_process(), **training},
    )


def forget_and_retain(folder: str | os.PathLike, level: str) -> tuple[datasets.Dataset, bool]:
    """
    All rows of a dataset by image, those marked that a level forgets.

    Args:
        folder (`str` or `os.PathLike`):
            Dataset folder or Hub id.
        level (`str`):
            Level that is forgotten.

    Returns:
        `tuple[datasets.Dataset, bool]`: Examples of [`~unlearn.grouping.group_by_image`], and whether the rows are
        under a data use agreement.

    Raises:
        UserError: If there is nothing to forget or to retain, or a row is in both sets, or in none.
    """
    ids = {side: set(load_rows(folder, f"{level}_{side}")["id"]) for side in ("forget", "retain")}
    rows = load_rows(folder, "finetune")
    everything = set(rows["id"])
    for wrong, where in (
        (ids["forget"] & ids["retain"], f"are in both {level}_forget and {level}_retain"),
        (ids["forget"] - everything, f"of {level}_forget are not in finetune"),
        (ids["retain"] - everything, f"of {level}_retain are not in finetune"),
        (everything - ids["forget"] - ids["retain"], f"of finetune are in neither {level}_forget nor {level}_retain"),
    ):
        if wrong:
            raise UserError(f"{folder}: {len(wrong)} rows {where}, {min(wrong)} first; build the dataset again")
    return group_by_image(rows, ids["forget"]), any(rows["restricted"])


def forgotten_counts(grouped: datasets.Dataset, level: str) -> dict[str, int]:
    """
    How much is to be forgotten, for the card, which names nothing of it: `nodes` of the level of which no row is kept
    that tests the level or what is beneath it, and `rows` `of` all.

    Args:
        grouped ([`~datasets.Dataset`]):
            Examples of [`~unlearn.grouping.group_by_image`].
        level (`str`):
            Level that is forgotten.
    """
    depth = LEVELS.index(level) + 1
    rows = [row for example in grouped["rows"] for row in example]
    own = [row for row in rows if LEVELS.index(row["level"]) + 1 >= depth]
    forget, retain = ({"/".join(r["id"].split("/")[:depth]) for r in own if r["forget"] == side} for side in (1, 0))
    return {"nodes": len(forget - retain), "rows": sum(row["forget"] for row in rows), "of": len(rows)}


def exact_match_by_side(
    model: PreTrainedModel | PeftModel, processor: ProcessorMixin, grouped: datasets.Dataset
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
