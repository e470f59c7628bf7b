"""Encode each image once, where the vision tower does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medforget_dataset.errors import UserError

from .packing import RowCollator


class VisionCache:
    """
    Puts the vision tower's output into a collator's batches in place of pixels, computed when an image is first drawn.

    The model's own forward goes on as it is: while [`VisionCache.in_use`], its vision tower lets through what has been
    encoded, and encodes what has not.

    Args:
        models (`Sequence[torch.nn.Module]`):
            Qwen2.5-VL models, bare or with an adapter, that see the batches; their vision towers are not trained and
            have the same weights.
        collator ([`~unlearn.packing.RowCollator`]):
            Collator whose batches the models will see.
        autocast (`Callable`, *optional*, defaults to `nullcontext`):
            Makes the context in which the models compute.

    Raises:
        UserError: If a vision tower is trained, or they differ.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        collator: RowCollator,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.autocast = autocast
        self.towers = [vision_tower(model) for model in models]
        self.tower = self.towers[0]
        if any(parameter.requires_grad for parameter in self.tower.parameters()):
            raise UserError(
                "cache_vision: the vision tower is trained, so that what it makes of an image changes; train a LoRA "
                "adapter of the language model (--lora), or freeze the tower (--freeze-vision)"
            )
        if not all(_same_weights(self.tower, tower) for tower in self.towers[1:]):
            raise UserError(
                "cache_vision: the reference encodes images in another way than the model, since their vision towers "
                "were trained apart; leave it out"
            )
        self.patch_width = self.tower.patch_embed.proj.weight[0].numel()
        collator.encode_with(self.encode)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixels (`torch.Tensor` of shape `(patches, channels)`):
                Output of the image processor for one image.
            grid (`torch.Tensor` of shape `(3,)`):
                Patches in time, height and width.

        Returns:
            `torch.Tensor` of shape `(image tokens, H)`: What stands for the image in the prompt, on the CPU.
        """
        weight = self.tower.patch_embed.proj.weight
        inputs = pixels.to(weight.device, weight.dtype)
        with self.autocast():
            return self.tower(inputs, grid_thw=grid[None].to(weight.device)).pooler_output.cpu()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the context, the towers take encoded images and pixels alike; they differ in width."""
        for tower in self.towers:
            tower.forward = self._passing(tower.forward)
        try:
            yield
        finally:
            for tower in self.towers:
                del tower.forward

    def _passing(self, original: Callable) -> Callable:
        def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
            if hidden_states.shape[-1] == self.patch_width:
                return original(hidden_states, grid_thw=grid_thw, **kwargs)
            return BaseModelOutputWithPooling(pooler_output=hidden_states)

        return forward


@contextmanager
def without_gradient(tower: Any) -> Iterator[None]:
    """
    Inside the context, a vision tower of which nothing is trained is not passed backward.

    Activation checkpointing makes the inputs of every part of a model require gradients, so that those of a frozen
    tower would be computed and dropped.
    """
    if any(parameter.requires_grad for parameter in tower.parameters()):
        yield
        return
    tower.forward = torch.no_grad()(tower.forward)
    try:
        yield
    finally:
        del tower.forward


def vision_tower(model: nn.Module) -> Any:
    """The vision tower of a Qwen2.5-VL model, bare or with an adapter."""
    return next(module for name, module in model.named_modules() if name.endswith("visual"))


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
