"""Every difference from MIMIC-CXR's official parser that `docs/report-sections.md` lists, by its example."""

import re
from pathlib import Path

import pytest

from medforget_dataset.sections import parse_report


DIVIDER = "_" * 78
DIFFERENCES = {
    "digits": (" COMPARISON: None.\n CHEST, 2 VIEWS: Clear.", {"comparison": "None.", "findings": "Clear."}),
    "time of day": (" PORTABLE CHEST, ___ AT 05:30: Clear.", {"findings": "Clear."}),
    "digits that head nothing": (" FINDINGS: Old.\n T11 AND T12: wedged", {"findings": "Old. T11 AND T12: wedged"}),
    "first column": ("\nFINDINGS: Clear.\n", {"findings": "Clear."}),
    "tab": ("\n\tFINDINGS: Clear.\n", {"findings": "Clear."}),
    "first line": ("IMPRESSION: Normal.", {"impression": "Normal."}),
    "byte order mark": ("\ufeffIMPRESSION: Normal.", {"impression": "Normal."}),
    "no space": (" FINDINGS:Clear.\n IMPRESSION:Normal.", {"findings": "Clear.", "impression": "Normal."}),
    "a ratio": (" FINDINGS: Cup\n RATIO 3:1", {"findings": "Cup RATIO 3:1"}),
    "CR LF": (" FINDINGS: Clear.\r\n \r\n IMPRESSION: Well.\r\n", {"findings": "Clear.", "impression": "Well."}),
    "CR": (" FINDINGS: Clear.\r IMPRESSION: Well.\r", {"findings": "Clear.", "impression": "Well."}),
    "one letter": (" FINDINGS: Lines:\n A: in place", {"findings": "Lines: A: in place"}),
    "empty before known": (" FINDINGS:\n IMPRESSION: Normal.", {"impression": "Normal."}),
    "empty before other": (
        " COMPARISON: \n CT TORSO: of ___ shows a nodule.\n FINDINGS:\n AP VIEW: Clear.",
        {"comparison": "CT TORSO: of ___ shows a nodule.", "findings": "AP VIEW: Clear."},
    ),
    "ndication": (" NDICATION: Cough.", {"indication": "Cough."}),
    "provisional": (
        " PFI: Effusion.\n PROVISIONAL FINDINGS IMPRESSION (PFI): Small.\n IMPRESSION: Large.",
        {"provisional_impression": "Effusion. Small.", "impression": "Large."},
    ),
    "longer headings": (
        " INDICATION FOR CHEST XRAY: Cough.\n TECHNIQUE, CHEST: AP.\n EXAM, CHEST: PA.\n CHEST RECOMMENDATION: CT.",
        {"indication": "Cough.", "technique": "AP.", "examination": "PA.", "recommendation": "CT."},
    ),
    "view beside findings": (
        " PORTABLE CHEST: Line in place.\n FINDINGS: Clear.",
        {"portable_chest": "Line in place.", "findings": "Clear."},
    ),
    "view beside empty findings": (" PORTABLE CHEST: Clear.\n FINDINGS: \n", {"findings": "Clear."}),
    "repeated": (
        " IMPRESSION: A.\n COMPARISON: B.\n IMPRESSION: C.",
        {"impression": "A. C.", "comparison": "B."},
    ),
    "repeated word for word": (
        " IMPRESSION: A.\n COMPARISON: B.\n IMPRESSION: A.",
        {"impression": "A.", "comparison": "B."},
    ),
    "addendum": (
        f" ADDENDUM: Called.\n IMPRESSION: Nodule.\n {DIVIDER}\n IMPRESSION: Normal.",
        {"addendum": "Called. IMPRESSION: Nodule.", "impression": "Normal."},
    ),
    "two addenda": (
        f" ADDENDUM #2: Later.\n {DIVIDER}\n ADDENDUM: Called.\n {DIVIDER}\n IMPRESSION: Normal.",
        {"addendum": "2: Later. Called.", "impression": "Normal."},
    ),
    "addendum below": (
        f" IMPRESSION: Normal.\n {DIVIDER}\n ADDENDUM: Called.\n FINDINGS: Nodule.",
        {"addendum": "Called. FINDINGS: Nodule.", "impression": "Normal."},
    ),
    "addendum without a title": (
        f" Called at 3 p.m.\n {DIVIDER}\n FINDINGS: Clear.",
        {"addendum": "Called at 3 p.m.", "findings": "Clear."},
    ),
    "addendum without a colon": (
        f" ADDENDUM  ADDENDUM\n Called.\n {DIVIDER}\n FINDINGS: Clear.",
        {"addendum": "Called.", "findings": "Clear."},
    ),
    "addendum without a divider": (
        " ADDENDUM: Called.\n IMPRESSION: Nodule.\n     FINAL REPORT\n IMPRESSION: Normal.",
        {"addendum": "Called. IMPRESSION: Nodule.", "impression": "Normal."},
    ),
    "wet read": (
        f" WET READ: ___ ___ 9:33 PM\n Effusion.\n {DIVIDER}\n     FINAL REPORT\n FINDINGS: Clear.",
        {"wet_read": "___ ___ 9:33 PM Effusion.", "findings": "Clear."},
    ),
    "sections above the title": (
        " EXAMINATION: CHEST.\n     FINAL REPORT\n FINDINGS: Clear.",
        {"examination": "CHEST.", "findings": "Clear."},
    ),
    "divider in the report": (f" FINDINGS: Clear.\n {DIVIDER}\n Heart normal.", {"findings": "Clear. Heart normal."}),
    "divider at the end": (f" FINDINGS: Clear.\n {DIVIDER}\n", {"findings": "Clear."}),
    "marks": (" FINDINGS: Since\n ___\n ___ ___\n unchanged.", {"findings": "Since ___ ___ ___ unchanged."}),
    "preamble": (" Chest.\n FINDINGS: Clear.", {"findings": "Clear."}),
    "no heading": (" The lungs are clear.\n \n No effusion.", {}),
    "last paragraph": (" INDICATION: Cough.\n \n Clear lungs.", {"indication": "Cough. Clear lungs."}),
    "empty": (" TECHNIQUE: \n \n FINDINGS: Clear.", {"findings": "Clear."}),
    "marks alone": (" COMPARISON: ___.\n FINDINGS: Clear.", {"findings": "Clear."}),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(name):
    text, sections = DIFFERENCES[name]
    found = parse_report(text).sections
    assert found == sections and list(found) == list(sections)


def test_every_example_of_the_documentation_holds():
    text = (Path(__file__).parent.parent / "docs" / "report-sections.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    checked = 0
    for example, result in ((row[2], row[4]) for row in rows if len(row) == 5 and row[2].startswith("`")):
        example = re.sub(r"_{6}…", DIVIDER, example.partition("`")[2].partition("`")[0])
        found = parse_report("\n " + example.replace("␍", "\r").replace("⏎", "\n")).sections
        expected = re.findall(r"([a-z_]+): (.+?)(?:; (?=[a-z_]+: )|$)", result)
        if result not in ("the same", "–"):
            assert list(found.items()) == expected, example
            checked += 1
        elif result == "–":
            assert found == {}, example
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize(
    ("heading", "key"),
    [
        ("EXAM", "examination"),
        ("TYPE OF EXAMINATION", "examination"),
        ("REASON FOR EXAM", "indication"),
        ("CLINICAL INDICATION", "indication"),
        ("CLINICAL INFORMATION", "clinical_history"),
        ("COMPARISONS", "comparison"),
        ("REFERENCE EXAM", "comparison"),
        ("CONCLUSION", "impression"),
        ("IMPRESSOIN", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/ IMPRESSION", "impression"),
        ("REFERENCE FINDINGS", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("AP AND LATERAL VIEWS", "findings"),
        ("RECOMMENDATION(S)", "recommendation"),
        ("NOTIFICATION", "notification"),
        ("ET TUBE", "et_tube"),
    ],
)
def test_headings_have_the_official_meaning(heading, key):
    assert parse_report(f"FINAL REPORT\n {heading}:  Some  text,\n wrapped.\n").sections == {
        key: "Some text, wrapped."
    }


def test_oddities_are_told():
    text = " TECHNIQUE: \r\n IMPRESSION: A.\r\n COMPARISON: ___\r\n IMPRESSION: B.\r\n CHEST, TWO VIEWS:\r\n"
    assert parse_report(text).oddities == (
        ("CRLF line ends", ""),
        ("empty section", "technique"),
        ("repeated section", "impression"),
    )
    assert parse_report("").oddities == (("report without any heading", ""),)


@pytest.mark.parametrize("piece", ["A", "A ", "_", "\n", "A:\n", f"{DIVIDER}\n", "FINAL REPORT\n", " FINDINGS:", "1:"])
def test_no_report_takes_long(piece):
    parse_report(piece * (1_000_000 // len(piece)))
