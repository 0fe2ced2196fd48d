"""HL7 v2: what one message says, what is refused, and that nothing is guessed. Synthetic patients only."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.domain import Observation, Patient, PatientKey
from worker.errors import RecordError
from worker.intake.hl7 import ParsedMessage, parse

CET = timezone(timedelta(hours=1))
SENTINEL = "ZZSENTINEL"
PID = "PID|1||4711^^^HOSP^MR||Doe^Jane||19800229|F"
OBR = "OBR|1||F7|LAB^Laboratory^L|||20200506063000"


def message(
    *segments: str, trigger: str = "ORU^R01", charset: str = "UNICODE UTF-8", sent: str = "20200506063000", codec: str = "utf-8"
) -> bytes:
    """Make one message of our MSH and `segments`."""
    msh = f"MSH|^~\\&|LAB|HOSP|SYN|RAD|{sent}||{trigger}|C1|P|2.5.1||||||{charset}"
    return "\r".join((msh, *segments, "")).encode(codec)


def read(raw: bytes, *, zone: tzinfo = CET, issuers: dict[str, str] | None = None, schemes: dict[str, str] | None = None) -> ParsedMessage:
    return parse(raw, zone=zone, issuers=issuers or {}, schemes=schemes)


def facts(*segments: str, **how: str) -> tuple[Observation, ...]:
    update = read(message(PID, *segments, **how)).update
    assert update is not None
    return update.observations


def obx(value_type: str, value: str, *, unit: str = "", status: str = "F", at: str = "", code: str = "1988-5^CRP^LN", sub: str = "") -> str:
    return f"OBX|1|{value_type}|{code}|{sub}|{value}|{unit}|||||{status}|||{at}"


def patient(pid: str, *, issuers: dict[str, str] | None = None) -> Patient:
    update = read(message(pid, trigger="ADT^A01"), issuers=issuers).update
    assert update is not None
    return update.patient


def test_an_admission_gives_the_demographics_as_dicom_writes_them() -> None:
    parsed = read(message("PID|1||4711^^^HOSP^MR||van Doe&van&Doe^Jane^Q^Jr^Dr^^L||19800229120000|F", trigger="ADT^A04^ADT_A01"))
    assert (parsed.control_id, parsed.sender, parsed.trigger) == ("C1", "LAB|HOSP", "ADT^A04")
    assert parsed.sent_at == datetime(2020, 5, 6, 5, 30, tzinfo=UTC)
    assert parsed.update is not None
    assert parsed.update.has_demographics
    # PN has the prefix before the suffix, XPN the suffix before the prefix.
    assert parsed.update.patient == Patient(PatientKey("HOSP", "4711"), "van Doe^Jane^Q^Dr^Jr", "19800229", "F")


def test_a_laboratory_does_not_change_demographics() -> None:
    update = read(message(PID, OBR, obx("NM", "3"))).update
    assert update is not None
    assert not update.has_demographics


@pytest.mark.parametrize(
    ("pid_3", "key"),
    [
        ("1^^^A^SS~2^^^B^MR", PatientKey("B", "2")),
        ("1^^^A^PI~2^^^B^MR", PatientKey("B", "2")),
        ("1^^^A~2^^^B", PatientKey("A", "1")),
        ("^^^A^MR~2^^^B", PatientKey("B", "2")),
        ("1^^^A^MR^^20190101^20200505~2^^^A^PI", PatientKey("A", "2")),
        ("1^^^A^MR^^^2019~2^^^A^MR^^^99991231", PatientKey("A", "2")),
        ("1^^^A^MR^^^20200506~2^^^A^MR", PatientKey("A", "1")),
        ("1^^^A^MR^^^2020~2^^^A^MR", PatientKey("A", "1")),
        ("1^^^A^MR^^^soon~2^^^A^MR", PatientKey("A", "1")),
        ("1^^^A^MR^^^20190101", PatientKey("A", "1")),
        ("1^^^&1.2.3&ISO^MR", PatientKey("1.2.3", "1")),
        ("1^^^NS&1.2.3&ISO^MR", PatientKey("NS", "1")),
        ("1^^^OLD&9.9&ISO^MR", PatientKey("MAPPED", "1")),
        ("1^^^NEW&8.8&ISO^MR", PatientKey("BY OID", "1")),
    ],
)
def test_the_patient_key_is_the_record_number_and_its_authority(pid_3: str, key: PatientKey) -> None:
    assert patient(f"PID|1||{pid_3}", issuers={"OLD": "MAPPED", "8.8": "BY OID", "": "NOBODY'S"}).key == key


def test_an_authority_left_out_is_refused_unless_the_site_names_one() -> None:
    with pytest.raises(RecordError, match=r"PID-3\.4"):
        patient("PID|1||4711^^^^MR")
    assert patient("PID|1||4711^^^^MR", issuers={"": "HOSP"}).key == PatientKey("HOSP", "4711")


@pytest.mark.requirement("F5")
@pytest.mark.parametrize("other", ["0012", "１２", "12a", "12A", "1 2", "12."])
def test_patient_ids_are_compared_as_they_are(other: str) -> None:
    """Zeros, case and wide digits distinguish; only blanks at the ends are padding, as in DICOM."""
    assert patient(f"PID|1||{other}^^^HOSP").key != patient("PID|1||12^^^HOSP").key
    assert patient("PID|1||12 ^^^HOSP ").key == patient("PID|1||12^^^HOSP").key


@pytest.mark.parametrize(
    ("segments", "field"),
    [
        ((), "PID"),
        ((PID, PID), "PID"),
        (("PID|1||^^^HOSP",), r"PID-3\.1"),
        (('PID|1||""^^^HOSP',), r"PID-3\.1"),
        (("PID|1||1^^^HOSP||||19991399",), "PID-7"),
        ((PID, OBR, obx("NM", "3", status="")), "OBX-11"),
        ((PID, OBR, obx("NM", "3", status="Q")), "OBX-11"),
        ((PID, OBR, obx("NM", "3", at="yesterday")), "OBX-14"),
        ((PID, OBR, obx("NM", "3", at="20200230")), "OBX-14"),
        ((PID, OBR, obx("NM", "3", at="20200506+9900")), "OBX-14"),
        ((PID, "OBR|1||F7|LAB", obx("NM", "3")), "OBR-7"),
        ((PID, "no segment"), "Line 3"),
        ((PID, "MSH|^~\\&|B"), "MSH"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_field_and_without_its_content(segments: tuple[str, ...], field: str) -> None:
    with pytest.raises(RecordError, match=field) as caught:
        read(message(*segments))
    assert not any(value in str(caught.value) for value in ("4711", "Doe", "1999", "yesterday", "2020"))


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"", "MSH"),
        (b"MSH", "MSH-1"),
        (b"MSH|", "MSH-1"),
        (b"MSH|^~\\\\|A", "MSH-1"),
        (b"PID|1\rMSH|^~\\&", "begin"),
        (b"MSH|^~\\&|A|B|||20200101||ADT^A01||P|2.5\r", "MSH-10"),
        (b"MSH|^~\\&|A|B|||||ADT^A01|1|P|2.5\r", "MSH-7"),
        (b"MSH|^~\\&|A|B|||20200101+9900||ADT^A01|1|P|2.5\r", "MSH-7"),
        (message(PID, charset="KLINGON"), "MSH-18"),
        (message(PID, charset="ASCII", codec="utf-8") + "NTE|é".encode(), "MSH-18"),
        (message(PID) + b"NTE|\xff\xfe", "MSH-18"),
        (message(PID, charset="") + b"NTE|\xe9", "MSH-18"),
        (message(PID) + b"NTE|\x1b$B", "ISO 2022"),
    ],
)
def test_a_broken_header_or_charset_is_refused(raw: bytes, field: str) -> None:
    with pytest.raises(RecordError, match=field):
        read(raw)


@pytest.mark.parametrize(
    ("value_type", "content", "expected"),
    [
        ("NM", "3.20", (3.2, "", "mg/L", "")),
        ("NM", "-.5", (-0.5, "", "mg/L", "")),
        ("NM", " +7 ", (7.0, "", "mg/L", "")),
        ("NM", "hemolyzed", (None, "", "", "hemolyzed")),
        ("NM", "nan", (None, "", "", "nan")),
        ("NM", "1_000", (None, "", "", "1_000")),
        ("NM", "１２", (None, "", "", "１２")),
        ("NM", "3,2", (None, "", "", "3,2")),
        ("NM", "<3", (None, "", "", "<3")),
        ("NM", "27~25", (None, "", "", "27\n25")),
        ("SN", ">^33.5", (33.5, ">", "mg/L", "")),
        ("SN", "<=^0", (0.0, "<=", "mg/L", "")),
        ("SN", "^182", (182.0, "", "mg/L", "")),
        ("SN", "=^5", (5.0, "", "mg/L", "")),
        ("SN", "<>^5", (None, "", "", "<>5")),
        ("SN", "^2^+", (None, "", "", "2+")),
        ("CWE", "260415000^not detected^SCT", (None, "", "", "not detected")),
        ("CE", "POS^^L~NEG", (None, "", "", "POS\nNEG")),
        ("TX", "no effusion~R\\T\\D & ^more", (None, "", "", "no effusion\nR&D & ^more")),
        ("ST", "a\\F\\b\\S\\c\\T\\d\\R\\e\\E\\f", (None, "", "", "a|b^c&d~e\\f")),
        ("FT", "one\\.br\\two\\.sp1\\\\H\\three\\N\\", (None, "", "", "one\ntwo\nthree")),
        ("FT", "\\XC3A4\\\\X0D0A\\x \\Zlocal\\ C:\\dir", (None, "", "", "ä\nx \\Zlocal\\ C:\\dir")),
        ("FT", "\\E\\F\\E\\", (None, "", "", "\\F\\")),
        ("TX", "a\x0bb\x00c", (None, "", "", "a\nbc")),
        ("DT", "20200101", (None, "", "", "20200101")),
    ],
)
def test_content_becomes_a_value_or_a_text_and_nothing_is_guessed(
    value_type: str, content: str, expected: tuple[float | None, str, str, str]
) -> None:
    (fact,) = facts(OBR, obx(value_type, content, unit="mg/L^mg/L^UCUM"))
    assert (fact.value, fact.comparator, fact.unit, fact.text) == expected


@pytest.mark.parametrize(
    ("value_type", "content"), [("NM", ""), ("NM", '""'), ("TX", ""), ("CWE", "^^"), ("ED", "^A^B^C"), ("RP", "x"), ("", "3")]
)
def test_nothing_usable_is_counted_not_invented(value_type: str, content: str) -> None:
    parsed = read(message(PID, OBR, obx(value_type, content)))
    assert parsed.update is not None
    assert (parsed.update.observations, parsed.skipped) == ((), 1)


def test_a_result_without_a_code_is_counted() -> None:
    assert read(message(PID, OBR, obx("NM", "3", code="^CRP^LN"))).skipped == 1


@pytest.mark.parametrize(("sent", "kept"), [("U", "F"), ("C", "C"), ("B", "C"), ("S", "P"), ("R", "P"), ("P", "P")])
def test_statuses_are_reduced_to_those_of_the_record(sent: str, kept: str) -> None:
    assert [fact.status for fact in facts(OBR, obx("NM", "3", status=sent))] == [kept]


@pytest.mark.parametrize("status", ["C", "D", "W", "X"])
def test_a_correction_or_withdrawal_has_the_key_of_what_it_replaces(status: str) -> None:
    (first,) = facts(OBR, obx("NM", "3"))
    (second,) = facts(OBR, obx("NM", "" if status != "C" else "4", status=status))
    assert second.key == first.key
    assert second.status == status


def test_keys_differ_by_order_code_sub_id_and_time() -> None:
    many = facts(
        OBR,
        obx("NM", "3"),
        obx("NM", "3", sub="2"),
        obx("NM", "3", code="X^X^L"),
        obx("NM", "3", at="20200506070000"),
        OBR.replace("F7", "F8"),
        obx("NM", "3"),
    )
    assert len({fact.key for fact in many}) == len(many) == 5


def test_the_same_code_again_in_one_order_stays_a_fact_of_its_own() -> None:
    """Without OBX-4 all would have one key, and one measurement would hide the others."""
    again = facts(OBR, obx("NM", "3"), obx("NM", "4"), obx("NM", "5"))
    assert [fact.value for fact in again] == [3.0, 4.0, 5.0]
    assert len({fact.key for fact in again}) == 3


def test_a_correction_in_the_same_message_replaces() -> None:
    (fact,) = facts(OBR, obx("NM", "3"), obx("NM", "4", status="C"))
    assert (fact.value, fact.status) == (4.0, "C")


def test_lines_of_one_text_are_joined() -> None:
    (fact,) = facts(OBR, obx("TX", "first"), obx("TX", "second~third"), obx("TX", ""))
    assert fact.text == "first\nsecond\nthird"


@pytest.mark.parametrize(
    ("coded", "code"),
    [
        ("1988-5^CRP^LN", ("1988-5", "LN")),
        ("CRP^CRP^99LAB^1988-5^CRP^LN", ("1988-5", "LN")),
        ("F13^Factor XIII^L", ("F13", "L")),
        ("F13^Factor XIII^99ABC", ("F13", "99ABC")),
        ("F13^Factor XIII", ("F13", "L")),
        ("F13^Factor XIII^HOUSE", ("F13", "99HOUSE")),
        ("x^y^HOUSE^27268008^z^SCT", ("27268008", "SCT")),
    ],
)
def test_loinc_is_preferred_and_local_names_are_mapped(coded: str, code: tuple[str, str]) -> None:
    update = read(message(PID, OBR, obx("NM", "3", code=coded)), schemes={"HOUSE": "99HOUSE"}).update
    assert update is not None
    assert (update.observations[0].code.value, update.observations[0].code.scheme) == code


@pytest.mark.parametrize(("unit", "expected"), [("mg/l^^L^mg/L^^UCUM", "mg/L"), ("mg/dl", "mg/dl"), ("^per cent", "per cent"), ("", "")])
def test_the_ucum_unit_is_preferred(unit: str, expected: str) -> None:
    assert facts(OBR, obx("NM", "3", unit=unit))[0].unit == expected


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("20200506063000", "2020-05-06T05:30:00+00:00"),
        ("20200506063000.25+0530", "2020-05-06T01:00:00.250000+00:00"),
        ("202005060630-0215", "2020-05-06T08:45:00+00:00"),
        ("2020050606", "2020-05-06T05:59:59+00:00"),
        ("20200506", "2020-05-06T22:59:59+00:00"),
        ("202002", "2020-02-29T22:59:59+00:00"),
        ("2020", "2020-12-31T22:59:59+00:00"),
        ("", "2020-05-06T05:30:00+00:00"),
    ],
)
def test_an_imprecise_time_is_the_latest_it_may_be(at: str, expected: str) -> None:
    """A value of "that day" may be drawn after the study of that day; it must not be used in it."""
    assert facts(OBR, obx("NM", "3", at=at))[0].at.isoformat() == expected


def test_the_offset_of_the_message_is_that_of_its_times() -> None:
    assert facts(OBR, obx("NM", "3"), sent="20200506063000-0500")[0].at.isoformat() == "2020-05-06T11:30:00+00:00"


def test_an_hour_that_comes_twice_is_the_second() -> None:
    (fact,) = (
        update.observations
        if (update := read(message(PID, OBR, obx("NM", "3", at="20201025023000")), zone=ZoneInfo("Europe/Berlin")).update)
        else ()
    )
    assert fact.at.isoformat() == "2020-10-25T01:30:00+00:00"


def test_a_report_counts_from_when_it_was_written_and_a_value_from_when_it_was_drawn() -> None:
    """A report on the study itself names the study's time; as its input it would give the answer away."""
    reported = OBR + "|||||||||||||||20200506093000"
    text, value = facts(reported, obx("TX", "pneumonia"), obx("NM", "3"))
    assert text.at.isoformat() == "2020-05-06T08:30:00+00:00"
    assert value.at.isoformat() == "2020-05-06T05:30:00+00:00"
    (corrected,) = facts(reported.replace("0930", "1130"), obx("TX", "none", status="C"))
    assert corrected.key == text.key


@pytest.mark.requirement("F9")
@pytest.mark.parametrize(
    ("charset", "codec", "name"),
    [
        ("8859/1", "latin-1", "Müller"),
        ("UNICODE UTF-8", "utf-8", "Ünal王"),
        ("GB 18030-2000", "gb18030", "王亅乛"),
        ("", "utf-8", "Ångström"),
        ("ASCII", "ascii", "Doe"),
    ],
)
def test_msh_18_rules_the_characters(charset: str, codec: str, name: str) -> None:
    """The second byte of 亅 in GB 18030 is '|': what splits before it decodes loses fields."""
    update = read(message(f"PID|1||1^^^HOSP||{name}", trigger="ADT^A08", charset=charset, codec=codec)).update
    assert update is not None
    assert update.patient.name == name


def test_a_header_that_cannot_be_split_before_it_is_decoded_is_refused() -> None:
    """Its answer would name another message: MSH-10 is found among the bytes, and 亅 ends in one that looks like '|'."""
    raw = message(PID, charset="").decode().replace("LAB", "亅").encode("gb18030")
    with pytest.raises(RecordError, match="separator's byte"):
        parse(raw, zone=CET, issuers={}, encoding="gb18030")


def test_a_separator_inside_a_name_cannot_become_one_of_dicom() -> None:
    assert patient("PID|1||1^^^HOSP||A\\S\\B=C^D").name == "A B C^D"


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_other_line_ends_and_a_byte_order_mark_are_understood(end: str) -> None:
    raw = b"\xef\xbb\xbf" + message(PID, OBR, obx("NM", "3")).replace(b"\r", end.encode())
    assert read(raw) == read(message(PID, OBR, obx("NM", "3")))


@pytest.mark.parametrize(
    ("trigger", "told"),
    [("ADT^A02", "ADT^A02"), ("RDE^O11", "RDE^O11"), ("SIU^S12", "SIU^S12"), ("ACK", ""), ("", ""), (f"{SENTINEL}^Jane", "")],
)
def test_other_triggers_are_read_and_not_used(trigger: str, told: str) -> None:
    """What is no trigger is not repeated: it is written to the log, and a message out of step may have a name there."""
    parsed = read(message("PID|1", trigger=trigger))
    assert (parsed.trigger, parsed.update) == (told, None)
    assert parsed.note == "Messages of this trigger are not used."


@pytest.mark.requirement("X1")
@pytest.mark.parametrize("position", [2, 3, 5, 7])
def test_no_error_repeats_what_the_field_holds(position: int) -> None:
    fields = PID.split("|")
    fields[position] = SENTINEL + "\\C2842\\"
    with pytest.raises(RecordError) as caught:
        read(message("|".join(fields), OBR, obx("NM", "3", status=SENTINEL)))
    assert SENTINEL not in str(caught.value)


SEED = message(PID, OBR, obx("SN", ">^33.5"), obx("FT", "a\\.br\\b\\X41\\"), obx("CWE", "1^x^SCT"))


@given(
    at=st.integers(0, len(SEED)),
    drop=st.integers(0, 40),
    put=st.one_of(st.binary(max_size=12), st.text('|^~\\&\r\n"0X.+-', max_size=12).map(str.encode)),
)
@example(at=0, drop=0, put=b"\xef\xbb\xbf")
def test_no_damage_gives_anything_but_a_message_or_a_refusal(at: int, drop: int, put: bytes) -> None:
    """Whatever else is raised would be answered AE, and the sender would send it for ever."""
    try:
        parsed = read(SEED[:at] + put + SEED[at + drop :])
    except RecordError:
        return
    assert parsed.control_id
    assert all(fact.at.tzinfo is UTC and "\0" not in fact.text for fact in (parsed.update.observations if parsed.update else ()))


LONG = SENTINEL * 60


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (message(f"PID|1||{SENTINEL * 7}^^^HOSP^MR", trigger="ADT^A01"), "PID-3.1 has 70 characters; the limit is 64"),
        (message(f"PID|1||1^^^{LONG}^MR", trigger="ADT^A01"), "PID-3.4 has 600 characters"),
        (message("PID|1||1^^^HOSP^MR", f"MRG|{SENTINEL * 7}^^^HOSP^MR", trigger="ADT^A40"), "MRG-1.1 has 70 characters"),
        (message(PID, trigger="ADT^A01").replace(b"|C1|", f"|{SENTINEL * 20}|".encode()), "MSH-10 has 200 characters; the limit is 199"),
        (message(PID, trigger="ADT^A01").replace(b"|LAB|", f"|{SENTINEL * 20}|".encode()), "MSH-3 with MSH-4 has 205 characters"),
        (message(PID, OBR, obx("NM", "5", code=f"{SENTINEL * 7}^x^L")), "OBX-3 has 70 characters; the limit is 64"),
        (message(PID, OBR.replace("F7", LONG), obx("NM", "5")), "numbers and codes of a fact has [0-9]+ characters; the limit is 512"),
        (message(PID, f"ORC|NW|{LONG}", "OBR|1|||x||||||||||||||A1", trigger="ORM^O01"), "ORC-2 has 600 characters"),
        (message(PID, f"TXA|1|DS||20200506||||||||{LONG}|||||AU", "OBX|1|TX|||x||||||F", trigger="MDM^T02"), "TXA-12 has 600 characters"),
    ],
    ids=["patient", "issuer", "retired", "control ID", "sender", "code", "key", "order", "document"],
)
def test_what_no_index_can_hold_is_refused_by_its_field(raw: bytes, field: str) -> None:
    """The database would refuse it each time it is sent: answered AR, it is sent once."""
    with pytest.raises(RecordError, match=field) as caught:
        read(raw)
    assert SENTINEL not in str(caught.value)


@pytest.mark.requirement("F6")
def test_no_order_number_is_the_beginning_of_another() -> None:
    one, other = (facts(OBR.replace("F7", number), obx("NM", "5"))[0].key for number in ("77", "77/LN"))
    assert one.count("/") == other.count("/")
