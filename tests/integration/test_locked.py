"""Somebody else holds SQLite's writer lock, a backup for one: senders are told in time, nothing is lost, nothing is stored twice."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.receivers import hl7_listener
from worker.domain import PatientKey
from worker.intake import mllp
from worker.store import database, records
from worker.store.database import DatabaseUnavailable, Store

#: What integration engines commonly wait for an answer.
SENDERS_S = 30.0
RESULT = (
    b"MSH|^~\\&|LAB|A|SYNOPTIC|B|20260101||ORU^R01^ORU_R01|1|P|2.5.1\rPID|||L1^^^SITE^MR\r"
    b"OBR|1||1|CRP^CRP^L|||20260101\rOBX|1|NM|1988-5^CRP^LN||5|mg/L|||||F\r"
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path / 's.db'}")
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def other(store: Store) -> Iterator[sqlite3.Connection]:
    """Another program's connection, which has the lock."""
    conn = sqlite3.connect(str(store.url.database), isolation_level=None, check_same_thread=False)
    conn.execute("BEGIN IMMEDIATE")
    yield conn
    conn.close()


@pytest.mark.requirement("D5")
def test_a_result_that_finds_the_database_locked_is_not_acknowledged_and_kept_once_when_it_comes_again(
    store: Store, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert database.BUSY_S <= SENDERS_S - 10
    monkeypatch.setattr(database, "BUSY_S", 0.3)
    with hl7_listener(store) as address:
        assert mllp.send(address, [RESULT]) == ["AE"]
        other.execute("ROLLBACK")
        assert mllp.send(address, [RESULT, RESULT]) == ["AA", "AA"]
    with store.read() as conn:
        found = records.view(conn, PatientKey("SITE", "L1"), as_of=datetime(2026, 1, 2, tzinfo=UTC))
    assert found is not None
    assert [one.value for one in found.observations] == [5.0]


@pytest.mark.requirement("D5")
def test_writers_who_queue_behind_each_other_wait_no_longer_than_one(
    store: Store, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten senders at once: each is answered after the bound, not the last after ten of them."""
    monkeypatch.setattr(database, "BUSY_S", 1.0)
    waited: list[float] = []

    def write() -> None:
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable), store.begin():
            pass
        waited.append(time.monotonic() - began)

    threads = [threading.Thread(target=write) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waited) == 10
    assert max(waited) < 3.0  # ten after each other: 10 s
    other.execute("ROLLBACK")
    with store.begin() as conn:
        conn.exec_driver_sql("DELETE FROM patient")


@pytest.mark.requirement("D5")
def test_a_lock_that_ends_in_time_costs_a_writer_nothing_but_the_wait(store: Store, other: sqlite3.Connection) -> None:
    release = threading.Timer(0.5, other.execute, ("ROLLBACK",))
    release.start()
    with store.begin() as conn:
        conn.exec_driver_sql("INSERT INTO patient (issuer, patient_id) VALUES ('SITE', 'L2')")
    release.join()
    with store.read() as conn:
        assert records.is_known(conn, PatientKey("SITE", "L2"))
