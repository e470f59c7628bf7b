"""Turned views: the geometric ones say what they are, and SV-DRR gets and gives the right image at the right angle."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from mimic_tree import MimicTree
from PIL import Image

from medforget_dataset import BuildOptions, UserError, build, load
from medforget_dataset.benchmark import REPHRASE_ANGLES, Benchmark, encode_image
from medforget_dataset.svdrr import SCRIPT, SvDrr
from medforget_dataset.validate import validate
from medforget_dataset.views import turn_in_plane


SMALL = {"institutions": 4, "patients": 4, "image_size": 56}


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """An installation with a checkpoint, and a cache of its own."""
    monkeypatch.setenv("MEDFORGET_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "SV-DRR"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("svdrr_stand_in.py"), folder / SCRIPT)
    model = folder / "models" / "svdrr-dit-fb-256"
    model.mkdir(parents=True)
    (model / "weights.safetensors").write_bytes(b"weights")
    return folder, model


def calls(folder):
    file = folder / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


def marked(corner):
    """A picture with one bright quarter."""
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[32 * (corner // 2) : 32 * (corner // 2) + 32, 32 * (corner % 2) : 32 * (corner % 2) + 32] = 200
    return Image.fromarray(pixels)


def test_every_image_comes_back_from_its_own_angle(installation):
    model = SvDrr(*installation)
    assert model.size == 256
    images = {f"study{number:03d}": marked(number % 4) for number in range(8)}
    angles = {name: REPHRASE_ANGLES[number // 2] for number, name in enumerate(images)}
    views = model.turn(images, angles)
    for name, image in images.items():
        expected = image.resize((256, 256)).convert("L").rotate(-angles[name])
        assert np.array_equal(np.asarray(views[name]), np.asarray(expected)), name
    assert len(calls(installation[0])) == 4  # one an angle
    assert [line.split()[:2] for line in calls(installation[0])] == [["2", "256"]] * 4


def test_what_was_made_is_not_made_again(installation):
    images, angles = {"a": marked(0), "b": marked(1)}, {"a": 15.0, "b": 15.0}
    first = SvDrr(*installation).turn({"a": images["a"]}, angles)
    second = SvDrr(*installation).turn(images, angles)
    assert np.array_equal(np.asarray(first["a"]), np.asarray(second["a"]))
    assert [line.split()[0] for line in calls(installation[0])] == ["1", "1"]
    (installation[1] / "weights.safetensors").write_bytes(b"other weights")
    SvDrr(*installation).turn(images, angles)
    assert len(calls(installation[0])) == 3


@pytest.mark.parametrize(("file", "said"), [("fail", "CUDA out of memory"), ("omit", "made no such image")])
def test_a_script_that_fails_is_told_in_one_line_and_half_a_batch_is_not_kept_as_whole(installation, file, said):
    folder, model = installation
    (folder / file).touch()
    images, angles = {"a": marked(0), "b": marked(1)}, {"a": 15.0, "b": 15.0}
    with pytest.raises(UserError, match=said) as caught:
        SvDrr(folder, model).turn(images, angles)
    assert "\n" not in str(caught.value)
    (folder / file).unlink()
    assert len(SvDrr(folder, model).turn(images, angles)) == 2


def test_what_is_missing_is_named_before_anything_is_built(installation, tmp_path):
    folder, model = installation
    with pytest.raises(UserError, match=f"--svdrr {tmp_path}: no {SCRIPT}"):
        SvDrr(tmp_path, model)
    with pytest.raises(UserError, match="--svdrr-model .*no such checkpoint"):
        SvDrr(folder, folder / "nowhere")
    with pytest.raises(UserError, match="--svdrr-model : --views svdrr needs it"):
        BuildOptions(views="svdrr", svdrr=str(folder))
    with pytest.raises(UserError, match="--views auto has no use for it"):
        BuildOptions(svdrr=str(folder))


def test_a_build_by_svdrr_says_so_and_is_taken_up_where_it_was(installation, tmp_path):
    folder, model = installation
    root = tmp_path / "mimic"
    root.mkdir()
    MimicTree(root, traps=False)
    options = {**SMALL, "views": "svdrr", "svdrr": str(folder), "svdrr_model": str(model)}
    options |= {"corpus": "mimic-cxr", "root": str(root)}
    out = build(tmp_path / "medforget", workers=1, **options)
    assert validate(out) == []
    rows = load("patient_forget_rephrase", "test", data=out)
    assert set(rows["view_method"]) == {"svdrr"} and set(rows["view_angle"]) <= set(REPHRASE_ANGLES)
    assert set(load("finetune", "train", data=out)["view_method"]) == {"original"}
    record = json.loads((out / "build.json").read_text())["views"]
    assert record == {
        "method": "svdrr",
        "model": "svdrr-dit-fb-256",
        "image_size": 256,
        "axis": "azimuth, about the patient's long axis",
        "flip_pose": True,
    }
    card = (out / "README.md").read_text()
    assert "imagined by SV-DRR" in card and "svdrr-dit-fb-256" in card and str(folder) not in card
    before = len(calls(folder))
    benchmark = Benchmark(BuildOptions(**options), workers=1)
    row = next(iter(benchmark.examples("patient_forget_rephrase", "test")))
    assert len(calls(folder)) == before
    assert row["image"]["bytes"] == rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]


def test_geometric_views_of_the_embedded_corpus_are_its_own_images_turned():
    benchmark = Benchmark(BuildOptions(views="geometric", **SMALL), workers=1)
    rows = benchmark.config_rows("study_forget_rephrase")
    assert {row["view_method"] for row in rows} == {"geometric"}
    _, patient, study = rows[0]["id"].split("/")[:3]
    angle = rows[0]["view_angle"]
    upright = benchmark.corpus.image(patient, study, size=56)
    assert benchmark._image(rows[0]["id"], angle) == encode_image(turn_in_plane(upright, angle))


def test_a_picture_turned_in_its_plane_keeps_its_middle_and_turns_counter_clockwise():
    image = Image.new("L", (101, 101))
    image.putpixel((100, 50), 255)
    image.putpixel((50, 50), 200)
    turned = np.asarray(turn_in_plane(image, 90.0))
    assert turned[50, 50] > 150
    assert turned[0, 50] > 150 and turned[50, 100] == 0
