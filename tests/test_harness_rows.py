"""Which rows a task gets: where the data is found, the wrong-image control, and what bad data does."""

import shutil

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from PIL import Image

from harness_tasks import rows


CLOZE = {"config": "patient_forget", "split": "train", "task": "cloze"}


@pytest.fixture
def own_data(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "medforget")


def replace_rows(folder, config, split, change):
    """Write a configuration again, with `change` applied to its list of rows."""
    path = folder / config / f"{split}-00000-of-00001.parquet"
    table = datasets.Dataset(pq.read_table(path))
    old = table.cast_column("image", datasets.Image(decode=False)).to_list()
    pq.write_table(datasets.Dataset.from_list(change(old), features=table.features).data.table, path)


def test_rows_of_one_kind_keep_their_order_and_images_stay_bytes(data_dir):
    loaded = rows.load(**CLOZE, data=str(data_dir))["test"]
    everything = datasets.Dataset(pq.read_table(data_dir / "patient_forget/train-00000-of-00001.parquet"))
    cloze = everything.features["task"].str2int("cloze")
    assert loaded["id"][:] == [
        i for i, kind in zip(everything["id"], everything["task"], strict=True) if kind == cloze
    ]
    assert isinstance(loaded[0]["image"]["bytes"], bytes)


def test_argument_then_variable_then_working_folder(data_dir, tmp_path, monkeypatch):
    other = shutil.copytree(data_dir, tmp_path / "other")
    monkeypatch.chdir(data_dir.parent)
    monkeypatch.delenv("MEDFORGET_DIR", raising=False)
    assert rows.find_data() == str(data_dir.resolve())
    monkeypatch.setenv("MEDFORGET_DIR", str(other))
    assert rows.find_data() == str(other)
    assert rows.find_data(str(data_dir)) == str(data_dir.resolve())


def test_what_is_named_is_never_replaced_by_something_else(data_dir, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    monkeypatch.setenv("MEDFORGET_DIR", "/nowhere/medforget")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/medforget.*MEDFORGET_DIR.*make data"):
        rows.load(**CLOZE)
    with pytest.raises(FileNotFoundError, match=r"named by data, does not exist"):
        rows.load(**CLOZE, data="elsewhere")


def test_missing_data_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDFORGET_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"medforget does not exist. Build it with `make data`, or"):
        rows.load(**CLOZE)
    (tmp_path / "medforget").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is not a dataset folder \(no README.md\)"):
        rows.load(**CLOZE)


def test_only_an_argument_of_the_form_org_name_means_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rows.find_data("some-org/medforget") == "some-org/medforget"
    (tmp_path / "runs").mkdir()
    for not_a_hub_id in ("medforget", "runs/medforget", "a/b/c", "/org/name", "../name"):
        with pytest.raises(FileNotFoundError):
            rows.find_data(not_a_hub_id)
    monkeypatch.setenv("MEDFORGET_DIR", "some-org/medforget")
    with pytest.raises(FileNotFoundError):
        rows.find_data()


def test_hub_data_is_read_at_the_newest_commit(data_dir, monkeypatch):
    asked = {}

    class Api:
        def dataset_info(self, name):
            return huggingface_hub.DatasetInfo(id=name, sha="newest", disabled=False, tags=[])

    def load_dataset(name, config, split, revision):
        asked.update(name=name, revision=revision)
        return datasets.Dataset(pq.read_table(data_dir / config / f"{split}-00000-of-00001.parquet"))

    monkeypatch.setattr(rows, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(rows.load(**CLOZE, data="some-org/medforget")["test"])
    assert asked == {"name": "some-org/medforget", "revision": "newest"}


def test_a_folder_built_again_is_read_again(own_data):
    # load_dataset fails this: it would serve the first rows from its cache.
    before = rows.load(**CLOZE, data=str(own_data))["test"]
    replace_rows(own_data, "patient_forget", "train", lambda old: [{**row, "question": "New?"} for row in old])
    after = rows.load(**CLOZE, data=str(own_data))["test"]
    assert set(after["question"]) == {"New?"} != set(before["question"])


def test_task_without_rows_names_configuration_and_task(own_data):
    cloze = 2
    replace_rows(own_data, "patient_forget", "train", lambda old: [row for row in old if row["task"] != cloze])
    with pytest.raises(ValueError, match="patient_forget has no cloze rows in its split train"):
        rows.load(**CLOZE, data=str(own_data))


def test_unknown_configuration_and_cut_file_are_named(own_data):
    with pytest.raises(ValueError, match=r"no configuration ward_forget with a split train; .* patient_forget,"):
        rows.load("ward_forget", "train", "cloze", data=str(own_data))
    path = own_data / "patient_forget/train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=str(path)):
        rows.load(**CLOZE, data=str(own_data))


def test_classification_rows_need_four_options_and_a_letter(own_data):
    replace_rows(own_data, "patient_forget", "train", lambda old: [{**row, "choices": ["a", "b"]} for row in old])
    with pytest.raises(ValueError, match=r"patient_forget row inst.*classification has 2 options"):
        rows.load("patient_forget", "train", "classification", data=str(own_data))


def test_image_that_does_not_decode_is_named():
    for broken in (b"not an image", b"\xff\xd8\xff\xe0 cut"):
        with pytest.raises(ValueError, match="row inst00/pat000/study000/institution: its image does not decode"):
            rows.doc_to_image({"id": "inst00/pat000/study000/institution", "image": {"bytes": broken}})


def test_rows_of_a_study_share_one_decoded_image(data_dir):
    loaded = rows.load("patient_forget", "train", "identity", data=str(data_dir))["test"]
    first, second = (rows.doc_to_image(loaded[i])[0] for i in (0, 1))
    assert loaded[0]["id"].rpartition("/")[0] == loaded[1]["id"].rpartition("/")[0]
    assert first is second and isinstance(first, Image.Image) and first.mode == "RGB"


@pytest.mark.parametrize("config", ["institution_forget", "patient_forget", "section_retain", "study_forget_rephrase"])
def test_wrong_image_is_of_another_patient_and_institution(config, data_dir):
    split = "test" if config.endswith("rephrase") else "train"
    own, other = (
        rows.load(config, split, "cloze", data=str(data_dir), wrong_image=wrong)["test"] for wrong in (False, True)
    )
    finetune = pq.read_table(data_dir / "finetune/train-00000-of-00001.parquet", columns=["id", "image"]).to_pylist()
    owner = {row["image"]["bytes"]: row["id"] for row in finetune}
    assert own.remove_columns("image")[:] == other.remove_columns("image")[:]
    assert own.features == other.features
    for row in other:
        assert owner[row["image"]["bytes"]].split("/")[0] != row["id"].split("/")[0]


def test_wrong_image_is_the_same_for_all_rows_of_a_study_and_another_for_each_study(data_dir):
    given = {}
    for task in ("identity", "generation", "classification"):
        for row in rows.load("finetune", "train", task, data=str(data_dir), wrong_image=True)["test"]:
            given.setdefault("/".join(row["id"].split("/")[:3]), set()).add(row["image"]["bytes"])
    assert all(len(images) == 1 for images in given.values())
    assert len(set.union(*given.values())) == len(given)


def test_wrong_image_of_general_med_is_another_slice(data_dir):
    own, other = (
        rows.load("general_med", "test", "classification", data=str(data_dir), wrong_image=wrong)["test"]
        for wrong in (False, True)
    )
    assert all(a["image"]["bytes"] != b["image"]["bytes"] for a, b in zip(own, other, strict=True))


def test_wrong_image_needs_a_second_patient_and_a_truth_value(data_dir):
    loaded = rows.load(**CLOZE, data=str(data_dir))["test"]
    with pytest.raises(ValueError, match="needs a second patient"):
        rows.with_other_images(loaded.select([0, 1]), loaded.select([0, 1]))
    with pytest.raises(ValueError, match="wrong_image is 'no'"):
        rows.load(**CLOZE, data=str(data_dir), wrong_image="no")


def test_contexts_name_nodes_from_the_study_upwards_in_the_words_of_the_paper(data_dir):
    prompts = {}
    for context in ("none", "study", "patient", "institution"):
        loaded = rows.load("patient_forget", "train", "generation", context=context, data=str(data_dir))["test"]
        prompts[context] = loaded["question"][:]
    for none, study, patient, institution, row in zip(*prompts.values(), loaded, strict=True):
        assert study == f"For study {row['study']}: {none}"
        assert patient == f"For patient {row['patient']}, study {row['study']}: {none}"
        assert institution == (
            f"For institution {row['institution']}, patient {row['patient']}, study {row['study']}: {none}"
        )
        assert row["original_question"] == none


def test_a_context_changes_nothing_but_the_question(data_dir):
    plain, named = (
        rows.load("study_forget", "train", "generation", context=context, data=str(data_dir))["test"]
        for context in ("none", "institution")
    )
    assert plain.features == named.features
    changed = ["question", "original_question"]
    assert plain.remove_columns(changed)[:] == named.remove_columns(changed)[:]


def test_a_context_stays_with_its_row_when_the_image_is_anothers(data_dir):
    own, other = (
        rows.load("patient_forget", "train", "generation", context="study", data=str(data_dir), wrong_image=wrong)
        for wrong in (False, True)
    )
    assert own["test"]["question"][:] == other["test"]["question"][:]
    assert own["test"][0]["image"] != other["test"][0]["image"]


@pytest.mark.parametrize(("level", "sections"), [("institution", 64), ("patient", 64), ("study", 64), ("section", 64)])
def test_an_attack_asks_all_forgotten_sections(level, sections, data_dir):
    for context in rows.CONTEXTS:
        loaded = rows.load(f"{level}_forget", "train", "generation", context=context, data=str(data_dir))["test"]
        assert len(set(loaded["id"])) == len(loaded) == sections


def test_an_unknown_context_is_told(data_dir):
    with pytest.raises(ValueError, match="context is 'section'; it must be one of institution, patient, study, none"):
        rows.load("patient_forget", "train", "generation", context="section", data=str(data_dir))


def test_option_letters_need_a_named_model():
    with pytest.raises(ValueError, match="pretrained="):
        rows.letter_tokens(None, "main")
