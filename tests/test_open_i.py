"""Open-i: a tree in its published layout, what is read of it, and what happens to what is wrong with it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpora import (
    FAULT,
    NOTICE,
    REFUSAL,
    Trap,
    check_build,
    check_trap,
    draw,
    each,
    replace_bytes,
    save_image,
    truncate,
    write_file,
    write_open_i,
    write_open_i_report,
)

from medforget_dataset import BuildOptions, UserError, build
from medforget_dataset.corpora import get_corpus
from medforget_dataset.hierarchy import walk_studies


def _open_i_file(number: int, change: Callable[[str], str]) -> Callable[[Path], None]:
    def spring(root: Path) -> None:
        file = root / "ecgen-radiology" / f"{number}.xml"
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    return spring


def _open_i_report(number: int, sections: dict[str, str], images: dict[str, str], uid: str = "") -> Callable:
    return lambda root: write_open_i_report(root, number, sections, images, uid)


def _break_open_i(how: Callable[[Path], None], step: int = 20) -> Callable[[Path], None]:
    """Break every `step`-th image, so that a group is lost here and there and enough are left."""
    return lambda root: each(sorted((root / "NLMCXR_png").glob("*-1001.png"))[::step], how)


FOUR = {
    "COMPARISON": "Chest radiograph of 3 days ago.",
    "INDICATION": "Chest pain.",
    "FINDINGS": "Small left pleural effusion. No pneumothorax.",
    "IMPRESSION": "Small left effusion.",
}
BOMB = (
    '<!DOCTYPE bomb [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><eCitation><uId id="CXR902"/>'
    '<AbstractText Label="FINDINGS">&b;</AbstractText></eCitation>'
)
OUTSIDE = (
    '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/hostname">]><eCitation><uId id="CXR903"/>'
    '<AbstractText Label="FINDINGS">&f;</AbstractText></eCitation>'
)


TRAPS = (
    Trap("an XML file cut short", FAULT, "damaged XML", "7.xml", _open_i_file(7, lambda text: text[: len(text) // 2])),
    Trap("an empty XML file", FAULT, "damaged XML", "901.xml", write_file("ecgen-radiology/901.xml", "")),
    Trap(
        "bytes that are not UTF-8",
        FAULT,
        "damaged XML",
        "8.xml",
        replace_bytes("ecgen-radiology/8.xml", b"<Year>", b"<Year>\xe9"),
    ),
    Trap("an entity bomb", FAULT, "XML with entities", "902.xml", write_file("ecgen-radiology/902.xml", BOMB)),
    Trap("an external entity", FAULT, "XML with entities", "903.xml", write_file("ecgen-radiology/903.xml", OUTSIDE)),
    Trap("other XML", FAULT, "not a report", "904.xml", write_file("ecgen-radiology/904.xml", "<html><body/></html>")),
    Trap(
        "a report of no id",
        FAULT,
        "not a report",
        "9.xml",
        _open_i_file(9, lambda text: text.replace('<uId id="CXR9"/>', "")),
    ),
    Trap(
        "an id twice",
        FAULT,
        "duplicate study",
        "905.xml",
        _open_i_report(905, FOUR, {"CXR1_IM-0001-1001": "PA"}, "CXR1"),
    ),
    Trap(
        "an image that is not there",
        FAULT,
        "missing image",
        "CXR906_IM-1-1001",
        _open_i_report(906, FOUR, {"CXR906_IM-1-1001": ""}),
    ),
    Trap(
        "an image id that climbs",
        FAULT,
        "missing image",
        "../../../etc/hostname",
        _open_i_report(907, FOUR, {"../../../etc/hostname": "PA"}),
    ),
    Trap(
        "a report of two megabytes",
        FAULT,
        "report too long",
        "908.xml",
        _open_i_report(908, FOUR | {"FINDINGS": "effusion. " * 200_000}, {}),
    ),
    Trap("truncated images", FAULT, "truncated image", "-1001.png", _break_open_i(truncate)),
    Trap("empty images", FAULT, "empty image file", "-1001.png", _break_open_i(lambda file: file.write_bytes(b""))),
    Trap(
        "images that are none", FAULT, "not an image", "-1001.png", _break_open_i(lambda file: file.write_text("no"))
    ),
    Trap(
        "a report without any heading",
        NOTICE,
        "report without any heading",
        "CXR909",
        _open_i_report(909, {}, {"CXR1_IM-0001-1001": ""}),
    ),
    Trap(
        "an empty section",
        NOTICE,
        "empty section",
        "910.xml",
        _open_i_report(910, FOUR | {"COMPARISON": "  "}, {"CXR1_IM-0001-1001": ""}),
    ),
    Trap("a report without images", NOTICE, "no frontal image", "CXR911", _open_i_report(911, FOUR, {})),
    Trap(
        "lateral images only",
        NOTICE,
        "no frontal image",
        "CXR912",
        _open_i_report(912, FOUR, {"CXR1_IM-0001-2001": "Chest LATERAL"}),
    ),
    Trap(
        "a section that is all hidden",
        NOTICE,
        "section that cannot be asked",
        "CXR913",
        _open_i_report(913, FOUR | {"COMPARISON": "XXXX, XXXX."}, {"CXR1_IM-0001-1001": ""}),
    ),
    Trap(
        "no reports",
        REFUSAL,
        "no ecgen-radiology/1.xml",
        "--root",
        lambda root: (root / "ecgen-radiology").rename(root.parent / f"{root.name}-elsewhere"),
    ),
    Trap(
        "no images",
        REFUSAL,
        "no PNG files",
        "--images",
        lambda root: (root / "NLMCXR_png").rename(root.parent / f"{root.name}-elsewhere"),
    ),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_open_i(tmp_path_factory.mktemp("sound") / "open-i")


@pytest.fixture
def root(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "open-i"))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name.replace(" ", "-"))
def test_a_trap_is_named_and_passed_over_on_request(trap, root):
    trap.spring(root)
    check_trap(trap, "open-i", root)


def test_a_tree_full_of_traps_builds_and_its_log_lists_them(root, tmp_path):
    alone = {"empty images", "images that are none"}  # of the same files as the truncated ones
    traps = [trap for trap in TRAPS if trap.kind != REFUSAL and trap.name not in alone]
    for trap in traps:
        trap.spring(root)
    options = {"institutions": 4, "patients": 4, "image_size": 56, "on_error": "skip", "workers": 1}
    folder = build(tmp_path / "out", corpus="open-i", root=str(root), **options)
    rows = check_build(folder, traps)
    assert not any(row["restricted"] for row in rows)
    assert {row["section"] for row in rows} == {"", "comparison", "indication", "findings", "impression"}
    card = (folder / "README.md").read_text()
    assert "license: cc-by-nc-nd-4.0" in card and "group of studies of different people" in card


def _corpus(root: Path, **options):
    return get_corpus("open-i")(BuildOptions(corpus="open-i", root=str(root), **options))


def test_patients_are_groups_that_the_seed_draws(root):
    def groups(**options):
        found: dict[str, set[str]] = {}
        for entry in _corpus(root, **options).scan():
            found.setdefault(entry.patient, set()).add(entry.study)
        return list(found.values())

    assert all(len(group) == 4 for group in groups()) and len(set().union(*groups())) == 96
    assert groups() == groups() != groups(seed=1)
    assert {len(group) for group in groups(studies=8)} == {8}


def test_hidden_words_are_kept(root):
    institutions, log = draw("open-i", root)
    assert log == []
    indications = [node.study.sections[1].text for node in walk_studies(institutions)]
    assert all("XXXX-year-old" in text for text in indications) and len(set(indications)) > 40


@pytest.mark.parametrize(
    ("captions", "best"),
    [
        ({"CXR1-1001": "Chest lateral", "CXR1-2001": "PA view"}, "CXR1-2001"),
        ({"CXR1-1001": "AP portable", "CXR1-2001": "Frontal"}, "CXR1-2001"),
        ({"CXR1-3001": "PA and lateral", "CXR1-1001": "PA and lateral"}, "CXR1-1001"),
        ({"CXR1-12": "", "CXR1-9": ""}, "CXR1-9"),
        ({"CXR1-1001": "", "CXR1-4001": "Portable chest"}, "CXR1-4001"),
    ],
)
def test_the_caption_tells_the_frontal_image_else_the_lowest_number(captions, best, root):
    write_open_i_report(root, 1, FOUR, captions)
    for number, id in enumerate(captions):
        save_image(root / "NLMCXR_png" / f"{id}.png", number)
    corpus = _corpus(root)
    files = {entry.study: corpus.image_file(entry) for entry in corpus.scan()}
    assert files["CXR1"].stem == best


@pytest.mark.parametrize("images", ["NLMCXR_png", "images", "."])
def test_images_may_lie_where_the_archive_leaves_them(images, tmp_path):
    root = write_open_i(tmp_path / "open-i", images=images)
    assert len(list(_corpus(root).scan())) == 96


def test_images_may_lie_in_another_folder(root, tmp_path):
    (root / "NLMCXR_png").rename(tmp_path / "pictures")
    assert len(list(_corpus(root, images=str(tmp_path / "pictures")).scan())) == 96


def test_too_few_patients_are_counted(root):
    with pytest.raises(UserError, match=r"24 patients have 4 studies .* need 32"):
        draw("open-i", root, patients=8)
