"""What lm-eval sends to the model is the prompt of training, and what comes back does not depend on the batch."""

import gc

import lm_eval
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager

from harness_tasks import generate


@pytest.fixture(scope="module")
def lm(tiny_checkpoint):
    model = HFMultimodalLM(str(tiny_checkpoint), device="cpu", dtype="float32", batch_size=4)
    gc.collect()
    gc.freeze()  # the model collects garbage after every batch, which need not look at all that is loaded so far
    yield model
    gc.unfreeze()


@pytest.fixture(scope="module")
def tasks(data_dir, tiny_checkpoint):
    metadata = {"pretrained": str(tiny_checkpoint), "data": str(data_dir)}
    manager = TaskManager(include_path=str(generate.FOLDER), include_defaults=False, metadata=metadata)
    return manager.load(["medforget"])["tasks"]


def training_inputs(processor, row):
    message = {
        "role": "user",
        "content": [
            {"type": "image", "image": row["image"].convert("RGB")},
            {"type": "text", "text": row["question"]},
        ],
    }
    return processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def requests(lm, task, limit):
    task.build_all_requests(
        limit=limit, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lm.apply_chat_template
    )
    return task.instances


def rows_of(data_dir, leaf, limit):
    """The first rows of a task, read without any of the code under test."""
    rows = Dataset(pq.read_table(data_dir / leaf.config / f"{leaf.data_split}-00000-of-00001.parquet"))
    kind = rows.features["task"].str2int(leaf.kind.removesuffix("_text"))
    rows = rows.select([index for index, other in enumerate(rows["task"]) if other == kind][:limit])
    return [row | {"question": attack_prompt(leaf.context, row)} for row in rows]


def attack_prompt(context, row):
    """The forms of the paper's Table 6, written out."""
    institution, patient, study, question = (row[name] for name in ("institution", "patient", "study", "question"))
    return {
        "": question,
        "none": question,
        "study": f"For study {study}: {question}",
        "patient": f"For patient {patient}, study {study}: {question}",
        "institution": f"For institution {institution}, patient {patient}, study {study}: {question}",
    }[context]


@pytest.mark.parametrize("leaf", generate.LEAVES, ids=lambda leaf: leaf.name)
def test_token_ids_and_pixels_are_those_of_the_training_prompt(leaf, lm, tasks, data_dir, monkeypatch):
    sent = []

    def generate_nothing(input_ids, attention_mask, pixel_values, image_grid_thw, **_):
        patches = pixel_values.split(image_grid_thw.prod(-1).tolist())
        for ids, mask, image in zip(input_ids, attention_mask, patches, strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padded on the left only
            sent.append((ids[mask.bool()].tolist(), image))
        return input_ids

    monkeypatch.setattr(lm.model, "generate", generate_nothing)
    lm.generate_until(requests(lm, tasks[leaf.name], limit=6), disable_tqdm=True)
    rows = rows_of(data_dir, leaf, limit=6)
    expected = [training_inputs(lm.processor, row) for row in rows]
    expected = [(inputs["input_ids"][0].tolist(), inputs["pixel_values"]) for inputs in expected]
    for pairs in (sent, expected):  # lm-eval sends the longest prompts first
        pairs.sort(key=lambda pair: (pair[0], pair[1].sum().item()))
    assert len(sent) == len(expected)
    for (sent_ids, sent_pixels), (ids, pixels) in zip(sent, expected, strict=True):
        assert sent_ids == ids
        assert torch.equal(sent_pixels, pixels)


def test_answers_do_not_depend_on_the_batch_size_and_are_those_of_the_training_prompt(lm, tasks, data_dir):
    leaves = [leaf for leaf in generate.LEAVES if leaf.slice == "medforget_patient_forget"]
    asked = [request for leaf in leaves for request in requests(lm, tasks[leaf.name], limit=3)]
    answers = {}
    for batch_size in (1, 64):
        lm.batch_size_per_gpu = batch_size
        answers[batch_size] = lm.generate_until(asked, disable_tqdm=True)
    assert answers[64] == answers[1]
    assert len(set(answers[1])) > 3  # different questions have different answers, or nothing was tested

    expected = []
    for leaf in leaves:
        if leaf.kind == "classification":
            continue
        longest = 64 if leaf.kind in ("cloze", "identity") else 128
        for row in rows_of(data_dir, leaf, limit=3):
            inputs = training_inputs(lm.processor, row)
            output = lm.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            answer = output[0, inputs["input_ids"].shape[1] :]
            expected.append(lm.tokenizer.decode(answer, skip_special_tokens=True))
    free = [
        answer
        for answer, request in zip(answers[64], asked, strict=True)
        if not request.task_name.endswith("_classification")
    ]
    assert free == expected


def test_the_attack_without_context_makes_the_requests_of_the_forget_task(lm, tasks):
    for level in generate.LEVELS:
        plain, attack = (
            requests(lm, tasks[f"medforget_{level}_{task}"], limit=None)
            for task in ("forget_generation", "attack_none")
        )
        assert [request.args for request in attack] == [request.args for request in plain]
        assert [request.doc for request in attack] == [request.doc for request in plain]


def test_choice_is_the_option_of_highest_log_likelihood(lm, tasks, data_dir):
    leaf = generate.Leaf("patient", "forget", "classification")
    lm.batch_size_per_gpu = 64
    head = lm.model.lm_head
    letters = [lm.tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]
    expected, chosen = [], []
    for seed in range(3):  # an untrained model prefers one letter: other heads prefer others
        noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
        original = head.weight.detach().clone()
        with torch.no_grad():
            head.weight += noise
        try:
            chosen += lm.generate_until(requests(lm, tasks[leaf.name], limit=8), disable_tqdm=True)
            for row in rows_of(data_dir, leaf, limit=8):
                with torch.inference_mode():
                    logits = lm.model(**training_inputs(lm.processor, row)).logits[0, -1]
                expected.append("ABCD"[logits.log_softmax(-1)[letters].argmax()])
        finally:
            with torch.no_grad():
                head.weight.copy_(original)
    assert len(set(expected)) > 1
    assert chosen == expected


def test_choice_needs_to_know_the_tokenizer_and_follows_the_model(lm, data_dir, tiny_checkpoint):
    def ask(metadata):
        manager = TaskManager(include_path=str(generate.FOLDER), include_defaults=False, metadata=metadata)
        tasks = manager.load(["medforget_general_med_classification"])
        return lm_eval.evaluate(lm, tasks, limit=1, apply_chat_template=True, bootstrap_iters=0, log_samples=False)

    with pytest.raises(ValueError, match="need the tokenizer of the model"):
        ask({"data": str(data_dir)})
    assert ask({"data": str(data_dir), "pretrained": "missing", "tokenizer": str(tiny_checkpoint)})["results"]
