"""What to do when the memory does not suffice: say what to lower, or score in smaller batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from medforget_dataset.errors import UserError

from .config import FineTuneConfig, UnlearnConfig


Scores = TypeVar("Scores")


@contextmanager
def telling_out_of_memory(args: FineTuneConfig | None = None) -> Iterator[None]:
    """
    Inside the context, to run out of memory is an error that says what to lower.

    Args:
        args ([`~unlearn.config.FineTuneConfig`], *optional*):
            Training arguments, where there is training.

    Raises:
        UserError: If the memory does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        what = _out_of_memory(args) if args else "out of memory; use smaller images (--max-pixels)"
        raise UserError(what) from error


def in_batches_that_fit(score: Callable[[int], Scores]) -> Scores:
    """Score with 16 images in a batch, or, where the memory does not suffice, with 8, 4, 2 or 1."""
    images = 16
    while True:
        try:
            return score(images)
        except (MemoryError, RuntimeError) as error:
            if images == 1 or not _is_out_of_memory(error):
                raise
        images //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _out_of_memory(args: FineTuneConfig) -> str:
    lower = "--images-per-step"
    if isinstance(args, UnlearnConfig):
        lower = "--forget-per-step and --retain-per-step"
    remedies = [f"lower {lower} ({args.per_device_train_batch_size} images a batch) and raise --accumulation"]
    if not args.activation_checkpointing:
        remedies.append("--set activation_checkpointing=true")
    if not args.use_peft:
        remedies.append("--lora")
    return f"out of memory; {', or '.join([*remedies, 'use smaller images (--max-pixels)'])}"
