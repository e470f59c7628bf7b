"""The model class for lm-eval: answers of `hf-multimodal`, log-likelihoods as of single rows, nothing asked twice."""

import logging

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.hf_vlms import HFMultimodalLM
from peft import LoraConfig, get_peft_model
from PIL import Image
from stand_in import make_model, make_rows
from transformers import AutoModelForImageTextToText

from harness_tasks.vlm import MedForgetVLM
from unlearn.checkpoints import save_checkpoint
from unlearn.lora import LANGUAGE_LINEAR


SIZES = [(56, 56), (84, 56), (56, 112), (140, 84)]
QUESTIONS = [
    "Write the findings.",
    "Name the patient of this image, please.",
    "How large? A) 1 B) 2 C) 3 D) 4",
    "Why?",
]
OPTIONS = ["A", "B", "C", " Small opacity over the left lung, 45 mm.", " heart"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, processor = make_model(make_rows())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)  # answers that differ
    return str(save_checkpoint(tmp_path_factory.mktemp("vlm") / "model", model, processor, {}))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def load(kind, checkpoint, batch_size=5, **kwargs):
    return kind(checkpoint, device="cpu", dtype="float32", batch_size=batch_size, **kwargs)


def prompt(model, question):
    return model.apply_chat_template([{"role": "user", "content": f"<image>{question}"}])


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def to_generate(model, images, **kwargs):
    arguments = {"max_gen_toks": 12, "do_sample": False, "until": ["mm"]} | kwargs
    return [
        (prompt(model, question), dict(arguments), {"visual": [image.copy()]})
        for question in QUESTIONS
        for image in images
    ]


def to_score(model, images):
    return [
        (prompt(model, question), option, {"visual": [image.copy()]})
        for question in QUESTIONS
        for image in images
        for option in OPTIONS
    ]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_generation_is_that_of_hf_multimodal(batch_size, checkpoint, images):
    answers = {}
    for kind in (HFMultimodalLM, MedForgetVLM):
        model = load(kind, checkpoint, 1 if kind is HFMultimodalLM else batch_size)
        answers[kind] = model.generate_until(
            instances("generate_until", to_generate(model, images)), disable_tqdm=True
        )
    assert answers[MedForgetVLM] == answers[HFMultimodalLM]
    assert len(set(answers[MedForgetVLM])) > 8
    assert not any("mm" in answer for answer in answers[MedForgetVLM])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_log_likelihood_is_that_of_one_row_at_a_time(batch_size, checkpoint, images):
    model = load(MedForgetVLM, checkpoint, batch_size)
    requests = to_score(model, images)
    found = model.loglikelihood(instances("loglikelihood", requests), disable_tqdm=True)
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for (context, option, aux), (total, greedy) in zip(requests, found, strict=True):
        encoded = model.processor(text=[context + option], images=[aux["visual"]], return_tensors="pt")
        own = len(encoded["input_ids"][0]) - len(
            model.processor(text=[context], images=[aux["visual"]], return_tensors="pt")["input_ids"][0]
        )
        with torch.no_grad():
            log_probs = plain(**encoded).logits[0].log_softmax(-1)[:-1]
        target = encoded["input_ids"][0, 1:]
        expected = log_probs.gather(1, target[:, None])[-own:].sum().item()
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == bool((log_probs.argmax(-1) == target)[-own:].all())
    assert len({round(total, 4) for total, _ in found}) > len(found) // 2


def test_spaces_that_end_a_context_belong_to_the_continuation(checkpoint, images):
    model = load(MedForgetVLM, checkpoint)
    context, aux = prompt(model, "Why?"), {"visual": [images[0]]}
    moved, plain = model.loglikelihood(
        instances("loglikelihood", [(context + " ", "heart", aux), (context, " heart", aux)]), disable_tqdm=True
    )
    assert moved == plain


def test_what_is_shared_is_computed_once(checkpoint, images, monkeypatch):
    model = load(MedForgetVLM, checkpoint, 64)
    calls = {"images": 0, "rows": 0}
    visual, generate = model._vlm.model.visual.forward, model._vlm.generate

    def count_images(pixels, grid_thw, **kwargs):
        calls["images"] += len(grid_thw)
        return visual(pixels, grid_thw=grid_thw, **kwargs)

    def count_rows(**kwargs):
        calls["rows"] += len(kwargs["input_ids"])
        return generate(**kwargs)

    monkeypatch.setattr(model._vlm.model.visual, "forward", count_images)
    monkeypatch.setattr(model._vlm, "generate", count_rows)
    once = to_generate(model, images)
    answers = model.generate_until(instances("generate_until", once * 3), disable_tqdm=True)
    assert calls == {"images": len(images), "rows": len(once)}
    assert answers == answers[: len(once)] * 3


def test_other_arguments_are_other_requests(checkpoint, images):
    model = load(MedForgetVLM, checkpoint)
    both = to_generate(model, images[:1]) + to_generate(model, images[:1], max_gen_toks=2)
    answers = model.generate_until(instances("generate_until", both), disable_tqdm=True)
    assert all(long.startswith(short) for long, short in zip(answers[:4], answers[4:], strict=True))
    assert answers[:4] != answers[4:]


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_answers_survive_a_crash(kind, checkpoint, images, tmp_path, monkeypatch):
    model = load(MedForgetVLM, checkpoint)
    requests = to_generate(model, images) if kind == "generate_until" else to_score(model, images)
    expected = getattr(model, kind)(instances(kind, requests), disable_tqdm=True)
    share, asked = model._share, []

    def crash(batch):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(batch)
        return share(batch)

    cached = CachingLM(model, str(tmp_path / "answers"))
    monkeypatch.setattr(model, "_share", crash)
    with pytest.raises(KeyboardInterrupt):
        getattr(cached, kind)(instances(kind, requests))
    kept = len(cached.dbdict)
    assert 0 < kept < len(requests)

    rows = []
    monkeypatch.setattr(model, "_share", lambda batch: rows.extend(batch) or share(batch))
    again = getattr(cached, kind)(instances(kind, requests))
    assert again == (expected if kind == "generate_until" else [pytest.approx(pair) for pair in expected])
    assert sum(len(part.owners) for part in rows) < len(requests)
    rows.clear()
    getattr(cached, kind)(instances(kind, requests))
    assert not rows


def test_an_adapter_is_loaded_with_its_base(checkpoint, images, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=LANGUAGE_LINEAR, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = checkpoint
    adapted.save_pretrained(tmp_path / "adapter")
    answers = []
    for kind, path, kwargs in (
        (MedForgetVLM, str(tmp_path / "adapter"), {}),
        (MedForgetVLM, checkpoint, {"peft": str(tmp_path / "adapter")}),
        (HFMultimodalLM, checkpoint, {"peft": str(tmp_path / "adapter")}),
        (MedForgetVLM, checkpoint, {}),
    ):
        model = load(kind, path, **kwargs)
        answers.append(
            model.generate_until(instances("generate_until", to_generate(model, images)), disable_tqdm=True)
        )
    assert answers[0] == answers[1] == answers[2] != answers[3]


def test_a_model_it_does_not_know_is_evaluated_as_by_hf_multimodal(checkpoint, images, caplog, monkeypatch):
    monkeypatch.setattr("harness_tasks.vlm.Qwen2_5_VLForConditionalGeneration", type("Other", (), {}))
    with caplog.at_level(logging.WARNING):
        model = load(MedForgetVLM, checkpoint)
    requests = to_generate(model, images[:2])
    answers = model.generate_until(instances("generate_until", requests), disable_tqdm=True)
    model.generate_until(instances("generate_until", requests), disable_tqdm=True)
    assert [record.message for record in caplog.records if "medforget-vlm" in record.message] == [
        "medforget-vlm knows Qwen2.5-VL only; Qwen2_5_VLForConditionalGeneration is evaluated as by hf-multimodal, "
        "without log-likelihoods"
    ]
    assert answers == load(HFMultimodalLM, checkpoint).generate_until(
        instances("generate_until", requests), disable_tqdm=True
    )
    with pytest.raises(NotImplementedError):
        model.loglikelihood(instances("loglikelihood", to_score(model, images[:1])))
