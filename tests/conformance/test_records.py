"""The patient's record on SQLite and on PostgreSQL: merges before, during and after an analysis, orders, identities, replays, upgrades."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig

import worker.store
from worker.config import Config, PatientIds, Records
from worker.domain import (
    ROUTINE,
    STAT,
    Code,
    Header,
    Job,
    Merge,
    Observation,
    Order,
    Patient,
    PatientKey,
    PatientRecord,
    RecordUpdate,
)
from worker.intake import assembly
from worker.record_feeds import identified, localized
from worker.store import feeds, queue, records, schema, studies
from worker.store.database import Store

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
A, B, C, D = (PatientKey("SITE", f"{name}-1") for name in "ABCD")
WANTS = [assembly.Wants("bundle", frozenset({"CT"}), min_instances=1)]
CRP = Code("1988-5", "LN", "CRP")


def fact(value: float, *, key: str = "", status: str = "F") -> Observation:
    return Observation(CRP, NOW - HOUR, value=value, unit="mg/L", key=key or f"k{value}", status=status)


def apply(store: Store, update: RecordUpdate, *, now: datetime = NOW) -> int:
    with store.begin() as conn:
        return records.apply(conn, update, now=now)


def say(store: Store, key: PatientKey, value: float, *, now: datetime = NOW) -> int:
    return apply(store, RecordUpdate(Patient(key), (fact(value),), "LAB", has_demographics=False), now=now)


def say_merged(store: Store, *, survivor: PatientKey, retired: PatientKey, now: datetime = NOW, at: datetime | None = None) -> None:
    apply(store, RecordUpdate(Patient(survivor), source="ADT", merges=(Merge(survivor, retired),), at=at or now), now=now)


def view(store: Store, key: PatientKey, *, known_at: datetime | None = None) -> PatientRecord:
    with store.read() as conn:
        found = records.view(conn, key, as_of=NOW, known_at=known_at)
    assert found is not None
    return found


def values(store: Store, key: PatientKey, *, known_at: datetime | None = None) -> list[float | None]:
    return sorted((one.value for one in view(store, key, known_at=known_at).observations), key=lambda value: value or 0.0)


def undo(store: Store, *, survivor: PatientKey, retired: PatientKey, now: datetime = NOW) -> bool:
    with store.begin() as conn:
        (number,) = [row[0] for row in records.merges_of(conn, survivor) if row[1:3] == (survivor, retired)]
        return records.unmerge(conn, number, reason="Two persons.", now=now)


def study(store: Store, key: PatientKey, *, uid: str, accession_number: str = "", is_complete: bool = True) -> int:
    """A study of one image; returns its row."""
    header = Header("1.2", f"{uid}.1", "1.2", uid, f"{uid}.9", Patient(key), accession_number=accession_number, modality="CT")
    with store.begin() as conn:
        studies.add_instance(
            conn, header, path=Path(uid), sha256="a", size_bytes=9, calling_ae="CT", address="", study_at=NOW, quiet_s=10, now=NOW
        )
    if is_complete:
        assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=10))
    with store.read() as conn:
        return studies.find(conn, uid)[0][0]


def lease(store: Store, *, now: datetime) -> list[Job]:
    with store.begin() as conn:
        return queue.lease(conn, "infer", owner="me", limit=9, lease_s=30, now=now)


def snooze_all(store: Store) -> None:
    for job in lease(store, now=NOW + timedelta(minutes=1)):
        with store.begin() as conn:
            queue.snooze(conn, job, delay_s=86400, reason="The record has not come.", now=NOW + timedelta(minutes=1))


def marked(store: Store) -> dict[int, datetime]:
    with store.read() as conn:
        return dict(studies.record_changed(conn))


# --- merges (F3)


@pytest.mark.requirement("F3")
def test_a_chain_of_merges_is_one_person_and_each_can_be_undone(store: Store) -> None:
    for number, key in enumerate((A, B, C, D)):
        say(store, key, number + 1.0)
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    say_merged(store, survivor=C, retired=B, now=NOW + 2 * HOUR)
    for key in (A, B, C):
        assert values(store, key) == [1.0, 2.0, 3.0]
        assert view(store, key).keys == (C, A, B)
    assert values(store, D) == [4.0]
    assert undo(store, survivor=B, retired=A, now=NOW + 3 * HOUR)
    assert (values(store, A), values(store, B), values(store, C)) == ([1.0], [2.0, 3.0], [2.0, 3.0])
    assert undo(store, survivor=C, retired=B, now=NOW + 4 * HOUR)
    assert (values(store, A), values(store, B), values(store, C)) == ([1.0], [2.0], [3.0])
    # And what was known in between is still known to have been known.
    assert values(store, A, known_at=NOW + 2 * HOUR) == [1.0, 2.0, 3.0]
    assert values(store, A, known_at=NOW + HOUR) == [1.0, 2.0]


@pytest.mark.requirement("F3")
def test_a_chain_that_comes_backwards_has_the_same_survivor(store: Store) -> None:
    say_merged(store, survivor=C, retired=B)
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    assert view(store, A).keys[0] == C
    say_merged(store, survivor=B, retired=C, now=NOW + 2 * HOUR)
    assert view(store, A).keys[0] == B, "of two merges that say the opposite the last counts"


@pytest.mark.requirement("F3")
def test_a_merge_is_undone_once_and_a_feed_that_repeats_itself_does_not_bring_it_back(store: Store) -> None:
    say(store, A, 1.0)
    say_merged(store, survivor=B, retired=A, at=NOW)
    with store.begin() as conn:
        ((number, survivor, retired, received_at, source),) = records.merges_of(conn, A)
        assert (survivor, retired, received_at, source) == (B, A, NOW, "ADT")
        assert records.unmerge(conn, number, reason="Two persons.", now=NOW + HOUR)
        assert not records.unmerge(conn, number, reason="Two persons.", now=NOW + HOUR)
        assert not records.unmerge(conn, number + 1, reason="Two persons.", now=NOW + HOUR)
    say_merged(store, survivor=B, retired=A, now=NOW + 2 * HOUR, at=NOW)
    assert view(store, A).keys == (A,)
    say_merged(store, survivor=B, retired=A, now=NOW + 3 * HOUR, at=NOW + 2 * HOUR)
    assert view(store, A).keys == (B, A), "what is said after the undoing is news"


@pytest.mark.requirement("F3")
def test_a_merge_while_a_study_waits_wakes_the_jobs_of_both(store: Store) -> None:
    waiting = {study(store, key, uid=f"2.25.{number}") for number, key in enumerate((A, B, C), start=1)}
    snooze_all(store)
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    woken = {job.study_id for job in lease(store, now=NOW + HOUR)}
    assert len(waiting) == 3
    assert woken == {1, 2}


@pytest.mark.requirement("F3")
def test_undoing_a_merge_wakes_and_marks_both(store: Store) -> None:
    say_merged(store, survivor=B, retired=A)
    both = {study(store, key, uid=f"2.25.{number}") for number, key in enumerate((A, B), start=1)}
    snooze_all(store)
    assert marked(store) == {}
    undo(store, survivor=B, retired=A, now=NOW + HOUR)
    assert marked(store) == dict.fromkeys(both, NOW + HOUR)
    assert {job.study_id for job in lease(store, now=NOW + HOUR)} == both


@pytest.mark.requirement("F3")
def test_a_merge_after_the_report_marks_only_the_complete_studies_of_the_person(store: Store) -> None:
    of_a = study(store, A, uid="2.25.1")
    of_b = study(store, B, uid="2.25.2")
    study(store, C, uid="2.25.3")
    study(store, PatientKey("OTHER", A.patient_id), uid="2.25.4")
    study(store, A, uid="2.25.5", is_complete=False)
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    assert marked(store) == {of_a: NOW + HOUR, of_b: NOW + HOUR}
    with store.begin() as conn:
        studies.note_record_seen(conn, of_a, changed_at=NOW + HOUR)
        studies.note_record_seen(conn, of_b, changed_at=NOW)
    assert marked(store) == {of_b: NOW + HOUR}, "a change that came meanwhile stays"


@pytest.mark.requirement("F3")
def test_a_merge_told_in_somebody_elses_message_reaches_those_it_names(store: Store) -> None:
    of_a = study(store, A, uid="2.25.1")
    apply(store, RecordUpdate(Patient(C), merges=(Merge(B, A),)), now=NOW + HOUR)
    assert marked(store) == {of_a: NOW + HOUR}


@pytest.mark.requirement("F3")
def test_a_fact_under_one_key_marks_and_wakes_the_studies_under_all(store: Store) -> None:
    say_merged(store, survivor=B, retired=A)
    both = {study(store, key, uid=f"2.25.{number}") for number, key in enumerate((A, B), start=1)}
    snooze_all(store)
    assert say(store, B, 7.0, now=NOW + HOUR) == 1
    assert set(marked(store)) == both
    assert {job.study_id for job in lease(store, now=NOW + HOUR)} == both
    assert values(store, A) == [7.0]


@pytest.mark.requirement("F3")
def test_a_correction_under_the_survivor_stands_for_what_came_under_the_retired(store: Store) -> None:
    apply(store, RecordUpdate(Patient(A), (fact(1.0, key="k"),)))
    say_merged(store, survivor=B, retired=A)
    apply(store, RecordUpdate(Patient(B), (fact(2.0, key="k", status="C"),)))
    assert values(store, A) == [2.0]
    undo(store, survivor=B, retired=A)
    assert (values(store, A), values(store, B)) == ([1.0], [2.0])


# --- orders


def order(store: Store, key: PatientKey, placer: str, priority: int, *, is_cancelled: bool = False) -> None:
    apply(store, RecordUpdate(Patient(key), has_demographics=False, orders=(Order("ACC", placer, "", priority, is_cancelled),)))


def priority(store: Store, key: PatientKey, accession_number: str = "ACC") -> int:
    with store.read() as conn:
        return records.priority_of(conn, key, accession_number)


def test_the_most_urgent_order_that_stands_says_how_urgent_a_study_is(store: Store) -> None:
    assert priority(store, A) == ROUTINE
    order(store, A, "P1", STAT)
    order(store, A, "P2", 5)
    order(store, C, "P3", STAT)
    assert (priority(store, A), priority(store, B)) == (STAT, ROUTINE)
    assert (priority(store, A, "OTHER"), priority(store, A, "")) == (ROUTINE, ROUTINE)
    order(store, A, "P1", STAT, is_cancelled=True)
    assert priority(store, A) == 5
    say_merged(store, survivor=B, retired=A)
    assert priority(store, B) == 5
    order(store, A, "P2", ROUTINE)
    assert priority(store, B) == ROUTINE, "the last said of an order counts"


@pytest.mark.requirement("F6")
@pytest.mark.parametrize("cancellations", [(False, True, False), (True, False)], ids=["replayed", "out of order"])
def test_a_cancelled_order_stays_cancelled(store: Store, cancellations: tuple[bool, ...]) -> None:
    waiting = study(store, A, uid="2.25.1", accession_number="ACC")
    with store.begin() as conn:
        conn.execute(sa.delete(schema.job))
    for is_cancelled in cancellations:
        order(store, A, "P1", STAT, is_cancelled=is_cancelled)
    assert priority(store, A) == ROUTINE
    with store.begin() as conn:
        queue.enqueue_infer(conn, waiting, bundle="b", input_version=1, priority=ROUTINE, now=NOW)
    order(store, A, "P1", STAT)
    with store.read() as conn:
        assert [row.priority for row in queue.of_study(conn, waiting)] == [ROUTINE]


def test_an_order_moves_the_jobs_of_its_study_forward_and_never_back(store: Store) -> None:
    say_merged(store, survivor=B, retired=A)
    urgent = study(store, A, uid="2.25.1", accession_number="ACC")
    study(store, A, uid="2.25.2", accession_number="OTHER")
    study(store, C, uid="2.25.3", accession_number="ACC")

    def priorities() -> list[int]:
        with store.read() as conn:
            return [queue.of_study(conn, number)[0].priority for number in (1, 2, 3)]

    assert urgent == 1
    order(store, B, "P1", STAT)
    assert priorities() == [STAT, ROUTINE, ROUTINE]
    order(store, B, "P2", ROUTINE)
    assert priorities() == [STAT, ROUTINE, ROUTINE]


# --- identities (F2, F5)


@pytest.mark.requirement("F2")
def test_an_id_that_two_issuers_know_names_nobody_by_itself(store: Store) -> None:
    say(store, A, 1.0)
    say(store, replace(A, issuer="OTHER"), 2.0)
    with store.read() as conn:
        assert records.issuers_of(conn, A.patient_id) == ["OTHER", "SITE"]
        assert records.issuers_of(conn, B.patient_id) == []
        assert records.view(conn, PatientKey("", A.patient_id), as_of=NOW) is None
        assert records.keys_of(conn, B) == (B,)
        assert (records.is_known(conn, A), records.is_known(conn, B)) == (True, False)
    assert values(store, A) == [1.0]


ALIKE = ["12", "0012", "12 ", " 12", "12a", "12A", "１２"]


@pytest.mark.requirement("F5")
def test_ids_that_look_alike_are_different_patients(store: Store) -> None:
    for number, patient_id in enumerate(ALIKE):
        say(store, PatientKey("SITE", patient_id), float(number))
    for number, patient_id in enumerate(ALIKE):
        assert values(store, PatientKey("SITE", patient_id)) == [float(number)]


@pytest.mark.requirement("F5")
@pytest.mark.parametrize(
    ("rules", "equal"),
    [
        (PatientIds(), []),
        (PatientIds(strip_leading_zeros=True), [("12", "0012")]),
        (PatientIds(upper_case=True), [("12a", "12A")]),
        (PatientIds(narrow_digits=True), [("12", "１２")]),
        (PatientIds(strip_leading_zeros=True, narrow_digits=True), [("12", "0012"), ("12", "１２"), ("0012", "１２")]),
    ],
    ids=["exact", "zeros", "case", "width", "zeros and width"],
)
def test_images_and_feeds_are_compared_as_the_site_says_and_no_further(rules: PatientIds, equal: list[tuple[str, str]]) -> None:
    config = Config(records=Records(patient_ids=rules))

    def of_feed(patient_id: str) -> PatientKey:
        key = PatientKey("SITE", patient_id)
        update = localized(config, RecordUpdate(Patient(key), merges=(Merge(key, key),)))
        assert update.merges[0] == Merge(update.patient.key, update.patient.key)
        return update.patient.key

    def of_image(patient_id: str) -> PatientKey:
        return identified(Header("1", "1.1", "1", "1.9", "1.8", Patient(PatientKey("SITE", patient_id))), config).patient.key

    for one in ALIKE:
        assert of_feed(one) == of_image(one)
        for other in ALIKE:
            wanted = one == other or (one, other) in equal or (other, one) in equal
            assert (of_feed(one) == of_image(other)) == wanted, (one, other)


# --- replays (F6)


def day() -> Iterator[tuple[str, RecordUpdate]]:
    """Control IDs and what was said: admission, results, a correction, a change of name, a merge, an order."""
    ada = Patient(A, "Test^Ada", "19700101", "F")
    yield "1", RecordUpdate(ada, source="ADT", at=NOW - 5 * HOUR)
    yield "2", RecordUpdate(Patient(A), (fact(1.0, key="k"), fact(4.0, key="")), "LAB", has_demographics=False, at=NOW - 4 * HOUR)
    yield "3", RecordUpdate(Patient(A), (fact(2.0, key="k", status="C"),), "LAB", has_demographics=False, at=NOW - 3 * HOUR)
    yield "4", RecordUpdate(replace(ada, name="Married^Ada"), source="ADT", at=NOW - 2 * HOUR)
    yield "5", RecordUpdate(Patient(B), source="ADT", merges=(Merge(B, A),), at=NOW - HOUR)
    yield "6", RecordUpdate(Patient(B), source="ADT", orders=(Order("ACC", "P1", "", STAT),), has_demographics=False, at=NOW - HOUR)


def rows(store: Store) -> dict[str, int]:
    with store.read() as conn:
        tables = [table for table in schema.metadata.sorted_tables if table.name != "message"]
        return {table.name: conn.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in tables}


@pytest.mark.requirement("F6")
def test_a_day_that_is_replayed_changes_nothing(store: Store) -> None:
    answered = study(store, A, uid="2.25.1")
    for _, update in day():
        apply(store, update, now=NOW)
    with store.begin() as conn:
        studies.note_record_seen(conn, answered, changed_at=NOW)
    before, counts = repr(view(store, A)), rows(store)
    for _, update in day():
        assert apply(store, update, now=NOW + HOUR) == 0
        assert repr(view(store, A)) == before
    assert rows(store) == counts
    assert marked(store) == {}, "a replay is no reason to make a report anew"


@pytest.mark.requirement("F6")
def test_a_message_with_a_known_control_id_is_not_applied_twice(store: Store) -> None:
    def receive(control_id: str, update: RecordUpdate) -> bool:
        with store.begin() as conn:
            number = feeds.note_message(
                conn, sender="LAB", control_id=control_id, sent_at="t", trigger="ORU^R01", result="applied", digest=control_id, now=NOW
            )
            if number is not None:
                records.apply(conn, update, now=NOW, message_id=number)
        return number is not None

    assert [receive(number, update) for number, update in day()] == [True] * 6
    assert [receive(number, update) for number, update in day()] == [False] * 6
    assert {one.message_id for one in view(store, A).observations} == {2, 3}


@pytest.mark.requirement("F6")
def test_an_older_change_of_demographics_that_comes_late_does_not_stand(store: Store) -> None:
    for hours, name, sex in ((2, "Married^Ada", ""), (5, "Test^Ada", "F"), (3, "Test^Adah", "")):
        apply(store, RecordUpdate(Patient(A, name, "19700101", sex), at=NOW - hours * HOUR))
    assert view(store, A).patient == Patient(A, "Married^Ada", "19700101", "F")
    apply(store, RecordUpdate(Patient(A, "Third^Ada"), at=NOW - HOUR))
    assert view(store, A).patient.name == "Third^Ada"


@pytest.mark.requirement("F6")
def test_a_value_that_is_said_again_after_another_stands(store: Store) -> None:
    """1, then 2, then 1 again: the third is no repetition of the first, and does not depend on when the second came."""
    said = [(1.0, NOW - 3 * HOUR), (2.0, NOW - 2 * HOUR), (1.0, NOW - HOUR)]
    for key, arrivals in ((A, said), (B, [said[0], said[2], said[1]])):
        for value, at in arrivals:
            apply(store, RecordUpdate(Patient(key), (fact(value, key="k"),), at=at))
        assert values(store, key) == [1.0]


def test_nobody_knew_a_patient_before_the_first_message(store: Store) -> None:
    """What a network is trained on must lack the record where the daemon would have lacked it."""
    apply(store, RecordUpdate(Patient(A), has_demographics=False), now=NOW)
    say(store, A, 1.0, now=NOW + HOUR)
    with store.read() as conn:
        assert records.view(conn, A, as_of=NOW, known_at=NOW - HOUR) is None
    assert values(store, A, known_at=NOW) == []
    assert values(store, A, known_at=NOW + HOUR) == [1.0]


def test_the_stamp_changes_with_a_merge_and_is_the_old_one_after_its_undoing(store: Store) -> None:
    say(store, A, 1.0)
    say(store, B, 2.0)
    first = view(store, A).stamp
    stamps = {first}
    for survivor, retired in ((B, A), (A, B)):
        say_merged(store, survivor=survivor, retired=retired)
        stamps.add(view(store, A).stamp)
    assert len(stamps) == 3
    undo(store, survivor=A, retired=B)
    undo(store, survivor=B, retired=A)
    with store.read() as conn:
        assert view(store, A).stamp == first == records.stamp_of(conn, A)


# --- upgrade


def migrate(url: str, revision: str) -> Store:
    store = Store(url)
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(worker.store.__file__).parent / "migrations"))
    with store.begin() as conn:
        config.attributes["connection"] = conn
        command.upgrade(config, revision)
    return store


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_first_releases_records_are_there_after_the_upgrade(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    old = migrate(url, "0001")
    at = "2026-03-01 12:00:00.000000" + ("" if kind == "sqlite" else "+00")
    with old.begin() as conn:
        conn.exec_driver_sql(
            "INSERT INTO patient (issuer, patient_id, name, birth_date, sex, source, updated_at) "
            f"VALUES ('SITE', 'A-1', 'Test^Ada', '19700101', 'F', 'ADT', '{at}')"
        )
        conn.exec_driver_sql(
            "INSERT INTO observation (patient_pk, code, scheme, meaning, at, value, unit, status, key, source, received_at) "
            f"SELECT id, '1988-5', 'LN', 'CRP', '{at}', 7.5, 'mg/L', 'F', 'k', 'LAB', '{at}' FROM patient"
        )
    old.close()
    store = migrate(url, "head")
    found = view(store, A)
    assert found.patient == Patient(A, "Test^Ada", "19700101", "F")
    assert [(one.value, one.kind, one.received_at, one.source) for one in found.observations] == [(7.5, "number", NOW, "LAB")]
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    assert view(store, B).patient.name == "Test^Ada"
    store.close()
