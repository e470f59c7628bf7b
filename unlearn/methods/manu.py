"""MANU: zero the MLP channels that matter more to what is to be forgotten than to the rest."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset.errors import UserError

from ..answers import model_inputs
from ..packing import PackedCollator
from ._base import EditingMethod, argument


EPSILON = 1e-8


@dataclass(frozen=True)
class MANU(EditingMethod):
    r"""
    Modality-aware neuron unlearning (paper, appendix A.1; https://huggingface.co/papers/2502.15910).

    A neuron is one SwiGLU channel of a language or vision MLP: row j of the gate and up projections and column j of
    the down projection. Its activation $z$ is what enters the down projection. With $m$ for the rows as they are and
    $t$ for the same rows without their image, the importance of a neuron to a set of rows is
    $\mathcal{I} = I_\mathrm{abs} + I_\mathrm{freq} + I_\mathrm{var} + I_\mathrm{rms}$:

    $$I_\mathrm{abs} = \frac{|\bar Z_m - \bar Z_t|}{\bar Z_m + \bar Z_t + \epsilon},\quad
      I_\mathrm{freq} = \frac{|N_m - N_t|}{N_m + N_t + \epsilon},\quad
      I_\mathrm{var} = \sqrt{\mathrm{Var}_m + \mathrm{Var}_t},\quad
      I_\mathrm{rms} = \sqrt{\frac{|\sum z_m^2 - \sum z_t^2|}{\sum z_m^2 + \sum z_t^2 + \epsilon}}$$

    where $\bar Z$ is the mean of $|z|$ and $N$ the number of times $|z|$ exceeds a threshold. The α % of all channels
    with the highest $S = \mathcal{I}_f / (\mathcal{I}_r + \epsilon)$ are zeroed, with their biases.

    In language MLPs the statistics are over the question and answer tokens of the rows, which both passes share; in
    vision MLPs over the patches of the images that carry such rows, and those of the textual pass are 0, since it has
    no image. The authors' released code differs: it compares the forget set with the retain set for each modality by
    itself, and zeroes rows of every matrix independently.

    Args:
        alpha (`float`, *optional*, defaults to `3.0`):
            α, per cent of all channels that are zeroed. MANU paper: 1 to 5, best near 3.
        threshold (`float`, *optional*, defaults to `0.1`):
            Size from which an activation counts as one. MANU's released code.
    """

    name = "manu"
    title = "MANU"
    presets = {"paper": {"alpha": 3.0}, "tiny": {}, "tiny-robust": {}}

    alpha: float = argument(3.0, "per cent of the MLP channels that are zeroed", "MANU paper, 1 to 5, best near 3")
    threshold: float = argument(0.1, "size from which an activation counts as one", "MANU's released code")

    def __post_init__(self):
        self.check(0 <= self.alpha <= 100, "alpha", "between 0 and 100 per cent")
        self.check(self.threshold >= 0, "threshold", "0 or more")

    def edit(self, model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset) -> dict[str, Any]:
        """Zero the channels. The result names them by MLP, with their scores."""
        forget, retain = channel_statistics(model, processor, grouped, self.threshold)
        mlps = gated_mlps(model)
        scores = {name: forget[name].importance() / (retain[name].importance() + EPSILON) for name in mlps}
        total = sum(len(score) for score in scores.values())
        count = round(total * self.alpha / 100)
        best = torch.cat(list(scores.values())).topk(count).indices
        zeroed, offset = {}, 0
        for name, mlp in mlps.items():
            inside = (best >= offset) & (best < offset + len(scores[name]))
            zeroed[name] = (best[inside] - offset).sort().values
            _zero_channels(mlp, zeroed[name].to(mlp.down_proj.weight.device))
            offset += len(scores[name])
        return {
            "zeroed": count,
            "total": total,
            "channels": {name: channels.tolist() for name, channels in zeroed.items()},
            "scores": {name: scores[name][channels].tolist() for name, channels in zeroed.items()},
        }


class ModalityStatistics:
    """
    Running sums over the activations of the C channels of an MLP, in float64, on the CPU. Their size does not depend
    on the number of rows.

    Args:
        channels (`int`):
            C.
        threshold (`float`):
            Size from which an activation counts as one.
    """

    def __init__(self, channels: int, threshold: float):
        self.threshold = threshold
        self.count = 0
        self.sums = torch.zeros(4, channels, dtype=torch.float64)  # z, |z|, z^2, |z| > threshold

    def add(self, activations: torch.Tensor) -> None:
        """Add activations of shape `(tokens, C)`."""
        z = activations.double()
        over = (z.abs() > self.threshold).double()
        self.count += len(z)
        self.sums += torch.stack([z.sum(0), z.abs().sum(0), z.square().sum(0), over.sum(0)]).cpu()  # (4, C)

    @property
    def mean_size(self) -> torch.Tensor:
        """Mean of `|z|`, of shape `(C,)`."""
        return self.sums[1] / max(self.count, 1)

    @property
    def variance(self) -> torch.Tensor:
        """Variance of `z`, of shape `(C,)`."""
        mean, mean_square = self.sums[0] / max(self.count, 1), self.sums[2] / max(self.count, 1)
        return (mean_square - mean.square()).clamp(min=0)


class ChannelStatistics:
    """Statistics of an MLP over one set of rows, with their image (`multimodal`) and without it (`textual`)."""

    def __init__(self, channels: int, threshold: float):
        self.multimodal = ModalityStatistics(channels, threshold)
        self.textual = ModalityStatistics(channels, threshold)

    def importance(self) -> torch.Tensor:
        """Sum of the four importance functions, of shape `(C,)`, float64."""
        m, t = self.multimodal, self.textual
        absolute = (m.mean_size - t.mean_size).abs() / (m.mean_size + t.mean_size + EPSILON)
        frequency = (m.sums[3] - t.sums[3]).abs() / (m.sums[3] + t.sums[3] + EPSILON)
        variance = (m.variance + t.variance).sqrt()
        root_mean_square = ((m.sums[2] - t.sums[2]).abs() / (m.sums[2] + t.sums[2] + EPSILON)).sqrt()
        return absolute + frequency + variance + root_mean_square


def gated_mlps(model: nn.Module) -> dict[str, Any]:
    """The SwiGLU MLPs of the language model and of the vision tower, by name."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, part) for part in parts)}


@torch.no_grad()
def channel_statistics(
    model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset, threshold: float
) -> tuple[dict[str, ChannelStatistics], dict[str, ChannelStatistics]]:
    """
    Statistics of every MLP over the forget rows and over the retain rows. Each row is passed through the model twice,
    with its image and without it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model with SwiGLU MLPs.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        grouped ([`~datasets.Dataset`]):
            Examples of [`~unlearn.packing.group_by_image`].
        threshold (`float`):
            Size from which an activation counts as one.

    Returns:
        `tuple[dict[str, ChannelStatistics], dict[str, ChannelStatistics]]`: For forget and for retain rows, the
        statistics by name of the MLP.

    Raises:
        UserError: If there are no rows of one of the two kinds.
    """
    flags = [row["forget"] for example in grouped.select_columns(["rows"]) for row in example["rows"]]
    if all(flags) or not any(flags):
        missing = "retain" if flags and flags[0] else "forget"
        raise UserError(f"manu compares rows to forget with rows to retain, and there are no {missing} rows")
    mlps = gated_mlps(model)
    forget, retain = (
        {name: ChannelStatistics(mlp.down_proj.in_features, threshold) for name, mlp in mlps.items()} for _ in range(2)
    )
    collators = [PackedCollator(processor, with_image=with_image) for with_image in (True, False)]
    was_training = model.training
    model.eval()
    # One image at a time: all patches then belong to the same rows.
    for example, collator in itertools.product(grouped, collators):
        batch = {name: value.to(model.device) for name, value in collator([example]).items()}
        with _recorded(mlps) as activations:
            model(**model_inputs(model, batch), logits_to_keep=1, use_cache=False)
        rows = batch["row_index"].flatten()  # (L,)
        is_row, is_forget = rows >= 0, batch["forget"][rows]
        for statistics, tokens in ((forget, is_row & is_forget), (retain, is_row & ~is_forget)):
            if tokens.any():
                for name, z in activations.items():
                    sums = statistics[name].multimodal if collator.with_image else statistics[name].textual
                    sums.add(z if _is_vision(name) else z[tokens])
    model.train(was_training)
    return forget, retain


def _is_vision(name: str) -> bool:
    return "visual" in name.split(".")


@contextmanager
def _recorded(mlps: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the input, of shape `(tokens, C)`, of every down projection that runs inside the context."""
    activations: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        return lambda module, inputs: activations.__setitem__(name, inputs[0].flatten(0, -2))

    handles = [mlp.down_proj.register_forward_pre_hook(hook(name)) for name, mlp in mlps.items()]
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _zero_channels(mlp: Any, channels: torch.Tensor) -> None:
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[channels] = 0
        if projection.bias is not None:
            projection.bias[channels] = 0
    mlp.down_proj.weight[:, channels] = 0
