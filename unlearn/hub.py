"""Checkpoints on the Hub: what goes up, and how one that is there is read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePath
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from medforget_dataset.agreement import says_it_is_free
from medforget_dataset.errors import UserError
from medforget_dataset.publishing import Content, Published, Upload, check_allowed, connect, publish

from .checkpoint_info import is_restricted, read_info, read_object
from .checkpoints import ADAPTER_CONFIG, CHECKPOINT_INFO, check_checkpoint
from .config import FineTuneConfig
from .model_card import EVAL_RESULTS, card_files


# What transformers, PEFT and we write for a checkpoint; anything else beside it stays here.
_WEIGHTS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors")
_FILES = frozenset(
    (
        SAFE_WEIGHTS_INDEX_NAME,
        CONFIG_NAME,
        "generation_config.json",
        ADAPTER_CONFIG,
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "zeroed_channels.json",
        CHECKPOINT_INFO,
    )
)


def push_model(
    checkpoint: Path,
    repo_id: str,
    *,
    run: Path | None = None,
    base: str | None = None,
    dataset: str | None = None,
    public: bool = False,
    replace: bool = False,
    complies: str = "",
    token: str | None = None,
) -> Published:
    """
    Upload a checkpoint to a repository, private unless `public`.

    Args:
        checkpoint (`Path`):
            A folder written by `medforget finetune` or `medforget unlearn`: a model, or a LoRA adapter.
        repo_id (`str`):
            `ORG/NAME` on the Hub; made if it is not there, private.
        run (`Path`, *optional*):
            Folder of the run whose report has the checkpoint's scores, for its card. Defaults to the folder that the
            checkpoint is in, if that is one.
        base (`str`, *optional*):
            Hub id of the model that it was made from, where that is a folder here.
        dataset (`str`, *optional*):
            Hub id of the dataset that it was made with, where that is a folder here.
        public (`bool`), replace (`bool`), complies (`str`), token (`str`):
            As in [`~medforget_dataset.publishing.publish`].

    Returns:
        [`~medforget_dataset.publishing.Published`]: What was sent.

    Raises:
        UserError: As [`model_upload`] and [`~medforget_dataset.publishing.publish`].
    """
    restricted = not says_it_is_free(_checked_info(checkpoint))
    # Refused before gigabytes are read.
    connect(str(checkpoint), repo_id, restricted=restricted, public=public, complies=complies, token=token)
    upload = model_upload(checkpoint, repo_id, run=run, base=base, dataset=dataset)
    return publish(
        upload, repo_id, what=str(checkpoint), public=public, replace=replace, complies=complies, token=token
    )


def model_upload(
    checkpoint: Path, repo_id: str, *, run: Path | None = None, base: str | None = None, dataset: str | None = None
) -> Upload:
    """
    The files of a checkpoint: weights as safetensors, processor, `medforget.json`, and a card with what was measured.

    `medforget.json` names the base and the dataset on the Hub, or by the last part of their path, and no folder of
    this machine. An adapter's configuration names what is given as its base, and else what it did: a folder here is
    then all that PEFT can load it with.

    Args:
        checkpoint (`Path`), repo_id (`str`), run (`Path`), base (`str`), dataset (`str`):
            As in [`push_model`].

    Raises:
        UserError: The folder is not a MedForget checkpoint, cannot be loaded, has no weights as safetensors, or files
            of weights that are not its own.
    """
    info = _checked_info(checkpoint)
    check_checkpoint(checkpoint)
    _check_weights(checkpoint)
    files: dict[str, Content] = {file.name: file for file in sorted(checkpoint.iterdir()) if _is_part(file.name)}
    files[CHECKPOINT_INFO] = _json(_portable(info) | _on_hub(info, {"base": base, "data": dataset}))
    if ADAPTER_CONFIG in files:
        adapter = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        files[ADAPTER_CONFIG] = _json(adapter | ({"base_model_name_or_path": base} if base else {}))
    cards = card_files(checkpoint, repo_id=repo_id, run=run, base=base, dataset=dataset)
    files |= {name: text.encode() for name, text in cards.items()}
    describing = frozenset(("README.md", EVAL_RESULTS, CHECKPOINT_INFO, ADAPTER_CONFIG))
    return Upload("model", files, not says_it_is_free(info), describing)


def check_push(args: FineTuneConfig, *, restricted: bool) -> None:
    """
    Refuse, before training, to push what must not be published.

    Args:
        args ([`~unlearn.config.FineTuneConfig`]):
            Training arguments, `push_to_hub` among them.
        restricted (`bool`):
            Whether the checkpoint will be of restricted data.

    Raises:
        UserError: As [`~medforget_dataset.publishing.check_allowed`].
    """
    if args.push_to_hub:
        public = args.hub_private_repo is False
        check_allowed("the checkpoint", str(args.hub_model_id), restricted=restricted, public=public)


def push_finished(checkpoint: str | os.PathLike, args: FineTuneConfig | None) -> None:
    """
    Upload a checkpoint that has been written, where its training arguments say so.

    Args:
        checkpoint (`str` or `os.PathLike`):
            Folder of the checkpoint.
        args ([`~unlearn.config.FineTuneConfig`], *optional*):
            Training arguments, if there was training.

    Raises:
        UserError: As [`push_model`]; the checkpoint is complete all the same.
    """
    if args is None or not args.push_to_hub:
        return
    repo_id = str(args.hub_model_id)
    try:
        push_model(Path(checkpoint), repo_id, public=args.hub_private_repo is False, token=args.hub_token)
    except UserError as error:
        raise UserError(
            f"{error}; {checkpoint} is complete: `medforget push model {checkpoint} {repo_id}` sends it"
        ) from error


def _check_weights(checkpoint: Path) -> None:
    """Refuse other weights than safetensors, and files of weights that are not the checkpoint's."""
    found = {file.name for file in checkpoint.iterdir() if _WEIGHTS.fullmatch(file.name)}
    if not found:
        raise UserError(f"{checkpoint}: has no weights as safetensors, and no others are published")
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if (checkpoint / ADAPTER_CONFIG).is_file():
        named = {SAFETENSORS_WEIGHTS_NAME}
    elif index.is_file():
        named = set(read_object(index).get("weight_map", {}).values())
    else:
        named = {SAFE_WEIGHTS_NAME}
    if strays := sorted(found - named):
        raise UserError(
            f"{checkpoint}: {strays[0]} is not among its weights ({', '.join(sorted(named)) or index.name}); remove "
            "it, or copy the checkpoint again"
        )


def left_out(checkpoint: Path) -> list[str]:
    """Names of what lies in a checkpoint's folder and is not uploaded."""
    return sorted(file.name for file in checkpoint.iterdir() if not _is_part(file.name) and file.name != "README.md")


def _is_part(name: str) -> bool:
    return name in _FILES or bool(_WEIGHTS.fullmatch(name))


def _checked_info(checkpoint: Path) -> dict[str, Any]:
    if not (checkpoint / CHECKPOINT_INFO).is_file():
        raise UserError(f"{checkpoint}: not a MedForget checkpoint (no readable {CHECKPOINT_INFO})")
    info = read_info(checkpoint)
    if says_it_is_free(info) and is_restricted(checkpoint):
        raise UserError(
            f"{checkpoint}: {CONFIG_NAME} says that it is restricted, and {CHECKPOINT_INFO} that it is not; mend the "
            "one that is wrong"
        )
    return info


def _on_hub(info: dict[str, Any], named: dict[str, str | None]) -> dict[str, Any]:
    """The base and the dataset as others know them: by the Hub id that is given, or that they were loaded by."""
    return {
        key: name or (info[key] if info[key] == info.get(f"{key} files") else PurePath(info[key]).name)
        for key, name in named.items()
        if name or isinstance(info.get(key), str)
    }


def _portable(value: Any, key: str = "") -> Any:
    """The same without this machine's folders, which say who made it and mean nothing elsewhere."""
    if isinstance(value, dict):
        return {name: _portable(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    if isinstance(value, str) and (key == "reference" or value.startswith(("/", "~", "./", "../"))):
        return PurePath(value).name
    return value


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
