"""HL7 v2, who is who: demographics in any order, merges, cancelled visits. Synthetic patients only."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.unit.test_hl7 import PID, message, read
from worker.domain import Merge, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.hl7 import DEMOGRAPHICS, MERGES
from worker.store import records
from worker.store.database import Store

A, B, C = PatientKey("HOSP", "1"), PatientKey("HOSP", "2"), PatientKey("HOSP", "3")


def update(*segments: str, trigger: str, sent: str = "20200506063000") -> RecordUpdate:
    found = read(message(*segments, trigger=trigger, sent=sent)).update
    assert found is not None
    return found


def merged(*segments: str, trigger: str = "ADT^A40") -> tuple[Merge, ...]:
    return update(*segments, trigger=trigger).merges


def pid(identifiers: str) -> str:
    return f"PID|1||{identifiers}||Doe^Jane||19800229|F"


@pytest.mark.parametrize("trigger", sorted(DEMOGRAPHICS))
def test_each_trigger_of_demographics_gives_them(trigger: str) -> None:
    found = update(PID, trigger=trigger)
    assert found.has_demographics
    assert found.patient.name == "Doe^Jane"
    assert not found.merges


@pytest.mark.parametrize(
    ("evn", "hour"),
    [
        ("EVN|A08|20200506050000", 4),
        ("EVN|A08|20200506050000+0000", 5),
        ("EVN|A08", 7),
        ("EVN|A08|", 7),
        ('EVN|A08|""', 7),
        ("", 7),
        # A clock that runs years ahead would make this the last word for years.
        ("EVN|A08|20290101", 7),
    ],
)
def test_demographics_were_said_when_they_were_recorded(evn: str, hour: int) -> None:
    """MSH-7, when it was sent, is 07:00 UTC; a message of a queue that was held up says what was true before."""
    segments = (evn, PID) if evn else (PID,)
    assert update(*segments, trigger="ADT^A08", sent="20200506080000").at == datetime(2020, 5, 6, hour, tzinfo=UTC)


def test_a_recording_time_that_is_none_is_refused() -> None:
    with pytest.raises(RecordError, match="EVN-2"):
        update("EVN|A08|yesterday", PID, trigger="ADT^A08")


def test_results_were_said_when_they_were_sent() -> None:
    """Of two finals under one key the later said stands, in whatever order they came."""
    found = update(PID, "OBR|1||F7|LAB|||20200506", "OBX|1|NM|1988-5^CRP^LN||3||||||F", trigger="ORU^R01", sent="20200507080000")
    assert found.at == datetime(2020, 5, 7, 7, tzinfo=UTC)


@pytest.mark.requirement("F6")
@pytest.mark.parametrize("is_late", [False, True])
def test_the_later_recorded_name_stands_in_whatever_order_the_two_came(tmp_path: Path, is_late: bool) -> None:
    earlier = read(message("EVN|A08|20200506050000", PID, trigger="ADT^A08", sent="20200506090000"))
    later = read(message("EVN|A08|20200506060000", PID.replace("Doe", "Roe"), trigger="ADT^A08"))
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    now = datetime(2020, 5, 7, tzinfo=UTC)
    with store.begin() as conn:
        for parsed in (later, earlier, later) if is_late else (earlier, later, earlier):
            assert parsed.update is not None
            records.apply(conn, parsed.update, now=now)
        found = records.view(conn, PatientKey("HOSP", "4711"), as_of=now)
    store.close()
    assert found is not None
    assert found.patient.name == "Roe^Jane"


@pytest.mark.requirement("F3")
@pytest.mark.parametrize("trigger", sorted(MERGES))
def test_a_merge_retires_mrg_1_and_pid_3_survives(trigger: str) -> None:
    """PID holds no demographics then: what else changes is told by ADT^A31 (HL7 v2.5.1 §3.3.40)."""
    found = update("EVN|A40|20200506050000", pid("1^^^HOSP^MR"), "MRG|2^^^HOSP^MR", trigger=trigger)
    assert found.merges == (Merge(survivor=A, retired=B),)
    assert found.patient.key == A
    assert not found.has_demographics
    assert found.at == datetime(2020, 5, 6, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    ("pid_3", "mrg", "pairs"),
    [
        ("1^^^HOSP^MR", "MRG|2^^^HOSP^MR~3^^^HOSP^MR", [(A, B), (A, C)]),
        ("1^^^HOSP^MR", "MRG|2^^^HOSP", [(A, B)]),
        ("1^^^HOSP^MR", "MRG|2^^^HOSP^PI", [(A, B)]),
        ("1^^^HOSP^MR~7^^^REG^NI", "MRG|8^^^REG^NI~2^^^HOSP^MR", [(PatientKey("REG", "7"), PatientKey("REG", "8")), (A, B)]),
        # The same national number is no merge; the record numbers are.
        ("1^^^HOSP^MR~7^^^REG^NI", "MRG|7^^^REG^NI~2^^^HOSP^MR", [(A, B)]),
        # An account number may be the record number of somebody else.
        ("1^^^HOSP^MR~9^^^HOSP^AN", "MRG|2^^^HOSP^MR~3^^^HOSP^AN", [(A, B)]),
        ("1^^^HOSP^MR", "MRG|2^^^OLD^MR", [(A, PatientKey("OLD", "2"))]),
        ("1^^^HOSP^MR", "MRG||||2^^^HOSP", [(A, B)]),
        ("1^^^HOSP^MR", 'MRG|""|||2^^^HOSP', [(A, B)]),
    ],
)
def test_identifiers_of_one_issuer_are_paired(pid_3: str, mrg: str, pairs: list[tuple[PatientKey, PatientKey]]) -> None:
    assert merged(pid(pid_3), mrg) == tuple(Merge(*pair) for pair in pairs)


def test_every_pair_of_one_message_counts() -> None:
    assert merged(pid("1^^^HOSP^MR"), "MRG|2^^^HOSP^MR", pid("4^^^HOSP^MR"), "MRG|3^^^HOSP^MR") == (
        Merge(A, B),
        Merge(PatientKey("HOSP", "4"), C),
    )


@pytest.mark.parametrize(
    ("segments", "field"),
    [
        ((pid("1^^^HOSP^MR"),), "MRG-1"),
        ((pid("1^^^HOSP^MR"), pid("2^^^HOSP^MR"), "MRG|3^^^HOSP^MR"), "MRG-1"),
        ((pid("1^^^HOSP^MR"), "MRG|3^^^HOSP^MR", pid("2^^^HOSP^MR")), "MRG-1"),
        (("MRG|3^^^HOSP^MR", pid("2^^^HOSP^MR")), "PID"),
        ((pid("1^^^HOSP^MR"), "MRG|3^^^HOSP^MR", "MRG|2^^^HOSP^MR"), "PID"),
        ((), "MRG-1"),
        ((pid("1^^^HOSP^MR"), "MRG|"), "MRG-1"),
        ((pid("1^^^HOSP^MR"), "MRG|^^^HOSP^MR"), "MRG-1"),
        ((pid("1^^^HOSP^MR"), "MRG|2^^^^MR"), r"MRG-1\.4"),
        ((pid("1^^^HOSP^MR"), "MRG|1^^^HOSP^MR"), "MRG-1 is the identifier"),
        ((pid("1^^^HOSP^MR"), "MRG|2^^^HOSP^AN"), "MRG-1 has no identifier of the kind"),
        ((pid("^^^HOSP^MR"), "MRG|2^^^HOSP^MR"), r"PID-3\.1"),
    ],
)
def test_a_merge_that_does_not_say_who_is_who_is_refused(segments: tuple[str, ...], field: str) -> None:
    with pytest.raises(RecordError, match=field) as caught:
        merged(*segments)
    assert "HOSP" not in str(caught.value)


@pytest.mark.parametrize(("trigger", "what"), [("ADT^A11", "admission"), ("ADT^A13", "discharge")])
def test_a_cancelled_visit_is_understood_and_changes_nothing(trigger: str, what: str) -> None:
    """A cancelled admission may have been that of the wrong patient: its demographics are nobody's."""
    parsed = read(message(PID, trigger=trigger))
    assert parsed.update is None
    assert f"The {what} was cancelled" in parsed.note


INERT = [
    "Robert'); DROP TABLE patient;--",
    "%s%n{0}{patient}",
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "${jndi:ldap://x}",
    "<script>",
    "../../etc/passwd",
]


@pytest.mark.requirement("F12")
@pytest.mark.parametrize("name", INERT)
def test_what_other_programs_would_run_is_a_name_like_any_other(tmp_path: Path, name: str) -> None:
    escaped = name.replace("\\", "\\E\\").replace("|", "\\F\\").replace("&", "\\T\\").replace("~", "\\R\\")
    found = read(message(f"PID|1||{escaped}^^^HOSP||{escaped}", trigger="ADT^A08")).update
    assert found is not None
    assert found.patient.key == PatientKey("HOSP", name)
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    now = datetime(2020, 5, 7, tzinfo=UTC)
    with store.begin() as conn:
        records.apply(conn, found, now=now)
        kept = records.view(conn, PatientKey("HOSP", name), as_of=now)
    store.close()
    assert kept is not None
    assert kept.patient.name == name.replace("=", " ")  # which separates the parts of a name in DICOM
