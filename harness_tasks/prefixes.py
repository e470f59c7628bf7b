"""Pass what questions share through a Qwen2.5-VL model once, and go on from its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from .batching import Part
from .shared_attention import SharedPrefixCache, shared_prefixes


class Shared(NamedTuple):
    """Prefixes passed through the model, and rows that begin with them, padded on the left to (B, L)."""

    cache: SharedPrefixCache
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rope_deltas: torch.Tensor
    prefix_length: int


@torch.inference_mode()
def share(model: Any, processor: Any, batch: Sequence[Part], image_token_id: int) -> Shared:
    """
    Pass the prefixes of a batch through the model, and put their rows behind them.

    Args:
        model ([`~transformers.Qwen2_5_VLForConditionalGeneration`]):
            The model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        batch (`Sequence[Part]`):
            Prefixes with their images, as the processor is to have them, and their rows.
        image_token_id (`int`):
            Token that stands for a patch of an image.
    """
    encoded = processor(
        text=[part.text for part in batch],
        images=[list(part.images) for part in batch],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    prefix_ids, prefix_mask = encoded["input_ids"], encoded["attention_mask"]  # (P, Lp)
    cache = DynamicCache(config=model.config.get_text_config())
    inner = model.model
    inner.rope_deltas = None
    inner(
        input_ids=prefix_ids,
        attention_mask=prefix_mask,
        pixel_values=encoded["pixel_values"].to(model.dtype),
        image_grid_thw=encoded["image_grid_thw"],
        mm_token_type_ids=(prefix_ids == image_token_id).int(),
        past_key_values=cache,
        use_cache=True,
    )
    of_row = torch.tensor([i for i, part in enumerate(batch) for _ in part.rows], device=model.device)  # (B,)
    suffixes = [torch.tensor(row.tokens, device=model.device) for part in batch for row in part.rows]
    ids = _pad_left(suffixes, processor.tokenizer.pad_token_id)  # (B, Ls)
    mask = _pad_left([torch.ones_like(suffix) for suffix in suffixes], 0)
    return Shared(
        SharedPrefixCache(cache, of_row),
        torch.cat([prefix_ids[of_row], ids], dim=1),
        torch.cat([prefix_mask[of_row], mask], dim=1),
        inner.rope_deltas[of_row],
        prefix_ids.shape[1],
    )


def _pad_left(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side="left")


def _pass_rows(model: Any, shared: Shared, end: int) -> torch.Tensor:
    """
    Pass the rows up to column `end` behind their prefixes, as one sequence, so that none is padded.

    Returns:
        `torch.Tensor` of shape `(tokens, hidden size)`, row after row.
    """
    start, config = shared.prefix_length, model.config.get_text_config()
    own = shared.attention_mask[:, start:end].bool()  # (B, L)
    positions = (shared.attention_mask.cumsum(-1) - 1)[:, start:end] + shared.rope_deltas
    places = torch.arange(end, device=own.device)
    seen = shared.attention_mask[:, None, :end].bool() & (places <= places[start:, None])  # (B, L, end)
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=own.device)
    mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
    with shared_prefixes(config, shared.cache, own):
        return model.model.language_model(
            input_ids=shared.input_ids[:, start:end][own][None],
            attention_mask={"full_attention": mask[:, None]},
            position_ids=positions[own].expand(3, 1, -1),
            past_key_values=shared.cache,
            use_cache=True,
        ).last_hidden_state[0]


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, shared: Shared, until: list[str], **arguments: Any) -> list[str]:
    """
    Continue every row, up to the first of the strings `until`.

    Args:
        model ([`~transformers.Qwen2_5_VLForConditionalGeneration`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        shared (`Shared`):
            From [`share`]; it is used up.
        until (`list[str]`):
            Where an answer ends.
        **arguments (`Any`):
            How to decode, as `generate` of the model takes it.

    Returns:
        `list[str]`: The text of each row.
    """
    start = shared.input_ids.shape[1]
    if start - 1 > shared.prefix_length:  # the last token is left to `generate`
        _pass_rows(model, shared, start - 1)
    model.model.rope_deltas = shared.rope_deltas
    with shared_prefixes(model.config.get_text_config(), shared.cache):
        tokens = model.generate(
            input_ids=shared.input_ids,
            attention_mask=shared.attention_mask,
            past_key_values=shared.cache,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=stop_sequences_criteria(tokenizer, until, start, len(shared.input_ids)),
            use_cache=True,
            **arguments,
        )
    texts = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [postprocess_generated_text(text, until, None) for text in texts]


@torch.inference_mode()
def log_probs(model: Any, shared: Shared, keep: Sequence[int]) -> list[torch.Tensor]:
    """
    Log-probabilities of what follows the last tokens of each row.

    Args:
        model ([`~transformers.Qwen2_5_VLForConditionalGeneration`]):
            The model.
        shared (`Shared`):
            From [`share`]; it is used up.
        keep (`Sequence[int]`):
            How many tokens at the end of each row.

    Returns:
        `list[torch.Tensor]`: For each row, of shape `(keep, vocabulary)`, in nats.
    """
    hidden = _pass_rows(model, shared, shared.input_ids.shape[1])
    ends = shared.attention_mask[:, shared.prefix_length :].sum(-1).cumsum(0).tolist()
    kept = torch.cat([hidden[end - own : end] for end, own in zip(ends, keep, strict=True)])
    return list(model.lm_head(kept).float().log_softmax(-1).split(list(keep)))
