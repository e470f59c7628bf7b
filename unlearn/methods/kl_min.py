"""KL-Min: raise the loss on what is to be forgotten, stay close to the original model on the rest."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from ._base import REDUCTIONS, AnswerBatch, GradientMethod, argument
from ._shared_presets import MLLMU_BENCH, OPEN_UNLEARNING, TINY_KEEP_BEST


@dataclass(frozen=True)
class KLMin(GradientMethod):
    r"""
    KL minimisation (paper, appendix A.1):

    $$\mathcal{L} = -\gamma\,\mathcal{L}(S_F)
        + \frac{\lambda}{|S_R|} \sum_{s \in S_R} \mathrm{KL}(p_\mathrm{orig}(s) \,\|\, p_\mathrm{curr}(s))$$

    where $\mathcal{L}$ is the cross-entropy and both terms are means over the answer tokens of a step.

    Checked against TOFU (`dataloader.py`), which has the same direction of the divergence but averages it over prompt
    and padding positions too. MLLMU-Bench (`baselines/KL_Min.py`) sums it over the positions of a sequence, adds the
    retain cross-entropy, and takes an epoch of the first term before one of the second.

    Args:
        forget_weight (`float`, *optional*, defaults to `1.0`):
            γ, weight of the forget loss. Paper A.1.
        kl_weight (`float`, *optional*, defaults to `1.0`):
            λ, weight of the divergence on retain rows. Paper A.1.
        retain_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy on retain rows, which the paper does not have and MLLMU-Bench does. Paper A.1.
        kl_reduction (`"token_mean"` or `"row_sum"`, *optional*, defaults to `"token_mean"`):
            Divergence as a mean over the answer tokens, or a mean over rows of its sum in each. Paper A.1.
    """

    name = "kl_min"
    title = "KL-Min"
    needs_reference = "logits"
    reference_sides = ("retain",)
    presets = {
        "paper": {"forget_weight": 1.0, "kl_weight": 1.0},
        "open-unlearning": {"forget_weight": 1.0, "kl_weight": 1.0, **OPEN_UNLEARNING},
        "mllmu-bench": {"retain_weight": 1.0, "kl_reduction": "row_sum", **MLLMU_BENCH},
        "tiny": {"forget_weight": 0.2, "kl_weight": 2.0, "learning_rate": 3e-4, "max_steps": 160},
        "tiny-robust": {
            "forget_weight": 0.28,
            "kl_weight": 2.0,
            "learning_rate": 6e-4,
            "num_train_epochs": 28,
            **TINY_KEEP_BEST,
        },
    }

    forget_weight: float = argument(1.0, "weight of the loss on forget rows, which is maximised", "paper A.1")
    kl_weight: float = argument(1.0, "weight of the divergence from the original model on retain rows", "paper A.1")
    retain_weight: float = argument(0.0, "weight of the loss on retain rows; 0 is the paper's form", "paper A.1")
    kl_reduction: Literal["token_mean", "row_sum"] = argument(
        "token_mean", "divergence as token_mean over answers, or row_sum: mean over rows of its sum", "paper A.1"
    )

    def __post_init__(self):
        self.check(self.forget_weight >= 0, "forget_weight", "0 or more")
        self.check(self.kl_weight >= 0, "kl_weight", "0 or more")
        self.check(self.retain_weight >= 0, "retain_weight", "0 or more")
        self.check(self.kl_reduction in REDUCTIONS, "kl_reduction", "'token_mean' or 'row_sum'")

    def loss(self, batch: AnswerBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        retained = batch.tokens_of(forget=False)  # (N,)
        current = batch.logits[retained].float().log_softmax(-1)  # (N', V)
        original = batch.reference_logits[retained].float().log_softmax(-1)  # (N', V)
        of_retained = functional.kl_div(current, original, log_target=True, reduction="none").sum(-1)  # (N',)
        divergences = of_retained.new_zeros(len(retained)).masked_scatter(retained, of_retained)  # (N,)
        divergence = batch.mean(divergences, forget=False, reduction=self.kl_reduction)
        loss = -self.forget_weight * batch.cross_entropy(forget=True) + self.kl_weight * divergence
        if self.retain_weight:
            loss = loss + self.retain_weight * batch.cross_entropy(forget=False)
        return loss, {"divergence": divergence}
