"""What `medforget run` can do: the data, levels and methods of a run, and what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from medforget_dataset import LEVELS, BuildOptions
from medforget_dataset.errors import UserError

from .methods import get_method


ALL_METHODS = ("grad_diff", "kl_min", "npo", "manu")
"""The paper's four, in the order of its Table 3."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run does.

    Args:
        data ([`~medforget_dataset.BuildOptions`]): The dataset.
        levels (`tuple[str, ...]`): Levels that are forgotten, each by every method.
        methods (`tuple[str, ...]`): Methods of `unlearn.methods`.
        preset (`str`, *optional*, defaults to `"tiny-robust"`): Recipe of the tiny model, and the presets of the
            methods that go with it.
        finetune (`dict`, *optional*): Training arguments of fine-tuning and retraining that differ from the recipe.
        unlearn (`dict[str, dict]`, *optional*): Arguments by method that differ from its preset.
        seed (`int`, *optional*, defaults to `0`): Seed of training.
        unseen ([`~medforget_dataset.BuildOptions`], *optional*): Patients that no model saw.
        flat_levels (`tuple[str, ...]`, *optional*): Levels at which every method also forgets as many rows drawn at
            random, the paper's comparison without a hierarchy (Figure 7).
        relearned_levels (`tuple[str, ...]`, *optional*): Levels at which every model is taught a few forgotten rows.
    """

    data: BuildOptions
    levels: tuple[str, ...]
    methods: tuple[str, ...]
    preset: str = "tiny-robust"
    finetune: dict[str, Any] = dataclasses.field(default_factory=dict)
    unlearn: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seed: int = 0
    unseen: BuildOptions | None = None
    flat_levels: tuple[str, ...] = ()
    relearned_levels: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Studies of the dataset, each with one image."""
        return self.data.institutions * self.data.patients * self.data.studies


# Far from any seed that a user counts up from 0.
_UNSEEN_SEED = 1000

PLANS = {
    "demo": Plan(
        data=BuildOptions(institutions=4, patients=4),
        levels=("patient",),
        methods=ALL_METHODS,
        # Measured: with fewer passes, or a last learning rate of a tenth, a few identities of a quarter's patients are
        # missed in one run and not in the next.
        finetune={
            "num_train_epochs": 85,
            "per_device_train_batch_size": 2,
            "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
        },
    ),
    "reproduce": Plan(
        data=BuildOptions(),
        levels=LEVELS,
        methods=ALL_METHODS,
        finetune={"num_train_epochs": 80, "lr_scheduler_kwargs": {"min_lr_rate": 0.02}},
        # Four times the images: about as many steps as the presets, which were tuned on the demo, so that the run ends
        # within two hours; each image to retain is seen less often, so that NPO has to be gentler.
        unlearn={
            "grad_diff": {"num_train_epochs": 8, "learning_rate": 1e-3, "forget_weight": 0.3, "retain_floor": 0.8},
            "kl_min": {"num_train_epochs": 9, "forget_weight": 0.5, "retain_floor": 0.8},
            "npo": {"num_train_epochs": 6, "learning_rate": 5e-4, "beta": 2.0},
        },
        unseen=BuildOptions(institutions=4, patients=4, seed=_UNSEEN_SEED),
        flat_levels=("patient",),
        relearned_levels=("patient",),
    ),
}


def make_plan(
    preset: str, *, seed: int | None = None, levels: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> Plan:
    """A plan of `PLANS`, changed as asked.

    >>> make_plan("demo", levels=["study"]).levels
    ('study',)

    Raises:
        UserError: Unknown preset, level or method.
    """
    if preset not in PLANS:
        raise UserError(f"--preset {preset}: unknown preset; choose from {', '.join(PLANS)}")
    plan = PLANS[preset]
    for level in levels or ():
        if level not in LEVELS:
            raise UserError(f"--levels {level}: unknown level; choose from {', '.join(LEVELS)}")
    for method in methods or ():
        get_method(method)
    if seed is not None:
        plan = dataclasses.replace(plan, seed=seed, data=dataclasses.replace(plan.data, seed=seed))
        if plan.unseen:
            plan = dataclasses.replace(plan, unseen=dataclasses.replace(plan.unseen, seed=seed + _UNSEEN_SEED))
    # Each once, in the order given.
    levels = tuple(dict.fromkeys(levels or plan.levels))
    methods = tuple(dict.fromkeys(methods or plan.methods))
    return dataclasses.replace(
        plan,
        levels=levels,
        methods=methods,
        flat_levels=tuple(level for level in plan.flat_levels if level in levels),
        relearned_levels=tuple(level for level in plan.relearned_levels if level in levels),
    )
