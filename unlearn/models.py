"""Make the embedded tiny Qwen2.5-VL.

It has the classes of Lingshu-7B and other Qwen2.5-VL checkpoints: a script that runs on it runs on them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from medforget_dataset.errors import UserError


# In the order of Qwen2.5-VL's own vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The chat template of Qwen/Qwen2.5-VL-7B-Instruct, character by character.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


@dataclass(frozen=True)
class TinyConfig:
    """
    Shape of the embedded model. The defaults were measured on 2 CPU cores: with them about 0.8 million parameters
    learn all 3,840 rows of the full benchmark in about five minutes.

    Args:
        hidden_size (`int`, *optional*, defaults to `128`):
            Width of the language model.
        intermediate_size (`int`, *optional*, defaults to `384`):
            SwiGLU channels of each language block.
        layers (`int`, *optional*, defaults to `2`):
            Language blocks.
        heads (`int`, *optional*, defaults to `4`):
            Attention heads of the language model, each with its own key and value.
        vision_layers (`int`, *optional*, defaults to `2`):
            Vision blocks. The last one attends to the whole image, the others to windows.
        vision_hidden_size (`int`, *optional*, defaults to `64`):
            Width of the vision tower.
        vision_intermediate_size (`int`, *optional*, defaults to `128`):
            SwiGLU channels of each vision block.
        vision_heads (`int`, *optional*, defaults to `4`):
            Attention heads of the vision tower.
        initializer_range (`float`, *optional*, defaults to `0.08`):
            Standard deviation of the initial weights of both parts. With 0.02, the value of Qwen2.5-VL, a model this
            narrow does not learn the full benchmark.
    """

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 2
    heads: int = 4
    vision_layers: int = 2
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 128
    vision_heads: int = 4
    initializer_range: float = 0.08


def tiny_model(
    texts: Iterable[str],
    *,
    image_size: int = 56,
    vocab_size: int = 1024,
    seed: int = 0,
    config: TinyConfig | None = None,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """
    Make an untrained tiny Qwen2.5-VL and its processor.

    Args:
        texts (`Iterable[str]`):
            Questions and answers that the tokenizer is trained on.
        image_size (`int`, *optional*, defaults to `56`):
            Height and width in pixels that every square image is resized to, a multiple of 28. An image becomes
            `(image_size / 28) ** 2` tokens.
        vocab_size (`int`, *optional*, defaults to `1024`):
            Upper bound on the size of the vocabulary, 8 special tokens and 256 bytes included.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights.
        config ([`TinyConfig`], *optional*):
            Shape of the model.

    Returns:
        `tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]`: The model, in float32 on the CPU, and its
        processor.

    Raises:
        UserError: If `image_size` is not a positive multiple of 28.
    """
    if image_size <= 0 or image_size % 28:
        raise UserError(f"image_size is {image_size}; it must be a positive multiple of 28, such as 56, 84 or 112")
    processor = _tiny_processor(texts, image_size, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_tiny_config(processor.tokenizer, config or TinyConfig()))
    generation = model.generation_config
    generation.do_sample = False
    generation.eos_token_id = processor.tokenizer.eos_token_id
    generation.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


def _tiny_processor(texts: Iterable[str], image_size: int, vocab_size: int) -> Qwen2_5_VLProcessor:
    tokenizer = Tokenizer(models.BPE())
    # One token a digit, as in Qwen2.5: study numbers then share their tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _with_template_texts(texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # The bounds leave room around image_size ** 2: were they equal, rounding would turn a side of 300 into 28, not 56.
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=image_size**2 - 28, max_pixels=image_size**2 + 28),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
            model_max_length=32768,
        ),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def _with_template_texts(texts: Iterable[str]) -> Iterator[str]:
    yield from texts
    for _ in range(20):  # Often enough that the words every prompt repeats become single tokens.
        yield from ("system\nYou are a helpful assistant.", "user\n", "assistant\n")


def _tiny_config(tokenizer: PreTrainedTokenizerFast, shape: TinyConfig) -> Qwen2_5_VLConfig:
    half = shape.hidden_size // shape.heads // 2
    time = half // 4
    height = (half - time) // 2
    vocabulary = tokenizer.get_vocab()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            # Qwen2.5-VL gives time a quarter of the rotary channels, and the rest to height and width in equal parts.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [time, height, half - time - height],
            },
            "tie_word_embeddings": True,
            "initializer_range": shape.initializer_range,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": shape.vision_intermediate_size,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden_size,
            "fullatt_block_indexes": [shape.vision_layers - 1],
            "initializer_range": shape.initializer_range,
        },
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=True,
    )
