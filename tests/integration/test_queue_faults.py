"""The queue and misfortune: leases that nobody renews any more, an analysis made twice, a second daemon."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from tests import accept, factories
from tests.conformance.test_store import NOW, complete_study
from tests.conftest import Captured
from tests.installation import BUNDLES, Installation, wait_until
from worker import importing, pipeline, roles
from worker.config import Config, Site
from worker.deliver.cstore import Peer
from worker.demo.pacs import forward
from worker.domain import ROUTINE, Job
from worker.imaging.decoding import DecoderPool
from worker.infer import Model
from worker.intake import assembly
from worker.store import measures, queue, schema
from worker.store.database import Connection, Store
from worker.store.spool import Spool

NAME = "cxr-severity"
#: What a report may differ in from one made of the same input at another time: worker/README.md, decision 8.
DECLARED = {"ContentDate", "ContentTime", "ContributionDateTime", "InstanceCreationDate", "InstanceCreationTime"}


# --- leases


class Faulty(Store):
    """A store that another thread than the one it was made in cannot write to, for no reason anybody foresaw."""

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction, or a fault of ours."""
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("JANE DOE")
        with super().begin() as conn:
            yield conn


@pytest.mark.requirement("Q4")
def test_a_worker_whose_heartbeat_dies_stops_after_the_work_in_hand_and_another_takes_over(tmp_path: Path, captured: Captured) -> None:
    store, stop = Faulty(f"sqlite:///{tmp_path / 'q.db'}"), threading.Event()
    store.migrate()
    study = complete_study(store)
    with store.begin() as conn:
        queue.enqueue_infer(conn, study, bundle="second", input_version=1, priority=ROUTINE, now=NOW)
    done: list[Job] = []

    def take() -> list[Job]:
        with store.begin() as conn:
            return queue.lease(conn, "infer", owner="me", limit=1, lease_s=30, now=NOW + timedelta(seconds=20))

    def do(jobs: list[Job]) -> None:
        assert stop.wait(60), "nobody told it to stop"
        done.extend(jobs)

    roles._work(store, stop, poll_s=0.01, lease_s=0.03, take=take, do=do)
    assert len(done) == 1
    (said,) = captured.named("heartbeat.died")
    assert (said["jobs"], said["reason"]) == ([done[0].id], "MemoryError")
    assert "JANE" not in str(said)
    later = NOW + timedelta(seconds=60)
    with store.begin() as conn:
        assert queue.rescue(conn, now=later) == [done[0].id]
        taken = queue.lease(conn, "infer", owner="another", limit=9, lease_s=30, now=later)
    assert taken
    store.close()


def test_a_heartbeat_that_only_misses_the_database_goes_on(tmp_path: Path, captured: Captured) -> None:
    store, stop = Store(f"sqlite:///{tmp_path / 'q.db'}"), threading.Event()
    store.migrate()
    complete_study(store)
    with store.begin() as conn:
        jobs = queue.lease(conn, "infer", owner="me", limit=1, lease_s=30, now=NOW + timedelta(seconds=20))
        conn.exec_driver_sql("ALTER TABLE job RENAME TO gone")

    def expires_at() -> datetime:
        with store.read() as conn:
            found = conn.execute(sa.select(schema.job.c.lease_expires_at)).scalar_one()
        assert isinstance(found, datetime)
        return found

    with roles.heartbeat(store, jobs, lease_s=0.03, stop=stop):
        assert not stop.wait(0.3)
        with store.begin() as conn:
            conn.exec_driver_sql("ALTER TABLE gone RENAME TO job")
        wait_until(lambda: expires_at().year > NOW.year or expires_at() > NOW + timedelta(seconds=50), timeout_s=60, what="a renewed lease")
    assert captured.named("heartbeat.died") == []
    store.close()


# --- again


def analyzed(folder: Path, files: list[Path], *, now: datetime, times: int = 1) -> list[bytes]:
    """The bytes of the report that a fresh installation makes of these files at that time, once or several times."""
    config = Config(site=Site(data=folder, issuer="MHH", timezone="+01:00"))
    store, spool = Store(f"sqlite:///{folder / 'r.db'}"), Spool(config.spool, low_water_bytes=0)
    store.migrate()
    assert importing.import_files(files, config=config, store=store, spool=spool).counts["refused"] == 0
    model, made = Model(BUNDLES / NAME), []
    assembly.sweep(store, wants=[assembly.Wants(NAME, frozenset())], limit_s=0, now=now)
    with DecoderPool(processes=1) as pool:
        pool.warm()
        for attempt in range(times):
            at = now + timedelta(minutes=attempt)
            line = pipeline.Line(
                store=store,
                models={NAME: model},
                decoders=pool,
                destinations={"pacs": ("sr",)},
                zone=timezone(timedelta(hours=1)),
                clock=repeat(at).__next__,
                instances=config.spool / "instances",
            )
            with store.begin() as conn:
                queue.rescue(conn, now=at)
                jobs = queue.lease(conn, "infer", owner="me", limit=9, lease_s=30, now=at)
            (case,) = pipeline.process(line, jobs) if attempt + 1 == times else unsettled(line, jobs)
            assert case.error is None, case.error
            assert case.report is not None
            made.append(case.report.data)
    store.close()
    return made


def unsettled(line: pipeline.Line, jobs: list[Job]) -> list[pipeline.Case]:
    """The line up to the verdict, before which its worker dies."""
    cases = pipeline.each(line, pipeline.gather, [pipeline.Case(job) for job in jobs])
    cases = pipeline.together(line, pipeline.each(line, pipeline.load, cases))
    return pipeline.each(line, pipeline.report, pipeline.each(line, pipeline.explain, cases))


def differing(one: Dataset, other: Dataset) -> set[str]:
    """The keywords of the elements in which two data sets differ, at any depth."""
    found: set[str] = set()
    for tag in {*one.keys(), *other.keys()}:
        first, second = one.get(tag), other.get(tag)
        if first == second:
            continue
        if first is None or second is None or first.VR != "SQ" or len(first.value) != len(second.value):
            found.add(one[tag].keyword if tag in one else other[tag].keyword)
        else:
            found = found.union(*(differing(a, b) for a, b in zip(first.value, second.value, strict=True)))
    return found


@pytest.mark.requirement("Q5")
def test_the_same_input_analyzed_again_makes_the_same_object_but_for_its_declared_times(tmp_path: Path, shared: Path) -> None:
    """Once by a worker that died before its verdict and by its successor; once by another installation, another day, in another order."""
    ((_, film),) = accept.cohort(shared, limit=1).items()
    record = shared / "data" / NAME / "hl7" / f"{film.parent.name}.hl7"
    at = datetime.now(UTC) + timedelta(hours=1)
    first, again = analyzed(tmp_path / "a", [film, record], now=at, times=2)
    assert first == again, "the job's first start is its time"
    (elsewhere,) = analyzed(tmp_path / "b", [record, film], now=at + timedelta(days=1, minutes=7))
    one, other = (dcmread(io.BytesIO(data)) for data in (first, elsewhere))
    assert differing(one, other) == DECLARED
    assert one.file_meta == other.file_meta
    assert (one.SOPInstanceUID, one.SeriesInstanceUID) == (other.SOPInstanceUID, other.SeriesInstanceUID)


# --- two daemons


@pytest.mark.requirement("Q11")
@pytest.mark.peer
@pytest.mark.timeout(300)
@pytest.mark.requirement("Q2")
def test_a_second_daemon_refuses_and_a_second_worker_shares(tmp_path: Path) -> None:
    """And where it sleeps longer than its lease, its verdict is turned away."""
    studies = 6
    with Installation(tmp_path / "worker", bundles=(NAME,), quiet_s=0.5, processes=1, extra="") as first:
        said = len(first.events())
        second = first.cli("all")
        assert second.returncode == 69
        assert "Is synoptic running already?" in " ".join(second.stderr.split())
        assert "Traceback" not in second.stderr + second.stdout
        assert first.process is not None
        assert first.process.poll() is None
        assert not [one for one in first.events()[said:] if one["event"] in ("role.restarted", "role.stopped")]

        log = tmp_path / "second.log"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SYNOPTIC_")} | {"SYNOPTIC_RUN__BATCH": "1"}
        command = [sys.executable, "-m", "worker", "run", "--config", str(first.config)]
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environ) as other:
            wait_until(lambda: '"role": "run"' in log.read_text("utf-8"), timeout_s=120, what="the second worker ready")
            paths = []
            for number in range(studies):
                ds = factories.make_radiograph(body_part="KNEE", seed=number)  # which is reported on at once: it cannot be analysed
                ds.StudyInstanceUID, ds.SOPInstanceUID = generate_uid(), generate_uid()
                factories.write(ds, tmp_path / f"{number}.dcm")
                paths.append(tmp_path / f"{number}.dcm")
            assert set(forward(paths, peer=Peer("worker", "WORKER", "127.0.0.1", first.port, "MODALITY")).statuses) == {0}
            store = first.store

            def reports() -> int:
                with store.read() as conn:
                    return int(conn.execute(sa.select(sa.func.count()).select_from(schema.document)).scalar_one())

            wait_until(lambda: reports() == studies, timeout_s=120, what=f"{studies} reports")
            first.wait_idle()
            with store.read() as conn:
                counts = measures.counts(conn)
                attempts = set(conn.scalars(sa.select(schema.job.c.attempt)))
            assert (counts, attempts, reports()) == ({("infer", "completed"): studies}, {1}, studies)
            done = [one.read_text("utf-8").count('"event": "job.completed"') for one in (first.log, log)]
            print({"done by the first and the second worker": done})
            assert sum(done) == studies
            fenced = _sleeps_with_a_job(first, log, tmp_path)
            with store.read() as conn:
                assert measures.counts(conn).keys() == {("infer", "completed")}
                assert conn.scalars(sa.select(schema.job.c.attempt).where(schema.job.c.id == fenced)).all() == [2]
                total = conn.scalars(sa.select(sa.func.count()).select_from(schema.job)).one()
            assert reports() == total
            other.terminate()
            assert other.wait(60) == 0
        store.close()


def _sleeps_with_a_job(first: Installation, log: Path, folder: Path) -> int:
    """The other worker is stopped with a job in hand and wakes when the first has done it; returns the job."""
    (run,) = [one["pid"] for one in first.events("role.started") if one["role"] == "run"]
    (other,) = [one["pid"] for line in log.read_text("utf-8").splitlines() if (one := json.loads(line)).get("role") == "run"]
    store = first.store
    leased = sa.select(schema.job.c.id).where(schema.job.c.state == "leased", schema.job.c.lease_owner.endswith(f"/{other}"))

    def held() -> int | None:
        with store.read() as conn:
            return conn.scalar(leased)

    def is_done(before: int) -> bool:
        return log.read_text("utf-8").count('"event": "job.completed"') > before

    def is_taken(before: int) -> bool:
        return held() is not None or is_done(before)

    os.kill(run, signal.SIGSTOP)  # so that it is the other who takes the job
    try:
        for number in range(100, 150):  # a job takes some 50 ms: it may be done before it is seen
            ds = factories.make_radiograph(body_part="KNEE", seed=number)
            ds.StudyInstanceUID, ds.SOPInstanceUID = generate_uid(), generate_uid()
            path = folder / f"{number}.dcm"
            factories.write(ds, path)
            before = log.read_text("utf-8").count('"event": "job.completed"')
            assert set(forward([path], peer=Peer("worker", "WORKER", "127.0.0.1", first.port, "MODALITY")).statuses) == {0}
            wait_until(partial(is_taken, before), timeout_s=60, what="the job taken", step_s=0.002)
            os.kill(other, signal.SIGSTOP)
            if (job := held()) is not None and _is_free(store):
                break
            os.kill(other, signal.SIGCONT)
            wait_until(partial(is_done, before), timeout_s=60, what="the job done")
        assert job is not None, "the other worker was never stopped with a job in hand"
        os.kill(run, signal.SIGCONT)
        first.wait_for_event("job.rescued", timeout_s=60)
        first.wait_idle()
    finally:
        store.close()
        for pid in (run, other):
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: '"event": "job.fenced"' in log.read_text("utf-8"), timeout_s=60, what="the late verdict turned away")
    return job


def _is_free(store: Store) -> bool:
    """Whether nobody was stopped in a transaction: on SQLite that stops all who write."""
    with closing(sqlite3.connect(store.url.database or "", timeout=0.2, isolation_level=None)) as conn:
        try:
            conn.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        conn.execute("ROLLBACK")
        return True
