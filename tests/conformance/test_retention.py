"""Retention: what is delivered may go, what is owed to anybody never; killed anywhere, no row is without its file unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.conformance.test_ledger import BERTHA, STEP, WANTS, delivered, lease, settled
from tests.conformance.test_store import ADA, NOW, header
from tests.conftest import Captured
from tests.scu import CT, EXPLICIT
from worker import consistency, sweeps
from worker.domain import Patient, Received
from worker.intake import assembly
from worker.store import commitments, history, ledger, queue, retention, schema, studies
from worker.store.database import Store
from worker.store.spool import Spool

DAY = timedelta(days=1)
LATER = NOW + 31 * DAY
DAYS = {"delivered": 30, "excluded": 0, "failed": 0}
OWED = ["being received", "analysed", "undelivered", "failed", "held", "unsent", "record changed", "excluded"]
#: The files' time stamps; the clock of the file system cannot be wound by hand.
OLD = datetime(2020, 1, 1, tzinfo=UTC).timestamp()


@dataclass(frozen=True, slots=True)
class Site:
    """A store and a spool that agree."""

    store: Store
    spool: Spool

    def receive(
        self, number: int, *, study: str = "2.25.1", modality: str = "CT", now: datetime = NOW, whose: Patient = ADA, is_old: bool = True
    ) -> Received:
        """One image, file and row."""
        one = header(number, study=study, modality=modality, patient=whose)
        incoming = self.spool.begin(sop_class_uid=CT, sop_instance_uid=one.sop_instance_uid, transfer_syntax_uid=EXPLICIT)
        incoming.write(memoryview(f"image {number} of {study}".encode()))
        stored = incoming.commit()
        if is_old:
            os.utime(stored.path, (OLD, OLD))
        with self.store.begin() as conn:
            return studies.add_instance(
                conn,
                one,
                path=Path(stored.path.parent.name) / stored.path.name,
                sha256=stored.sha256,
                size_bytes=stored.size_bytes,
                calling_ae="CT1",
                address="127.0.0.1",
                study_at=NOW,
                quiet_s=10,
                now=now,
            )

    def analyse(self, verdict: str = "report", *, now: datetime = NOW + STEP, destinations: int = 1, is_delivered: bool = True) -> None:
        """Complete what was received, analyse and deliver it."""
        assembly.sweep(self.store, wants=WANTS[:1], limit_s=100, now=now)
        for job in lease(self.store, "infer", now):
            settled(self.store, job, verdict, now=now, destinations=destinations, input_sha256=str(job.input_version))
        for job in lease(self.store, "deliver", now) if is_delivered else ():
            delivered(self.store, job, "report", now)

    def retain(self, *, now: datetime = LATER, **days: int) -> None:
        """The sweep, as the daemon calls it."""
        sweeps.retain(self.store, self.spool, days={**DAYS, **days}, quarantine_days=0, now=now)

    def files(self) -> int:
        """How many there are in use."""
        return sum(path.is_file() for path in (self.spool.root / "instances").rglob("*"))

    def others(self) -> int:
        """How many lie elsewhere in the spool."""
        return sum(path.is_file() for path in self.spool.root.rglob("*")) - self.files()

    def kept_rows(self) -> int:
        """Rows that say that their file is there."""
        with self.store.read() as conn:
            count = sa.select(sa.func.count()).select_from(schema.instance).where(schema.instance.c.removed_at.is_(None))
            return int(conn.execute(count).scalar_one())

    def names(self, study_id: int = 1) -> list[str]:
        """A study's history."""
        with self.store.read() as conn:
            return [one.name for one in history.of_study(conn, study_id)]


@pytest.fixture
def site(store: Store, tmp_path: Path) -> Site:
    return Site(store, Spool(tmp_path / "spool", low_water_bytes=0))


@pytest.mark.requirement("S5")
class TestRetention:
    """Who goes, and when."""

    def test_a_delivered_study_goes_after_its_time_and_is_still_known(self, site: Site, captured: Captured) -> None:
        site.receive(1)
        site.receive(2)
        site.analyse()
        site.retain(now=NOW + STEP + 30 * DAY)
        assert (site.files(), site.kept_rows()) == (2, 2)
        site.retain()
        assert (site.files(), site.others(), site.kept_rows()) == (0, 0, 0)
        assert site.names()[-1] == "images.removed"
        (told,) = captured.named("images.removed")
        assert (told["studies"], told["files"]) == (1, 2)
        with site.store.read() as conn:
            assert {one.account for one in ledger.entries(conn, [])} == {"delivered"}

    def test_nothing_goes_where_nothing_is_configured(self, site: Site) -> None:
        site.receive(1)
        site.analyse()
        site.retain(delivered=0)
        assert site.files() == 1

    @pytest.mark.parametrize("what", OWED)
    def test_what_is_owed_to_anybody_stays_for_ever(self, site: Site, what: str) -> None:
        site.receive(1, modality="US" if what == "excluded" else "CT")
        if what == "held":
            site.receive(2, whose=BERTHA)
        if what == "analysed":
            assembly.sweep(site.store, wants=WANTS[:1], limit_s=100, now=NOW + STEP)
        elif what != "being received":
            verdict = "discard" if what == "failed" else "report"
            site.analyse(verdict, destinations=0 if what == "unsent" else 1, is_delivered=what != "undelivered")
        if what == "record changed":
            with site.store.begin() as conn:
                conn.execute(sa.update(schema.study).values(record_changed_at=NOW))
        before = site.files()
        site.retain(now=NOW + 3650 * DAY)
        assert site.files() == before == site.kept_rows()

    def test_what_an_archive_was_asked_to_commit_to_stays_until_it_does(self, site: Site) -> None:
        """A query that finds the report is no promise; of several questions about one delivery the last counts."""
        site.receive(1)
        site.analyse(is_delivered=False)
        (job,) = lease(site.store, "deliver", NOW + STEP)
        delivered(site.store, job, "report", NOW + STEP)

        def ask(state: str) -> None:
            with site.store.begin() as conn:
                commitments.ask(conn, job, transaction_uid=f"2.25.{state.encode().hex()}", wait_s=1, now=NOW)
                said = sa.update(schema.commitment).where(schema.commitment.c.state == "asked")
                conn.execute(said.values(state=state))

        for state in ("asked", "unproven", "found"):
            ask(state)
            sweeps.retain(site.store, site.spool, days=DAYS, quarantine_days=0, committing=[job.destination], now=LATER)
            assert site.files() == 1, state
        ask("committed")
        sweeps.retain(site.store, site.spool, days=DAYS, quarantine_days=0, committing=[job.destination], now=LATER)
        assert site.files() == 0

    def test_who_is_not_asked_to_commit_any_more_owes_no_promise(self, site: Site) -> None:
        site.receive(1)
        site.analyse(is_delivered=False)
        (job,) = lease(site.store, "deliver", NOW + STEP)
        delivered(site.store, job, "report", NOW + STEP)
        with site.store.begin() as conn:
            commitments.ask(conn, job, transaction_uid="2.25.1", wait_s=1, now=NOW)
        site.retain()
        assert site.files() == 0

    @pytest.mark.parametrize(("account", "modality", "verdict"), [("excluded", "US", ""), ("failed", "CT", "discard")])
    def test_excluded_and_failed_studies_go_by_their_own_days(self, site: Site, account: str, modality: str, verdict: str) -> None:
        site.receive(1, modality=modality)
        site.analyse(verdict)
        sweeps.retain(site.store, site.spool, days={account: 32}, quarantine_days=0, now=LATER)
        assert site.files() == 1
        sweeps.retain(site.store, site.spool, days={account: 30}, quarantine_days=0, now=LATER)
        assert site.files() == 0

    def test_a_dead_letter_put_back_by_an_operator_is_in_flight_again(self, site: Site) -> None:
        site.receive(1)
        site.analyse("discard")
        with site.store.begin() as conn:
            queue.operator_retry(conn, 1, now=LATER)
        site.retain(failed=30)
        assert site.files() == 1

    def test_a_sweep_is_bounded_and_the_next_has_the_rest(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(retention, "LIMIT", 3)
        monkeypatch.setattr(retention, "BATCH", 2)
        for number in range(5):
            site.receive(1, study=f"2.25.{number + 1}")
        site.analyse()
        left = []
        for _ in range(3):
            site.retain()
            left.append(site.files())
        assert left == [2, 0, 0]


@pytest.mark.requirement("S1")
@pytest.mark.requirement("S5")
class TestKilled:
    """Between the rows and the files, and while the same image comes again."""

    def half(self, site: Site) -> list[str]:
        """Rows are marked and committed; then the power goes."""
        site.receive(1)
        site.receive(2)
        site.analyse()
        paths, marked = retention.mark(site.store, [1], {"delivered": LATER - 30 * DAY}, committing=(), now=LATER)
        assert (marked, site.files(), site.kept_rows()) == (1, 2, 0)
        return paths

    def test_killed_after_the_rows_the_next_sweep_of_the_spool_deletes_the_files(self, site: Site) -> None:
        self.half(site)
        sweeps.sweep_spool(site.store, site.spool)
        assert (site.files(), site.others()) == (0, 0)

    def test_killed_among_the_files_the_next_sweep_of_the_spool_deletes_the_rest(self, site: Site) -> None:
        paths = self.half(site)
        site.spool.remove(paths[:1], written_before=LATER)
        (site.spool.root / "instances" / paths[1]).rename(site.spool.root / "incoming" / f"{Path(paths[1]).stem}.orphan")
        # A quarter of an hour later: what is being taken away now is another process's.
        site.spool.sweep(lambda several: dict.fromkeys(several, True), written_before=datetime.now(UTC) + consistency.ORPHAN_AGE)
        assert (site.files(), site.others()) == (0, 0)

    def test_a_transaction_that_fails_takes_no_file(self, site: Site) -> None:
        site.receive(1)
        site.analyse()
        with site.store.begin() as conn:
            conn.execute(sa.update(schema.study).values(hold="meanwhile"))
        assert retention.mark(site.store, [1], {"delivered": LATER}, committing=(), now=LATER) == ([], 0)
        assert site.kept_rows() == 1

    def test_an_image_sent_again_before_its_old_file_went_stays(self, site: Site) -> None:
        """Its file is fresh under the same name, its row about to be written: after 0x0000 it must be there."""
        paths = self.half(site)
        assert site.receive(1, now=LATER, is_old=False) is Received.STORED
        site.spool.remove(paths, written_before=datetime.now(UTC) - consistency.ORPHAN_AGE)
        sweeps.sweep_spool(site.store, site.spool)
        assert (site.files(), site.kept_rows()) == (1, 1)


#: What the daemon does each ten minutes, in small steps, so that a kill falls among them.
SWEEP = """
import sys
from datetime import datetime
from pathlib import Path
from worker import sweeps
from worker.store import retention
from worker.store.database import Store
from worker.store.spool import Spool
retention.BATCH = 1
store, spool = Store(sys.argv[1]), Spool(Path(sys.argv[2]), low_water_bytes=0)
sweeps.retain(store, spool, days={"delivered": 30}, quarantine_days=0, now=datetime.fromisoformat(sys.argv[3]))
"""
STUDIES = 60


@pytest.mark.requirement("S1")
@pytest.mark.requirement("S5")
@pytest.mark.timeout(240)
def test_killed_anywhere_no_row_misses_its_file_and_no_file_stays(site: Site) -> None:
    """`kill -9`, five times: after each every row that says its file is there is right, and in the end nothing is left."""
    for number in range(STUDIES):
        site.receive(1, study=f"2.25.{number + 1}")
    for _ in range(STUDIES // 9 + 1):
        site.analyse()
    url = site.store.url.render_as_string(hide_password=False)
    seen = []
    for kill in range(5):
        # The process ends by itself where it is quicker than we look; then the next finds nothing to do.
        with subprocess.Popen([sys.executable, "-c", SWEEP, url, str(site.spool.root), LATER.isoformat()]) as child:
            while child.poll() is None and site.files() > STUDIES - (kill + 1) * STUDIES // 6:
                time.sleep(0.001)
            child.kill()
        seen.append(site.files())
        found = consistency.check(site.store, site.spool, with_digests=True, now=datetime.now(UTC), progress=lambda done, of: None)
        assert found.faults == ()
    assert any(0 < count < STUDIES for count in seen), "no kill fell into the work"
    site.retain()
    consistency.sweep(site.store, site.spool, now=datetime.now(UTC) + 2 * consistency.ORPHAN_AGE)
    assert (site.files(), site.others(), site.kept_rows()) == (0, 0, 0)


class TestSentAgain:
    """What a PACS sends after retention is kept, and says nothing new."""

    @pytest.fixture
    def gone(self, site: Site) -> Site:
        site.receive(1)
        site.receive(2)
        site.analyse()
        site.retain()
        assert site.files() == 0
        return site

    @pytest.mark.requirement("S5")
    def test_it_is_kept_as_long_again_and_not_analysed_again(self, gone: Site) -> None:
        assert [gone.receive(number, now=LATER) for number in (1, 2)] == [Received.STORED] * 2
        assert gone.receive(1, now=LATER) is Received.DUPLICATE
        gone.analyse(now=LATER + STEP)
        with gone.store.read() as conn:
            study = studies.load(conn, 1)
            jobs = queue.of_study(conn, 1)
        assert (study.version, study.is_complete, len(jobs)) == (1, True, 2)
        assert gone.names().count("images.returned") == 1
        gone.retain(now=LATER + 29 * DAY)
        assert gone.files() == 2
        gone.retain(now=LATER + 31 * DAY)
        assert (gone.files(), gone.kept_rows()) == (0, 0)

    def test_other_bytes_under_the_same_uid_are_a_conflict_as_ever(self, gone: Site) -> None:
        with gone.store.begin() as conn:
            conn.execute(sa.update(schema.instance).values(sha256="other"))
        assert gone.receive(1, now=LATER) is Received.CONFLICT

    def test_a_late_series_opens_the_study_and_knows_what_is_gone(self, gone: Site) -> None:
        assert gone.receive(3, now=LATER) is Received.STORED
        gone.analyse("discard", now=LATER + STEP)
        with gone.store.read() as conn:
            study = studies.load(conn, 1)
        assert study.version == 2
        assert [one.is_removed for one in study.series[0].instances] == [True, True, False]
        gone.retain(now=LATER + 365 * DAY)
        assert gone.files() == 1  # a dead letter by now

    def test_with_the_late_series_the_whole_study_may_come_again(self, gone: Site) -> None:
        assert [gone.receive(number, now=LATER) for number in (3, 1, 2)] == [Received.STORED] * 3
        gone.analyse(now=LATER + STEP)
        with gone.store.read() as conn:
            study = studies.load(conn, 1)
        assert (study.version, study.is_complete) == (2, True)
        assert not any(one.is_removed for one in study.series[0].instances)

    def test_a_late_report_is_kept_and_goes_in_its_turn(self, gone: Site) -> None:
        gone.receive(9, modality="SR", now=LATER)
        assert gone.files() == 1
        gone.retain(now=LATER + 31 * DAY)
        assert gone.files() == 0
