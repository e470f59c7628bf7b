"""The whole experiment, top to bottom: build, pre-train, fine-tune, retrain, unlearn, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness_tasks.evaluate import evaluate_checkpoint, tasks_digest
from medforget_dataset import LEVELS, BuildOptions, build
from medforget_dataset.atomic import write_text
from medforget_dataset.builder import VERSION
from medforget_dataset.errors import UserError
from medforget_dataset.processes import available_cores
from medforget_dataset.training_views import training_views

from .config import resolve
from .finetune import finetune
from .methods import METHODS, get_method
from .presets import TINY_PRESETS
from .pretrain import pretrain
from .report import write_report
from .stages import Run, Stage, read_run, stage_seconds
from .unlearning import unlearn


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
        # Measured: with fewer passes, or a last learning rate of a tenth, a few identities of a quarter's patients are
        # missed in one run and not in the next.
        finetune={
            "num_train_epochs": 85,
            "per_device_train_batch_size": 2,
            "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
        },
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
    jobs: int | None = None,
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
        jobs (`int`, *optional*): Stages at a time, by default one a CPU core, and one where there is a GPU.

    Returns:
        `Path`: The report.

    Raises:
        UserError: Unknown preset, level or method, or a folder that is not this version's run.
    """
    plan = _plan(preset, seed, levels, methods)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    settings = {"preset": preset, "plan": dataclasses.asdict(plan)}
    current = Run(runs / (name or preset), settings)
    with current.lock():
        current.execute(_Experiment(plan, current.folder, workers).stages(), _default_jobs() if jobs is None else jobs)
        return write_run_report(current.folder)


def _default_jobs() -> int:
    # A process takes about 1.5 GB, and more than eight stages are never ready at a time.
    return 1 if torch.cuda.is_available() else min(available_cores(), 8)


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
    # Each once, in the order given.
    return dataclasses.replace(
        plan,
        levels=tuple(dict.fromkeys(levels or plan.levels)),
        methods=tuple(dict.fromkeys(methods or plan.methods)),
    )


class _Experiment:
    """The stages of a plan, in order."""

    def __init__(self, plan: Plan, folder: Path, workers: int | None):
        self.plan, self.folder, self.workers = plan, folder, workers
        self.recipe = TINY_PRESETS[plan.preset]
        self.data = folder / "medforget"
        self.views = folder / "views.parquet"

    def stages(self) -> list[Stage]:
        plan = self.plan
        trained = [self.train("vanilla", "finetune")]
        trained += [self.train(f"retrained-{level}", f"{level}_retain") for level in plan.levels]
        unlearned = [self.unlearn(method, level) for level in plan.levels for method in plan.methods]
        evaluated = [self.evaluate("vanilla", plan.levels), self.evaluate("vanilla", plan.levels, wrong_image=True)]
        for level in plan.levels:
            evaluated += [self.evaluate(f"{name}-{level}", (level,)) for name in ("retrained", *plan.methods)]
        views = [self.turn()] if self.recipe.turned_views else []
        return [self.build(), *views, self.pretrain(), *trained, *unlearned, *evaluated]

    def build(self) -> Stage:
        options = dataclasses.asdict(self.plan.data)
        make = partial(build, self.data, workers=self.workers, **options)
        return Stage("build", self.data, make, inputs=options | {"version": VERSION})

    def turn(self) -> Stage:
        size = self.recipe.image_size
        make = partial(training_views, self.data, size=size, file=self.views, workers=self.workers)
        return Stage("views", self.views, make, after=("build",), inputs={"size": size})

    def pretrain(self) -> Stage:
        out, seed = self.folder / "pretrained", self.plan.seed
        make = partial(pretrain, self.data, out, preset=self.plan.preset, seed=seed)
        inputs = {"recipe": dataclasses.asdict(self.recipe), "seed": seed}
        return Stage("pretrain", out, make, after=("build",), inputs=inputs)

    def train(self, name: str, config: str) -> Stage:
        arguments = {"preset": self.plan.preset, "seed": self.plan.seed, **self.plan.finetune}
        make = partial(
            finetune,
            self.data,
            self.folder / name,
            model=self.folder / "pretrained",
            config=config,
            views=self.views,
            resume=True,
            overwrite=True,
            **arguments,
        )
        after = ("build", "pretrain", *(("views",) if self.recipe.turned_views else ()))
        return Stage(name, self.folder / name, make, after=after, inputs={"config": config, **arguments})

    def unlearn(self, method: str, level: str) -> Stage:
        out, presets = self.folder / f"{method}-{level}", METHODS[method].presets
        preset = self.plan.preset if self.plan.preset in presets else None
        seed: dict[str, Any] = {"seed": self.plan.seed} if METHODS[method].uses_gradients else {}
        make = partial(
            unlearn,
            self.data,
            out,
            model=self.folder / "vanilla",
            method=method,
            level=level,
            preset=preset,
            views=self.views,
            resume=True,
            overwrite=True,
            **seed,
        )
        instance, training = resolve(method, preset, **seed)
        return Stage(out.name, out, make, after=("vanilla",), inputs={"method": instance.arguments(), **training})

    def evaluate(self, checkpoint: str, levels: Sequence[str], *, wrong_image: bool = False) -> Stage:
        name = f"{checkpoint}-wrong-image" if wrong_image else checkpoint
        splits = ("forget", "retain") if wrong_image else ("forget", "retain", "rephrase")
        tags = [f"medforget_{level}_{split}" for level in levels for split in splits]
        tags += [] if wrong_image else ["medforget_general_med"]
        out = self.folder / "evaluation" / f"{name}.json"
        make = partial(_evaluate, self.folder / checkpoint, self.data, tags, out, wrong_image)
        return Stage(
            f"evaluate-{name}", out, make, after=("build", checkpoint), inputs={"tags": tags, "tasks": tasks_digest()}
        )


def _evaluate(checkpoint: Path, data: Path, tags: list[str], out: Path, wrong_image: bool) -> None:
    scores = evaluate_checkpoint(checkpoint, data, tags, batch_size=EVALUATION_BATCH, wrong_image=wrong_image)
    out.parent.mkdir(exist_ok=True)
    write_text(out, json.dumps(scores, indent=2) + "\n")


def write_run_report(folder: Path) -> Path:
    """Write `report.md`, `report.html`, `report.json`, `tables/` and `figures/` of a run from what its stages left.

    Raises:
        UserError: The folder is not a run, is a sweep, or was written by another version.
    """
    settings = read_run(folder)
    if "sweep" in settings:
        raise UserError(f"{folder}: is a sweep; its results are in {folder / 'results.md'}")
    return write_report(folder, settings, stage_seconds(folder))
