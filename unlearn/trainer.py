"""Fine-tuning and unlearning on image-packed sequences."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from medforget_dataset.errors import UserError

from .answers import answer_log_probs, answer_logits, token_log_probs
from .batches import Batches, ImageBatches, MixedBatches, SequentialBatches
from .callbacks import CompleteCheckpoints, EpochCallback, LastStep, RowsPerSecond
from .checkpoint_info import is_restricted, mark_restricted
from .checkpoints import load_checkpoint, load_trained
from .config import FineTuneConfig, UnlearnConfig
from .gated_mlp import lean_mlps
from .grouping import split_by_kind
from .lora import make_lora_config
from .methods import INITIAL, AnswerBatch
from .methods._base import count_answers
from .packing import IGNORED, RowCollator, make_collator
from .private_hub import PrivateHub
from .reference import reference_log_probs
from .vision_cache import VisionCache, vision_tower, without_gradient


class TrainingDiverged(UserError):
    """Training was stopped because its loss is no number, or what was to be retained is lost."""


class FineTuneTrainer(PrivateHub, SFTTrainer):
    """
    Train on the answers of image-packed sequences by cross-entropy.

    The loss is the mean over the answer tokens of all batches of a step, on all processes, whatever their number.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to train.
        args ([`~unlearn.config.FineTuneConfig`]):
            Training arguments.
        train_dataset ([`~datasets.Dataset`]):
            Examples of [`~unlearn.grouping.group_by_image`].
        processing_class ([`~transformers.ProcessorMixin`]):
            The model's processor.
        data_collator ([`~unlearn.packing.RowCollator`], *optional*):
            Defaults to a [`~unlearn.packing.PackedCollator`] with the wordings and images of the rows, or what
            `args.pack_images` says. The trainer tells it the epoch.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the model. Defaults to a LoRA adapter where `args.use_peft` asks for one.
        batches ([`~unlearn.batches.Batches`], *optional*):
            Which images a step sees. Defaults to every image once an epoch.
        callbacks (`Sequence[TrainerCallback]`, *optional*, defaults to `()`):
            Other callbacks.

    Raises:
        UserError: If the LoRA targets fit nothing, or a vision tower that is trained is to be cached.
        TrainingDiverged: From `train`, if the loss is not a finite number.
    """

    args: FineTuneConfig
    reference: nn.Module | None = None
    # Losses are divided by the counts of a whole step, not by its number of batches.
    loss_is_scaled_for_ga: bool = True  # type: ignore[assignment]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: FineTuneConfig,
        train_dataset: datasets.Dataset,
        processing_class: ProcessorMixin,
        data_collator: RowCollator | None = None,
        peft_config: PeftConfig | None = None,
        batches: Batches | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        collator = data_collator or make_collator(processing_class, args)
        if args.use_peft and peft_config is None and not isinstance(model, PeftModel):
            peft_config = make_lora_config(
                model,
                r=args.lora_r,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                targets=args.lora_target_modules,
            )
        if args.freeze_vision:
            vision_tower(model).requires_grad_(False)
        parts = args.world_size * args.gradient_accumulation_steps
        self.batches = batches or self._make_batches(train_dataset, parts, args)
        # Sums of shares since the last line of the log, and the batches they are from.
        self._terms: dict[str, torch.Tensor] = {}
        self._term_batches: Counter[str] = Counter()
        self.rows_seen = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=collator,
            peft_config=peft_config,
            callbacks=[EpochCallback(collator, self.batches), *callbacks],
        )
        self.mark()
        self.model_accepts_loss_kwargs = True
        self.is_sharded = args.sharding is not None
        # The fused head reads the projection's weight itself, past the hooks with which FSDP and ZeRO-3 gather it.
        self.uses_fused_head = self.accelerator.device.type == "cuda" and not self.is_sharded
        self.vision_cache = self._make_vision_cache(collator) if args.cache_vision else None
        self.add_callback(CompleteCheckpoints(self.accelerator))
        self.add_callback(LastStep())
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RowsPerSecond(lambda: self.rows_seen))

    def _make_batches(self, dataset: datasets.Dataset, parts: int, args: Any) -> Batches:
        return ImageBatches(len(dataset), args.per_device_train_batch_size, parts=parts, seed=args.seed)

    def _make_vision_cache(self, collator: RowCollator) -> VisionCache:
        if self.is_sharded:
            raise UserError("cache_vision: does not work with FSDP or ZeRO-3, which spread the vision tower out")
        models = [cast(nn.Module, self.model), *([self.reference] if self.reference is not None else [])]
        return VisionCache(models, collator, self.accelerator.autocast)

    def get_train_dataloader(self) -> DataLoader:
        dataset = cast(Dataset, self.train_dataset)
        loader = DataLoader(
            dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        lean = nullcontext() if self.args.activation_checkpointing else lean_mlps(cast(nn.Module, self.model))
        with self._vision(), lean:
            return super().train(*args, **kwargs)

    def free_memory(self) -> None:
        """Let go of the model and the optimizer, whose weights have been saved."""
        self.accelerator.free_memory(self.model_wrapped, self.optimizer)
        self.model = self.model_wrapped = self.optimizer = None  # type: ignore[assignment]

    def _vision(self) -> AbstractContextManager:
        """Inside the context, a vision tower that is not trained is passed through once, or at least not backward."""
        if self.vision_cache:
            return self.vision_cache.in_use()
        return without_gradient(vision_tower(cast(nn.Module, self.model)))

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the losses of a batch are means over, as a tensor that can be summed over batches."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        totals = torch.stack([self.count_items(batch) for batch in batch_samples]).sum(0).to(device)
        return cast(torch.Tensor, self.accelerator.reduce(totals, "sum"))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        totals = cast(torch.Tensor, num_items_in_batch)
        with self.accelerator.autocast():
            loss, terms = self.loss_and_terms(model, inputs, totals)
        # On this process, and about as many on each of the others.
        self.rows_seen += len(inputs["forget"]) * self.accelerator.num_processes
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()
        self._term_batches.update(terms.keys())
        # Gradients are averaged over processes, of which each has its share of the step's mean.
        return loss * self.accelerator.num_processes

    def loss_and_terms(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], totals: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This batch's share of the loss of its step, and of the numbers to log beside it."""
        log_probs, is_top = answer_log_probs(model, inputs, fused=self.uses_fused_head)  # (N,), (N,)
        totals = totals.clamp(min=1)
        return -log_probs.sum() / totals, {"mean_token_accuracy": is_top.sum() / totals}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        diverged = ~torch.isfinite(loss)
        if self.accelerator.num_processes > 1:
            # One that stopped by itself would leave the others waiting for it.
            diverged = cast(torch.Tensor, self.accelerator.reduce(diverged.float(), "sum")) > 0
        if diverged:
            raise TrainingDiverged(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; lower the learning rate "
                f"({self.args.learning_rate}), or compute in float32"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Shares wait as tensors until here: reading one stops the GPU.
        if "loss" in logs and self._terms:
            shares = cast(torch.Tensor, self.accelerator.reduce(torch.stack([*self._terms.values()]).float(), "sum"))
            for name, total in zip(self._terms, shares.tolist(), strict=True):
                logs[name] = total * self.args.gradient_accumulation_steps / self._term_batches[name]
            self._terms.clear()
            self._term_batches.clear()
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with suppress(UserError):  # the base was asked when it was loaded
            if is_restricted(resume_from_checkpoint):
                mark_restricted(cast(Any, self.model))
        if self.is_sharded or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Not transformers' own: it reads the names of the file, which `save_pretrained` does not write as the model
        # has them, and goes on with the weights that were there, with a warning.
        saved = load_trained(Path(resume_from_checkpoint))
        cast(nn.Module, self.model).load_state_dict(saved.state_dict())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Walks the whole model at every step, for a number that packed sequences make wrong.
        return 0

    def described(self) -> dict[str, Any]:
        """What `medforget.json` says of the training."""
        return {"stage": "finetune"}


class UnlearnTrainer(FineTuneTrainer):
    """
    Unlearn by a gradient method. A batch mixes images with rows to forget and images without.

    The reference of a method that needs one is, where an adapter is trained, the model with the adapter off, and else
    a frozen copy of the model or the checkpoint that the method names. A method that needs only log-probabilities of
    it gets them computed once, where the rows are the same in every epoch, and no reference is kept.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that knows what is to be forgotten.
        args ([`~unlearn.config.UnlearnConfig`]):
            Training arguments, the method among them.
        train_dataset ([`~datasets.Dataset`]):
            Examples of [`~unlearn.grouping.group_by_image`], with rows to forget.
        processing_class ([`~transformers.ProcessorMixin`]):
            The model's processor.
        data_collator ([`~unlearn.packing.RowCollator`], *optional*):
            As in [`FineTuneTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in [`FineTuneTrainer`].
        callbacks (`Sequence[TrainerCallback]`, *optional*, defaults to `()`):
            Other callbacks.

    Raises:
        UserError: As in [`FineTuneTrainer`], and if the dataset has no rows to forget, or the reference cannot be
            loaded.
        TrainingDiverged: From `train`, if the loss is not a finite number, or the retain rows' answers have become
            less probable than a guess among all tokens.
    """

    args: UnlearnConfig

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: UnlearnConfig,
        train_dataset: datasets.Dataset,
        processing_class: ProcessorMixin,
        data_collator: RowCollator | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.method = args.make_method()
        if not any(row["forget"] for rows in train_dataset["rows"] for row in rows):
            raise UserError("the dataset has no rows to forget")
        if args.schedule == "sequential":
            train_dataset = split_by_kind(train_dataset)
        collator = data_collator or make_collator(processing_class, args)
        uses_adapter = args.use_peft or peft_config is not None or isinstance(model, PeftModel)
        precompute = self.method.needs_reference == "log_probs" and (
            # A model that is about to be spread over processes is not on a device yet.
            collator.is_static and not args.sharding
            if args.precompute_ref_log_probs is None
            else args.precompute_ref_log_probs
        )
        if self.method.needs_reference and args.sharding == "deepspeed" and not uses_adapter:
            raise UserError(
                f"{self.method.name} compares with a second model, which ZeRO-3 has no room for; train an adapter "
                "(--lora), or use --accelerate-config fsdp2"
            )
        if precompute and args.sharding:
            raise UserError("precompute_ref_log_probs: does not work with FSDP or ZeRO-3; leave it out")
        if precompute and not collator.is_static:
            raise UserError(
                "precompute_ref_log_probs: the rows are worded or viewed anew in every epoch; leave it out"
            )
        if self.method.needs_reference and self.method.reference != INITIAL:
            self.reference, _ = load_checkpoint(str(self.method.reference), **args.load_arguments())
        elif self.method.needs_reference and not uses_adapter and not precompute:
            # Copied here, before the trainer patches the model's forward: a later copy would call the original's.
            self.reference = copy.deepcopy(model)
        super().__init__(model, args, train_dataset, processing_class, collator, peft_config, callbacks=callbacks)
        if self.reference is not None:
            self.reference.eval().requires_grad_(False).to(self.accelerator.device)
            if self.uses_fused_head:
                add_fused_lm_head(cast(PreTrainedModel, self.reference), outputs=("log_probs", "is_top1"))
        if precompute:
            bare = cast(nn.Module, self.model)
            with self._vision(), self._reference_model(bare) as reference, self.accelerator.autocast():
                collator.reference_log_probs = reference_log_probs(
                    reference, collator, train_dataset, self.method, self.accelerator, quiet=bool(args.disable_tqdm)
                )
            self.reference = None
            if self.vision_cache:
                del self.vision_cache.towers[1:]

    def _make_batches(self, dataset: datasets.Dataset, parts: int, args: UnlearnConfig) -> Batches:
        has_forget = [any(row["forget"] for row in rows) for rows in dataset["rows"]]
        if args.schedule == "sequential":
            return SequentialBatches(has_forget, args.per_device_train_batch_size, parts=parts, seed=args.seed)
        return MixedBatches(has_forget, args.forget_per_step, args.retain_per_step, parts=parts, seed=args.seed)

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        row_index = batch["row_index"][:, 1:][batch["labels"][:, 1:] != IGNORED]
        return count_answers(row_index, batch["forget"])

    def loss_and_terms(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], totals: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        compares = any(totals[0, int(forget)] for forget in (True, False) if self.method.compares(forget))
        references = self.reference_values(model, inputs) if compares else {}
        row_index = inputs["row_index"][:, 1:][inputs["labels"][:, 1:] != IGNORED]  # (N,)
        if self.method.needs_reference == "logits":
            logits, targets, _ = answer_logits(model, inputs)  # (N, V), (N,)
            log_probs, is_top = token_log_probs(logits, targets), logits.argmax(-1) == targets
        else:
            logits = cast(torch.Tensor, None)
            log_probs, is_top = answer_log_probs(model, inputs, fused=self.uses_fused_head)
        if not compares:
            # Means over no token or row are 0, whatever the reference.
            references = {"reference_logits": logits, "reference_log_probs": log_probs.detach()}
        batch = AnswerBatch(log_probs, row_index, inputs["forget"], logits, **references, totals=totals)
        loss, terms = self.method.loss(batch)
        for side, forget in (("forget", True), ("retain", False)):
            if totals[0, int(forget)]:
                terms[f"{side}_loss"] = batch.cross_entropy(forget)
                terms[f"{side}_token_accuracy"] = batch.token_mean(is_top.float(), forget)
        return loss, terms

    @torch.no_grad()
    def reference_values(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the method uses of the reference, as fields of [`AnswerBatch`]."""
        if self.method.needs_reference is None:
            return {}
        if "reference_log_probs" in inputs:
            return {"reference_log_probs": inputs["reference_log_probs"]}
        with self._reference_model(model) as reference:
            if self.method.needs_reference == "logits":
                return {"reference_logits": answer_logits(reference, inputs)[0]}
            return {"reference_log_probs": answer_log_probs(reference, inputs, fused=self.uses_fused_head)[0]}

    @contextmanager
    def _reference_model(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
            return
        bare = self.accelerator.unwrap_model(model)
        with bare.disable_adapter() if isinstance(bare, PeftModel) else nullcontext():
            yield bare

    def described(self) -> dict[str, Any]:
        return {
            "stage": "unlearn",
            "level": self.args.level,
            "method": self.method.name,
            "method_arguments": self.method.arguments(),
        }

    def _is_restricted(self) -> bool:
        reference = self.method.reference if self.method.needs_reference else INITIAL
        return super()._is_restricted() or (reference != INITIAL and is_restricted(reference))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        losses = [line["retain_loss"] for line in self.state.log_history if "retain_loss" in line]
        guess = math.log(cast(Any, self.model).config.get_text_config().vocab_size)
        # A model that knew nothing to begin with has not collapsed. Before the first step it knew both sides; under
        # the sequential schedule the first loss on retain rows comes after an epoch of forgetting.
        first = next((line for line in self.state.log_history if "forget_loss" in line or "retain_loss" in line), {})
        if losses and losses[-1] > guess > 2 * first.get("retain_loss", first.get("forget_loss", guess)):
            raise TrainingDiverged(
                f"step {self.state.global_step}: the model has collapsed: what it should retain costs "
                f"{losses[-1]:.1f} nats a token, a blind guess {guess:.1f}; lower the learning rate "
                f"({self.args.learning_rate}) or the weight of forgetting, or use --keep-best"
            )
