"""Fine-tuning: pre-train the tiny model, teach a model the benchmark, or re-teach it without what is to be
forgotten."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset import CONFIGS, LEVELS, load
from medforget_dataset.agreement import check_sharing
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data

from .answers import evaluate_exact_match
from .config import FineTuneConfig, make_config
from .models import check_output, is_restricted, load_checkpoint, save_checkpoint, tiny_model
from .packing import PackedCollator, group_by_image
from .presets import TinyPreset, get_tiny_preset
from .trainer import FineTuneTrainer


logger = logging.getLogger(__name__)

TRAINABLE = ("finetune", *(f"{level}_retain" for level in LEVELS))


class RehearsalBatches(Sampler[list[int]]):
    """Batches of new images, and after every few of them one batch of images to rehearse.

    Every new image comes once an epoch. The order depends on the seed and the epoch only.

    Args:
        new (`int`): Images 0 to `new - 1` are new, the others are rehearsed.
        total (`int`): All images.
        batch_size (`int`): New images in a batch.
        rehearsal_batch_size (`int`): Rehearsed images in a batch.
        every (`int`): A batch of rehearsal follows so many batches of new images.
        seed (`int`): Seed of the order.
    """

    def __init__(self, new: int, total: int, *, batch_size: int, rehearsal_batch_size: int, every: int, seed: int):
        self.new, self.total, self.every, self.seed = new, total, every, seed
        self.batch_size, self.rehearsal_batch_size = batch_size, rehearsal_batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (`int`, from 0)."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps = -(-self.new // self.batch_size)
        return steps + (steps // self.every if self.total > self.new else 0)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        new = torch.randperm(self.new, generator=generator).tolist()
        old = (self.new + torch.randperm(self.total - self.new, generator=generator)).tolist()
        for number, start in enumerate(range(0, len(new), self.batch_size), start=1):
            yield new[start : start + self.batch_size]
            if old and number % self.every == 0:
                yield old[: self.rehearsal_batch_size]
                old = old[self.rehearsal_batch_size :] + old[: self.rehearsal_batch_size]


class RehearsalTrainer(FineTuneTrainer):
    """A [`FineTuneTrainer`] whose batches come from [`RehearsalBatches`]."""

    def __init__(self, *args, batches: RehearsalBatches, **kwargs):
        self.batches = batches
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        dataset = cast(Dataset, self.train_dataset)
        loader = DataLoader(dataset, batch_sampler=self.batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def make_tiny(data: Path, preset: TinyPreset, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An untrained tiny model whose tokenizer knows the words of a dataset."""
    texts: list[str] = []
    for name, split in (("finetune", "train"), ("general_med", "train")):
        rows = load(name, split, data=data).select_columns(["answer", "training_phrasings"])
        for row in rows:
            texts += [row["answer"], *row["training_phrasings"]]
    return tiny_model(
        texts, image_size=preset.image_size, vocab_size=preset.vocab_size, config=preset.shape, seed=seed
    )


def pretrain(
    data: str | os.PathLike | None, out: str | os.PathLike, *, preset: str = "tiny", seed: int = 0, quiet: bool = False
) -> dict:
    """Make a tiny model and teach it the general medical set, as a base for fine-tuning.

    Args:
        data (`str` or `os.PathLike`, *optional*): The dataset folder, found as [`~medforget_dataset.load`] does.
        out (`str` or `os.PathLike`): Checkpoint folder to write.
        preset (`str`, *optional*, defaults to `"tiny"`): A preset of `unlearn.presets`.
        seed (`int`, *optional*, defaults to `0`): Seed of the weights and of the order.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar.

    Returns:
        `dict`: Exact match on the `train` and `test` split of `general_med`, for each task.
    """
    recipe = get_tiny_preset(preset)
    check_output(out)
    folder = find_data(data)
    model, processor = make_tiny(Path(folder), recipe, seed)
    grouped = {split: group_by_image(load("general_med", split, data=folder)) for split in ("train", "test")}
    _train(
        model,
        processor,
        grouped["train"],
        PackedCollator(processor, redraw_wording=True, seed=seed),
        FineTuneConfig,
        batches=None,
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.pretrain_epochs,
        per_device_train_batch_size=recipe.rehearsal_images,
        seed=seed,
        disable_tqdm=quiet,
    )
    scores = {split: evaluate_exact_match(model, processor, grouped[split], batch_size=64) for split in grouped}
    info: dict[str, Any] = {"stage": "pretrain", "base": None, "data": str(folder), "preset": preset, "seed": seed}
    # Its tokenizer has read every answer.
    info["restricted"] = any(load("finetune", "train", data=folder)["restricted"])
    save_checkpoint(out, model, processor, info | {"exact_match": scores})
    return scores


def finetune(
    data: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    config: str = "finetune",
    preset: str | None = None,
    views: Path | None = None,
    workers: int | None = None,
    quiet: bool = False,
    **training: Any,
) -> dict[str, dict[str, float]]:
    """Teach a model the rows of a configuration.

    Args:
        data (`str` or `os.PathLike`, *optional*): The dataset folder, found as [`~medforget_dataset.load`] does.
        out (`str` or `os.PathLike`): Checkpoint folder to write.
        model (`str` or `os.PathLike`, *optional*): Checkpoint to start from. Without it a tiny preset makes and
            pre-trains its own.
        config (`str`, *optional*, defaults to `"finetune"`): `"finetune"` for a model that knows everything,
            `"{level}_retain"` for one that never saw what that level forgets.
        preset (`str`, *optional*): A preset of `unlearn.presets`; its training arguments are overridden by `training`.
        views (`Path`, *optional*): File in which turned views are kept, for presets that use them.
        workers (`int`, *optional*): Processes that render turned views.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
        **training: Fields of [`~unlearn.config.FineTuneConfig`].

    Returns:
        `dict[str, dict[str, float]]`: Exact match for each task, on the rows learned (`"right_image"`), and when
        every row is asked about another patient's image (`"wrong_image"`).

    Raises:
        UserError: Neither a model nor a preset is given, or the configuration is not one to train on.
    """
    if config not in TRAINABLE:
        kind = "is not for training" if config in CONFIGS else "does not exist"
        raise UserError(f"--config {config}: {kind}; choose from {', '.join(TRAINABLE)}")
    if model is None and preset is None:
        raise UserError("nothing to train: give --model CHECKPOINT, or --preset tiny for the embedded model")
    recipe = get_tiny_preset(preset) if preset else TinyPreset()
    check_output(out)
    arguments = _preset_arguments(recipe) | training if preset else training
    # Before the hours of work that a wrong argument would end.
    make_config(FineTuneConfig, output_dir=tempfile.gettempdir(), **arguments)
    folder = find_data(data)
    recipe.check_folder(folder)
    rows = load(config, "train", data=folder)
    restricted = any(rows["restricted"]) or is_restricted(model)
    check_sharing("the checkpoint", restricted=restricted and bool(arguments.get("push_to_hub")), target="push_to_hub")
    seed = int(training.get("seed", 0))
    with tempfile.TemporaryDirectory(prefix="medforget-") as scratch:
        if model is None and preset is not None:
            logger.info("pre-training the tiny model on general_med")
            pretrain(folder, Path(scratch) / "base", preset=preset, seed=seed, quiet=quiet)
        base, processor = load_checkpoint(model or Path(scratch) / "base")
    grouped = group_by_image(rows)
    collator = recipe.collator(
        processor, folder, views=views, workers=workers, seed=seed, max_length=training.get("max_length")
    )
    dataset, batches = grouped, None
    if preset:
        general = group_by_image(load("general_med", "train", data=folder))
        dataset = datasets.concatenate_datasets([grouped, general])
        batches = RehearsalBatches(
            len(grouped),
            len(dataset),
            batch_size=int(arguments["per_device_train_batch_size"]),
            rehearsal_batch_size=recipe.rehearsal_images,
            every=recipe.rehearsal_every,
            seed=seed,
        )
    log = _train(base, processor, dataset, collator, FineTuneConfig, batches=batches, disable_tqdm=quiet, **arguments)
    scores = {
        name: evaluate_exact_match(base, processor, grouped, wrong_image=name == "wrong_image", batch_size=16)
        for name in ("right_image", "wrong_image")
    }
    info: dict[str, Any] = {
        "stage": "finetune",
        "base": str(model) if model else preset,
        "data": str(folder),
        "config": config,
        "preset": preset,
        "recipe": dataclasses.asdict(recipe) if preset else None,
        "arguments": arguments,
        "restricted": restricted,
        "exact_match": scores,
        "log": log,
    }
    save_checkpoint(out, base, processor, info)
    return scores


def _preset_arguments(recipe: TinyPreset) -> dict[str, Any]:
    return {
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.images_per_step,
    }


def _train(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: datasets.Dataset,
    collator: PackedCollator,
    config_class: type[FineTuneConfig],
    *,
    batches: RehearsalBatches | None,
    **arguments: Any,
) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="medforget-") as scratch:
        args = make_config(config_class, output_dir=scratch, **arguments)
        kinds: dict[str, Any] = {"batches": batches} if batches else {}
        trainer_class = RehearsalTrainer if batches else FineTuneTrainer
        trainer = trainer_class(model, args, dataset, processor, data_collator=collator, **kinds)
        trainer.train()
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
