"""Probes, summaries and relearning of a checkpoint on disk."""

import io
import json
import math
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, log_softmax

from harness_tasks.rows import with_other_images
from medforget_dataset import LEVELS, TASKS, UserError, load
from unlearn.answers import answer_logits
from unlearn.checkpoints import load_checkpoint, save_checkpoint
from unlearn.grouping import group_by_image
from unlearn.measures import SETS, probe_checkpoint, read_probe, read_probe_info, relearn, summary
from unlearn.measures.comparison import auc
from unlearn.measures.extraction import min_k
from unlearn.measures.records import FIELDS
from unlearn.packing import PackedCollator


@pytest.fixture(scope="module")
def checkpoint(data_dir, tiny_checkpoint, tmp_path_factory):
    """A model that has begun to learn the rows: some tokens are right and some are not."""
    model, processor = load_checkpoint(tiny_checkpoint)
    grouped = group_by_image(load("finetune", "train", data=data_dir))
    batch = PackedCollator(processor)([grouped[0], grouped[32]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        logits, targets, _ = answer_logits(model, batch)
        cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_checkpoint(tmp_path_factory.mktemp("begun") / "begun", model, processor, {"run": "digest of the run"})


@pytest.fixture(scope="module")
def probe_file(data_dir, checkpoint, tmp_path_factory):
    """A probe of all sets; the dataset stands for the unseen one too."""
    out = tmp_path_factory.mktemp("probes") / "begun.parquet"
    return probe_checkpoint(checkpoint, data_dir, out, unseen=data_dir, quiet=True)


@pytest.fixture(scope="module")
def probe(probe_file):
    return read_probe(probe_file)


@pytest.fixture(scope="module")
def reference(probe):
    """What a model that knows less would have found."""
    rng = np.random.default_rng(0)
    log_probs = [row * rng.uniform(1, 2) for row in probe["token_log_probs"]]
    return probe.assign(token_log_probs=log_probs, log_prob=[row.sum() for row in log_probs])


def naive(model, processor, question, answer, image):
    """Log-probability and argmax of each answer token of one row, as the processor makes it, in float64."""
    content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = processor(text=[text], images=[image] if image else None, return_tensors="pt")
    tokens = processor.tokenizer(answer + "<|im_end|>", return_tensors="pt")["input_ids"]
    start = prompt["input_ids"].size(1)
    inputs = dict(prompt) | {"input_ids": torch.cat([prompt["input_ids"], tokens], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : -1]
    log_probs = log_softmax(logits.double(), -1).gather(1, tokens[0][:, None])[:, 0]
    return log_probs.tolist(), (logits.argmax(-1) == tokens[0]).tolist()


def asked(data_dir):
    """Of each set, for every id: the question, the answer and the image."""
    rows = load("finetune", "train", data=data_dir).cast_column("image", datasets.Image(decode=False))
    finetune = {row["id"]: row for row in rows}
    rephrased = {
        row["id"].removesuffix("/rephrase"): row
        for level in LEVELS
        for row in load(f"{level}_forget_rephrase", "test", data=data_dir).cast_column(
            "image", datasets.Image(decode=False)
        )
    }
    wrong = {row["id"]: row for row in with_other_images(rows, rows)}
    same = {name: (row["question"], row["answer"], row["image"]) for name, row in finetune.items()}
    return {
        "finetune": same,
        "unseen": same,
        "rephrase_wording": {n: (r["question"], r["answer"], finetune[n]["image"]) for n, r in rephrased.items()},
        "rephrase_view": {n: (finetune[n]["question"], r["answer"], r["image"]) for n, r in rephrased.items()},
        "rephrase_both": {n: (r["question"], r["answer"], r["image"]) for n, r in rephrased.items()},
        "wrong_image": {n: (r["question"], r["answer"], r["image"]) for n, r in wrong.items()},
        "text_only": {name: (row["question"], row["answer"], None) for name, row in finetune.items()},
    }


def test_a_probe_asks_every_row_of_every_set_once_and_finds_what_one_row_alone_gives(data_dir, checkpoint, probe):
    questions = asked(data_dir)
    assert {name: Counter(probe[probe["set"] == name]["id"]) for name in SETS} == {
        name: dict.fromkeys(questions[name], 1) for name in SETS
    }
    model, processor = load_checkpoint(checkpoint)
    compared = 0
    for name in SETS:
        rows = probe[probe["set"] == name]
        sample = rows.groupby("task").sample(2, random_state=len(name))
        assert set(sample["task"]) == set(TASKS)
        for row in sample.itertuples():
            question, answer, encoded = questions[name][row.id]
            image = Image.open(io.BytesIO(encoded["bytes"])).convert("RGB") if encoded else None
            log_probs, greedy = naive(model, processor, question, answer, image)
            assert row.token_log_probs == pytest.approx(log_probs, abs=1e-4), (name, row.id)
            assert row.log_prob == pytest.approx(sum(log_probs), abs=1e-3)
            assert list(row.token_greedy) == greedy
            assert (row.tokens, row.exact) == (len(greedy), all(greedy))
            compared += 1
    assert compared == 2 * len(TASKS) * len(SETS)


def test_sets_are_different_questions(probe):
    """Were two of them asked in the same way, their scores would be the same."""
    scores = {name: probe[probe["set"] == name].set_index("id")["log_prob"] for name in SETS}
    for one in SETS[:6]:
        for other in SETS[:6]:
            if one < other:
                difference = (scores[one] - scores[other]).dropna().abs()
                assert (difference > 1e-6).mean() > 0.5, (one, other)
    assert scores["unseen"].equals(scores["finetune"])
    right = np.concatenate(probe["token_greedy"].to_numpy())
    assert 0.1 < right.mean() < 0.99


def test_columns_and_record_of_a_probe(probe, probe_file, checkpoint, data_dir):
    row = probe[(probe["set"] == "rephrase_both") & (probe["task"] == "cloze")].iloc[0]
    institution, patient, study, section, _ = row["id"].split("/")
    assert row["institution"] == institution and row["patient"] == f"{institution}/{patient}"
    assert (row["study"], row["section"], row["level"]) == (f"{institution}/{patient}/{study}", section, "section")
    identity = probe[(probe["task"] == "identity") & (probe["level"] == "patient")].iloc[0]
    assert identity["section"] == "" and identity["id"] == f"{identity['study']}/patient"
    info = read_probe_info(probe_file)
    assert (info["checkpoint"], info["checkpoint_run"]) == (str(checkpoint), "digest of the run")
    assert info["data"] == info["unseen"] == str(data_dir) and "torch" in info["versions"]
    assert [path.name for path in probe_file.parent.iterdir()] == [probe_file.name]


def test_what_is_no_probe_is_named(tmp_path, data_dir):
    with pytest.raises(UserError, match="gone.parquet: no such file; probe the checkpoint first"):
        read_probe(tmp_path / "gone.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cut.parquet: cannot be read"):
        read_probe(cut)
    other = next((data_dir / "finetune").glob("*.parquet"))
    with pytest.raises(UserError, match="not a probe of this version"):
        read_probe_info(other)


def chosen(records, **where):
    return [record for record in records if all(record[name] == value for name, value in where.items())]


@pytest.fixture(scope="module")
def records(probe_file, reference, data_dir):
    return summary(probe_file, reference, "patient", data_dir, draws=50)


def test_summary_is_what_the_rows_give(records, probe, reference, data_dir):
    forgotten = set(load("patient_forget", "train", data=data_dir)["id"])
    assert all(list(record) == list(FIELDS) and record["level"] == "patient" for record in records)
    json.dumps(records, allow_nan=False)

    def rows(table, name, split, task):
        of_set = table[(table["set"] == name) & (table["task"] == task)]
        return of_set[of_set["id"].isin(forgotten) == (split == "forget")]

    for name, split in (("finetune", "retain"), ("text_only", "retain"), ("rephrase_view", "forget")):
        of_cloze = rows(probe, name, split, "cloze")
        where = {"set": name, "split": split, "task": "cloze"}
        (record,) = chosen(records, measure="exact", **where)
        assert record["value"] == pytest.approx(of_cloze["exact"].mean())
        assert (record["n"], record["studies"]) == (len(of_cloze), of_cloze["study"].nunique())
        (gap,) = chosen(records, measure="gap_answer_probability", **where)
        both = (of_cloze, rows(reference, *where.values()))
        probability = [np.exp(table["log_prob"] / table["tokens"]).mean() for table in both]
        assert gap["value"] == pytest.approx(probability[0] - probability[1]) and gap["n"] == len(of_cloze)
        assert gap["low"] <= gap["value"] <= gap["high"]
    assert not chosen(records, set="rephrase_both", split="retain")
    (selectivity,) = chosen(records, measure="selectivity_exact_memorisation", task="generation")
    shares = [
        np.mean([np.mean(flags) for flags in rows(probe, "finetune", split, "generation")["token_greedy"]])
        for split in ("retain", "forget")
    ]
    assert selectivity["value"] == pytest.approx(shares[0] - shares[1])
    for task in ("generation", "cloze"):
        members = min_k(rows(probe, "finetune", "forget", task)["token_log_probs"])
        others = min_k(probe[(probe["set"] == "unseen") & (probe["task"] == task)]["token_log_probs"])
        (record,) = chosen(records, measure="membership_auc", task=task)
        assert record["value"] == pytest.approx(auc(members, others))
    assert not chosen(records, measure="membership_auc", task="identity")
    cells = chosen(records, measure="cascade_exact")
    assert {(cell["split"], cell["level_probed"], cell["n"]) for cell in cells} >= {
        ("above", "institution", 16),
        ("forgotten", "section", 192),
        ("sibling", "patient", 48),
        ("unseen", "study", 64),
    }


def test_a_model_against_itself_has_no_gap(probe, data_dir):
    records = summary(probe, probe, "section", data_dir, draws=20)
    gaps = [record for record in records if record["measure"].startswith("gap_")]
    assert gaps and all(gap["value"] == gap["low"] == gap["high"] == 0 for gap in gaps)
    assert {record["value"] for record in chosen(records, measure="ks_p_value")} == {1.0}
    assert {record["value"] for record in chosen(records, measure="privacy_leak")} == {0.0}
    alone = {record["measure"] for record in summary(probe, None, "section", data_dir, draws=20)}
    assert "membership_auc" in alone and not any(name.startswith(("gap_", "ks_", "privacy_")) for name in alone)


def test_summary_of_another_datasets_probe_is_refused(probe, data_dir):
    part = probe[probe["institution"] != "inst00"]
    with pytest.raises(UserError, match="56 rows that patient level forgets are not among those probed, inst00/"):
        summary(part, None, "patient", data_dir)


def test_relearning_brings_back_what_it_teaches(data_dir, tiny_checkpoint, tmp_path):
    before = (tiny_checkpoint / "model.safetensors").read_bytes()
    arguments = {"examples": 1, "learning_rate": 1e-2, "max_rows": 14 * 30, "quiet": True}
    path = relearn(data_dir, tiny_checkpoint, "patient", tmp_path / "relearned.json", **arguments)
    result = json.loads(path.read_text())
    curve = result["curve"]
    assert (result["examples"], result["forget_rows"], len(result["images"])) == (1, 224, 1)
    # 14 forget rows a step; points after an eighth of the forget rows, then √2 times as many, and at the limit.
    points = [math.ceil(28 * 2 ** (i / 2) / 14 - 1e-9) * 14 for i in range(8)]
    assert [point["rows"] for point in curve] == [0, *points, 420]
    assert curve[0]["forget_exact"] == curve[0]["others_exact"] == 0
    learned, others = 224 * curve[-1]["forget_exact"], 210 * curve[-1]["others_exact"]
    assert 7 <= round(learned - others) <= 14
    assert curve[-1]["others_exact"] < 0.2
    assert result["recovered_after"] is None
    highest = max(point["others_exact"] for point in curve)
    assert result["most_of_others"] == next(point for point in curve if point["others_exact"] == highest)
    assert [point["seconds"] for point in curve] == sorted(point["seconds"] for point in curve)
    assert result["rows_per_minute"] == pytest.approx(60 * 420 / curve[-1]["seconds"])
    assert (tiny_checkpoint / "model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["relearned.json"]


def test_relearning_stops_when_the_forgotten_set_is_back(data_dir, tiny_checkpoint, tmp_path):
    out = tmp_path / "relearned.json"
    arguments = {"examples": 1, "learning_rate": 1e-2, "recovered_at": 1 / 64, "quiet": True}
    result = json.loads(relearn(data_dir, tiny_checkpoint, "patient", out, **arguments).read_text())
    last = result["curve"][-1]
    assert last["forget_cloze"] >= 1 / 64 > result["curve"][-2]["forget_cloze"]
    assert result["recovered_after"] == {"rows": last["rows"], "seconds": last["seconds"]}
    assert last["rows"] < result["max_rows"] == 8 * 224


def test_a_model_whose_forgotten_set_is_there_is_not_trained(data_dir, checkpoint, tmp_path):
    out = relearn(data_dir, checkpoint, "patient", tmp_path / "out.json", recovered_at=1 / 64, quiet=True)
    result = json.loads(out.read_text())
    (point,) = result["curve"]
    assert point["forget_cloze"] >= 1 / 64 and (point["rows"], point["seconds"]) == (0, 0)
    assert result["recovered_after"] == {"rows": 0, "seconds": 0} and result["rows_per_minute"] is None


@pytest.mark.parametrize(("share", "images"), [(1.0, 16), (0.25, 4), (0.01, 1)])
def test_a_share_of_the_images_is_relearned(share, images, data_dir, tiny_checkpoint, tmp_path):
    arguments = {"examples": share, "max_rows": 1, "quiet": True}
    out = relearn(data_dir, tiny_checkpoint, "patient", tmp_path / "out.json", **arguments)
    result = json.loads(out.read_text())
    assert result["examples"] == len(set(result["images"])) == images
    assert (result["curve"][-1]["others_exact"] is None) == (share == 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "hospital"}, "level 'hospital' does not exist"),
        ({"examples": 17}, "examples is 17; it must be a number between 1 and 16, the images to forget, or"),
        ({"examples": 1.5}, "examples is 1.5; it must be a number between 1 and 16"),
        ({"recovered_at": 90}, "recovered_at is 90; it must be a share"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"max_steps": 5}, "max_steps is not to be set: give max_rows"),
        ({"learning_rat": 5}, "learning_rat is not a training argument"),
    ],
)
def test_wrong_arguments_of_relearning_are_named(arguments, message, data_dir, tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match=message):
        level = {"level": "patient"} | arguments
        relearn(data_dir, tiny_checkpoint, out=tmp_path / "out.json", **level)
