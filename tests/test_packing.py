import io

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import make_model, make_rows
from torch.nn.functional import cross_entropy

from medforget_dataset import TASKS, UserError
from unlearn.answers import answer_logits, evaluate_exact_match, model_inputs, score_dataset, score_rows
from unlearn.grouping import group_by_image, image_key, patient_key
from unlearn.packing import PackedCollator, RowCollator


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def model_and_processor(rows):
    return make_model(rows)


@pytest.fixture(scope="module")
def grouped(rows):
    """The first image carries forget and retain rows, the fourth only rows to forget, the others none."""
    forget = [i for i in rows["id"] if "study003" in i or i.startswith("inst00/pat000/study000/findings")]
    return group_by_image(rows, forget)


@pytest.fixture(scope="module")
def examples(grouped):
    """Images with 9, 9 and 4 rows, so that the packed sequences differ in length."""
    return [grouped[0], grouped[3], {**grouped[4], "rows": grouped[4]["rows"][:4]}]


def decode(example):
    return Image.open(io.BytesIO(example["image"]["bytes"]))


def test_keys():
    assert image_key("inst03/pat021/study084/institution") == "inst03/pat021/study084"
    assert image_key("inst03/pat021/study084/impression/cloze/rephrase") == "inst03/pat021/study084"
    assert image_key("general/axial-031/cloze") == "general/axial-031"
    assert patient_key("inst03/pat021/study084") == "inst03/pat021"


def test_group_by_image_keeps_every_row_and_does_not_decode(rows, grouped):
    shuffled = group_by_image(rows.shuffle(seed=0), rows.select(range(3, 9)))
    assert len(grouped) == len(shuffled) == 6
    assert [row["id"] for example in grouped for row in example["rows"]] == rows["id"]
    assert {row["id"] for example in shuffled for row in example["rows"]} == set(rows["id"])
    assert sum(row["forget"] for example in shuffled for row in example["rows"]) == 6
    for example in shuffled:
        assert {image_key(row["id"]) for row in example["rows"]} == {example["key"]}
        original = next(row for row in rows if image_key(row["id"]) == example["key"])
        assert np.array_equal(decode(example), original["image"])
    row = grouped[0]["rows"][3]
    assert row == {
        **{name: rows[3][name] for name in ("id", "question", "answer", "training_phrasings")},
        "task": "generation",
        "level": "section",
        "forget": True,
        "restricted": False,
    }
    unmarked = group_by_image(rows.remove_columns("restricted"))
    assert all(row["restricted"] for example in unmarked for row in example["rows"])


def test_group_by_image_names_what_is_wrong(rows):
    with pytest.raises(UserError, match="2 rows to forget are not in the dataset, inst09/pat001 among them"):
        group_by_image(rows, {"inst09/pat001", "inst09/pat002"})
    with pytest.raises(UserError, match="no rows"):
        group_by_image(rows.select([]))


@pytest.mark.parametrize("collator", [PackedCollator, RowCollator])
def test_prompts_are_what_the_processor_makes(collator, examples, model_and_processor):
    _, processor = model_and_processor
    batch = collator(processor)(examples)
    number, tasks = 0, set()
    for image_number, example in enumerate(examples):
        for row in example["rows"]:
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            expected = processor(text=[text], images=[decode(example)], return_tensors="pt")
            answer = processor.tokenizer(row["answer"] + "<|im_end|>")["input_ids"]
            sequence = image_number if collator is PackedCollator else number
            own, seen = own_and_seen(batch, sequence, number)
            assert batch["input_ids"][sequence][seen].tolist() == expected["input_ids"][0].tolist() + answer
            labels = batch["labels"][sequence][own]
            assert labels[labels != -100].tolist() == answer
            assert (labels[-len(answer) :] != -100).all()
            assert batch["image_grid_thw"][sequence].equal(expected["image_grid_thw"][0])
            number, tasks = number + 1, tasks | {row["task"]}
    assert tasks == set(TASKS)
    assert number == len(batch["forget"])


def own_and_seen(batch, sequence, number):
    """Masks over a sequence: the tokens numbered as this row's, and with them the prefix that it sees."""
    index = batch["row_index"][sequence]
    own = index == number
    return own, own | (torch.arange(len(index)) < (index >= 0).nonzero()[0])


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (28, 168)])
def test_positions_are_those_of_the_model(size, examples, model_and_processor):
    model, _ = model_and_processor
    _, processor = make_model(make_rows(1, 1))
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 10**6}
    example = {**examples[0], "image": Image.new("RGB", size)}
    packed, separate = PackedCollator(processor)([example]), RowCollator(processor)([example])
    expected, _ = model.model.get_rope_index(
        separate["input_ids"],
        separate["mm_token_type_ids"],
        image_grid_thw=separate["image_grid_thw"],
        attention_mask=separate["attention_mask"],
    )
    for number in range(len(example["rows"])):
        _, seen = own_and_seen(packed, 0, number)
        assert packed["position_ids"][:, 0, seen].equal(expected[:, number, separate["attention_mask"][number] == 1])


def signed_loss_and_gradients(model, batch):
    """Cross-entropy of retain rows less that of forget rows, so that both kinds pull on a mixed image."""
    model.zero_grad()
    logits, targets, row_index = answer_logits(model, batch)
    losses = cross_entropy(logits, targets, reduction="none")
    sign = 1 - 2 * batch["forget"][row_index].float()
    (losses * sign).mean().backward()
    rows = torch.zeros(len(batch["forget"])).index_add(0, row_index, -losses.detach())
    return rows, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_separate_rows(attention, examples, model_and_processor):
    model, processor = model_and_processor
    model.set_attn_implementation(attention)
    assert {row["forget"] for row in examples[0]["rows"]} == {True, False}
    packed, gradients = signed_loss_and_gradients(model, PackedCollator(processor)(examples))
    separate, expected = signed_loss_and_gradients(model, RowCollator(processor)(examples))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(packed, separate, atol=1e-4, rtol=0)
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert difference < 1e-4, name


@pytest.mark.parametrize("spoil", ["mask", "positions"])
def test_a_dropped_mask_or_positions_would_show(spoil, examples, model_and_processor):
    model, processor = model_and_processor
    batch = PackedCollator(processor)(examples)
    expected = score_rows(model, batch).log_probs
    if spoil == "mask":
        batch["attention_mask"] = (batch["row_index"] != -2).long()
    else:
        batch["position_ids"] = torch.arange(batch["input_ids"].size(1)).expand_as(batch["position_ids"])
    assert (score_rows(model, batch).log_probs - expected).abs().max() > 1e-2


def test_padding_changes_nothing(examples, model_and_processor):
    model, processor = model_and_processor
    collator = PackedCollator(processor)
    together = score_rows(model, collator(examples)).log_probs
    alone = torch.cat([score_rows(model, collator([example])).log_probs for example in examples])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_answer_logits_are_those_of_the_full_forward(examples, model_and_processor):
    model, processor = model_and_processor
    batch = PackedCollator(processor)(examples)
    logits, targets, row_index = answer_logits(model, batch)
    inputs = model_inputs(model, batch)
    full = model(**inputs).logits[:, :-1]
    is_answer = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(logits, full[is_answer])
    assert targets.tolist() == batch["labels"][batch["labels"] != -100].tolist()
    assert row_index.tolist() == batch["row_index"][batch["labels"] != -100].tolist()


def test_bfloat16_weights(examples, rows):
    model, processor = make_model(rows)
    scores = score_rows(model.bfloat16(), PackedCollator(processor)(examples))
    assert scores.log_probs.isfinite().all()


def test_wordings_are_redrawn_every_epoch_and_depend_on_nothing_else(grouped, model_and_processor):
    _, processor = model_and_processor

    def prompts(collator, examples, epoch):
        collator.set_epoch(epoch)
        batch = collator(examples)
        rows = [row for example in examples for row in example["rows"]]
        texts = (batch["input_ids"][batch["row_index"] == i] for i in range(len(rows)))
        return {row["id"]: processor.tokenizer.decode(ids) for row, ids in zip(rows, texts, strict=True)}

    examples = [grouped[0], grouped[1]]
    redrawing, other_seed = (PackedCollator(processor, redraw_wording=True, seed=seed) for seed in (0, 1))
    epochs = [prompts(redrawing, examples, epoch) for epoch in range(8)]
    for row in examples[0]["rows"]:
        seen = {epoch[row["id"]] for epoch in epochs}
        assert len(seen) == 2
        assert all(any(wording in text for wording in row["training_phrasings"]) for text in seen)
    assert prompts(redrawing, examples[::-1], 3) == epochs[3]
    assert prompts(PackedCollator(processor, redraw_wording=True), examples, 3) == epochs[3]
    assert prompts(other_seed, examples, 3) != epochs[3]
    fixed = PackedCollator(processor)
    assert prompts(fixed, examples, 0) == prompts(fixed, examples, 5)


def test_views_are_drawn_every_epoch(grouped, model_and_processor):
    _, processor = model_and_processor
    views = [Image.new("RGB", (56, 56), color) for color in ("black", "gray", "white")]
    collator = PackedCollator(processor, views={grouped[0]["key"]: views})
    stored = PackedCollator(processor)([grouped[0], grouped[1]])["pixel_values"]
    drawn = []
    for epoch in range(12):
        collator.set_epoch(epoch)
        first, second = collator([grouped[0], grouped[1]])["pixel_values"].chunk(2)
        assert second.equal(stored.chunk(2)[1])
        drawn.append(first[0, 0].item())
    assert len(set(drawn)) == 3
    collator.set_epoch(4)
    assert collator([grouped[0]])["pixel_values"][0, 0].item() == drawn[4]

    calls = []
    by_function = PackedCollator(processor, views=lambda key, epoch: calls.append((key, epoch)) or views[epoch % 3])
    by_function.set_epoch(5)
    assert by_function([grouped[0]])["pixel_values"][0, 0].item() == max(drawn)
    assert calls == [(grouped[0]["key"], 5)]
    none = PackedCollator(processor, views=lambda key, epoch: None)
    assert none([grouped[0], grouped[1]])["pixel_values"].equal(stored)


def test_processed_images_kept_are_bounded(grouped, model_and_processor):
    _, processor = model_and_processor
    size = PackedCollator(processor)([grouped[0]])["pixel_values"].nbytes
    collator = PackedCollator(processor, cache_bytes=2 * size)
    first = [collator([example])["pixel_values"] for example in grouped]
    assert collator._pixels.bytes == 2 * size
    assert all(
        collator([example])["pixel_values"].equal(pixels) for example, pixels in zip(grouped, first, strict=True)
    )


@pytest.mark.parametrize("collator", [PackedCollator, RowCollator])
def test_long_sequences_are_refused_not_cut(collator, examples, model_and_processor):
    _, processor = model_and_processor
    tokens = collator(processor)([examples[0]])["input_ids"].size(1)
    collator(processor, max_length=tokens)([examples[0]])
    with pytest.raises(
        UserError, match=rf"{examples[0]['key']}.*: {tokens} tokens, more than max_length {tokens - 1}"
    ):
        collator(processor, max_length=tokens - 1)([examples[0]])


def test_broken_image_is_named(examples, model_and_processor):
    broken = {**examples[0], "image": {"bytes": b"\x89PNG not really", "path": None}}
    with pytest.raises(UserError, match=f"{broken['key']}: its image does not decode"):
        PackedCollator(model_and_processor[1])([broken])


def test_other_chat_templates_are_refused():
    _, processor = make_model(make_rows(1, 1))
    processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(UserError, match="Qwen2.5-VL"):
        PackedCollator(processor)


def test_without_image_the_prompt_lacks_only_the_vision_tokens(examples, model_and_processor):
    _, processor = model_and_processor
    tokenizer = processor.tokenizer
    vision = {tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad")}
    for collator in (PackedCollator, RowCollator):
        with_image = collator(processor)([examples[0]])["input_ids"]
        batch = collator(processor, with_image=False)([examples[0]])
        for expected, ids in zip(with_image.tolist(), batch["input_ids"].tolist(), strict=True):
            assert [i for i in expected if i not in vision] == ids
        assert "pixel_values" not in batch


@pytest.fixture(scope="module")
def trained(rows, grouped):
    """A model that has learned some rows and not others."""
    model, processor = make_model(rows)
    batch = PackedCollator(processor)([*grouped])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(45):
        logits, targets, _ = answer_logits(model, batch)
        cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, processor


def test_exact_match_is_what_greedy_generation_gives(trained, grouped):
    model, processor = trained
    scores = {score["id"]: score for score in score_dataset(model, processor, grouped)}
    assert 0 < sum(score["exact"] for score in scores.values()) < len(scores)
    for example in grouped:
        texts = []
        for row in example["rows"]:
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            message = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(message, add_generation_prompt=True))
        images = [decode(example)] * len(texts)
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
        generated = model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].size(1) :]
        for row, ids in zip(example["rows"], generated, strict=True):
            answer = processor.tokenizer.decode(ids, skip_special_tokens=False).partition("<|im_end|>")
            exact = answer[0] == row["answer"] and answer[1] != ""
            assert scores[row["id"]]["exact"] == exact, row["id"]


def test_exact_match_per_task(trained, grouped):
    model, processor = trained
    model.train()
    scores = score_dataset(model, processor, grouped)
    shares = evaluate_exact_match(model, processor, grouped, batch_size=4)
    assert model.training
    model.eval()
    assert shares.keys() == {*TASKS, "all"}
    for task in TASKS:
        of_task = [score["exact"] for score in scores if score["task"] == task]
        assert shares[task] == sum(of_task) / len(of_task)
    assert shares["all"] == sum(score["exact"] for score in scores) / len(scores)
    assert sum(score["forget"] for score in scores) == 12


def test_wrong_image_is_of_another_patient(trained, grouped, monkeypatch):
    model, processor = trained
    shown = []
    original = PackedCollator._image
    monkeypatch.setattr(
        PackedCollator, "_image", lambda self, example: shown.append(example) or original(self, example)
    )
    right = score_dataset(model, processor, grouped)
    shown.clear()
    wrong = score_dataset(model, processor, grouped, wrong_image=True)
    assert [score["id"] for score in wrong] == [score["id"] for score in right]
    assert sum(score["log_prob"] for score in wrong) < sum(score["log_prob"] for score in right)
    stored = {example["image"]["bytes"]: example["key"] for example in grouped}
    for example in shown:
        assert patient_key(stored[example["image"]["bytes"]]) != patient_key(image_key(example["rows"][0]["id"]))
    with pytest.raises(UserError, match="second patient"):
        score_dataset(model, processor, grouped.select([0, 1]), wrong_image=True)
