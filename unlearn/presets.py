"""Named recipes for the embedded tiny model.

They are choices for that model, tuned on two CPU cores, and never defaults: a checkpoint such as Lingshu-7B is
trained with the arguments given.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medforget_dataset.errors import UserError

from .models import TinyConfig


@dataclass(frozen=True)
class TinyPreset:
    """How the tiny model is made, pre-trained and fine-tuned.

    Args:
        image_size (`int`): Pixels to which images are resized, a multiple of 28.
        vocab_size (`int`): Entries of the tokenizer.
        shape ([`~unlearn.models.TinyConfig`]): Layers and widths.
        learning_rate (`float`): Highest learning rate.
        epochs (`int`): Passes over the rows of fine-tuning.
        images_per_step (`int`): Images in a batch, each with all its rows.
        pretrain_epochs (`int`): Passes over `general_med` before fine-tuning.
        rehearsal_every (`int`): One batch of `general_med` after so many of fine-tuning.
        rehearsal_images (`int`): Images in such a batch, and in one of pre-training.
        redraw_wording (`bool`): Whether each row's wording is drawn from `training_phrasings` anew every epoch.
        turned_views (`bool`): Whether images are drawn from views at angles that the evaluation never uses.
    """

    image_size: int = 56
    vocab_size: int = 1024
    shape: TinyConfig = field(default_factory=TinyConfig)
    learning_rate: float = 3e-3
    epochs: int = 40
    images_per_step: int = 4
    pretrain_epochs: int = 25
    rehearsal_every: int = 8
    rehearsal_images: int = 16
    redraw_wording: bool = False
    turned_views: bool = False


PRESETS = {
    "tiny": TinyPreset(),
    "tiny-robust": TinyPreset(epochs=80, redraw_wording=True, turned_views=True),
}


def get_tiny_preset(name: str) -> TinyPreset:
    """The preset of this name.

    Raises:
        UserError: There is none. The message lists them.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}: unknown preset; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
