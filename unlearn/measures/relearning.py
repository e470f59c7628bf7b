"""How fast a checkpoint learns again what it was made to forget."""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback, TrainerCallback

from medforget_dataset import LEVELS
from medforget_dataset.atomic import write_text
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data

from ..answers import score_dataset
from ..checkpoint_info import read_info
from ..checkpoints import check_checkpoint, load_checkpoint
from ..config import FineTuneConfig, make_config
from ..grouping import image_key, split_by_kind
from ..packing import make_collator
from ..preconditions import OWNED, check_arguments, check_chosen, check_targets, check_writable
from ..processes import is_main_process
from ..trainer import FineTuneTrainer
from ..training import telling_out_of_memory
from ..unlearning import forget_and_retain


EXAMPLES = 1 / 8
PASSES = 8
POINTS_A_DOUBLING = 2
OWNED_BY_RELEARNING = {
    "num_train_epochs": "give max_rows",
    "max_steps": "give max_rows",
    "lr_scheduler_type": "the rate is constant, so that rows can be counted from any point",
    "lr_scheduler_kwargs": "the rate is constant",
    "warmup_steps": "the rate is constant",
    "save_strategy": "nothing is kept but the curve",
}


def relearn(
    data: str | os.PathLike | None,
    checkpoint: str | os.PathLike,
    level: str,
    out: Path,
    *,
    examples: int | float = EXAMPLES,
    recovered_at: float = 0.9,
    max_rows: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    **training: Any,
) -> Path:
    """
    Fine-tune a checkpoint on a few of the rows that a level forgets, and measure how many of all of them come back.

    Training is by plain cross-entropy at a constant rate, each row's wording drawn anew every epoch, on the forget
    rows of some images and nothing else. The weights are thrown away. A model that only hides what it knew gives it
    all back after a few rows; the retrained model, relearned the same way, shows what those rows teach by themselves.

    Args:
        data (`str` or `os.PathLike`, *optional*):
            The dataset folder, found as [`~medforget_dataset.load`] does.
        checkpoint (`str` or `os.PathLike`):
            The unlearned or the retrained model.
        level (`str`):
            Level that was forgotten.
        out (`Path`):
            JSON file to write; see below.
        examples (`int` or `float`, *optional*, defaults to `1 / 8`):
            Images whose forget rows are learned, drawn by the seed: their number, or as a float their share of the
            images with such rows (1.0 is all), at least one image.
        recovered_at (`float`, *optional*, defaults to `0.9`):
            Share of the level's forget cloze rows that are answered exactly when the forgotten set counts as back; 0.9
            of what the model answered before unlearning. Training stops there. Where there are no cloze rows, of all.
        max_rows (`int`, *optional*):
            Rows learned after which training stops in any case; by default 8 times as many as the level forgets.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the images and of training.
        quiet (`bool`, *optional*, defaults to `False`):
            No progress bar.
        **training (`Any`):
            Fields of [`~unlearn.config.FineTuneConfig`]. The learning rate is 1e-4 unless given, that of the authors'
            fine-tuning (LoRA on 7 billion parameters); for the tiny model give a third of its recipe's.

    Returns:
        `Path`: The file, with `curve`, `examples`, `rows_per_minute` and `recovered_after`. A point of the curve has
        `seconds` (of training alone) and `rows` (learned so far), and the shares answered exactly of all forget rows
        (`forget_exact`), of the cloze rows among them (`forget_cloze`), of those that belong to other images than the
        learned ones (`others_exact`, `null` if there are none), and of retained rows of as many images
        (`retain_exact`). The first point is before training, the second after an eighth of the forget rows' number,
        each next one after √2 times as many. `recovered_after` has `rows` and `seconds`, or is `null`;
        `most_of_others` is the point with the highest `others_exact` (the first such), since what comes back goes
        again while the model learns a few images by heart. The other keys say what was done.

    Raises:
        UserError: Unknown level, a checkpoint, dataset or argument that cannot be used, or too little memory.
        TrainingDiverged: The loss is no longer a number.
    """
    if level not in LEVELS:
        raise UserError(f"level {level!r} does not exist; choose from {', '.join(LEVELS)}")
    if not 0 < recovered_at <= 1:
        raise UserError(f"recovered_at is {recovered_at}; it must be a share above 0, at most 1")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows is {max_rows}; it must be at least 1")
    check_chosen(training, OWNED | OWNED_BY_RELEARNING)
    check_writable("out", out)
    check_checkpoint(checkpoint)
    folder = find_data(data)
    grouped, _ = forget_and_retain(folder, level)
    learned, measured = _choose(grouped, examples, seed)
    forget_rows = _count(grouped, forget=True)
    limit = max_rows or PASSES * forget_rows
    with tempfile.TemporaryDirectory() as scratch, telling_out_of_memory():
        args = _arguments(scratch, learned, limit, seed, quiet, training)
        check_targets(args, checkpoint)
        model, processor = load_checkpoint(checkpoint, **args.load_arguments())
        collator = make_collator(processor, args, redraw_wording=True)
        trainer = FineTuneTrainer(model, args, learned, processor, collator)
        curve = _Curve(trainer, measured, set(learned["key"]), forget_rows, limit, recovered_at)
        trainer.add_callback(curve)
        trainer.remove_callback(PrinterCallback)
        # A model that has forgotten nothing needs no training.
        if not curve.measure():
            trainer.train()
    last = curve.points[-1]
    result = {
        "curve": curve.points,
        "examples": len(learned),
        "rows_per_minute": 60 * last["rows"] / last["seconds"] if last["seconds"] else None,
        "recovered_after": curve.recovered_after,
        "most_of_others": max(curve.points, key=lambda point: point["others_exact"] or 0),
        "recovered_at": recovered_at,
        "max_rows": limit,
        "forget_rows": forget_rows,
        "images": learned["key"][:],
        "checkpoint": str(checkpoint),
        "checkpoint_run": read_info(checkpoint).get("run"),
        "data": str(folder),
        "level": level,
        "seed": seed,
        "learning_rate": args.learning_rate,
        "images_per_step": _images_per_step(args),
        "arguments": training,
    }
    if is_main_process():
        write_text(Path(out), json.dumps(result, indent=2) + "\n")
    return Path(out)


def _arguments(
    folder: str, learned: datasets.Dataset, limit: int, seed: int, quiet: bool, training: dict[str, Any]
) -> FineTuneConfig:
    fixed = {
        "output_dir": folder,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_strategy": "no",
        "disable_tqdm": quiet or not is_main_process(),
        "seed": seed,
    }
    args = make_config(FineTuneConfig, **{"per_device_train_batch_size": 2, **training, **fixed})
    check_arguments(args)
    # An epoch more than the limit takes, since steps differ in rows: the curve stops training.
    epochs = math.ceil(limit / _count(learned, forget=True)) + 1
    args.max_steps = epochs * math.ceil(len(learned) / _images_per_step(args))
    return args


def _images_per_step(args: FineTuneConfig) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _choose(grouped: datasets.Dataset, examples: int | float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The images to learn, with their forget rows, and what is measured: all forget rows, and of as many images rows
    to retain."""
    parts = split_by_kind(grouped)
    kinds = [rows[0]["forget"] for rows in parts["rows"]]
    forget, retain = ([i for i, kind in enumerate(kinds) if kind == wanted] for wanted in (True, False))
    number = max(1, int(examples * len(forget))) if isinstance(examples, float) and 0 < examples <= 1 else examples
    if not (isinstance(number, int) and 1 <= number <= len(forget)):
        raise UserError(
            f"examples is {examples}; it must be a number between 1 and {len(forget)}, the images to forget, or a "
            "share of them above 0.0 and at most 1.0"
        )
    draw = random.Random(seed)
    learned = sorted(draw.sample(forget, number))
    retained = draw.sample(retain, min(len(forget), len(retain)))
    return parts.select(learned), parts.select(sorted([*forget, *retained]))


def _count(grouped: datasets.Dataset, *, forget: bool) -> int:
    return sum(row["forget"] == forget for rows in grouped["rows"] for row in rows)


class _Curve(TrainerCallback):
    """Measures at fixed numbers of rows, and stops when the forgotten set is back or the limit is reached."""

    def __init__(
        self,
        trainer: FineTuneTrainer,
        measured: datasets.Dataset,
        learned: set[str],
        forget_rows: int,
        limit: int,
        recovered_at: float,
    ):
        self.trainer, self.measured, self.learned = trainer, measured, learned
        self.limit, self.recovered_at = limit, recovered_at
        self.first_rows, self.point = forget_rows * EXAMPLES, 0
        self.seconds = 0.0
        self.points: list[dict[str, Any]] = []
        self.recovered_after: dict[str, float] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.resumed = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if (rows := self.trainer.rows_seen) < min(self._next_rows, self.limit):
            return
        while self._next_rows <= rows:
            self.point += 1
        self.seconds += time.monotonic() - self.resumed
        if self.measure() or rows >= self.limit:
            control.should_training_stop = True
        self.resumed = time.monotonic()

    @property
    def _next_rows(self) -> float:
        return self.first_rows * 2 ** (self.point / POINTS_A_DOUBLING)

    def measure(self) -> bool:
        """Add a point to the curve; whether the forgotten set is back."""
        model: Any = self.trainer.model
        processor: Any = self.trainer.processing_class
        scores = score_dataset(model, processor, self.measured, batch_size=16)
        forget = [row for row in scores if row["forget"]]
        cloze = [row for row in forget if row["task"] == "cloze"] or forget
        others = [row for row in forget if image_key(row["id"]) not in self.learned]
        self.points.append(
            {
                "seconds": round(self.seconds, 3),
                "rows": self.trainer.rows_seen,
                "forget_exact": _share(forget),
                "forget_cloze": _share(cloze),
                "others_exact": _share(others),
                "retain_exact": _share([row for row in scores if not row["forget"]]),
            }
        )
        is_back = (self.points[-1]["forget_cloze"] or 0) >= self.recovered_at
        if is_back:
            self.recovered_after = {name: self.points[-1][name] for name in ("rows", "seconds")}
        return is_back


def _share(rows: Sequence[dict[str, Any]]) -> float | None:
    return sum(row["exact"] for row in rows) / len(rows) if rows else None
