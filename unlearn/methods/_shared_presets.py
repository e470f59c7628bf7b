"""Training arguments that presets of several methods share.

Those of the peers are in images where the peers count rows: an image has about 15.
"""

from typing import Any


LINEAR: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "adam_beta2": 0.999,
}
"""What the peers' steps have in common: PyTorch's AdamW, a learning rate that falls to 0, and no warm-up."""

OPEN_UNLEARNING: dict[str, Any] = {
    "learning_rate": 1e-5,
    "num_train_epochs": 10,
    # 32 rows of each kind.
    "forget_per_step": 2,
    "retain_per_step": 2,
    **LINEAR,
}
"""open-unlearning, `configs/trainer/finetune.yaml` and `scripts/tofu_unlearn.sh`."""

MLLMU_BENCH: dict[str, Any] = {
    "learning_rate": 2e-5,
    "num_train_epochs": 1,
    # 4 rows, less than one image.
    "forget_per_step": 1,
    "retain_per_step": 0,
    "schedule": "sequential",
    **LINEAR,
    # Theirs takes one step an epoch.
    "lr_scheduler_type": "constant",
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
}
"""MLLMU-Bench, `baselines/` and its README; MMUnlearner's follow it with a learning rate of 1e-5."""

TINY_KEEP_BEST: dict[str, Any] = {
    "keep_best": True,
    "selectivity_steps": 0.04,
    "selectivity_images": 16,
    "retain_floor": 0.85,
    "retain_patience": 25,
}
"""For methods that maximise a loss without bound: on the tiny model, retention comes and goes as they go on. Of all
measurements the best that retains as much; never stopped, since a path that dips recovers."""
