"""What training and scoring read of a forward pass: the model's distributions at the answer tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import datasets
import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from medforget_dataset.errors import UserError

from .grouping import patient_key
from .memory import in_batches_that_fit
from .packing import IGNORED, PackedCollator, packed_attention_mask


# Columns of a batch that losses read and the model does not take.
NOT_FOR_THE_MODEL = ("labels", "row_index", "forget", "reference_log_probs")


def model_inputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The tensors of a batch that the model's forward takes.

    A packed batch has no attention mask: it is made here, on the device and in the type of the computation, from the
    row that each token belongs to, so that no `(L, L)` matrix is kept or moved.
    """
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
    if "attention_mask" not in inputs:
        device = batch["row_index"].device.type
        # Fused attention wants the mask in the type of the queries.
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else next(model.parameters()).dtype
        inputs["attention_mask"] = packed_attention_mask(batch["row_index"], dtype)
    return inputs


def _bare(model: nn.Module) -> PreTrainedModel:
    """The model inside DDP, DeepSpeed and PEFT."""
    bare: Any = extract_model_from_parallel(model)
    return cast(PreTrainedModel, bare.get_base_model() if isinstance(bare, PeftModel) else bare)


@contextmanager
def _gathered_before_head(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Inside the context the vocabulary projection receives the hidden states `(N, H)` at a mask `(B, L)` only."""
    head = _bare(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][positions],))
    try:
        yield
    finally:
        handle.remove()


def answer_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Logits at the positions that predict an answer token. No other position reaches the vocabulary projection.

    Args:
        model (`torch.nn.Module`):
            A Qwen2.5-VL model, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed).
        batch (`dict[str, torch.Tensor]`):
            Batch of a collator of `unlearn.packing`, on the model's device.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Logits of shape `(N, V)`, answer tokens of shape `(N,)` and
        the row in the batch that each belongs to, of shape `(N,)`.
    """
    is_answer = batch["labels"][:, 1:] != IGNORED  # (B, L - 1)
    with _gathered_before_head(model, nn.functional.pad(is_answer, (0, 1))):
        logits = model(**model_inputs(model, batch), use_cache=False).logits  # (N, V)
    return logits, batch["labels"][:, 1:][is_answer], batch["row_index"][:, 1:][is_answer]


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats, of shape `(N,)`, of each target under logits of shape `(N, V)`."""
    return -nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def answer_log_probs(
    model: nn.Module, batch: dict[str, torch.Tensor], *, fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of the answer tokens.

    Args:
        model (`torch.nn.Module`):
            As in [`answer_logits`].
        batch (`dict[str, torch.Tensor]`):
            As in [`answer_logits`].
        fused (`bool`, *optional*, defaults to `False`):
            Use TRL's fused head, with which the `(N, V)` logits are never made. `SFTTrainer` adds it to its model. For
            GPUs: elsewhere it projects every position, and gathering the answers first takes two thirds of the time.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities of shape `(N,)`, nats, in the order of
        [`answer_logits`], and whether each answer token is the most probable one, of shape `(N,)`, bool.
    """
    if fused:
        outputs = model(**model_inputs(model, batch), labels=batch["labels"], fused_lm_head=True)
        answers = outputs.label_mask  # (B, L - 1)
        return outputs.log_probs[answers], outputs.is_top1[answers].bool()
    logits, targets, _ = answer_logits(model, batch)
    return token_log_probs(logits, targets), logits.argmax(-1) == targets


@dataclass(frozen=True)
class RowScores:
    """
    Teacher-forced scores of the rows of a batch.

    Attributes:
        exact (`torch.Tensor` of shape `(R,)`, bool):
            Whether the most probable token is the right one at every answer token and at the end token. Greedy
            generation then gives exactly the answer.
        log_probs (`torch.Tensor` of shape `(R,)`, nats):
            Log-probability of the answer, summed over its tokens and the end token.
        tokens (`torch.Tensor` of shape `(R,)`):
            Number of these tokens.
        token_log_probs (`torch.Tensor` of shape `(N,)`, nats):
            Log-probability of each of them, row after row.
        token_greedy (`torch.Tensor` of shape `(N,)`, bool):
            Whether each of them is the most probable one.
    """

    exact: torch.Tensor
    log_probs: torch.Tensor
    tokens: torch.Tensor
    token_log_probs: torch.Tensor
    token_greedy: torch.Tensor


@torch.no_grad()
def score_rows(model: nn.Module, batch: dict[str, torch.Tensor]) -> RowScores:
    """Score every row of a batch by teacher forcing. The arguments are those of [`answer_logits`]."""
    logits, targets, row_index = answer_logits(model, batch)
    log_probs = token_log_probs(logits, targets)  # (N,)
    greedy = logits.argmax(-1) == targets
    wrong = (~greedy).float()
    zeros = log_probs.new_zeros(len(batch["forget"]))  # (R,)
    return RowScores(
        exact=zeros.index_add(0, row_index, wrong) == 0,
        log_probs=zeros.index_add(0, row_index, log_probs),
        tokens=zeros.index_add(0, row_index, torch.ones_like(wrong)).long(),
        token_log_probs=log_probs,
        token_greedy=greedy,
    )


def score_dataset(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    grouped: datasets.Dataset,
    *,
    wrong_image: bool = False,
    with_image: bool = True,
    token_scores: bool = False,
    batch_size: int = 8,
    progress: str | None = None,
) -> list[dict[str, Any]]:
    """
    Score every row by teacher forcing, with the question as the row words it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to score.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        grouped ([`~datasets.Dataset`]):
            Examples of [`~unlearn.grouping.group_by_image`].
        wrong_image (`bool`, *optional*, defaults to `False`):
            Show each study the image of another patient: what is still answered was not read from the image.
        with_image (`bool`, *optional*, defaults to `True`):
            Whether the prompt holds an image at all.
        token_scores (`bool`, *optional*, defaults to `False`):
            Return what was found at each token too.
        batch_size (`int`, *optional*, defaults to `8`):
            Images in a batch; fewer where the memory does not suffice.
        progress (`str`, *optional*):
            Name of a progress bar over the images; none by default.

    Returns:
        `list[dict[str, Any]]`: For every row its `id`, `task`, `level`, `forget`, `exact` (`bool`), `log_prob` (nats,
        summed over the answer and the end token) and `tokens`; with `token_scores` also `token_log_probs`
        (`list[float]`, nats) and `token_greedy` (`list[bool]`, whether each token is the most probable one).

    Raises:
        UserError: If `wrong_image` is set and all images are of one patient.
    """
    image_of = _other_patients(grouped["key"]) if wrong_image else range(len(grouped))
    collator = PackedCollator(processor, with_image=with_image)

    def score(images: int) -> list[dict[str, Any]]:
        with tqdm(total=len(grouped), desc=progress, unit="image", disable=progress is None) as bar:
            return _score(model, collator, grouped, image_of, images, token_scores, bar)

    was_training = model.training
    model.eval()
    try:
        return in_batches_that_fit(score, batch_size)
    finally:
        model.train(was_training)


def _score(
    model: PreTrainedModel | PeftModel,
    collator: PackedCollator,
    grouped: datasets.Dataset,
    image_of: Sequence[int],
    batch_size: int,
    token_scores: bool,
    bar: tqdm,
) -> list[dict[str, Any]]:
    results = []
    for start in range(0, len(grouped), batch_size):
        examples = [
            {**grouped[image_of[i]], "rows": grouped[i]["rows"]}
            for i in range(start, min(start + batch_size, len(grouped)))
        ]
        batch = {name: value.to(model.device) for name, value in collator(examples).items()}
        scores = score_rows(model, batch)
        rows = [row for example in examples for row in example["rows"]]
        columns = (scores.exact.tolist(), scores.log_probs.tolist(), scores.tokens.tolist())
        for row, exact, log_prob, tokens in zip(rows, *columns, strict=True):
            identity = {name: row[name] for name in ("id", "task", "level", "forget")}
            results.append({**identity, "exact": exact, "log_prob": log_prob, "tokens": tokens})
        if token_scores:
            by_token = (scores.token_log_probs.tolist(), scores.token_greedy.tolist())
            start_of_row = 0
            for result in results[-len(rows) :]:
                own = slice(start_of_row, start_of_row + result["tokens"])
                result["token_log_probs"], result["token_greedy"] = (values[own] for values in by_token)
                start_of_row = own.stop
        bar.update(len(examples))
    return results


def _other_patients(keys: list[str]) -> list[int]:
    """For each image, the index of one of another patient, as far away in the order as that allows."""
    patients = [patient_key(key) for key in keys]
    if len(set(patients)) < 2:
        raise UserError(f"all images are of {patients[0]}; the wrong-image control needs a second patient")
    count = len(keys)
    others = []
    for i, patient in enumerate(patients):
        candidates = ((i + count // 2 + step) % count for step in range(count))
        others.append(next(j for j in candidates if patients[j] != patient))
    return others


def evaluate_exact_match(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    grouped: datasets.Dataset,
    *,
    wrong_image: bool = False,
    batch_size: int = 8,
) -> dict[str, float]:
    """
    Share of rows answered exactly, for every task and for `"all"`. The arguments are those of [`score_dataset`].

    Returns:
        `dict[str, float]`: Task to share between 0 and 1.
    """
    results = score_dataset(model, processor, grouped, wrong_image=wrong_image, batch_size=batch_size)
    exact: dict[str, list[bool]] = {}
    for result in results:
        for name in (result["task"], "all"):
            exact.setdefault(name, []).append(result["exact"])
    return {name: sum(values) / len(values) for name, values in sorted(exact.items())}
