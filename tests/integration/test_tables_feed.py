"""Tables into real databases: repeated, changed and cut off imports; views of a warehouse, read again from where they ended."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.conftest import Captured
from worker import joining
from worker.config import Config, Records, Site, Table
from worker.domain import Code, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.errors import RecordError
from worker.intake.tables import Tally
from worker.store import feeds, records, schema, warehouse
from worker.store.database import DatabaseUnavailable, Store
from worker.tables_feed import import_tables, read_view

AS_OF = datetime(2024, 1, 1, tzinfo=UTC)
SENTINEL = "ZZSENTINEL"
MAPPING = """
name = "lab"
key_columns = ["nr"]
[patient]
id_column = "pid"
issuer = "HOSP"
name_columns = ["name"]
[time]
column = "drawn"
zone = "UTC"
[status]
column = "state"
[[values]]
column = "crp"
code = ["CRP", "L", "CRP"]
unit = "mg/L"
"""
HEADER = "nr,pid,name,drawn,state,crp"
CHANGED = '[changed]\ncolumn = "changed"\n'


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(site=Site(data=tmp_path, timezone="UTC"), records=Records())


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(MAPPING, "utf-8")
    return path


@pytest.fixture
def drop(tmp_path: Path) -> Callable[..., Path]:
    """Write a table as if so many seconds ago."""

    def write(*rows: str, name: str = "a.csv", age_s: float = 3600.0, header: str = HEADER) -> Path:
        path = tmp_path / "drop" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join((header, *rows, "")), "utf-8")
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
        return path

    return write


Import = Callable[..., Tally]


@pytest.fixture
def take(config: Config, store: Store, mapping: Path) -> Import:
    return lambda *paths, **options: import_tables(paths, mapping, config=config, store=store, **options)


def view(store: Store, patient_id: str) -> PatientRecord:
    with store.read() as conn:
        found = records.view(conn, PatientKey("HOSP", patient_id), as_of=AS_OF)
    assert found is not None
    return found


def values(store: Store, patient_id: str) -> list[float]:
    return sorted(fact.value or 0.0 for fact in view(store, patient_id).observations if fact.status != "W")


def rows(store: Store) -> dict[str, int]:
    """How many rows each table of the record has."""
    with store.read() as conn:
        names = ("patient", "demographics", "observation", "message")
        return {name: int(conn.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar_one()) for name in names}


@pytest.mark.requirement("F13")
def test_importing_twice_adds_nothing(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    path = drop("1,P1,DOE^J,2020-05-06 10:00,F,5", "2,P1,DOE^J,2020-05-07 10:00,F,<6", "3,P2,ROE^R,2020-05-06 10:00,F,7")
    assert take(path).counts == {"row read": 3, "fact read": 3, "fact added": 3}
    before = rows(store)
    assert take(path).counts["fact added"] == 0
    os.utime(path, (1.6e9, 1.6e9))  # a copy has another time
    assert take(path).counts["fact added"] == 0
    assert rows(store) == before
    assert (before["patient"], before["observation"], before["message"]) == (2, 3, 1)
    assert (values(store, "P1"), values(store, "P2"), view(store, "P2").patient.name) == ([5, 6], [7], "ROE^R")


def test_a_changed_row_supersedes_and_a_replayed_file_undoes_nothing(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    first = drop("1,P1,DOE^J,2020-05-06 10:00,F,5", "2,P1,DOE^J,2020-05-07 10:00,F,6", age_s=7200)
    take(first)
    take(drop("1,P1,DOE^J,2020-05-06 10:00,C,50", "2,P1,DOE^J,2020-05-07 10:00,W,", name="b.csv"))
    assert values(store, "P1") == [50]
    assert take(first).counts["fact added"] == 0
    assert values(store, "P1") == [50]


def test_an_export_with_one_row_more_adds_one_fact(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    everything = [f"{n},P{n % 3},DOE^J,2020-05-06 10:00,F,{n}" for n in range(40)]
    take(drop(*everything, age_s=7200))
    before = rows(store)
    assert take(drop("99,P1,DOE^J,2020-05-06 09:00,F,7", *everything)).counts["fact added"] == 1
    assert rows(store) == before | {"observation": before["observation"] + 1, "message": before["message"] + 1}


@pytest.mark.requirement("F4")
def test_a_row_of_somebody_else_is_refused_until_an_admission_says_it_is_right(
    store: Store, take: Import, drop: Callable[..., Path], captured: Captured
) -> None:
    def admit(name: str, day: int) -> None:
        with store.begin() as conn:
            at = datetime(2021, 1, day, tzinfo=UTC)
            records.apply(conn, RecordUpdate(Patient(PatientKey("HOSP", "P1"), name), source="ADT", at=at), now=at)

    admit("SMITH^JOHN", 1)
    path = drop("1,P1,DOE^JANE,2020-05-06 10:00,F,5", "2,P2,ROE^RICHARD,2020-05-06 10:00,F,7")
    for _ in range(2):
        take(path)
        assert (values(store, "P1"), values(store, "P2")) == ([], [7])
    assert "1 patients" in str(captured.named("message.refused")[0]["reason"])
    with store.read() as conn:
        assert feeds.counts(conn) == {"applied": 1, "refused": 1}
    admit("DOE^JANE", 2)
    take(path)
    assert values(store, "P1") == [5]


@pytest.mark.requirement("F4")
def test_a_table_of_patients_says_who_somebody_is_as_an_admission_does(
    config: Config, store: Store, take: Import, drop: Callable[..., Path], tmp_path: Path
) -> None:
    """A site without ADT corrects who somebody is by a table; the last said counts, not the last read."""
    who = tmp_path / "who.toml"
    who.write_text(
        'name = "who"\nkey_columns = ["pid"]\n[patient]\nid_column = "pid"\nissuer = "HOSP"\nname_columns = ["name"]\nadmission = true\n'
        '[time]\ncolumn = "changed"\nzone = "UTC"\n[changed]\ncolumn = "changed"\n'
    )

    def admit(name: str, day: int) -> None:
        import_tables([drop(f"P1,{name},2021-01-0{day}", name=f"{day}.csv", header="pid,name,changed")], who, config=config, store=store)

    rows = ("1,P1,DOE^JANE,2020-05-06 10:00,F,5", "2,P1,SMITH^JOHN,2020-05-06 11:00,F,7")
    path = drop(*rows)
    take(path)
    assert values(store, "P1") == [5, 7]  # nobody knows which is wrong
    admit("DOE^JANE", 3)
    admit("SMITH^JOHN", 2)  # read last, said before
    record = view(store, "P1")
    known = joining.admitted(record.admissions, record.keys)
    assert known is not None
    assert known.name == "DOE^JANE"
    assert [one.value for one in joining.own(view(store, "P1"), joining.MUST_AGREE).observations] == [5]
    take(drop("3,P1,SMITH^JOHN,2020-05-06 12:00,F,9", name="later.csv"))
    assert values(store, "P1") == [5, 7]  # refused


def test_a_folder_is_read_in_the_order_in_which_it_was_written(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    drop("1,P1,NEW^J,2020-05-06 10:00,F,50", name="a.csv", age_s=60)
    take(drop("1,P1,OLD^J,2020-05-06 10:00,F,5", name="b.csv", age_s=7200).parent)
    assert (values(store, "P1"), view(store, "P1").patient.name) == ([50], "NEW^J")


def test_with_a_time_of_change_the_last_changed_stands_in_whatever_order_files_come(
    store: Store, take: Import, mapping: Path, drop: Callable[..., Path]
) -> None:
    mapping.write_text(MAPPING + CHANGED, "utf-8")
    for changed, value in (("2020-05-08 10:00", 50), ("2020-05-07 10:00", 5), ("2020-05-06 10:00", 50)):
        take(drop(f"1,P1,N{value}^J,2020-05-06 10:00,F,{value},{changed}", header=f"{HEADER},changed"))
    assert values(store, "P1") == [50]
    take(drop("1,P1,BACK^J,2020-05-06 10:00,F,5,2020-05-09 10:00", header=f"{HEADER},changed"))
    assert (values(store, "P1"), view(store, "P1").patient.name) == ([5], "BACK^J")


@pytest.mark.requirement("F13")
def test_a_dry_run_changes_nothing(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    before = rows(store)
    tally = take(drop("1,P1,DOE^J,2020-05-06 10:00,F,5", "2,P1,DOE^J,never,F,5"), dry_run=True)
    assert rows(store) == before
    assert tally.counts == {"row read": 1, "fact read": 1, "refused": 1}
    assert tally.facts == {"crp (CRP L)": 1}


@pytest.mark.requirement("F13")
def test_a_drop_folder_leaves_what_is_being_written_for_the_next_time(
    store: Store, take: Import, drop: Callable[..., Path], captured: Captured
) -> None:
    drop("1,P1,DOE^J,2020-05-06 10:00,F,5", name="whole.csv")
    half = drop("2,P1,DOE^J,2020-05-06 11:00,F,6", name="half.csv")
    half.write_bytes(half.read_bytes()[:-5])
    os.utime(half, (1.6e9, 1.6e9))
    assert take(half.parent).counts["file left for the next time"] == 1
    assert values(store, "P1") == [5]
    captured.clear()
    assert "half written" in next(iter(take(half).reasons))
    with store.read() as conn:
        assert feeds.rejected(conn, limit=9) == []  # it is taken the next time
    assert [one["result"] for one in captured.named("message.refused")] == ["left out"]
    drop("2,P1,DOE^J,2020-05-06 11:00,F,6", name="half.csv")
    assert take(half.parent).counts["file left for the next time"] == 0
    assert values(store, "P1") == [5, 6]


@pytest.mark.requirement("F12")
@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "Robert'); DROP TABLE patient;--", "%s%n{0.__class__}"])
def test_formulas_and_sql_go_in_and_come_out_as_they_are(store: Store, take: Import, drop: Callable[..., Path], text: str) -> None:
    take(drop(f"{text},{text},{text},2020-05-06 10:00,F,5"))
    assert (view(store, text).patient.name, values(store, text)) == (text, [5])


def test_refused_rows_are_shown_once_and_without_their_content(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    path = drop(f"1,P1,DOE^J,2020-05-06 10:00,F,{SENTINEL}", "2,P1,DOE^J,2020-05-06 10:00,F,5")
    take(path)
    tally = take(path)
    assert [(line, reason) for _, line, reason in tally.errors] == [(2, "Column 'crp' is no number with '.' as its decimal sign.")]
    with store.read() as conn:
        ((_, _, sender, trigger, reason),) = feeds.rejected(conn, limit=9)
    assert (sender, trigger) == ("lab", "CSV")
    assert reason.startswith("1 rows were refused, the first at row 2")
    assert SENTINEL not in reason


def test_the_sites_codes_and_patient_ids_are_the_sites(
    config: Config, store: Store, mapping: Path, drop: Callable[..., Path], shared_mapping: Records
) -> None:
    import_tables([drop("1,0012,,2020-05-06,F,5")], mapping, config=replace(config, records=shared_mapping), store=store)
    (fact,) = view(store, "12").observations
    assert fact.code == Code("1988-5", "LN", "CRP")


@pytest.fixture
def shared_mapping() -> Records:
    from worker.config import CodeMapping, PatientIds

    one = CodeMapping(local=("CRP", "L"), standard=("1988-5", "LN", "CRP"))
    return Records(mappings=(one,), patient_ids=PatientIds(strip_leading_zeros=True))


def test_an_import_that_was_cut_off_goes_on_where_it_ended(
    store: Store, take: Import, drop: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = drop(*(f"{n},P{n % 7},,2020-05-06,F,{n}" for n in range(1200)))
    real, calls = records.apply_all, 0

    def fails(conn: object, updates: Sequence[RecordUpdate], **options: object) -> int:
        nonlocal calls
        calls += 1
        added = real(conn, updates, **options)  # type: ignore[arg-type]
        if calls > 1:
            raise DatabaseUnavailable("The database is not available: gone.")
        return added

    monkeypatch.setattr(records, "apply_all", fails)
    with pytest.raises(DatabaseUnavailable):
        take(path)
    assert rows(store)["observation"] == 500
    monkeypatch.setattr(records, "apply_all", real)
    assert take(path).counts["fact added"] == 700
    assert rows(store)["observation"] == 1200


@pytest.mark.requirement("F13")
def test_a_batch_takes_as_many_statements_whatever_rows_and_patients_it_has(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    """A million rows are two thousand batches; with some statements a row it was hours."""
    statements: list[str] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda _conn, _cursor, statement, *_rest: statements.append(statement))

    def counted(path: Path) -> int:
        statements.clear()
        take(path)
        return len(statements)

    few = [f"{n},F{n},DOE^J,2020-05-06 10:{n:02},F,{n}" for n in range(2)]
    many = [f"{n},M{n % 100},ROE^R,2020-05-06 10:{n % 60:02},F,{n}" for n in range(400)]
    several = counted(drop(*few, name="few.csv"))
    assert 0 < several <= 25
    assert counted(drop(*many, name="many.csv")) == several
    assert counted(drop(*many[:300], name="known.csv")) <= several
    assert rows(store)["observation"] == 402


@pytest.mark.requirement("F13")
@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
@pytest.mark.slow
def test_many_rows_are_taken_and_taken_again(store: Store, take: Import, drop: Callable[..., Path]) -> None:
    path = drop(*(f"{n},P{n // 20},,2020-05-06 10:{n % 60:02},F,{n}" for n in range(20_000)))
    seen: list[int] = []
    assert take(path, progress=seen.append).counts["fact added"] == 20_000
    assert sum(seen) == path.stat().st_size
    assert take(path).counts["fact added"] == 0
    assert len(values(store, "P999")) == 20


def test_a_real_table_is_taken_whole(config: Config, store: Store, tmp_path: Path, shared: Path) -> None:
    path = tmp_path / "labels.toml"
    path.write_text(
        'name = "icu"\nkey_columns = ["study_instance_uid"]\n[patient]\nid_column = "patient_id"\nissuer = "MHH"\n'
        '[time]\ncolumn = "study_datetime"\nzone = "Europe/Berlin"\n'
        '[[values]]\ncolumn = "in_icu"\ncode = ["ICU", "L", "in intensive care"]\n'
        '[[values]]\ncolumn = "died"\ncode = ["DIED", "L", "died"]\n',
        "utf-8",
    )
    tally = import_tables([shared / "data" / "cxr-severity" / "labels.csv"], path, config=config, store=store)
    assert tally.reasons == {}
    assert tally.counts == {"row read": 188, "fact read": 376, "fact added": 376}


# --- views of a warehouse


@pytest.fixture
def site(tmp_path: Path) -> sqlite3.Connection:
    """The site's warehouse."""
    conn = sqlite3.connect(tmp_path / "site.db", isolation_level=None)
    conn.execute("CREATE TABLE lab (nr INTEGER PRIMARY KEY, pid TEXT, name TEXT, drawn TEXT, state TEXT, crp REAL, changed INTEGER)")
    return conn


@pytest.fixture
def table(tmp_path: Path, mapping: Path, site: sqlite3.Connection) -> Table:
    mapping.write_text(f'{MAPPING}{CHANGED}formats = ["number"]\nstart = 0\n', "utf-8")
    query = "SELECT nr, pid, name, drawn, state, crp, changed FROM lab WHERE changed >= :since ORDER BY changed"
    return Table(name="warehouse", database=f"sqlite:///{tmp_path / 'site.db'}", query=query, mapping=mapping)


def put(site: sqlite3.Connection, nr: int, crp: object, changed: int, *, state: str = "F") -> None:
    row = (nr, "P1", "DOE^J", "2020-05-06 10:00", state, crp, changed)
    site.execute("INSERT OR REPLACE INTO lab VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def test_a_view_is_read_on_from_where_it_ended(
    config: Config, store: Store, site: sqlite3.Connection, table: Table, captured: Captured
) -> None:
    put(site, 1, 5.5, 10)
    put(site, 2, 6.5, 11)
    assert read_view(table, config=config, store=store) == 11
    before = rows(store)
    assert read_view(table, config=config, store=store) == 11
    assert read_view(table, config=config, store=store) == 11
    assert rows(store)["observation"] == before["observation"] == 2
    put(site, 3, 7.5, 12)
    put(site, 1, 50.5, 13, state="C")
    site.execute("DELETE FROM lab WHERE nr = 2")  # that a row is gone says nothing
    assert read_view(table, config=config, store=store) == 13
    with store.read() as conn:
        assert warehouse.watermark(conn, "warehouse") == 13
    assert values(store, "P1") == [6.5, 7.5, 50.5]
    assert captured == []


def test_a_watermark_is_kept_as_the_database_gave_it(store: Store) -> None:
    now, numbers = datetime(2024, 1, 1, tzinfo=UTC), set[int]()
    for reached in (now, now.replace(tzinfo=None), now.date(), 2**40, "2024-01-01 00:00:00.5"):
        with store.begin() as conn:
            warehouse.note_watermark(conn, "w", reached, now=now)
        with store.read() as conn:
            assert warehouse.watermark(conn, "w") == reached
            numbers.add(conn.execute(sa.select(schema.message.c.id)).scalar_one())
    assert len(numbers) == 1, "one row, changed in place: a row deleted and made anew at each reading bloats the table"
    with store.begin() as conn, pytest.raises(RecordError):
        warehouse.note_watermark(conn, "w", SENTINEL, now=now)


def test_a_view_of_postgresql_is_read_with_times_and_numerics(
    config: Config, tmp_path: Path, mapping: Path, postgres_url: str, captured: Captured
) -> None:
    """Also that the transaction may not write."""
    mapping.write_text(f"{MAPPING}{CHANGED}start = 2020-01-01T00:00:00Z\noverlap = 60\n", "utf-8")
    engine = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    own = Store(f"sqlite:///{tmp_path / 'own.db'}")
    own.migrate()
    with engine.connect() as site:
        site.exec_driver_sql(
            "CREATE TABLE lab (nr bigint, pid text, name text, drawn timestamp, state char(1), crp numeric, changed timestamptz)"
        )
        site.exec_driver_sql(
            "INSERT INTO lab SELECT n, 'P1', 'DOE^J', '2020-05-06 10:00', 'F', n / 10.0, timestamptz '2020-05-07 00:00+02' "
            "+ n * interval '1 second' FROM generate_series(1, 1200) n"
        )
    query = "SELECT * FROM lab WHERE changed > :since"
    table = Table(name="w", database=postgres_url, query=query, mapping=mapping)
    assert read_view(table, config=config, store=own) == datetime(2020, 5, 6, 22, 20, tzinfo=UTC)
    assert read_view(table, config=config, store=own) == datetime(2020, 5, 6, 22, 20, tzinfo=UTC)
    assert rows(own)["observation"] == 1200
    assert (values(own, "P1")[0], captured) == (0.1, [])
    with engine.connect() as site:
        site.exec_driver_sql(
            "CREATE FUNCTION wipe() RETURNS bigint LANGUAGE sql AS 'WITH gone AS (DELETE FROM lab RETURNING nr) SELECT count(*) FROM gone'"
        )
    read_view(replace(table, query="SELECT *, wipe() FROM lab WHERE changed > :since"), config=config, store=own)
    assert "25006" in str(captured.named("sweep.failed")[0]["reason"])  # read_only_sql_transaction
    own.close()
    engine.dispose()


@pytest.mark.parametrize(
    ("database", "query", "sentence"),
    [
        ("postgresql+psycopg://u:{}@127.0.0.1:1/x", "SELECT :since AS a", "does not answer"),
        ("sqlite:////nowhere/{}.db", "SELECT :since AS a", "does not answer"),
        ("nosuch://u:{}@host/x", "SELECT :since AS a", "is no URL"),
        ("{} no url", "SELECT :since AS a", "is no URL"),
        ("", "SELECT '{}' FROM nowhere WHERE :since", "refuses the query"),
        ("", "SELECT '{}' AS a", "takes :since"),
        ("", "SELECT '{}' AS a WHERE :since < :until", "takes :since"),
        ("", "DELETE FROM lab WHERE :since < '{}'", "SELECT or WITH"),
        ("", "SELECT '{}' AS a WHERE :since = 0", "no column 'nr'"),
        ("", "SELECT nr, pid, name, drawn, state, crp, '{}' AS changed FROM lab WHERE changed > :since", "another type"),
        ("", "SELECT nr, pid, name, drawn, state, '{}' AS crp, changed FROM lab WHERE changed > :since", "no number"),
    ],
)
@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_an_error_is_one_event_without_content_or_password(
    config: Config, store: Store, site: sqlite3.Connection, table: Table, captured: Captured, database: str, query: str, sentence: str
) -> None:
    put(site, 1, 5.5, 10)
    wrong = replace(table, database=database.format(SENTINEL) or table.database, query=query.format(SENTINEL))
    read_view(wrong, config=config, store=store)
    ((name, facts),) = captured
    assert name == "sweep.failed"
    assert sentence in str(facts["reason"])
    assert SENTINEL not in repr(captured)
    assert rows(store)["observation"] == 0
    assert site.execute("SELECT count(*) FROM lab").fetchone() == (1,)


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_our_own_database_away_leaves_the_watermark_where_it_was(
    config: Config, store: Store, site: sqlite3.Connection, table: Table, captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(site, 1, 5.5, 10)

    def gone(*_args: object, **_options: object) -> int:
        raise DatabaseUnavailable("The database is not available: gone.")

    with monkeypatch.context() as patch:
        patch.setattr(records, "apply_all", gone)
        assert read_view(table, config=config, store=store) == 0
    assert len(captured.named("sweep.failed")) == 1
    assert read_view(table, config=config, store=store) == 10
    assert values(store, "P1") == [5.5]
