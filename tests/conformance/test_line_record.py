"""The join on the line, on both databases: whom a study waits for, who stops it, and what becomes of a report whose record changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import sqlalchemy as sa

from models.bundle import Bundle
from tests.conftest import Captured
from tests.installation import BUNDLES
from worker import pipeline, record_feeds, reissue
from worker.config import Config
from worker.domain import (
    ROUTINE,
    STAT,
    Code,
    Document,
    Header,
    ImageFacts,
    Job,
    Merge,
    Observation,
    Order,
    Patient,
    PatientKey,
    RecordUpdate,
)
from worker.errors import PatientConflict, RecordError, RecordIncomplete, RecordPending, ReportInvalid, Snooze
from worker.fingerprint import digest
from worker.infer import Model
from worker.intake import assembly
from worker.intake.hl7 import parse
from worker.joining import MUST_AGREE
from worker.report.result import report_uids
from worker.store import documents, history, measures, persons, queue, records, studies
from worker.store.database import Connection, Store
from worker.store.schema import message

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
STUDY_AT = NOW - timedelta(hours=1)
ADA = Patient(PatientKey("SITE", "A-1"), "Lovelace^Ada", "18151210", "F")
OLD = Patient(PatientKey("SITE", "A-0"), "Lovelace^Ada", "18151210", "F")
CRP, LDH = Code("1988-5", "LN", "C reactive protein"), Code("2532-0", "LN", "Lactate dehydrogenase")
NAME = "cxr-severity"


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.read(BUNDLES / NAME)


def line(store: Store, bundle: Bundle, *, now: datetime = NOW, must_agree: tuple[str, ...] = MUST_AGREE) -> pipeline.Line:
    model = cast("Model", SimpleNamespace(bundle=bundle, digest="b"))
    return cast("pipeline.Line", SimpleNamespace(store=store, models={NAME: model}, destinations={"pacs": ("sr",)}, clock=lambda: now,
                                                 instances=Path(), must_agree=must_agree, pull=None))  # fmt: skip


def needing(bundle: Bundle, **need: str) -> Bundle:
    """The same bundle that needs these values."""
    values = tuple(replace(one, need=need.get(one.name, "optional")) for one in bundle.record.values)  # type: ignore[arg-type]
    return replace(bundle, record=replace(bundle.record, values=values))


def receive(store: Store, patient: Patient = ADA, *, accession_number: str = "") -> int:
    """A complete study of one radiograph; returns its row."""
    header = Header("1.2.840.10008.5.1.4.1.1.1", "2.25.3", "1.2", "2.25.1", "2.25.2", patient, modality="CR",
                    facts=ImageFacts(body_part="CHEST"), accession_number=accession_number)  # fmt: skip
    with store.begin() as conn:
        studies.add_instance(conn, header, path=Path("a"), sha256="a", size_bytes=1, calling_ae="CT", address="", study_at=STUDY_AT,
                             quiet_s=1, now=NOW - timedelta(seconds=10))  # fmt: skip
    assembly.sweep(store, wants=[assembly.Wants(NAME, frozenset({"CR"}))], limit_s=100, now=NOW)
    with store.read() as conn:
        return studies.find(conn, "2.25.1")[0][0]


def tell(
    store: Store,
    patient: Patient = ADA,
    *facts: Observation,
    now: datetime = NOW,
    merges: Iterable[Merge] = (),
    orders: Iterable[Order] = (),
) -> None:
    with store.begin() as conn:
        records.apply(conn, RecordUpdate(patient, facts, merges=tuple(merges), orders=tuple(orders)), now=now)


def crp(value: float, *, hours: float = 2, key: str = "lab/1", status: str = "F") -> Observation:
    return Observation(CRP, STUDY_AT - timedelta(hours=hours), value, unit="mg/L", status=status, key=key, source="LAB")


def lease(store: Store, now: datetime = NOW) -> Job:
    with store.begin() as conn:
        (job,) = queue.lease(conn, "infer", owner="me", limit=9, lease_s=60, now=now)
    return job


def analyze(store: Store, bundle: Bundle, *, now: datetime = NOW) -> pipeline.Case:
    """Lease the due job, gather, and settle with a made-up report."""
    door = line(store, bundle, now=now)
    job = lease(store, now)
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(job)])
    if case.error is None:
        case = reported(case)
    return pipeline.settle(door, case)


def reported(case: pipeline.Case) -> pipeline.Case:
    """With a made-up report under the UID that the pipeline would derive."""
    before = case.predecessor.sop_instance_uid if case.predecessor else ""
    made_of = digest("b", case.inputs, [], "")
    uid = report_uids("2.25.1", bundle_sha256="b", input_sha256=made_of, predecessor_uid=before).sop_instance_uid
    return replace(case, report=Document(uid, "1.2.840.10008.5.1.4.1.1.88.34", "sr", b"report", before), input_sha256=made_of)


def names(store: Store, study_id: int) -> list[str]:
    with store.read() as conn:
        return [entry.name for entry in history.of_study(conn, study_id)]


def renew(store: Store, bundle: Bundle, *, now: datetime = NOW, is_wanted: bool = True, days: int = 30) -> int:
    return reissue.sweep(store, {NAME: bundle}, within=timedelta(days=days), is_wanted=is_wanted, now=now)


def filed(store: Store, study_id: int) -> list[tuple[str, str]]:
    """The UID of each report of a study and that of its predecessor, oldest first."""
    with store.read() as conn:
        return [(row.sop_instance_uid, row.predecessor_uid) for row, _ in documents.of_study(conn, study_id)]


def delivered(store: Store, study_id: int) -> int:
    with store.read() as conn:
        return sum(job.kind == "deliver" for job in queue.of_study(conn, study_id))


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


# --- waiting


@pytest.mark.requirement("F1")
def test_a_study_without_a_record_waits_the_stated_time_and_then_says_what_it_went_without(store: Store, bundle: Bundle) -> None:
    receive(store)
    first = analyze(store, bundle)
    assert isinstance(first.error, RecordPending)
    late = NOW + timedelta(seconds=bundle.record.wait_s + 1)
    second = analyze(store, bundle, now=late)
    assert second.error is None
    assert second.job.attempt == first.job.attempt == 1  # waiting burns none
    assert second.inputs is not None
    assert not second.inputs.record_found
    assert len(second.inputs.missing) == len(bundle.record.values)


@pytest.mark.requirement("F1")
@pytest.mark.parametrize("need", ["wanted", "required"])
def test_a_study_waits_for_the_value_that_is_needed_and_goes_when_it_comes(store: Store, bundle: Bundle, need: str) -> None:
    bundle = needing(bundle, crp=need)
    receive(store)
    tell(store)
    waiting = analyze(store, bundle)
    assert isinstance(waiting.error, Snooze)
    assert "C reactive protein" in str(waiting.error)
    tell(store, ADA, crp(7.0), now=NOW + timedelta(seconds=5))
    done = analyze(store, bundle, now=NOW + timedelta(seconds=6))
    assert done.error is None
    assert done.job.attempt == 1
    assert done.inputs is not None
    assert [value.value for value in done.inputs.values] == [7.0]


@pytest.mark.requirement("F1")
def test_without_what_is_required_there_is_no_answer_but_a_reason(store: Store, bundle: Bundle) -> None:
    receive(store)
    tell(store)
    late = NOW + timedelta(seconds=bundle.record.wait_s + 1)
    case = analyze(store, needing(bundle, crp="required", ldh="wanted"), now=late)
    assert isinstance(case.error, RecordIncomplete)
    assert "C reactive protein" in str(case.error)
    assert "Lactate" not in str(case.error)


@pytest.mark.requirement("F1")
def test_a_value_that_comes_while_the_study_is_looked_at_is_not_waited_for(store: Store, bundle: Bundle) -> None:
    bundle = needing(bundle, crp="required")
    receive(store)
    tell(store)
    door = line(store, bundle)
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(lease(store))])
    assert isinstance(case.error, Snooze)
    tell(store, ADA, crp(7.0), now=after(1))  # wakes nobody: the job is leased
    pipeline.settle(door, case)
    assert analyze(store, bundle, now=NOW).error is None


# --- the right patient or none


@pytest.mark.requirement("F2")
def test_an_id_that_two_issuers_know_stops_a_study_that_names_none(store: Store, bundle: Bundle) -> None:
    for issuer in ("SITE", "ELSEWHERE"):
        tell(store, replace(ADA, key=PatientKey(issuer, "A-1")))
    receive(store, replace(ADA, key=PatientKey("", "A-1")))
    case = analyze(store, bundle)
    assert isinstance(case.error, PatientConflict)
    assert "2 issuers" in str(case.error)


@pytest.mark.requirement("F2")
def test_the_same_id_of_another_issuer_is_nobody(store: Store, bundle: Bundle) -> None:
    tell(store, replace(ADA, key=PatientKey("ELSEWHERE", "A-1")), crp(9.0))
    receive(store)
    late = NOW + timedelta(seconds=bundle.record.wait_s + 1)
    case = analyze(store, bundle, now=late)
    assert case.inputs is not None
    assert (case.inputs.record_found, case.inputs.values) == (False, ())


@pytest.mark.requirement("F4")
@pytest.mark.parametrize(
    ("told", "word"), [({"birth_date": "19000101"}, "birth date"), ({"sex": "M"}, "sex"), ({"name": "Hopper^Grace"}, "name")]
)
def test_a_record_of_somebody_else_stops_the_study_unless_the_site_says_otherwise(
    store: Store, bundle: Bundle, told: dict[str, str], word: str
) -> None:
    receive(store)
    tell(store, replace(ADA, **told))  # type: ignore[arg-type]
    case = analyze(store, bundle)
    assert isinstance(case.error, PatientConflict)
    assert word in str(case.error).lower()
    with store.begin() as conn:
        queue.operator_retry(conn, 1, now=NOW)
    spared = line(store, bundle, must_agree=tuple({"birth_date", "sex", "name"} - set(told)))
    (again,) = pipeline.each(spared, pipeline.gather, [pipeline.Case(lease(store))])
    assert again.error is None


@pytest.mark.requirement("L11")
@pytest.mark.parametrize("told", [{"birth_date": "19000101"}, {"sex": "M"}, {"name": "Hopper^Grace"}])
@pytest.mark.parametrize("when", ["before", "while it is analysed"])
def test_where_images_and_record_differ_nothing_is_sent_and_it_is_said(
    store: Store, bundle: Bundle, captured: Captured, told: dict[str, str], when: str
) -> None:
    study_id, other = receive(store), replace(ADA, **told)  # type: ignore[arg-type]
    if when == "before":
        tell(store, other)
        analyze(store, bundle)
    else:
        tell(store)
        door = line(store, bundle)
        (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(lease(store))])
        tell(store, other, now=NOW + timedelta(seconds=1))
        pipeline.settle(door, reported(case))
    nothing_is_sent(store, study_id, captured, "differ")


@pytest.mark.requirement("L9")
@pytest.mark.requirement("L11")
@pytest.mark.parametrize("error", [ReportInvalid("The report breaks a rule."), PatientConflict("The report breaks a rule.")])
def test_a_report_that_may_not_be_sent_is_filed_nowhere_and_it_is_said(
    store: Store, bundle: Bundle, captured: Captured, error: Exception
) -> None:
    def refused(_line: pipeline.Line, _case: pipeline.Case) -> pipeline.Case:
        raise error

    study_id = receive(store)
    tell(store)
    door = line(store, bundle)
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(lease(store))])
    (case,) = pipeline.each(door, refused, [case])
    pipeline.settle(door, case)
    nothing_is_sent(store, study_id, captured, "breaks a rule")


def nothing_is_sent(store: Store, study_id: int, captured: Captured, reason: str) -> None:
    """No document, no delivery, a dead letter, and a line in the log with its reason."""
    assert filed(store, study_id) == []
    with store.read() as conn:
        assert measures.counts(conn) == {("infer", "discarded"): 1}
    (said,) = captured.named("job.discarded")
    assert reason in str(said["reason"])


OTHER_DAY = replace(ADA, birth_date="19000101")


@pytest.mark.requirement("F4")
def test_a_record_that_turns_out_to_be_of_somebody_else_stops_the_study_until_it_is_mended(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store)
    door = line(store, bundle)
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(lease(store))])
    tell(store, OTHER_DAY, now=after(1))
    pipeline.settle(door, reported(case))
    assert names(store, study_id)[-1] == "infer.discarded"
    assert filed(store, study_id) == []
    assert renew(store, bundle) == 0
    assert "infer.revived" not in names(store, study_id)
    tell(store, replace(ADA, name="Lovelace^Ada^King"), now=after(2))
    assert renew(store, bundle) == 0
    assert analyze(store, bundle, now=after(3)).error is None
    assert len(filed(store, study_id)) == 1


@pytest.mark.requirement("F4")
def test_a_delivered_report_whose_record_turns_out_to_be_of_somebody_else_is_flagged_once(
    store: Store, bundle: Bundle, captured: Captured
) -> None:
    study_id = receive(store)
    tell(store)
    analyze(store, bundle)
    for second in (1, 2):
        tell(store, OTHER_DAY, crp(float(second), hours=-1, key=f"lab/{second}"), now=after(second))
        assert renew(store, bundle) == 0
    assert names(store, study_id).count("report.outdated") == 1
    (said,) = captured.named("report.outdated")
    assert "birth dates" in str(said["cause"])


@pytest.mark.requirement("F4")
def test_results_that_name_another_person_than_their_patient_id_are_refused(store: Store) -> None:
    tell(store)
    said = parse(ORU, zone=UTC, issuers={"": "SITE"})
    with pytest.raises(RecordError, match="PID-7"):
        record_feeds.apply_message(Config(), store, said, ORU)
    with store.read() as conn:
        record = records.view(conn, ADA.key, as_of=NOW)
    assert record is not None
    assert record.observations == ()
    right = ORU.replace(b"19000101", b"18151210")
    assert record_feeds.apply_message(Config(), store, parse(right, zone=UTC, issuers={"": "SITE"}), right)


ORU = b"\r".join((
    rb"MSH|^~\&|LAB|H|S|H|20260301100000||ORU^R01^ORU_R01|1|P|2.5.1",
    b"PID|1||A-1^^^SITE||Lovelace^Ada||19000101|F",
    b"OBR|1||F1|X^Panel^LN|||20260301080000",
    b"OBX|1|NM|1988-5^CRP^LN||5|mg/L|||||F|||20260301080000",
))  # fmt: skip


SMITH = "Smith^John||19500101|M"
LOVELACE = "Lovelace^Ada||18151210|F"


def say(store: Store, trigger: str, person: str, *facts: str, control_id: str, patient_id: str = "A-1") -> None:
    """One HL7 message about A-1, through the door of the listener."""
    evn = ("EVN||20260301100000",) if trigger.startswith("ADT") else ()
    head = rf"MSH|^~\&|LAB|H|S|H|20260301100000||{trigger}|{control_id}|P|2.5.1"
    raw = "\r".join((head, *evn, f"PID|1||{patient_id}^^^SITE||{person}", *facts)).encode()
    record_feeds.apply_message(Config(), store, parse(raw, zone=UTC, issuers={"": "SITE"}), raw)


def result(value: float, filler: str, *, status: str = "F") -> tuple[str, str]:
    return (
        f"OBR|1||{filler}|X^Panel^LN|||20260301080000",
        f"OBX|1|NM|1988-5^CRP^LN||{value}|mg/L|||||{status}|||20260301080000",
    )


def used(case: pipeline.Case) -> list[float]:
    assert case.error is None
    assert case.inputs is not None
    return [value.value for value in case.inputs.values]


@pytest.mark.requirement("F4")
def test_what_came_in_another_persons_name_is_not_used_when_an_admission_says_who_it_is(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    say(store, "ORU^R01", SMITH, *result(300, "F1"), control_id="1")
    assert isinstance(analyze(store, bundle).error, PatientConflict)
    say(store, "ADT^A08", LOVELACE, control_id="2")
    renew(store, bundle)
    assert "infer.revived" in names(store, study_id)
    assert used(analyze(store, bundle)) == []
    say(store, "ORU^R01", LOVELACE, *result(5, "F2"), control_id="3")
    assert renew(store, bundle) == 1
    assert used(analyze(store, bundle)) == [5.0]
    with pytest.raises(RecordError, match="PID-7"):
        say(store, "ORU^R01", SMITH, *result(301, "F3"), control_id="4")


@pytest.mark.requirement("F4")
def test_a_withdrawal_in_another_persons_name_is_taken_and_nothing_else_of_it(store: Store, bundle: Bundle) -> None:
    receive(store)
    say(store, "ADT^A08", LOVELACE, control_id="1")
    say(store, "ORU^R01", LOVELACE, *result(300, "F1"), *result(5, "F2"), *result(6, "F3"), control_id="2")
    say(store, "ORU^R01", SMITH, *result(300, "F1", status="W"), control_id="3")
    assert used(analyze(store, bundle)) == [5.0]
    both = (*result(5, "F2", status="W"), *result(9, "F4"))
    for _ in range(2):
        with pytest.raises(RecordError, match="PID-7"):
            say(store, "ORU^R01", SMITH, *both, control_id="4")
    with pytest.raises(RecordError, match="PID-7"):
        say(store, "ORU^R01", SMITH, *result(5, "F9", status="W"), control_id="5")  # of nothing that stands
    assert renew(store, bundle) == 1
    assert used(analyze(store, bundle)) == [6.0]
    with store.read() as conn:
        found = records.view(conn, ADA.key, as_of=NOW)
    assert found is not None
    assert found.patient.name == "Lovelace^Ada"
    assert not found.told or {one.name for one in found.told} == {"Lovelace^Ada"}
    say(store, "ADT^A08", SMITH, control_id="6")
    say(store, "ORU^R01", SMITH, *both, control_id="4")  # once more, and now whole


@pytest.mark.requirement("F4")
@pytest.mark.parametrize("cure", ["admission", "laboratory"])
def test_without_admissions_results_of_two_persons_are_taken_and_the_study_stops_until_one_is_right(
    store: Store, bundle: Bundle, cure: str
) -> None:
    receive(store)
    say(store, "ORU^R01", SMITH, *result(300, "F1"), control_id="1")
    say(store, "ORU^R01", LOVELACE, *result(5, "F2"), control_id="2")
    stopped = analyze(store, bundle)
    assert isinstance(stopped.error, PatientConflict)
    assert str(stopped.error) == "The results under this patient ID name different persons."
    if cure == "admission":
        say(store, "ADT^A08", LOVELACE, control_id="3")
    else:
        say(store, "ORU^R01", SMITH, *result(300, "F1", status="W"), control_id="3")
    renew(store, bundle)
    assert used(analyze(store, bundle)) == [5.0]


def test_an_admission_that_is_applied_this_moment_counts_for_the_result_behind_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, waited = persons.locked, list[bool]()

    def late(conn: Connection, keys: Iterable[PatientKey], said: Mapping[str, object]) -> persons.Held:
        if not waited:
            waited.append(True)  # who held the lock said this, and has committed
            records.apply(conn, RecordUpdate(ADA, source="ADT"), now=NOW)
        return lock(conn, keys, said)

    monkeypatch.setattr(persons, "locked", late)
    with pytest.raises(RecordError, match="PID-7"):
        say(store, "ORU^R01", SMITH, *result(300, "F1"), control_id="1")


def test_a_refused_message_is_kept_with_what_its_envelope_says(store: Store) -> None:
    record_feeds.keep_refused(store, "It was wrong.", ORU)
    record_feeds.keep_refused(store, "It was no message.", b"x")
    with store.read() as conn:
        rows = conn.execute(sa.select(message.c.sender, message.c.control_id, message.c.trigger).order_by(message.c.id)).tuples().all()
    assert [tuple(row) for row in rows] == [("LAB|H", "1", "ORU^R01"), ("", "", "")]


def test_a_study_keeps_its_row_from_the_last_look_to_the_commit(postgres_url: str) -> None:
    """On PostgreSQL; SQLite has one writer at a time."""
    store = Store(postgres_url)
    store.migrate()
    study_id = receive(store)
    with store.begin() as conn, store.engine.connect() as other:
        studies.standing(conn, study_id)
        other.exec_driver_sql("SET lock_timeout = '100ms'")
        with pytest.raises(sa.exc.OperationalError):
            other.exec_driver_sql("UPDATE study SET version = version + 1")
    store.close()


# --- merges


def merged(survivor: Patient, retired: Patient) -> Merge:
    return Merge(survivor.key, retired.key)


@pytest.mark.requirement("F3")
def test_a_merge_before_the_analysis_joins_what_was_known_under_both_ids(store: Store, bundle: Bundle) -> None:
    tell(store, OLD, crp(5.0))
    tell(store, ADA, merges=[merged(ADA, OLD)])
    receive(store)
    case = analyze(store, bundle)
    assert case.inputs is not None
    assert [value.value for value in case.inputs.values] == [5.0]


@pytest.mark.requirement("F3")
def test_a_merge_during_the_analysis_is_seen_before_anything_is_filed(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, OLD, crp(5.0))
    tell(store)
    door, job = line(store, bundle), lease(store)
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(job)])
    assert case.inputs is not None
    assert case.inputs.values == ()
    tell(store, ADA, merges=[merged(ADA, OLD)])
    pipeline.settle(door, reported(case))
    assert "infer.snoozed" in names(store, study_id)
    again = analyze(store, bundle)
    assert again.inputs is not None
    assert [value.value for value in again.inputs.values] == [5.0]
    assert again.error is None


@pytest.mark.requirement("F3")
def test_a_merge_after_delivery_makes_a_new_report_and_undoing_it_another(store: Store, bundle: Bundle, captured: Captured) -> None:
    first, second, third = OLD, replace(OLD, key=PatientKey("SITE", "A-00")), ADA
    tell(store, first, crp(5.0))
    tell(store, second, crp(8.0, hours=1, key="lab/2"))
    tell(store, third)
    study_id = receive(store, third)
    assert analyze(store, bundle).error is None
    tell(store, second, merges=[merged(second, first)])
    assert renew(store, bundle) == 0  # a merge of others
    tell(store, third, merges=[merged(third, second)])
    assert renew(store, bundle) == 1
    chained = analyze(store, bundle)
    assert chained.inputs is not None
    assert [value.value for value in chained.inputs.values] == [8.0]
    assert renew(store, bundle) == 0  # looked at already
    with store.begin() as conn:
        (_, last) = records.merges_of(conn, ADA.key)
        assert records.unmerge(conn, last[0], reason="wrong person", now=NOW)
    assert renew(store, bundle) == 1
    parted = analyze(store, bundle)
    assert parted.inputs is not None
    assert parted.inputs.values == ()
    original, joined, again = filed(store, study_id)
    assert (joined[1], again[1]) == (original[0], joined[0])  # each names the one before it, the last too, whose input was there before
    assert delivered(store, study_id) == 3
    tell(store, third, crp(6.0, key="lab/3"))
    assert renew(store, bundle) == 1  # what the last report rests on is known
    assert names(store, study_id).count("report.outdated") == 3
    assert len(captured.named("report.outdated")) == 3


# --- orders


def test_an_urgent_order_moves_its_study_forward_before_and_after_it_comes(store: Store, bundle: Bundle) -> None:
    study_id = receive(store, accession_number="ACC1")

    def priority() -> int:
        with store.read() as conn:
            return int(queue.of_study(conn, study_id)[0].priority)

    assert priority() == ROUTINE
    tell(store, ADA, orders=(Order("ACC2", priority=STAT),))
    assert priority() == ROUTINE
    tell(store, ADA, orders=(Order("ACC1", priority=STAT),))
    assert priority() == STAT
    with store.read() as conn:
        assert records.priority_of(conn, ADA.key, "ACC1") == STAT
    tell(store, ADA, orders=(Order("ACC1", priority=STAT, is_cancelled=True),))
    with store.read() as conn:
        assert records.priority_of(conn, ADA.key, "ACC1") == ROUTINE
