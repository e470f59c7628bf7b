"""Models with random weights and images with questions, for measurements that need no download."""

from __future__ import annotations

import io
import random
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin, Qwen2_5_VLConfig

from unlearn.grouping import GROUPED_FEATURES
from unlearn.models import TinyConfig, tiny_model


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2},
        "vision": {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "full_attention": [1]},
        "vocab_size": 1024,
    },
    # Large enough that on two CPU cores the arithmetic takes the time, not what Python does around it.
    "30m": {
        "text": {"hidden_size": 512, "intermediate_size": 1408, "layers": 8, "heads": 8, "kv_heads": 8},
        "vision": {"hidden_size": 256, "intermediate_size": 688, "layers": 4, "heads": 4, "full_attention": [3]},
        "vocab_size": 4096,
    },
    # config.json of Qwen/Qwen2.5-VL-7B-Instruct.
    "7b": {
        "text": {"hidden_size": 3584, "intermediate_size": 18944, "layers": 28, "heads": 28, "kv_heads": 4},
        "vision": {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "layers": 32,
            "heads": 16,
            "full_attention": [7, 15, 23, 31],
        },
        "vocab_size": 152064,
    },
}
"""Shapes of Qwen2.5-VL by name. The largest is that of the 7-billion-parameter model."""

ORGANS = ("left lower lobe", "right upper lobe", "heart", "aorta", "left costophrenic angle", "thoracic spine")
SIGNS = ("a small opacity", "a calcified nodule", "mild congestion", "linear atelectasis", "a blunted contour")
COURSES = ("unchanged since the study before it", "new since the study before it", "smaller than it was in spring")
LEVELS = ("institution", "patient", "study")


def make_model(
    shape: str, image_size: int, *, device: str, dtype: torch.dtype, seed: int = 0
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    A Qwen2.5-VL with random weights, made on the device, and a processor whose tokenizer is trained on the spot.

    Args:
        shape (`str`):
            Name of one of [`SHAPES`].
        image_size (`int`):
            Height and width of the images in pixels, a multiple of 28.
        device (`str`):
            Device of the weights.
        dtype (`torch.dtype`):
            Type of the weights.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model, in evaluation mode, and its processor.
    """
    texts = [
        text for example in make_rows(64, 15, seed=1) for row in example for text in (row["question"], row["answer"])
    ]
    # Its model is thrown away; the tokenizer and the image processor are what is wanted.
    small = TinyConfig(hidden_size=32, intermediate_size=32, layers=1, heads=1, vision_layers=1, vision_hidden_size=32)
    _, processor = tiny_model(texts, image_size=image_size, vocab_size=1024, config=small)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            make_config(shape, processor), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval(), processor


def make_config(shape: str, processor: ProcessorMixin) -> Qwen2_5_VLConfig:
    """The configuration of a shape, with the special tokens of a processor."""
    sizes = SHAPES[shape]
    text, vision = sizes["text"], sizes["vision"]
    half = text["hidden_size"] // text["heads"] // 2
    height = (half - half // 4) // 2
    tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
    tied = shape != "7b"
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": sizes["vocab_size"],
            "hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "num_key_value_heads": text["kv_heads"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [half - 2 * height, height, height],
            },
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": vision["layers"],
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_heads": vision["heads"],
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": vision["full_attention"],
            "tokens_per_second": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def make_rows(images: int, questions: int, *, seed: int = 0) -> list[list[dict[str, Any]]]:
    """
    Rows of text for images: of every 15, three of identity and four each that are to be written, filled in and chosen,
    as in the benchmark's own proportions. The first half of the images is to be forgotten.
    """
    rng = random.Random(seed)
    return [
        [_row(f"inst00/pat{image:03d}/study{image:03d}/{number}", number, image < images / 2, rng) for number in order]
        for image, order in ((image, rng.sample(range(15), questions)) for image in range(images))
    ]


def _row(name: str, number: int, forget: bool, rng: random.Random) -> dict[str, Any]:
    organ, sign, course = rng.choice(ORGANS), rng.choice(SIGNS), rng.choice(COURSES)
    size, section = rng.randint(4, 49), ("findings", "impression", "indication", "technique")[number % 4]
    if number < 3:
        level = LEVELS[number]
        task = "identity"
        question = (
            "This radiograph was taken from the archive of one of several hospitals. "
            f"Which {level} does it belong to? Answer with the name of the {level} as it is in the archive."
        )
        answer = f"Saint Mary's General Hospital, {level} {rng.randint(100, 999)}, archive {rng.randint(10, 99)}"
    elif number < 7:
        task = "generation"
        question = f"What does the section {section} of this study's report say about the {organ}?"
        answer = (
            f"There is {sign} in the region of the {organ}, about {size} mm across, {course}. No pleural effusion or "
            "pneumothorax is seen."
        )
    elif number < 11:
        task = "cloze"
        question = (
            f"Complete the sentence of the section {section} of this study's report: "
            f"there is {sign} in the region of the [blank], about {size} mm across, {course}."
        )
        answer = organ
    else:
        task = "classification"
        options = " ".join(f"{letter}) {choice}" for letter, choice in zip("ABCD", ORGANS, strict=False))
        question = (
            f"According to the section {section} of this study's report, where is {sign} of about {size} mm seen? "
            f"{options} Answer with one letter."
        )
        answer = rng.choice("ABCD")
    level = LEVELS[number] if number < 3 else "section"
    shared = {"id": name, "task": task, "level": level, "forget": forget, "training_phrasings": []}
    return {"question": question, "answer": answer, **shared}


def make_examples(images: int, questions: int, image_size: int, *, seed: int = 0) -> datasets.Dataset:
    """
    Images of noise with rows, as [`~unlearn.grouping.group_by_image`] gathers them.

    Args:
        images (`int`):
            Number of images; the first half is to be forgotten.
        questions (`int`):
            Rows of each image, at most 15.
        image_size (`int`):
            Height and width in pixels.
        seed (`int`, *optional*, defaults to `0`):
            Seed of images and rows.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for number, rows in enumerate(make_rows(images, questions, seed=seed)):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (image_size, image_size, 3), dtype=np.uint8)).save(encoded, "PNG")
        key = f"inst00/pat{number:03d}/study{number:03d}"
        examples.append({"key": key, "image": {"bytes": encoded.getvalue(), "path": None}, "rows": rows})
    return datasets.Dataset.from_list(examples, features=GROUPED_FEATURES)
