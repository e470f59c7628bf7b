"""What to do when the memory does not suffice."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch


Scores = TypeVar("Scores")


def in_batches_that_fit(score: Callable[[int], Scores], images: int = 16) -> Scores:
    """Score with so many images in a batch, or, where the memory does not suffice, with half as many, down to 1."""
    while True:
        try:
            return score(images)
        except (MemoryError, RuntimeError) as error:
            if images == 1 or not is_out_of_memory(error):
                raise
        images //= 2
        gc.collect()
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the machine does not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
