"""The folder that is built: what `datasets` makes of it, that its bytes are reproducible, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medforget_dataset import CONFIGS, FEATURES, BuildOptions, MedForget, UserError, build, load
from medforget_dataset.benchmark import SPLITS, Benchmark
from medforget_dataset.validate import validate
from medforget_dataset.writer import parquet_path


@pytest.fixture
def copy_of(data_dir, tmp_path):
    return Path(shutil.copytree(data_dir, tmp_path / "medforget"))


def test_load_dataset_reads_every_configuration_from_the_folder(data_dir, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    assert set(datasets.get_dataset_config_names("medforget")) == set(CONFIGS)
    for config in CONFIGS:
        loaded = datasets.load_dataset("medforget", config)
        assert all(split.features == FEATURES for split in loaded.values())
    assert datasets.get_dataset_default_config_name("medforget") == "finetune"


def test_load_dataset_streams(data_dir):
    row = next(iter(datasets.load_dataset(str(data_dir), "patient_forget", split="train", streaming=True)))
    assert row["image"].size == (56, 56)


def test_images_are_stored_once(data_dir):
    file = pq.ParquetFile(data_dir / "finetune" / "train-00000-of-00001.parquet")
    assert file.metadata.num_rows == 960
    images = sum(
        file.metadata.row_group(group).column(index).total_compressed_size
        for group in range(file.metadata.num_row_groups)
        for index in range(file.metadata.row_group(group).num_columns)
        if file.metadata.row_group(group).column(index).path_in_schema == "image.bytes"
    )
    distinct = {x["bytes"] for x in file.read(columns=["image"])["image"].to_pylist()}
    assert images < 1.2 * sum(map(len, distinct))


def test_rephrase_rows_show_another_view_of_the_same_study(data_dir):
    forget = {row["id"]: row for row in load("study_forget", "train", data=data_dir)}
    for row in load("study_forget_rephrase", "test", data=data_dir).select(range(0, 208, 40)):
        original = forget[row["id"].removesuffix("/rephrase")]
        assert row["answer"] == original["answer"]
        assert row["original_question"] == original["question"] != row["question"]
        assert row["question"] not in original["training_phrasings"]
        assert row["image"].tobytes() != original["image"].tobytes()


def test_validate_finds_nothing_in_a_fresh_build(data_dir):
    assert validate(data_dir) == []


def _rewrite(folder, config, change):
    path = folder / config / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)


@pytest.mark.parametrize(
    ("config", "change", "complaint"),
    [
        ("finetune", lambda rows: rows.pop(), "expected 960"),
        ("patient_forget", lambda rows: rows.pop(), "expected 224"),
        ("patient_retain", lambda rows: rows.append(rows.pop(0)), "not the file that was built"),
        ("finetune", lambda rows: rows[4].update(question=rows[4]["answer"]), "contains its answer"),
        ("finetune", lambda rows: rows[0].update(restricted=True), "restricted"),
        ("finetune", lambda rows: rows[1].update(id=rows[0]["id"]), "occurs 2 times"),
        ("section_forget", lambda rows: rows[0].update(answer="x"), "differs from finetune"),
        ("finetune", lambda rows: rows[0].update(image={"bytes": b"no image", "path": "x.jpg"}), "does not decode"),
    ],
)
def test_validate_names_each_violation(copy_of, config, change, complaint):
    _rewrite(copy_of, config, change)
    assert any(complaint in problem for problem in validate(copy_of))


def test_a_file_cut_short_is_named(copy_of):
    path = copy_of / "patient_forget" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:1000])
    assert any(str(path) in problem for problem in validate(copy_of))
    with pytest.raises(UserError, match="patient_forget"):
        load("patient_forget", data=copy_of)


def test_another_build_is_never_answered_from_the_cache(copy_of, monkeypatch):
    monkeypatch.setattr(
        "medforget_dataset.corpora.embedded.render", lambda *args, size, **_: Image.new("L", (size, size), 9)
    )
    before = load("section_forget", "train", data=copy_of)["answer"][:]
    benchmark = BuildOptions(institutions=4, patients=4, image_size=56, seed=9)
    build(copy_of, workers=1, **vars(benchmark))
    after = datasets.load_dataset(str(copy_of), "section_forget", split="train")["answer"][:]
    assert after != before


@pytest.mark.parametrize("name", ["README.md", parquet_path("study_retain", "train"), ""])
def test_a_file_that_the_record_leaves_out_is_named(name, copy_of):
    record = json.loads((copy_of / "build.json").read_text())
    files = {} if not name else {key: entry for key, entry in record["files"].items() if key != name}
    (copy_of / "build.json").write_text(json.dumps(record | {"files": files}))
    problems = [line for line in validate(copy_of) if line.endswith("not in build.json")]
    if name:
        assert problems == [f"{copy_of / name}: not in build.json"]
    else:
        assert len(problems) == 1 + sum(map(len, SPLITS.values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"sede": 1}}, "option 'sede' is unknown; build it again"),
        ({"options": {"seed": "1"}}, "option seed is '1', not int; build it again"),
        ({"options": {"patients": 3}}, "3"),
        ({"options": []}, "its options or files are not what a build writes"),
        ({"files": {"README.md": 1}}, "its options or files are not what a build writes"),
    ],
)
def test_a_build_record_that_no_build_writes_is_one_line(change, words, copy_of):
    record = json.loads((copy_of / "build.json").read_text())
    (copy_of / "build.json").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=re.escape(f"{copy_of / 'build.json'}: ")) as caught:
        validate(copy_of)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(copy_of):
    (copy_of / "finetune" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="finetune/train-00000-of-00001.parquet: missing"):
        load("finetune", data=copy_of)


def test_data_is_found_by_argument_then_environment_then_folder(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="medforget build"):
        load("finetune")
    monkeypatch.setenv("MEDFORGET_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="MEDFORGET_DIR"):
        load("finetune")
    monkeypatch.setenv("MEDFORGET_DIR", str(data_dir))
    assert len(load("finetune", "train")) == 960
    monkeypatch.delenv("MEDFORGET_DIR")
    monkeypatch.chdir(data_dir.parent)
    assert len(load("finetune", "train")) == 960


def test_an_unreachable_hub_is_an_error_and_never_the_cache():
    with pytest.raises(UserError, match="some/dataset"):
        load("finetune", data="some/dataset")


@pytest.mark.parametrize(("config", "split"), [("finetine", None), ("finetune", "test")])
def test_unknown_names_are_listed(data_dir, config, split):
    with pytest.raises(UserError, match="choose from"):
        load(config, split, data=data_dir)


def test_a_folder_that_is_no_dataset_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a MedForget dataset"):
        load("finetune", data=tmp_path)
    with pytest.raises(UserError, match="not a MedForget dataset"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_build_that_fails_leaves_what_was_there(copy_of, monkeypatch):
    before = (copy_of / "build.json").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medforget_dataset.writer.write_parquet", full_disk)
    monkeypatch.setattr(Benchmark, "render_all", lambda self: None)
    with pytest.raises(OSError, match="No space left"):
        build(copy_of, institutions=4, patients=4, image_size=56, seed=5, workers=1)
    assert (copy_of / "build.json").read_bytes() == before
    assert [path.name for path in copy_of.parent.iterdir()] == ["medforget"]


@pytest.mark.parametrize("record", ['{"format": "another tool"}', "[1, 2]", "not json"])
def test_a_build_record_of_another_tool_does_not_open_the_folder_to_us(tmp_path, record):
    (tmp_path / "build.json").write_text(record)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a MedForget dataset"):
        build(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_others_put_into_the_folder_is_not_deleted(copy_of):
    (copy_of / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a MedForget dataset"):
        build(copy_of, institutions=4, patients=4, image_size=56, seed=5)
    assert (copy_of / "notes.txt").read_text() == "mine"


def test_letters_of_the_general_set_are_balanced(data_dir):
    rows = [row for split in load("general_med", data=data_dir).values() for row in split if row["choices"]]
    letters = [row["answer"] for row in rows]
    assert max(letters.count(letter) for letter in "ABCD") <= 0.35 * len(letters)


def test_the_same_build_is_not_built_twice(data_dir, monkeypatch):
    monkeypatch.setattr(Benchmark, "render_all", lambda self: pytest.fail("rendered again"))
    assert build(data_dir, institutions=4, patients=4, image_size=56) == data_dir


_RENDER = """
import hashlib, sys
from medforget_dataset import BuildOptions
from medforget_dataset.benchmark import Benchmark
if __name__ == "__main__":
    workers = int(sys.argv[1])
    benchmark = Benchmark(BuildOptions(institutions=4, patients=4, image_size=56, seed=3), workers=workers)
    paths = [node.path for node in benchmark.nodes][:8]
    images = benchmark.render({path: (0.0, 15.0) for path in paths})
    print(hashlib.sha256(b"".join(images[key] for key in sorted(images))).hexdigest())
"""


def test_workers_and_threads_change_no_byte(tmp_path):
    script = tmp_path / "render.py"
    script.write_text(_RENDER)
    digests = {
        subprocess.run(
            [sys.executable, str(script), str(workers)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for workers, threads in ((1, 2), (2, 1))
    }
    assert len(digests) == 1


def test_the_builder_streams_the_rows_of_the_folder(data_dir):
    builder = MedForget(config_name="patient_forget", institutions=4, patients=4, image_size=56)
    streamed = next(iter(builder.as_streaming_dataset(split="train")))
    stored = load("patient_forget", "train", data=data_dir)[0]
    assert {k: v for k, v in streamed.items() if k != "image"} == {k: v for k, v in stored.items() if k != "image"}
    assert streamed["image"].tobytes() == stored["image"].tobytes()


def test_the_builder_prepares_by_itself(tmp_path):
    builder = MedForget(config_name="general_med", cache_dir=str(tmp_path), image_size=56)
    builder.download_and_prepare()
    assert len(builder.as_dataset(split="test")) == 234


def test_the_card_says_what_was_built(data_dir):
    card = (data_dir / "README.md").read_text()
    assert "This build holds no patient data" in card
    assert "CC BY 3.0" in card
    assert "medforget build --institutions 4 --patients 4 --image-size 56\n" in card
    assert "960 rows" in card
