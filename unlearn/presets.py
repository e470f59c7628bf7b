"""Named recipes for the embedded tiny model.

They are choices for that model, tuned on two CPU cores, and never defaults: a checkpoint such as Lingshu-7B is
trained with the arguments given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import ProcessorMixin

from medforget_dataset.errors import UserError
from medforget_dataset.training_views import training_views

from .models import TinyConfig
from .packing import PackedCollator


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

    def check_folder(self, folder: str | Path) -> None:
        """Refuse a dataset from which this preset could not train.

        Args:
            folder (`str` or `Path`): As [`~medforget_dataset.loading.find_data`] gives it: a path or a Hub id.

        Raises:
            UserError: Turned views are rendered from the corpus, for which a Hub id does not do.
        """
        if self.turned_views and isinstance(folder, str):
            raise UserError(f"this preset renders turned views from a dataset folder, for which {folder} does not do")

    def collator(
        self,
        processor: ProcessorMixin,
        folder: str | Path,
        *,
        views: Path | None = None,
        workers: int | None = None,
        seed: int = 0,
        max_length: int | None = None,
    ) -> PackedCollator:
        """A collator that draws wordings and images as this preset does.

        Args:
            processor ([`~transformers.ProcessorMixin`]): Processor of the model.
            folder (`str` or `Path`): The dataset folder.
            views (`Path`, *optional*): File in which turned views are kept.
            workers (`int`, *optional*): Processes that render turned views.
            seed (`int`, *optional*, defaults to `0`): Seed of the drawing.
            max_length (`int`, *optional*): Longest packed sequence in tokens.
        """
        self.check_folder(folder)
        turned = None
        if self.turned_views:
            turned = training_views(Path(folder), size=self.image_size, file=views, workers=workers)
        return PackedCollator(
            processor, redraw_wording=self.redraw_wording, views=turned, seed=seed, max_length=max_length
        )


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
