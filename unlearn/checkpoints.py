"""Read and write checkpoints: whole models, and LoRA adapters beside the model they belong to."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from harness_tasks.adapters import ADAPTER_CONFIG, adapter_config
from medforget_dataset.agreement import says_it_is_free
from medforget_dataset.atomic import check_named, replacing, write_text
from medforget_dataset.errors import UserError
from medforget_dataset.hub_files import CHECKPOINT_INFO, is_hub_id

from .checkpoint_info import has_restricted_record, mark_restricted, read_object
from .model_card import render_model_card


MODEL_TYPE = "qwen2_5_vl"
_SAVE_PROCESSOR = "save the processor of the model that it was trained from beside it"
RECORDED_VERSIONS = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def load_checkpoint(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | dict[str, str] | None = None,
    max_pixels: int | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Load a Qwen2.5-VL model and its processor. A LoRA adapter is merged into the model that it belongs to, so that a
    model trained further can be compared with what it was.

    Args:
        path (`str` or `os.PathLike`):
            Folder written by `save_pretrained` or [`save_checkpoint`], or a Hub id such as
            `"lingshu-medical-mllm/Lingshu-7B"`.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            Type of the weights; `"auto"` is the one they were saved in.
        attn_implementation (`str` or `dict[str, str]`, *optional*):
            Attention, for the whole model or for each of its parts.
        max_pixels (`int`, *optional*):
            Most pixels of an image, which the processor's own settings give otherwise.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model, in evaluation mode, and its processor.

    Raises:
        UserError: If there is no such folder, the folder has no processor or one that does not match, the model is not
            a Qwen2.5-VL image-text-to-text model, or a file of weights is missing or cut short. The message names the
            folder.
    """
    path = str(path)
    processor = check_checkpoint(path, max_pixels=max_pixels)
    if adapter_config(path):
        model = _load_adapter(path, dtype, attn_implementation)
    else:
        model = _load_model(path, dtype, attn_implementation)
    if has_restricted_record(path):
        mark_restricted(model)
    return model.eval(), processor


def check_checkpoint(path: str | os.PathLike, *, max_pixels: int | None = None) -> ProcessorMixin:
    """
    Find what is wrong with a checkpoint as far as it can be known without reading its weights.

    Args:
        path (`str` or `os.PathLike`):
            As in [`load_checkpoint`].
        max_pixels (`int`, *optional*):
            As in [`load_checkpoint`].

    Returns:
        `ProcessorMixin`: Its processor.

    Raises:
        UserError: As [`load_checkpoint`].
    """
    path = str(path)
    config = read_config(path)
    processor = _load_processor(path)
    check_processor(path, config, processor)
    if max_pixels is not None:
        _limit_pixels(processor, max_pixels)
    return processor


def read_config(path: str) -> PreTrainedConfig:
    """
    The configuration of a checkpoint's model, for an adapter that of the model that it belongs to.

    Args:
        path (`str`): As in [`load_checkpoint`].

    Raises:
        UserError: If there is no such folder, it is not of a Qwen2.5-VL model, or a file of weights is missing or cut
            short.
    """
    folder = Path(path)
    if not folder.is_dir() and not is_hub_id(path):
        raise UserError(f"{path}: no such checkpoint folder")
    if adapter_config(path):
        base = _base_of(path)
        if folder.is_dir():
            _check_weights(folder, SAFETENSORS_WEIGHTS_NAME)
        try:
            return read_config(base)
        except UserError as error:
            raise UserError(f"{path}: the model that this adapter belongs to: {error}") from error
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{path}: not a checkpoint: it has no {CONFIG_NAME}")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the model's configuration: {_first_line(error)}") from error
    if config.model_type != MODEL_TYPE:
        has_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        kind = "is" if has_images else "not an image-text-to-text model:"
        raise UserError(f"{path}: {kind} a {config.model_type} model; MedForget trains Qwen2.5-VL models")
    if folder.is_dir():
        _check_weights(folder, SAFE_WEIGHTS_NAME)
    return config


def _check_weights(folder: Path, name: str) -> None:
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise UserError(f"{folder}: it has no weights ({name}); copy or download them again")
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        for name in sorted(set(read_object(index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: the file of weights {name} is missing; copy or download it again")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"{folder}: the file of weights {file.name} is cut short or damaged ({error}); copy or download it "
                "again"
            ) from error


def _load_model(path: str, dtype: torch.dtype | str, attention: str | dict[str, str] | None) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        why = _first_line(error)
        if "mismatched_sizes" in why:
            why = f"its weights do not have the shapes that {CONFIG_NAME} says; take both from one checkpoint"
        raise UserError(f"{path}: cannot load the model: {why}") from error
    model, loading = loaded
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(f"{path}: {len(missing)} weights are missing, {missing[0]} first; is a shard missing?")
    return model


def adapter_base(path: str | os.PathLike) -> str | None:
    """What a checkpoint that is an adapter says that it belongs to: a folder or Hub id; nothing of a whole model."""
    return _base_of(str(path)) if adapter_config(str(path)) else None


def _base_of(path: str) -> str:
    try:
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}/{ADAPTER_CONFIG}: cannot be read: {_first_line(error)}") from error
    if not base:
        raise UserError(f"{path}/{ADAPTER_CONFIG}: does not say which model the adapter belongs to")
    return str(base)


def _load_adapter(path: str, dtype: torch.dtype | str, attention: str | dict[str, str] | None) -> PreTrainedModel:
    # Through the same door, since the base may itself be an adapter.
    model, _ = load_checkpoint(_base_of(path), dtype=dtype, attn_implementation=attention)
    merged: Any = _put_adapter(model, path).merge_and_unload()
    # An adapter that is trained next belongs to what this one has made of the base.
    merged.name_or_path = merged.config._name_or_path = path
    # Which PEFT has frozen.
    return merged.requires_grad_(True)


def _put_adapter(model: PreTrainedModel, path: str | os.PathLike) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, path)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot load the adapter: {_first_line(error)}") from error


def load_trained(
    path: Path, *, dtype: torch.dtype | str = "auto", attn_implementation: str | dict[str, str] | None = None
) -> PreTrainedModel | PeftModel:
    """What a trainer's `save_model` wrote: a model, or an adapter on the model it belongs to, not merged."""
    if not (path / ADAPTER_CONFIG).is_file():
        return _load_model(str(path), dtype, attn_implementation)
    model, _ = load_checkpoint(_base_of(str(path)), dtype=dtype, attn_implementation=attn_implementation)
    if has_restricted_record(path):
        mark_restricted(model)
    return _put_adapter(model, path)


def _load_processor(path: str) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(path)
    except Exception as error:  # of the type that tokenizers raises
        why = _first_line(error).partition(". ")[0].rstrip(".")
        raise UserError(f"{path}: no processor that can be read ({why}); {_SAVE_PROCESSOR}") from error
    if not isinstance(processor, ProcessorMixin):
        raise UserError(f"{path}: holds a {type(processor).__name__} but no image processor; {_SAVE_PROCESSOR}")
    return processor


def _limit_pixels(processor: Any, max_pixels: int) -> None:
    size = processor.image_processor.size
    token = (processor.image_processor.patch_size * processor.image_processor.merge_size) ** 2
    if max_pixels < token:
        raise UserError(f"--max-pixels {max_pixels}: less than one image token, which takes {token}")
    smallest = min(size["shortest_edge"], max_pixels)
    processor.image_processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}


def check_processor(path: str, config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Refuse a processor that was made for another model, before it feeds this one nonsense.

    Args:
        path (`str`): Folder of both, for the message.
        config ([`~transformers.PreTrainedConfig`]): Configuration of the model.
        processor ([`~transformers.ProcessorMixin`]): The processor.

    Raises:
        UserError: Its tokens or patches are not the model's, or it cannot make prompts.
    """
    parts, whole = cast(Any, processor), cast(Any, config)
    vision, text = whole.vision_config, config.get_text_config()
    pairs = (
        ("image token", getattr(parts, "image_token_id", None), whole.image_token_id),
        ("patch size", getattr(parts.image_processor, "patch_size", None), vision.patch_size),
        ("merge size", getattr(parts.image_processor, "merge_size", None), vision.spatial_merge_size),
    )
    for name, has, needs in pairs:
        if has != needs:
            raise UserError(
                f"{path}: the processor is not this model's: its {name} is {has}, the model's {needs}; "
                f"{_SAVE_PROCESSOR}"
            )
    if len(parts.tokenizer) > text.vocab_size:
        raise UserError(
            f"{path}: the processor is not this model's: its tokenizer has {len(parts.tokenizer)} tokens, the model "
            f"{text.vocab_size}; {_SAVE_PROCESSOR}"
        )
    if not parts.chat_template:
        raise UserError(f"{path}: the processor has no chat template; {_SAVE_PROCESSOR}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def check_output(path: str | os.PathLike) -> Path:
    """
    The folder of a checkpoint to be written; asked before the work is done, so that none is lost.

    Raises:
        UserError: If `path` exists and is not a MedForget checkpoint, or has no name.
    """
    path = Path(path)
    check_named(path)
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not (path / CHECKPOINT_INFO).is_file():
        raise UserError(f"{path}: holds something else than a MedForget checkpoint; choose another folder")
    return path


def save_checkpoint(
    path: str | os.PathLike,
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    info: dict[str, Any],
    *,
    adapter: bool = False,
    files: dict[str, Any] | None = None,
) -> Path:
    """
    Write a checkpoint that `from_pretrained` reads: weights as safetensors, processor, `medforget.json` and a card.

    The folder appears complete or not at all. A LoRA adapter is merged into the model, in place, before writing,
    unless it is asked for alone.

    Args:
        path (`str` or `os.PathLike`):
            Folder to write. A MedForget checkpoint there is replaced.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to write.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        info (`dict[str, Any]`):
            What made this checkpoint: base, data, level, method, configuration, anything JSON can hold. The versions
            of the libraries are added under `"versions"`.
        adapter (`bool`, *optional*, defaults to `False`):
            Write the LoRA adapter alone; it names the model that it belongs to, which must stay where it is.
        files (`dict[str, Any]`, *optional*):
            Other contents, by name of a JSON file beside the weights.

    Returns:
        `Path`: The folder.

    Raises:
        UserError: If `path` exists and is not a MedForget checkpoint.
    """
    path = check_output(path)
    whole: Any = model
    if isinstance(model, PeftModel) and not adapter:
        whole = model.merge_and_unload()
    elif isinstance(model, PeftModel):
        for config in model.peft_config.values():
            base = Path(str(config.base_model_name_or_path))
            if base.is_dir():  # which must be found from wherever the adapter is loaded
                config.base_model_name_or_path = str(base.absolute())
    if not says_it_is_free(info):
        mark_restricted(whole)
    with replacing(path) as partial:
        try:
            whole.save_pretrained(partial)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"{path}: cannot write the weights: {error}") from None
        processor.save_pretrained(partial)
        versions = {name: importlib.metadata.version(name) for name in RECORDED_VERSIONS}
        contents = {CHECKPOINT_INFO: {**info, "versions": versions}, **(files or {})}
        for name, content in contents.items():
            write_text(partial / name, json.dumps(content, indent=2) + "\n")
        (partial / "README.md").write_text(render_model_card(contents[CHECKPOINT_INFO]), encoding="utf-8")
    return path
