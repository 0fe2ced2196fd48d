"""Whatever workers, operators and clocks do: no job is held twice at once, none is lost, none tried beyond its limit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from worker.domain import ROUTINE, Header, Job, Patient, PatientKey
from worker.errors import PeerRefused, PeerUnavailable
from worker.store import queue, schema, studies
from worker.store.database import Store

LEASE_S = 30.0
START = datetime(2026, 1, 1, tzinfo=UTC)


class Queue(RuleBasedStateMachine):
    """Workers that are slow, quick, dead or asleep, on one queue and a hand-wound clock."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="queue-machine-")
        self.store = Store(f"sqlite:///{self.folder.name}/q.db")
        self.now = START
        self.held: dict[int, Job] = {}  # what each worker believes to hold, newest first
        self.stale: list[Job] = []
        self.enqueued = 0
        self.finished: dict[int, str] = {}

    @initialize()
    def a_study(self) -> None:
        self.store.migrate()
        header = Header("1", "1.1", "1", "1.9", "1.9.1", Patient(PatientKey("S", "P")))
        with self.store.begin() as conn:
            studies.add_instance(
                conn, header, path=Path("/x"), sha256="a", size_bytes=1, calling_ae="A", address="", study_at=START, quiet_s=1, now=START
            )

    @rule(version=st.integers(1, 6))
    def enqueue(self, version: int) -> None:
        with self.store.begin() as conn:
            added = queue.enqueue_infer(conn, 1, bundle="b", input_version=version, priority=ROUTINE, now=self.now)
        self.enqueued += added is not None

    @rule(limit=st.integers(1, 3))
    def lease(self, limit: int) -> None:
        with self.store.begin() as conn:
            jobs = queue.lease(conn, "infer", owner="w", limit=limit, lease_s=LEASE_S, now=self.now)
        for job in jobs:
            if job.id in self.held:
                # Only a job whose lease had run out and was rescued may be leased again.
                assert job.lease.generation > self.held[job.id].lease.generation
                self.stale.append(self.held[job.id])
            self.held[job.id] = job
            assert job.attempt <= queue.INFER_ATTEMPTS

    @rule(seconds=st.sampled_from([1.0, 20.0, 31.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def rescue(self) -> None:
        with self.store.begin() as conn:
            rescued = queue.rescue(conn, now=self.now)
        for job_id in rescued:
            assert self.held[job_id].lease.expires_at < self.now
            self.stale.append(self.held.pop(job_id))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), verdict=st.sampled_from(["complete", "discard", "retry", "snooze"]))
    def settle(self, data: st.DataObject, verdict: str) -> None:
        job = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        if self._verdict(job, verdict):
            with self.store.read() as conn:
                self.finished[job.id] = conn.execute(sa.select(schema.job.c.state).where(schema.job.c.id == job.id)).scalar_one()

    @precondition(lambda self: self.stale)
    @rule(data=st.data(), verdict=st.sampled_from(["complete", "discard", "retry", "snooze"]))
    def a_late_owner_wakes(self, data: st.DataObject, verdict: str) -> None:
        job = data.draw(st.sampled_from(self.stale))
        assert not self._verdict(job, verdict), "a verdict of a lost lease was taken"

    def _verdict(self, job: Job, verdict: str) -> bool:
        acts: dict[str, Callable[[sa.Connection], object]] = {
            "complete": lambda conn: queue.complete(conn, job, now=self.now),
            "discard": lambda conn: queue.discard(conn, job, error=PeerRefused("no"), now=self.now),
            "retry": lambda conn: queue.retry(conn, job, error=PeerUnavailable("away"), now=self.now),
            "snooze": lambda conn: queue.snooze(conn, job, delay_s=5, reason="wait", now=self.now),
        }
        try:
            with self.store.begin() as conn:
                acts[verdict](conn)
        except queue.LeaseLost:
            return False
        return True

    @invariant()
    def nothing_is_lost_and_what_is_held_is_leased(self) -> None:
        if not self.enqueued:
            return
        with self.store.read() as conn:
            states = dict(conn.execute(sa.select(schema.job.c.id, schema.job.c.state)).tuples().all())
        assert len(states) == self.enqueued
        assert {job_id for job_id, state in states.items() if state == "leased"} == set(self.held)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


Queue.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestQueue = Queue.TestCase
