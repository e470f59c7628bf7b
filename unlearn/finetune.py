"""Fine-tuning: teach a model the benchmark, or re-teach it without what is to be forgotten."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets

from medforget_dataset import CONFIGS, LEVELS
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data

from .answers import evaluate_exact_match
from .batches import RehearsalBatches
from .checkpoint_info import is_restricted, read_info
from .checkpoints import check_checkpoint, load_checkpoint, save_checkpoint
from .config import FineTuneConfig, make_config
from .grouping import group_by_image
from .hub import check_push, push_finished
from .preconditions import (
    OWNED,
    check_adapter,
    check_arguments,
    check_chosen,
    check_output_place,
    check_targets,
    check_two_patients,
    check_writable,
    images_per_step,
    load_rows,
)
from .presets import FINETUNE_PRESETS, TINY_PRESETS, TinyPreset, check_finetune_preset, get_model_preset
from .pretrain import pretrain
from .processes import is_main_process, processes
from .trainer import FineTuneTrainer
from .training import (
    RESUMABLE,
    Output,
    fingerprint,
    run_trainer,
    telling_out_of_memory,
    what_matters,
)


logger = logging.getLogger(__name__)

TRAINABLE = ("finetune", *(f"{level}_retain" for level in LEVELS))


def finetune(
    data: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    config: str = "finetune",
    preset: str | None = None,
    model_preset: str | None = None,
    views: Path | None = None,
    workers: int | None = None,
    max_pixels: int | None = None,
    save_adapter: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **training: Any,
) -> dict[str, dict[str, float]]:
    """Teach a model the rows of a configuration.

    Args:
        data (`str` or `os.PathLike`, *optional*): The dataset folder, found as [`~medforget_dataset.load`] does.
        out (`str` or `os.PathLike`): Checkpoint folder to write. Until it is, `OUT.training` holds what a stopped run
            goes on from.
        model (`str` or `os.PathLike`, *optional*): Checkpoint to start from. Without it a tiny preset makes and
            pre-trains its own, and a model preset names one on the Hub.
        config (`str`, *optional*, defaults to `"finetune"`): `"finetune"` for a model that knows everything,
            `"{level}_retain"` for one that never saw what that level forgets.
        preset (`str`, *optional*): A preset of `unlearn.presets`; its training arguments are overridden by `training`.
        model_preset (`str`, *optional*): A model of `unlearn.presets`, with what it takes on one GPU.
        views (`Path`, *optional*): File in which turned views are kept, for presets that use them.
        workers (`int`, *optional*): Processes that render turned views.
        max_pixels (`int`, *optional*): Most pixels of an image; larger ones are made smaller.
        save_adapter (`bool`, *optional*, defaults to `False`): Write a LoRA adapter alone, not merged.
        resume (`bool`, *optional*, defaults to `False`): Go on with the same run where it was stopped.
        overwrite (`bool`, *optional*, defaults to `False`): Replace another run's checkpoint in `out`.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
        **training: Fields of [`~unlearn.config.FineTuneConfig`].

    Returns:
        `dict[str, dict[str, float]]`: Exact match for each task, on the rows learned (`"right_image"`), and when
        every row is asked about another patient's image (`"wrong_image"`).

    Raises:
        UserError: Neither a model nor a preset is given, the configuration is not one to train on, an argument is
            wrong, a folder cannot be used, or too little memory.
        OSError: The checkpoint cannot be written.
        TrainingDiverged: The loss is no longer a number.
    """
    if config not in TRAINABLE:
        kind = "is not for training" if config in CONFIGS else "does not exist"
        raise UserError(f"--config {config}: {kind}; choose from {', '.join(TRAINABLE)}")
    if preset:
        check_finetune_preset(preset)
    sizes = get_model_preset(model_preset) if model_preset else None
    if model is None and sizes is None and preset not in TINY_PRESETS:
        raise UserError("nothing to train: give --model CHECKPOINT, or --preset tiny for the embedded model")
    if model is None and sizes is None and processes().num_processes > 1:
        raise UserError(
            f"--preset {preset}: the tiny model is made on one process; give --model, or start one process"
        )
    recipe = TINY_PRESETS.get(preset or "", TinyPreset())
    source = model or (sizes.model if sizes else None)
    named = (sizes.arguments if sizes else {}) | (FINETUNE_PRESETS[preset] if preset else {})
    arguments = {"seed": 0} | named | training
    if max_pixels is None and sizes:
        max_pixels = sizes.max_pixels
    check_chosen(training, OWNED)
    check_adapter(save_adapter, training, arguments)
    args = make_config(FineTuneConfig, output_dir=tempfile.gettempdir(), **(RESUMABLE | arguments))
    check_arguments(args)
    check_output_place(out, source)
    if views is not None:
        check_writable("--views", views)
    if source is not None:
        check_checkpoint(source, max_pixels=max_pixels)
        check_targets(args, source)
    elif save_adapter:
        raise UserError("--save-adapter: the tiny model is not kept beside the adapter; give --model CHECKPOINT")
    folder = find_data(data)
    recipe.check_folder(folder)
    rows = load_rows(folder, config)
    grouped = group_by_image(rows)
    check_two_patients(folder, config, grouped)
    rehearsed = group_by_image(load_rows(folder, "general_med")) if preset in TINY_PRESETS else None
    restricted = any(rows["restricted"]) or is_restricted(source)
    check_push(args, restricted=restricted)
    plan = {
        "stage": "finetune",
        "base": str(source) if source else preset,
        "base files": fingerprint(source) if source else None,
        "data": str(folder),
        "data files": fingerprint(folder),
        "config": config,
        "preset": preset,
        "recipe": dataclasses.asdict(recipe) if preset in TINY_PRESETS else None,
        "arguments": what_matters(arguments),
        "images_per_step": images_per_step(args, recipe.rehearsal_images if rehearsed else 0),
        "seed": arguments["seed"],
        "max_pixels": max_pixels,
        "save_adapter": save_adapter,
    }
    output = Output(out, plan, resume=resume, overwrite=overwrite)
    if output.is_done:
        if is_main_process():
            push_finished(out, args)
        return read_info(out)["exact_match"]
    with telling_out_of_memory(args), output.in_progress() as in_progress:
        seed = int(arguments["seed"])
        if source is None:
            source = in_progress.path / "base"
            if not source.is_dir():
                logger.info("pre-training the tiny model on general_med")
                pretrain(folder, source, preset=str(preset), seed=seed, quiet=quiet)
        args = make_config(
            FineTuneConfig,
            output_dir=str(in_progress.path),
            disable_tqdm=quiet or not is_main_process(),
            **(RESUMABLE | arguments),
        )
        base, processor = load_checkpoint(source, max_pixels=max_pixels, **args.load_arguments())
        collator = recipe.collator(processor, folder, args, views=views, workers=workers)
        collator.check(grouped, quiet=bool(args.disable_tqdm))
        dataset, batches = grouped, None
        if rehearsed is not None:
            dataset = datasets.concatenate_datasets([grouped, rehearsed])
            batches = RehearsalBatches(
                len(grouped),
                len(dataset),
                batch_size=args.per_device_train_batch_size,
                rehearsal_batch_size=recipe.rehearsal_images,
                every=recipe.rehearsal_every,
                parts=args.world_size * args.gradient_accumulation_steps,
                seed=seed,
            )
        trainer = FineTuneTrainer(base, args, dataset, processor, collator, batches=batches)
        trained = run_trainer(trainer, in_progress)
        scores = {
            name: evaluate_exact_match(trained.model, processor, grouped, wrong_image=wrong_image, batch_size=16)
            for name, wrong_image in (("right_image", False), ("wrong_image", True))
        }
        with output.writing() as is_writer:
            if is_writer:
                info = plan | {
                    "arguments": arguments,
                    "restricted": restricted,
                    "exact_match": scores,
                    "log": trained.log,
                    "run": output.digest,
                }
                save_checkpoint(out, trained.model, processor, info, adapter=save_adapter)
                push_finished(out, args)
    return scores
