"""MANU: zero the MLP channels that matter more to what is to be forgotten than to the rest."""

from dataclasses import dataclass
from typing import Any, Literal

import datasets
import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..answers import model_inputs
from ._base import EditingMethod, argument
from ._manu_released import zero_units
from ._manu_statistics import Recorder, RunningSums, gated_mlps, part_of


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
    no image. They are running sums: what they take of memory does not depend on the number of rows.

    The authors' released code differs, and is the variant `"released"`: it compares the forget set with the retain set
    for each modality by itself, and zeroes rows of every matrix of the last three layers independently.
    `unlearn/methods/_manu_released.py` says how.

    Args:
        alpha (`float`, *optional*, defaults to `3.0`):
            α, per cent of all channels that are zeroed; in the released variant, per cent of the output units of the
            matrices that it scores, in the language model and in the vision tower. MANU paper: 1 to 5, best near 3.
        threshold (`float`, *optional*, defaults to `0.1`):
            Size from which an activation counts as one. The released variant does not count. MANU's released code.
        variant (`"paper"` or `"released"`, *optional*, defaults to `"paper"`):
            The form of the paper, or that of its authors' code. Paper A.1.
    """

    name = "manu"
    title = "MANU"
    presets = {
        "paper": {"alpha": 3.0},
        "authors-code": {"variant": "released", "alpha": 2.0},
        "tiny": {},
        "tiny-robust": {},
    }

    alpha: float = argument(3.0, "per cent of the MLP channels that are zeroed", "MANU paper, 1 to 5, best near 3")
    threshold: float = argument(0.1, "size from which an activation counts as one", "MANU's released code")
    variant: Literal["paper", "released"] = argument(
        "paper", "the form of the paper, or that of its authors' released code", "paper A.1"
    )

    def __post_init__(self):
        self.check(0 <= self.alpha <= 100, "alpha", "between 0 and 100 per cent")
        self.check(self.threshold >= 0, "threshold", "0 or more")
        self.check(self.variant in ("paper", "released"), "variant", "'paper' or 'released'")

    def edit(self, model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset) -> dict[str, Any]:
        """
        Zero the channels. The result has their number (`"zeroed"`) of all (`"total"`), in the language model and in
        the vision tower (`"by_part"`), and by MLP, or by matrix in the released variant, which they are (`"channels"`)
        and how they scored (`"scores"`).
        """
        if self.variant == "paper":
            scores, zeroed = zero_channels(model, processor, grouped, self.alpha, self.threshold)
        else:
            scores, zeroed = zero_units(model, processor, grouped, self.alpha)
        by_part = {"language": 0, "vision": 0}
        for name, channels in zeroed.items():
            by_part[part_of(name)] += len(channels)
        return {
            "zeroed": sum(by_part.values()),
            "total": sum(len(score) for score in scores.values()),
            "by_part": by_part,
            "channels": {name: channels.tolist() for name, channels in zeroed.items()},
            "scores": {name: scores[name][channels].tolist() for name, channels in zeroed.items()},
        }


def zero_channels(
    model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset, alpha: float, threshold: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Zero the channels that the paper zeroes. The arguments are those of [`MANU`] and [`MANU.edit`].

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: The scores of all channels, of shape `(C,)`, and the
        numbers of those zeroed, by name of the MLP.

    Raises:
        UserError: If there are no rows to forget or no rows to retain.
    """
    forget, retain = channel_statistics(model, processor, grouped, threshold)
    mlps = gated_mlps(model)
    scores = {name: forget[name].importance() / (retain[name].importance() + EPSILON) for name in mlps}
    best = torch.cat(list(scores.values())).topk(round(sum(map(len, scores.values())) * alpha / 100)).indices
    zeroed, offset = {}, 0
    for name, mlp in mlps.items():
        inside = (best >= offset) & (best < offset + len(scores[name]))
        zeroed[name] = (best[inside] - offset).sort().values
        _zero(mlp, zeroed[name].to(mlp.down_proj.weight.device))
        offset += len(scores[name])
    return scores, zeroed


@dataclass(frozen=True)
class ChannelStatistics:
    """
    Statistics of the C channels of an MLP over one set of rows.

    Args:
        multimodal ([`~unlearn.methods._manu_statistics.RunningSums`]):
            Of the rows with their image.
        textual ([`~unlearn.methods._manu_statistics.RunningSums`]):
            Of the rows without it.
    """

    multimodal: RunningSums
    textual: RunningSums

    def importance(self) -> torch.Tensor:
        """Sum of the four importance functions, of shape `(C,)`, float64."""
        m, t = self.multimodal, self.textual
        absolute = (m.mean_size - t.mean_size).abs() / (m.mean_size + t.mean_size + EPSILON)
        frequency = (m.sums[3] - t.sums[3]).abs() / (m.sums[3] + t.sums[3] + EPSILON)
        variance = (m.variance + t.variance).sqrt()
        root_mean_square = ((m.sums[2] - t.sums[2]).abs() / (m.sums[2] + t.sums[2] + EPSILON)).sqrt()
        return absolute + frequency + variance + root_mean_square


def channel_statistics(
    model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset, threshold: float
) -> tuple[dict[str, ChannelStatistics], dict[str, ChannelStatistics]]:
    """
    Statistics of every MLP over the forget rows and over the retain rows, in one pass over the images.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model with SwiGLU MLPs.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        grouped ([`~datasets.Dataset`]):
            Examples of [`~unlearn.grouping.group_by_image`].
        threshold (`float`):
            Size from which an activation counts as one.

    Returns:
        `tuple[dict[str, ChannelStatistics], dict[str, ChannelStatistics]]`: For forget and for retain rows, the
        statistics by name of the MLP.

    Raises:
        UserError: If there are no rows of one of the two kinds.
    """
    recorder = Recorder(threshold)
    mlps = gated_mlps(model)
    for name, mlp in mlps.items():
        recorder.watch(name, part_of(name), mlp.down_proj, output=False)

    def forward(batch: dict[str, torch.Tensor], with_image: bool) -> None:
        model(**model_inputs(model, batch), logits_to_keep=1, use_cache=False)

    recorder.run(model, processor, grouped, forward)
    sums = recorder.sums
    forget, retain = (
        {name: ChannelStatistics(sums[name, kind, True], sums[name, kind, False]) for name in mlps}
        for kind in (True, False)
    )
    return forget, retain


@torch.no_grad()
def _zero(mlp: Any, channels: torch.Tensor) -> None:
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[channels] = 0
        if projection.bias is not None:
            projection.bias[channels] = 0
    mlp.down_proj.weight[:, channels] = 0
