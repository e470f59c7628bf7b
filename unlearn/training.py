"""Run a trainer to its end, or from where it was stopped, and get the model out of it, on one process or on many."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medforget_dataset.errors import UserError

from .callbacks import Selectivity, measurements
from .checkpoint_info import read_info
from .checkpoints import check_output, load_trained
from .config import FineTuneConfig, UnlearnConfig
from .memory import is_out_of_memory
from .processes import is_main_process, processes
from .trainer import FineTuneTrainer, TrainingDiverged, UnlearnTrainer
from .training_folder import TrainingFolder


logger = logging.getLogger(__name__)

RESUMABLE = {"save_strategy": "steps", "save_steps": 0.1}
"""How often a run writes a checkpoint to go on from: ten times."""


_NO_MATTER = frozenset(
    (
        "seed",
        "save_strategy",
        "save_steps",
        "logging_steps",
        "logging_first_step",
        "report_to",
        "run_name",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_token",
        # What is tried when the memory does not suffice; `images_per_step` has what of it matters.
        "activation_checkpointing",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "forget_per_step",
        "retain_per_step",
    )
)


@dataclass(frozen=True)
class Trained:
    """
    What a run came to.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, whole, in evaluation mode.
        log (`list[dict[str, float]]`):
            What was logged, step by step.
        steps (`int`, *optional*, defaults to `0`):
            Optimisation steps done.
        kept_step (`int`, *optional*):
            Step whose weights these are, where not the last one's.
        stopped (`str`, *optional*):
            Why training ended before its time.
    """

    model: PreTrainedModel | PeftModel
    log: list[dict[str, float]]
    steps: int = 0
    kept_step: int | None = None
    stopped: str | None = None


class Output:
    """
    The checkpoint folder that a run writes, and what is already there of it.

    Args:
        out (`str` or `os.PathLike`):
            Folder of the checkpoint.
        plan (`dict[str, Any]`):
            What the run does: everything that its weights depend on, anything JSON can hold.
        resume (`bool`):
            Go on with the same run where it was stopped.
        overwrite (`bool`):
            Replace another run's checkpoint, or start an unfinished run again.

    Raises:
        UserError: If the folder holds something else than a MedForget checkpoint, or, unless it is to be overwritten,
            another run's.
    """

    def __init__(self, out: str | os.PathLike, plan: dict[str, Any], *, resume: bool, overwrite: bool):
        self.path = check_output(out)
        self.plan = plan
        self.resume, self.overwrite = resume, overwrite
        self.digest = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
        self.training = TrainingFolder(self.path)
        before = read_info(self.path)
        if before and not overwrite and before.get("run") != self.digest:
            raise UserError(
                f"{self.path}: holds the checkpoint of another run ({before.get('stage', 'unknown')}); choose another "
                "--out, or add --overwrite"
            )
        self.is_done = resume and not overwrite and before.get("run") == self.digest
        if self.is_done and is_main_process():
            self.training.remove()  # which a run that was killed at its very end leaves

    @contextmanager
    def in_progress(self) -> Iterator[TrainingFolder]:
        """
        The folder of the run in progress, made or taken up by the main process. Of a run that fails before its first
        checkpoint nothing stays; the error of one that fails later says how to go on.
        """
        state = processes()
        if state.is_main_process:
            self.training.open(self.plan, resume=self.resume, overwrite=self.overwrite)
        state.wait_for_everyone()
        try:
            yield self.training
        except BaseException as error:
            if (last := self.training.last_checkpoint()) is None:
                if state.is_main_process:
                    self.training.remove()
                raise
            kept = f"{self.training.path} holds the run up to step {last.name.rpartition('-')[2]}: "
            kept += "add --overwrite to start again"
            if not isinstance(error, TrainingDiverged):  # which it would do again
                kept += ", or --resume to go on from there"
            if isinstance(error, UserError):
                error.args = (f"{error}; {kept}",)
            elif isinstance(error, OSError):
                raise OSError(f"{error}; {kept}") from None
            else:
                logger.warning(kept)
            raise

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Whether this process is the one to write the checkpoint; after it, the run is no longer in progress."""
        state = processes()
        yield state.is_main_process
        state.wait_for_everyone()
        if state.is_main_process:
            self.training.remove()


def what_matters(arguments: dict[str, Any]) -> dict[str, Any]:
    """Training arguments without those that weights do not depend on."""
    return {name: value for name, value in arguments.items() if name not in _NO_MATTER}


def fingerprint(path: str | os.PathLike) -> str:
    """What tells a dataset folder or checkpoint from another at the same place, without reading gigabytes."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def run_trainer(trainer: FineTuneTrainer, folder: TrainingFolder) -> Trained:
    """
    Train, from the last checkpoint in the folder if there is one.

    Args:
        trainer ([`~unlearn.trainer.FineTuneTrainer`]):
            Trainer whose `output_dir` is the folder.
        folder ([`~unlearn.training_folder.TrainingFolder`]):
            Folder of the run.

    Raises:
        UserError: If the memory does not suffice.
        TrainingDiverged: If training went wrong, and no earlier weights are kept.
        OSError: If a checkpoint cannot be written.
    """
    args, stopped = trainer.args, None
    selects = isinstance(args, UnlearnConfig) and (args.keep_best or args.retain_floor is not None)
    if selects:
        trainer.add_callback(Selectivity(cast(UnlearnTrainer, trainer), folder.path))
    checkpoint = folder.last_checkpoint()
    try:
        with telling_out_of_memory(args):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (SafetensorError, RuntimeError) as error:
        if not _is_failed_write(error):
            raise
        raise OSError(f"{folder.path}: cannot write a checkpoint ({str(error).partition(chr(10))[0]})") from None
    except TrainingDiverged as error:
        if not selects or not Selectivity.best(args, trainer.state):
            raise
        stopped = str(error)
    best = Selectivity.best(args, trainer.state) if isinstance(args, UnlearnConfig) and args.keep_best else None
    if stopped is None and trainer.state.global_step < trainer.state.max_steps:
        last = measurements(trainer.state)[-1]
        stopped = f"step {trainer.state.global_step}: retain rows answered exactly {last['retain_exact']:.2f}"
    steps = trainer.state.global_step
    log = [line for line in trainer.state.log_history if "loss" in line or "selectivity" in line]
    if best is None:
        return Trained(_whole_model(trainer, folder), log, steps, stopped=stopped)
    kept_step = int(best["step"])
    kept = _reload(trainer, Selectivity.folder_of(folder.path, kept_step))
    return Trained(kept, log, steps, kept_step, stopped)


def _whole_model(trainer: FineTuneTrainer, folder: TrainingFolder) -> PreTrainedModel | PeftModel:
    if not trainer.is_sharded:
        return trainer.accelerator.unwrap_model(trainer.model).eval()
    final = folder.path / "final"
    trainer.save_model(str(final), _internal_call=True)
    return _reload(trainer, final)


def _reload(trainer: FineTuneTrainer, weights: Path) -> PreTrainedModel | PeftModel:
    """The model with the weights that the trainer wrote, in the place of the one that it trained."""
    trainer.accelerator.wait_for_everyone()
    trainer.free_memory()
    # While it is set, models are loaded in parts that only DeepSpeed can put together.
    unset_hf_deepspeed_config()
    model: Any = load_trained(weights, **trainer.args.load_arguments())
    return model.to(trainer.accelerator.device).eval()


def _is_failed_write(error: BaseException) -> bool:
    return isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error)


@contextmanager
def telling_out_of_memory(args: FineTuneConfig | None = None) -> Iterator[None]:
    """
    Inside the context, to run out of memory is an error that says what to lower.

    Args:
        args ([`~unlearn.config.FineTuneConfig`], *optional*):
            Training arguments, where there is training.

    Raises:
        UserError: If the memory does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = _out_of_memory(args) if args else "out of memory; use smaller images (--max-pixels)"
        raise UserError(what) from error


def _out_of_memory(args: FineTuneConfig) -> str:
    lower = "--images-per-step"
    if isinstance(args, UnlearnConfig):
        lower = "--forget-per-step and --retain-per-step"
    remedies = [f"lower {lower} ({args.per_device_train_batch_size} images a batch) and raise --accumulation"]
    if not args.activation_checkpointing:
        remedies.append("--set activation_checkpointing=true")
    if not args.use_peft:
        remedies.append("--lora")
    return f"out of memory; {', or '.join([*remedies, 'use smaller images (--max-pixels)'])}"
