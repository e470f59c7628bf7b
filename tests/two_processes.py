"""A program that a test starts on one process or on two: it trains, and writes losses and weights to a folder."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from stand_in import make_model, make_rows
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from unlearn.config import FineTuneConfig, UnlearnConfig
from unlearn.grouping import group_by_image
from unlearn.methods import METHODS, GradientMethod
from unlearn.trainer import FineTuneTrainer, UnlearnTrainer


GRADIENT_METHODS = [name for name, method in METHODS.items() if issubclass(method, GradientMethod)]
METHOD_OPTIONS = {"npo": {"beta": 0.5}, "grad_diff": {"forget_weight": 0.2}, "kl_min": {"forget_weight": 0.2}}
STEPS = 3
IMAGES_A_STEP = 4


def data():
    """Images with different numbers of rows, so that the means of the two processes' batches differ in weight."""
    rows = make_rows()
    grouped = group_by_image(rows, [i for i in rows["id"] if "study003" in i or "study001/findings" in i])
    grouped = grouped.map(lambda example, i: {"rows": example["rows"][2 * (i % 3) :]}, with_indices=True)
    return rows, grouped


def common(folder: Path, lora: bool) -> dict:
    accumulation = IMAGES_A_STEP // 2 // PartialState().num_processes
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        # Not Adam's: it makes whole steps of rounding errors where a gradient is nothing else.
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "gradient_accumulation_steps": accumulation,
        "use_peft": lora,
        "lora_dropout": 0.0,
    }


def train(kind: str, lora: bool, folder: Path) -> dict:
    """Losses and weights after a few steps of fine-tuning or of a method."""
    rows, grouped = data()
    torch.manual_seed(0)
    model, processor = make_model(rows)
    if kind == "finetune":
        config = FineTuneConfig(per_device_train_batch_size=2, **common(folder, lora))
        trainer = FineTuneTrainer(model, config, grouped, processor)
    else:
        batch = {"forget_per_step": 1, "retain_per_step": 1, "method_args": METHOD_OPTIONS.get(kind)}
        config = UnlearnConfig(method=kind, **batch, **common(folder, lora))
        trainer = UnlearnTrainer(model, config, grouped, processor)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda examples: seen.extend(e["key"] for e in examples) or collate(examples)
    trainer.train()
    losses = [line for line in trainer.state.log_history if "loss" in line]
    weights = {n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    return {"log": losses, "weights": weights, "images": seen, "world": trainer.accelerator.num_processes}


def shard(kind: str, folder: Path) -> dict:
    """One step of plain gradient descent of a method on a model sharded by FSDP2; on one process, not sharded."""
    rows, grouped = data()
    model, processor = make_model(rows)
    state = PartialState()
    config = UnlearnConfig(
        output_dir=str(folder), use_cpu=True, method=kind, method_args=METHOD_OPTIONS.get(kind), forget_per_step=1,
        retain_per_step=1, gradient_accumulation_steps=2 // state.num_processes, precompute_ref_log_probs=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = UnlearnTrainer(model, config, grouped, processor)
    facts = {"world": state.num_processes, "shards": {}}
    if state.num_processes > 1:
        mesh = init_device_mesh("cpu", (state.num_processes,))
        for block in (*model.model.visual.blocks, *model.model.language_model.layers):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        facts["shards"] = {n: p.to_local().detach().clone() for n, p in model.named_parameters()}
    batches = list(trainer.batches)[:2][state.process_index :: state.num_processes]
    inputs = [trainer.data_collator([grouped[i] for i in images]) for images in batches]
    totals = trainer._get_num_items_in_batch(inputs, torch.device("cpu"))
    losses = []
    for batch in inputs:
        loss, _ = trainer.loss_and_terms(model, batch, totals)
        # FSDP averages gradients over processes.
        (loss * state.num_processes).backward()
        losses.append(loss.detach())
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    total = torch.stack(losses).sum()
    if state.num_processes > 1:
        distributed.all_reduce(total)
    weights = {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()
    }
    return facts | {"loss": total.item(), "weights": weights}


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    results = {
        f"{kind}-{lora}": train(kind, lora, folder)
        for kind in ("finetune", *GRADIENT_METHODS)
        for lora in (False, True)
    }
    results |= {f"{kind}-fsdp2": shard(kind, folder) for kind in GRADIENT_METHODS}
    torch.save(results, folder / f"{state.num_processes}-{state.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
