"""What becomes of a report whose record changes, on both databases: a new one, a line in the history, or nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from models.bundle import Bundle
from tests import reports
from tests.conformance.test_line_record import (
    ADA,
    NAME,
    NOW,
    after,
    analyze,
    bundle,
    crp,
    delivered,
    filed,
    lease,
    line,
    names,
    receive,
    renew,
    reported,
    tell,
)  # fmt: skip
from tests.conftest import Captured
from tests.reports import ALGORITHM
from worker import pipeline, record_view
from worker.domain import ROUTINE, Observation, RecordUpdate
from worker.errors import NoSuitableSeries, StoredFileLost
from worker.fingerprint import digest
from worker.store import history, queue, records, studies
from worker.store.database import Store
from worker.store.schema import document, instance, study

__all__ = ["bundle"]  # a fixture


def test_a_corrected_value_makes_a_new_report_and_one_of_after_the_study_does_not(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    tell(store, ADA, crp(99.0, hours=-3, key="lab/after"))
    assert renew(store, bundle) == 0
    tell(store, ADA, crp(50.0, status="C"))
    assert renew(store, bundle) == 1
    case = analyze(store, bundle)
    assert case.inputs is not None
    assert [value.value for value in case.inputs.values] == [50.0]
    assert case.job.input_version == 2
    tell(store, ADA, crp(50.0, status="C"))  # said again
    assert renew(store, bundle) == 0
    assert names(store, study_id).count("study.renewed") == 1


@pytest.mark.parametrize(("is_wanted", "days"), [(False, 30), (True, 0)])
def test_by_policy_or_after_its_time_a_changed_record_is_only_noted(store: Store, bundle: Bundle, is_wanted: bool, days: int) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    tell(store, ADA, crp(50.0, status="C"))
    assert renew(store, bundle, is_wanted=is_wanted, days=days, now=NOW + timedelta(hours=1)) == 0
    assert names(store, study_id).count("report.outdated") == 1
    with store.read() as conn:
        assert studies.standing(conn, study_id) == ("", 1)


def test_a_change_while_a_job_runs_is_looked_at_when_it_has_ended(store: Store, bundle: Bundle) -> None:
    receive(store)
    tell(store, ADA, crp(5.0))
    door, job = line(store, bundle), lease(store)
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(job)])
    tell(store, ADA, crp(50.0, status="C"))
    assert renew(store, bundle) == 0
    pipeline.settle(door, reported(case))
    assert renew(store, bundle) == 1


def test_a_new_version_with_the_same_input_files_nothing_and_a_later_correction_is_still_seen(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    with store.begin() as conn:
        version = studies.new_version(conn, study_id, now=NOW, cause="another bundle's input")
        queue.enqueue_infer(conn, study_id, bundle=NAME, input_version=version, priority=ROUTINE, now=NOW)
    analyze(store, bundle)
    assert (len(filed(store, study_id)), delivered(store, study_id)) == (1, 1)
    with store.read() as conn:
        assert history.of_study(conn, study_id)[-1].facts["is_repeated"]
    tell(store, ADA, crp(50.0, status="C"), now=after(1))
    assert renew(store, bundle) == 1
    analyze(store, bundle)
    assert len(filed(store, study_id)) == 2


def test_the_network_is_spared_what_it_answered_already(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    door = line(store, bundle)
    (first,) = pipeline.each(door, pipeline.gather, [pipeline.Case(lease(store))])
    assert first.inputs is not None
    instances = [(i.sop_instance_uid, i.sha256) for one in first.inputs.series.values() for i in one.instances]
    pipeline.settle(door, replace(reported(first), input_sha256=digest("b", first.inputs, instances, "")))

    def again(*, meanwhile: Observation | None = None) -> pipeline.Case:
        with store.begin() as conn:
            version = studies.new_version(conn, study_id, now=NOW, cause="another bundle's input")
            queue.enqueue_infer(conn, study_id, bundle=NAME, input_version=version, priority=ROUTINE, now=NOW)
        # The line's model has no network to run: a stage that is not passed by is an error.
        job = lease(store)
        (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(job)])
        if meanwhile:
            tell(store, ADA, meanwhile)
            with store.begin() as conn:
                conn.execute(sa.update(document).values(input_sha256="another"))
        for stage in (pipeline.load, pipeline.explain, pipeline.report):
            (case,) = pipeline.each(door, stage, [case])
        return pipeline.settle(door, case)

    case = again()
    assert (case.error, case.prepared, case.report, case.is_repeated) == (None, None, None, True)
    with store.read() as conn:
        assert history.of_study(conn, study_id)[-1].facts["is_repeated"]
    assert (len(filed(store, study_id)), delivered(store, study_id)) == (1, 1)
    again(meanwhile=crp(6.0, hours=1, key="lab/2"))
    assert names(store, study_id)[-1] == "infer.snoozed"
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(lease(store))])
    assert not case.is_repeated


def test_a_report_that_is_not_renewed_is_outdated_once_for_each_change(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    tell(store, ADA, crp(50.0, status="C"), now=after(1))
    for second in (2, 3):
        tell(store, ADA, crp(9.0, hours=-1, key=f"lab/after{second}"), now=after(second))
        renew(store, bundle, is_wanted=False)
    assert names(store, study_id).count("report.outdated") == 1
    tell(store, ADA, crp(51.0, hours=1, key="lab/new"), now=after(4))
    renew(store, bundle, is_wanted=False)
    assert names(store, study_id).count("report.outdated") == 2


def test_of_an_old_study_that_was_noted_only_a_conflict_is_still_said(store: Store, bundle: Bundle, captured: Captured) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    tell(store, ADA, crp(50.0, status="C"), now=after(1))
    late = NOW + timedelta(hours=1)
    renew(store, bundle, days=0, now=late)
    tell(store, ADA, crp(60.0, status="C"), now=after(2))
    renew(store, bundle, days=0, now=late)
    assert names(store, study_id).count("report.outdated") == 1
    for second in (3, 4):
        tell(store, replace(ADA, birth_date="19990101"), crp(1.0, key=f"lab/{second}"), now=after(second))
        renew(store, bundle, days=0, now=late)
    assert names(store, study_id).count("report.outdated") == 2
    assert "birth dates" in str(captured.named("report.outdated")[-1]["cause"])


def test_a_conflict_that_is_gone_is_cleared_and_the_next_one_is_said_again(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    for second in (1, 5):
        tell(store, replace(ADA, birth_date=f"1999010{second}"), now=after(second))
        renew(store, bundle)
        tell(store, replace(ADA, name=f"Lovelace^Ada^{second}"), now=after(second + 1))
        renew(store, bundle)
        tell(store, replace(ADA, name=f"Lovelace^Ada^{second}"), crp(9.0, hours=-1, key=f"late/{second}"), now=after(second + 2))
        renew(store, bundle)
    said = [name for name in names(store, study_id) if name.startswith("report.")]
    assert said == ["report.outdated", "report.cleared"] * 2


def test_a_study_that_kills_its_worker_is_not_revived_by_messages(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, replace(ADA, birth_date="19990101"))
    analyze(store, bundle)
    tell(store, ADA, now=after(1))
    renew(store, bundle)
    for attempt in range(queue.INFER_ATTEMPTS):
        then = after(300 * (attempt + 1))
        lease(store, then)
        with store.begin() as conn:
            queue.rescue(conn, now=then + timedelta(seconds=240))
    tell(store, ADA, crp(1.0, key="lab/9"), now=after(3000))
    renew(store, bundle, now=after(3001))
    with store.read() as conn:
        assert [job.state for job in queue.of_study(conn, study_id)] == ["discarded"]
    assert names(store, study_id).count("infer.revived") == 1


def test_what_one_study_breaks_harms_no_other_and_is_tried_again(
    store: Store, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, captured: Captured
) -> None:
    receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    tell(store, ADA, crp(50.0, status="C"), now=after(1))
    with monkeypatch.context() as broken:
        broken.setattr(records, "view", None)
        assert renew(store, bundle) == 0
    assert [one["reason"] for one in captured.named("sweep.failed")] == ["TypeError"]
    assert renew(store, bundle) == 1


def test_a_study_that_is_opened_again_stays_marked_until_it_is_complete(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    tell(store, ADA, crp(50.0, status="C"), now=after(1))
    with store.begin() as conn:
        conn.execute(sa.update(study).values(state="receiving"))
    assert renew(store, bundle) == 0
    with store.read() as conn:
        assert studies.record_changed_at(conn, study_id) == after(1)
    with store.begin() as conn:
        conn.execute(sa.update(study).values(state="complete"))
    assert renew(store, bundle) == 1


def test_a_report_of_which_it_is_not_known_what_it_rests_on_is_left_alone(store: Store, bundle: Bundle) -> None:
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    with store.begin() as conn:
        conn.execute(sa.update(document).values(record_sha256=None))
    tell(store, ADA, crp(50.0, status="C"), now=after(1))
    assert renew(store, bundle) == 0
    assert "report.outdated" not in names(store, study_id)


def test_the_report_on_an_input_that_was_there_before_another_is_a_new_object_and_made_again_the_same(tmp_path: Path) -> None:
    source = reports.radiograph(tmp_path)
    first = reports.report([source]).document
    second = reports.report([source], algorithm=replace(ALGORITHM, input_sha256="00" * 32), predecessor=first).document
    third = reports.report([source], predecessor=second).document
    assert third.sop_instance_uid not in {first.sop_instance_uid, second.sop_instance_uid}
    assert third.predecessor_uid == second.sop_instance_uid
    assert reports.report([source], predecessor=second).document == third


def test_a_fact_in_another_persons_name_is_shown_as_unusable_with_that_reason(store: Store) -> None:
    with store.begin() as conn:
        wrong = replace(ADA, name="Smith^John", birth_date="19500101", sex="M")
        records.apply(conn, RecordUpdate(wrong, (crp(300.0),), "LAB", has_demographics=False), now=NOW)
        records.apply(conn, RecordUpdate(ADA, (), "HIS", at=NOW), now=NOW)
    with store.read() as conn:
        facts = record_view.gather_patient(conn, ADA.key, as_of=NOW, known_at=None, is_full=True)
    assert facts is not None
    assert facts["facts"] == []
    assert [one["because"] for one in facts["unusable"]] == ["came in another person's name"]


@pytest.mark.requirement("S5")
def test_a_record_that_changes_when_the_images_are_gone_is_only_noted(store: Store, bundle: Bundle) -> None:
    """Under [retention]: nothing could be made anew, and a dead letter for each corrected value would help nobody."""
    study_id = receive(store)
    tell(store, ADA, crp(5.0))
    analyze(store, bundle)
    with store.begin() as conn:
        conn.execute(sa.update(instance).values(removed_at=NOW))
    tell(store, ADA, crp(50.0, status="C"))
    assert renew(store, bundle, now=NOW + timedelta(hours=1)) == 0
    assert names(store, study_id).count("report.outdated") == 1


@pytest.mark.requirement("S5")
@pytest.mark.parametrize("stage", [pipeline.load, pipeline.report])
def test_an_analysis_of_images_that_are_gone_says_what_to_do(store: Store, bundle: Bundle, stage: pipeline.Stage) -> None:
    """A late series after [retention]: a dead letter in words, never a report that blames the images."""
    receive(store)
    tell(store, ADA, crp(5.0))
    with store.begin() as conn:
        conn.execute(sa.update(instance).values(removed_at=NOW))
    door = line(store, bundle)
    cases = pipeline.each(door, pipeline.gather, [pipeline.Case(lease(store))])
    if stage is pipeline.report:
        cases = [replace(case, error=NoSuitableSeries("None fits.")) for case in cases]
    (case,) = pipeline.each(door, stage, cases)
    assert isinstance(case.error, StoredFileLost)
    assert "images were removed under [retention]" in str(case.error)
