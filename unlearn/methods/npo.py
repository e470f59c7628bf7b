"""NPO: make what is to be forgotten less probable than a reference model finds it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from medforget_dataset.errors import UserError

from ._base import INITIAL, AnswerBatch, GradientMethod, argument
from ._shared_presets import MLLMU_BENCH, OPEN_UNLEARNING


@dataclass(frozen=True)
class NPO(GradientMethod):
    r"""
    Negative preference optimisation (paper, appendix A.1; https://huggingface.co/papers/2404.05868), with retain term:

    $$\mathcal{L} = \frac{2}{\beta}\, \mathbb{E}_{S_F} \left[\log \left(1 +
        \left(\frac{\pi_\theta(y|x)}{\pi_\mathrm{ref}(y|x)}\right)^{\beta}\right)\right] + \alpha\,\mathcal{L}(S_R)$$

    The expectation is over forget rows. Once a row is much less probable than under the reference its gradient
    vanishes, so that unlike gradient ascent the first term stops by itself. $\mathcal{L}(S_R)$ is the cross-entropy,
    mean over the answer tokens of retain rows; the paper has no such term, and without it the tiny model loses what it
    should retain.

    The paper compares with a model that learned the retain rows only, and so does MLLMU-Bench (`baselines/NPO.py`,
    β 0.4, ratio of token means, there over the rows of a batch together). The NPO authors and open-unlearning
    (`src/trainer/utils.py`, β 0.1, ratio of token sums, as here) compare with the model before unlearning. Values of β
    for sums and for means do not carry over.

    Args:
        beta (`float`, *optional*, defaults to `0.9`):
            β, how soon the loss of a row levels off. Paper A.1.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            α, weight of the retain loss; 0 is the paper's form. open-unlearning.
        reference (`str`, *optional*, defaults to `"initial"`):
            `"initial"`, the model before unlearning, or the path of a model that learned the retain rows only. NPO
            authors.
        log_ratio (`"sum"` or `"mean"`, *optional*, defaults to `"sum"`):
            Whether the logarithm of the ratio is summed over the answer tokens or averaged. Paper A.1.
    """

    name = "npo"
    title = "NPO"
    needs_reference = "log_probs"
    reference_sides = ("forget",)
    presets = {
        "paper": {"beta": 0.9, "retain_weight": 0.0, "log_ratio": "sum", "reference": None},
        "open-unlearning": {"beta": 0.1, "retain_weight": 1.0, "log_ratio": "sum", **OPEN_UNLEARNING},
        "mllmu-bench": {"beta": 0.4, "retain_weight": 0.0, "log_ratio": "mean", "reference": None, **MLLMU_BENCH},
        "tiny": {"beta": 0.5, "learning_rate": 3e-4, "max_steps": 80},
        "tiny-robust": {"beta": 0.5, "retain_weight": 2.0, "learning_rate": 1e-3, "num_train_epochs": 16},
    }

    beta: float = argument(0.9, "how soon the loss of a row levels off; larger is sooner", "paper A.1")
    retain_weight: float = argument(1.0, "weight of the loss on retain rows; 0 is the paper's form", "open-unlearning")
    reference: str | None = argument(
        INITIAL, "'initial', the model before unlearning, or the folder of a retain-only model", "NPO authors"
    )
    log_ratio: Literal["sum", "mean"] = argument(
        "sum", "sum or mean of the log-probability ratio over an answer's tokens", "paper A.1"
    )

    def __post_init__(self):
        self.check(self.beta > 0, "beta", "more than 0")
        self.check(self.retain_weight >= 0, "retain_weight", "0 or more")
        self.check(self.log_ratio in ("sum", "mean"), "log_ratio", "'sum' or 'mean'")
        if not self.reference:
            raise UserError(
                "npo: the paper's form compares with a model that learned the retain rows only; "
                "give its folder with --reference PATH"
            )

    def loss(self, batch: AnswerBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_ratios = batch.row_sums(batch.log_probs - batch.reference_log_probs)  # (R,)
        if self.log_ratio == "mean":
            log_ratios = log_ratios / batch.row_sums(torch.ones_like(batch.log_probs)).clamp(min=1)
        # log(1 + ratio ** beta) without the overflow of the power.
        npo_loss = batch.row_mean(2 / self.beta * functional.softplus(self.beta * log_ratios), forget=True)
        loss = npo_loss
        if self.retain_weight:
            loss = loss + self.retain_weight * batch.cross_entropy(forget=False)
        return loss, {"npo_loss": npo_loss, "divergence": batch.row_mean(-log_ratios, forget=True)}
