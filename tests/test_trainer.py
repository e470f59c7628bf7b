import copy
import math

import pytest
import torch
from peft import LoraConfig
from stand_in import make_model, make_rows
from torch.nn.functional import cross_entropy
from transformers import HfArgumentParser, TrainerCallback

from medforget_dataset import UserError
from unlearn.answers import answer_logits, score_dataset, token_log_probs
from unlearn.batches import MixedBatches
from unlearn.checkpoints import save_checkpoint
from unlearn.config import FineTuneConfig, UnlearnConfig
from unlearn.grouping import group_by_image
from unlearn.methods import METHODS, GradientMethod
from unlearn.packing import PackedCollator
from unlearn.trainer import FineTuneTrainer, UnlearnTrainer


pytestmark = pytest.mark.filterwarnings(
    "error::FutureWarning",
    # PEFT 0.21 reads a name that transformers 5.23 has renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

GRADIENT_METHODS = [name for name, method in METHODS.items() if issubclass(method, GradientMethod)]
NEED_REFERENCE = [name for name in GRADIENT_METHODS if METHODS[name].needs_reference]
LANGUAGE_ONLY = r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def grouped(rows):
    """Six images: one with forget and retain rows, one with forget rows only, four with retain rows only."""
    forget = [i for i in rows["id"] if "study003" in i or i.startswith("inst00/pat000/study000/findings")]
    return group_by_image(rows, forget)


@pytest.fixture
def model_and_processor(rows):
    return make_model(rows)


def finetune_config(tmp_path, **arguments):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 4}
    return FineTuneConfig(**{**given, "learning_rate": 3e-3, **arguments})


def unlearn_config(tmp_path, method, **arguments):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 4}
    batch = {"forget_per_step": 1, "retain_per_step": 1}
    return UnlearnConfig(method=method, **{**given, **batch, "learning_rate": 1e-3, **arguments})


def forget_log_prob(model, processor, grouped):
    return sum(score["log_prob"] for score in score_dataset(model, processor, grouped) if score["forget"])


# Fine-tuning.


def bare_loop(model, processor, grouped, orders, learning_rates):
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    collator, losses = PackedCollator(processor), []
    for order, optimizer.param_groups[0]["lr"] in zip(orders, learning_rates, strict=True):
        logits, targets, _ = answer_logits(model, collator([grouped[i] for i in order]))
        loss = cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
def test_finetuning_is_a_bare_loop_on_the_answers(batch_size, accumulation, tmp_path, rows, grouped):
    """Also when images with different numbers of answer tokens are accumulated."""
    short = grouped.map(lambda example, i: {"rows": example["rows"][: 9 - i]}, with_indices=True)
    steps = 6
    (model, processor), (expected, _) = make_model(rows), make_model(rows)
    orders = []

    class Recorder(PackedCollator):
        def __call__(self, examples):
            orders.append([example["key"] for example in examples])
            return super().__call__(examples)

    config = finetune_config(
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        warmup_steps=2,
    )
    trainer = FineTuneTrainer(model, config, short, processor, Recorder(processor))
    trainer.train()
    keys = list(short["key"])
    images = [keys.index(key) for order in orders for key in order][: 2 * steps]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0, i - 2) / (steps - 2))) for i in range(steps)]
    learning_rates = [3e-3 * min(1, i / 2) * share for i, share in enumerate(cosine)]
    order = list(zip(images[::2], images[1::2], strict=True))
    losses = bare_loop(expected, processor, short, order, learning_rates)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    start = dict(make_model(rows)[0].named_parameters())
    for (name, value), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        # AdamW makes whole steps of the rounding errors that are the gradient of a key's bias.
        if not name.endswith(("k_proj.bias", "qkv.bias")):
            assert (value - wanted).norm() < 1e-2 * (wanted - start[name]).norm(), name


def test_the_collator_learns_the_epoch(tmp_path, grouped, model_and_processor):
    model, processor = model_and_processor
    epochs = []

    class Recorder(PackedCollator):
        def __call__(self, examples):
            epochs.append((self.epoch, len(examples)))
            return super().__call__(examples)

    collator = Recorder(processor, redraw_wording=True)
    config = finetune_config(tmp_path, per_device_train_batch_size=3, max_steps=6)
    FineTuneTrainer(model, config, grouped, processor, collator).train()
    assert epochs == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]


def test_max_length_of_the_configuration_reaches_the_collator(tmp_path, grouped, model_and_processor):
    model, processor = model_and_processor
    trainer = FineTuneTrainer(model, finetune_config(tmp_path, max_length=20), grouped, processor)
    with pytest.raises(UserError, match="more than max_length 20"):
        trainer.train()


# Unlearning.


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_unlearning_moves_what_it_should(method, adapter, tmp_path, grouped, model_and_processor):
    model, processor = model_and_processor
    before = {name: value.clone() for name, value in model.named_parameters()}
    log_prob = forget_log_prob(model, processor, grouped)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=LANGUAGE_ONLY) if adapter else None
    trainer = UnlearnTrainer(model, unlearn_config(tmp_path, method), grouped, processor, peft_config=lora)
    trainer.train()

    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p
        for name, p in trainer.model.named_parameters()
    }
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The vision tower's last key bias has no gradient: softmax does not see it.
    assert len(moved) == 0 if adapter else len(moved) > 0.9 * len(before)
    assert forget_log_prob(trainer.model, processor, grouped) < log_prob - 1
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert all(math.isfinite(value) for value in entry.values())
        sides = {f"{side}_{what}" for side in ("forget", "retain") for what in ("loss", "token_accuracy")}
        assert sides <= entry.keys()
        assert ("divergence" in entry) == (method in NEED_REFERENCE)
        assert not {"entropy", "mean_token_accuracy"} & entry.keys()


@pytest.mark.parametrize("method", NEED_REFERENCE)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_reference_stays_the_initial_model(method, adapter, tmp_path, grouped, model_and_processor):
    model, processor = model_and_processor
    batch = PackedCollator(processor)([grouped[0], grouped[1]])
    initial = answer_logits(model, batch)[0].detach()
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=LANGUAGE_ONLY) if adapter else None
    config = unlearn_config(tmp_path, method, precompute_ref_log_probs=False)
    trainer = UnlearnTrainer(model, config, grouped, processor, peft_config=lora)
    trainer.train()
    assert (trainer.reference is None) == adapter
    (values,) = trainer.reference_values(trainer.model, batch).values()
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    expected = token_log_probs(initial, targets) if METHODS[method].needs_reference == "log_probs" else initial
    torch.testing.assert_close(values, expected)
    assert not values.requires_grad
    assert not torch.allclose(answer_logits(trainer.model, batch)[0], initial, atol=1e-3)


def test_the_reference_can_be_a_checkpoint(tmp_path, rows, grouped, model_and_processor):
    model, processor = model_and_processor
    other, _ = make_model(rows, seed=1)
    path = save_checkpoint(tmp_path / "retain-only", other, processor, {})
    arguments = {"method_args": {"reference": str(path)}, "max_steps": 1}
    batch = PackedCollator(processor)([grouped[0]])
    logits, targets, _ = answer_logits(other, batch)
    for precompute in (False, True):
        config = unlearn_config(tmp_path / "out", "npo", precompute_ref_log_probs=precompute, **arguments)
        trainer = UnlearnTrainer(copy.deepcopy(model), config, grouped, processor)
        if precompute:
            assert trainer.reference is None
            batch = trainer.data_collator([grouped[0]])
        (values,) = trainer.reference_values(trainer.model, batch).values()
        torch.testing.assert_close(values, token_log_probs(logits, targets).detach())
        trainer.train()
    config = unlearn_config(tmp_path / "out", "npo", method_args={"reference": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        UnlearnTrainer(model, config, grouped, processor)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_one_step_is_the_gradient_of_the_methods_loss(method, tmp_path, grouped, model_and_processor):
    """With plain gradient descent, one step of the trainer is the hand-made step, reference and all."""
    model, processor = model_and_processor
    expected, collator = copy.deepcopy(model), PackedCollator(processor)
    config = unlearn_config(
        tmp_path, method, max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0
    )
    trainer = UnlearnTrainer(model, config, grouped, processor)
    trainer.train()

    (images, *_) = MixedBatches([i in (0, 3) for i in range(6)], 1, 1, seed=config.seed)
    batch = (trainer.data_collator if method == "npo" else collator)([grouped[i] for i in images])
    trainer.model = expected
    trainer.loss_and_terms(expected, batch, trainer.count_items(batch))[0].backward()
    with torch.no_grad():
        for p in expected.parameters():
            p -= 0.1 * p.grad
    for (name, value), wanted in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(value, wanted[1], rtol=1e-4, atol=1e-6, msg=name)


def test_there_must_be_something_to_forget(tmp_path, rows, model_and_processor):
    model, processor = model_and_processor
    with pytest.raises(UserError, match="no rows to forget"):
        UnlearnTrainer(model, unlearn_config(tmp_path, "npo"), group_by_image(rows), processor)


def test_every_batch_has_its_share():
    has_forget = [i % 5 == 0 for i in range(23)]
    batches = MixedBatches(has_forget, 2, 3, seed=0)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        assert len(list(batches)) == len(batches) == 3
        for batch in batches:
            assert [has_forget[i] for i in batch] == [True] * 2 + [False] * 3
        order = [i for batch in batches for i in batch]
        assert {i for i in order if has_forget[i]} == {0, 5, 10, 15, 20}
        assert len({i for i in order if not has_forget[i]}) == 9
        epochs.append(order)
    assert epochs[0] != epochs[1]
    assert [i for batch in MixedBatches(has_forget, 2, 3, seed=1) for i in batch] != epochs[0]


@pytest.mark.parametrize(
    ("has_forget", "asked", "steps"),
    [
        ([True] * 7, (2, 4), 2),
        ([False] * 7, (2, 4), 2),
        ([True] * 3 + [False] * 4, (0, 2), 2),
        ([True, False], (3, 1), 1),
    ],
)
def test_batches_are_full_when_a_kind_is_missing_or_few(has_forget, asked, steps):
    batches = MixedBatches(has_forget, *asked, seed=0)
    assert [len(batch) for batch in batches] == [sum(asked)] * steps


def test_the_trainer_feeds_mixed_batches_and_another_order_each_epoch(tmp_path, grouped, model_and_processor):
    model, processor = model_and_processor
    batches = []

    class Recorder(PackedCollator):
        def __call__(self, examples):
            batches.append([example["key"] for example in examples])
            return super().__call__(examples)

    config = unlearn_config(tmp_path, "grad_diff", max_steps=6, forget_per_step=1, retain_per_step=2)
    UnlearnTrainer(model, config, grouped, processor, Recorder(processor)).train()
    to_forget = {grouped[0]["key"], grouped[3]["key"]}
    assert [[key in to_forget for key in batch] for batch in batches] == [[True, False, False]] * 6
    assert len({tuple(map(tuple, batches[i : i + 2])) for i in (0, 2, 4)}) > 1


# Configuration.


def test_defaults_on_a_cpu(tmp_path):
    config = UnlearnConfig(output_dir=str(tmp_path), use_cpu=True)
    assert not config.bf16 and not config.fp16
    assert not config.gradient_checkpointing and not config.activation_checkpointing
    assert config.report_to == []
    assert config.per_device_train_batch_size == config.forget_per_step + config.retain_per_step == 6
    assert config.max_length is None
    assert config.make_method().name == "npo"


def test_configuration_is_read_from_the_command_line(tmp_path):
    parser = HfArgumentParser(UnlearnConfig)
    line = ["--output_dir", str(tmp_path), "--method", "npo", "--method_args", '{"beta": 0.5}', "--level", "patient"]
    (config,) = parser.parse_args_into_dataclasses([*line, "--use_cpu", "True"])
    assert config.make_method().beta == 0.5
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert "--forget_per_step" in parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nppo"}, "unknown method 'nppo'"),
        ({"method": "npo", "method_args": {"beta": -1}}, "npo: beta is -1"),
        ({"method": "manu"}, "manu does not train"),
        ({"level": "ward"}, "unknown level 'ward'; choose from institution, patient, study, section"),
        ({"forget_per_step": -1}, "forget_per_step is -1"),
        ({"forget_per_step": 0, "retain_per_step": 0}, "both 0"),
    ],
)
def test_mistakes_in_the_configuration_are_named(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        UnlearnConfig(output_dir=str(tmp_path), use_cpu=True, **arguments)


def test_other_callbacks_run_too(tmp_path, grouped, model_and_processor):
    model, processor = model_and_processor
    seen = []

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    UnlearnTrainer(
        model, unlearn_config(tmp_path, "npo", max_steps=2), grouped, processor, callbacks=[Callback()]
    ).train()
    assert seen == [1, 2]
