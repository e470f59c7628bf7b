"""A table of one's own: both formats, real institution labels, and what happens to what is wrong with it."""

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_corpora import (
    FAULT,
    INSTITUTIONS,
    NOTICE,
    REFUSAL,
    STUDIES,
    TABLE_COLUMNS,
    Trap,
    check_build,
    check_trap,
    draw,
    each,
    read_csv,
    replace_bytes,
    table_rows,
    truncate,
    write_csv,
    write_file,
    write_parquet,
    write_table,
)

from medforget_dataset import BuildOptions, UserError, build
from medforget_dataset.corpora import get_corpus
from medforget_dataset.hierarchy import walk_studies
from medforget_dataset.hub import dataset_upload


def _table(change: Callable[[list[dict]], object], columns: list[str] | None = None, **kwargs: str) -> Callable:
    def spring(root: Path) -> None:
        rows = read_csv(root / "table.csv")
        change(rows)
        write_csv(root / "table.csv", columns or TABLE_COLUMNS, rows, **kwargs)

    return spring


def _extra(**changes: str) -> Callable[[Path], None]:
    """One more row, of a study of its own, that no build takes."""
    row = {"institution": "Mayo Clinic", "patient": "100", "study": "9000", "section": "Findings", "text": "Clear."}
    return _table(lambda rows: rows.append(row | {"image": "slices/9000.png", "scanner": ""} | changes))


def _again(**changes: str) -> Callable[[Path], None]:
    """The table's first row once more, changed."""
    return _table(lambda rows: rows.append(rows[0] | changes))


def _first_slices(root: Path) -> list[Path]:
    return sorted((root / "slices").glob("*.png"))[::STUDIES]


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    columns = [new if name == old else name for name in TABLE_COLUMNS]

    def change(rows: list[dict]) -> None:
        for row in rows:
            row[new] = row.pop(old)

    return _table(change, columns)


def _semicolons(root: Path) -> None:
    rows = read_csv(root / "table.csv")
    with (root / "table.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, TABLE_COLUMNS, delimiter=";")
        writer.writeheader()
        writer.writerows(rows)


def _link_out(root: Path) -> None:
    """Replace the first slice of every patient by a link to the same image in another folder."""
    outside = root.parent / f"{root.name}-outside"
    outside.mkdir()
    for file in _first_slices(root):
        file.rename(outside / file.name)
        file.symlink_to(outside / file.name)


def _three_each(rows: list[dict]) -> None:
    """Patients of three studies, so many that no drawing passes all of them by."""
    rng = random.Random(3)
    for study in range(9101, 9119):
        patient = str(190 + (study - 9101) // 3)
        rows += table_rows(rng, "Mayo Clinic", patient, str(study), f"slices/{study}.png")


TRAPS = (
    Trap("an absolute path", FAULT, "image outside its folder", "'/etc/passwd'", _extra(image="/etc/passwd")),
    Trap("a path that climbs", FAULT, "image outside its folder", "../", _extra(image="slices/../../secret.png")),
    Trap("a path that climbs, in Windows", FAULT, "image outside its folder", "line ", _extra(image="..\\secret.png")),
    Trap("a drive", FAULT, "image outside its folder", "C:", _extra(image="C:\\slices\\1.png")),
    Trap("an address", FAULT, "image outside its folder", "https:", _extra(image="https://example.org/1.png")),
    Trap("links out of the folder", FAULT, "image outside its folder", "is a link out of", _link_out),
    Trap(
        "missing images",
        FAULT,
        "missing image",
        ".png does not exist",
        lambda root: each(_first_slices(root), Path.unlink),
    ),
    Trap(
        "truncated images",
        FAULT,
        "truncated image",
        "slices",
        lambda root: each(_first_slices(root), truncate),
    ),
    Trap(
        "another image",
        FAULT,
        "contradictory study",
        "image is 'slices/x.png'",
        _again(section="x", image="slices/x.png"),
    ),
    Trap("another patient", FAULT, "contradictory study", "patient is '7'", _again(section="x", patient="7")),
    Trap(
        "another institution",
        FAULT,
        "contradictory study",
        "institution is 'Mayo Clinic'",
        _again(section="x", institution="Mayo Clinic"),
    ),
    Trap("a section twice", FAULT, "contradictory study", "came before", _again(section="CLINICAL  history")),
    Trap("an image of two studies", FAULT, "contradictory study", "'5001'", _extra(image="slices/5001.png")),
    Trap("a row without a patient", FAULT, "empty cell", "patient is empty", _extra(patient=" ")),
    Trap("a section of no name", FAULT, "empty cell", "section is empty", _extra(section="—")),
    Trap("a text of two megabytes", FAULT, "damaged row", "2,000,000", _extra(text="lesion, " * 250_000)),
    Trap("an empty text", NOTICE, "empty section", "line ", _extra(study="9001", image="slices/9001.png", text="  ")),
    Trap(
        "a patient with three studies",
        NOTICE,
        "patient with too few studies",
        "patient 19",
        _table(_three_each),
    ),
    Trap(
        "bytes that are not UTF-8",
        FAULT,
        "damaged row",
        "not UTF-8",
        replace_bytes("table.csv", b"SOMATOM", b"SOMATOM\xe9"),
    ),
    Trap(
        "a row cut short",
        FAULT,
        "damaged row",
        "3 fields",
        lambda root: (root / "table.csv").open("a").write("a,b,c\n"),
    ),
    Trap(
        "a missing column",
        REFUSAL,
        "no column 'image'; its columns are institution,",
        "table.csv",
        _renamed("image", "x"),
    ),
    Trap(
        "a renamed column",
        REFUSAL,
        "'Institution ' is there: rename it",
        "table.csv",
        _renamed("institution", "Institution "),
    ),
    Trap(
        "a column twice",
        REFUSAL,
        "column 'text' is there twice",
        "table.csv",
        replace_bytes("table.csv", b"scanner", b"text"),
    ),
    Trap("semicolons", REFUSAL, "separated by semicolons", "table.csv", _semicolons),
    Trap(
        "UTF-16", REFUSAL, "byte 0 of the file is not UTF-8", "table.csv", _table(lambda rows: None, encoding="utf-16")
    ),
    Trap("an empty file", REFUSAL, "is empty", "table.csv", write_file("table.csv", b"")),
    Trap("no table", REFUSAL, "no table.csv", "--root", lambda root: (root / "table.csv").unlink()),
    Trap(
        "two tables",
        REFUSAL,
        "table.csv, table.parquet; name one",
        "--root",
        lambda root: write_parquet(root, read_csv(root / "table.csv")),
    ),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("sound") / "hospitals")


@pytest.fixture
def root(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "hospitals"))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name.replace(" ", "-").replace(",", ""))
def test_a_trap_is_named_and_passed_over_on_request(trap, root):
    trap.spring(root)
    check_trap(trap, "table", root)


def test_a_table_full_of_traps_builds_and_its_log_lists_them(root, tmp_path):
    alone = {"links out of the folder", "missing images"}  # of the same files as the truncated ones
    traps = [trap for trap in TRAPS if trap.kind != REFUSAL and trap.name not in alone]
    for trap in traps:
        trap.spring(root)
    options = {"institutions": 4, "patients": 4, "image_size": 56, "on_error": "skip", "workers": 1}
    folder = build(tmp_path / "out", corpus="table", root=str(root), **options)
    rows = check_build(folder, traps)
    assert all(row["restricted"] for row in rows)
    assert {row["institution"] for row in rows} == set(INSTITUTIONS)
    assert all(row["study"].startswith("study_imaging_") for row in rows)
    card = (folder / "README.md").read_text()
    assert "Names of patients and identifiers of studies are invented" in card and "- restricted" in card


def test_a_licence_lifts_the_restriction(tmp_path):
    root = write_table(tmp_path / "hospitals", "parquet")
    options = {"institutions": 4, "patients": 4, "image_size": 56, "workers": 1, "license": "cc-by-4.0"}
    folder = build(tmp_path / "out", corpus="table", root=str(root / "table.parquet"), **options)
    assert not any(row["restricted"] for row in check_build(folder, ()))
    assert "license: cc-by-4.0" in (folder / "README.md").read_text()
    published = dataset_upload(folder).files
    assert json.loads(published["build.json"])["options"]["root"] == "table.parquet"
    texts = [published["build.json"].decode(), published["README.md"].read_text()]
    assert not any(str(tmp_path) in text for text in texts)


def test_any_number_of_institutions_that_a_quarter_divides_will_do(tmp_path):
    root = write_table(tmp_path / "hospitals", institutions=13)
    institutions, _ = draw("table", root, institutions=12)
    assert len({institution.name for institution in institutions}) == 12


def _texts(root: Path, **options) -> list[tuple]:
    institutions, log = draw("table", root, **options)
    assert log == []
    return [
        (
            node.institution.name,
            node.study.identifier,
            [(section.key, section.text) for section in node.study.sections],
        )
        for node in walk_studies(institutions)
    ]


def test_csv_and_parquet_give_the_same(root, tmp_path):
    expected = _texts(root)
    write_parquet(tmp_path / "hospitals", read_csv(root / "table.csv"))
    (root / "table.csv").unlink()
    assert _texts(root) == expected


@pytest.mark.parametrize("kwargs", [{"end": "\r\n"}, {"encoding": "utf-8-sig"}])
def test_windows_writes_the_same_table(kwargs, root):
    expected = _texts(root)
    _table(lambda rows: None, **kwargs)(root)
    assert _texts(root) == expected


def test_studies_and_sections_keep_the_order_of_the_table(root):
    texts: dict[str, list[str]] = {}
    for row in read_csv(root / "table.csv"):
        texts.setdefault(row["patient"], []).append(" ".join(row["text"].split()))
    institutions, _ = draw("table", root)
    for patient in (patient for institution in institutions for patient in institution.patients):
        found = [section.text for study in patient.studies for section in study.sections]
        assert sum(_is_within(found, own) for own in texts.values()) == 1
    keys = {section.key for node in walk_studies(institutions) for section in node.study.sections}
    assert keys == {"clinical_history", "technique", "findings", "impression", "recommendation"}


def _is_within(found: list[str], texts: list[str]) -> bool:
    """Whether all are among the texts, in the same order."""
    rest = iter(texts)
    return all(text in rest for text in found)


def test_the_table_may_have_another_name_and_images_another_folder(root, tmp_path):
    expected = _texts(root)
    (root / "table.csv").rename(tmp_path / "radiology.csv")
    images = {"images": str(root)}
    assert _texts(tmp_path, **images) == _texts(tmp_path / "radiology.csv", **images) == expected


def test_a_file_of_another_kind_is_no_table(root):
    (root / "table.csv").rename(root / "table.xlsx")
    with pytest.raises(UserError, match=r"table\.xlsx: must be a \.csv or \.parquet file"):
        draw("table", root / "table.xlsx")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda table: b"PAR1 and nothing more", "cannot be read as Parquet"),
        (
            lambda table: table.set_column(5, "image", [[{"bytes": b"", "path": ""}] * len(table)]),
            "'image' holds struct",
        ),
        (lambda table: table.drop_columns("section"), "no column 'section'"),
    ],
)
def test_a_parquet_file_that_is_no_table_is_refused(change, complaint, tmp_path):
    root = write_table(tmp_path / "hospitals", "parquet")
    file = root / "table.parquet"
    changed = change(pq.read_table(file))
    file.write_bytes(changed) if isinstance(changed, bytes) else pq.write_table(changed, file)
    with pytest.raises(UserError, match=complaint):
        draw("table", root)


def test_parquet_text_that_is_not_utf_8_is_a_fault_of_its_row(tmp_path):
    root = write_table(tmp_path / "hospitals", "parquet")
    table = pq.read_table(root / "table.parquet")
    texts = [text.encode() for text in table["text"].to_pylist()]
    texts[7] = b"caf\xe9"
    broken = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(table.set_column(4, "text", broken), root / "table.parquet")
    with pytest.raises(UserError, match=r"table\.parquet, row 8: byte 3 .* is not UTF-8"):
        draw("table", root)
    assert [line["row"] for line in draw("table", root, "skip")[1]] == ["row 8"]


def test_colour_is_kept_where_there_is_any(root):
    options = BuildOptions(corpus="table", root=str(root), institutions=4, patients=4)
    corpus = get_corpus("table")(options)
    node = next(iter(walk_studies(corpus.institutions())))
    assert corpus.image(node.patient.key, node.study.key, size=56).mode == "L"
    for file in (root / "slices").iterdir():
        Image.new("RGB", (40, 40), (200, 80, 160)).save(file)
    assert corpus.image(node.patient.key, node.study.key, size=56).getpixel((28, 28)) == (200, 80, 160)


def test_too_few_institutions_are_counted_and_named(root):
    with pytest.raises(UserError, match=r"4 institutions \(CHU de Nantes, .* 8 are asked for"):
        draw("table", root, institutions=8)
