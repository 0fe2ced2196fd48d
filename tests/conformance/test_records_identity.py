"""Who is who, and what a repetition changes, on SQLite and on PostgreSQL: identities, replays, the upgrade from the first release."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig

import worker.store
from tests.conformance.test_records import CRP, HOUR, NOW, A, B, C, apply, fact, marked, say, say_merged, study, undo, values, view
from worker.config import Config, PatientIds, Records
from worker.domain import STAT, Code, Header, Merge, Observation, Order, Patient, PatientKey, RecordUpdate
from worker.record_feeds import identified, localized
from worker.store import feeds, records, schema, studies
from worker.store.database import Store

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
        studies.note_record_seen(conn, answered, changed_at=NOW, version=1)
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


@pytest.mark.requirement("F6")
def test_a_fact_that_tells_its_own_time_is_compared_by_it(store: Store) -> None:
    """A bundle's time is that of its newest resource."""
    for value, said_at in ((1.0, NOW - HOUR), (2.0, NOW - 2 * HOUR)):
        apply(store, RecordUpdate(Patient(A), (replace(fact(value, key="k"), said_at=said_at),), at=NOW))
    assert values(store, A) == [1.0]


@pytest.mark.requirement("F2")
@pytest.mark.requirement("F6")
def test_what_fhir_says_without_a_time_was_said_when_it_came_and_not_when_an_address_changed(store: Store) -> None:
    told = RecordUpdate(Patient(A), (fact(1.0, key="k"),), "FHIR", orders=(Order("ACC-1", "PL-1"),), at=NOW - HOUR, is_at_of_all=False)
    assert apply(store, told) == 1
    assert apply(store, replace(told, at=NOW), now=NOW + HOUR) == 0  # a new address is no news of the result
    (found,) = view(store, A).observations
    assert (found.said_at, found.received_at) == (None, NOW)
    with store.read() as conn:
        assert list(conn.scalars(sa.select(schema.imaging_order.c.said_at))) == [None]
    later = replace(told, orders=(replace(told.orders[0], said_at=NOW - HOUR, is_cancelled=True),))
    apply(store, later, now=NOW + HOUR)
    with store.read() as conn:
        assert list(conn.scalars(sa.select(schema.imaging_order.c.said_at))) == [None, NOW - HOUR]


@pytest.mark.requirement("F2")
def test_sources_that_share_a_key_keep_their_facts(store: Store) -> None:
    apply(store, RecordUpdate(Patient(A), (fact(1.0, key="k"),), "ONE"))
    apply(store, RecordUpdate(Patient(A), (fact(3.0, key="k/1"), fact(3.0, key="k", status="D")), "TWO"))
    assert values(store, A) == [1.0, 3.0]


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    ("status", "kept"), [("C", [("718-7", "C")]), ("F", [("718-7", "F")]), ("W", [("718-7", "W")]), ("P", [("1988-5", "F")])]
)
def test_a_result_that_was_filed_under_a_wrong_code_does_not_stand_beside_the_right_one(
    store: Store, status: str, kept: list[tuple[str, str]]
) -> None:
    other = replace(fact(2.0, key="k", status=status), code=Code("718-7", "LN", "Hb"))
    apply(store, RecordUpdate(Patient(A), (fact(1.0, key="k"),), at=NOW - HOUR))
    apply(store, RecordUpdate(Patient(A), (other,), at=NOW))
    assert [(one.code.value, one.status) for one in view(store, A).observations] == kept
    with store.read() as conn:
        narrow = records.view(conn, A, as_of=NOW, codes=[("1988-5", "LN")])
    assert narrow is not None
    assert [one.code.value for one in narrow.observations] == [code for code, _ in kept if code == "1988-5"]


@pytest.mark.requirement("F10")
def test_a_withdrawal_takes_back_the_repeats_that_were_said_before_it(store: Store) -> None:
    """A laboratory that withdraws one of two results under one key does not say which; what it says beside the withdrawal stands."""
    apply(store, RecordUpdate(Patient(A), (fact(1.0, key="k"), fact(2.0, key="k#1"), fact(3.0, key="k#2")), at=NOW - HOUR))
    assert values(store, A) == [1.0, 2.0, 3.0]
    apply(store, RecordUpdate(Patient(A), (fact(1.0, key="k", status="W"), fact(4.0, key="k#1")), at=NOW))
    assert [(one.value, one.status) for one in view(store, A).observations] == [(1.0, "W"), (4.0, "F")]


@pytest.mark.requirement("F2")
def test_who_somebody_is_in_passing_counts_until_an_admission_says_so(store: Store) -> None:
    with store.read() as conn:
        assert records.person(conn, A) is None
    for name, is_admission in (("Lab^Ada", False), ("Test^Ada", True), ("Other^Eva", False)):
        apply(store, RecordUpdate(Patient(A, name), has_demographics=is_admission, at=NOW))
        with store.read() as conn:
            found = records.person(conn, A)
        assert found == Patient(A, name if name != "Other^Eva" else "Test^Ada")
    say_merged(store, survivor=B, retired=A)
    apply(store, RecordUpdate(Patient(B, "Lab^Bea"), has_demographics=False))
    with store.read() as conn:
        assert records.person(conn, B) == Patient(B, "Test^Ada")


@pytest.mark.requirement("F6")
def test_two_messages_that_come_together_are_applied_one_after_the_other(store: Store) -> None:
    update = RecordUpdate(Patient(B), (fact(1.0, key=""),), "LAB", merges=(Merge(B, A),), at=NOW)
    for key in (A, B):
        apply(store, RecordUpdate(Patient(key)))
    with ThreadPoolExecutor(1) as pool:
        with store.begin() as conn:
            records.apply(conn, update, now=NOW)
            second = pool.submit(apply, store, update)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
        assert second.result(timeout=20) == 0
    assert (rows(store)["observation"], rows(store)["merge"]) == (1, 1)


@pytest.mark.requirement("F6")
def test_messages_under_two_keys_of_one_person_do_not_wait_for_each_other_for_ever(store: Store) -> None:
    say_merged(store, survivor=B, retired=A)

    def feed(key: PatientKey) -> int:
        return sum(say(store, key, float(n)) for n in range(15))

    with ThreadPoolExecutor(2) as pool:
        assert [told.result(timeout=40) for told in [pool.submit(feed, key) for key in (B, A)]] == [15, 15]
    assert len(values(store, A)) == 15, "two keys name one result of one source"


@pytest.mark.requirement("F6")
def test_a_person_who_grows_while_a_message_waits_is_locked_whole(store: Store) -> None:
    for key in (A, B, C):
        say(store, key, 1.0)

    def free() -> list[int]:
        with store.begin() as conn:
            records.apply(conn, RecordUpdate(Patient(C), (fact(2.0),), at=NOW), now=NOW)
            with store.read() as other:
                return list(other.scalars(sa.select(schema.patient.c.id).order_by(schema.patient.c.id).with_for_update(skip_locked=True)))

    with ThreadPoolExecutor(1) as pool:
        with store.begin() as conn:
            records.apply(conn, RecordUpdate(Patient(A), merges=(Merge(A, C),), at=NOW), now=NOW)
            waiting = pool.submit(free)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        assert waiting.result(timeout=20) == ([1, 2, 3] if store.is_sqlite else [2]), "SQLite has one writer"


@pytest.mark.requirement("F2")
def test_a_fact_tells_whom_its_own_message_named(store: Store) -> None:
    for number, (patient, is_admission) in enumerate(
        ((Patient(A, "Lab^Ada", "19700101"), False), (Patient(A, "Test^Ada", "", "F"), True), (Patient(A), False))
    ):
        apply(store, RecordUpdate(patient, (fact(float(number)),), "LAB", has_demographics=is_admission))
    say_merged(store, survivor=B, retired=A)
    assert [one.told for one in view(store, B).observations] == [Patient(A, "Lab^Ada", "19700101"), None, None]
    again = RecordUpdate(Patient(A, "Other^Eva"), (fact(0.0),), "LAB", has_demographics=False)
    assert apply(store, again) == 0, "who it is said of is no part of what is said"


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
        conn.exec_driver_sql(
            "INSERT INTO observation (patient_pk, code, at, text, key, source, received_at) "
            f"SELECT id, '1', '{at}', 'Words.', 't', 'LAB', '{at}' FROM patient"
        )
    old.close()
    store = migrate(url, "head")
    found = view(store, A)
    assert found.patient == Patient(A, "Test^Ada", "19700101", "F")
    assert [(one.value, one.kind, one.received_at, one.source) for one in found.observations] == [
        (7.5, "number", NOW, "LAB"),
        (None, "text", NOW, "LAB"),
    ]
    told = RecordUpdate(Patient(A), (Observation(CRP, NOW, 7.5, unit="mg/L", key="k"),), "LAB", at=NOW - HOUR)
    assert apply(store, told, now=NOW + HOUR) == 0, "what the first release kept without its time is known"
    assert apply(store, replace(told, at=NOW + HOUR), now=NOW + HOUR) == 1, "what was said after that came is news"
    say_merged(store, survivor=B, retired=A, now=NOW + HOUR)
    assert view(store, B).patient.name == "Test^Ada"
    store.close()
