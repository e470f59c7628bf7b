"""Named recipes: for the embedded tiny model, for fine-tuning as the peers do, and for models of 7 billion parameters.

None is a default. The tiny model's are tuned for it on two CPU cores; the presets of the methods are in their files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from medforget_dataset.errors import UserError
from medforget_dataset.training_views import training_views

from .config import FineTuneConfig
from .methods._shared_presets import LINEAR
from .models import TinyConfig
from .packing import RowCollator, make_collator


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
        args: FineTuneConfig,
        *,
        views: Path | None = None,
        workers: int | None = None,
    ) -> RowCollator:
        """A collator that draws wordings and images as this preset does.

        Args:
            processor ([`~transformers.ProcessorMixin`]): Processor of the model.
            folder (`str` or `Path`): The dataset folder.
            args ([`~unlearn.config.FineTuneConfig`]): Training arguments.
            views (`Path`, *optional*): File in which turned views are kept.
            workers (`int`, *optional*): Processes that render turned views.
        """
        self.check_folder(folder)
        turned = None
        if self.turned_views:
            turned = training_views(Path(folder), size=self.image_size, file=views, workers=workers)
        return make_collator(processor, args, redraw_wording=self.redraw_wording, views=turned)


TINY_PRESETS = {
    "tiny": TinyPreset(),
    "tiny-robust": TinyPreset(epochs=80, redraw_wording=True, turned_views=True),
}

_LORA = {"use_peft": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.05}

FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    **{
        name: {
            "learning_rate": recipe.learning_rate,
            "num_train_epochs": recipe.epochs,
            "per_device_train_batch_size": recipe.images_per_step,
        }
        for name, recipe in TINY_PRESETS.items()
    },
    # The authors' fine-tuning code: 4 rows times 4 accumulated, about the rows of one image.
    "paper": {
        **_LORA,
        "learning_rate": 1e-4,
        "num_train_epochs": 10,
        "per_device_train_batch_size": 1,
        **LINEAR,
        # PyTorch's AdamW, with its default.
        "weight_decay": 0.01,
    },
    # Its README: 4 rows a step, less than one image.
    "mllmu-bench": {
        **_LORA,
        "learning_rate": 2e-5,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 1,
        **LINEAR,
    },
    # `configs/trainer/finetune.yaml`: 8 rows times 4 accumulated, about the rows of two images.
    "open-unlearning": {
        "learning_rate": 1e-5,
        "num_train_epochs": 10,
        "per_device_train_batch_size": 2,
        **LINEAR,
    },
}
"""Training arguments of fine-tuning by name; images a batch where the sources count rows."""


@dataclass(frozen=True)
class ModelPreset:
    """A model on the Hub, and what training it takes on one GPU of 80 GB.

    The memory is an estimate, not a measurement: weights of 15 GB in bfloat16, an adapter of 0.2 GB with its states,
    and activations of about 1,500 tokens an image, recomputed in the backward pass.

    Args:
        model (`str`): Id on the Hub.
        max_pixels (`int`): Most pixels of an image. 448 × 448 are 256 image tokens.
        arguments (`dict`): Training arguments of fine-tuning.
        unlearn_arguments (`dict`): Training arguments of unlearning.
    """

    model: str
    max_pixels: int = 448 * 448
    arguments: dict[str, Any] = field(
        default_factory=lambda: {
            **_LORA,
            "activation_checkpointing": True,
            "cache_vision": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
        }
    )
    unlearn_arguments: dict[str, Any] = field(
        default_factory=lambda: {
            **_LORA,
            "activation_checkpointing": True,
            "cache_vision": True,
            "forget_per_step": 1,
            "retain_per_step": 1,
            "gradient_accumulation_steps": 2,
        }
    )


MODEL_PRESETS = {
    "lingshu-7b": ModelPreset("lingshu-medical-mllm/Lingshu-7B"),
    "qwen2.5-vl-7b": ModelPreset("Qwen/Qwen2.5-VL-7B-Instruct"),
}


def get_tiny_preset(name: str) -> TinyPreset:
    """The tiny preset of this name.

    Raises:
        UserError: There is none. The message lists them.
    """
    if name not in TINY_PRESETS:
        raise UserError(f"--preset {name}: unknown preset; choose from {', '.join(TINY_PRESETS)}")
    return TINY_PRESETS[name]


def check_finetune_preset(name: str) -> None:
    """Refuse a name that is not one of `FINETUNE_PRESETS`.

    Raises:
        UserError: There is none. The message lists them.
    """
    if name not in FINETUNE_PRESETS:
        raise UserError(f"--preset {name}: unknown preset; choose from {', '.join(FINETUNE_PRESETS)}")


def get_model_preset(name: str) -> ModelPreset:
    """The model preset of this name.

    Raises:
        UserError: There is none. The message lists them.
    """
    if name not in MODEL_PRESETS:
        raise UserError(f"--model-preset {name}: unknown preset; choose from {', '.join(MODEL_PRESETS)}")
    return MODEL_PRESETS[name]
