"""Run the cells of a sweep: each once for the same inputs, several at a time, none stopped by another's failure."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from medforget_dataset.atomic import sweep as sweep_up
from medforget_dataset.atomic import write_text
from medforget_dataset.errors import UserError
from medforget_dataset.loading import find_data
from medforget_dataset.processes import available_cores
from medforget_dataset.training_views import training_views

from .checkpoint_info import read_info
from .checkpoints import ADAPTER_CONFIG
from .methods import INITIAL
from .presets import TINY_PRESETS
from .stages import RUN_FILE, Run, Stage, read_run
from .sweep_grid import Cell, Grid
from .sweep_table import CELLS, RESULT, Outcome, read_outcome, selectivity, write_tables
from .training import fingerprint
from .training_folder import TrainingFolder
from .unlearning import forget_and_retain, unlearn
from .workers import Workers


logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"


class Sweep:
    """A grid and the folder of its results.

    Args:
        grid ([`~unlearn.sweep_grid.Grid`]): What is run.
        out (`Path`): Folder of the sweep.
        keep_checkpoints (`bool`, *optional*, defaults to `False`): Whether a cell's checkpoint outlives its scoring.

    Raises:
        UserError: The model, a reference or the data is not there, the data has no rows at a level, or the folder
            holds something else.
    """

    def __init__(self, grid: Grid, out: Path, *, keep_checkpoints: bool = False):
        self.grid, self.out, self.keep_checkpoints = grid, out, keep_checkpoints
        _check_folder(out)
        try:
            self.data = self._check_inputs()
        except UserError as error:
            raise UserError(f"{grid.file}: {error}") from None
        self.common = {
            "model": grid.model,
            "model files": fingerprint(grid.model),
            "data": grid.data,
            "data files": fingerprint(self.data),
            "max_pixels": grid.max_pixels,
            "model_preset": grid.model_preset,
        }
        self.inputs = {cell.name: self.common | _inputs(cell) for cell in grid.cells}

    def outcomes(self) -> list[Outcome]:
        """Every cell with what came of it so far."""
        return [read_outcome(cell, self.out, self.inputs[cell.name]) for cell in self.grid.cells]

    def is_done(self, outcome: Outcome) -> bool:
        """Whether a cell need not run again. One whose checkpoint is to be kept, and was not, must."""
        kept = (self.out / CELLS / outcome.cell.name / CHECKPOINT).is_dir()
        return outcome.status == "done" and (kept or not self.keep_checkpoints)

    def run(self, jobs: int | None = None) -> list[Outcome]:
        """Run the cells that are not done, those that failed before among them.

        Args:
            jobs (`int`, *optional*): Cells at a time, by default one a CPU core, and one where there is a GPU. With
                one they run in this process; with more each prints to `logs/CELL.log`.

        Returns:
            `list[Outcome]`: Every cell with what came of it.

        Raises:
            UserError: Another process is running this sweep.
        """
        settings = {"file": str(self.grid.file), "cells": [cell.name for cell in self.grid.cells], **self.common}
        current = Run(self.out, {"sweep": settings})
        jobs = jobs or (1 if torch.cuda.is_available() else min(available_cores(), 8))
        with current.lock():
            outcomes = self.outcomes()
            write_tables(self.out, self.grid, outcomes)
            todo = [outcome.cell for outcome in outcomes if not self.is_done(outcome)]
            self._render_views(todo)
            _execute([self._stage(cell) for cell in todo], self.out / "logs", jobs, self._finished(len(todo), jobs))
            return self.outcomes()

    def _check_inputs(self) -> Path | str:
        """Refuse what would end a cell after others have run for hours, and find the data."""
        data = find_data(self.grid.data)
        _check_checkpoint("model", self.grid.model)
        for cell in self.grid.cells:
            if _has_reference(cell):
                _check_checkpoint(f"{cell.method}: reference", cell.settings["reference"])
            if cell.recipe:
                TINY_PRESETS[str(cell.preset)].check_folder(data)
        for level in self.grid.levels:
            forget_and_retain(data, level)
        return data

    def _stage(self, cell: Cell) -> Stage:
        folder = self.out / CELLS / cell.name
        make = partial(_run_cell, folder, cell, self.grid, self.inputs[cell.name], self.keep_checkpoints)
        return Stage(cell.name, folder / RESULT, make)

    def _render_views(self, cells: Sequence[Cell]) -> None:
        """Once, before cells that run side by side would each do it."""
        for preset in {cell.preset for cell in cells if cell.recipe and cell.recipe["turned_views"]}:
            training_views(Path(self.data), size=TINY_PRESETS[str(preset)].image_size)

    def _finished(self, total: int, jobs: int) -> Callable[[Stage, float], None]:
        """What is done after each cell: the tables are written again, and a line says how far the sweep has come."""
        start, ended = time.monotonic(), 0

        def finished(stage: Stage, seconds: float) -> None:
            nonlocal ended
            ended += 1
            outcomes = self.outcomes()
            write_tables(self.out, self.grid, outcomes)
            outcome = next(outcome for outcome in outcomes if outcome.cell.name == stage.name)
            left = timedelta(seconds=round((time.monotonic() - start) / ended * (total - ended)))
            result = outcome.result.get("reason") if outcome.status == "failed" else f"{seconds:.0f} s"
            logger.info("%s %s: %s (%d of %d, %s left)", stage.name, outcome.status, result, ended, total, left)

        return finished


def _execute(stages: Sequence[Stage], logs: Path, jobs: int, finished: Callable[[Stage, float], None]) -> None:
    if jobs > 1 and stages:
        with Workers(logs, min(jobs, len(stages))) as workers:
            workers.run(stages, finished)
        return
    for stage in stages:
        logger.info("%s ...", stage.name)
        start = time.monotonic()
        stage.make()
        finished(stage, time.monotonic() - start)


def _run_cell(folder: Path, cell: Cell, grid: Grid, inputs: dict[str, Any], keep_checkpoint: bool) -> None:
    """Unlearn, score, and write `result.json`, which says what came of it, also where that is an error."""
    checkpoint = folder / CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    sweep_up(folder)
    # A result that is there is of other inputs, or of a failure.
    (folder / RESULT).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
    start = time.monotonic()
    try:
        result = _unlearn(checkpoint, cell, grid, keep_checkpoint)
    except (ValueError, RuntimeError, MemoryError) as error:
        # What the settings of one cell can bring about. Anything else, such as a full disk, would meet the next too.
        known = isinstance(error, UserError | torch.OutOfMemoryError | MemoryError)
        logger.warning("%s: %s", cell.name, error, exc_info=None if known else error)
        result = {"status": "failed", "reason": _reason(error)}
        TrainingFolder(checkpoint).remove()
    # A trainer refers to itself: without this, its model would still be there beside the next cell's.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    described = {
        "cell": cell.name,
        "method": cell.method,
        "level": cell.level,
        "seed": cell.seed,
        "preset": cell.preset,
        "arguments": cell.arguments,
    }
    result = described | result | {"seconds": round(time.monotonic() - start, 1), "inputs": inputs}
    if not keep_checkpoint:
        shutil.rmtree(checkpoint, ignore_errors=True)
    write_text(folder / RESULT, json.dumps(result, indent=2, default=str) + "\n")


def _unlearn(checkpoint: Path, cell: Cell, grid: Grid, keep_checkpoint: bool) -> dict[str, Any]:
    seed: dict[str, Any] = {} if cell.seed is None else {"seed": cell.seed}
    scores = unlearn(
        grid.data,
        checkpoint,
        model=grid.model,
        method=cell.method,
        level=cell.level,
        preset=cell.preset,
        model_preset=grid.model_preset,
        max_pixels=grid.max_pixels,
        # What is thrown away need not be a whole model.
        save_adapter=not keep_checkpoint and bool(cell.settings.get("use_peft")),
        resume=True,
        overwrite=True,
        **cell.arguments,
        **seed,
    )
    info = read_info(checkpoint)
    training = {name: info[name] for name in ("steps", "kept_step", "stopped") if info.get(name) is not None}
    # Where a run ended before its time it is still scored.
    reason = {"reason": info["stopped"]} if info.get("stopped") else {}
    return {"status": "done", **scores, "selectivity": selectivity(scores), **training, **reason}


def _reason(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _inputs(cell: Cell) -> dict[str, Any]:
    """All that a cell's result depends on, beside model and data."""
    inputs = {"settings": cell.settings, "preset": cell.preset, "recipe": cell.recipe, "level": cell.level}
    return inputs | ({"reference files": fingerprint(cell.settings["reference"])} if _has_reference(cell) else {})


def _has_reference(cell: Cell) -> bool:
    """Whether a cell compares with another checkpoint than the one it unlearns."""
    return cell.settings.get("reference", INITIAL) != INITIAL


def _check_folder(out: Path) -> None:
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty and not ((out / RUN_FILE).is_file() and "sweep" in read_run(out)):
        raise UserError(f"--out {out}: holds something else than a sweep; choose another folder")


def _check_checkpoint(where: str, path: str) -> None:
    """Refuse what is no checkpoint, as far as can be known without loading it."""
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise UserError(f"{where}: {path} is not a checkpoint folder (no config.json)")
        return
    if folder.parent.is_dir() or path.count("/") != 1:
        raise UserError(f"{where}: no checkpoint folder {path}; fine-tune one with `medforget finetune --out {path}`")
    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {path} is no folder here, nor a model on the Hub that can be read") from error
