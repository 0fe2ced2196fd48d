"""L1, L10, L12: a PACS is down, a thousand reports wait, and it is left alone; when it is back all are delivered, once."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.conftest import Captured
from tests.installation import wait_until
from tests.integration.test_cstore import make_document
from worker import roles
from worker.config import Config, Deliver, Destination
from worker.deliver import breaker
from worker.domain import Header, Job, Patient, PatientKey
from worker.intake import assembly
from worker.store import documents, measures, queue, studies
from worker.store.database import Store

REPORTS, OTHERS = 1000, 50
NOW = datetime.now(UTC) - timedelta(minutes=1)


@contextlib.contextmanager
def dead(port: int) -> Iterator[list[float]]:
    """A PACS whose port accepts and closes; yields its connections so far."""
    calls: list[float] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()
                calls.append(0.0)

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield calls
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def leased(store: Store) -> Job:
    """The analysis of a study that is complete."""
    header = Header("1.2", "2.25.1.1", "1.2", "2.25.1", "2.25.1.9", Patient(PatientKey("SITE", "A-1")), modality="CT")
    stored: dict[str, Any] = {"path": Path("x"), "sha256": "a", "size_bytes": 9, "calling_ae": "CT", "address": "", "study_at": NOW}
    with store.begin() as conn:
        studies.add_instance(conn, header, quiet_s=0, now=NOW, **stored)
    assembly.sweep(store, wants=[assembly.Wants("bundle", frozenset({"CT"}), 1)], limit_s=100, now=NOW)
    with store.begin() as conn:
        (job,) = queue.lease(conn, "infer", owner="me", limit=1, lease_s=30, now=NOW)
    return job


def reports_for(store: Store, **destinations: int) -> None:
    """Queue so many reports for each destination."""
    job = leased(store)
    with store.begin() as conn:
        for name in [name for name, count in destinations.items() for _ in range(count)]:
            said = {"input_sha256": "", "failure": ""}
            number = documents.add(conn, job, report=make_document(), findings=[], now=NOW, **said)
            of = {"bundle": "bundle", "input_version": 1, "destination": name}
            queue.enqueue_deliver(conn, job.study_id, document_id=number, priority=1, now=NOW, **of)  # type: ignore[arg-type]


@contextlib.contextmanager
def delivering(config: Config, store: Store) -> Iterator[None]:
    """Run the role while the block runs."""
    stop = threading.Event()
    thread = threading.Thread(target=roles.deliver, args=(config, store, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def delivered(captured: Captured, destination: str) -> int:
    """How many reports went there."""
    return sum(one["destination"] == destination for one in captured.named("job.completed"))


@pytest.mark.requirement("L1")
@pytest.mark.requirement("L12")
@pytest.mark.timeout(300)
def test_a_thousand_reports_try_a_dead_pacs_once_an_interval_and_all_arrive_when_it_is_back(
    tmp_path: Path, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "PAUSE_S", 0.5)
    monkeypatch.setattr(breaker, "PAUSE_CAP_S", 1.0)
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    reports_for(store, pacs=REPORTS, other=OTHERS)
    port = peers.free_port()
    with peers.ScriptedPacs() as other:
        pacs = Destination(name="pacs", ae_title="SCRIPTED", host="127.0.0.1", port=port, read_back=False, timeout_s=5.0)
        others = replace(pacs, name="other", port=other.peer.port)
        config = replace(Config(), destinations=(pacs, others), deliver=Deliver(poll_s=0.02, batch=50))
        began = time.monotonic()
        with delivering(config, store):
            with dead(port) as calls:
                wait_until(lambda: delivered(captured, "other") == OTHERS, timeout_s=120, what="the other PACS has all")
                wait_until(lambda: len(calls) >= breaker.TRIES + 2, timeout_s=30, what="some tries more")
                (down,) = captured.named("destination.down")
                with store.read() as conn:
                    because = measures.waiting(conn)
                    age_s = measures.oldest_due_s(conn, now=datetime.now(UTC))
                retried = captured.named("job.retried")
                tries, seconds = len(calls), time.monotonic() - began
            with peers.ScriptedPacs(port=port) as back:
                wait_until(lambda: delivered(captured, "pacs") == REPORTS, timeout_s=120, what="all delivered")
                assert len(back.kept) == REPORTS
                assert len(back.received) == REPORTS
        assert len(other.kept) == OTHERS
    assert down["destination"] == "pacs"
    assert down["tries"] == breaker.TRIES
    print(json.dumps({"bench": "dead PACS", "reports": REPORTS, "tries": tries, "seconds": round(seconds, 1)}))
    assert tries <= breaker.TRIES + seconds / breaker.PAUSE_S
    # The first try takes a batch, each of the others one report: the rest were never touched.
    assert len(retried) <= config.deliver.batch + tries - 1
    assert {one["destination"] for one in retried} == {"pacs"}
    left = [count for reason, count in because.items() if "left alone" in reason and "the next is at" in reason]
    assert sum(left) >= REPORTS - len(retried)
    assert age_s >= 60
    assert [one["destination"] for one in captured.named("destination.reached")] == ["pacs"]
    store.close()


@pytest.mark.requirement("L10")
def test_a_pacs_that_keeps_each_report_waiting_holds_up_no_other(tmp_path: Path, captured: Captured) -> None:
    """It takes the association and never answers; while one report waits there, the other PACS has got all of its own."""
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    reports_for(store, slow=5, other=OTHERS)
    steps: list[peers.Step] = ["silence"] * 99
    with peers.ScriptedPacs(steps=steps) as slow, peers.ScriptedPacs() as other:
        pacs = Destination(name="slow", ae_title="SCRIPTED", host="127.0.0.1", port=slow.peer.port, read_back=False, timeout_s=8.0)
        others = replace(pacs, name="other", port=other.peer.port)
        config = replace(Config(), destinations=(pacs, others), deliver=Deliver(poll_s=0.02, batch=1))
        with delivering(config, store):
            wait_until(lambda: len(slow.received) > 0, timeout_s=60, what="the slow PACS has a report and says nothing")
            wait_until(lambda: delivered(captured, "other") == OTHERS, timeout_s=60, what="the other PACS has all")
            assert delivered(captured, "slow") == 0
        assert len(other.kept) == OTHERS
    store.close()


@pytest.mark.requirement("L2")
def test_a_document_that_a_peer_aborts_on_does_not_leave_the_peer_alone(tmp_path: Path, captured: Captured) -> None:
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    reports_for(store, pacs=12)
    with peers.ScriptedPacs(steps=["abort"] * 10) as peer:
        pacs = Destination(name="pacs", ae_title="SCRIPTED", host="127.0.0.1", port=peer.peer.port, read_back=False, timeout_s=5.0)
        config = replace(Config(), destinations=(pacs,), deliver=Deliver(poll_s=0.02, batch=1))
        with delivering(config, store):
            wait_until(lambda: delivered(captured, "pacs") >= 2, timeout_s=30, what="those after the tenth are delivered")
    assert captured.named("destination.down") == []
    store.close()
