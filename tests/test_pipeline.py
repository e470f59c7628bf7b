"""The pipeline: stages are skipped, resumed and refused as they should be, and the report adds up."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest

from medforget_dataset import BuildOptions
from medforget_dataset.errors import UserError
from unlearn import pipeline
from unlearn.plans import PLANS, Plan, make_plan
from unlearn.presets import FINETUNE_PRESETS, TINY_PRESETS, TinyPreset


SMALL = TinyPreset(epochs=1, pretrain_epochs=1, images_per_step=8)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run of one epoch with two methods on the data of the other tests; what it scores means nothing."""
    runs = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setitem(TINY_PRESETS, "tiny", SMALL)
    arguments = {"num_train_epochs": SMALL.epochs, "per_device_train_batch_size": SMALL.images_per_step}
    patch.setitem(FINETUNE_PRESETS, "tiny", arguments)
    patch.setitem(
        PLANS,
        "small",
        Plan(BuildOptions(institutions=4, patients=4, image_size=56), ("patient",), ("npo", "manu"), preset="tiny"),
    )
    patch.setattr(pipeline, "build", lambda out, **options: _link(data_dir, out))
    patch.setattr(pipeline, "evaluate_checkpoint", partial(pipeline.evaluate_checkpoint, limit=4))
    patch.setitem(pipeline.METHODS["npo"].presets, "tiny", {"learning_rate": 1e-4, "max_steps": 2})
    pipeline.run("small", runs=runs, jobs=1)
    yield runs
    patch.undo()


def _link(data_dir, out):
    Path(out).symlink_to(data_dir, target_is_directory=True)


def test_report_holds_every_method_split_and_task(finished):
    report = json.loads((finished / "small" / "report.json").read_text())
    scores = [record for record in report["records"] if record["measure"] == "score"]
    found = {(s["method"], s["split"], s["task"]) for s in scores}
    for method in ("vanilla", "retrained", "npo", "manu"):
        for split in ("forget", "retain", "rephrase"):
            assert {(method, split, task) for task in ("generation", "cloze", "classification", "identity")} <= found
        assert {(method, "general_med", task) for task in ("generation", "cloze", "classification")} <= found
    controls = [record for record in report["records"] if record["measure"] == "control"]
    assert all(record["value"] >= 0 and record["n"] > 0 for record in scores + controls)
    assert {record["n"] for record in scores} == {4}


def test_report_says_what_it_is(finished):
    text = (finished / "small" / "report.md").read_text()
    assert "The corpus is rendered" in text
    assert "960 rows" in text
    for name in ("scores.png", "forget-retain.png"):
        assert f"figures/{name}" in text
        assert (finished / "small" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_does_nothing_again(finished, monkeypatch):
    for name in ("build", "pretrain", "finetune", "unlearn"):
        monkeypatch.setattr(pipeline, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} ran again"))
    pipeline.run("small", runs=finished, jobs=1)


@pytest.mark.slow
def test_a_lost_checkpoint_is_made_again_with_what_depends_on_it(finished, monkeypatch):
    ran = []
    original = pipeline.unlearn
    monkeypatch.setattr(
        pipeline, "unlearn", lambda *args, **kwargs: ran.append(kwargs["method"]) or original(*args, **kwargs)
    )
    folder = finished / "small" / "manu-patient"
    folder.rename(finished / "moved")
    pipeline.run("small", runs=finished, jobs=1)
    assert ran == ["manu"]
    assert folder.is_dir()


def test_another_seed_makes_everything_anew(tmp_path):
    plan = make_plan("demo", seed=3)
    assert (plan.seed, plan.data.seed) == (3, 3)
    assert dataclasses.asdict(plan) != dataclasses.asdict(PLANS["demo"])


@pytest.mark.parametrize("knew", [0.0, 0.5])
def test_relearning_aims_at_what_vanilla_knew(knew, data_dir, tiny_checkpoint, tmp_path):
    vanilla = tmp_path / "vanilla.json"
    vanilla.write_text(json.dumps({"medforget_patient_forget_cloze": {"metrics": {"exact_match": knew}}}))
    arguments = (vanilla, data_dir, tiny_checkpoint, "patient", tmp_path / "out.json")
    if not knew:
        with pytest.raises(UserError, match="vanilla.json: answers no cloze row that the patient level forgets"):
            pipeline._relearn(*arguments)
        return
    pipeline._relearn(*arguments, examples=1, max_rows=1, quiet=True)
    assert json.loads((tmp_path / "out.json").read_text())["recovered_at"] == 0.45


def test_the_reproduction_has_the_papers_experiment_and_more(tmp_path):
    stages = pipeline._Experiment(make_plan("reproduce"), tmp_path, None).stages()
    of_kind = {}
    for stage in stages:
        of_kind.setdefault(stage.kind, []).append(stage.name)
    methods, levels = ("grad_diff", "kl_min", "npo", "manu"), ("institution", "patient", "study", "section")
    unlearned = {f"{method}-{level}" for method in methods for level in levels}
    flat = {f"{method}-patient-flat" for method in methods}
    asked = {"vanilla", *(f"retrained-{level}" for level in levels), *unlearned}
    assert set(of_kind["unlearn"]) == unlearned | flat
    assert set(of_kind["evaluate"]) == {f"evaluate-{name}" for name in asked | flat | {"vanilla-wrong-image"}}
    assert set(of_kind["probe"]) == {f"probe-{name}" for name in asked}
    relearned = {f"relearn-{name}-patient" for name in ("retrained", *methods)}
    assert set(of_kind["relearn"]) == relearned | {f"{name}-all" for name in relearned}
    done = set()
    for stage in stages:
        assert set(stage.after) <= done, f"{stage.name} comes before what it reads"
        done.add(stage.name)
