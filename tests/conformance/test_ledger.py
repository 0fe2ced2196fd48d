"""The ledger: whatever happens to studies, each is in exactly one account, and all of them are what was received."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from typer.testing import CliRunner

from tests.conformance.test_store import ADA, NOW, add, header
from worker.cli import app
from worker.domain import Document, Job, Patient, PatientKey
from worker.errors import PatientConflict, PeerRefused, PeerUnavailable
from worker.intake import assembly
from worker.store import documents, ledger, queue, schema, studies, withdrawal
from worker.store.database import Store

BERTHA = Patient(PatientKey("SITE", "B-2"), "Test^Bertha", "19710101", "F")
WANTS = [assembly.Wants("ct", frozenset({"CT"})), assembly.Wants("any", frozenset({"CT", "MR"}))]
STEP = timedelta(seconds=20)


def accounts(store: Store) -> dict[int, str]:
    with store.read() as conn:
        return ledger.accounts(conn, list(conn.scalars(sa.select(schema.study.c.id))))


def settled(store: Store, job: Job, verdict: str, *, now: datetime, destinations: int = 1, input_sha256: str = "x") -> None:
    """What worker/settling.py makes of an analysis."""
    with store.begin() as conn:
        hold, version = studies.standing(conn, job.study_id)
        if hold:
            queue.discard(conn, job, error=PatientConflict(hold), now=now)
        elif version > job.input_version:
            queue.cancel(conn, job, reason="too late", now=now)
        elif verdict == "discard":
            queue.discard(conn, job, error=PeerRefused("The input is wrong."), now=now)
        elif verdict == "retry":
            queue.retry(conn, job, error=PeerUnavailable("away"), now=now)
        elif verdict == "snooze":
            queue.snooze(conn, job, delay_s=5, reason="wait", now=now)
        else:
            _report(conn, job, now=now, destinations=destinations, input_sha256=input_sha256)


def _report(conn: sa.Connection, job: Job, *, now: datetime, destinations: int, input_sha256: str) -> None:
    before = {"bundle": job.bundle, "before_version": job.input_version}
    if not documents.is_repeated(conn, job.study_id, input_sha256=input_sha256, **before):  # type: ignore[arg-type]
        report = Document(f"2.{job.id}.{job.input_version}", "1.2.840.10008.5.1.4.1.1.88.34", "sr", b"sr", "")
        picture = Document(f"2.{job.id}.{job.input_version}.1", "1.2.840.10008.5.1.4.1.1.7", "summary", b"picture", "")
        said = {"input_sha256": input_sha256, "failure": "", "now": now}
        added = [documents.add(conn, job, report=one, findings=(), **said) for one in (picture, report)]  # type: ignore[arg-type]
        for number in range(destinations):  # the second takes pictures alone
            queue.enqueue_deliver(
                conn,
                job.study_id,
                document_id=added[1 - number],
                bundle=job.bundle,
                input_version=job.input_version,
                destination=f"pacs {number}",
                priority=1,
                now=now,
            )
    queue.complete(conn, job, now=now)


def lease(store: Store, kind: str, now: datetime) -> list[Job]:
    with store.begin() as conn:
        return queue.lease(conn, kind, owner="me", limit=9, lease_s=30, now=now)  # type: ignore[arg-type]


def delivered(store: Store, job: Job, verdict: str, now: datetime) -> None:
    with store.begin() as conn:
        if verdict == "report":
            queue.complete(conn, job, now=now)
        elif verdict == "discard":
            queue.discard(conn, job, error=PeerRefused("No such class."), now=now)
        else:
            queue.retry(conn, job, error=PeerUnavailable("away"), now=now)


VERDICTS = st.lists(st.sampled_from([*["report"] * 40, "discard", "discard", "retry", "snooze", "die"]), min_size=9, max_size=9)


class Line(RuleBasedStateMachine):
    """Images, sweeps, workers, operators and corrected records, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="ledger-machine-")
        self.store = Store(f"sqlite:///{self.folder.name}/l.db")
        self.now = NOW
        self.number = 0

    @initialize()
    def a_database(self) -> None:
        self.store.migrate()

    @rule(study=st.integers(1, 3), modality=st.sampled_from(["CT"] * 5 + ["MR", "US", "PR"]), whose=st.sampled_from([ADA] * 30 + [BERTHA]))
    def image(self, study: int, modality: str, whose: Patient) -> None:
        self.number += 1
        add(self.store, header(self.number, study=f"2.25.{study}", modality=modality, patient=whose), now=self.now)

    @rule()
    def time_passes(self) -> None:
        self.now += STEP
        with self.store.begin() as conn:
            queue.rescue(conn, now=self.now)
        assembly.sweep(self.store, wants=WANTS, limit_s=100, now=self.now)

    @rule(verdicts=VERDICTS, destinations=st.integers(0, 2), input_sha256=st.sampled_from("xy"))
    def analyse(self, verdicts: list[str], destinations: int, input_sha256: str) -> None:
        self.time_passes()
        for job, verdict in zip(lease(self.store, "infer", self.now), verdicts, strict=False):
            if verdict != "die":
                settled(self.store, job, verdict, now=self.now, destinations=destinations, input_sha256=input_sha256)

    @rule(verdicts=VERDICTS)
    def deliver(self, verdicts: list[str]) -> None:
        for job, verdict in zip(lease(self.store, "deliver", self.now), verdicts, strict=False):
            if verdict != "die":
                delivered(self.store, job, verdict, self.now)

    @rule(study=st.integers(1, 3), verdicts=VERDICTS, sent=VERDICTS)
    def work(self, study: int, verdicts: list[str], sent: list[str]) -> None:
        """What most studies go through, with nothing between."""
        self.image(study, "CT", ADA)
        self.analyse(verdicts, 1, "x" if self.number % 2 else "y")
        self.deliver(sent)

    @rule(study=st.integers(1, 3), is_cancelled=st.sampled_from([True, False, False]))
    def operate(self, study: int, is_cancelled: bool) -> None:
        with self.store.begin() as conn:
            if is_cancelled:
                queue.operator_cancel(conn, study, now=self.now)
            else:
                queue.operator_retry(conn, study, now=self.now)

    @rule(destination=st.sampled_from(["pacs 0", "pacs 1"]), kinds=st.sampled_from([{"sr"}, {"summary"}]))
    def want_no_more(self, destination: str, kinds: set[str]) -> None:
        """The first gets reports alone, the second pictures: one draw in two takes something back."""
        list(withdrawal.take_back(self.store, destination, kinds=kinds, now=self.now))

    @rule(study=st.integers(1, 3))
    def renew(self, study: int) -> None:
        if accounts(self.store).get(study) in {"delivered", "failed"}:
            with self.store.begin() as conn:
                made = studies.new_version(conn, study, now=self.now, cause="The patient's record changed.")
                queue.enqueue_infer(conn, study, bundle="any", input_version=made, priority=1, now=self.now)

    @invariant()
    def it_adds_up(self) -> None:
        if not self.number:
            return
        with self.store.read() as conn:
            told = {study_id: _looked_up(conn, study_id) for study_id in conn.scalars(sa.select(schema.study.c.id))}
            found = ledger.entries(conn, [])
        assert accounts(self.store) == told
        assert sum(one.studies for one in found) == len(told)
        assert {one.account for one in found} <= set(ledger.ACCOUNTS)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


def _looked_up(conn: sa.Connection, study_id: int) -> str:
    """The account of one study, row by row: slow, and another way than the ledger's."""
    study = studies.load(conn, study_id)
    jobs = queue.of_study(conn, study_id)
    if study.hold:
        return "held"
    if not study.is_complete or any(job.state in {"available", "leased"} for job in jobs):
        return "in flight"
    asked = [job for job in jobs if job.kind == "infer" and job.input_version == study.version]
    if not asked:
        return "excluded"
    made = [document for document, _ in documents.of_study(conn, study_id)]
    last = {document.bundle: (document.bundle, document.input_version, document.input_sha256) for document in made}
    said = {document.id for document in made if (document.bundle, document.input_version, document.input_sha256) in last.values()}
    owed = [job for job in jobs if job.kind == "deliver" and job.document_id in said and job.bundle in {one.bundle for one in asked}]
    return "delivered" if all(job.state == "completed" for job in (*asked, *owed)) else "failed"


Line.TestCase.settings = settings(
    max_examples=20, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestLine = pytest.mark.requirement("Q8")(pytest.mark.requirement("L13")(Line.TestCase))


def a_delivered_study(store: Store) -> int:
    add(store, header(1))
    assembly.sweep(store, wants=WANTS[:1], limit_s=100, now=NOW + STEP)
    (job,) = lease(store, "infer", NOW + STEP)
    settled(store, job, "report", now=NOW + STEP)
    (job,) = lease(store, "deliver", NOW + STEP)
    delivered(store, job, "report", NOW + STEP)
    return job.study_id


@pytest.mark.requirement("L13")
def test_a_study_whose_report_has_vanished_is_in_no_account(store: Store) -> None:
    study_id = a_delivered_study(store)
    assert accounts(store) == {study_id: "delivered"}
    with store.begin() as conn:
        conn.execute(sa.delete(schema.job).where(schema.job.c.kind == "deliver"))
        conn.execute(sa.delete(schema.document))
    with store.read() as conn:
        assert ledger.lost(conn, limit=9) == [study_id]


@pytest.mark.requirement("Q8")
def test_a_complete_study_without_a_job_or_a_rule_is_in_no_account(store: Store) -> None:
    add(store, header(1, modality="US"))
    assembly.sweep(store, wants=WANTS, limit_s=100, now=NOW + STEP)
    assert set(accounts(store).values()) == {"excluded"}
    with store.begin() as conn:
        conn.execute(sa.delete(schema.event).where(schema.event.c.name == "study.excluded"))
    assert set(accounts(store).values()) == {ledger.LOST}


def test_a_day_begins_at_the_sites_midnight(store: Store) -> None:
    """23:30 UTC of the winter is the next day in Berlin, and 22:30 UTC of the summer."""
    for number, at in enumerate(["2026-01-31T22:59", "2026-01-31T23:01", "2026-07-01T21:59", "2026-07-01T22:01"]):
        add(store, header(1, study=f"2.25.{number + 1}"), now=datetime.fromisoformat(at).replace(tzinfo=UTC))
    zone = ZoneInfo("Europe/Berlin")
    midnights = [datetime(2026, 7, 2, tzinfo=zone), datetime(2026, 7, 1, tzinfo=zone), datetime(2026, 2, 1, tzinfo=zone)]
    with store.read() as conn:
        assert {one.day: one.studies for one in ledger.entries(conn, midnights)} == {0: 1, 1: 1, 2: 1, 3: 1}


class TestCommand:
    """`synoptic status --ledger`, as an operator and a monitoring system see it."""

    @pytest.fixture
    def config(self, store: Store, tmp_path: Path) -> str:
        path = tmp_path / "synoptic.toml"
        path.write_text(f'[site]\ndata = "data"\ndatabase = "{store.url.render_as_string(hide_password=False)}"\n', "utf-8")
        return str(path)

    def test_it_adds_up_in_80_columns(self, store: Store, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
        a_delivered_study(store)
        add(store, header(1, study="2.25.2"))
        monkeypatch.setenv("COLUMNS", "80")
        told = CliRunner().invoke(app, ["status", "--ledger", "--config", config])
        assert told.exit_code == 0
        assert max(map(len, told.output.splitlines())) <= 80
        assert [line.split() for line in told.output.splitlines() if line.strip().startswith("all")] == [
            ["all", "2", "1", "0", "0", "0", "1"]
        ]

    def test_a_study_in_no_account_is_named_and_exits_1(self, store: Store, config: str) -> None:
        study_id = a_delivered_study(store)
        with store.begin() as conn:
            conn.execute(sa.delete(schema.job))
        told = CliRunner().invoke(app, ["status", "--ledger", "--json", "--config", config])
        facts = json.loads(told.stdout)
        assert told.exit_code == 1
        assert (facts["adds_up"], facts["lost_studies"], facts["all"]["lost"]) == (False, [study_id], 1)

    def test_why_studies_failed_is_counted(self, store: Store, config: str) -> None:
        add(store, header(1))
        assembly.sweep(store, wants=WANTS[:1], limit_s=100, now=NOW + STEP)
        (job,) = lease(store, "infer", NOW + STEP)
        settled(store, job, "discard", now=NOW + STEP)
        told = CliRunner().invoke(app, ["status", "--ledger", "--json", "--config", config])
        assert told.exit_code == 0
        assert json.loads(told.stdout)["failed_because"] == {"The input is wrong.": 1}

    def test_what_a_destination_is_not_to_get_any_more_is_taken_back_by_who_says_so_twice(self, store: Store, config: str) -> None:
        """Without --yes it is only listed, and what the configuration names is never taken."""
        add(store, header(1))
        assembly.sweep(store, wants=WANTS[:1], limit_s=100, now=NOW + STEP)
        (job,) = lease(store, "infer", NOW + STEP)
        settled(store, job, "report", now=NOW + STEP, destinations=2)
        for job in lease(store, "deliver", NOW + STEP):
            delivered(store, job, "discard", NOW + STEP)
        path = Path(config)
        path.write_text(
            f'{path.read_text("utf-8")}[[destinations]]\nname = "pacs 0"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 1\n', "utf-8"
        )

        def said(*words: str) -> str:
            told = CliRunner().invoke(app, ["withdraw", *words, "--config", config])
            assert told.exit_code == 0, told.output
            return " ".join(told.stdout.split())

        assert "pacs 1 summary 0 1 0 Nothing was changed" in said()
        assert "pacs 1 summary 0 1 0 Nothing was changed" in said("pacs 1")
        assert "Nothing is owed" in said("pacs 0", "--yes")
        assert "Nothing was changed" in said("--yes")
        assert "Withdrawn, to pacs 1: 1." in said("pacs 1", "--yes")
        assert "Nothing is owed" in said()
        none = CliRunner().invoke(app, ["withdraw", "pacs l", "--yes", "--config", config])
        assert (none.exit_code, "the configuration names none" in none.stderr) == (3, True)
        assert accounts(store) == {1: "failed"}
        with store.read() as conn:
            assert [(one.document, one.state) for one in queue.of_study(conn, 1) if one.kind == "deliver"] == [("sr", "discarded")]


@contextmanager
def statements(store: Store) -> Iterator[list[str]]:
    """What is sent to the database meanwhile."""
    seen: list[str] = []

    def note(*args: object) -> None:
        seen.append(str(args[2]))

    sa.event.listen(store.engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(store.engine, "before_cursor_execute", note)


MANY = 100_000
#: Every tenth study is excluded; of the others every hundredth failed at its delivery.
FILL = (
    "INSERT INTO study (id, study_instance_uid, state, version, created_at, last_received_at, quiet_until)"
    " SELECT i, '1.' || i, 'complete', 1, {at}, {at}, {at} FROM n",
    "INSERT INTO event (study_id, at, name, facts)"
    " SELECT i, {at}, CASE WHEN i % 10 = 0 THEN 'study.excluded' ELSE 'study.completed' END, '{{}}' FROM n",
    "INSERT INTO document"
    " (id, study_id, sop_instance_uid, sop_class_uid, kind, bundle, input_version, input_sha256, sha256, data, created_at)"
    " SELECT i, i, '2.' || i, '1', 'sr', 'b', 1, 'x', 'y', {data}, {at} FROM n WHERE i % 10 > 0",
    "INSERT INTO job (kind, study_id, bundle, input_version, unique_key, priority, state, not_before, created_at)"
    " SELECT 'infer', i, 'b', 1, 'i' || i, 1, 'completed', {at}, {at} FROM n WHERE i % 10 > 0",
    "INSERT INTO job"
    " (kind, study_id, bundle, input_version, document_id, destination, unique_key, priority, state, not_before, created_at)"
    " SELECT 'deliver', i, 'b', 1, i, 'p', 'd' || i, 1, CASE WHEN i % 100 = 1 THEN 'discarded' ELSE 'completed' END, {at}, {at}"
    " FROM n WHERE i % 10 > 0",
)


def fill(store: Store) -> None:
    """A hundred thousand studies of as many minutes, made by the database itself."""
    counted = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {MANY})"
    at = "datetime('2026-01-01', i || ' minutes')" if store.is_sqlite else "timestamptz '2026-01-01 00:00Z' + i * interval '1 minute'"
    data = "zeroblob(500)" if store.is_sqlite else "decode(repeat('00', 500), 'hex')"
    with store.begin() as conn:
        for one in FILL:
            insert, select = one.format(at=at, data=data).split(" SELECT ", 1)
            conn.exec_driver_sql(f"{insert} {counted} SELECT {select}".replace("%", "%%" if not store.is_sqlite else "%"))
    if not store.is_sqlite:
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.exec_driver_sql("ANALYZE")


@pytest.mark.requirement("Q8")
def test_a_hundred_thousand_studies_take_one_statement_and_two_seconds(store: Store) -> None:
    """The best of at most nine: other work on the machine, of which a second run of tests is, is not the ledger's."""
    fill(store)
    midnights = [datetime(2026, 3, 11, tzinfo=UTC) - timedelta(days=ago) for ago in range(14)]
    took: list[float] = []
    while len(took) < 9 and min(took, default=9.0) >= 2.0:
        with statements(store) as seen, store.read() as conn:
            began = time.perf_counter()
            found = ledger.entries(conn, midnights)
            took.append(time.perf_counter() - began)
    print(json.dumps({"ledger_s": [round(one, 2) for one in took], "database": store.url.get_backend_name()}))
    assert len([one for one in seen if "SELECT" in one]) == 1
    assert {one.account: sum(e.studies for e in found if e.account == one.account) for one in found} == {
        "delivered": 89_000,
        "failed": 1_000,
        "excluded": 10_000,
    }
    assert min(took) < 2.0
