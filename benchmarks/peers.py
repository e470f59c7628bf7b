"""What other projects' training loops do, written anew: the other side of every measurement.

Sources. Of the first, copies of the loops are in MMUnlearner as well, where they were read:

- MLLMU-Bench, https://github.com/franciscoliu/MLLMU-Bench: `finetune.py`, `baselines/GA_Difference.py`,
  `baselines/KL_Min.py`, `baselines/NPO.py`, `data_process/data_preprocess.py`.
- MedForget's authors, https://github.com/fengli-wu/MedForget: `finetune.py`.
- MMUnlearner, https://github.com/Z1zs/MMUnlearner: `baselines/MLLMU_KL_Min.py`, `baselines/MLLMU_NPO.py`.
- MANU, https://github.com/franciscoliu/MANU: `prune/prune_utility.py`.

All of them have one padded row a question, four rows a batch, and the model's own loss over the logits of all
positions. MLLMU-Bench labels every token but padding, and so do we for the authors' code, whose collator is not
released. Each loop is a generator that yields after every step, so that steps can be
timed from outside. Two things are better here than there: rows are tokenised and images processed only once, as our
own collator does, and AdamW is the one of PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, ProcessorMixin

from unlearn.lora import LANGUAGE_LINEAR, make_lora_config


Batch = dict[str, torch.Tensor]
IGNORED = -100


class PaddedRows:
    """
    Batches of rows, each a whole conversation with its own image, padded on the right.

    Labels are the tokens themselves, prompt and image included, but for the padding (MLLMU-Bench,
    `data_process/data_preprocess.py`).

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of a Qwen2.5-VL checkpoint.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where batches go.
    """

    def __init__(self, processor: ProcessorMixin, device: str = "cpu"):
        self.processor: Any = processor
        self.device = device
        self._rows: dict[str, Batch] = {}
        self._pixels: dict[str, torch.Tensor] = {}

    def encode(self, key: str, image: Any, row: dict[str, Any]) -> Batch:
        """The processor's output for one row, kept for the next time. Rows of one image share its pixels."""
        if row["id"] not in self._rows:
            question = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            answer = [{"type": "text", "text": row["answer"]}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=False)
            picture = datasets.Image().decode_example(image).convert("RGB")
            encoded = dict(self.processor(text=[text], images=[picture], return_tensors="pt"))
            encoded["pixel_values"] = self._pixels.setdefault(key, encoded["pixel_values"])
            self._rows[row["id"]] = encoded
        return self._rows[row["id"]]

    def __call__(self, rows: Sequence[tuple[str, Any, dict[str, Any]]]) -> Batch:
        """
        Args:
            rows (`Sequence[tuple[str, Any, dict]]`):
                For each row the key of its image, the image, and the row.

        Returns:
            `dict[str, torch.Tensor]`: The model's inputs and `labels` of shape `(B, L)`, on the device.
        """
        encoded = [self.encode(*row) for row in rows]
        vision = ("pixel_values", "image_grid_thw")
        batch = {name: torch.cat([one[name] for one in encoded]) for name in vision}
        for name in encoded[0].keys() - set(vision):
            padding = self.processor.tokenizer.pad_token_id if name == "input_ids" else 0
            batch[name] = pad_sequence([one[name][0] for one in encoded], batch_first=True, padding_value=padding)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return {name: value.to(self.device) for name, value in batch.items()}


def adapted(model: PreTrainedModel) -> nn.Module:
    """LoRA of rank 16 and scale 16 on the language model, in the type of the weights (MedForget's authors)."""
    config = make_lora_config(model, r=16, alpha=16, dropout=0.05, targets=LANGUAGE_LINEAR)
    config.init_lora_weights = "gaussian"
    return get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]


def frozen_copy(model: nn.Module) -> nn.Module:
    """A second model that does not learn: KL-Min's vanilla model, NPO's oracle."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def make_optimizer(model: nn.Module) -> Optimizer:
    """AdamW over all parameters, at MLLMU-Bench's learning rate and PyTorch's other values."""
    return AdamW(model.parameters(), lr=2e-5)


def _update(loss: torch.Tensor, optimizer: Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fine_tune(model: nn.Module, batches: Iterable[Batch], optimizer: Optimizer) -> Iterator[float]:
    """Cross-entropy, with gradients clipped at norm 1 (MedForget's authors, `finetune.py`)."""
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def forget_epoch(model: nn.Module, batches: Iterable[Batch], optimizer: Optimizer) -> Iterator[float]:
    """Gradient ascent on the rows to forget (MLLMU-Bench, `baselines/GA_Difference.py` and `KL_Min.py`)."""
    for batch in batches:
        loss = -model(**batch).loss
        _update(loss, optimizer)
        yield loss.item()


def grad_diff_retain_epoch(model: nn.Module, batches: Iterable[Batch], optimizer: Optimizer) -> Iterator[float]:
    """Cross-entropy on the rows to retain, after the forget epoch (MLLMU-Bench, `baselines/GA_Difference.py`)."""
    for batch in batches:
        loss = model(**batch).loss
        _update(loss, optimizer)
        yield loss.item()


def kl_min_retain_epoch(
    model: nn.Module, batches: Iterable[Batch], optimizer: Optimizer, vanilla: nn.Module
) -> Iterator[float]:
    """
    Cross-entropy plus divergence from the vanilla model on the rows to retain, after the forget epoch (MLLMU-Bench,
    `baselines/KL_Min.py`). The divergence is over all positions, padding too, divided by the number of rows alone.
    """
    for batch in batches:
        current = model(**batch)
        with torch.no_grad():
            original = vanilla(**batch)
        divergence = functional.kl_div(
            functional.log_softmax(current.logits, dim=-1),  # (B, L, V)
            functional.softmax(original.logits, dim=-1),
            reduction="batchmean",
        )
        loss = current.loss + divergence
        _update(loss, optimizer)
        yield loss.item()


def npo_epoch(
    model: nn.Module, batches: Iterable[Batch], optimizer: Optimizer, oracle: nn.Module, beta: float = 0.4
) -> Iterator[float]:
    """
    NPO on the rows to forget, on the difference of the two models' mean losses of the batch; there is no retain epoch
    (MLLMU-Bench, `baselines/NPO.py`, whose β this is).
    """
    for batch in batches:
        current = model(**batch).loss
        with torch.no_grad():
            reference = oracle(**batch).loss
        loss = -functional.logsigmoid(beta * (current - reference)) * 2 / beta
        _update(loss, optimizer)
        yield loss.item()


class ChannelSums:
    """Running sums over the outputs of linear layers, on their device: size, square, and how many."""

    def __init__(self, layers: dict[str, nn.Module]):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = [layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            z = output.detach().flatten(0, -2).float().clamp(-1e3, 1e3)
            sums = torch.stack([z.abs().sum(0), z.sum(0), z.square().sum(0)])  # (3, C)
            self.sums[name] = self.sums.get(name, 0) + sums
            self.counts[name] = self.counts.get(name, 0) + len(z)

        return add

    def importance(self, name: str) -> torch.Tensor:
        """Mean size, standard deviation and root mean square of each output, of shape `(3, C)`."""
        size, mean, square = self.sums[name] / self.counts[name]
        return torch.stack([size, (square - mean.square()).clamp(min=0).sqrt(), square.sqrt()])

    def remove(self) -> None:
        """Stop listening."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def manu(
    model: PreTrainedModel, forget: Sequence[Batch], retain: Sequence[Batch], share: float = 0.02
) -> Iterator[float]:
    """
    Prune the outputs of MLP projections that are larger on the rows to forget than on those to retain, in the last
    three layers of either tower (MANU's released code, `prune/prune_utility.py`). The vision tower sees images only,
    the language model text only.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".mlp." in name and "merger" not in name and _in_last_three(name, model)
    }
    image_token = model.config.image_token_id
    seen: list[ChannelSums] = []
    for batches in (forget, retain):
        sums = ChannelSums(layers)
        for batch in batches:
            grid = batch["image_grid_thw"]
            model.model.visual(batch["pixel_values"].to(model.dtype), grid_thw=grid)
            text = [ids[(ids != image_token) & (mask > 0)] for ids, mask in _rows_of(batch)]
            ids = pad_sequence(text, batch_first=True)
            mask = pad_sequence([torch.ones_like(row) for row in text], batch_first=True)
            model.model.language_model(input_ids=ids, attention_mask=mask, use_cache=False)
            yield 0.0
        sums.remove()
        seen.append(sums)
    weights = torch.tensor([2.0, 2.0, 2.0], device=model.device)[:, None]
    for vision in (True, False):
        names = [name for name in layers if ("visual" in name) == vision]
        ratios = [seen[0].importance(name) / (seen[1].importance(name) + 1e-5) - 1 for name in names]
        scores = torch.cat([(weights * ratio).sum(0) for ratio in ratios])
        worst = scores.topk(max(1, round(share * len(scores)))).indices
        offset = 0
        for name in names:
            layer: Any = layers[name]
            own = worst[(worst >= offset) & (worst < offset + layer.out_features)] - offset
            layer.weight[own] = 0
            if layer.bias is not None:
                layer.bias[own] = 0
            offset += layer.out_features


def _rows_of(batch: Batch) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


def _in_last_three(name: str, model: PreTrainedModel) -> bool:
    config = model.config
    depth = config.vision_config.depth if "visual" in name else config.get_text_config().num_hidden_layers
    number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return number >= depth - 3
