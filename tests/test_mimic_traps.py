"""MIMIC-CXR in miniature: every form of its files, every trap."""

import gzip
import json
import shutil
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from mimic_traps import ARCHIVE, DICOM_TRAPS, JPG_TRAPS, METADATA, TRAPS, ZIP_TRAPS, write_tree

from medforget_dataset.build_log import BuildLog
from medforget_dataset.corpora._hospital import StudyEntry
from medforget_dataset.corpora.mimic_cxr import Corpus
from medforget_dataset.errors import UserError
from medforget_dataset.hierarchy import walk_studies
from medforget_dataset.options import BuildOptions


FORMS = [(reports, images) for reports in ("zip", "tree") for images in ("jpg", "dicom")]
SMALL = {"corpus": "mimic-cxr", "institutions": 4, "patients": 4, "image_size": 56}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Reports in an archive, images as JPEG, no traps."""
    root = tmp_path_factory.mktemp("mimic") / "clean"
    write_tree(root)
    return root


@pytest.fixture(scope="module")
def trapped(tmp_path_factory):
    """Each form with all of its traps: its folder, the traps' studies, the corpus with its studies chosen, the log."""
    trees = {}
    for form in FORMS:
        root = tmp_path_factory.mktemp("mimic") / "-".join(form)
        studies = write_tree(root, reports=form[0], images=form[1], traps=True)
        log = BuildLog("skip", root.parent / f"{root.name}.jsonl")
        corpus = Corpus(BuildOptions(root=str(root), on_error="skip", **SMALL), log)
        corpus.institutions()
        trees[form] = root, studies, corpus, log
    return trees


def corpus_of(root, log=None, **options):
    return Corpus(BuildOptions(root=str(root), **(SMALL | options)), log)


def copy(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "copy")


def replace_archive(root, name, content):
    with zipfile.ZipFile(root / ARCHIVE, "a") as archive:
        archive.writestr(name, content)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_each_trap_of_a_form_is_named_or_read_right(trapped, form):
    _, _, _, log = trapped[form]
    traps = TRAPS | (ZIP_TRAPS if form[0] == "zip" else {}) | (JPG_TRAPS if form[1] == "jpg" else DICOM_TRAPS)
    kinds = {*log.skipped, *log.noticed}
    for trap, kind in traps.items():
        assert not kind or any(found.startswith(kind) for found in kinds), (trap, kinds)
    for line in map(json.loads, log.path.read_text().splitlines()):
        assert line["file"] and line["message"], line


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_every_form_gives_the_same_studies_in_the_same_order(trapped, form):
    _, _, first, _ = trapped["zip", "jpg"]
    _, _, corpus, _ = trapped[form]
    assert corpus.institutions() == first.institutions()
    assert len(list(walk_studies(corpus.institutions()))) == 64
    names = [path.name.split(".")[0] for path in corpus._chosen[1].values()]
    assert names == [path.name.split(".")[0] for path in first._chosen[1].values()]


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_bones_are_bright_in_every_form(trapped, form):
    _, _, first, _ = trapped["zip", "jpg"]
    _, _, corpus, _ = trapped[form]
    for key in list(corpus._chosen[1])[::5]:
        expected, found = (np.asarray(each.image("", key, size=56), dtype=float) for each in (first, corpus))
        assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.9, key


@pytest.mark.parametrize("form", FORMS[::2], ids="-".join)
def test_odd_reports_are_read_right(trapped, form):
    _, studies, corpus, _ = trapped[form]

    def sections(trap):
        return corpus.sections(StudyEntry("", str(studies[trap])))

    usual = sections("CRLF line ends")
    assert [key for key in usual if key != "comparison"] == [
        "examination", "indication", "technique", "findings", "impression"
    ]  # fmt: skip
    assert "\r" not in "".join(usual.values())
    assert sections("heading with digits") == {"findings": "The lungs are clear.", "impression": "Normal."}
    assert sections("heading without spaces") == {"findings": "Clear lungs.", "impression": "Normal."}
    assert sections("addendum on top") == {"addendum": "IMPRESSION: A nodule.", **usual}
    assert "notification" not in sections("empty section")
    assert sections("mark alone on a line") == usual | {"indication": f"{usual['indication']} ___ ___"}
    assert sections("section headed twice")["impression"] == f"Preliminary. {usual['impression']}"


def test_pa_comes_before_ap_and_the_first_of_two(trapped):
    _, _, corpus, _ = trapped["zip", "dicom"]
    chosen = {path.parent.parent.name: path for path in corpus._chosen[1].values()}
    assert chosen["p11000002"].name.startswith("1")  # views AP, PA
    assert chosen["p11000003"].name.startswith("0")  # views PA, PA
    assert chosen["p11000004"].name.startswith("0")  # AP alone
    assert chosen["p11000005"].name.endswith(".dcm.gz")


def test_studies_are_in_order_of_time(trapped):
    _, _, corpus, _ = trapped["tree", "jpg"]
    rows = [line.split(",") for line in gzip.open(corpus.root / METADATA, "rt").read().splitlines()[1:]]
    when = {row[2]: (row[7], float(row[8])) for row in rows if len(row) > 8}
    studies = [path.parent for path in corpus._chosen[1].values()]
    for first, second in zip(studies, studies[1:], strict=False):
        if first.parent == second.parent:
            assert when[first.name[1:]] < when[second.name[1:]]
    assert any(first.name > second.name for first, second in zip(studies, studies[1:], strict=False))


@pytest.mark.parametrize(
    ("trap", "place"),
    [
        ("bytes that are not UTF-8", "byte 14"),
        ("report of 2 MB", "at most 1,000,000"),
        ("study in two patients' folders", "p18000010"),
        ("member with a wrong checksum", "download it again"),
        ("member that is there twice", "duplicate"),
    ],
)
def test_a_faulty_report_stops_the_build_and_names_it(trapped, trap, place):
    root, studies, _, log = trapped["zip", "jpg"]
    named = f"s{studies[trap]}"
    lines = [line for line in map(json.loads, log.path.read_text().splitlines()) if named in line["row"]]
    assert [line["action"] for line in lines] == ["skipped"] and lines[0]["file"] == str(root / ARCHIVE)
    assert place in lines[0]["message"] or place in lines[0]["kind"]


@pytest.mark.parametrize("name", ["../s51000001.txt", "/p10/p10000032/s51000001.txt", "C:\\p10\\s51000001.txt"])
def test_a_member_outside_the_root_stops_the_build(clean, tmp_path, name):
    root = copy(clean, tmp_path)
    replace_archive(root, name, " FINDINGS:  none\n")
    with pytest.raises(UserError, match="leads out of the archive") as error:
        corpus_of(root).institutions()
    assert str(error.value).startswith(f"{root / ARCHIVE}, {name}: ") and "--on-error skip" in str(error.value)


def test_a_long_report_is_refused_before_it_is_unpacked(clean, tmp_path, monkeypatch):
    root = copy(clean, tmp_path)
    replace_archive(root, "files/p10/p10000000/s51000001.txt", "x" * 1_000_001)
    opened = []
    original = zipfile.ZipFile.open

    def spy(self, member, *args, **kwargs):
        opened.append(getattr(member, "filename", member))
        return original(self, member, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", spy)
    corpus_of(root, BuildLog("skip")).institutions()
    assert len(opened) > 80 and not any("s51000001" in name for name in opened)


def test_a_member_that_is_larger_than_it_states_is_not_unpacked(clean, tmp_path):
    root = copy(clean, tmp_path)
    replace_archive(root, "files/p10/p10000000/s51000001.txt", bytes(100_000_000))
    data = (root / ARCHIVE).read_bytes()
    stated = struct.pack("<I", 100_000_000)
    (root / ARCHIVE).write_bytes(data.replace(stated, struct.pack("<I", 1000)))
    log = BuildLog("skip")
    tracemalloc.start()
    corpus_of(root, log).institutions()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert log.skipped == {"damaged archive member": 1} and peak < 30_000_000


def test_wrong_roots(clean, tmp_path):
    shutil.copytree(clean / "files", tmp_path / "images" / "files")
    shutil.copy(clean / METADATA, tmp_path / "images")
    with pytest.raises(UserError, match=r"no MIMIC-CXR reports: neither mimic-cxr-reports.zip nor files/p10"):
        corpus_of(tmp_path / "images").institutions()
    with pytest.raises(UserError, match="no such folder"):
        corpus_of(tmp_path / "missing")
    root = copy(clean, tmp_path)
    (root / METADATA).unlink()
    with pytest.raises(UserError, match=f"{root}: JPEG images but no {METADATA}, which"):
        corpus_of(root).institutions()
    shutil.rmtree(root / "files")
    with pytest.raises(UserError, match="no images: neither .*--images"):
        corpus_of(root).institutions()
    (root / ARCHIVE).write_bytes((root / ARCHIVE).read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{root / ARCHIVE}: not a zip archive, or cut short"):
        corpus_of(root, images=str(clean)).institutions()


def test_columns_of_the_metadata_are_named(clean, tmp_path):
    root = copy(clean, tmp_path)
    text = gzip.open(root / METADATA, "rt").read().replace("ViewPosition", "View_Position")
    (root / METADATA).write_bytes(gzip.compress(text.encode()))
    with pytest.raises(UserError, match=r"no column 'ViewPosition'.*dicom_id, subject_id") as error:
        corpus_of(root).institutions()
    assert str(root / METADATA) in str(error.value)
    with gzip.open(root / METADATA) as file:
        (root / METADATA).write_bytes(gzip.compress(file.read())[:2000])
    with pytest.raises(UserError, match=str(root / METADATA)):
        corpus_of(root).institutions()


def test_layouts_of_a_download(clean, tmp_path):
    expected = corpus_of(clean).institutions()
    parts = tmp_path / "parts"
    (parts / "mimic-cxr/2.1.0").mkdir(parents=True)
    shutil.copy(clean / ARCHIVE, parts / "mimic-cxr/2.1.0")
    jpg = parts / "mimic-cxr-jpg/2.1.0"
    shutil.copytree(clean / "files", jpg / "files")
    (jpg / METADATA.removesuffix(".gz")).write_bytes(gzip.decompress((clean / METADATA).read_bytes()))
    assert corpus_of(parts).institutions() == expected
    jpg.rename(tmp_path / "elsewhere")
    assert corpus_of(parts, images=str(tmp_path / "elsewhere")).institutions() == expected
    with zipfile.ZipFile(parts / "mimic-cxr/2.1.0" / ARCHIVE) as archive:
        archive.extractall(tmp_path / "elsewhere")
    assert corpus_of(tmp_path / "elsewhere").institutions() == expected


def test_jpg_is_preferred_to_dicom(clean, tmp_path):
    root = copy(clean, tmp_path)
    write_tree(tmp_path / "dicom", images="dicom")
    shutil.copytree(tmp_path / "dicom" / "files", root / "files", dirs_exist_ok=True)
    assert {path.suffix for path in corpus_of(root)._chosen[1].values()} == {".jpg"}
    (root / METADATA).rename(tmp_path / "dicom" / METADATA)
    assert {path.suffix for path in corpus_of(tmp_path / "dicom")._chosen[1].values()} == {".dcm"}


def test_too_few_patients(clean):
    with pytest.raises(UserError, match="16 patients have 4 studies"):
        corpus_of(clean, institutions=8).institutions()


def test_nothing_of_the_scan_goes_to_the_workers(trapped):
    import pickle

    _, _, corpus, _ = trapped["zip", "jpg"]
    again = pickle.loads(pickle.dumps(corpus))
    assert not {"_reports", "_frontal"} & set(vars(again))
    assert again.institutions() == corpus.institutions()
