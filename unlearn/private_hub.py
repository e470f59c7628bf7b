"""What a trainer does with the Hub: nothing but the finished model goes there, private unless asked otherwise."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from peft import PeftModel
from transformers import ProcessorMixin

from medforget_dataset.atomic import write_text
from medforget_dataset.errors import UserError
from medforget_dataset.hub_files import CHECKPOINT_INFO, is_hub_id
from medforget_dataset.publishing import Upload, reserve

from .checkpoint_info import is_marked, is_restricted, mark_restricted
from .checkpoints import save_checkpoint
from .config import UnlearnConfig
from .hub import push_model
from .preconditions import OWNED, OWNED_BY_UNLEARNING


if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object


class PrivateHub(_Trainer):
    """
    `push_to_hub` of a trainer, in the place of transformers' own: the repository is made private, restricted rows
    stay where they are, and of the folder only the model, its processor and the card are sent.
    """

    is_sharded: bool

    def described(self) -> dict[str, Any]:
        """What `medforget.json` says of the training."""
        return {}

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository, private, before training: a name or token that is wrong is told at once.

        Args:
            token (`str`, *optional*): The Hub's token. Defaults to that of `hf auth login` or `HF_TOKEN`.
            private (`bool`, *optional*): Whether it stays private. Defaults to `args.hub_private_repo`.

        Raises:
            UserError: As [`~medforget_dataset.publishing.reserve`].
        """
        if not self.is_world_process_zero():
            return
        upload = Upload("model", {}, self._is_restricted())
        repo_id: Any = self._repo_id()
        self.hub_model_id = repo_id
        reserve(
            upload, repo_id, what="the checkpoint", public=self._is_public(private), token=token or self.args.hub_token
        )

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """
        Upload the model, or the adapter that was trained, with its processor and card.

        Args:
            commit_message (`str`), blocking (`bool`), revision (`str`), **kwargs (`Any`):
                Taken as in transformers, and not used: one commit is made on the main branch, and waited for.
            token (`str`, *optional*): As in [`init_hf_repo`].
            private (`bool`, *optional*): As in [`init_hf_repo`].

        Returns:
            `str`: Address of the repository.

        Raises:
            UserError: As [`~unlearn.hub.push_model`], and if the model is spread over processes.
        """
        if self.is_sharded:
            raise UserError("push_to_hub: the model is spread over processes; save it, then `medforget push model`")
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return ""
        model = self._unwrapped()
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            is_adapter = isinstance(model, PeftModel)
            processor = cast(ProcessorMixin, self.processing_class)
            save_checkpoint(folder, model, processor, self._info(), adapter=is_adapter)
            return push_model(
                folder, self._repo_id(), public=self._is_public(private), token=token or self.args.hub_token
            ).url

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model as TRL does, and with it that it is restricted, if it is.

        Args:
            output_dir (`str`, *optional*): Folder. Defaults to `args.output_dir`.
            _internal_call (`bool`, *optional*, defaults to `False`): As in transformers: not pushed as well.

        Raises:
            UserError: As [`push_to_hub`], where that is asked for.
        """
        # Of an adapter no configuration is saved.
        if is_marked(self._unwrapped()) and self.args.should_save:
            record = Path(output_dir or str(self.args.output_dir), CHECKPOINT_INFO)
            write_text(record, json.dumps({"restricted": True}) + "\n")
        super().save_model(output_dir, _internal_call)

    def mark(self) -> None:
        """Have whatever is saved of the model say that it is restricted, if that is known."""
        # A base on the Hub that cannot be asked now is asked before anything is pushed.
        with suppress(UserError):
            if self._is_restricted():
                mark_restricted(self._unwrapped())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A checkpoint to go on from is not what was to be published.
        pass

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        # TRL's names the wrong licence; a checkpoint's own card is written beside it when it is done.
        pass

    def _send_telemetry(self) -> None:
        # Nothing leaves a machine that may hold credentialed data.
        pass

    def _repo_id(self) -> str:
        if not self.args.hub_model_id:
            raise UserError("push_to_hub: give hub_model_id, ORG/NAME")
        return self.args.hub_model_id

    def _is_public(self, private: bool | None) -> bool:
        return (self.args.hub_private_repo if private is None else private) is False

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _is_restricted(self) -> bool:
        model = self._unwrapped()
        return is_marked(model) or self._has_restricted_rows() or is_restricted(getattr(model, "name_or_path", None))

    def _has_restricted_rows(self) -> bool:
        return any(row["restricted"] for rows in cast(Dataset, self.train_dataset)["rows"] for row in rows)

    def _info(self) -> dict[str, Any]:
        model = self._unwrapped()
        owned = OWNED | (OWNED_BY_UNLEARNING if isinstance(self.args, UnlearnConfig) else {})
        arguments = {
            field.name: value
            for field in dataclasses.fields(self.args)
            # Numbers and names that differ from the defaults, and that the command takes: no token, no folder.
            if isinstance(value := getattr(self.args, field.name), bool | int | float | str)
            and value != field.default
            and not field.name.startswith(("hub_", "push_to_hub"))
            and not field.name.endswith("_dir")
            and field.name not in owned
        }
        base = getattr(model, "name_or_path", None)
        return {
            "base": base,
            # As `fingerprint` names a base on the Hub.
            "base files": base if is_hub_id(str(base)) else None,
            "arguments": arguments,
            "save_adapter": isinstance(model, PeftModel),
            "seed": self.args.seed,
            "steps": self.state.global_step,
            "restricted": self._is_restricted(),
            **self.described(),
        }
