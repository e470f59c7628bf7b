"""The function that the pipeline evaluates checkpoints with."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from harness_tasks.evaluate import TASKS_FOLDER, evaluate_checkpoint
from medforget_dataset.errors import UserError
from unlearn.lora import LANGUAGE_LINEAR


def generate_version():
    settings = yaml.load((TASKS_FOLDER / "_medforget_yaml").read_text(), yaml.BaseLoader)
    return float(settings["metadata"]["version"])


def test_scores_counts_and_answers(data_dir, tiny_checkpoint, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    scores = evaluate_checkpoint(
        tiny_checkpoint,
        data_dir,
        ["medforget_study_forget", "medforget_general_med_c*"],
        limit=3,
        output_path=tmp_path,
    )
    kinds = ("generation", "cloze", "classification", "classification_text", "identity")
    assert set(scores) == {f"medforget_study_forget_{kind}" for kind in kinds} | {
        "medforget_general_med_cloze",
        "medforget_general_med_classification",
        "medforget_general_med_classification_text",
    }
    for name, score in scores.items():
        answers = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert score["n"] == len(answers) == 3
        for metric, value in score["metrics"].items():
            assert 0 <= value <= 1
            assert value == pytest.approx(sum(answer[metric] for answer in answers) / 3)
    assert set(scores["medforget_study_forget_generation"]["metrics"]) == {
        *("rouge_l", "exact_match", "exact_match_authors_code", "factuality", "gen_score")
    }
    assert set(scores["medforget_study_forget_cloze"]["metrics"]) == {"exact_match", "exact_match_authors_code"}
    assert {score["version"] for score in scores.values()} == {generate_version()}
    assert [name for name, score in scores.items() if "judge" in score] == ["medforget_study_forget_generation"]
    assert set(scores["medforget_general_med_classification"]["metrics"]) == {"acc"}
    chosen = (tmp_path / "medforget_study_forget_classification.jsonl").read_text().splitlines()
    assert {json.loads(line)["response"] for line in chosen} <= set("ABCD")
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_without_a_tokenizer_chooses_among_the_letters(data_dir, tiny_checkpoint, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    lora = LoraConfig(r=2, target_modules=LANGUAGE_LINEAR)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*token*"))
    task = "medforget_patient_forget_classification"
    responses = []
    for checkpoint in (tiny_checkpoint, tmp_path / "adapter"):
        evaluate_checkpoint(checkpoint, data_dir, [task], limit=3, output_path=tmp_path)
        lines = (tmp_path / f"{task}.jsonl").read_text().splitlines()
        responses.append([json.loads(line)["response"] for line in lines])
    # A new adapter changes nothing.
    assert responses[0] == responses[1] and set(responses[1]) <= set("ABCD")


def test_wrong_image_asks_the_same_questions_about_other_images(data_dir, tiny_checkpoint, tmp_path):
    answers = {}
    for wrong in (False, True):
        evaluate_checkpoint(
            tiny_checkpoint,
            data_dir,
            ["medforget_patient_forget_cloze"],
            limit=12,
            output_path=tmp_path / str(wrong),
            wrong_image=wrong,
        )
        path = tmp_path / str(wrong) / "medforget_patient_forget_cloze.jsonl"
        answers[wrong] = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question"] for row in answers[False]] == [row["question"] for row in answers[True]]
    assert [row["response"] for row in answers[False]] != [row["response"] for row in answers[True]]


def test_what_the_user_can_mend_is_one_line(data_dir, tiny_checkpoint, tmp_path):
    cases = [
        ((tmp_path, data_dir, ["medforget"]), r"not a checkpoint: it has no config.json"),
        ((tiny_checkpoint, tmp_path, ["medforget_patient"]), r"is not a dataset folder \(no README.md\)"),
        (
            (tiny_checkpoint, data_dir, ["medforget_ward"]),
            "matches medforget_ward; groups and tags: medforget, .*patient",
        ),
        ((tiny_checkpoint, data_dir, []), "matches an empty list"),
    ]
    mute = shutil.copytree(tiny_checkpoint, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    cases.append(((mute, data_dir, ["medforget_patient_forget_cloze"]), "mute: the processor has no chat template"))
    empty = shutil.copytree(tiny_checkpoint, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    cases.append(((empty, data_dir, ["medforget_patient_forget_cloze"]), "empty: model cannot be loaded"))
    bare = shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    (bare / "processor_config.json").unlink()
    cases.append(((bare, data_dir, ["medforget"]), "bare: no processor that can be read"))
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            evaluate_checkpoint(*arguments)
        assert "\n" not in str(raised.value)
