"""What happens around the steps of training: epochs told, checkpoints completed, the best weights kept."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from .answers import score_dataset
from .batches import Batches
from .packing import RowCollator


if TYPE_CHECKING:
    from .trainer import UnlearnTrainer

COMPLETE = "complete"
"""An empty file in a checkpoint folder, written last: a folder without it was cut short."""


class EpochCallback(TrainerCallback):
    """Tells the collator and the batches the epoch, so that they draw other wordings, views and orders."""

    def __init__(self, collator: RowCollator, batches: Batches):
        self.collator, self.batches = collator, batches

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        self.collator.set_epoch(epoch)
        self.batches.set_epoch(epoch)


class RowsPerSecond(ProgressCallback):
    """The usual progress bar, with the rows trained a second beside the steps and the time left."""

    def __init__(self, rows: Callable[[], int]):
        super().__init__()
        self.rows = rows

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start, self.rows_before = time.monotonic(), self.rows()

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            rate = (self.rows() - self.rows_before) / (time.monotonic() - self.start)
            self.training_bar.set_postfix_str(f"{rate:.1f} rows/s", refresh=False)
        super().on_step_end(args, state, control, **kwargs)


class LastStep(TrainerCallback):
    """
    Logs the last step, whatever `logging_steps`: what goes wrong after the line before it would go unseen.

    Writes no checkpoint of it: transformers would go on from that with one more step, unless an epoch ends there.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = args.logging_strategy != IntervalStrategy.NO
            control.should_save = False


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete once every process has written its part, then removes the ones before it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_save(self, args, state, control, **kwargs):
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (folder / COMPLETE).touch()
            for older in Path(args.output_dir).glob("checkpoint-*"):
                if older != folder:
                    # The mark goes first: a removal that is cut short must not leave half a complete checkpoint.
                    (older / COMPLETE).unlink(missing_ok=True)
                    shutil.rmtree(older)


class Selectivity(TrainerCallback):
    """
    Measures, every few steps, which share of forget and of retain rows is answered exactly, keeps the weights that
    select best, and stops when too little is retained.

    Args:
        trainer ([`~unlearn.trainer.UnlearnTrainer`]):
            Trainer that calls this.
        folder (`Path`):
            Where the best weights are kept.
    """

    def __init__(self, trainer: UnlearnTrainer, folder: Path):
        self.trainer, self.folder = trainer, folder

    def on_train_begin(self, args, state, control, **kwargs):
        every = args.selectivity_steps
        self.every = max(1, int(every) if every >= 1 else round(every * state.max_steps))
        self.sample = _sample(self.trainer.train_dataset, args.selectivity_images, args.seed)
        self.on_save(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        # A run that goes on from this checkpoint may come to nothing better.
        self.needed = (self.best(args, state) or {}).get("step")

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        should_log = control.should_log
        self.trainer.log(self.measure())
        # Logging takes the step's own line for logged.
        control.should_log = should_log
        if (best := self.best(args, state)) and best["step"] == state.global_step:
            self.trainer.save_model(str(self.folder_of(self.folder, state.global_step)), _internal_call=True)
            self._remove_worse(state.global_step)
        last = measurements(state)[-args.retain_patience :]
        if len(last) == args.retain_patience and not any(_is_above_floor(args, line) for line in last):
            control.should_training_stop = True
            # A run that went on from here would not know that it had ended.
            control.should_save = False

    def measure(self) -> dict[str, float]:
        """Shares of forget and retain rows answered exactly, and retain less forget."""
        exact: dict[bool, list[bool]] = {True: [], False: []}
        model: Any = self.trainer.model
        processor: Any = self.trainer.processing_class
        for row in score_dataset(model, processor, self.sample, batch_size=16):
            exact[row["forget"]].append(row["exact"])
        forget, retain = (sum(exact[side]) / max(len(exact[side]), 1) for side in (True, False))
        return {"forget_exact": forget, "retain_exact": retain, "selectivity": retain - forget}

    def _remove_worse(self, step: int) -> None:
        if self.trainer.accelerator.is_main_process:
            steps = [int(kept.name.rpartition("-")[2]) for kept in self.folder.glob("best-*")]
            for worse in steps:
                if worse not in (step, self.needed):
                    shutil.rmtree(self.folder_of(self.folder, worse))

    @staticmethod
    def folder_of(folder: Path, step: int) -> Path:
        """Where the weights of a step are kept."""
        return folder / f"best-{step}"

    @staticmethod
    def best(args: TrainingArguments, state: TrainerState) -> dict[str, float] | None:
        """The first of the best measurements so far that are not below the floor."""
        lines = [line for line in measurements(state) if _is_above_floor(args, line)]
        return max(lines, key=lambda line: line["selectivity"], default=None)


def _is_above_floor(args: TrainingArguments, line: dict[str, float]) -> bool:
    floor = args.retain_floor  # type: ignore[attr-defined]
    return floor is None or line["retain_exact"] >= floor


def measurements(state: TrainerState) -> list[dict[str, float]]:
    """The measurements of [`Selectivity`] in a run's history."""
    return [line for line in state.log_history if "selectivity" in line]


def _sample(grouped: datasets.Dataset, images: int, seed: int) -> datasets.Dataset:
    """As many images with rows to forget, and without, drawn by the seed."""
    flags = [any(row["forget"] for row in rows) for rows in grouped["rows"]]
    draw = random.Random(seed)
    chosen: list[int] = []
    for kind in (True, False):
        of_kind = [i for i, flag in enumerate(flags) if flag == kind]
        chosen += draw.sample(of_kind, min(images, len(of_kind)))
    return grouped.select(sorted(chosen))
