"""MIMIC-CXR in its published layout: zip or tree, JPEG or DICOM, with what real files have wrong."""

import json
import zipfile

import datasets
import pytest
from hospital_files import mimic_report, sections
from mimic_tree import COLUMNS, TRAPS, MimicTree

from medforget_dataset import CONFIGS, FEATURES, BuildOptions, UserError, build, load
from medforget_dataset.build_log import BuildLog
from medforget_dataset.corpora.mimic_cxr import Corpus
from medforget_dataset.validate import notes, validate
from unlearn.cli import main


SMALL = {"corpus": "mimic-cxr", "institutions": 4, "patients": 4, "image_size": 56}


def corpus(root, log=None, **options):
    return Corpus(BuildOptions(**SMALL | {"root": str(root)} | options), log)


def drawn(corpus):
    return [
        (institution.name, patient.name, study.key, study.identifier, study.sections)
        for institution in corpus.institutions()
        for patient in institution.patients
        for study in patient.studies
    ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return MimicTree(tmp_path_factory.mktemp("mimic"))


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    return build(tmp_path_factory.mktemp("built") / "medforget", root=str(tree.root), workers=1, **SMALL)


def test_the_four_layouts_give_the_same_hierarchy(tree, tmp_path):
    first = drawn(corpus(tree.root))
    assert len(first) == 64
    for reports, images in (("zip", "dicom"), ("tree", "jpg"), ("tree", "dicom")):
        root = tmp_path / f"{reports}-{images}"
        root.mkdir()
        MimicTree(root, reports, images)
        assert drawn(corpus(root)) == first, (reports, images)


def test_physionets_folders_are_found(tmp_path):
    reports, images = tmp_path / "mimic-cxr" / "2.1.0", tmp_path / "mimic-cxr-jpg" / "2.1.0"
    images.mkdir(parents=True)
    reports.mkdir(parents=True)
    MimicTree(images, traps=False)
    (images / "mimic-cxr-reports.zip").rename(reports / "mimic-cxr-reports.zip")
    apart = drawn(corpus(tmp_path))
    assert apart == drawn(corpus(reports, images=str(images)))


def test_the_build_has_the_benchmarks_schema_and_its_mark(built):
    assert validate(built) == []
    assert tuple(datasets.get_dataset_config_names(str(built))) == CONFIGS
    rows = load("finetune", "train", data=built)
    assert rows.features == FEATURES and len(rows) == 960
    assert set(rows["source"]) == {"mimic-cxr"} and all(rows["restricted"])
    rephrased = load("study_forget_rephrase", "test", data=built)
    assert set(rephrased["view_method"]) == {"geometric"}
    card = (built / "README.md").read_text()
    assert "PhysioNet Credentialed Health Data License" in card and "turned in their plane" in card
    assert str(built.parent) not in card


def test_what_is_uneven_is_noted_and_no_violation(built, data_dir, capsys):
    assert main(["validate", str(built)]) == 0
    said = capsys.readouterr().err
    assert "every invariant holds" in said and "note: finetune: only" in said and "texts are distinct" in said
    assert notes(data_dir) == []


def test_answers_are_the_reports_own_words(tree, built):
    texts = {" ".join(text.decode().split()) for text in tree.texts.values()}
    rows = load("finetune", "train", data=built).filter(lambda row: row["answer"] and row["section"])
    for row in rows.filter(lambda row: row["choices"] == []).select(range(0, 400, 7)):
        assert any(row["answer"] in text for text in texts), row["id"]


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_is_passed_or_read_right(trap, tmp_path):
    tree = MimicTree(tmp_path, patients=3, traps=False)
    tree.add_trap(19_000_000, trap)
    tree.write_reports()
    tree.write_metadata()
    options = {"institutions": 4, "patients": 4, "studies": 4}
    log = BuildLog()
    read_right = {
        "frontal image after a lateral one",
        "AP beside PA",
        "CRLF line ends",
        "addendum above the report",
        "view heading with a digit",
        "heading without its leading space",
    }
    probe = corpus(tmp_path, log, **options)
    pool = {}
    for entry in probe.scan():
        pool.setdefault(entry.patient, []).append(entry)
    usable = probe._studies(pool["19000000"])
    assert bool(usable) is (trap in read_right)
    if trap == "AP beside PA":
        pa = next(
            row for row in tree.rows if row["study_id"] == tree.rows[-1]["study_id"] and row["ViewPosition"] == "PA"
        )
        assert pa["dicom_id"] in {file.stem for _, _, file in usable}
    if usable:
        last = max(usable, key=lambda study: study[0].study == str(MimicTree.study(19_000_000, 3)))
        assert {s.key: s.text for s in last[1]} == sections(MimicTree.study(19_000_000, 3))


def fault_archive(tree, root, name, content):
    """The tree's archive with one more member, in another folder, with the tree's images."""
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for place, text in tree.texts.items():
            archive.writestr(place, text)
        archive.writestr(name, content)


REPORT = mimic_report(sections("x"))
FAULTS = {
    "outside": ("../p10/p10000001/s50000001.txt", REPORT, "member outside its root"),
    "absolute": ("/p10/p10000001/s50000001.txt", REPORT, "member outside its root"),
    "drive": ("C:\\p10\\p10000001\\s50000001.txt", REPORT, "member outside its root"),
    "misnamed": ("files/p10/p10000001/report.txt", REPORT, "misplaced report"),
    "wrong group": ("files/p11/p10000001/s50000001.txt", REPORT, "misplaced report"),
    "not UTF-8": ("files/p10/p10000001/s50000001.txt", REPORT.encode() + b"\xe9", "text that is not UTF-8"),
    "two megabytes": ("files/p10/p10000001/s50000001.txt", REPORT + " x" * 1_000_000, "report too long"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_build_or_is_listed(fault, tree, tmp_path):
    name, content, kind = FAULTS[fault]
    fault_archive(tree, tmp_path, name, content)
    with pytest.raises(UserError, match="--on-error skip") as caught:
        drawn(corpus(tmp_path, images=str(tree.root)))
    assert str(tmp_path / "mimic-cxr-reports.zip") in str(caught.value) and name in str(caught.value)
    log = BuildLog("skip", tmp_path / "log.jsonl")
    assert drawn(corpus(tmp_path, log, images=str(tree.root), on_error="skip")) == drawn(corpus(tree.root))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines if line["action"] == "skipped"] == [name]
    assert log.skipped == {kind: 1}


def test_a_study_in_two_places_is_a_fault(tree, tmp_path):
    place = next(iter(tree.texts))
    fault_archive(tree, tmp_path, place.replace("files/", "copy/"), REPORT)
    with pytest.raises(UserError, match="2 reports of this study"):
        drawn(corpus(tmp_path, images=str(tree.root)))


def test_a_damaged_image_is_a_fault_and_another_study_is_taken(tmp_path):
    tree = MimicTree(tmp_path, patients=17, traps=False)
    victim = next(tmp_path.glob("files/p10/*/*/*.jpg"))
    victim.write_bytes(victim.read_bytes()[:300])
    with pytest.raises(UserError, match=f"{victim.name}: cut short or damaged"):
        for seed in range(40):  # some draw meets the victim
            drawn(corpus(tmp_path, seed=seed))
    log = BuildLog("skip")
    assert len(drawn(corpus(tmp_path, log, on_error="skip"))) == 64
    assert tree.good


def test_a_missing_image_is_named(tmp_path):
    MimicTree(tmp_path, traps=False)
    victim = next(tmp_path.glob("files/p10/*/*/*.jpg"))
    victim.unlink()
    with pytest.raises(UserError, match=victim.name):
        drawn(corpus(tmp_path))


def test_a_wrong_root_is_told_at_once(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        corpus(tmp_path / "nowhere")
    (tmp_path / "files").mkdir()
    with pytest.raises(UserError, match=r"no images: neither mimic-cxr-2\.0\.0-metadata"):
        drawn(corpus(tmp_path))


def test_images_without_metadata_are_refused(tree, tmp_path):
    MimicTree(tmp_path, traps=False)
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(UserError, match=r"JPEG images but no mimic-cxr-2\.0\.0-metadata\.csv\.gz"):
        drawn(corpus(tmp_path))


def test_reports_that_are_missing_or_cut_short_are_named(tree, tmp_path):
    with pytest.raises(UserError, match=r"no MIMIC-CXR reports"):
        drawn(corpus(tmp_path, images=str(tree.root)))
    whole = (tree.root / "mimic-cxr-reports.zip").read_bytes()
    (tmp_path / "mimic-cxr-reports.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"mimic-cxr-reports\.zip: not a zip archive, or cut short"):
        drawn(corpus(tmp_path, images=str(tree.root)))


@pytest.mark.parametrize(
    "change", ["missing", "renamed", "quoted newline", "duplicate id", "other patient", "short row"]
)
def test_faults_of_the_metadata(change, tmp_path):
    tree = MimicTree(tmp_path, traps=False)
    if change == "missing":
        tree.write_metadata(tuple(name for name in COLUMNS if name != "ViewPosition"))
        with pytest.raises(UserError, match="no column 'ViewPosition'; its columns are dicom_id"):
            drawn(corpus(tmp_path))
        return
    if change == "renamed":
        for row in tree.rows:
            row["viewposition "] = row["ViewPosition"]
        tree.write_metadata(tuple("viewposition " if name == "ViewPosition" else name for name in COLUMNS))
        with pytest.raises(UserError, match="'viewposition ' is there: rename it"):
            drawn(corpus(tmp_path))
        return
    expected = drawn(corpus(tmp_path))
    if change == "quoted newline":
        tree.rows[0]["PerformedProcedureStepDescription"] = 'CHEST\n"PA", lateral'
        tree.write_metadata()
        assert drawn(corpus(tmp_path)) == expected
        return
    if change == "duplicate id":
        tree.rows.append(dict(tree.rows[0]))
    elif change == "other patient":
        tree.rows.append(tree.rows[0] | {"subject_id": 19_999_999, "dicom_id": "other"})
    else:
        tree.rows.append({"dicom_id": "short", "ViewPosition": "PA", "study_id": "x"})
    tree.write_metadata()
    with pytest.raises(UserError, match=r"metadata\.csv\.gz, row \d+"):
        drawn(corpus(tmp_path))
    assert drawn(corpus(tmp_path, BuildLog("skip"), on_error="skip")) == expected


def test_fewer_patients_than_asked_are_counted(tmp_path):
    MimicTree(tmp_path, patients=9, traps=False)
    with pytest.raises(UserError, match=r"9 patients have 4 studies.*need 16; lower --institutions"):
        drawn(corpus(tmp_path))


def test_any_sections_are_drawn_from_all_of_a_study(tmp_path):
    tree = MimicTree(tmp_path, traps=False)
    for place, study in [(place, place[-12:-4]) for place in tree.texts]:
        keys = ("examination", "indication", "technique", "comparison", "findings", "impression")
        tree.texts[place] = mimic_report(sections(study, *keys)).encode()
    tree.write_reports()
    kinds = {s.key for *_, own in drawn(corpus(tmp_path, section_kinds="any")) for s in own}
    assert {"technique", "comparison"} <= kinds
    standard = {s.key for *_, own in drawn(corpus(tmp_path)) for s in own}
    assert standard == {"examination", "indication", "findings", "impression"}
    with pytest.raises(UserError, match="add `any`"):
        corpus(tmp_path, sections=8)


def test_another_seed_draws_another_hospital(tree, tmp_path):
    MimicTree(tmp_path, patients=24, traps=False)
    assert drawn(corpus(tmp_path, seed=1)) != drawn(corpus(tmp_path, seed=2))
    assert drawn(corpus(tmp_path, seed=1)) == drawn(corpus(tmp_path, seed=1))
