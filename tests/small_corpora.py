"""Miniature trees of the public corpora, in their exact layouts and with their published names and columns.

Here are the writers; the traps of a corpus stand in its test file, as the list `TRAPS`. A trap changes a sound tree:
it is a fault (the build stops, or skips it), a notice (the build goes on and says so), or a refusal (nothing can be
built, whatever was chosen). All texts are made up; phrases are drawn from lists, so that no two studies read alike.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medforget_dataset import CONFIGS, FEATURES, BuildOptions, UserError, load
from medforget_dataset.build_log import LOG, BuildLog
from medforget_dataset.corpora import get_corpus
from medforget_dataset.hierarchy import Institution
from medforget_dataset.validate import validate


FAULT, NOTICE, REFUSAL = "fault", "notice", "refusal"
# Four institutions of four patients with five studies each, of which a build of the smallest size takes four.
PATIENTS, STUDIES = 16, 5
SIDES = ("left", "right")
FINDINGS = (
    "There is a {size} {side} pleural effusion with adjacent atelectasis.",
    "A {mm} mm nodule projects over the {side} upper lobe.",
    "Patchy opacity in the {side} lower lobe may be pneumonia.",
    "The heart is mildly enlarged; there is {size} vascular congestion.",
    "No pneumothorax. The {side} chest tube is unchanged in position.",
    "Lungs are clear. Degenerative changes of the thoracic spine are {size}.",
    "A {side} subclavian catheter ends {mm} mm above the carina.",
    "Calcified granuloma of the {side} hilum, {mm} mm, stable over {mm} months.",
)
IMPRESSIONS = (
    "1. {size} {side} pleural effusion, increased since the last study.",
    "1. No acute cardiopulmonary abnormality. 2. {size} scoliosis.",
    "1. {side} lower lobe consolidation, consistent with pneumonia. Follow-up in {mm} days.",
    "1. {mm} mm {side} nodule; chest CT is advised.",
    "1. Low lung volumes with {size} pulmonary edema.",
    "1. Interval removal of the {side} chest tube without pneumothorax.",
)
HISTORIES = (
    "{age} years of age, {sex}, shortness of breath.",
    "{age} years of age, {sex}, status post coronary bypass.",
    "{age} years of age, {sex}, fever and cough for {mm} days.",
    "{age} years of age, {sex}, {side} rib pain after a fall.",
    "{age} years of age, {sex}, breast cancer, rule out metastases.",
)
COMPARISONS = ("{mm} months earlier.", "Chest CT of {mm} days ago.", "Radiograph from {age} weeks before.", "None.")
NARRATIVES = (
    "XR CHEST 1 VIEW PORTABLE: {mm}/{mm}/2011",
    "RADIOGRAPHIC EXAMINATION OF THE CHEST, PA AND LATERAL VIEWS: {mm}/3/2009",
    "AP PORTABLE CHEST, {mm}:{age} HOURS",
    "Single frontal view of the chest, supine: {mm}/{age}/2007",
)


class Trap(NamedTuple):
    """Something that is wrong with a tree.

    Args:
        name (`str`): What.
        kind (`str`): `"fault"`, `"notice"` or `"refusal"`.
        logged (`str`): The kind that the log has it under, or words of a refusal.
        where (`str`): What the message must name: part of a file's name, a row or an id.
        spring (`Callable[[Path], None]`): Puts it into a sound tree.
    """

    name: str
    kind: str
    logged: str
    where: str
    spring: Callable[[Path], None]


def say(rng: random.Random, phrases: tuple[str, ...], count: int = 1) -> str:
    """Sentences drawn from `phrases`, filled in."""
    filled = []
    for phrase in rng.sample(phrases, count):
        size = rng.choice(("small", "moderate", "large", "mild", "tiny"))
        sentence = phrase.format(
            size=size, side=rng.choice(SIDES), mm=rng.randint(2, 28), age=rng.randint(18, 89), sex=rng.choice("MF")
        )
        filled.append(sentence[0].upper() + sentence[1:])
    return " ".join(filled)


def save_image(file: Path, seed: int, shape: tuple[int, int] = (72, 60)) -> None:
    """A grey image that no other seed gives; `shape` is height and width in pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 220, (6, 5), dtype=np.uint8))
    small.resize(shape[::-1], Image.Resampling.BICUBIC).save(file)


def write_csv(file: Path, columns: list[str], rows: list[dict], encoding: str = "utf-8", end: str = "\n") -> None:
    """A CSV file as pandas would write it."""
    with file.open("w", encoding=encoding, newline="") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path) -> list[dict]:
    """The rows of a CSV file."""
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def each(files: list[Path], change: Callable[[Path], object]) -> None:
    """Change every file."""
    for file in files:
        change(file)


def truncate(file: Path) -> None:
    """Cut a file in half."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def replace_bytes(file: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """A spring: one occurrence of some bytes replaced in a file below the root."""

    def spring(root: Path) -> None:
        data = (root / file).read_bytes()
        assert old in data
        (root / file).write_bytes(data.replace(old, new, 1))

    return spring


def write_file(name: str, content: str | bytes) -> Callable[[Path], object]:
    """A spring: a file below the root, written anew."""
    data = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(data)


def draw(
    corpus: str, root: Path, on_error: str = "stop", **options: Any
) -> tuple[tuple[Institution, ...], list[dict]]:
    """What the smallest build of a tree would be made of, and what its log says."""
    log = root.parent / f"{root.name}-{on_error}.jsonl"
    log.unlink(missing_ok=True)
    smallest = {"institutions": 4, "patients": 4, "image_size": 56} | options
    chosen = BuildOptions(corpus=corpus, root=str(root), on_error=on_error, **smallest)
    institutions = get_corpus(corpus)(chosen, BuildLog(on_error, log)).institutions()
    return institutions, read_log(log)


def read_log(file: Path) -> list[dict]:
    """The lines of a build log; none if nothing was worth one."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def check_trap(trap: Trap, corpus: str, root: Path) -> None:
    """What must happen to a tree with this trap, in both modes."""
    if trap.kind == REFUSAL:
        for on_error in ("stop", "skip"):
            with pytest.raises(UserError, match=re.escape(trap.logged)) as refusal:
                draw(corpus, root, on_error)
            assert trap.where in str(refusal.value) and "\n" not in str(refusal.value)
        return
    if trap.kind == FAULT:
        with pytest.raises(UserError, match=re.escape(trap.where)) as fault:
            draw(corpus, root)
        assert str(root) in str(fault.value) and "\n" not in str(fault.value)
    for on_error in ("stop", "skip") if trap.kind == NOTICE else ("skip",):
        institutions, log = draw(corpus, root, on_error)
        assert len(institutions) == 4 and {len(x.patients) for x in institutions} == {4}
        lines = [line for line in log if line["kind"] == trap.logged]
        assert any(trap.where in f"{line['file']} {line['row']}: {line['message']}" for line in lines), log
        assert {line["action"] for line in lines} == {"skipped" if trap.kind == FAULT else "noticed"}


def check_build(folder: Path, traps: Iterable[Trap]) -> list[dict]:
    """A build holds, loads in every configuration, and lists every trap; returns the rows of `finetune`."""
    assert validate(folder) == []
    for config in CONFIGS:
        for split in load(config, data=folder).values():
            assert split.features == FEATURES and len(split)
    logged = Counter((line["action"], line["kind"]) for line in read_log(folder / LOG))
    for trap in traps:
        assert logged[{FAULT: "skipped", NOTICE: "noticed"}[trap.kind], trap.logged], f"{trap.name}: {logged}"
    return load("finetune", "train", data=folder).remove_columns("image").to_list()


# --- CheXpert Plus ------------------------------------------------------------------------------------------------

CHEXPERT_CSV = "df_chexpert_plus_240401.csv"
CHEXPERT_COLUMNS = (
    "path_to_image path_to_dcm frontal_lateral ap_pa deid_patient_id patient_report_date_order report "
    "section_narrative section_clinical_history section_history section_comparison section_technique "
    "section_procedure_comments section_findings section_impression section_end_of_impression section_summary "
    "section_accession_number age sex race ethnicity interpreter_needed insurance_type recent_bmi deceased split"
).split()


def write_chexpert_plus(root: Path, *, images: str = "PNG/PNG", suffix: str = ".png") -> Path:
    """A tree of CheXpert Plus: the table, and images below `images` as `PNG.zip` unpacks them."""
    rng, rows = random.Random(0), []
    for patient in range(1, PATIENTS + 1):
        for study in range(1, STUDIES + 1):
            for row in chexpert_rows(rng, f"patient{patient:05d}", study):
                rows.append(row)
                file = root / images / Path(row["path_to_image"]).with_suffix(suffix)
                save_image(file, len(rows))
    write_csv(root / CHEXPERT_CSV, CHEXPERT_COLUMNS, rows)
    return root


def chexpert_rows(rng: random.Random, patient: str, study: int) -> list[dict]:
    """The rows of a study: a frontal image, sometimes a lateral one, each with the whole report."""
    history = say(rng, HISTORIES)
    older = rng.random() < 0.3  # the older form of the report has the section under another name
    row = dict.fromkeys(CHEXPERT_COLUMNS, "") | {
        "deid_patient_id": patient,
        "patient_report_date_order": str(STUDIES + 1 - study),
        "section_narrative": f"\n{say(rng, NARRATIVES)}\n",
        "section_history" if older else "section_clinical_history": f" {history}",
        "section_comparison": say(rng, COMPARISONS),
        "section_findings": "\n" + say(rng, FINDINGS, 3).replace(". ", ".\n \n", 1),
        "section_impression": f'\n \n{say(rng, IMPRESSIONS, 2)} "Stable", as discussed.',
        "section_end_of_impression": "\n",
        "section_summary": "2-ABNORMAL, PREVIOUSLY REPORTED",
        "section_accession_number": str(rng.randint(10**6, 10**7)),
        "age": "57",
        "sex": "Female",
        "race": "Other",
        "recent_bmi": "26.1",
        "split": "train",
    }
    row["report"] = "NARRATIVE:" + row["section_narrative"] + "\nFINDINGS:" + row["section_findings"]
    path = f"train/{patient}/study{study}"
    views = [("view1_frontal", "Frontal", rng.choice(("AP", "PA")))]
    if study % 2:
        views.append(("view2_lateral", "Lateral", ""))
    return [
        row
        | {
            "path_to_image": f"{path}/{name}.jpg",
            "path_to_dcm": f"{path}/{name}.dcm",
            "frontal_lateral": side,
            "ap_pa": projection,
        }
        for name, side, projection in views
    ]


# --- Open-i -------------------------------------------------------------------------------------------------------

# Eight groups of four more than a build of the smallest size takes.
OPEN_I_REPORTS = 96
CAPTIONS = ("PA and lateral chest x-XXXX, XXXX.", "Xray Chest PA and Lateral", "CHEST 2V FRONTAL/LATERAL XXXX, XXXX")


def write_open_i(root: Path, images: str = "NLMCXR_png") -> Path:
    """A tree of Open-i: `ecgen-radiology/<n>.xml`, and images in the folder `images`."""
    rng = random.Random(1)
    (root / images).mkdir(parents=True)
    for number in range(1, OPEN_I_REPORTS + 1):
        sections = {
            "COMPARISON": say(rng, COMPARISONS).replace("CT", "XXXX"),
            "INDICATION": say(rng, HISTORIES).replace("years of age", "XXXX-year-old"),
            "FINDINGS": say(rng, FINDINGS, 3),
            "IMPRESSION": say(rng, IMPRESSIONS, 2),
        }
        caption, stem = rng.choice(CAPTIONS), f"CXR{number}_IM-{number:04d}"
        views = {f"{stem}-1001": caption, f"{stem}-2001": caption}
        write_open_i_report(root, number, sections, views)
        for series, id in enumerate(views):
            save_image(root / images / f"{id}.png", 10 * number + series)
    return root


def write_open_i_report(
    root: Path, number: int, sections: dict[str, str], images: dict[str, str], uid: str = ""
) -> Path:
    """One report of the collection; `images` are their ids with their captions."""
    abstract = "".join(
        f"<AbstractText Label={quoteattr(label)}>{escape(text)}</AbstractText>" for label, text in sections.items()
    )
    figures = "".join(
        f"<parentImage id={quoteattr(id)}><figureId>F{order}</figureId><caption>{escape(caption)}</caption><panel>"
        f'<url>/hadoop/storage/radiology/extract/{escape(id)}.jpg</url><imgModality value="7">x</imgModality></panel>'
        "</parentImage>"
        for order, (id, caption) in enumerate(images.items(), 1)
    )
    file = root / "ecgen-radiology" / f"{number}.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/>'
        f'<uId id="{uid or f"CXR{number}"}"/><pmcId id="{number}"/><docSource>CXR</docSource><IUXRId id="{number}"/>'
        "<licenseType>open-access</licenseType><licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL>"
        '<ccLicense>byncnd</ccLicense><articleURL/><MedlineCitation Owner="Indiana University" Status="supplied by '
        'Indiana University"><Article PubModel="Electronic"><Journal><JournalIssue><PubDate><Year>2013</Year>'
        "</PubDate></JournalIssue></Journal><ArticleTitle>Indiana University Chest X-ray Collection</ArticleTitle>"
        f"<Abstract>{abstract}</Abstract><Affiliation>Indiana University</Affiliation></Article></MedlineCitation>"
        f"<MeSH><major>normal</major></MeSH>{figures}</eCitation>\n",
        encoding="utf-8",
    )
    return file


# --- A table ------------------------------------------------------------------------------------------------------

TABLE_COLUMNS = ["institution", "patient", "study", "section", "text", "image", "scanner"]
INSTITUTIONS = ("Charité Berlin", "Mayo Clinic", "東京大学病院", "CHU de Nantes")
CT_FINDINGS = (
    "A hypodense lesion of {mm} mm lies in the {side} hepatic lobe.",
    "The {side} kidney shows a {size} cyst without enhancement.",
    "Ground-glass opacity in the {side} lower lobe measures {mm} mm.",
    "The pancreas is unremarkable; {size} ascites is noted.",
    "Osteophytes of the lumbar spine, {size}, on the {side}.",
)


def write_table(root: Path, kind: str = "csv", *, institutions: int = 4) -> Path:
    """A table of CT slices: `table.csv` or `table.parquet`, and `slices/*.png`."""
    root.mkdir(parents=True, exist_ok=True)
    rng, rows, study = random.Random(2), [], 5000
    for institution in range(institutions):
        label = INSTITUTIONS[institution] if institution < len(INSTITUTIONS) else f"Site {institution + 1}"
        for patient in range(4):
            for _ in range(STUDIES):
                study += 1
                image = f"slices/{study}.png"
                save_image(root / image, study)
                rows += table_rows(rng, label, str(100 * institution + patient), str(study), image)
    if kind == "csv":
        write_csv(root / "table.csv", TABLE_COLUMNS, rows)
    else:
        write_parquet(root, rows)
    return root


def write_parquet(root: Path, rows: list[dict]) -> None:
    """The table as Parquet, ids as whole numbers, in several row groups."""
    columns = {name: [row[name] for row in rows] for name in TABLE_COLUMNS}
    columns |= {name: [int(value) for value in columns[name]] for name in ("patient", "study")}
    pq.write_table(pa.table(columns), root / "table.parquet", row_group_size=50)


def table_rows(rng: random.Random, institution: str, patient: str, study: str, image: str) -> list[dict]:
    texts = {
        "Clinical History": say(rng, HISTORIES),
        "Technique": f"Contrast-enhanced CT, {rng.randint(1, 5)} mm slices, {rng.randint(80, 140)} kVp.",
        "FINDINGS": say(rng, CT_FINDINGS, 3).replace(". ", ".\n", 1),
        "Impression ": say(rng, IMPRESSIONS),
        "Recommendation": f"Follow-up in {rng.randint(2, 30)} weeks; “no contrast”, if possible.",
    }
    shared = {"institution": institution, "patient": patient, "study": study, "image": image, "scanner": "SOMATOM"}
    return [shared | {"section": heading, "text": text} for heading, text in texts.items()]
