"""The whole experiment, top to bottom: build, pre-train, fine-tune, retrain, unlearn, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness_tasks.evaluate import evaluate_checkpoint, tasks_digest
from medforget_dataset import BuildOptions, build
from medforget_dataset.atomic import write_text
from medforget_dataset.builder import VERSION
from medforget_dataset.errors import UserError
from medforget_dataset.processes import available_cores
from medforget_dataset.training_views import training_views

from .checkpoint_info import read_info
from .config import resolve
from .finetune import finetune
from .measures.probe import probe_checkpoint
from .measures.relearning import EXAMPLES, relearn
from .methods import METHODS
from .plans import Plan, make_plan
from .presets import TINY_PRESETS
from .pretrain import pretrain
from .report import write_report
from .report.evaluations import ASKED
from .report.probes import ALL_TAUGHT
from .report.run_folder import FLAT
from .stages import Run, Stage, read_run, stage_failures, stage_seconds
from .unlearning import unlearn


EVALUATION_BATCH = 64
# Share of the cloze rows that vanilla answered at which the forgotten set counts as back.
BACK = 0.9

# Seconds an image on one core of the machine of the documentation's figures, to say how long a run will take.
BUILD, TURN, TRAIN, UNLEARN, EVALUATE, PROBE, RELEARN = 0.75, 0.45, 0.075, 0.085, 0.2, 0.15, 0.25
PRETRAIN = 50.0


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
) -> tuple[Path, dict[str, str]]:
    """Do an experiment, or what is left of it to do.

    Args:
        preset (`str`): A plan of `unlearn.plans`.
        name (`str`, *optional*): Name of the run's folder, by default the preset's.
        runs (`Path`, *optional*, defaults to `runs`): Folder of all runs.
        seed (`int`, *optional*): Seed of the data and of training, by default the plan's.
        levels (`Sequence[str]`, *optional*): Levels to forget, by default the plan's.
        methods (`Sequence[str]`, *optional*): Methods to run, by default the plan's.
        workers (`int`, *optional*): Processes that render images.
        jobs (`int`, *optional*): Stages at a time, by default one a CPU core, and one where there is a GPU.

    Returns:
        `tuple[Path, dict[str, str]]`: The report, and what could not be done and is missing in it, with the reason.

    Raises:
        UserError: Unknown preset, level or method, or a folder that is not this version's run.
    """
    plan = make_plan(preset, seed=seed, levels=levels, methods=methods)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    settings = {"preset": preset, "plan": dataclasses.asdict(plan)}
    current = Run(runs / (name or preset), settings)
    with current.lock():
        stages = _Experiment(plan, current.folder, workers).stages()
        failures = current.execute(stages, _default_jobs() if jobs is None else jobs)
        return write_run_report(current.folder), failures


def _default_jobs() -> int:
    # A process takes about 1.5 GB, and more than eight stages are never ready at a time.
    return 1 if torch.cuda.is_available() else min(available_cores(), 8)


class _Experiment:
    """The stages of a plan, in order."""

    def __init__(self, plan: Plan, folder: Path, workers: int | None):
        self.plan, self.folder, self.workers = plan, folder, workers
        self.recipe = TINY_PRESETS[plan.preset]
        self.data = folder / "medforget"
        self.views = folder / "views.parquet"

    def stages(self) -> list[Stage]:
        plan = self.plan
        views = [self.turn()] if self.recipe.turned_views else []
        trained = [self.train("vanilla", "finetune")]
        trained += [self.train(f"retrained-{level}", f"{level}_retain") for level in plan.levels]
        unlearned = [self.unlearn(method, level) for level in plan.levels for method in plan.methods]
        unlearned += [self.unlearn(method, level, FLAT) for level in plan.flat_levels for method in plan.methods]
        return [*self.build_all(), *views, self.pretrain(), *trained, *unlearned, *self.measured()]

    def measured(self) -> list[Stage]:
        """What is asked of every model."""
        plan = self.plan
        stages = [self.evaluate("vanilla", plan.levels), self.probe("vanilla")]
        stages.append(self.evaluate("vanilla", plan.levels, ("forget", "retain"), wrong_image=True))
        for level in plan.levels:
            for model in (f"{name}-{level}" for name in ("retrained", *plan.methods)):
                stages += [self.evaluate(model, (level,)), self.probe(model)]
                if level in plan.relearned_levels:
                    stages += [self.relearn(model, level), self.relearn(model, level, ALL_TAUGHT)]
            if level in plan.flat_levels:
                stages += [self.evaluate(f"{method}-{level}{FLAT}", (level,), ("forget",)) for method in plan.methods]
        return stages

    def build_all(self) -> list[Stage]:
        """The dataset; the same studies with as many rows forgotten at random; and patients that no model sees."""
        plan = self.plan
        stages = [self.build("build", self.data, plan.data)]
        if plan.flat_levels:
            flat = dataclasses.replace(plan.data, selection="flat")
            stages.append(self.build(f"build{FLAT}", self.folder / f"medforget{FLAT}", flat))
        if plan.unseen:
            stages.append(self.build("build-unseen", self.folder / "medforget-unseen", plan.unseen))
        return stages

    def build(self, name: str, out: Path, options: BuildOptions) -> Stage:
        inputs = dataclasses.asdict(options)
        make = partial(build, out, workers=self.workers, **inputs)
        return Stage(name, out, make, inputs=inputs | {"version": VERSION}, kind="build", seconds=self.cost(BUILD))

    def turn(self) -> Stage:
        size = self.recipe.image_size
        make = partial(training_views, self.data, size=size, file=self.views, workers=self.workers)
        return Stage(
            "views", self.views, make, after=("build",), inputs={"size": size}, kind="build", seconds=self.cost(TURN)
        )

    def pretrain(self) -> Stage:
        out, seed = self.folder / "pretrained", self.plan.seed
        make = partial(pretrain, self.data, out, preset=self.plan.preset, seed=seed)
        inputs = {"recipe": dataclasses.asdict(self.recipe), "seed": seed}
        return Stage("pretrain", out, make, after=("build",), inputs=inputs, kind="train", seconds=PRETRAIN)

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
        passes = arguments.get("num_train_epochs", self.recipe.epochs)
        return Stage(
            name,
            self.folder / name,
            make,
            after=after,
            inputs={"config": config, **arguments},
            kind="train",
            seconds=self.cost(TRAIN * passes),
        )

    def unlearn(self, method: str, level: str, flat: str = "") -> Stage:
        out, presets = self.folder / f"{method}-{level}{flat}", METHODS[method].presets
        preset = self.plan.preset if self.plan.preset in presets else None
        arguments: dict[str, Any] = {"seed": self.plan.seed} if METHODS[method].uses_gradients else {}
        arguments |= self.plan.unlearn.get(method, {})
        if flat and METHODS[method].uses_gradients:
            # Nearly every image has rows to forget, beside rows to retain: two of them a step would take three times
            # as many steps.
            arguments |= {"forget_per_step": 5, "retain_per_step": 1}
        make = partial(
            unlearn,
            self.folder / f"medforget{flat}",
            out,
            model=self.folder / "vanilla",
            method=method,
            level=level,
            preset=preset,
            views=self.views,
            resume=True,
            overwrite=True,
            **arguments,
        )
        instance, training = resolve(method, preset, **arguments)
        return Stage(
            out.name,
            out,
            make,
            after=("vanilla", *((f"build{flat}",) if flat else ())),
            inputs={"method": instance.arguments(), **training},
            kind="unlearn",
            seconds=self.cost(UNLEARN * training.get("num_train_epochs", 1)),
            optional=True,
        )

    def evaluate(
        self, checkpoint: str, levels: Sequence[str], splits: Sequence[str] = (), *, wrong_image: bool = False
    ) -> Stage:
        """Ask a model the rows of these splits, by default of all and of `general_med`."""
        name = f"{checkpoint}-wrong-image" if wrong_image else checkpoint
        asked = splits or ("forget", "retain", "rephrase", "attack")
        tags = [f"medforget_{level}_{split}" for level in levels for split in asked]
        tags += [] if splits else ["medforget_general_med"]
        out = self.folder / "evaluation" / f"{name}.json"
        make = partial(_evaluate, self.folder / checkpoint, self.data, tags, out, wrong_image)
        return Stage(
            f"evaluate-{name}",
            out,
            make,
            after=("build", checkpoint),
            inputs={"tags": tags, "tasks": tasks_digest()},
            kind="evaluate",
            seconds=self.cost(EVALUATE),
            optional=True,
        )

    def probe(self, checkpoint: str) -> Stage:
        out = self.folder / "probes" / f"{checkpoint}.parquet"
        unseen = self.folder / "medforget-unseen" if self.plan.unseen else None
        make = partial(probe_checkpoint, self.folder / checkpoint, self.data, out, unseen=unseen)
        after = ("build", checkpoint, *(("build-unseen",) if unseen else ()))
        return Stage(
            f"probe-{checkpoint}", out, make, after=after, kind="probe", seconds=self.cost(PROBE), optional=True
        )

    def relearn(self, checkpoint: str, level: str, taught: str = "") -> Stage:
        """Teach a model the forgotten rows of a few images, or of all, until what vanilla knew is back."""
        out = self.folder / "relearning" / f"{checkpoint}{taught}.json"
        # A third of the rate at which the recipe teaches, so that the curve has points before everything is back.
        arguments = {"learning_rate": self.recipe.learning_rate / 3, "examples": 1.0 if taught else EXAMPLES}
        vanilla = self.folder / "evaluation" / "vanilla.json"
        make = partial(_relearn, vanilla, self.data, self.folder / checkpoint, level, out, **arguments)
        return Stage(
            f"relearn-{checkpoint}{taught}",
            out,
            make,
            after=("build", checkpoint, "evaluate-vanilla"),
            inputs={"level": level, **arguments},
            kind="relearn",
            seconds=self.cost(RELEARN),
            optional=True,
        )

    def cost(self, seconds: float) -> float:
        """Seconds that something takes which takes so long for one image."""
        return seconds * self.plan.images


def _evaluate(checkpoint: Path, data: Path, tags: list[str], out: Path, wrong_image: bool) -> None:
    answers = out.with_suffix("")
    shutil.rmtree(answers, ignore_errors=True)
    scores = evaluate_checkpoint(
        checkpoint, data, tags, batch_size=EVALUATION_BATCH, output_path=answers, wrong_image=wrong_image
    )
    write_text(answers / ASKED, json.dumps({"checkpoint_run": read_info(checkpoint).get("run")}) + "\n")
    write_text(out, json.dumps(scores, indent=2) + "\n")


def _relearn(vanilla: Path, data: Path, checkpoint: Path, level: str, out: Path, **arguments: Any) -> None:
    scores = json.loads(vanilla.read_text(encoding="utf-8"))
    knew = scores[f"medforget_{level}_forget_cloze"]["metrics"]["exact_match"]
    if not knew:
        raise UserError(f"{vanilla}: answers no cloze row that the {level} level forgets, so that none can come back")
    relearn(data, checkpoint, level, out, recovered_at=BACK * knew, **arguments)


def write_run_report(folder: Path) -> Path:
    """Write `report.md`, `report.html`, `report.json`, `tables/` and `figures/` of a run from what its stages left.

    Raises:
        UserError: The folder is not a run, is a sweep, or was written by another version.
    """
    settings = read_run(folder)
    if "sweep" in settings:
        raise UserError(f"{folder}: is a sweep; its results are in {folder / 'results.md'}")
    return write_report(folder, settings, stage_seconds(folder), stage_failures(folder))
