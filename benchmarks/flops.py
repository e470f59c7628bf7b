"""How many floating-point operations a training step of Qwen2.5-VL needs, for model FLOPs utilisation.

What is counted is what a loop's own passes need, whatever the device does besides: recomputed activations, padding and
masked attention count nothing. A loop that passes an image once per question is credited with each pass, so that the
figure compares how well two loops use the device, not how much work they avoid; that is what rows per second say.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from transformers import Qwen2_5_VLConfig


@dataclass(frozen=True)
class Work:
    """
    What a step passes through the model.

    Args:
        tokens (`int`):
            Tokens of the language model, image tokens among them, padding not.
        pairs (`int`):
            Pairs of a token and one that it attends to, itself among them.
        projected (`int`):
            Positions that are projected onto the vocabulary.
        images (`int`):
            Images that are encoded.
        patches (`int`):
            Patches of these images together.
    """

    tokens: int = 0
    pairs: int = 0
    projected: int = 0
    images: int = 0
    patches: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def work_of(batch: dict[str, torch.Tensor], projected: int | None = None) -> Work:
    """
    The work of one pass of a batch, packed (`row_index` without `attention_mask`) or of padded rows.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch of a collator of ours or of [`~benchmarks.peers.PaddedRows`].
        projected (`int`, *optional*):
            Positions projected onto the vocabulary; all of the batch, padding too, if not given.
    """
    grids = batch["image_grid_thw"].prod(-1)
    pairs = tokens = 0
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(-1).tolist()
        tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    else:
        for rows in batch["row_index"]:
            prefix = int((rows == -1).sum())
            _, counts = rows[rows >= 0].unique(return_counts=True)
            tokens += prefix + int(counts.sum())
            pairs += prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in counts.tolist())
    return Work(
        tokens=tokens,
        pairs=pairs,
        projected=batch["input_ids"].numel() if projected is None else projected,
        images=len(grids),
        patches=int(grids.sum()),
    )


def forward_flops(config: Qwen2_5_VLConfig, work: Work) -> tuple[int, int]:
    """
    Operations of a forward pass in the language model, its vocabulary projection included, and in the vision tower.

    Two for each weight of a linear layer and token, and four times the width for each pair of attention, in every
    layer. In the vision tower, blocks that attend to windows have as many pairs for each patch as a window has
    patches.
    """
    text, vision = config.get_text_config(), config.vision_config
    width, key_width = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * width * width + 2 * width * key_width + 3 * width * text.intermediate_size
    language = text.num_hidden_layers * (2 * layer * work.tokens + 4 * width * work.pairs)
    language += 2 * width * text.vocab_size * work.projected

    size, merge = vision.hidden_size, vision.spatial_merge_size**2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * size
    block = 4 * size * size + 3 * size * vision.intermediate_size
    full = len(vision.fullatt_block_indexes)
    window = (vision.window_size // vision.patch_size) ** 2
    per_image = work.patches / max(work.images, 1)
    pairs = work.patches * (full * per_image + (vision.depth - full) * min(window, per_image))
    merger = (merge * size) ** 2 + merge * size * vision.out_hidden_size
    tower = 2 * work.patches * (patch + vision.depth * block + merger / merge) + 4 * size * pairs
    return language, int(tower)


def training_flops(config: Qwen2_5_VLConfig, work: Work, reference: Work, lora_rank: int | None) -> int:
    """
    Operations of a step: forward and backward of `work`, and forward only of `reference`.

    The backward pass costs twice the forward pass: once for the gradients of activations and once for those of
    weights. Under LoRA the weights of the language model are frozen, so that their half falls away, while attention
    keeps both, being without weights; the vision tower is frozen before the first trained layer and has no backward
    pass. The adapters themselves cost six operations for each of their weights and token.

    Args:
        config ([`~transformers.Qwen2_5_VLConfig`]):
            Configuration of the model.
        work ([`Work`]):
            What is trained on.
        reference ([`Work`]):
            What is only passed forward: by a reference model, or for statistics.
        lora_rank (`int`, *optional*):
            Rank of an adapter on all linear layers of the language model; the whole model is trained if not given.
    """
    language, tower = forward_flops(config, work)
    forward_only = sum(forward_flops(config, reference))
    if lora_rank is None:
        return 3 * (language + tower) + forward_only
    text = config.get_text_config()
    attention = 4 * text.hidden_size * work.pairs * text.num_hidden_layers
    width, key_width = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    sides = 2 * (2 * width) + 2 * (width + key_width) + 3 * (width + text.intermediate_size)
    adapters = lora_rank * sides * text.num_hidden_layers
    return 2 * language + attention + 6 * adapters * work.tokens + tower + forward_only
