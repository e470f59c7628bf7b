"""The model class for lm-eval: answers of `hf-multimodal`, log-likelihoods as of single rows, nothing asked twice."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_requests import instances, load, make_checkpoint, make_images, prompt, to_generate, to_score
from lm_eval.api.model import CachingLM
from lm_eval.models.hf_vlms import HFMultimodalLM
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from harness_tasks.batching import Prefix, Request, share_out
from harness_tasks.cache_owner import owner_of
from harness_tasks.vlm import MedForgetVLM
from medforget_dataset.errors import UserError
from unlearn.checkpoints import save_checkpoint
from unlearn.lora import LANGUAGE_LINEAR


TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 5, 64])
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


def test_an_empty_continuation_is_certain(checkpoint, images):
    model = load(MedForgetVLM, checkpoint)
    asked = [(prompt(model, "Why?"), option, {"visual": [images[0]]}) for option in ("", " heart")]
    (total, greedy), _ = model.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    assert (total, greedy) == (0.0, True)


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
    assert sum(len(part.rows) for part in rows) < len(requests)
    rows.clear()
    getattr(cached, kind)(instances(kind, requests))
    assert not rows


def test_answers_of_another_checkpoint_are_refused(checkpoint, images, tmp_path):
    model = load(MedForgetVLM, checkpoint)
    requests = instances("generate_until", to_generate(model, images[:1]))
    database = tmp_path / "answers_rank0.db"
    kept = CachingLM(model, str(database))
    answers = kept.generate_until(requests)
    assert CachingLM(load(MedForgetVLM, checkpoint), str(database)).generate_until(requests) == answers

    other = shutil.copytree(checkpoint, tmp_path / "other")
    of_other = load(MedForgetVLM, str(other))
    with pytest.raises(UserError) as told:
        CachingLM(of_other, str(database))
    assert str(told.value) == (
        f"{database}: holds the answers of {Path(checkpoint).resolve()}, not of {other}; give another --use_cache"
    )
    assert CachingLM(of_other, str(tmp_path / "another.db")).generate_until(requests) == answers
    os.utime(other / "model.safetensors", ns=(0, 0))
    with pytest.raises(UserError, match="holds the answers of .*other before its files were changed, not of "):
        CachingLM(load(MedForgetVLM, str(other)), str(tmp_path / "another.db"))


def test_answers_of_an_unknown_checkpoint_are_taken_with_a_warning(checkpoint, images, tmp_path, caplog):
    model = load(HFMultimodalLM, checkpoint, 1)
    requests = instances("generate_until", to_generate(model, images[:1]))
    answers = CachingLM(model, str(tmp_path / "answers.db")).generate_until(requests)
    assert CachingLM(load(MedForgetVLM, checkpoint), str(tmp_path / "answers.db")).generate_until(requests) == answers
    assert "answers.db: does not say whose answers it holds; taken for " in caplog.text


def test_an_owner_is_all_that_answers_depend_on(tmp_path):
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    paths = [str(tmp_path / "adapter"), str(tmp_path / "base")]
    before = owner_of(paths, "main")
    assert before.name == f"{tmp_path}/adapter on {tmp_path}/base" and owner_of(paths, "main") == before
    assert owner_of(paths[1:], "main") != before
    (tmp_path / "base/notes.txt").write_text("")
    assert owner_of(paths, "main") == before
    (tmp_path / "adapter/adapter_model.safetensors").write_text("")
    assert owner_of(paths, "main").digest != before.digest
    assert owner_of(["org/name"], "v1") != owner_of(["org/name"], "main")


def put_adapter(model, base, folder, seed):
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE_LINEAR, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_is_loaded_with_its_base(checkpoint, images, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    merged = put_adapter(base, checkpoint, tmp_path / "first", 0).merge_and_unload()
    save_checkpoint(tmp_path / "merged", merged, AutoProcessor.from_pretrained(checkpoint), {})
    put_adapter(merged, tmp_path / "first", tmp_path / "second", 1)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")

    def answers(kind, path, **kwargs):
        model = load(kind, path, **kwargs)
        return model.generate_until(instances("generate_until", to_generate(model, images)), disable_tqdm=True)

    with_first = answers(MedForgetVLM, first)
    assert (
        with_first == answers(HFMultimodalLM, checkpoint, peft=first) == answers(MedForgetVLM, checkpoint, peft=first)
    )
    assert with_first != answers(MedForgetVLM, checkpoint)
    with_both = answers(MedForgetVLM, second)
    assert with_both == answers(HFMultimodalLM, str(tmp_path / "merged"), peft=second)
    assert with_both != with_first
    assert isinstance(load(MedForgetVLM, second).model, PeftModel)


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


def test_sliding_attention_is_evaluated_as_by_hf_multimodal(checkpoint, tmp_path, caplog):
    folder = shutil.copytree(checkpoint, tmp_path / "sliding")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    text["layer_types"] = ["sliding_attention"] * text["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        model = load(MedForgetVLM, str(folder))
    assert not model.shares_prefixes
    assert [record.message for record in caplog.records if "medforget-vlm" in record.message] == [
        "medforget-vlm knows no sliding attention, which this config.json asks for; "
        "Qwen2_5_VLForConditionalGeneration is evaluated as by hf-multimodal, without log-likelihoods"
    ]


@pytest.mark.parametrize("batch_size", ["auto", "auto:4"])
def test_a_batch_size_that_is_to_be_found_is_refused(batch_size, checkpoint):
    with pytest.raises(UserError, match=f"--batch_size {batch_size}: .*; give a number"):
        load(MedForgetVLM, checkpoint, batch_size)


def test_all_questions_about_an_image_go_to_one_that_has_it():
    requests = {
        f"{image}{n}": Request(Prefix("", image), str(n), "", "")
        for image, questions in {"a": 5, "b": 3, "c": 3, "d": 1}.items()
        for n in range(questions)
    }
    asked = [
        {key: request for key, request in requests.items() if key[0] in held and int(key[1]) % 2 == own}
        for held, own in (("abc", 0), ("abcd", 1), ("d", 0))
    ]
    done = {"a0": "known"}
    shares = share_out(asked, done)
    assert [sorted(request.prefix.digest + request.suffix for request in share) for share in shares] == [
        ["a1", "a2", "a3", "a4"],
        ["b0", "b1", "b2", "c0", "c1", "c2"],
        ["d0"],
    ]


@pytest.mark.slow
def test_two_processes_divide_the_images_and_answer_as_one(images, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "model")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TESTS / "two_askers.py"]
    done = subprocess.run(
        [sys.executable, *launch, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(facts["rank"], facts["world"]) for facts in two] == [(0, 2), (1, 2)]

    model = load(MedForgetVLM, checkpoint)
    texts = to_generate(model, images)
    texts = [text for i in range(len(images)) for text in texts[i :: len(images)]]
    expected = model.generate_until(instances("generate_until", texts), disable_tqdm=True)
    for name, all_expected in (
        ("generate", expected),
        ("again", expected + expected[1:]),
        ("cached", expected),
        ("resumed", expected),
    ):
        for rank, facts in enumerate(two):
            assert facts[name]["answers"] == all_expected[rank::2], (name, rank)
    scores = model.loglikelihood(instances("loglikelihood", to_score(model, images)), disable_tqdm=True)
    for rank, facts in enumerate(two):
        for found, (total, greedy) in zip(facts["score"]["answers"], scores[rank::2], strict=True):
            assert found == [pytest.approx(total, abs=1e-4), greedy]
        for name in ("generate", "again", "cached"):
            assert (facts[name]["images"], facts[name]["rows"]) == (2, 8), name
    # What the first process has in its cache, for either of them, is not computed again.
    assert [facts["resumed"]["rows"] for facts in two] == [0, 4]
