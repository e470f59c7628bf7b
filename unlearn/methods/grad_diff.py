"""GradDiff: raise the loss on what is to be forgotten, lower it on the rest."""

from dataclasses import dataclass
from typing import Literal

import torch

from ._base import REDUCTIONS, AnswerBatch, GradientMethod, argument
from ._shared_presets import MLLMU_BENCH, OPEN_UNLEARNING, TINY_KEEP_BEST


@dataclass(frozen=True)
class GradDiff(GradientMethod):
    r"""
    Gradient difference (paper, appendix A.1):

    $$\mathcal{L} = -\gamma\,\mathcal{L}(S_F) + \alpha\,\mathcal{L}(S_R)$$

    where $\mathcal{L}$ is the cross-entropy, by default the mean over the answer tokens of a step: forget and retain
    rows share every step. The first term has no lower bound: with the paper's weights a small model is destroyed
    before it has forgotten selectively.

    Checked against open-unlearning (`src/trainer/unlearn/grad_diff.py`), which is the same. MLLMU-Bench
    (`baselines/GA_Difference.py`) takes a whole epoch of the first term, then one of the second, which is
    `schedule="sequential"` of [`~unlearn.config.UnlearnConfig`].

    Args:
        forget_weight (`float`, *optional*, defaults to `1.0`):
            γ, weight of the forget loss. Paper A.1.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            α, weight of the retain loss. Paper A.1.
        reduction (`"token_mean"` or `"row_sum"`, *optional*, defaults to `"token_mean"`):
            Mean over the answer tokens, or mean over rows of their sum in each, under which long answers weigh more.
            open-unlearning.
    """

    name = "grad_diff"
    title = "GradDiff"
    presets = {
        "paper": {"forget_weight": 1.0, "retain_weight": 1.0},
        "open-unlearning": {"forget_weight": 1.0, "retain_weight": 1.0, **OPEN_UNLEARNING},
        "mllmu-bench": {"forget_weight": 1.0, "retain_weight": 1.0, **MLLMU_BENCH},
        "tiny": {"forget_weight": 0.2, "learning_rate": 3e-4, "max_steps": 160},
        "tiny-robust": {
            "forget_weight": 0.12,
            "learning_rate": 7e-4,
            "num_train_epochs": 24,
            **TINY_KEEP_BEST,
        },
    }

    forget_weight: float = argument(1.0, "weight of the loss on forget rows, which is maximised", "paper A.1")
    retain_weight: float = argument(1.0, "weight of the loss on retain rows", "paper A.1")
    reduction: Literal["token_mean", "row_sum"] = argument(
        "token_mean", "token_mean over answer tokens, or row_sum: mean over rows of their sum", "open-unlearning"
    )

    def __post_init__(self):
        self.check(self.forget_weight >= 0, "forget_weight", "0 or more")
        self.check(self.retain_weight >= 0, "retain_weight", "0 or more")
        self.check(self.reduction in REDUCTIONS, "reduction", "'token_mean' or 'row_sum'")

    def loss(self, batch: AnswerBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        forget_loss, retain_loss = (batch.cross_entropy(forget, self.reduction) for forget in (True, False))
        return -self.forget_weight * forget_loss + self.retain_weight * retain_loss, {}
