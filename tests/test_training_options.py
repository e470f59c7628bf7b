"""What training offers beside the plain way comes to the same: cached vision, the fused head, schedules, LoRA."""

import copy
from contextlib import nullcontext

import pytest
import torch
from stand_in import make_model, make_rows
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from medforget_dataset.errors import UserError
from unlearn.answers import answer_log_probs, answer_logits, token_log_probs
from unlearn.batches import ImageBatches, MixedBatches, RehearsalBatches, SequentialBatches
from unlearn.config import FineTuneConfig, UnlearnConfig
from unlearn.gated_mlp import lean_mlps
from unlearn.grouping import group_by_image, split_by_kind
from unlearn.lora import LANGUAGE_LINEAR, make_lora_config
from unlearn.packing import PackedCollator, RowCollator, packed_attention_mask
from unlearn.trainer import FineTuneTrainer, TrainingDiverged, UnlearnTrainer


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def grouped(rows):
    return group_by_image(rows, [i for i in rows["id"] if "study003" in i or "study001/findings" in i])


def finetuned(tmp_path, rows, grouped, collator=None, **arguments):
    model, processor = make_model(rows)
    given = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 3}
    config = FineTuneConfig(**{**given, "learning_rate": 3e-3, "per_device_train_batch_size": 2, **arguments})
    trainer = FineTuneTrainer(model, config, grouped, processor, collator(processor) if collator else None)
    trainer.train()
    return trainer


def unlearned(tmp_path, rows, grouped, **arguments):
    model, processor = make_model(rows)
    given = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 3}
    batch = {"forget_per_step": 1, "retain_per_step": 1, "learning_rate": 1e-3}
    trainer = UnlearnTrainer(model, UnlearnConfig(**{**given, **batch, **arguments}), grouped, processor)
    trainer.train()
    return trainer


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# Learning curves.


@pytest.mark.slow
def test_eight_batches_of_one_and_one_of_eight_learn_alike(tmp_path, rows, grouped):
    """Images with different numbers of answer tokens, so that means of batches would differ from that of the step."""
    uneven = grouped.map(lambda example, i: {"rows": example["rows"][: 9 - i]}, with_indices=True)
    # Eight images of six: two come twice a step.
    eight = uneven.select([0, 1, 2, 3, 4, 5, 0, 1])
    arguments = {"max_steps": 8, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    curves, weights = [], []
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        trainer = finetuned(
            tmp_path,
            rows,
            eight,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **arguments,
        )
        curves.append(losses(trainer))
        weights.append(trainer.model.state_dict())
    assert len(curves[0]) == 8 and curves[0][-1] < curves[0][0] - 0.5
    for curve, values in zip(curves[1:], weights[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-4)
        for name, value in values.items():
            torch.testing.assert_close(value, weights[0][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["grad_diff", "kl_min", "npo"])
def test_unlearning_in_one_batch_and_in_four_goes_alike(method, tmp_path, rows, grouped):
    arguments = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "method": method}
    one = unlearned(tmp_path, rows, grouped, forget_per_step=4, retain_per_step=4, **arguments)
    four = unlearned(tmp_path, rows, grouped, gradient_accumulation_steps=4, **arguments)
    # Within a step the order differs, not the images.
    assert sorted(sum(one.batches, [])) == sorted(sum(four.batches, []))
    for name in ("loss", "forget_loss", "retain_loss", "forget_token_accuracy", "retain_token_accuracy"):
        values = [[line[name] for line in t.state.log_history if "loss" in line] for t in (one, four)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5), name


# Batches.


def test_a_step_is_cut_into_parts_for_processes_and_accumulation():
    whole = list(ImageBatches(22, 8, parts=1, seed=3))
    assert [len(step) for step in whole] == [8, 8, 6]
    parts = list(ImageBatches(22, 2, parts=4, seed=3))
    assert [len(part) for part in parts] == [2] * 8 + [1, 2, 1, 2]
    assert [sum(parts[i : i + 4], []) for i in (0, 4, 8)] == whole
    assert sorted(sum(whole, [])) == list(range(22))


def test_no_part_is_empty_when_images_are_few():
    parts = list(ImageBatches(3, 1, parts=4, seed=0))
    assert [len(part) for part in parts] == [1] * 4 and {i for part in parts for i in part} == {0, 1, 2}


@pytest.mark.parametrize("parts", [1, 3])
def test_every_kind_of_batches_fills_every_part(parts):
    flags = [i % 3 == 0 for i in range(20)]
    for batches in (
        ImageBatches(20, 2, parts=parts, seed=0),
        MixedBatches(flags, 1, 2, parts=parts, seed=0),
        SequentialBatches(flags, 2, parts=parts, seed=0),
        RehearsalBatches(14, 20, batch_size=2, rehearsal_batch_size=1, every=2, parts=parts, seed=0),
    ):
        assert len(batches) == len(list(batches)) and len(batches) % parts == 0
        assert all(batches)
        assert {i for part in batches for i in part} <= set(range(20))


def test_sequential_is_all_to_forget_and_then_all_to_retain(tmp_path, rows, grouped):
    apart = split_by_kind(grouped)
    assert len(apart) == len(grouped) + 1  # One image has both.
    assert sorted(r["id"] for e in apart for r in e["rows"]) == sorted(rows["id"])
    trainer = unlearned(tmp_path, rows, grouped, schedule="sequential", method="grad_diff", max_steps=4)
    kinds = []
    for batch in trainer.batches:
        (kind,) = {row["forget"] for i in batch for row in trainer.train_dataset[i]["rows"]}
        kinds.append(kind)
    assert kinds == [True, False, False, False]
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert logged[0]["loss"] < 0 and "retain_loss" not in logged[0]
    assert logged[1]["loss"] > 0 and "forget_loss" not in logged[1]


# Attention, head, vision.


def test_the_mask_says_who_sees_whom():
    index = torch.tensor([[-1, -1, 0, 0, 1, 1, 1, -2], [-1, -1, -1, 5, 5, 6, -2, -2]])
    mask = packed_attention_mask(index, torch.float32)[:, 0]
    for b, row in enumerate(index.tolist()):
        for i, query in enumerate(row):
            for j, key in enumerate(row):
                seen = j <= i and (key == query or key == -1)
                assert (mask[b, i, j] == 0) == seen, (b, i, j)
    assert torch.isfinite(mask).all()
    assert packed_attention_mask(index, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("collator", [PackedCollator, RowCollator])
def test_the_fused_head_gives_what_the_logits_give(collator, rows, grouped):
    model, processor = make_model(rows)
    batch = collator(processor)([grouped[0], {**grouped[1], "rows": grouped[1]["rows"][:4]}])
    logits, targets, _ = answer_logits(model, batch)
    expected = torch.autograd.grad(token_log_probs(logits, targets).sum(), model.parameters())
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    log_probs, is_top = answer_log_probs(model, batch, fused=True)
    torch.testing.assert_close(log_probs, token_log_probs(logits, targets), rtol=1e-4, atol=1e-5)
    assert is_top.equal(logits.argmax(-1) == targets)
    for found, wanted in zip(torch.autograd.grad(log_probs.sum(), model.parameters()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_only_answers_reach_the_vocabulary(rows, grouped):
    model, processor = make_model(rows)
    batch = PackedCollator(processor)(list(grouped))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    answer_logits(model, batch)
    handle.remove()
    answers = int((batch["labels"] != -100).sum())
    assert seen == [(answers, model.config.get_text_config().vocab_size)]


@pytest.mark.parametrize("trained", [{"use_peft": True}, {"freeze_vision": True}], ids=["lora", "frozen"])
def test_cached_vision_changes_nothing_but_how_often_it_is_computed(trained, tmp_path, rows, grouped, monkeypatch):
    calls = []
    tower = type(make_model(rows)[0].model.visual)
    original = tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    arguments = {"max_steps": 6, "lora_dropout": 0.0, "optim": "sgd", "learning_rate": 0.1, **trained}
    plain = finetuned(tmp_path, rows, grouped, **arguments)
    without = len(calls)
    cached = finetuned(tmp_path, rows, grouped, cache_vision=True, **arguments)
    # Six steps of two images, of six images.
    assert (without, len(calls) - without) == (6, 6)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4, abs=1e-5)
    for (name, value), expected in zip(cached.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)
    # Outside training the tower takes pixels again.
    batch = PackedCollator(cached.processing_class)([grouped[0]])
    assert torch.isfinite(answer_logits(cached.model, batch)[0]).all()


def test_cached_vision_encodes_an_image_once_an_epoch_or_ten(tmp_path, rows, grouped, monkeypatch):
    tower = type(make_model(rows)[0].model.visual)
    calls, original = [], tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    unlearned(tmp_path, rows, grouped, method="npo", use_peft=True, cache_vision=True, max_steps=12)
    assert len(calls) == len(grouped)


def test_cached_vision_refuses_a_trained_tower(tmp_path, rows, grouped):
    with pytest.raises(UserError, match="cache_vision: the vision tower is trained.*--lora.*--freeze-vision"):
        finetuned(tmp_path, rows, grouped, cache_vision=True)


def test_a_frozen_tower_stays(tmp_path, rows, grouped):
    before = make_model(rows)[0].state_dict()
    after = finetuned(tmp_path, rows, grouped, freeze_vision=True).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name for name in moved)


@pytest.mark.parametrize("method", ["grad_diff", "kl_min"])
def test_cached_vision_serves_the_reference_too(method, tmp_path, rows, grouped):
    arguments = {"method": method, "freeze_vision": True}
    plain, cached = (unlearned(tmp_path, rows, grouped, cache_vision=c, **arguments) for c in (False, True))
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4, abs=1e-5)


def test_lean_mlps_keep_less_and_change_nothing(rows, grouped):
    model, processor = make_model(rows)
    batch = PackedCollator(processor)([grouped[0], grouped[1]])
    results = []
    for context in (nullcontext(), lean_mlps(model)):
        kept: dict[int, int] = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits, targets, _ = answer_logits(model, batch)
            gradients = torch.autograd.grad(token_log_probs(logits, targets).sum(), model.parameters())
        results.append((logits, gradients, sum(kept.values())))
    (plain, expected, before), (lean, found, after) = results
    assert torch.equal(plain, lean)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    tokens = batch["input_ids"].numel()
    language = model.config.get_text_config()
    assert before - after >= 2 * 4 * tokens * language.intermediate_size * language.num_hidden_layers
    assert "forward" not in vars(model.model.language_model.layers[0].mlp)


# LoRA.


def test_lora_is_on_the_language_model_alone(tmp_path, rows, grouped):
    model, processor = make_model(rows)
    config = FineTuneConfig(output_dir=str(tmp_path), use_cpu=True, use_peft=True, disable_tqdm=True)
    trainer = FineTuneTrainer(model, config, grouped, processor)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    linear = [
        name
        for name, module in make_model(rows)[0].named_modules()
        if isinstance(module, nn.Linear) and "language_model" in name
    ]
    assert len(trained) == 2 * len(linear) == 2 * 7 * 2
    assert all("language_model" in name and "lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "q_proj"}, "'q_proj' matches the whole name of no linear layer; one of them is model"),
        ({"targets": "(q_proj"}, "is not a regular expression"),
        ({"targets": ".*"}, "matches lm_head"),
        ({"r": 0}, "lora_r is 0"),
        ({"dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_lora_that_does_not_fit_is_named(arguments, message, rows):
    given = {"r": 16, "alpha": 16, "dropout": 0.05, "targets": LANGUAGE_LINEAR}
    with pytest.raises(UserError, match=message):
        make_lora_config(make_model(rows)[0], **{**given, **arguments})


@pytest.mark.parametrize("method", ["kl_min", "npo"])
def test_an_adapter_needs_no_second_copy(method, tmp_path, rows, grouped):
    trainer = unlearned(tmp_path, rows, grouped, method=method, use_peft=True)
    assert trainer.reference is None
    # All weights that the trainer holds: those of the model, once, and the adapter's.
    held = {id(m): m for m in vars(trainer).values() if isinstance(m, nn.Module)}
    storages = {p.untyped_storage().data_ptr() for m in held.values() for p in m.parameters()}
    assert storages == {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}


# What a reference says, computed once.


def test_precomputed_log_probs_are_those_computed_on_the_way(tmp_path, rows, grouped):
    trainers = [
        unlearned(tmp_path, rows, grouped, method="npo", precompute_ref_log_probs=precompute)
        for precompute in (True, False)
    ]
    assert trainers[0].reference is None and trainers[1].reference is not None
    assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), rel=1e-5)
    for (name, value), expected in zip(
        trainers[0].model.named_parameters(), trainers[1].model.parameters(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_rows_that_change_cannot_be_precomputed(tmp_path, rows, grouped):
    model, processor = make_model(rows)
    collator = PackedCollator(processor, redraw_wording=True)
    config = UnlearnConfig(output_dir=str(tmp_path), use_cpu=True, method="npo", precompute_ref_log_probs=True)
    with pytest.raises(UserError, match="worded or viewed anew"):
        UnlearnTrainer(model, config, grouped, processor, collator)
    config.precompute_ref_log_probs = None
    assert UnlearnTrainer(copy.deepcopy(model), config, grouped, processor, collator).reference is not None


def test_zero_3_has_no_room_for_a_second_model(tmp_path, rows, grouped, monkeypatch):
    model, processor = make_model(rows)
    monkeypatch.setattr(UnlearnConfig, "sharding", "deepspeed")
    config = UnlearnConfig(output_dir=str(tmp_path), use_cpu=True, method="kl_min")
    with pytest.raises(UserError, match="kl_min compares with a second model.*--lora.*fsdp2"):
        UnlearnTrainer(model, config, grouped, processor)


# Going wrong.


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, rows, grouped):
    with pytest.raises(TrainingDiverged, match=r"step \d: the loss is (nan|inf); lower the learning rate"):
        finetuned(tmp_path, rows, grouped, learning_rate=1e30, optim="sgd", max_grad_norm=0.0, max_steps=4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"logging_steps": 1, "max_steps": 20},
        # After the only other line of the log.
        pytest.param({"logging_steps": 1000, "max_steps": 20}, marks=pytest.mark.slow),
        # Its first loss on retain rows comes after an epoch of forgetting.
        {"logging_steps": 1, "num_train_epochs": 6, "schedule": "sequential"},
    ],
    ids=["every-step", "last-step", "sequential"],
)
def test_collapse_is_named(arguments, tmp_path, rows, grouped):
    """A model that knew its rows, and after a few large steps is worse at them than a guess."""
    model, processor = make_model(rows)
    given = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True}
    learned = FineTuneConfig(**given, learning_rate=1e-2, max_steps=60, per_device_train_batch_size=6)
    FineTuneTrainer(model, learned, grouped, processor).train()
    config = UnlearnConfig(**given, **arguments, method="grad_diff", learning_rate=0.3, warmup_steps=0)
    with pytest.raises(TrainingDiverged, match=r"step \d+: the model has collapsed: .* nats a token, a blind guess 6"):
        UnlearnTrainer(model, config, grouped, processor).train()


def test_a_frozen_vision_tower_is_not_passed_backward(tmp_path, rows, grouped):
    """Activation checkpointing makes its inputs require gradients."""
    model, processor = make_model(rows)
    given = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    config = FineTuneConfig(**given, use_peft=True, activation_checkpointing=True, per_device_train_batch_size=2)
    trainer = FineTuneTrainer(model, config, grouped, processor)
    tower = trainer.accelerator.unwrap_model(trainer.model).get_base_model().model.visual
    needs_gradient = []
    tower.register_forward_hook(lambda _, inputs, output: needs_gradient.append(output.pooler_output.requires_grad))
    trainer.train()
    assert needs_gradient and not any(needs_gradient)
