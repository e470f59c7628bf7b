"""Make the tiny model and teach it general medical questions, as a base for fine-tuning."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset import load
from medforget_dataset.loading import find_data

from .answers import evaluate_exact_match
from .checkpoints import check_output, save_checkpoint
from .config import FineTuneConfig, make_config
from .grouping import group_by_image
from .models import tiny_model
from .packing import PackedCollator
from .presets import TinyPreset, get_tiny_preset
from .trainer import FineTuneTrainer


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
    """Make a tiny model and teach it the general medical set.

    Args:
        data (`str` or `os.PathLike`, *optional*): The dataset folder, found as [`~medforget_dataset.load`] does.
        out (`str` or `os.PathLike`): Checkpoint folder to write.
        preset (`str`, *optional*, defaults to `"tiny"`): A tiny preset of `unlearn.presets`.
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
    with tempfile.TemporaryDirectory(prefix="medforget-") as scratch:
        args = make_config(
            FineTuneConfig,
            output_dir=scratch,
            learning_rate=recipe.learning_rate,
            num_train_epochs=recipe.pretrain_epochs,
            per_device_train_batch_size=recipe.rehearsal_images,
            seed=seed,
            disable_tqdm=quiet,
        )
        collator = PackedCollator(processor, redraw_wording=True, seed=seed)
        FineTuneTrainer(model, args, grouped["train"], processor, collator).train()
    scores = {split: evaluate_exact_match(model, processor, grouped[split], batch_size=64) for split in grouped}
    info: dict[str, Any] = {"stage": "pretrain", "base": None, "data": str(folder), "preset": preset, "seed": seed}
    # Its tokenizer has read every answer.
    info["restricted"] = any(load("finetune", "train", data=folder)["restricted"])
    save_checkpoint(out, model.eval(), processor, info | {"exact_match": scores})
    return scores
