"""The benchmarks: the peers' losses, the bookkeeping of a measurement, the tables, and both commands."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks import evaluation, gpu, peers, tables, training
from benchmarks.alone import Step, run_alone, summarise
from benchmarks.flops import Work, forward_flops, training_flops, work_of
from benchmarks.measure import PeakMemory, weight_bytes, weight_shapes
from benchmarks.shapes import make_config, make_examples, make_model
from benchmarks.variant import Variant
from medforget_dataset.errors import UserError
from unlearn.packing import IGNORED, PackedCollator, packed_attention_mask


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def small():
    """A tiny model, its processor, and two images of three rows each."""
    model, processor = make_model("tiny", 56, device="cpu", dtype=torch.float32)
    return model, processor, make_examples(2, 3, 56)


@pytest.fixture
def batch(small):
    """Four padded rows of two images."""
    _, processor, examples = small
    rows = [(example["key"], example["image"], row) for example in examples for row in example["rows"]]
    return peers.PaddedRows(processor)(rows[1:5])


def log_probs(model, batch):
    """Log-probabilities of all tokens that have a label, and of the whole vocabulary, by hand."""
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.double()
    everything = logits - logits.exp().sum(-1, keepdim=True).log()  # (B, L, V)
    picked = [
        everything[i, t - 1, label]
        for i, row in enumerate(batch["labels"])
        for t, label in enumerate(row)
        if t and label != IGNORED
    ]
    return torch.stack(picked), everything


def copy_of(model, noise=0.0):
    copied = peers.frozen_copy(model)
    for parameter in copied.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return copied


def first_loss(loop, model, batch, *others):
    """The loss of a first step, on a copy that may be trained."""
    trained = copy_of(model).requires_grad_(True)
    before = [parameter.clone() for parameter in trained.parameters()]
    loss = next(loop(trained, [batch], peers.make_optimizer(trained), *others))
    assert any(not torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))
    return loss


def test_rows_are_whole_conversations_padded_on_the_right_and_labelled_but_for_padding(small, batch):
    _, processor, examples = small
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and batch["input_ids"].shape == (4, max(lengths))
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert (ids[length:] == processor.tokenizer.pad_token_id).all() and (labels[length:] == IGNORED).all()
        assert torch.equal(labels[:length], ids[:length])
    text = processor.tokenizer.decode(batch["input_ids"][0][: lengths[0]])
    row = examples[0]["rows"][1]
    assert text.count("<|image_pad|>") == 4 and text.endswith(f"assistant\n{row['answer']}<|im_end|>\n")
    assert row["question"] in text
    assert len(batch["pixel_values"]) == 4 * 16 and len(batch["image_grid_thw"]) == 4


def test_peers_losses_are_their_formulas(small, batch):
    model, _, _ = small
    own, everything = log_probs(model, batch)
    other = copy_of(model, noise=0.05)
    theirs, original = log_probs(other, batch)
    cross_entropy = -own.mean().item()
    assert first_loss(peers.fine_tune, model, batch) == pytest.approx(cross_entropy, rel=1e-5)
    assert first_loss(peers.forget_epoch, model, batch) == pytest.approx(-cross_entropy, rel=1e-5)
    assert first_loss(peers.grad_diff_retain_epoch, model, batch) == pytest.approx(cross_entropy, rel=1e-5)
    # Summed over all positions, padding too, and divided by the four rows.
    divergence = (original.exp() * (original - everything)).sum().item() / 4
    assert divergence > 0.1
    expected = cross_entropy + divergence
    assert first_loss(peers.kl_min_retain_epoch, model, batch, other) == pytest.approx(expected, rel=1e-4)
    # The power of the ratio of the geometric means of all token probabilities of the batch.
    expected = 2 / 0.4 * math.log(1 + math.exp(0.4 * (own.mean() - theirs.mean()).item()))
    assert first_loss(peers.npo_epoch, model, batch, other) == pytest.approx(expected, rel=1e-5)


def test_the_frozen_copy_shares_nothing_and_the_adapter_is_on_the_language_model(small):
    model, _, _ = small
    shapes, held = weight_shapes(model), weight_bytes(weight_shapes(model))
    copied = peers.frozen_copy(model)
    weights = sum(p.numel() * 4 for p in model.parameters() if p.dim() > 1)
    assert weight_bytes(shapes) - held == weights
    del copied
    adapted = peers.adapted(peers.copy.deepcopy(model))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("language_model" in name and "lora" in name for name in trained)


def test_manu_zeroes_the_given_share_of_units_in_the_last_layers(small):
    model, processor, examples = small
    rows = [(example["key"], example["image"], row) for example in examples for row in example["rows"]]
    collator = peers.PaddedRows(processor)
    pruned = copy_of(model)
    list(peers.manu(pruned, [collator(rows[:3])], [collator(rows[3:])], share=0.25))
    for part, units in (("visual", 2 * (64 + 64 + 32)), ("language_model", 2 * (128 + 128 + 64))):
        zeroed = sum(
            int((module.weight == 0).all(1).sum())
            for name, module in pruned.named_modules()
            if part in name and name.endswith("_proj") and ".mlp." in name
        )
        assert zeroed == round(0.25 * units)


def test_work_counts_what_attends_to_what(small, batch):
    _, processor, examples = small
    lengths = batch["attention_mask"].sum(1).tolist()
    padded = work_of(batch)
    assert padded == Work(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), batch["labels"].numel(), 4, 64)
    packed_batch = PackedCollator(processor)([examples[0]])
    seen = int((packed_attention_mask(packed_batch["row_index"], torch.float32) == 0).sum())
    assert work_of(packed_batch, projected=7) == Work(packed_batch["input_ids"].numel(), seen, 7, 1, 16)


def test_flops_of_a_dense_model_are_six_for_each_weight_and_token(small):
    _, processor, _ = small
    config = make_config("7b", processor)
    tokens = Work(tokens=1, projected=1)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "visual" not in name]
    weights = sum(module.weight.numel() for module in linear)
    assert 7e9 < weights < 7.2e9 and sum(p.numel() for p in model.parameters()) == 8_292_166_656
    assert forward_flops(config, tokens) == (2 * weights, 0)
    assert training_flops(config, tokens, Work(), None) == 6 * weights
    adapters = 16 * sum(m.in_features + m.out_features for m in linear if m is not model.lm_head)
    assert training_flops(config, tokens, tokens, 16) == 6 * weights + 6 * adapters
    tower = sum(p.numel() for n, p in model.named_parameters() if "visual" in n and p.dim() > 1 and "merger" not in n)
    merger = sum(p.numel() for n, p in model.named_parameters() if "visual.merger" in n and p.dim() > 1)
    attention = 4 * 1280 * (4 * 1024**2 + 28 * 1024 * 64)
    image = forward_flops(config, Work(images=1, patches=1024))[1]
    assert image == 2 * (1024 * tower + 256 * merger) + attention


def test_rates_are_of_the_median_step_of_each_kind():
    steps = [Step("forget", 10, 9.0), *(Step("forget", 10, s) for s in (1.0, 2.0, 90.0))]
    steps += [Step("retain", 5, 9.0), *(Step("retain", 5, 2.0, tokens=50, flops=5e6) for _ in range(3))]
    result = summarise(steps, warm_up=1)
    # A row to forget takes 0.2 seconds and one to retain 0.4.
    assert result["rows_per_second"] == pytest.approx(2 / 0.6)
    assert result["tokens_per_second"] == pytest.approx(5 / 0.3) and result["steps"] == 6
    assert summarise(steps, 1, extra_seconds_per_row=0.2)["rows_per_second"] == pytest.approx(2.0)
    with pytest.raises(UserError, match="no step of kind forget is left after 4"):
        summarise(steps, warm_up=4)


def test_peak_memory_is_what_was_held_at_once():
    memory = PeakMemory("cpu")
    first = torch.ones(20 << 20)
    del first
    second = torch.ones(30 << 20)
    assert 115 << 20 < memory.bytes_above() < 160 << 20
    del second


@pytest.mark.slow
def test_a_measurement_that_fails_or_takes_too_long_is_told_in_a_line():
    bad = Variant("ours", "manu", shape="tiny", image_size=55)
    error = "UserError: image_size is 55; it must be a positive multiple of 28, such as 56, 84 or 112"
    assert run_alone("benchmarks.loops:measure", bad, limit=60) == {"error": error}
    assert run_alone("time:sleep", 60, limit=0) == {"error": "took more than 0 seconds"}
    died = run_alone("os:_exit", 3, limit=60)
    assert died == {"error": "its process ended with exit status 3, as when memory runs out"}


def record(side, method, rate, peak, **setting):
    return tables.as_record(
        Variant(side, method, **setting),
        {"rows_per_second": rate, "peak_bytes": peak, "weights_held": 2.0 if side == "peers" else 1.0},
    )


HEADER = {
    "date": "2026-11-21T12:00+00:00",
    "command": "python -m benchmarks.training",
    "cpu": "a CPU, 2 cores",
    "gpu": None,
    "threads": 2,
    "load": 0.1,
    "python": "3.11.7",
    "versions": {"torch": "2.15.0"},
}


def test_the_table_shows_both_loops_and_misses_are_told():
    measurements = [
        record("peers", "finetune", 2.0, 1e9),
        record("ours", "finetune", 9.2, 5.5e8),
        record("peers", "kl_min", 1.0, 1e9),
        record("ours", "kl_min", 3.9, 7e8),
        record("ours", "kl_min", 5.0, 6e8, schedule="interleaved"),
        record("peers", "npo", 1.0, 1e9, lora=True),
        record("ours", "npo", 2.0, 9e8, lora=True),
        record("peers", "finetune", 1.0, 1e9, questions=1),
        record("ours", "finetune", 1.0, 1e9, questions=1),
        record("peers", "grad_diff", 1.0, 1e9),
        {"variant": record("ours", "grad_diff", 1, 1)["variant"], "error": "took more than 9 seconds"},
    ]
    content = {"runs": [HEADER], "measurements": measurements}
    page = training.render(content)
    assert "| fine-tuning | 256 | 15 | 2.00 | 9.20 | 4.60 | 1,000 | 550 | 55 % | 2.00 × | 1.00 × |" in page
    assert "| KL-Min, both kinds in an image | 256 | 15 | 1.00 | 5.00 | 5.00 |" in page
    assert "| GradDiff | 256 | 15 | 1.00 | – | – | 1,000 | – | – | 2.00 × | – |" in page
    assert "torch 2.15.0" in page and "ours grad_diff: took more than 9 seconds" in page
    assert training.missed_targets(content) == [
        "KL-Min, 256 image tokens: 3.90 times as fast, not 4.0",
        "KL-Min, 256 image tokens: 70.0% of the memory, not 60%",
        "GradDiff, 256 image tokens: nan times as fast, not 4.0",
        "GradDiff, 256 image tokens: nan% of the memory, not 60%",
    ]
    measurements[6]["weights_held"] = 2.0
    assert "NPO with LoRA, 256 image tokens: holds a second copy of the weights" in training.missed_targets(content)


def test_the_table_goes_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    tables.put_between_markers(page, "table", "new\n")
    assert page.read_text() == "before\n<!-- table -->\n\nnew\n\n<!-- /table -->\nafter\n"
    with pytest.raises(UserError, match="has no <!-- other -->"):
        tables.put_between_markers(page, "other", "new")


def test_the_pages_in_the_repository_have_the_markers():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in (training.MARKER, gpu.MARKER):
        assert text.index(f"<!-- {name} -->") < text.index(f"<!-- /{name} -->")


def test_hours_are_those_of_ten_epochs_and_four_levels():
    rates = {"finetune": 10.0, "grad_diff": 8.0, "kl_min": 6.0, "npo": 4.0, "manu": 5.0}
    hours = gpu.experiment_hours(rates, unlearning_epochs=2)
    assert hours["finetune"] == pytest.approx(38_400 / 36_000)
    assert hours["grad_diff"] == pytest.approx(30_720 / 28_800) and hours["npo"] == pytest.approx(6_912 / 14_400)
    assert hours["all"] == pytest.approx(sum(value for name, value in hours.items() if name != "all"))
    assert gpu.experiment_hours({**rates, "manu": None}, 1)["all"] is None


TINY = ["--shape", "tiny", "--image-size", "56", "--threads", "1"]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_as_a_command_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "results" / "gpu.json", tmp_path / "page.md"
    page.write_text("<!-- benchmarks.gpu -->\n<!-- /benchmarks.gpu -->\n")
    arguments = [*TINY, "--device", "cpu", "--questions", "3", "--steps", "1", "--out", out, "--markdown", page]
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments), "--methods", "kl_min", "manu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert [(m["variant"]["side"], m["variant"]["method"]) for m in content["measurements"]] == [
        (side, method) for method in ("kl_min", "manu") for side in ("peers", "ours")
    ]
    peer, ours = content["measurements"][:2]
    assert ours["weights_held"] == 1.0 and peer["weights_held"] == 2.0  # the adapter switched off is the reference
    assert all(m["rows_per_second"] > 0 and m["flops_per_second"] > 0 for m in content["measurements"])
    assert "| KL-Min | ours |" in page.read_text() and "| MANU | peers |" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["gpu.py", *command[3:], "npo", "--budget", "0"])
    assert gpu.main() == 1
    assert "give the same command again" in capsys.readouterr().err
    assert json.loads(out.read_text()) == content


@pytest.mark.slow
def test_the_training_benchmark_runs_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "training.json", tmp_path / "page.md"
    page.write_text("<!-- benchmarks.training -->\n<!-- /benchmarks.training -->\n")
    monkeypatch.setattr(sys, "argv", ["training.py", "--quick", *TINY, "--out", str(out), "--markdown", str(page)])
    assert training.main() == 0, capsys.readouterr().err  # no target is for images this small
    measurements = json.loads(out.read_text())["measurements"]
    assert [m["variant"]["method"] for m in measurements[::2]] == ["finetune", "grad_diff", "kl_min", "npo"]
    assert [m["variant"]["side"] for m in measurements] == ["peers", "ours"] * 4
    assert page.read_text().count("| 4 | 15 |") == 4


@pytest.mark.slow
def test_the_evaluation_benchmark_asks_both_the_same_and_gets_the_same(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "evaluation.json", tmp_path / "page.md"
    page.write_text("<!-- benchmarks.evaluation -->\n<!-- /benchmarks.evaluation -->\n")
    small = ["--shape", "tiny", "--image-size", "56", "--images", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *small, "--out", str(out), "--markdown", str(page)])
    evaluation.main()  # models this small miss the targets
    measurements = json.loads(out.read_text())["measurements"]
    assert {kind: sides["ours"]["requests"] for kind, sides in measurements.items()} == {
        "generation": 30,
        "log-likelihood": 120,
        "all levels": 120,
    }
    for kind, sides in measurements.items():
        assert len(set(map(str, sides["ours"]["answers"]))) > 3, kind
    assert page.read_text().count(" | yes |") == 3
