"""Fine-tuning, retraining and unlearning end to end on a few steps: what is read, what moves, what is written."""

import json

import pytest
import torch
from PIL import ImageChops

from medforget_dataset import load
from medforget_dataset.benchmark import REPHRASE_ANGLES, Benchmark
from medforget_dataset.errors import UserError
from medforget_dataset.training_views import TRAINING_ANGLES, training_views
from unlearn.batches import RehearsalBatches
from unlearn.checkpoints import load_checkpoint
from unlearn.finetune import finetune
from unlearn.methods import METHODS
from unlearn.presets import FINETUNE_PRESETS, TINY_PRESETS, TinyPreset
from unlearn.pretrain import make_tiny, pretrain
from unlearn.unlearning import unlearn


SHORT = TinyPreset(epochs=1, pretrain_epochs=1, images_per_step=16, rehearsal_every=2)


@pytest.fixture(autouse=True)
def short_preset(monkeypatch):
    monkeypatch.setitem(TINY_PRESETS, "tiny", SHORT)
    arguments = {"num_train_epochs": SHORT.epochs, "per_device_train_batch_size": SHORT.images_per_step}
    monkeypatch.setitem(FINETUNE_PRESETS, "tiny", {**arguments, "learning_rate": SHORT.learning_rate})


@pytest.fixture(scope="module")
def base(data_dir, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setitem(TINY_PRESETS, "tiny", SHORT)
    out = tmp_path_factory.mktemp("base") / "pretrained"
    pretrain(data_dir, out, preset="tiny", quiet=True)
    patch.undo()
    return out


def _moved(before, after):
    old, new = (load_checkpoint(path)[0].state_dict() for path in (before, after))
    return {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}


def test_every_new_image_comes_once_an_epoch_and_rehearsal_in_between():
    batches = RehearsalBatches(10, 16, batch_size=2, rehearsal_batch_size=3, every=2, seed=0)
    epoch = list(batches)
    assert len(epoch) == len(batches) == 7
    assert sorted(i for batch in epoch for i in batch if i < 10) == list(range(10))
    assert [min(batch) >= 10 for batch in epoch] == [False, False, True, False, False, True, False]
    assert list(batches) == epoch
    batches.set_epoch(1)
    assert list(batches) != epoch


def test_nothing_to_rehearse_gives_no_empty_batch():
    batches = RehearsalBatches(4, 4, batch_size=2, rehearsal_batch_size=3, every=1, seed=0)
    assert [len(batch) for batch in batches] == [2, 2]
    assert len(batches) == 2


def test_tokenizer_knows_the_dataset(data_dir):
    _, processor = make_tiny(data_dir, SHORT)
    name = load("finetune", "train", data=data_dir)[1]["patient"]
    assert processor.tokenizer.decode(processor.tokenizer(name)["input_ids"]) == name


def test_fine_tuning_moves_both_towers_and_records_what_it_did(data_dir, base, tmp_path):
    scores = finetune(data_dir, tmp_path / "vanilla", model=base, preset="tiny", quiet=True)
    assert {"visual", "language_model"} <= _moved(base, tmp_path / "vanilla")
    info = json.loads((tmp_path / "vanilla" / "medforget.json").read_text())
    assert info["exact_match"] == scores
    assert set(scores) == {"right_image", "wrong_image"}
    assert (info["base"], info["config"], info["preset"], info["restricted"]) == (str(base), "finetune", "tiny", False)
    assert info["recipe"]["epochs"] == 1
    assert "transformers" in info["versions"]
    assert info["arguments"]["per_device_train_batch_size"] == 16


def test_retraining_never_sees_the_forget_rows(data_dir, base, tmp_path, monkeypatch):
    seen = []
    import unlearn.finetune as module

    original = module.group_by_image
    monkeypatch.setattr(module, "group_by_image", lambda rows, *a: seen.extend(rows["id"]) or original(rows, *a))
    finetune(data_dir, tmp_path / "retrained", model=base, config="patient_retain", preset="tiny", quiet=True)
    forget = set(load("patient_forget", "train", data=data_dir)["id"])
    assert len(seen) > 700
    assert not forget & set(seen)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(data_dir, base, tmp_path):
    for name in "ab":
        finetune(data_dir, tmp_path / name, model=base, preset="tiny", quiet=True)
    assert _moved(tmp_path / "a", tmp_path / "b") == set()


@pytest.mark.parametrize("method", ["npo", "manu"])
def test_unlearning_writes_a_checkpoint_that_says_what_was_done(data_dir, base, tmp_path, method):
    chosen = {"max_steps": 2, "beta": 0.7, "learning_rate": 1e-3} if method == "npo" else {"alpha": 2.0}
    scores = unlearn(
        data_dir, tmp_path / "out", model=base, method=method, level="section", preset="tiny", quiet=True, **chosen
    )
    assert set(scores) == {"forget", "retain"}
    assert _moved(base, tmp_path / "out")
    info = json.loads((tmp_path / "out" / "medforget.json").read_text())
    assert (info["method"], info["level"], info["base"]) == (method, "section", str(base))
    assert info["method_arguments"]["beta" if method == "npo" else "alpha"] == chosen.get("beta", chosen.get("alpha"))
    assert info["forgotten"] == {"nodes": 64, "rows": 192, "of": 960}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "64 sections, a quarter of all, with everything beneath: 192 of 960 rows" in card
    assert "has not been evaluated" in card and f"transformers {info['versions']['transformers']}" in card


def test_an_edit_that_zeroes_no_channels_has_no_file_of_them(data_dir, base, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["manu"], "edit", lambda self, model, processor, grouped: {"sigma": 0.3})
    unlearn(data_dir, tmp_path / "out", model=base, method="manu", level="patient", quiet=True)
    assert json.loads((tmp_path / "out" / "medforget.json").read_text())["edit"] == {"sigma": 0.3}
    assert not (tmp_path / "out" / "zeroed_channels.json").exists()


def test_an_output_folder_with_other_things_is_refused_and_left(data_dir, base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        unlearn(data_dir, tmp_path, model=base, method="manu", level="patient", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


class _RenderedError(Exception):
    pass


def _rendered(*_):
    raise _RenderedError


@pytest.mark.slow
def test_training_views_are_turned_and_never_the_evaluations(data_dir, tmp_path, monkeypatch):
    assert not set(TRAINING_ANGLES) & set(REPHRASE_ANGLES)
    monkeypatch.setattr("medforget_dataset.training_views.TRAINING_ANGLES", TRAINING_ANGLES[:2])
    file = tmp_path / "views.parquet"
    views = training_views(data_dir, size=56, file=file)
    assert len(views) == 64
    original, turned = views["inst00/pat000/study000"][0], views["inst00/pat000/study000"][-1]
    assert len(views["inst00/pat000/study000"]) == 2 * 2
    assert ImageChops.difference(original, turned).getbbox()
    changed = file.stat().st_mtime_ns
    training_views(data_dir, size=56, file=file)
    assert file.stat().st_mtime_ns == changed
    with monkeypatch.context() as patch:
        patch.setattr(Benchmark, "render", _rendered)
        with pytest.raises(_RenderedError):
            training_views(data_dir, size=84, file=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="views.parquet"):
        training_views(data_dir, size=56, file=file)
