"""HL7 v2, OBX: each value type of table 0125 becomes its kind of observation, a report a note. Synthetic patients only."""

from __future__ import annotations

import base64

import pytest

from tests.unit.test_hl7 import OBR, PID, facts, message, obx, read
from worker.domain import Code, ValueKind

NOTE = "no effusion,\nno pneumothorax"
ENCODED = base64.b64encode(NOTE.encode()).decode()


@pytest.mark.parametrize(
    ("value_type", "content", "kind", "value", "high", "comparator", "text"),
    [
        ("NM", "3.2", "number", 3.2, None, "", ""),
        ("NM", "hemolyzed", "text", None, None, "", "hemolyzed"),
        ("SN", ">^33.5", "number", 33.5, None, ">", ""),
        ("SN", "^1^-^5", "range", 1.0, 5.0, "", ""),
        ("SN", "=^1^-^5", "range", 1.0, 5.0, "", ""),
        ("SN", "^5^-^1", "text", None, None, "", "5-1"),
        ("SN", "<^1^-^5", "text", None, None, "", "<1-5"),
        ("SN", "^1^:^128", "ratio", 1.0, 128.0, "", ""),
        ("SN", ">^1^:^128", "ratio", 1.0, 128.0, ">", ""),
        ("SN", "^1^/^2", "ratio", 1.0, 2.0, "", ""),
        ("SN", "^2^+", "text", None, None, "", "2+"),
        ("SN", "^1^:", "text", None, None, "", "1:"),
        ("SN", "^1^:^128^x", "text", None, None, "", "1:128x"),
        ("NR", "1^5", "range", 1.0, 5.0, "", ""),
        ("NR", "1^", "number", 1.0, None, ">=", ""),
        ("NR", '""^5', "number", 5.0, None, "<=", ""),
        ("NR", "5^1", "text", None, None, "", "5 - 1"),
        ("ST", "clear", "text", None, None, "", "clear"),
        ("DTM", "20200101", "text", None, None, "", "20200101"),
        ("TM", "0630", "text", None, None, "", "0630"),
        ("CWE", "^seen", "text", None, None, "", "seen"),
        ("CE", "POS^^L~NEG", "text", None, None, "", "POS\nNEG"),
        ("ED", f"^TEXT^PLAIN^Base64^{ENCODED}", "text", None, None, "", NOTE),
        ("ED", f"^text/plain^^Base64^{ENCODED[:8]} {ENCODED[8:]}", "text", None, None, "", NOTE),
        ("ED", f"LAB^TX^^Hex^{NOTE.encode().hex()}", "text", None, None, "", NOTE),
        ("ED", "^FT^^A^one\\.br\\two \\T\\ three", "text", None, None, "", "one\ntwo & three"),
    ],
)
def test_each_value_type_gives_its_kind(
    value_type: str, content: str, kind: ValueKind, value: float | None, high: float | None, comparator: str, text: str
) -> None:
    (fact,) = facts(OBR, obx(value_type, content, unit="mg/L^^UCUM"))
    assert (fact.kind, fact.value, fact.high, fact.comparator, fact.text) == (kind, value, high, comparator, text)
    assert fact.unit == ("mg/L" if value is not None else "")
    assert fact.coded is None


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("10^9/L", "10*9/L"),
        ("10^3/uL", "10*3/uL"),
        ("10^12/L", "10*12/L"),
        ("10^6/mm3", "10*6/mm3"),
        ("10\\S\\9/L", "10^9/L"),
        ("10^9/L^^10*3/mL^^UCUM", "10*3/mL"),
        ("10^9/L^99LAB", "10"),
        ("10^ten", "10"),
        ("100^9/L", "100"),
    ],
)
def test_a_power_of_ten_whose_caret_was_not_escaped_is_put_together_again(unit: str, expected: str) -> None:
    assert facts(OBR, obx("NM", "3", unit=unit))[0].unit == expected


@pytest.mark.parametrize("value_type", ["CE", "CWE", "CNE", "CF"])
@pytest.mark.parametrize(
    ("content", "coded", "words"),
    [
        ("260415000^not detected^SCT", Code("260415000", "SCT", "not detected"), "not detected"),
        ("NEG^negative^L^260415000^not detected^SCT", Code("260415000", "SCT", "not detected"), "negative"),
        ("NEG", Code("NEG", "L", ""), "NEG"),
        ("NEG^^HOUSE^^^^^^none seen", Code("NEG", "HOUSE", ""), "none seen"),
    ],
)
def test_a_coded_result_keeps_its_code_and_its_words(value_type: str, content: str, coded: Code, words: str) -> None:
    (fact,) = facts(OBR, obx(value_type, content))
    assert (fact.kind, fact.coded, fact.text, fact.value) == ("coded", coded, words, None)


@pytest.mark.parametrize(
    ("value_type", "content"),
    [
        ("ED", "^application^pdf^Base64^JVBERi0xLjQ="),
        ("ED", f"^IM^JPEG^Base64^{ENCODED}"),
        ("ED", f"^TEXT^HTML^Base64^{ENCODED}"),
        ("ED", f"^TEXT^^UU^{ENCODED}"),
        ("ED", "^TEXT^^Base64^not base64"),
        ("ED", "^TEXT^^Base64^/w=="),
        ("ED", "^TEXT^^Hex^xyz"),
        ("RP", "https://example.org/1^^TEXT^PLAIN"),
        *(
            (one, "1^a^b")
            for one in ("AD", "CK", "CN", "CP", "CX", "DR", "HD", "MA", "MO", "NA", "PN", "TN", "XCN", "XON", "XPN", "XTN", "ZZ")
        ),
    ],
)
def test_what_holds_no_value_and_no_text_is_counted(value_type: str, content: str) -> None:
    """A PDF read as text would be noise in the network's input; a name in a result is no result."""
    parsed = read(message(PID, OBR, obx(value_type, content), obx("NM", "3")))
    assert parsed.update is not None
    assert [fact.value for fact in parsed.update.observations] == [3.0]
    assert parsed.skipped == 1


@pytest.mark.parametrize(
    ("value_type", "content"), [("NM", "NaN"), ("NM", "-INF"), ("NM", "1.#QNAN"), ("NM", "infinity"), ("SN", ">^inf"), ("SN", "^NaN")]
)
def test_what_a_program_writes_for_no_number_is_kept_as_a_text_and_counted(value_type: str, content: str) -> None:
    parsed = read(message(PID, OBR, obx(value_type, content), obx("NM", "hemolyzed", code="K^K^L"), obx("ST", "NaN", code="X^X^L")))
    assert parsed.update is not None
    assert [fact.kind for fact in parsed.update.observations] == ["text"] * 3
    assert parsed.skipped == 1


def test_a_withdrawn_result_without_a_value_replaces() -> None:
    (first,) = facts(OBR, obx("SN", "^1^-^5"))
    (withdrawn,) = facts(OBR, obx("SN", "", status="W"))
    assert (withdrawn.key, withdrawn.status, withdrawn.value, withdrawn.high) == (first.key, "W", None, None)


@pytest.mark.requirement("F10")
@pytest.mark.parametrize("status", ["C", "W", "X", "D"])
def test_each_of_the_repeats_under_one_key_is_corrected_and_withdrawn(status: str) -> None:
    repeats = [("3", "20200506070000"), ("4", "20200506080000"), ("5", "20200506090000")]
    said, superseding = (facts(OBR, *(obx("NM", value, at=at, status=one) for value, at in repeats)) for one in ("F", status))
    assert [(one.key, one.at, one.value) for one in superseding] == [(one.key, one.at, one.value) for one in said]
    assert len({one.key for one in said}) == 3
    (replaced,) = facts(OBR, obx("NM", "3"), obx("NM", "6", status=status))
    assert (replaced.value, replaced.status) == (6.0, status)


def test_a_text_below_a_number_of_the_same_code_is_a_fact_of_its_own() -> None:
    number, text = facts(OBR, obx("NM", "3"), obx("TX", "hemolyzed"))
    assert (number.value, number.text, number.kind) == (3.0, "", "number")
    assert (text.value, text.text, text.kind) == (None, "hemolyzed", "text")
    assert number.key != text.key


REPORT = "OBR|1||F7|18748-4^Diagnostic imaging study^LN|||20200506063000|||||||||||||||20200506093000||RAD"


@pytest.mark.parametrize("codes", [("&GDT", "&IMP"), ("", ""), ("18748-4&GDT^x^LN", "18748-4&IMP^y^LN"), ("^Findings", "^Impression")])
def test_the_parts_of_a_report_are_one_note(codes: tuple[str, str]) -> None:
    """HL7 v2.5.1 §7.1: the suffixes name parts of what OBR-4 names."""
    (note,) = facts(REPORT, obx("TX", "Lungs clear.", code=codes[0]), obx("FT", "Normal.\\.br\\End.", code=codes[1]))
    assert (note.code.value, note.code.scheme, note.kind) == ("18748-4", "LN", "text")
    assert note.text == "Lungs clear.\nNormal.\nEnd."
    assert note.at.isoformat() == "2020-05-06T08:30:00+00:00"


def test_a_report_without_any_code_goes_by_its_section() -> None:
    (note,) = facts(REPORT.replace("18748-4^Diagnostic imaging study^LN", ""), obx("TX", "Lungs clear.", code=""))
    assert (note.code.value, note.code.scheme) == ("RAD", "HL70074")


def test_a_number_without_a_code_is_not_what_was_ordered() -> None:
    """OBR-4 names a panel: a value of it may be any of its parts."""
    assert read(message(PID, REPORT, obx("NM", "3", code=""))).skipped == 1


def test_a_report_as_encapsulated_text_counts_from_when_it_was_written() -> None:
    (note,) = facts(REPORT, obx("ED", f"^TEXT^^Base64^{ENCODED}", code="11502-2^Report^LN", at="20200506063000"))
    assert note.at.isoformat() == "2020-05-06T08:30:00+00:00"
