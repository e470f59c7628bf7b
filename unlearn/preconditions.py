"""What would end a run late and can be known early: before a model is loaded, a folder made, an hour spent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForImageTextToText, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from medforget_dataset import load
from medforget_dataset.errors import UserError
from medforget_dataset.writer import parquet_path

from .checkpoints import check_checkpoint, read_config
from .config import FineTuneConfig, UnlearnConfig
from .grouping import patient_key
from .lora import make_lora_config


_PACKING = "our collators pack; --no-packing turns it off"
_BATCHES = "every step has all the images that it is to have"
_TEXT = "prompts come from the dataset and the processor"
_ONLY_ANSWERS = "the loss is the method's, on answers"
_ACCELERATE = "give --accelerate-config"
_ORDER = "the order of images follows from --seed"
_MEASURED = "--keep-best and --retain-floor measure while unlearning"
_READ = "rows are gathered by image and made into tokens as they are drawn"
_FINISHED = "push_to_hub sends the finished checkpoint, to the main branch"

OWNED = {
    "output_dir": "give --out",
    "disable_tqdm": "give quiet",
    "remove_unused_columns": "the collator reads columns that the model does not take",
    "logging_nan_inf_filter": "a loss that is not a number stops the run",
    "gradient_checkpointing": "set activation_checkpointing",
    "packing": _PACKING,
    "padding_free": _PACKING,
    "auto_find_batch_size": _BATCHES,
    "dataloader_drop_last": _BATCHES,
    "dataloader_num_workers": "images are kept ready by the one process that trains",
    "load_best_model_at_end": "give --keep-best",
    "eval_strategy": _MEASURED,
    "eval_steps": _MEASURED,
    "eval_packing": _MEASURED,
    "do_eval": _MEASURED,
    "per_device_eval_batch_size": _MEASURED,
    "metric_for_best_model": "give --keep-best",
    "data_seed": _ORDER,
    "train_sampling_strategy": _ORDER,
    "dataset_kwargs": _READ,
    "dataset_num_proc": _READ,
    "pad_to_multiple_of": _READ,
    "truncation_mode": "sequences are never cut",
    "packing_strategy": _PACKING,
    "save_total_limit": "the last checkpoint is kept until the run has ended",
    "dataloader_prefetch_factor": "images are kept ready by the one process that trains",
    "dataloader_persistent_workers": "images are kept ready by the one process that trains",
    "trust_remote_code": "models are of classes that transformers has",
    "resume_from_checkpoint": "give --resume",
    "ignore_data_skip": "a run that goes on sees what it would have seen",
    "save_only_model": "a run could not go on from such a checkpoint",
    "dataset_text_field": _TEXT,
    "chat_template_path": _TEXT,
    "eos_token": _TEXT,
    "pad_token": _TEXT,
    "loss_type": _ONLY_ANSWERS,
    "completion_only_loss": _ONLY_ANSWERS,
    "assistant_only_loss": _ONLY_ANSWERS,
    "label_smoothing_factor": _ONLY_ANSWERS,
    "use_liger_kernel": "it has losses of its own",
    "model_init_kwargs": "give --dtype, or set attn_implementation",
    "deepspeed": _ACCELERATE,
    "fsdp": _ACCELERATE,
    "fsdp_config": _ACCELERATE,
    "ddp_backend": _ACCELERATE,
    "hub_strategy": _FINISHED,
    "hub_always_push": _FINISHED,
    "hub_revision": _FINISHED,
    "hub_token": "it would be written beside the weights; log in with `hf auth login`",
    "accelerator_config": _ACCELERATE,
}
"""Fields of the training arguments that are not a user's to choose, and what is."""

OWNED_BY_UNLEARNING = {
    "method": "give --method",
    "method_args": "give the method's own flags",
    "level": "give --level",
    "per_device_train_batch_size": "give --forget-per-step and --retain-per-step",
}
"""The same of unlearning."""


_WHOLE = (
    "seed",
    "max_steps",
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "forget_per_step",
    "retain_per_step",
    "selectivity_images",
    "lora_r",
)


def check_chosen(chosen: Iterable[str], owned: dict[str, str]) -> None:
    """
    Refuse training arguments that the trainer would not obey, or that would break it.

    Args:
        chosen (`Iterable[str]`): Names of the arguments that the user gives.
        owned (`dict[str, str]`): Names that may not be among them, and what to do instead.

    Raises:
        UserError: One of them is.
    """
    for name in chosen:
        if name in owned:
            raise UserError(f"{name} is not to be set: {owned[name]}")


def check_arguments(args: FineTuneConfig) -> None:
    """
    Refuse training arguments that would fail only once the model is loaded.

    Args:
        args ([`~unlearn.config.FineTuneConfig`]): Training arguments.

    Raises:
        UserError: The optimizer or the service for metrics is not installed or does not exist, the schedule does not
            take its arguments, a count is not whole, or the attention would ignore the mask of packed sequences.
    """
    for name in _WHOLE:
        if not isinstance(value := getattr(args, name, None), int | None):
            raise UserError(f"{name} is {value!r}; it must be a whole number")
    for name in ("save_steps", "selectivity_steps"):
        if not getattr(args, name, 1) > 0:
            raise UserError(f"{name} is {getattr(args, name)}; it must be more than 0")
    if args.cache_vision and not (args.use_peft or args.freeze_vision):
        raise UserError("cache_vision: the vision tower is trained; add --lora, or freeze it with --freeze-vision")
    if args.pack_images and args.attn_implementation not in ("auto", "sdpa", "eager"):
        raise UserError(
            f"attn_implementation is {args.attn_implementation!r}, which takes no mask of packed sequences; choose "
            "auto, sdpa or eager"
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        given = args.lr_scheduler_kwargs
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, given if isinstance(given, dict) else None)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"training arguments: {str(error).strip().partition(chr(10))[0]}") from error


def check_adapter(save_adapter: bool, chosen: Collection[str], training: dict[str, Any]) -> None:
    """
    Refuse what is said of an adapter where none is trained.

    Args:
        save_adapter (`bool`): Whether the adapter is to be saved alone.
        chosen (`Collection[str]`): Names of the arguments that the user gives.
        training (`dict[str, Any]`): Training arguments.

    Raises:
        UserError: There will be no adapter.
    """
    if training.get("use_peft"):
        return
    # A grid may cross them with training without an adapter, and then says so.
    named = [] if "use_peft" in chosen else [name for name in chosen if name.startswith("lora_")]
    for name in ["--save-adapter"] * save_adapter + named:
        raise UserError(f"{name}: no adapter is trained; add --lora, or leave it out")


def check_targets(args: FineTuneConfig, model: str | os.PathLike) -> None:
    """
    Refuse an adapter that does not fit the model, before its weights are read.

    Args:
        args ([`~unlearn.config.FineTuneConfig`]): Training arguments.
        model (`str` or `os.PathLike`): Checkpoint that is trained.

    Raises:
        UserError: As [`~unlearn.lora.make_lora_config`].
    """
    if args.use_peft:
        with torch.device("meta"):
            bare = AutoModelForImageTextToText.from_config(read_config(str(model)))
        make_lora_config(
            bare, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=args.lora_target_modules
        )


def check_output_place(out: str | os.PathLike, *sources: str | os.PathLike | None) -> None:
    """
    Refuse to write over a checkpoint that the run reads, or where nothing can be written.

    Args:
        out (`str` or `os.PathLike`): Checkpoint folder to write.
        *sources (`str` or `os.PathLike`, *optional*): Checkpoints that the run reads.

    Raises:
        UserError: `out` is one of them.
        OSError: No file can be written where `out` is to be.
    """
    for source in sources:
        if source is not None and Path(out).resolve() == Path(source).resolve():
            raise UserError(f"--out {out}: is the checkpoint that the run reads; choose another folder")
    check_writable("--out", out)


def check_writable(flag: str, path: str | os.PathLike) -> None:
    """
    Ask before the work is done whether a file or folder can be written.

    Args:
        flag (`str`): What gives the path, for the message.
        path (`str` or `os.PathLike`): File or folder to write.

    Raises:
        OSError: It cannot. The message names flag and folder.
    """
    there = next(parent for parent in Path(path).absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{flag} {path}: cannot write in {there} ({error.strerror}); choose another folder") from None


def check_reference(reference: str | None, model: str | os.PathLike) -> None:
    """
    Refuse a reference that cannot be compared with the model.

    Args:
        reference (`str`, *optional*): Checkpoint of the reference, if it is not the model before unlearning.
        model (`str` or `os.PathLike`): Checkpoint that is unlearned.

    Raises:
        UserError: The reference is not a checkpoint, or has another vocabulary.
    """
    if reference is None:
        return
    try:
        check_checkpoint(reference)
    except UserError as error:
        raise UserError(f"--reference {error}") from error
    sizes = [read_config(str(path)).get_text_config().vocab_size for path in (reference, model)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--reference {reference}: has a vocabulary of {sizes[0]} tokens, {model} of {sizes[1]}; give a "
            "model of the same family"
        )


def load_rows(folder: str | os.PathLike, config: str) -> datasets.Dataset:
    """
    The rows of a configuration to train on.

    Args:
        folder (`str` or `os.PathLike`): Dataset folder or Hub id.
        config (`str`): Name of the configuration.

    Raises:
        UserError: As [`~medforget_dataset.load`], and if there are no rows.
    """
    # `datasets` does not read a Parquet file without rows.
    if _is_empty(Path(folder, parquet_path(config, "train"))) or not len(rows := load(config, "train", data=folder)):
        raise UserError(f"{folder}: {config} has no rows; choose another level, or build the dataset again")
    return rows


def _is_empty(file: Path) -> bool:
    try:
        return pq.read_metadata(file).num_rows == 0
    except (OSError, pa.ArrowInvalid):  # which loading tells better
        return False


def check_two_patients(folder: str | Path, config: str, grouped: datasets.Dataset) -> None:
    """
    Refuse rows of one patient, which cannot be asked about another one's image when training is done.

    Args:
        folder (`str` or `Path`): Dataset folder or Hub id, for the message.
        config (`str`): Name of the configuration, for the message.
        grouped ([`~datasets.Dataset`]): Examples of [`~unlearn.grouping.group_by_image`].

    Raises:
        UserError: All images are of one patient.
    """
    if len(patients := {patient_key(key) for key in grouped["key"]}) < 2:
        raise UserError(
            f"{folder}: all images of {config} are of {patients.pop()}; the wrong-image control needs a second patient"
        )


def images_per_step(args: FineTuneConfig, rehearsed: int = 0) -> list[int]:
    """
    Images in a step on all processes. A step may be cut into batches in another way when a run goes on, as after it
    ran out of memory.

    Args:
        args ([`~unlearn.config.FineTuneConfig`]): Training arguments.
        rehearsed (`int`, *optional*, defaults to `0`): Images in a batch of rehearsal.

    Returns:
        `list[int]`: Those with rows to forget and those without, or the new ones and those of a step of rehearsal.
    """
    parts = args.world_size * args.gradient_accumulation_steps
    if isinstance(args, UnlearnConfig):
        return [args.forget_per_step * parts, args.retain_per_step * parts]
    return [args.per_device_train_batch_size * parts, rehearsed * parts]
