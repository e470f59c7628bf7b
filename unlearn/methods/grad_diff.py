"""GradDiff: raise the loss on what is to be forgotten, lower it on the rest."""

from dataclasses import dataclass

import torch

from ._base import AnswerBatch, GradientMethod, argument


@dataclass(frozen=True)
class GradDiff(GradientMethod):
    r"""
    Gradient difference (paper, appendix A.1):

    $$\mathcal{L} = -\gamma\,\mathcal{L}(S_F) + \alpha\,\mathcal{L}(S_R)$$

    where $\mathcal{L}$ is the cross-entropy, here the mean over the answer tokens of the batch: forget and retain rows
    share every step. The first term has no lower bound: with the paper's weights a small model is destroyed before it
    has forgotten selectively.

    Checked against open-unlearning (`src/trainer/unlearn/grad_diff.py`), which is the same. MLLMU-Bench
    (`baselines/GA_Difference.py`) takes a whole epoch of the first term, then one of the second.

    Args:
        forget_weight (`float`, *optional*, defaults to `1.0`):
            γ, weight of the forget loss. Paper A.1.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            α, weight of the retain loss. Paper A.1.
    """

    name = "grad_diff"
    title = "GradDiff"
    presets = {
        "paper": {"forget_weight": 1.0, "retain_weight": 1.0},
        "tiny": {"forget_weight": 0.2, "learning_rate": 3e-4, "max_steps": 160},
        "tiny-robust": {"forget_weight": 0.12, "learning_rate": 1e-3, "max_steps": 160},
    }

    forget_weight: float = argument(1.0, "weight of the loss on forget rows, which is maximised", "paper A.1")
    retain_weight: float = argument(1.0, "weight of the loss on retain rows", "paper A.1")

    def __post_init__(self):
        self.check(self.forget_weight >= 0, "forget_weight", "0 or more")
        self.check(self.retain_weight >= 0, "retain_weight", "0 or more")

    def loss(self, batch: AnswerBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        forget_loss, retain_loss = batch.cross_entropy(forget=True), batch.cross_entropy(forget=False)
        loss = -self.forget_weight * forget_loss + self.retain_weight * retain_loss
        return loss, {"forget_loss": forget_loss, "retain_loss": retain_loss}
