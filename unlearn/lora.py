"""LoRA on the language model, or on whatever else a regular expression names."""

from __future__ import annotations

import re

from peft import LoraConfig
from torch import nn

from medforget_dataset.errors import UserError


LANGUAGE_LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""All linear layers of the language model. PEFT's `all-linear`, and short names such as `up_proj`, take those of the
vision tower too, which in Qwen2.5-VL have the same names."""


def make_lora_config(model: nn.Module, *, r: int, alpha: int, dropout: float, targets: str) -> LoraConfig:
    """
    A LoRA configuration that is known to fit a model.

    Args:
        model (`torch.nn.Module`):
            Model to adapt.
        r (`int`):
            Rank.
        alpha (`int`):
            Scale of the adapter: its output counts `alpha / r` times.
        dropout (`float`):
            Share of the adapter's inputs that are dropped in training.
        targets (`str`):
            Regular expression for the whole names of the layers to adapt.

    Raises:
        UserError: If a number is out of range, or the expression is none, or names no linear layer, or the vocabulary
            projection.
    """
    if r < 1:
        raise UserError(f"lora_r is {r}; it must be 1 or more")
    if alpha <= 0:
        raise UserError(f"lora_alpha is {alpha}; it must be more than 0, or the adapter counts for nothing")
    if not 0 <= dropout < 1:
        raise UserError(f"lora_dropout is {dropout}; it must be at least 0 and less than 1")
    try:
        expression = re.compile(targets)
    except (re.error, TypeError) as error:
        raise UserError(f"lora_target_modules {targets!r} is not a regular expression: {error}") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = [name for name in linear if expression.fullmatch(name)]
    if not matched:
        raise UserError(
            f"lora_target_modules {targets!r} matches the whole name of no linear layer; one of them is "
            f"{linear[-2] if len(linear) > 1 else linear}"
        )
    if "lm_head" in (name.rpartition(".")[2] for name in matched):
        raise UserError(f"lora_target_modules {targets!r} matches lm_head, which cannot be adapted; leave it out")
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
