"""A few steps of a training loop, ours or the peers', on one model and set of images, with their figures."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from unlearn.answers import answer_logits
from unlearn.config import FineTuneConfig, UnlearnConfig
from unlearn.grouping import split_by_kind
from unlearn.methods import EditingMethod, make_method
from unlearn.packing import IGNORED, PackedCollator
from unlearn.reference import reference_log_probs
from unlearn.trainer import FineTuneTrainer, UnlearnTrainer

from . import peers
from .alone import Step, summarise
from .flops import Work, training_flops, work_of
from .measure import PeakMemory, Timer, weight_bytes, weight_shapes
from .shapes import make_examples, make_model
from .variant import ROWS_PER_BATCH, Variant


LORA_RANK = 16
# MLLMU-Bench's forms, which the peer loops have too: an epoch of rows to forget before one of rows to retain.
METHOD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "grad_diff": {},
    "kl_min": {"retain_weight": 1.0, "kl_reduction": "row_sum"},
    "npo": {"beta": 0.4, "retain_weight": 0.0, "log_ratio": "mean", "reference": "initial"},
}


def _with_both_kinds(example: dict[str, Any]) -> dict[str, Any]:
    """Every other row is to be forgotten, as where sections are forgotten."""
    return {"rows": [{**row, "forget": number % 2 == 0} for number, row in enumerate(example["rows"])]}


def measure(variant: Variant) -> dict[str, Any]:
    """
    Train for a few steps.

    Returns:
        `dict[str, Any]`: The figures of [`~benchmarks.alone.summarise`], `peak_bytes` (above the model),
        `model_bytes` (weight matrices before), `weights_held` (weight matrices after, as a multiple of those before),
        `tokens_per_row` (question and answer) and `parameters`.
    """
    torch.set_num_threads(variant.threads)
    on_gpu = variant.device == "cuda"
    model, processor = make_model(
        variant.shape,
        variant.image_size,
        device=variant.device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    examples = make_examples(variant.images, variant.questions, variant.image_size)
    if variant.schedule == "interleaved":
        examples = examples.map(_with_both_kinds, keep_in_memory=True)
    if variant.method == "npo":
        # There is no retain epoch in the peers' loop.
        examples = examples.filter(lambda example: example["rows"][0]["forget"], keep_in_memory=True)
    shapes, parameters = weight_shapes(model), sum(parameter.numel() for parameter in model.parameters())
    loop: Any = (OurLoop if variant.side == "ours" else PeerLoop)(variant, model, processor, examples)
    model_bytes = weight_bytes(shapes)
    if not on_gpu:
        _touch_libraries(model, loop.sample)
    memory = PeakMemory(variant.device)
    steps = loop.run()
    return {
        **summarise(steps, variant.warm_up if variant.method != "manu" else 0, loop.extra_seconds_per_row),
        "peak_bytes": memory.bytes_above(),
        "model_bytes": model_bytes,
        "weights_held": weight_bytes(shapes, loop.optimizer_state()) / model_bytes,
        "tokens_per_row": loop.tokens_per_row,
        "parameters": parameters,
    }


def _touch_libraries(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Run what a step runs, once and on the CPU, so that loading its code is not taken for memory of the loop."""
    logits, targets, _ = answer_logits(model, {"row_index": torch.zeros_like(batch["labels"]), **batch})
    torch.nn.functional.cross_entropy(logits.float(), targets).backward()
    model.zero_grad()


class OurLoop:
    """Our trainers, on image-packed sequences, with the logging off."""

    def __init__(
        self, variant: Variant, model: PreTrainedModel, processor: ProcessorMixin, examples: datasets.Dataset
    ):
        self.variant, self.model, self.processor, self.examples = variant, model, processor, examples
        self.collator = PackedCollator(processor)
        packed = [self.collator([example]) for example in examples]  # processes images and texts
        self.tokens_per_row = sum(int((b["row_index"] >= 0).sum()) for b in packed) / sum(map(_rows, packed))
        self.sample = packed[0]
        self.extra_seconds_per_row = 0.0
        self.trainer: Any = None

    def optimizer_state(self) -> Iterator[torch.Tensor]:
        """Tensors of the optimizer."""
        if self.trainer is not None:
            optimizer = self.trainer.optimizer
            yield from _tensors(getattr(optimizer, "optimizer", optimizer))

    def run(self) -> list[Step]:
        """Train for an epoch."""
        variant = self.variant
        if variant.method == "manu":
            return self._edit()
        with tempfile.TemporaryDirectory(prefix="medforget-") as scratch:
            self.trainer = self._make_trainer(scratch)
            clock = StepClock(variant.device)
            self.trainer.add_callback(clock)
            self.trainer.remove_callback(PrinterCallback)
            if variant.method == "npo":
                self.extra_seconds_per_row = self._reference_seconds()
            self.trainer.train()
        return self._steps(clock.seconds)

    def _make_trainer(self, folder: str) -> FineTuneTrainer:
        variant = self.variant
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": variant.device == "cpu",
            "use_peft": variant.lora,
            "activation_checkpointing": variant.checkpointing,
            "learning_rate": 2e-5,
            "num_train_epochs": 1,
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        if variant.method == "finetune":
            config = FineTuneConfig(per_device_train_batch_size=variant.images_per_step, **arguments)
            return FineTuneTrainer(self.model, config, self.examples, self.processor, data_collator=self.collator)
        per_step = {"forget_per_step": variant.images_per_step, "retain_per_step": 0}
        method = {"method": variant.method, "method_args": METHOD_ARGUMENTS[variant.method]}
        config = UnlearnConfig(schedule=variant.schedule, **per_step, **method, **arguments)
        return UnlearnTrainer(self.model, config, self.examples, self.processor, data_collator=self.collator)

    def _reference_seconds(self) -> float:
        """What the reference's log-probabilities, computed before training, cost a row that is seen once."""
        timer = Timer(self.variant.device)
        trainer = self.trainer
        with trainer.accelerator.autocast():
            known = reference_log_probs(
                trainer.model, self.collator, self.examples, trainer.method, trainer.accelerator, quiet=True
            )
        return timer.lap() / len(known)

    def _steps(self, seconds: list[float]) -> list[Step]:
        parted = split_by_kind(self.examples) if self.variant.schedule == "sequential" else self.examples
        dataset = self.examples if self.variant.method == "finetune" else parted
        steps = []
        for images, duration in zip(self.trainer.batches, seconds, strict=True):
            batch = self.collator([dataset[i] for i in images])
            kind = _kind(batch["forget"]) if self.variant.method != "finetune" else "all"
            answers = int((batch["labels"] != IGNORED).sum())
            work = work_of(batch, projected=answers)
            steps.append(_step(self.variant, self.model, kind, _rows(batch), duration, work))
        return steps

    def _edit(self) -> list[Step]:
        method = make_method(self.variant.method)
        assert isinstance(method, EditingMethod)
        timer = Timer(self.variant.device)
        method.edit(self.model, self.processor, self.examples)
        seconds = timer.lap()
        batches = [self.collator([example]) for example in self.examples]
        work = sum((work_of(batch, projected=0) for batch in batches), Work())
        return [_step(self.variant, self.model, "all", sum(map(_rows, batches)), seconds, work)]


class StepClock(TrainerCallback):
    """Seconds of every step, from the end of the one before."""

    def __init__(self, device: str):
        self.timer = Timer(device)
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.timer.restart()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.timer.lap())


class PeerLoop:
    """The loops of [`benchmarks.peers`], on one padded row a question."""

    def __init__(
        self, variant: Variant, model: PreTrainedModel, processor: ProcessorMixin, examples: datasets.Dataset
    ):
        self.variant = variant
        self.model: Any = peers.adapted(model) if variant.lora else model
        self.base = model
        self.collator = peers.PaddedRows(processor, variant.device)
        rows = [(example["key"], example["image"], row) for example in examples for row in example["rows"]]
        random.Random(0).shuffle(rows)
        self.rows = {True: [r for r in rows if r[2]["forget"]], False: [r for r in rows if not r[2]["forget"]]}
        self.all_rows = rows
        lengths = [self.collator.encode(*row)["input_ids"].numel() for row in rows]  # processes images and texts
        self.tokens_per_row = sum(lengths) / len(lengths)
        self.sample = self.collator(rows[:1])
        self.extra_seconds_per_row = 0.0
        self.optimizer: Any = None
        if variant.checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable()

    def optimizer_state(self) -> Iterator[torch.Tensor]:
        """Tensors of the optimizer."""
        if self.optimizer is not None:
            yield from _tensors(self.optimizer)

    def run(self) -> list[Step]:
        """Train for as many steps of each kind as are asked for."""
        variant, model = self.variant, self.model
        if variant.method == "manu":
            return self._edit()
        # Kept: it is a part of what the loop holds.
        self.reference = peers.frozen_copy(model) if variant.method in ("kl_min", "npo") else None
        self.optimizer = optimizer = peers.make_optimizer(model)
        model.train()
        if variant.method == "finetune":
            batches = self._batches(self.all_rows)
            return self._timed("all", peers.fine_tune(model, batches, optimizer))
        forget, retain = self._batches(self.rows[True]), self._batches(self.rows[False])
        if variant.method == "npo":
            return self._timed("forget", peers.npo_epoch(model, forget, optimizer, self.reference))
        steps = self._timed("forget", peers.forget_epoch(model, forget, optimizer))
        if variant.method == "grad_diff":
            return steps + self._timed("retain", peers.grad_diff_retain_epoch(model, retain, optimizer))
        return steps + self._timed("retain", peers.kl_min_retain_epoch(model, retain, optimizer, self.reference))

    def _batches(self, rows: list) -> Iterator[peers.Batch]:
        size = ROWS_PER_BATCH
        self.seen: list[tuple[int, Work]] = []
        for number in range(min(self.variant.warm_up + self.variant.steps, len(rows) // size)):
            batch = self.collator(rows[number * size : (number + 1) * size])
            self.seen.append((len(batch["input_ids"]), work_of(batch)))
            yield batch

    def _timed(self, kind: str, loop: Iterator[float]) -> list[Step]:
        timer = Timer(self.variant.device)
        self.seen = []
        seconds = [timer.lap() for _ in loop]
        return [
            _step(self.variant, self.base, kind, rows, duration, work)
            for (rows, work), duration in zip(self.seen, seconds, strict=True)
        ]

    def _edit(self) -> list[Step]:
        size = ROWS_PER_BATCH
        sides = []
        # MANU caps the rows to retain at the number of those to forget; here there are as many.
        for forget in (True, False):
            rows = self.rows[forget]
            sides.append([self.collator(rows[i : i + size]) for i in range(0, len(rows), size)])
        timer = Timer(self.variant.device)
        for _ in peers.manu(self.base, *sides):
            pass
        seconds = timer.lap()
        work = sum((work_of(batch, projected=0) for side in sides for batch in side), Work())
        return [_step(self.variant, self.base, "all", len(self.all_rows), seconds, work)]


def _step(variant: Variant, model: Any, kind: str, rows: int, seconds: float, work: Work) -> Step:
    """A step, with the operations that its method needs."""
    compared = variant.method == "npo" or (variant.method == "kl_min" and kind != "forget")
    trained, reference = (Work(), work) if variant.method == "manu" else (work, work if compared else Work())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rank = LORA_RANK if variant.lora else None
    return Step(kind, rows, seconds, work.tokens, training_flops(base.config, trained, reference, rank))


def _kind(forget: torch.Tensor) -> str:
    if forget.all():
        return "forget"
    return "mixed" if forget.any() else "retain"


def _rows(batch: dict[str, torch.Tensor]) -> int:
    return len(batch["forget"])


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
