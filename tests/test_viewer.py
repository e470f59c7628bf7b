"""What the Hub's dataset viewer would not show is named, each by itself."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from medforget_dataset import viewer
from medforget_dataset.validate import validate
from medforget_dataset.viewer import viewer_problems
from medforget_dataset.writer import write_parquet


FILE = "patient_forget/train-00000-of-00001.parquet"


@pytest.fixture
def folder(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "medforget")


def _edit(change):
    """Change the head of the card."""

    def edit(folder):
        path = folder / "README.md"
        _, head, body = path.read_text().split("---\n", 2)
        content = yaml.load(head, yaml.CSafeLoader)
        change(content, {entry["config_name"]: entry for entry in content["configs"]})
        path.write_text(f"---\n{yaml.dump(content, Dumper=yaml.CSafeDumper)}---\n{body}")

    return edit


def _rewrite(**options):
    """Write a file again, otherwise than the build does."""

    def rewrite(folder):
        table = pq.read_table(folder / FILE)
        if "metadata" in options:
            table = table.replace_schema_metadata(options["metadata"])
        pq.write_table(table, folder / FILE, **{k: v for k, v in options.items() if k != "metadata"})

    return rewrite


def _info(content, config):
    return next(info for info in content["dataset_info"] if info["config_name"] == config)


def _set_image_type(content, configs):
    next(f for f in _info(content, "study_forget")["features"] if f["name"] == "image")["dtype"] = "binary"


BREAKS = {
    "no head": (lambda folder: (folder / "README.md").write_text("---\n- [\n---\n"), "README.md: its head cannot"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "README.md: its head cannot be read"),
    "configuration not listed": (
        _edit(lambda content, configs: content["configs"].remove(configs["patient_forget"])),
        f"{FILE}: no configuration of README.md claims it",
    ),
    "configuration missing": (
        _edit(lambda content, configs: content["configs"].remove(configs["study_retain"])),
        "README.md: configs: study_retain is missing",
    ),
    "configuration unknown": (
        _edit(lambda content, configs: configs["study_retain"].update(config_name="studies")),
        "README.md: configs: studies is not one of the dataset's",
    ),
    "name of configuration": (
        _edit(lambda content, configs: configs["study_retain"].update(config_name="study|retain")),
        "README.md: configuration 'study|retain': its name must have none of",
    ),
    "name of split": (
        _edit(lambda content, configs: configs["general_med"]["data_files"][1].update(split="te-st")),
        "README.md: configuration general_med: split 'te-st' must be",
    ),
    "split missing": (
        _edit(lambda content, configs: configs["general_med"]["data_files"].pop()),
        "README.md: configuration general_med: splits train, expected train, test",
    ),
    "no file": (
        _edit(lambda content, configs: configs["finetune"]["data_files"][0].update(path="all/train-*.parquet")),
        "README.md: configuration finetune, split train: no file all/train-*.parquet",
    ),
    "file elsewhere": (
        _edit(lambda content, configs: configs["finetune"]["data_files"][0].update(path="../*/finetune/*.parquet")),
        "README.md: configuration finetune, split train: no file ../*/finetune/*.parquet",
    ),
    "no pattern": (
        _edit(lambda content, configs: configs["finetune"]["data_files"][0].update(path="")),
        "README.md: configuration finetune, split train: no file ",
    ),
    "a pattern of another kind": (
        _edit(lambda content, configs: configs["finetune"]["data_files"][0].update(path="**.parquet")),
        "README.md: configuration finetune, split train: no file **.parquet",
    ),
    "default without a name": (
        _edit(lambda content, configs: content["configs"].append({"default": True})),
        "README.md: configs: the default is finetune, None",
    ),
    "info of another kind": (
        _edit(lambda content, configs: content.update(dataset_info=[3])),
        "README.md: `datasets` cannot use its configs",
    ),
    "name in info": (
        _edit(lambda content, configs: _info(content, "study_forget")["features"][0].update(name=[1])),
        "README.md: `datasets` cannot use its configs",
    ),
    "claimed twice": (
        _edit(lambda content, configs: configs["study_retain"]["data_files"][0].update(path=FILE)),
        f"{FILE}: claimed by patient_forget/train and again by study_retain/train",
    ),
    "file unclaimed": (
        lambda folder: shutil.copy(folder / FILE, folder / "patient_forget" / "more.parquet"),
        "patient_forget/more.parquet: no configuration of README.md claims it",
    ),
    "default": (
        _edit(lambda content, configs: configs["finetune"].pop("default")),
        "README.md: configs: the default is not said",
    ),
    "two defaults": (
        _edit(lambda content, configs: configs["general_med"].update(default=True)),
        "README.md: `datasets` cannot use its configs",
    ),
    "no info": (
        _edit(lambda content, configs: content["dataset_info"].remove(_info(content, "study_forget"))),
        "README.md: dataset_info: study_forget is missing",
    ),
    "image in info": (_edit(_set_image_type), "README.md: dataset_info of study_forget: column image is binary"),
    "rows in info": (
        _edit(lambda content, configs: _info(content, "study_forget")["splits"][0].update(num_examples=9)),
        "README.md: dataset_info of study_forget: 9 rows in train, the files have 208",
    ),
    "image in Parquet": (
        _rewrite(metadata={}, write_page_index=True),
        f"{FILE}: its metadata does not declare the column image",
    ),
    "page index": (_rewrite(), f"{FILE}: no page index of 18 columns, id first"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_each_violation_is_one_line_with_the_file(case, folder):
    change, complaint = BREAKS[case]
    change(folder)
    problems = list(viewer_problems(folder))
    assert any(complaint in problem for problem in problems), problems
    assert all(problem.startswith(str(folder)) and "\n" not in problem for problem in problems)


def test_a_fresh_build_is_shown(data_dir):
    assert list(viewer_problems(data_dir)) == []


def test_a_row_group_too_large_for_the_viewer_is_named(folder, monkeypatch):
    monkeypatch.setattr(viewer, "ROW_GROUP_BYTES", 20_000)
    large = [problem for problem in viewer_problems(folder) if FILE in problem]
    assert len(large) == 1 and "row group 0 has 0.1 MB before compression" in large[0]


def test_validate_tells_what_the_viewer_would_not_show(folder):
    BREAKS["two defaults"][0](folder)
    assert any("cannot use its configs" in problem for problem in validate(folder))


def test_what_is_written_stays_below_the_viewers_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("medforget_dataset.writer.ROW_GROUP_BYTES", 400_000)
    table = pa.table({"number": range(1000), "image": [bytes([i % 256]) * 1000 for i in range(1000)]})
    write_parquet(table, tmp_path / "large.parquet")
    file = pq.ParquetFile(tmp_path / "large.parquet")
    sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)]
    assert len(sizes) > 1 and max(sizes) <= 400_000
    assert file.read() == table
