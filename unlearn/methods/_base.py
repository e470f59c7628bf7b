"""What a method is, and what a gradient method sees of a batch."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import datasets
import torch
from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset.errors import UserError


INITIAL = "initial"
"""The name of the reference that is the model as it was before unlearning."""


def argument(default: Any, help: str, source: str) -> Any:
    """A hyper-parameter of a method: its default, what it does in a sentence, and where the default comes from."""
    return field(default=default, metadata={"help": help, "source": source})


@dataclass(frozen=True)
class AnswerBatch:
    """
    The answer tokens of a batch, as a gradient method sees them. N tokens of R rows over a vocabulary of V.

    Every mean over tokens or rows that enters a loss is taken by this class, and is 0 with a gradient of 0 where the
    batch has no such token or row.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            Logits at the positions that predict the answer tokens.
        log_probs (`torch.Tensor` of shape `(N,)`, nats):
            Log-probability of each answer token.
        row_index (`torch.Tensor` of shape `(N,)`):
            Row of each token, from 0 to R - 1.
        forget (`torch.Tensor` of shape `(R,)`, bool):
            Whether a row is to be forgotten.
        reference_logits (`torch.Tensor` of shape `(N, V)`, *optional*):
            The same of the reference model, without gradient, for methods with `needs_reference = "logits"`.
        reference_log_probs (`torch.Tensor` of shape `(N,)`, nats, *optional*):
            The same of the reference model, without gradient, for methods with `needs_reference = "log_probs"`.
    """

    logits: torch.Tensor
    log_probs: torch.Tensor
    row_index: torch.Tensor
    forget: torch.Tensor
    reference_logits: torch.Tensor = None  # type: ignore[assignment]
    reference_log_probs: torch.Tensor = None  # type: ignore[assignment]

    def tokens_of(self, forget: bool) -> torch.Tensor:
        """Mask of shape `(N,)` of the tokens of forget rows, or of retain rows."""
        return self.forget[self.row_index] == forget

    def token_mean(self, values: torch.Tensor, forget: bool) -> torch.Tensor:
        """Mean of `values` of shape `(N,)` over the tokens of forget rows, or of retain rows."""
        mask = self.tokens_of(forget)
        return (values * mask).sum() / mask.sum().clamp(min=1)

    def row_mean(self, values: torch.Tensor, forget: bool) -> torch.Tensor:
        """Mean of `values` of shape `(R,)` over forget rows, or over retain rows."""
        mask = self.forget == forget
        return (values * mask).sum() / mask.sum().clamp(min=1)

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` of shape `(N,)` over the tokens of each row, of shape `(R,)`."""
        return values.new_zeros(len(self.forget)).index_add(0, self.row_index, values)

    def cross_entropy(self, forget: bool) -> torch.Tensor:
        """Cross-entropy in nats, mean over the answer tokens of forget rows, or of retain rows."""
        return -self.token_mean(self.log_probs, forget)


class Method(ABC):
    """
    An unlearning method. A subclass is a frozen dataclass whose fields, each made by [`argument`], are its
    hyper-parameters; an instance is the method with its hyper-parameters chosen.

    Attributes:
        name (`str`):
            Name on the command line and in reports.
        title (`str`):
            Name in tables.
        presets (`Mapping[str, Mapping[str, Any]]`):
            Named choices of hyper-parameters and training arguments.
        uses_gradients (`bool`):
            Whether the method trains ([`GradientMethod`]) or edits the weights once ([`EditingMethod`]).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    uses_gradients: ClassVar[bool]

    def arguments(self) -> dict[str, Any]:
        """The hyper-parameters with their values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def check(self, condition: bool, argument: str, requirement: str) -> None:
        """Raise a `UserError` that names the hyper-parameter unless `condition` holds."""
        if not condition:
            raise UserError(f"{self.name}: {argument} is {getattr(self, argument)!r}; it must be {requirement}")


class GradientMethod(Method):
    """
    A method that is a loss over the answers of a batch with forget and retain rows.

    Attributes:
        needs_reference (`"log_probs"` or `"logits"`, *optional*):
            What the loss uses of a reference model, if anything.
        reference (`str`):
            Which model that is: `"initial"`, the model before unlearning, or a checkpoint's path.
    """

    uses_gradients = True
    needs_reference: ClassVar[Literal["log_probs", "logits"] | None] = None
    reference: str | None = INITIAL

    @abstractmethod
    def loss(self, batch: AnswerBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            batch ([`AnswerBatch`]):
                Answers of the batch.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The loss to minimise, a scalar, and its components for the
            log, which have not been weighted.
        """


class EditingMethod(Method):
    """A method that changes the weights once, without training."""

    uses_gradients = False

    @abstractmethod
    def edit(self, model: PreTrainedModel, processor: ProcessorMixin, grouped: datasets.Dataset) -> dict[str, Any]:
        """
        Change the model in place.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Model to change.
            processor ([`~transformers.ProcessorMixin`]):
                Its processor.
            grouped ([`~datasets.Dataset`]):
                Examples of [`~unlearn.packing.group_by_image`], with rows to forget and rows to retain.

        Returns:
            `dict[str, Any]`: What was changed, for a JSON file beside the checkpoint.
        """
