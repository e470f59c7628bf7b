"""The whole experiment, top to bottom: build, pre-train, fine-tune, retrain, unlearn, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medforget_dataset import LEVELS, BuildOptions, build
from medforget_dataset.errors import UserError
from medforget_dataset.views import training_views

from .finetune import finetune, pretrain
from .methods import METHODS, get_method
from .presets import PRESETS
from .report import write_report
from .stages import Run, read_run, stage_seconds, write_text
from .unlearning import unlearn


logger = logging.getLogger(__name__)

EVALUATION_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run does.

    Args:
        data ([`~medforget_dataset.BuildOptions`]): The dataset.
        levels (`tuple[str, ...]`): Levels that are forgotten, each by every method.
        methods (`tuple[str, ...]`): Methods of `unlearn.methods`.
        preset (`str`): Recipe of the tiny model, and the presets of the methods that go with it.
        finetune (`dict`): Training arguments of fine-tuning and retraining that differ from the recipe.
        seed (`int`): Seed of training.
    """

    data: BuildOptions
    levels: tuple[str, ...]
    methods: tuple[str, ...]
    preset: str = "tiny-robust"
    finetune: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0


PLANS = {
    "demo": Plan(
        data=BuildOptions(institutions=4, patients=4),
        levels=("patient",),
        methods=("grad_diff", "kl_min", "npo", "manu"),
        finetune={"num_train_epochs": 60, "per_device_train_batch_size": 2},
    ),
}


def run(
    preset: str,
    *,
    name: str | None = None,
    runs: Path = Path("runs"),
    seed: int | None = None,
    levels: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    workers: int | None = None,
) -> Path:
    """Do an experiment, or what is left of it to do.

    Args:
        preset (`str`): A plan of `PLANS`.
        name (`str`, *optional*): Name of the run's folder, by default the preset's.
        runs (`Path`, *optional*, defaults to `runs`): Folder of all runs.
        seed (`int`, *optional*): Seed of the data and of training, by default the plan's.
        levels (`Sequence[str]`, *optional*): Levels to forget, by default the plan's.
        methods (`Sequence[str]`, *optional*): Methods to run, by default the plan's.
        workers (`int`, *optional*): Processes that render images.

    Returns:
        `Path`: The report.

    Raises:
        UserError: Unknown preset, level or method, or a folder that is not this version's run.
    """
    plan = _plan(preset, seed, levels, methods)
    settings = {"preset": preset, "plan": dataclasses.asdict(plan)}
    current = Run(runs / (name or preset), settings)
    with current.lock():
        _Experiment(plan, current, workers).go()
        return write_run_report(current.folder)


def _plan(preset: str, seed: int | None, levels: Sequence[str] | None, methods: Sequence[str] | None) -> Plan:
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
    return dataclasses.replace(plan, levels=tuple(levels or plan.levels), methods=tuple(methods or plan.methods))


class _Experiment:
    """The stages of a plan, in order."""

    def __init__(self, plan: Plan, current: Run, workers: int | None):
        self.plan, self.run, self.workers = plan, current, workers
        self.folder = current.folder
        self.data = self.folder / "medforget"
        self.views = self.folder / "views.parquet"

    def go(self) -> None:
        self.build()
        self.train("vanilla", "finetune")
        for level in self.plan.levels:
            self.train(f"retrained-{level}", f"{level}_retain")
            for method in self.plan.methods:
                self.unlearn(method, level)
        self.evaluate("vanilla", self.plan.levels)
        self.evaluate("vanilla", self.plan.levels, wrong_image=True)
        for level in self.plan.levels:
            for name in ("retrained", *self.plan.methods):
                self.evaluate(f"{name}-{level}", (level,))

    def build(self) -> None:
        options = dataclasses.asdict(self.plan.data)
        recipe = PRESETS[self.plan.preset]
        self.run.stage("build", self.data, lambda: build(self.data, workers=self.workers, **options), options=options)
        if recipe.turned_views:
            size = recipe.image_size
            self.run.stage(
                "views",
                self.views,
                lambda: training_views(self.data, size=size, file=self.views, workers=self.workers),
                after=("build",),
                size=size,
            )
        self.run.stage(
            "pretrain",
            self.folder / "pretrained",
            lambda: pretrain(self.data, self.folder / "pretrained", preset=self.plan.preset, seed=self.plan.seed),
            after=("build",),
            recipe=dataclasses.asdict(recipe),
            seed=self.plan.seed,
        )

    def train(self, name: str, config: str) -> None:
        out = self.folder / name
        self.run.stage(
            name,
            out,
            lambda: finetune(
                self.data,
                out,
                model=self.folder / "pretrained",
                config=config,
                preset=self.plan.preset,
                views=self.views,
                seed=self.plan.seed,
                **self.plan.finetune,
            ),
            after=("build", "pretrain"),
            config=config,
            arguments=self.plan.finetune,
        )

    def unlearn(self, method: str, level: str) -> None:
        out = self.folder / f"{method}-{level}"
        preset = self.plan.preset if self.plan.preset in METHODS[method].presets else None
        seed: dict[str, Any] = {"seed": self.plan.seed} if METHODS[method].uses_gradients else {}
        self.run.stage(
            out.name,
            out,
            lambda: unlearn(
                self.data,
                out,
                model=self.folder / "vanilla",
                method=method,
                level=level,
                preset=preset,
                views=self.views,
                **seed,
            ),
            after=("vanilla",),
            preset=METHODS[method].presets.get(preset or "", {}),
        )

    def evaluate(self, checkpoint: str, levels: Sequence[str], *, wrong_image: bool = False) -> None:
        name = f"{checkpoint}-wrong-image" if wrong_image else checkpoint
        splits = ("forget", "retain") if wrong_image else ("forget", "retain", "rephrase")
        tags = [f"medforget_{level}_{split}" for level in levels for split in splits]
        tags += [] if wrong_image else ["medforget_general_med"]
        out = self.folder / "evaluation" / f"{name}.json"

        def make() -> None:
            from harness_tasks.evaluate import evaluate_checkpoint

            scores = evaluate_checkpoint(
                self.folder / checkpoint, self.data, tags, batch_size=EVALUATION_BATCH, wrong_image=wrong_image
            )
            out.parent.mkdir(exist_ok=True)
            write_text(out, json.dumps(scores, indent=2) + "\n")

        self.run.stage(f"evaluate-{name}", out, make, after=("build", checkpoint), tags=tags)


def write_run_report(folder: Path) -> Path:
    """Write `report.md`, `report.json` and the plots of a run from its evaluations.

    Raises:
        UserError: The folder is not a run, or was written by another version.
    """
    return write_report(folder, read_run(folder), stage_seconds(folder))
