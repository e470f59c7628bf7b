"""Attention of rows to a prefix that several of them share, and to what each has behind it.

The keys and values of a prefix are kept once, not once a row, and all its rows meet them in one multiplication: a step
of generation reads them once for fifteen questions (as in Hydragen, https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask


NAME = "medforget_shared_prefix"
ROOM = 32
"""Tokens that the keys and values of rows grow by at a time."""

AttentionMaskInterface.register(NAME, eager_mask)


class _Layer(DynamicLayer):
    """Keys and values of prefixes, (P, heads, Lp, D), and of what rows have behind them, (B, heads, L, D)."""

    keys: Any
    values: Any

    def __init__(self, cache: SharedPrefixCache, prefix: Any):
        super().__init__()
        self.cache = cache
        self.prefix_keys, self.prefix_values = prefix.keys, prefix.values
        self.length = 0

    def get_seq_length(self) -> int:
        """Tokens of a row, its prefix included."""
        return self.prefix_keys.shape[-2] + self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values to those of the rows, in place where there is room, and return the rows' own."""
        key_states, value_states = self.cache.unpacked(key_states), self.cache.unpacked(value_states)
        total = self.length + key_states.shape[-2]
        if not self.is_initialized or self.keys.shape[-2] < total:
            room = (*key_states.shape[:-2], total + ROOM, key_states.shape[-1])
            keys, values = key_states.new_empty(room), value_states.new_empty(room)
            if self.is_initialized:
                keys[..., : self.length, :] = self.keys[..., : self.length, :]
                values[..., : self.length, :] = self.values[..., : self.length, :]
            self.keys, self.values, self.is_initialized = keys, values, True
        self.keys[..., self.length : total, :] = key_states
        self.values[..., self.length : total, :] = value_states
        self.length = total
        return self.keys[..., :total, :], self.values[..., :total, :]


class SharedPrefixCache(Cache):
    """
    Keys and values of prefixes, and of rows behind them.

    Args:
        prefixes ([`~transformers.DynamicCache`]):
            The prefixes, passed through the model with padding on their left.
        of_row (`torch.Tensor` of shape `(rows,)`):
            Which prefix each row has; the rows of a prefix stand together.
    """

    def __init__(self, prefixes: DynamicCache, of_row: torch.Tensor):
        super().__init__(layers=[_Layer(self, layer) for layer in prefixes.layers])
        counts = torch.bincount(of_row)
        self.of_row = of_row
        self.width = int(counts.max())  # most rows of a prefix
        self.place = torch.arange(len(of_row), device=of_row.device) - (counts.cumsum(0) - counts)[of_row]
        self.packed: torch.Tensor | None = None
        """While tokens of all rows are passed as one sequence: where they are among the rows', a mask (B, L)."""

    def unpacked(self, sequence: torch.Tensor) -> torch.Tensor:
        """What was computed for one sequence, (1, heads, tokens, D), by row: (B, heads, L, D), zeros where padded."""
        if self.packed is None:
            return sequence
        rows = sequence.new_zeros(*self.packed.shape, sequence.shape[1], sequence.shape[3])
        rows[self.packed] = sequence[0].transpose(0, 1)
        return rows.transpose(1, 2)

    def beside(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, heads, L, …) by prefix: (P, heads, width * L, …), with zeros where a prefix has fewer."""
        prefixes = int(self.of_row[-1]) + 1
        spread = rows.new_zeros(prefixes, self.width, *rows.shape[1:])
        spread[self.of_row, self.place] = rows
        return spread.transpose(1, 2).flatten(2, 3)

    def apart(self, spread: torch.Tensor) -> torch.Tensor:
        """The opposite."""
        rows = spread.unflatten(2, (self.width, -1)).transpose(1, 2)
        return rows[self.of_row, self.place]


def _attend(
    cache: SharedPrefixCache,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention of queries (B, query heads, L, D) to the prefixes of their rows and to `key` and `value`, the rows' own.

    The mask, (B, 1, L, length of prefix and own), is added to the scores.
    """
    layer: Any = cache.layers[module.layer_idx]  # type: ignore[index]
    before = layer.prefix_keys.shape[-2]
    query = cache.unpacked(query)
    heads, length = key.shape[1], query.shape[2]
    grouped = query.unflatten(1, (heads, -1)).flatten(2, 3) * scaling  # (B, heads, groups * L, D)
    of_prefix = cache.apart(cache.beside(grouped) @ layer.prefix_keys.mT)
    scores = torch.cat([of_prefix, grouped @ key.mT], dim=-1)  # (B, heads, groups * L, length of all)
    masked = scores.unflatten(2, (-1, length)) + attention_mask[:, :, None]  # (B, heads, groups, L, length of all)
    weights = masked.softmax(-1, dtype=torch.float32).to(query.dtype).flatten(2, 3)
    of_prefix = cache.apart(cache.beside(weights[..., :before]) @ layer.prefix_values)
    out = (of_prefix + weights[..., before:] @ value).unflatten(2, (-1, length)).flatten(1, 2)
    out = out.transpose(1, 2)  # (B, L, query heads, D)
    return out.contiguous() if cache.packed is None else out[cache.packed][None], None


@contextmanager
def shared_prefixes(config: Any, cache: SharedPrefixCache, packed: torch.Tensor | None = None) -> Iterator[None]:
    """
    Inside the context, a model attends as `cache` needs it.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the language model.
        cache (`SharedPrefixCache`):
            What the model is called with.
        packed (`torch.Tensor` of shape `(rows, length)`, *optional*):
            For a call with the tokens of all rows as one sequence, without padding: which places of the rows, padded
            on the left, they are.
    """
    usual = config._attn_implementation
    AttentionInterface.register(NAME, partial(_attend, cache))
    config._attn_implementation, cache.packed = NAME, packed
    try:
        yield
    finally:
        config._attn_implementation, cache.packed = usual, None
