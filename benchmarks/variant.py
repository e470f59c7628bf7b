"""What one measurement is of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal


ROWS_PER_BATCH = 4
"""Rows of a batch of the peers' loops: MLLMU-Bench's scripts, and the README of MedForget's authors."""


@dataclass(frozen=True)
class Variant:
    """
    What is measured.

    Args:
        side (`"ours"` or `"peers"`):
            Whose loop.
        method (`str`):
            `"finetune"` or a method of `unlearn.methods`.
        lora (`bool`, *optional*, defaults to `False`):
            Train a LoRA adapter of rank 16 on the language model, not the whole model.
        questions (`int`, *optional*, defaults to `15`):
            Rows of each image.
        image_size (`int`, *optional*, defaults to `448`):
            Height and width in pixels, a multiple of 28.
        schedule (`str`, *optional*, defaults to `"sequential"`):
            `"sequential"`, as the peers do, or `"interleaved"`, rows of both kinds in every image; ours only.
        shape (`str`, *optional*, defaults to `"30m"`):
            Model, one of [`~benchmarks.shapes.SHAPES`].
        device (`str`, *optional*, defaults to `"cpu"`):
            `"cpu"` or `"cuda"`.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Recompute activations in the backward pass, in both loops.
        warm_up (`int`, *optional*, defaults to `1`):
            Steps of each kind that are not counted.
        steps (`int`, *optional*, defaults to `4`):
            Steps of each kind that are.
        threads (`int`, *optional*, defaults to `2`):
            Threads of PyTorch.
    """

    side: Literal["ours", "peers"]
    method: str
    lora: bool = False
    questions: int = 15
    image_size: int = 448
    schedule: str = "sequential"
    shape: str = "30m"
    device: str = "cpu"
    checkpointing: bool = False
    warm_up: int = 1
    steps: int = 4
    threads: int = 2

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return (self.image_size // 28) ** 2

    @property
    def images_per_step(self) -> int:
        """Images of a packed step: as few as have the four rows of a peer's batch."""
        return math.ceil(ROWS_PER_BATCH / self.questions)

    @property
    def images(self) -> int:
        """Images there are: for every step of our loop others, and half of them to be forgotten."""
        kinds = 1 if self.method == "finetune" else 2
        return kinds * self.images_per_step * (self.warm_up + self.steps)

    def describe(self) -> str:
        """For a progress bar."""
        training = "LoRA" if self.lora else "full"
        return f"{self.side} {self.method} {training} {self.questions}q {self.image_tokens}t"


def as_record(variant: Variant, result: dict[str, Any]) -> dict[str, Any]:
    """A measurement as it is written to a file."""
    return {"variant": asdict(variant), **result}
