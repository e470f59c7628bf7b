"""Turned views: the geometric ones say what they are, and SV-DRR gets and gives the right image at the right angle."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from mimic_tree import MimicTree
from PIL import Image

from medforget_dataset import BuildOptions, UserError, build, load
from medforget_dataset.benchmark import REPHRASE_ANGLES, Benchmark, encode_image
from medforget_dataset.images import fit_square
from medforget_dataset.svdrr import PYTHON, SCRIPT, SvDrr
from medforget_dataset.validate import validate
from medforget_dataset.views import turn_in_plane


SMALL = {"institutions": 4, "patients": 4, "image_size": 56}


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """An installation with a checkpoint, and a cache of its own."""
    monkeypatch.setenv("MEDFORGET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(PYTHON, raising=False)
    folder = tmp_path / "SV-DRR"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("svdrr_stand_in.py"), folder / SCRIPT)
    return folder, checkpoint(folder / "models" / "DiT-fb-256")


def checkpoint(model):
    model.mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    shared = model.parent / "shared"
    shared.mkdir(exist_ok=True)
    (shared / "weights.safetensors").write_bytes(b"weights")
    (model / "vae").symlink_to(shared, target_is_directory=True)  # as its downloader leaves it
    return model


def calls(folder, kind="call"):
    file = folder / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split()[1:] for line in lines if line.startswith(kind)]


def noise(number, size=256):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size, size), dtype=np.uint8))


def shifted(image, angle):
    """What the stand-in shows from an angle of ours: azimuths of its data run against ours."""
    return np.roll(np.asarray(image), round(-angle), axis=1)


def left_over(tmp_path):
    return [path for path in (tmp_path / "cache" / "svdrr").iterdir() if path.suffix != ".png"]


def test_every_image_comes_back_from_its_own_angle(installation, tmp_path):
    folder, _ = installation
    (folder / "noise").touch()
    model = SvDrr(*installation)
    # More images than any split of the script's own takes, and an order that it turns round.
    images = {f"study{number:03d}": noise(number) for number in range(24)}
    angles = {name: REPHRASE_ANGLES[number * 7 % 4] for number, name in enumerate(images)}
    views = model.turn(images, angles)
    for name, image in images.items():
        assert views[name].mode == "L"
        assert np.array_equal(np.asarray(views[name]), shifted(image, angles[name])), name
    assert [call[:2] for call in calls(folder)] == [["6", "256"]] * 4  # the model is loaded once an angle
    assert left_over(tmp_path) == []
    assert (tmp_path / "cache" / "svdrr").stat().st_mode & 0o077 == 0


def test_positive_angles_turn_as_the_projections_of_the_embedded_corpus_do(installation, tmp_path):
    # Azimuths of SV-DRR's data: from +30° they show what our projections show from -30° (see svdrr.py). The stand-in
    # shows those: it looks up a projection by the azimuth in the coordinates of the data.
    folder, _ = installation
    corpus = Benchmark(BuildOptions(**SMALL), workers=1).corpus
    patient = corpus.institutions()[0].patients[0]
    render = {a: corpus.image(patient.key, patient.studies[0].key, view_angle=a, size=64) for a in (0, -30, 30)}
    for azimuth in (-30, 30):
        render[-azimuth].save(folder / f"azimuth{azimuth:+d}.png")
    script = folder / SCRIPT
    program = script.read_text()
    roll = "made = np.roll(np.asarray(source), round(-azimuth), axis=1)"
    assert roll in program
    shown = 'made = np.asarray(Image.open(here / f"azimuth{round(-azimuth):+d}.png").resize((256, 256)))'
    script.write_text(program.replace(roll, shown))
    views = SvDrr(*installation).turn({"a": render[0], "b": render[0]}, {"a": 30.0, "b": -30.0})
    for name, angle in (("a", 30), ("b", -30)):
        own, other = (
            np.corrcoef(np.asarray(views[name].resize((64, 64))).ravel(), np.asarray(render[sign * angle]).ravel())[
                0, 1
            ]
            for sign in (1, -1)
        )
        assert own > 0.99 > other


def test_what_was_made_is_not_made_again(installation):
    folder, model = installation
    images, angles = {"a": noise(0), "b": noise(1)}, {"a": 15.0, "b": 15.0}
    first = SvDrr(folder, model).turn({"a": images["a"]}, angles)
    second = SvDrr(folder, model).turn(images, angles)
    assert np.array_equal(np.asarray(first["a"]), np.asarray(second["a"]))
    assert [call[0] for call in calls(folder)] == ["1", "1"]
    SvDrr(folder, model).turn(images, {"a": -15.0, "b": 15.0})
    assert [call[0] for call in calls(folder)] == ["1", "1", "1"]
    # Other weights, behind a link, another script, and a kept view that is damaged: made anew.
    (model.parent / "shared" / "weights.safetensors").write_bytes(b"other weights")
    SvDrr(folder, model).turn(images, angles)
    (folder / SCRIPT).write_text((folder / SCRIPT).read_text() + "\n")
    svdrr = SvDrr(folder, model)
    svdrr.turn(images, angles)
    assert [call[0] for call in calls(folder)][3:] == ["2", "2"]
    kept = svdrr._kept(images["a"], 15.0)
    kept.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(np.asarray(svdrr.turn(images, angles)["a"]), np.asarray(first["a"]))
    assert calls(folder)[-1][0] == "1"


@pytest.mark.parametrize(
    ("fault", "said", "kept"),
    [
        ("fail", "test_svdrr_DiT.py ended with status 3: Traceback .* | RuntimeError: CUDA out of memory", 2),
        ("omit", "made 2 of 5 views", 2),
        ("half", "made 2 of 5 views that can be read", 2),
    ],
)
def test_a_failure_is_one_line_that_names_the_flag_and_what_was_made_stays(installation, tmp_path, fault, said, kept):
    folder, model = installation
    (folder / fault).write_text("2")
    images = {str(number): noise(number) for number in range(5)}
    angles = dict.fromkeys(images, 15.0)
    with pytest.raises(UserError, match=said) as caught:
        SvDrr(folder, model).turn(images, angles)
    assert str(caught.value).startswith(f"--svdrr {folder}: ") and "\n" not in str(caught.value)
    assert left_over(tmp_path) == []
    (folder / fault).unlink()
    views = SvDrr(folder, model).turn(images, angles)
    assert calls(folder)[-1][0] == str(5 - kept)
    assert all(np.array_equal(np.asarray(views[name]), shifted(images[name], 15)) for name in images)


def test_no_view_at_all_and_a_blank_one_are_refused(installation):
    folder, model = installation
    for fault, said in (("omit", "--svdrr .*made 0 of 1 views"), ("blank", "--svdrr-model .*without any contrast")):
        (folder / fault).touch()
        with pytest.raises(UserError, match=said):
            SvDrr(folder, model).turn({"a": noise(0)}, {"a": 15.0})
        (folder / fault).unlink()


@pytest.mark.slow
def test_a_killed_build_takes_its_script_along_and_goes_on_where_it_was(installation, tmp_path):
    folder, model = installation
    (folder / "slow").write_text("0.3")
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_views import SvDrr, noise\n"
        "images = {str(number): noise(number) for number in range(20)}\n"
        "SvDrr(Path(sys.argv[2]), Path(sys.argv[3])).turn(images, dict.fromkeys(images, -15.0))\n"
    )
    cache = tmp_path / "cache" / "svdrr"
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder), str(model)]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    ((_, _, script),) = calls(folder)
    while Path(f"/proc/{script}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    made = len(list(cache.glob("*.png")))
    assert 3 <= made < 20 and not Path(f"/proc/{script}").exists()
    (folder / "slow").unlink()
    images = {str(number): noise(number) for number in range(20)}
    views = SvDrr(folder, model).turn(images, dict.fromkeys(images, -15.0))
    assert calls(folder)[-1][0] == str(20 - made)
    assert all(np.array_equal(np.asarray(views[name]), shifted(images[name], -15)) for name in images)
    assert left_over(tmp_path) == []  # the killed one's inputs are gone too


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("svdrr-dit-fb-1024", 1024), ("DiT-fb-512", 512), ("DiT-fb-256-512", 512), ("fb-512/final-pipeline", 512),
        ("mine", 512), ("step-12560", 512), ("DiT-fb-256", 256),
    ],
)  # fmt: skip
def test_the_resolution_is_the_one_of_the_checkpoints_name(installation, tmp_path, name, size):
    folder, _ = installation
    assert SvDrr(folder, checkpoint(tmp_path / "models" / name)).size == size


def test_its_own_interpreter_comes_first(installation, tmp_path, monkeypatch):
    folder, model = installation
    assert SvDrr(folder, model).python == sys.executable
    monkeypatch.setenv(PYTHON, "/nowhere/python")
    with pytest.raises(UserError, match=rf"\${PYTHON} is /nowhere/python: no such interpreter"):
        SvDrr(folder, model)
    monkeypatch.setenv(PYTHON, sys.executable)
    assert SvDrr(folder, model).python == sys.executable
    for name in ("venv", ".venv"):
        own = folder / name / "bin" / "python"
        own.parent.mkdir(parents=True)
        own.write_text("not a program")
        assert SvDrr(folder, model).python == str(own)
    with pytest.raises(UserError, match=f"--svdrr {folder}: .*/.venv/bin/python cannot be run"):
        SvDrr(folder, model).turn({"a": noise(0)}, {"a": 15.0})
    own.write_text(f'#!/bin/sh\ntouch "{tmp_path}/used"\nexec "{sys.executable}" "$@"\n')
    own.chmod(0o755)
    SvDrr(folder, model).turn({"a": noise(0)}, {"a": 15.0})
    assert (tmp_path / "used").exists()


def test_what_is_missing_is_named_before_anything_is_built(installation, tmp_path, monkeypatch):
    folder, model = installation
    with pytest.raises(UserError, match=f"--svdrr {tmp_path}: no {SCRIPT}"):
        SvDrr(tmp_path, model)
    with pytest.raises(UserError, match="--svdrr-model .*no such checkpoint"):
        SvDrr(folder, folder / "nowhere")
    with pytest.raises(UserError, match="--svdrr-model .*no model_index.json"):
        SvDrr(folder, folder / "models")
    assert SvDrr(folder, Path("models/DiT-fb-256")).model == model  # as its README writes it
    with pytest.raises(UserError, match="--svdrr-model '': --views svdrr needs it"):
        BuildOptions(views="svdrr", svdrr=str(folder))
    with pytest.raises(UserError, match="--views auto has no use for it"):
        BuildOptions(svdrr=str(folder))
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDFORGET_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/svdrr: .*MEDFORGET_CACHE"):
        SvDrr(folder, model).turn({"a": noise(0)}, {"a": 15.0})


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
    assert record == {"method": "svdrr", **SvDrr(folder, model).record()}
    assert record["model"] == "DiT-fb-256" and record["image_size"] == 256 and record["flip_pose"] is True
    card = (out / "README.md").read_text()
    assert "imagined by SV-DRR" in card and "DiT-fb-256" in card and str(folder) not in card
    # Four calls for the whole build, and every row has the view of its own study from its own angle.
    assert len(calls(folder)) == len(set(load("section_forget_rephrase", "test", data=out)["view_angle"]))
    before = len(calls(folder))
    benchmark = Benchmark(BuildOptions(**options), workers=1)
    examples = list(benchmark.examples("patient_forget_rephrase", "test"))
    assert len(calls(folder)) == before
    plain = rows.cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in examples] == [image["bytes"] for image in plain["image"]]
    for row in examples[::15]:
        _, patient, study = row["id"].split("/")[:3]
        upright = benchmark.corpus.image(patient, study, size=256)
        expected = fit_square(Image.fromarray(shifted(upright, row["view_angle"])), 56)
        assert row["image"]["bytes"] == encode_image(expected)


def test_views_of_the_embedded_corpus_may_be_imagined_too(installation):
    folder, model = installation
    options = BuildOptions(**SMALL, views="svdrr", svdrr=str(folder), svdrr_model=str(model))
    benchmark = Benchmark(options, workers=1)
    row = benchmark.config_rows("patient_forget_rephrase")[0]
    path, angle = "/".join(row["id"].split("/")[:3]), row["view_angle"]
    views = benchmark.render({path: (0.0, angle)})
    _, patient, study = path.split("/")
    upright = benchmark.corpus.image(patient, study, size=256)
    assert views[study, 0.0] == encode_image(benchmark.corpus.image(patient, study, size=56))
    assert views[study, angle] == encode_image(fit_square(Image.fromarray(shifted(upright, angle)), 56))


@pytest.mark.slow
def test_a_geometric_build_says_so_everywhere(tmp_path):
    out = build(tmp_path / "medforget", workers=1, views="geometric", **SMALL)
    assert validate(out) == []
    rows = load("study_forget_rephrase", "test", data=out)
    assert set(rows["view_method"]) == {"geometric"} and set(rows["view_angle"]) <= set(REPHRASE_ANGLES)
    assert "pictures turned in their plane" in (out / "README.md").read_text()
    assert json.loads((out / "build.json").read_text())["views"] == {"method": "geometric"}
    corpus = Benchmark(BuildOptions(**SMALL), workers=1).corpus
    plain = rows.cast_column("image", datasets.Image(decode=False))
    for number in range(0, len(rows), 60):
        _, patient, study = rows[number]["id"].split("/")[:3]
        turned = turn_in_plane(corpus.image(patient, study, size=56), rows[number]["view_angle"])
        assert plain[number]["image"]["bytes"] == encode_image(turned)


def test_a_picture_turned_in_its_plane_keeps_its_middle_and_turns_counter_clockwise():
    image = Image.new("L", (101, 101))
    image.putpixel((100, 50), 255)
    image.putpixel((50, 50), 200)
    turned = np.asarray(turn_in_plane(image, 90.0))
    assert turned[50, 50] > 150
    assert turned[0, 50] > 150 and turned[50, 100] == 0
