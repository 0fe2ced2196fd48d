"""A wall clock that jumps: leases, waiting times and retention, on SQLite and on PostgreSQL; daylight saving."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.conformance.test_retention import Site as Images
from tests.conformance.test_store import NOW, WANTS, add, complete_study, header, lease
from tests.conftest import Captured
from worker import sweeps
from worker.config import Config, Records, Retention, parse_zone
from worker.domain import Header, Patient, PatientKey
from worker.errors import PeerUnavailable
from worker.intake import assembly
from worker.reception import study_time
from worker.record_feeds import clock
from worker.store import queue, schema, studies
from worker.store.database import Store
from worker.store.spool import Spool

YEAR, DAY, SECOND = timedelta(days=365), timedelta(days=1), timedelta(seconds=1)
#: Of a job and a study in these tests.
LEASE_S = 30


@dataclass
class Machine:
    """Its two clocks."""

    at: datetime = NOW
    steady_s: float = 1000.0

    def pass_by(self, seconds: float, *, jump: timedelta = timedelta()) -> None:
        self.at += timedelta(seconds=seconds) + jump
        self.steady_s += seconds

    def watched(self) -> sweeps.Clock:
        return sweeps.Clock(lambda: self.at, lambda: self.steady_s)


def states(store: Store) -> list[str]:
    with store.read() as conn:
        return [one.state for one in queue.of_study(conn, 1)]


@pytest.mark.requirement("S8")
def test_a_year_ahead_ends_each_lease_and_the_late_verdict_is_turned_away(store: Store) -> None:
    complete_study(store)
    (early,) = lease(store)
    with store.begin() as conn:
        assert queue.rescue(conn, now=NOW + YEAR) == [early.id]
    (late,) = lease(store, now=NOW + YEAR, owner="another")
    with pytest.raises(queue.LeaseLost), store.begin() as conn:
        queue.complete(conn, early, now=NOW + YEAR)
    with store.begin() as conn:
        queue.complete(conn, late, now=NOW + YEAR)
    assert states(store) == ["completed"]


@pytest.mark.requirement("S8")
@pytest.mark.parametrize("back", [DAY, YEAR], ids=["a day", "a year"])
def test_what_waits_is_put_back_with_the_clock(store: Store, captured: Captured, back: timedelta) -> None:
    """A dead worker's lease, a job that is tried again and a study that is being received: none waits for longer than it was to."""
    machine = Machine()
    watched = machine.watched()
    complete_study(store)
    (job,) = lease(store, now=NOW + 20 * SECOND)
    add(store, header(1, study="2.25.2"), now=NOW + 20 * SECOND)
    machine.pass_by(20, jump=-back)
    watched.look(store, lease_s=LEASE_S)
    now = machine.at
    assert captured.named("clock.jumped") == [{"seconds": -round(back.total_seconds())}]
    with store.begin() as conn:
        assert queue.rescue(conn, now=now + LEASE_S * SECOND) == []
        assert queue.rescue(conn, now=now + (LEASE_S + 1) * SECOND) == [job.id]
    assembly.sweep(store, wants=WANTS, limit_s=0, now=now + 9 * SECOND)
    with store.read() as conn:
        assert [one.id for one in studies.receiving(conn)] == [2]
    assembly.sweep(store, wants=WANTS, limit_s=0, now=now + 10 * SECOND)
    with store.read() as conn:
        assert studies.receiving(conn) == []
    (again,) = lease(store, now=now + (LEASE_S + 1) * SECOND, limit=1)
    with store.begin() as conn:
        queue.retry(conn, again, error=PeerUnavailable("It is away."), now=now + back)  # said by the wrong clock once more
    machine.pass_by(LEASE_S + 1, jump=back)
    watched.look(store, lease_s=LEASE_S)
    machine.pass_by(1, jump=-back)
    watched.look(store, lease_s=LEASE_S)
    soon = machine.at + queue.BACKOFF_CAP_S * SECOND
    assert {one.id for _ in range(2) for one in lease(store, now=soon)} == {1, 2}


@pytest.mark.requirement("S8")
def test_who_works_renews_a_lease_that_was_put_back(store: Store) -> None:
    machine = Machine()
    watched = machine.watched()
    complete_study(store)
    jobs = lease(store, now=NOW + 20 * SECOND)
    machine.pass_by(20, jump=-DAY)
    watched.look(store, lease_s=LEASE_S)
    with store.begin() as conn:
        assert queue.renew(conn, jobs, lease_s=LEASE_S, now=machine.at + 10 * SECOND) == {jobs[0].id}
        assert queue.rescue(conn, now=machine.at + (LEASE_S + 1) * SECOND) == []
        queue.complete(conn, jobs[0], now=machine.at + 35 * SECOND)
    assert states(store) == ["completed"]


@pytest.mark.requirement("S8")
@pytest.mark.parametrize("jump", [YEAR, -DAY], ids=["a year ahead", "a day back"])
def test_nothing_is_removed_for_its_age_for_a_day_after_a_jump(store: Store, tmp_path: Path, jump: timedelta) -> None:
    """A clock that is a year ahead makes everything old at once, and what was removed does not come back with it."""
    site = Images(store, Spool(tmp_path / "spool", low_water_bytes=0))
    for number in (1, 2):
        site.receive(number)
    site.analyse()
    config = Config(retention=Retention(delivered_days=1), records=Records(keep_raw_days=1))
    machine = Machine()
    watched = machine.watched()
    machine.pass_by(60, jump=jump)
    for _ in range(2):
        sweeps._retain(config, store, site.spool, watched)  # before the jump was seen, and after
        assert site.files() == site.kept_rows() > 0
        watched.look(store, lease_s=LEASE_S)
    machine.pass_by(sweeps.DOUBT_S - 1)
    assert not watched.is_trusted
    machine.pass_by(1)
    watched.look(store, lease_s=LEASE_S)
    assert watched.is_trusted


@pytest.mark.requirement("S8")
def test_a_file_whose_row_is_being_written_while_the_clock_jumps_stays_where_it_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year ahead it looks like an orphan of last year, and every sweep begins anew in that moment."""
    site = Images(store, Spool(tmp_path / "spool", low_water_bytes=0))
    site.receive(1)
    with store.begin() as conn:  # the row is not committed yet
        conn.execute(sa.delete(schema.instance))
    machine = Machine(at=datetime.now(UTC))
    watched, files = machine.watched(), site.files()
    machine.pass_by(1, jump=YEAR)
    monkeypatch.setattr(sweeps, "clock", lambda: machine.at)
    for _ in range(2):
        sweeps._clean(store, site.spool, watched)
        assert site.files() == files > 0
        watched.look(store, lease_s=LEASE_S)


@pytest.mark.requirement("S8")
def test_what_a_clock_a_year_ahead_has_dated_is_old_once_it_is_right_again(store: Store, tmp_path: Path) -> None:
    """Else retention would say that it removed images which stay for a year."""
    site = Images(store, Spool(tmp_path / "spool", low_water_bytes=0))
    site.receive(1)
    paths = list((tmp_path / "spool" / "instances").glob("*/*.dcm"))
    for path in paths:
        os.utime(path, (time.time() + YEAR.total_seconds(),) * 2)
    removed, _ = site.spool.remove([f"{path.parent.name}/{path.name}" for path in paths], written_before=datetime.now(UTC) - DAY)
    assert removed == len(paths) > 0
    assert site.files() == 0


@pytest.mark.requirement("S8")
def test_a_clock_that_is_slewed_and_time_that_passes_are_no_jump(store: Store, captured: Captured) -> None:
    machine = Machine()
    watched = machine.watched()
    for _ in range(100):
        machine.pass_by(3600, jump=30 * SECOND)
        watched.look(store, lease_s=LEASE_S)
    assert watched.is_trusted
    assert captured.named("clock.jumped") == []


@pytest.mark.requirement("S8")
def test_daylight_saving_moves_no_deadline_and_dates_each_study_once(store: Store) -> None:
    """Of a study's local time that comes twice the first is meant; of one that never was, the hour that it would have been."""
    berlin = parse_zone("Europe/Berlin")

    def at(date: str, time: str, offset: str = "") -> datetime | None:
        one = Header(
            "1", "1.1", "1", "1.9", "1.9.1", Patient(PatientKey("", "P")), study_date=date, study_time=time, timezone_offset=offset
        )
        return study_time(one, berlin)

    assert at("20261025", "023000") == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert at("20261025", "023000", "+0100") == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)
    assert at("20261025", "033000") == datetime(2026, 10, 25, 2, 30, tzinfo=UTC)
    assert at("20260329", "023000") == datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    before = datetime(2026, 10, 25, 2, 59, 25, tzinfo=berlin).astimezone(UTC)
    complete_study(store, now=before)
    assert clock().tzinfo is UTC  # the daemon's: a lease is so many seconds, and not so many of a local clock
    (job,) = lease(store, now=before + 20 * SECOND)
    after = [before + (20 + passed) * SECOND for passed in (LEASE_S - 1, LEASE_S + 1)]  # it is two o'clock again
    with store.begin() as conn:
        assert [queue.rescue(conn, now=now.astimezone(berlin)) for now in after] == [[], [job.id]]
