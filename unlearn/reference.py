"""What a reference model thinks of the answers, computed once."""

from __future__ import annotations

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from .answers import answer_log_probs
from .methods import GradientMethod
from .packing import IGNORED, RowCollator


@torch.no_grad()
def reference_log_probs(
    reference: nn.Module,
    collator: RowCollator,
    grouped: datasets.Dataset,
    method: GradientMethod,
    accelerator: Accelerator,
    *,
    quiet: bool = False,
) -> dict[str, torch.Tensor]:
    """
    Log-probabilities of the answer tokens under a reference, of all images with rows that the method compares.

    Every process computes a part of the images.

    Args:
        reference (`torch.nn.Module`):
            The reference, on the device.
        collator ([`~unlearn.packing.RowCollator`]):
            The collator of training.
        grouped ([`~datasets.Dataset`]):
            Examples of [`~unlearn.grouping.group_by_image`].
        method ([`~unlearn.methods.GradientMethod`]):
            Method that needs them.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the processes and the device.
        quiet (`bool`, *optional*, defaults to `False`):
            No progress bar.

    Returns:
        `dict[str, torch.Tensor]`: For each row id the log-probabilities of its answer tokens and end token, of shape
        `(tokens,)`, nats, on the CPU.
    """
    needed = [i for i, rows in enumerate(grouped["rows"]) if any(method.compares(row["forget"]) for row in rows)]
    mine = needed[accelerator.process_index :: accelerator.num_processes]
    was_training = reference.training
    reference.eval()
    values: list[dict[str, torch.Tensor]] = []
    for i in tqdm(mine, desc="reference", disable=quiet or not accelerator.is_main_process):
        batch = {name: value.to(accelerator.device) for name, value in collator([grouped[i]]).items()}
        log_probs, _ = answer_log_probs(reference, batch)
        rows = batch["row_index"][:, 1:][batch["labels"][:, 1:] != IGNORED]
        for number, row in enumerate(grouped[i]["rows"]):
            values.append({row["id"]: log_probs[rows == number].float().cpu()})
    reference.train(was_training)
    gathered = gather_object(values) if accelerator.num_processes > 1 else values
    return {row: log_probs for entry in gathered for row, log_probs in entry.items()}
