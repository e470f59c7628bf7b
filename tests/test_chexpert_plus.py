"""CheXpert Plus: a tree in its published layout, what is read of it, and what happens to what is wrong with it."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpora import (
    CHEXPERT_COLUMNS,
    CHEXPERT_CSV,
    FAULT,
    NOTICE,
    REFUSAL,
    Trap,
    check_build,
    check_trap,
    chexpert_rows,
    draw,
    each,
    read_csv,
    replace_bytes,
    truncate,
    write_chexpert_plus,
    write_csv,
)

from medforget_dataset import BuildOptions, UserError, build
from medforget_dataset.corpora import get_corpus
from medforget_dataset.hierarchy import walk_studies


def _chexpert_table(change: Callable[[list[dict]], object], columns: list[str] | None = None) -> Callable:
    def spring(root: Path) -> None:
        rows = read_csv(root / CHEXPERT_CSV)
        change(rows)
        write_csv(root / CHEXPERT_CSV, columns or CHEXPERT_COLUMNS, rows)

    return spring


def _extra_study(**changes: str) -> Callable:
    """One more study of the first patient, changed; its images are never asked for."""

    def change(rows: list[dict]) -> None:
        path = f"train/patient00001/study{len(rows)}/view1_frontal.jpg"
        rows.append(rows[0] | {"path_to_image": path, "path_to_dcm": path.replace("jpg", "dcm")} | changes)

    return _chexpert_table(change)


def _first_views(root: Path) -> list[Path]:
    """The frontal image of each patient's first study."""
    return sorted(root.rglob("study1/view1_frontal.png"))


def _without(column: str, renamed: str = "") -> Callable[[Path], None]:
    columns = [name for name in CHEXPERT_COLUMNS if name != column] + ([renamed] if renamed else [])

    def change(rows: list[dict]) -> None:
        for row in rows:
            value = row.pop(column)
            if renamed:
                row[renamed] = value

    return _chexpert_table(change, columns)


def _three_studies(rows: list[dict]) -> None:
    rng = random.Random(7)
    for study in range(1, 4):
        rows += chexpert_rows(rng, "patient00099", study)


def _second_frontal(rows: list[dict]) -> None:
    for row in [row for row in rows if "/study2/" in row["path_to_image"]]:
        row["ap_pa"] = "AP"
        rows.append(row | {"path_to_image": row["path_to_image"].replace("view1", "view2"), "ap_pa": "PA"})


def _change(row: int, **changes: str) -> Callable[[Path], None]:
    return _chexpert_table(lambda rows: rows[row].update(changes))


TRAPS = (
    Trap(
        "a path that climbs",
        FAULT,
        "misplaced image",
        "line ",
        _extra_study(path_to_image="../../train/patient00001/study9/view1_frontal.jpg"),
    ),
    Trap(
        "a path of another form",
        FAULT,
        "misplaced image",
        "'scan0001.jpg'",
        _extra_study(path_to_image="scan0001.jpg"),
    ),
    Trap(
        "an image twice", FAULT, "duplicate image", "line ", _chexpert_table(lambda rows: rows.append(dict(rows[20])))
    ),
    Trap(
        "a path and a patient that differ",
        FAULT,
        "contradictory patient",
        "patient00002",
        _extra_study(deid_patient_id="patient00002"),
    ),
    Trap(
        "two reports of one study",
        FAULT,
        "contradictory report",
        "train/patient00002/study1",
        _change(9, section_impression="1. Another report."),
    ),
    Trap(
        "an order that is no number", FAULT, "damaged row", "'first'", _extra_study(patient_report_date_order="first")
    ),
    Trap("an unknown view", FAULT, "unknown view", "'Oblique'", _extra_study(frontal_lateral="Oblique")),
    Trap(
        "a report of two megabytes",
        FAULT,
        "damaged row",
        "2,000,000 characters",
        _extra_study(section_findings="effusion. " * 200_000),
    ),
    Trap(
        "truncated images",
        FAULT,
        "truncated image",
        "study1/view1_frontal.png",
        lambda root: each(_first_views(root), truncate),
    ),
    Trap(
        "empty images",
        FAULT,
        "empty image file",
        "study1/view1_frontal.png",
        lambda root: each(_first_views(root), lambda file: file.write_bytes(b"")),
    ),
    Trap(
        "missing images",
        FAULT,
        "missing image",
        "study1",
        lambda root: each(_first_views(root), Path.unlink),
    ),
    Trap("no findings", NOTICE, "studies without a section", "findings", _extra_study(section_findings=" \n ")),
    Trap("a frontal image that is lateral", NOTICE, "contradictory view", "LL", _extra_study(ap_pa="LL")),
    Trap(
        "a patient with three studies",
        NOTICE,
        "patient with too few studies",
        "patient00099",
        _chexpert_table(_three_studies),
    ),
    Trap(
        "bytes that are not UTF-8",
        FAULT,
        "damaged row",
        "not UTF-8",
        replace_bytes(CHEXPERT_CSV, b"as discussed", b"as discuss\xe9"),
    ),
    Trap(
        "a row with a field too many",
        FAULT,
        "damaged row",
        "28 fields",
        lambda root: (root / CHEXPERT_CSV).open("a").write("," * 27 + "\n"),
    ),
    Trap("no table", REFUSAL, "no df_chexpert_plus_", "--root", lambda root: (root / CHEXPERT_CSV).unlink()),
    Trap(
        "two tables",
        REFUSAL,
        "leave one",
        "df_chexpert_plus_250101.csv",
        lambda root: (root / "df_chexpert_plus_250101.csv").write_text(""),
    ),
    Trap("a missing column", REFUSAL, "no column 'ap_pa'", CHEXPERT_CSV, _without("ap_pa")),
    Trap(
        "a renamed column",
        REFUSAL,
        "'Deid_Patient_ID ' is there: rename it",
        CHEXPERT_CSV,
        _without("deid_patient_id", "Deid_Patient_ID "),
    ),
    Trap(
        "a quote that is never closed",
        REFUSAL,
        "cannot be read as CSV",
        "line ",
        lambda root: (root / CHEXPERT_CSV).open("a").write('"train/patient00001\n'),
    ),
    Trap(
        "no images",
        REFUSAL,
        "no folder train or valid",
        "--images",
        lambda root: (root / "PNG").rename(root.parent / f"{root.name}-elsewhere"),
    ),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_chexpert_plus(tmp_path_factory.mktemp("sound") / "chexpert")


@pytest.fixture
def root(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "chexpert"))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name.replace(" ", "-"))
def test_a_trap_is_named_and_passed_over_on_request(trap, root):
    trap.spring(root)
    check_trap(trap, "chexpert-plus", root)


def test_a_tree_full_of_traps_builds_and_its_log_lists_them(root, tmp_path):
    alone = {"empty images", "missing images"}  # of the same files as the truncated ones
    traps = [trap for trap in TRAPS if trap.kind != REFUSAL and trap.name not in alone]
    for trap in traps:
        trap.spring(root)
    options = {"institutions": 4, "patients": 4, "image_size": 56, "on_error": "skip", "workers": 1}
    folder = build(tmp_path / "out", corpus="chexpert-plus", root=str(root), **options)
    rows = check_build(folder, traps)
    assert all(row["restricted"] and row["source"] == "chexpert-plus" for row in rows)
    assert {row["section"] for row in rows} == {"", "narrative", "clinical history", "findings", "impression"}
    card = (folder / "README.md").read_text()
    assert "Stanford University Dataset Research Use Agreement" in card and "- restricted" in card


def test_texts_are_the_columns_own(root):
    institutions, log = draw("chexpert-plus", root)
    assert log == []
    reports = {}
    for row in read_csv(root / CHEXPERT_CSV):
        history = row["section_clinical_history"] or row["section_history"]
        texts = (row["section_narrative"], history, row["section_findings"], row["section_impression"])
        reports[tuple(" ".join(text.split()) for text in texts)] = row
    for patient in (patient for institution in institutions for patient in institution.patients):
        rows = [reports[tuple(section.text for section in study.sections)] for study in patient.studies]
        assert len({row["deid_patient_id"] for row in rows}) == 1
        orders = [int(row["patient_report_date_order"]) for row in rows]
        assert orders == sorted(orders) and len(set(orders)) == 4


def test_any_sections_are_drawn_from_all_of_a_report(root):
    institutions, _ = draw("chexpert-plus", root, section_kinds="any")
    keys = {section.key for node in walk_studies(institutions) for section in node.study.sections}
    assert keys == {"narrative", "clinical_history", "comparison", "findings", "impression"}


def _image_names(root: Path, **options: str) -> set[str]:
    corpus = get_corpus("chexpert-plus")(BuildOptions(corpus="chexpert-plus", root=str(root), **options))
    return {corpus.image_file(entry).name for entry in corpus.scan()}


def test_pa_goes_before_ap_and_the_first_view_before_the_second(root):
    assert _image_names(root) == {"view1_frontal.png"}

    def add_second(rows: list[dict]) -> None:
        for row in [row for row in rows if "view1" in row["path_to_image"]]:
            row["ap_pa"] = "AP"
            rows.append(row | {"path_to_image": row["path_to_image"].replace("view1", "view2"), "ap_pa": "PA"})

    _chexpert_table(add_second)(root)
    for file in list(root.rglob("view1_frontal.png")):
        file.with_name("view2_frontal.png").write_bytes(file.read_bytes())
    assert _image_names(root) == {"view2_frontal.png"}


@pytest.mark.parametrize(
    ("images", "suffix"), [("", ".jpg"), ("PNG", ".png"), ("PNG/PNG", ".png"), ("CheXpert-v1.0-small", ".jpg")]
)
def test_images_are_found_wherever_a_release_unpacks_them(images, suffix, tmp_path):
    root = write_chexpert_plus(tmp_path / "chexpert", images=images, suffix=suffix)
    assert _image_names(root) == {f"view1_frontal{suffix}"}


def test_images_may_lie_in_another_folder(tmp_path):
    root = write_chexpert_plus(tmp_path / "chexpert")
    (root / "PNG").rename(tmp_path / "images")
    assert _image_names(root, images=str(tmp_path / "images")) == {"view1_frontal.png"}


def test_too_few_patients_are_counted(root):
    with pytest.raises(UserError, match=r"16 patients have 4 studies .* need 32"):
        draw("chexpert-plus", root, patients=8)
