"""The task files: which exist, what they say, how lm-eval finds them."""

import fnmatch
import shutil
import subprocess
import sys

import pytest
import yaml
from lm_eval.tasks import TaskManager

from harness_tasks import generate


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(generate.FOLDER), include_defaults=False)


def test_files_are_as_generated():
    assert generate.main(["--check"]) == 0


def test_there_are_78_tasks():
    names = [leaf.name for leaf in generate.LEAVES]
    assert len(names) == len(set(names)) == 78
    expected = {
        f"medforget_{level}_{split}_{kind}"
        for level in ("institution", "patient", "study", "section")
        for split in ("forget", "retain", "rephrase")
        for kind in ("generation", "cloze", "classification", "classification_text", "identity")
    }
    expected -= {"medforget_section_forget_identity", "medforget_section_rephrase_identity"}
    general = ("generation", "cloze", "classification", "classification_text")
    expected |= {f"medforget_general_med_{kind}" for kind in general}
    expected |= {
        f"medforget_{level}_attack_{context}"
        for level in ("institution", "patient", "study", "section")
        for context in ("none", "study", "patient", "institution")
    }
    assert set(names) == expected


def test_check_names_changed_missing_and_extra_files(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(generate.FOLDER, tmp_path / "tasks")
    monkeypatch.setattr(generate, "FOLDER", folder)
    changed, missing = (folder / f"{leaf.name}.yaml" for leaf in generate.LEAVES[:2])
    changed.write_text(changed.read_text() + "repeats: 2\n")
    missing.unlink()
    (folder / "medforget_old.yaml").write_text("task: medforget_old\n")
    assert generate.main(["--check"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert {name for name in (changed.name, missing.name, "medforget_old.yaml") if any(name in x for x in lines)} == {
        changed.name,
        missing.name,
        "medforget_old.yaml",
    }
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_lm_eval_indexes_tasks_tags_and_the_group(manager):
    assert manager.all_subtasks == sorted(leaf.name for leaf in generate.LEAVES)
    assert manager.all_groups == ["medforget"]
    levels = ("institution", "patient", "study", "section")
    splits = ("forget", "retain", "rephrase", "attack")
    tags = {f"medforget_{level}_{split}" for level in levels for split in splits}
    tags |= {f"medforget_{level}" for level in levels}
    assert set(manager.all_tags) == tags | {"medforget_general_med", "medforget_attack"}


def test_glob_matches_every_task_and_not_the_group(manager):
    matched = set(manager.match_tasks(["medforget_*"]))
    assert matched >= {leaf.name for leaf in generate.LEAVES}
    assert "medforget" not in matched


@pytest.mark.parametrize(
    ("selection", "pattern"),
    [
        ("medforget_*", "*"),
        ("medforget", "*"),
        ("medforget_study", "medforget_study_*"),
        ("medforget_patient_forget", "medforget_patient_forget_*"),
        ("medforget_patient_attack", "medforget_patient_attack_*"),
        ("medforget_attack", "medforget_*_attack_*"),
        ("medforget_general_med", "medforget_general_med_*"),
    ],
)
def test_glob_group_and_tags_load_their_tasks(selection, pattern, data_dir):
    manager = TaskManager(include_path=str(generate.FOLDER), include_defaults=False, metadata={"data": str(data_dir)})
    loaded = manager.load(manager.match_tasks([selection]))["tasks"]
    assert set(loaded) == set(fnmatch.filter([leaf.name for leaf in generate.LEAVES], pattern))


def test_every_task_declares_version_and_direction_of_its_scores(data_dir):
    manager = TaskManager(include_path=str(generate.FOLDER), include_defaults=False, metadata={"data": str(data_dir)})
    scores = {
        "generation": {"rouge_l", "exact_match", "exact_match_authors_code", "factuality", "gen_score"},
        "cloze": {"exact_match", "exact_match_authors_code"},
        "identity": {"exact_match", "exact_match_authors_code"},
        "classification": {"acc"},
        "classification_text": {"acc_authors_code"},
    }
    of_the_judge = {"judge": None, "judge_failed": False}  # its name, and how often it failed
    tasks = manager.load(["medforget"])["tasks"]
    for leaf in generate.LEAVES:
        task = tasks[leaf.name]
        assert task.VERSION == 1.1
        directions = dict.fromkeys(scores[leaf.kind], True) | (of_the_judge if leaf.kind == "generation" else {})
        assert task.higher_is_better() == directions
        assert set(task.aggregation()) == set(directions)
        kinds = {task.eval_docs.features["task"].int2str(kind) for kind in task.eval_docs["task"]}
        assert kinds == {leaf.kind.removesuffix("_text")}


def test_leaves_are_a_few_lines():
    for leaf in generate.LEAVES:
        text = (generate.FOLDER / f"{leaf.name}.yaml").read_text()
        assert 3 <= len(text.splitlines()) <= 6
        assert yaml.safe_load(text)["include"] == f"_{leaf.kind}_yaml"


def test_folder_works_as_a_copy_inside_lm_eval_without_the_project(tmp_path, data_dir, tiny_checkpoint):
    copy = shutil.copytree(generate.FOLDER, tmp_path / "lm_eval/tasks/medforget")
    script = f"""
import sys
for package in ("harness_tasks", "medforget_dataset", "unlearn"):
    sys.modules[package] = None  # importing it is an error now
import lm_eval
from lm_eval.tasks import TaskManager
arguments = {{"pretrained": {str(tiny_checkpoint)!r}}}
manager = TaskManager(include_path={str(copy)!r}, include_defaults=False, metadata=arguments)
results = lm_eval.simple_evaluate("hf-multimodal", arguments, ["medforget_general_med"], batch_size=8, limit=1,
                                  device="cpu", apply_chat_template=True, task_manager=manager, bootstrap_iters=0)
assert len(results["results"]) == 4, results["results"]
"""
    # data_dir is named "medforget": from its parent it is found without being named.
    subprocess.run([sys.executable, "-c", script], cwd=data_dir.parent, check=True, capture_output=True, timeout=120)
