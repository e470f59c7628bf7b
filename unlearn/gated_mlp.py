"""Gated MLPs that keep half as much for the backward pass, which computes the rest anew: two products by element."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional


class GatedProduct(torch.autograd.Function):
    """
    `silu(gate) * up` from tensors of one shape, with gradients bit for bit those of autograd, which keeps
    `silu(gate)` beside `gate` and `up`.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,), (gate, up) = gradients, ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, gradient * functional.silu(gate)


@contextmanager
def lean_mlps(model: nn.Module) -> Iterator[None]:
    """
    Inside the context the gated MLPs of a model keep only their gate and up projections for the backward pass, not
    `silu(gate)` and the product with it that the down projection reads. MLPs hold most of what a step keeps.

    Not for activation checkpointing, which keeps nothing of an MLP anyway.

    Args:
        model (`torch.nn.Module`):
            Model whose MLPs have `gate_proj`, `up_proj`, `down_proj` and `act_fn`; those with another activation than
            SiLU are left alone.
    """
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    mlps: list[Any] = [m for m in model.modules() if all(hasattr(m, part) for part in parts) and _is_silu(m.act_fn)]
    for mlp in mlps:
        mlp.forward = partial(_forward, mlp)
    try:
        yield
    finally:
        for mlp in mlps:
            del mlp.forward


def _forward(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    product = GatedProduct.apply(gate, up)
    if not product.requires_grad:
        return mlp.down_proj(product)
    kept, place = (gate.detach(), up.detach()), product.data_ptr()

    def pack(tensor: torch.Tensor) -> torch.Tensor | torch.Size:
        is_product = tensor.data_ptr() == place and tensor.numel() == kept[0].numel()
        return tensor.shape if is_product else tensor

    def unpack(stored: torch.Tensor | torch.Size) -> torch.Tensor:
        if isinstance(stored, torch.Tensor):
            return stored
        return (functional.silu(kept[0]) * kept[1]).view(stored)

    with saved_tensors_hooks(pack, unpack):
        return mlp.down_proj(product)


def _is_silu(activation: Any) -> bool:
    probe = torch.linspace(-4, 4, 9)
    return torch.equal(activation(probe), functional.silu(probe))
