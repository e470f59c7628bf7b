"""Reports are read as they stand: every mended fault of the official parser, and nothing invented."""

import pytest
from hospital_files import mimic_report, sections

from medforget_dataset.sections import parse_report


@pytest.mark.parametrize("seed", range(20))
def test_what_was_written_is_read(seed):
    parts = sections(seed, "examination", "indication", "technique", "comparison", "findings", "impression")
    report = parse_report(mimic_report(parts))
    assert report.sections == parts
    assert report.oddities == ()


@pytest.mark.parametrize(
    ("heading", "key"),
    [
        ("IMPRESSION", "impression"),
        ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("REASON FOR EXAM", "indication"),
        ("CLINICAL INDICATION", "indication"),
        ("HISTORY", "clinical_history"),
        ("CLINICAL INFORMATION", "clinical_history"),
        ("EXAM", "examination"),
        ("TYPE OF EXAMINATION", "examination"),
        ("COMPARISONS", "comparison"),
        ("REFERENCE EXAM", "comparison"),
        ("RECOMMENDATION(S)", "recommendation"),
        ("NOTIFICATION", "notification"),
        ("WET READ", "wet_read"),
    ],
)
def test_headings_have_the_benchmarks_names(heading, key):
    assert parse_report(f" {heading}:  Some text.\n").sections == {key: "Some text."}


def test_a_heading_with_a_digit_ends_the_section_before_it():
    report = parse_report(" COMPARISON:  None.\n \n CHEST, 2 VIEWS:  Clear lungs.\n")
    assert report.sections == {"comparison": "None.", "findings": "Clear lungs."}


def test_a_view_heading_does_not_replace_findings():
    report = parse_report(" PORTABLE CHEST:  Line in place.\n FINDINGS:  Clear lungs.\n")
    assert report.sections == {"portable_chest": "Line in place.", "findings": "Clear lungs."}


def test_an_addendum_neither_swallows_nor_replaces_the_report():
    own = mimic_report({"findings": "Clear lungs.", "impression": "Normal."})
    report = parse_report(f" ADDENDUM:  Called at 3:15 p.m.\n IMPRESSION:  Wrong.\n {'_' * 78}\n{own}")
    assert report.sections == {
        "addendum": "Called at 3:15 p.m. IMPRESSION: Wrong.",
        "findings": "Clear lungs.",
        "impression": "Normal.",
    }


def test_a_preliminary_reading_is_kept_apart():
    own = mimic_report({"impression": "Normal."})
    report = parse_report(f" WET READ: ___ ___ 8:05 PM\n  Effusion.\n {'_' * 78}\n{own}")
    assert report.sections == {"wet_read": "___ ___ 8:05 PM Effusion.", "impression": "Normal."}


def test_hidden_words_divide_nothing():
    report = parse_report(" FINDINGS:  Compared with ___, the\n ___ line is gone.\n __________ was told.\n")
    assert report.sections == {"findings": "Compared with ___, the ___ line is gone. __________ was told."}


def test_a_divider_below_the_report_is_no_report():
    assert parse_report(f" FINDINGS:  Clear.\n {'_' * 40}\n").sections == {"findings": "Clear."}


@pytest.mark.parametrize("indent", ["", " ", "    "])
def test_headings_count_whatever_their_indentation(indent):
    assert parse_report(f"{indent}FINDINGS:  Clear.\n{indent}IMPRESSION: Well.").sections == {
        "findings": "Clear.",
        "impression": "Well.",
    }


def test_headings_on_consecutive_lines_are_all_seen():
    report = parse_report(" FINDINGS:\n IMPRESSION:  Normal.\n")
    assert report.sections == {"impression": "Normal."}
    assert report.oddities == (("empty section", "findings"),)


def test_a_section_in_two_pieces_keeps_both():
    report = parse_report(" FINDINGS:  Clear lungs.\n IMPRESSION:  A.\n FINDINGS:  Normal heart.\n")
    assert report.sections == {"findings": "Clear lungs. Normal heart.", "impression": "A."}
    assert report.oddities == (("repeated section", "findings"),)


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_line_ends_of_other_systems_are_read(ends):
    text = mimic_report(sections(1)).replace("\n", ends)
    report = parse_report(text)
    assert report.sections == sections(1)
    assert report.oddities == (("CRLF line ends", ""),)


@pytest.mark.parametrize("text", ["", "   \n", " The lungs are clear.\n \n Normal heart.", " Findings: lower case."])
def test_nothing_is_invented_where_there_is_no_heading(text):
    assert parse_report(text).sections == {}
    assert ("report without any heading", "") in parse_report(text).oddities


@pytest.mark.parametrize("line", ["RATIO 3:1 was seen", "1. NO CHANGE: text", "HTTP://x", "AT 3:15 PM"])
def test_what_only_looks_like_a_heading_is_text(line):
    assert list(parse_report(f" FINDINGS:  Clear.\n {line}\n").sections) == ["findings"]


def test_a_report_of_two_megabytes_is_parsed_in_linear_time():
    text = " FINDINGS:  " + "A" * 1_000_000 + " " + "_" * 1_000_000
    assert len(parse_report(text).sections["findings"]) == 2_000_001
