"""Fine-tuning and unlearning on image-packed sequences."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import SFTTrainer

from medforget_dataset.errors import UserError

from .answers import answer_logits
from .config import FineTuneConfig, UnlearnConfig
from .methods import INITIAL, AnswerBatch
from .models import load_checkpoint
from .packing import PackedCollator, RowCollator


class EpochCallback(TrainerCallback):
    """Tells the collator the epoch, so that it draws other wordings and views."""

    def __init__(self, collator: RowCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


class FineTuneTrainer(SFTTrainer):
    """
    Train on the answers of image-packed sequences by cross-entropy.

    The loss is the mean over the answer tokens of all batches of a step, whatever their number. Only what the log
    prints is computed beside it, so that a step of the tiny model costs little more than in a bare loop.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to train.
        args ([`~unlearn.config.FineTuneConfig`]):
            Training arguments.
        train_dataset ([`~datasets.Dataset`]):
            Examples of [`~unlearn.packing.group_by_image`].
        processing_class ([`~transformers.ProcessorMixin`]):
            The model's processor.
        data_collator ([`~unlearn.packing.RowCollator`], *optional*):
            Defaults to a [`~unlearn.packing.PackedCollator`] with the wordings and images of the rows. The trainer
            tells it the epoch.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the model.
        callbacks (`Sequence[TrainerCallback]`, *optional*, defaults to `()`):
            Other callbacks.
    """

    loss_is_scaled_for_ga: bool = True  # type: ignore[assignment]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: FineTuneConfig,
        train_dataset: datasets.Dataset,
        processing_class: ProcessorMixin,
        data_collator: RowCollator | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        if data_collator is None:
            data_collator = PackedCollator(processing_class, seed=args.seed, max_length=args.max_length)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            peft_config=peft_config,
            callbacks=[EpochCallback(data_collator), *callbacks],
        )
        # Counts the answer tokens of all batches of a step before its first forward.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        logits, targets, _ = answer_logits(model, inputs)  # (N, V), (N,)
        total = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        if num_items_in_batch is None:
            return total / len(targets)
        # The count is over all processes, and gradients are averaged over them.
        return total / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Metrics wait as tensors until here: reading one stops the GPU.
        for metrics in self._metrics.values():
            for name, values in metrics.items():
                metrics[name] = [torch.stack(values).mean().item()]
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Walks the whole model at every step, for a number that packed sequences make wrong.
        return 0

    def _send_telemetry(self) -> None:
        # Nothing leaves a machine that may hold credentialed data.
        pass


class UnlearnTrainer(FineTuneTrainer):
    """
    Unlearn by a gradient method. A batch mixes images with rows to forget and images without.

    The reference of a method that needs one is, where an adapter is trained, the model with the adapter off, and else
    a frozen copy of the model or the checkpoint that the method names.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that knows what is to be forgotten.
        args ([`~unlearn.config.UnlearnConfig`]):
            Training arguments, the method among them.
        train_dataset ([`~datasets.Dataset`]):
            Examples of [`~unlearn.packing.group_by_image`], with rows to forget.
        processing_class ([`~transformers.ProcessorMixin`]):
            The model's processor.
        data_collator ([`~unlearn.packing.RowCollator`], *optional*):
            As in [`FineTuneTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the model.
        callbacks (`Sequence[TrainerCallback]`, *optional*, defaults to `()`):
            Other callbacks.

    Raises:
        UserError: If the dataset has no rows to forget, or the reference cannot be loaded.
    """

    args: UnlearnConfig
    loss_is_scaled_for_ga = False

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
        self.has_forget = [any(row["forget"] for row in rows) for rows in train_dataset["rows"]]
        if not any(self.has_forget):
            raise UserError("the dataset has no rows to forget")
        uses_adapter = peft_config is not None or isinstance(model, PeftModel)
        self.reference: nn.Module | None = None
        if self.method.needs_reference and self.method.reference != INITIAL:
            self.reference, _ = load_checkpoint(str(self.method.reference))
        elif self.method.needs_reference and not uses_adapter:
            # Copied here, before the trainer patches the model's forward: a later copy would call the original's.
            self.reference = copy.deepcopy(model)
        super().__init__(model, args, train_dataset, processing_class, data_collator, peft_config, callbacks)
        self.model_accepts_loss_kwargs = False
        if self.reference is not None:
            self.reference.eval().requires_grad_(False).to(self.accelerator.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        reference_logits = self.reference_logits(model, inputs) if self.method.needs_reference else None
        logits, targets, row_index = answer_logits(model, inputs)  # (N, V), (N,), (N,)
        batch = AnswerBatch(
            logits=logits,
            log_probs=_token_log_probs(logits, targets),
            row_index=row_index,
            forget=inputs["forget"],
            **self._reference_values(reference_logits, targets),
        )
        loss, components = self.method.loss(batch)
        metrics = self._metrics["train" if model.training else "eval"]
        for name, value in components.items():
            metrics[name].append(value.detach())
        return loss

    def _reference_values(self, logits: torch.Tensor | None, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the method uses of the reference, as fields of [`AnswerBatch`]."""
        if logits is None:
            return {}
        if self.method.needs_reference == "logits":
            return {"reference_logits": logits}
        return {"reference_log_probs": _token_log_probs(logits, targets)}

    @torch.no_grad()
    def reference_logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of the reference at the answer tokens, of shape `(N, V)`."""
        if self.reference is not None:
            return answer_logits(self.reference, inputs)[0]
        with self.accelerator.unwrap_model(model).disable_adapter():
            return answer_logits(model, inputs)[0]

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler[int]:
        return MixedSampler(self.has_forget, self.args.forget_per_step, self.args.retain_per_step, self.args.seed)


def _token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats, of shape `(N,)`, of each target under logits of shape `(N, V)`."""
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")


class MixedSampler(Sampler[int]):
    """
    Order of images in which every batch has as many with rows to forget, and as many without, as asked.

    An epoch passes once over the images with rows to forget; the last batch is filled up from the first ones of the
    pass. Images without are drawn in passes of their own. The order depends on the seed and the epoch only.

    Args:
        has_forget (`Sequence[bool]`):
            For every image, whether it has rows to forget.
        forget_per_step (`int`):
            Images with such rows in a batch.
        retain_per_step (`int`):
            Images without in a batch.
        seed (`int`):
            Seed of the order.
    """

    def __init__(self, has_forget: Sequence[bool], forget_per_step: int, retain_per_step: int, seed: int):
        self.forget = [i for i, flag in enumerate(has_forget) if flag]
        self.retain = [i for i, flag in enumerate(has_forget) if not flag]
        size = forget_per_step + retain_per_step
        self.forget_per_step = 0 if not self.forget else forget_per_step if self.retain else size
        self.retain_per_step = size - self.forget_per_step
        leading = (self.forget, self.forget_per_step) if self.forget_per_step else (self.retain, self.retain_per_step)
        self.steps = -(-len(leading[0]) // leading[1])
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (`int`, from 0)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * (self.forget_per_step + self.retain_per_step)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        forget = _passes(self.forget, generator) if self.forget_per_step else iter(())
        retain = _passes(self.retain, generator) if self.retain_per_step else iter(())
        for _ in range(self.steps):
            yield from (next(forget) for _ in range(self.forget_per_step))
            yield from (next(retain) for _ in range(self.retain_per_step))


def _passes(items: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """Shuffled passes over the items, without end."""
    while True:
        yield from (items[i] for i in torch.randperm(len(items), generator=generator).tolist())
