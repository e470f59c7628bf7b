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


REDUCTIONS = ("token_mean", "row_sum")
"""How [`AnswerBatch.mean`] reduces values of answer tokens."""


def argument(default: Any, help: str, source: str) -> Any:
    """A hyper-parameter of a method: its default, what it does in a sentence, and where the default comes from."""
    return field(default=default, metadata={"help": help, "source": source})


@dataclass(frozen=True)
class AnswerBatch:
    """
    The answer tokens of a batch, as a gradient method sees them. N tokens of R rows over a vocabulary of V.

    Every mean over tokens or rows that enters a loss is taken by this class. A step may have several batches, one
    after the other and on several processes: a mean is then this batch's share of the mean over the whole step, so
    that the shares add up to it however the rows are spread. A mean over no token or row is 0 with a gradient of 0.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`, nats):
            Log-probability of each answer token.
        row_index (`torch.Tensor` of shape `(N,)`):
            Row of each token, from 0 to R - 1.
        forget (`torch.Tensor` of shape `(R,)`, bool):
            Whether a row is to be forgotten.
        logits (`torch.Tensor` of shape `(N, V)`, *optional*):
            Logits at the positions that predict the answer tokens, for methods with `needs_reference = "logits"`.
        reference_logits (`torch.Tensor` of shape `(N, V)`, *optional*):
            The same of the reference model, without gradient, for methods with `needs_reference = "logits"`.
        reference_log_probs (`torch.Tensor` of shape `(N,)`, nats, *optional*):
            The same of the reference model, without gradient, for methods with `needs_reference = "log_probs"`.
        totals (`torch.Tensor` of shape `(2, 2)`, *optional*):
            How many tokens (first row) and rows (second row) there are to retain (first column) and to forget (second
            column) in the whole step. Counted in this batch if not given.
    """

    log_probs: torch.Tensor
    row_index: torch.Tensor
    forget: torch.Tensor
    logits: torch.Tensor = None  # type: ignore[assignment]
    reference_logits: torch.Tensor = None  # type: ignore[assignment]
    reference_log_probs: torch.Tensor = None  # type: ignore[assignment]
    totals: torch.Tensor = None  # type: ignore[assignment]

    def __post_init__(self):
        if self.totals is None:
            object.__setattr__(self, "totals", count_answers(self.row_index, self.forget))

    def tokens_of(self, forget: bool) -> torch.Tensor:
        """Mask of shape `(N,)` of the tokens of forget rows, or of retain rows."""
        return self.forget[self.row_index] == forget

    def token_mean(self, values: torch.Tensor, forget: bool) -> torch.Tensor:
        """Mean of `values` of shape `(N,)` over the tokens of forget rows, or of retain rows."""
        return (values * self.tokens_of(forget)).sum() / self.totals[0, int(forget)].clamp(min=1)

    def row_mean(self, values: torch.Tensor, forget: bool) -> torch.Tensor:
        """Mean of `values` of shape `(R,)` over forget rows, or over retain rows."""
        return (values * (self.forget == forget)).sum() / self.totals[1, int(forget)].clamp(min=1)

    def mean(self, values: torch.Tensor, forget: bool, reduction: str) -> torch.Tensor:
        """
        Mean of `values` of shape `(N,)` over the tokens of forget or retain rows (`reduction` `"token_mean"`), or of
        their sums over the tokens of each row (`"row_sum"`).
        """
        if reduction == "row_sum":
            return self.row_mean(self.row_sums(values), forget)
        return self.token_mean(values, forget)

    def row_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` of shape `(N,)` over the tokens of each row, of shape `(R,)`."""
        return values.new_zeros(len(self.forget)).index_add(0, self.row_index, values)

    def cross_entropy(self, forget: bool, reduction: str = "token_mean") -> torch.Tensor:
        """Cross-entropy in nats over forget rows, or over retain rows, reduced as [`AnswerBatch.mean`] does."""
        return -self.mean(self.log_probs, forget, reduction)


def count_answers(row_index: torch.Tensor, forget: torch.Tensor) -> torch.Tensor:
    """
    How many tokens and rows are to retain and to forget.

    Args:
        row_index (`torch.Tensor` of shape `(N,)`):
            Row of each answer token, from 0 to R - 1.
        forget (`torch.Tensor` of shape `(R,)`, bool):
            Whether a row is to be forgotten.

    Returns:
        `torch.Tensor` of shape `(2, 2)`: Tokens, then rows; of each those to retain, then those to forget.
    """
    tokens, rows = forget[row_index], forget
    return torch.stack([torch.stack([(~kind).sum(), kind.sum()]) for kind in (tokens, rows)])


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
        reference_sides (`tuple[str, ...]`):
            Which rows it compares with the reference: `"forget"`, `"retain"` or both. Those of images without such
            rows are not computed.
    """

    uses_gradients = True
    needs_reference: ClassVar[Literal["log_probs", "logits"] | None] = None
    reference_sides: ClassVar[tuple[str, ...]] = ("forget", "retain")
    reference: str | None = INITIAL

    def compares(self, forget: bool) -> bool:
        """Whether the loss compares forget rows, or retain rows, with the reference."""
        return ("forget" if forget else "retain") in self.reference_sides

    @abstractmethod
    def loss(self, batch: AnswerBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            batch ([`AnswerBatch`]):
                Answers of the batch.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The loss to minimise, a scalar, and terms of it for the
            log, not weighted, each a mean of [`AnswerBatch`]. The cross-entropies of both sides are logged anyway.
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
                Examples of [`~unlearn.grouping.group_by_image`], with rows to forget and rows to retain.

        Returns:
            `dict[str, Any]`: Small facts about what was changed, for `medforget.json`; of zeroed channels also
            `channels` and `scores`, lists by module name, which get a file of their own.
        """
