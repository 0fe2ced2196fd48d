"""Tables: a strict mapping, rows that say what they say and nothing that is guessed, files that are not whole left alone."""

from __future__ import annotations

import codecs
import os
import re
import tracemalloc
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.domain import Code, Observation, Patient, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake.table_mapping import ChangedColumn, PatientColumns, StatusColumn, TableMapping, TimeColumn, ValueColumns, read_mapping
from worker.intake.table_rows import RowReader, Words
from worker.intake.tables import BATCH_ROWS, Tally, import_table

CRP = Code("1988-5", "LN", "CRP")
LONG = """
name = "lab"
key_columns = ["nr"]
[patient]
id_column = "pid"
issuer = "HOSP"
name_columns = ["family", "given"]
birth_date_column = "born"
birth_date_formats = ["%d.%m.%Y"]
sex_column = "sex"
sex_words = { w = "F" }
[time]
column = "drawn"
formats = ["%d.%m.%Y %H:%M", "%d.%m.%Y", "iso"]
zone = "Europe/Berlin"
[status]
column = "state"
words = { ok = "F", fixed = "C", void = "W" }
[[values]]
column = "value"
text_column = "words"
code_column = "code"
scheme = "LN"
unit_column = "unit"
"""
COLUMNS = ("nr", "pid", "family", "given", "born", "sex", "drawn", "state", "value", "words", "code", "unit")
WIDE = """
name = "wide"
key_columns = ["pid", "drawn"]
[patient]
id_column = "pid"
issuer_column = "from"
[time]
column = "drawn"
[[values]]
column = "crp"
code = ["1988-5", "LN", "CRP"]
unit = "mg/L"
[[values]]
column = "ldh"
code = ["2532-0", "LN", "LDH"]
unit = "U/L"
"""
ROW = ("17", "P1", "DOE", "JANE", "03.02.1950", "w", "06.05.2020 14:28", "ok", "5", "", "1988-5", "mg/L")
#: A mapping without a file, for properties.
PLAIN = TableMapping(
    name="lab",
    key_columns=("nr",),
    patient=PatientColumns(id_column="pid", issuer="HOSP", name_columns=("family", "given"), birth_date_column="born", sex_column="sex"),
    time=TimeColumn(column="drawn"),
    values=(ValueColumns(column="value", text_column="words", code_column="code", scheme="LN", unit_column="unit"),),
)
SENTINEL = "ZZSENTINEL"


@pytest.fixture
def mapping(tmp_path: Path) -> Callable[..., TableMapping]:
    def make(text: str = LONG, **top: str) -> TableMapping:
        path = tmp_path / "mapping.toml"
        path.write_text("\n".join(f"{key} = '{value}'" for key, value in top.items()) + text, "utf-8")
        return read_mapping(path)

    return make


@pytest.fixture
def update(mapping: Callable[..., TableMapping]) -> Callable[..., RecordUpdate]:
    """What one row says, some of its cells another."""

    def read(_decimal: str = ".", **cells: Any) -> RecordUpdate:
        row = [cells.get(name, value) for name, value in zip(COLUMNS, ROW, strict=True)]
        return RowReader(mapping(decimal=_decimal), COLUMNS, Words()).update(row)

    return read


@pytest.fixture
def csv(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str, raw: bytes | None = None, encoding: str = "utf-8", age_s: float = 60.0) -> Path:
        path = tmp_path / "table.csv"
        path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding) if raw is None else raw)
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
        return path

    return write


class Applied(list[RecordUpdate]):
    """Updates in the order in which they were committed."""

    def __call__(self, updates: list[RecordUpdate]) -> int:
        self.extend(updates)
        return sum(len(one.observations) for one in updates)

    @property
    def facts(self) -> list[Observation]:
        return [fact for one in self for fact in one.observations]


WIDE_HEADER = "pid,from,drawn,crp,ldh"


# --- the mapping


def test_the_example_mapping_is_read_and_has_every_key() -> None:
    path = Path(__file__).parents[2] / "deploy" / "tables.example.toml"
    assert read_mapping(path).name == "lab"
    text = path.read_text("utf-8")
    for section in (TableMapping, PatientColumns, TimeColumn, StatusColumn, ChangedColumn, ValueColumns):
        for name in section.__dataclass_fields__:
            assert re.search(rf"\b{name}\b", text), name


def test_an_unknown_key_is_an_error_that_names_the_nearest_right_one(mapping: Callable[..., TableMapping]) -> None:
    with pytest.raises(RecordError, match=r"unknown key 'delimeter' in \[top level\]\. Did you mean 'delimiter'"):
        mapping(delimeter=";")
    with pytest.raises(RecordError, match=r"unknown key 'unit_colum' in \[values\]\. Did you mean 'unit_column'"):
        mapping(LONG.replace("unit_column", "unit_colum"))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('key_columns = ["nr"]', "key_columns = []", "key_columns must name at least one"),
        ('key_columns = ["nr"]', "", "needs the key 'key_columns'"),
        ('key_columns = ["nr"]', 'key_columns = "nr"', "key_columns must be a list"),
        ('name = "lab"', 'name = "a/b"', "name must be"),
        ('issuer = "HOSP"', "", "issuer or issuer_column"),
        ('w = "F"', 'w = "W"', "none of M, F, O"),
        ('void = "W"', 'void = "gone"', "none of F, C, P, D, W, X"),
        ('scheme = "LN"', "", "scheme or scheme_column"),
        ('code_column = "code"', "", r"code = \[code, scheme, meaning\]"),
        ('"iso"]\nzone', '"%A"]\nzone', "'%A' is neither 'iso'"),
        ("Europe/Berlin", "Europe/Atlantis", "no zone 'Europe/Atlantis'"),
        ('name = "lab"', 'name = "lab"\nencoding = "klingon"', "'klingon' is none that is known"),
        ('name = "lab"', 'name = "lab"\nencoding = "hex"', "'hex' is none that is known"),
        ('name = "lab"', 'name = "lab"\ndelimiter = ";;"', "delimiter must be one character"),
        ('name = "lab"', 'name = "lab"\ndecimal = "x"', "decimal is"),
        ('name = "lab"', "name = true", "name must be text"),
        ('sex_column = "sex"', "admission = 1", "patient.admission must be true or false"),
        ('sex_column = "sex"', "admission = true", r"admission needs \[changed\] with a time"),
    ],
)
def test_a_mapping_that_says_too_little_or_wrong_is_refused(
    mapping: Callable[..., TableMapping], old: str, new: str, sentence: str
) -> None:
    assert old in LONG
    with pytest.raises(RecordError, match=sentence):
        mapping(LONG.replace(old, new))


ADMISSION = """
name = "who"
key_columns = ["pid"]
[patient]
id_column = "pid"
issuer = "HOSP"
sex_column = "sex"
admission = true
[time]
column = "changed"
zone = "UTC"
[changed]
column = "changed"
"""


def test_a_table_of_patients_needs_no_values_but_a_word_of_who_somebody_is_and_a_time(mapping: Callable[..., TableMapping]) -> None:
    reader = RowReader(mapping(ADMISSION), ("pid", "sex", "changed"), Words())
    told = reader.update(("P1", "F", "2021-01-02 10:00"))
    assert (told.has_demographics, told.patient.sex, told.at, told.observations) == (True, "F", datetime(2021, 1, 2, 10, tzinfo=UTC), ())
    assert not reader.update(("P1", "", "2021-01-02 10:00")).has_demographics
    for cell, sentence in (("", "'changed' is empty"), (7, "needs a time")):
        with pytest.raises(RecordError, match=sentence):
            reader.update(("P1", "F", cell))
    with pytest.raises(RecordError, match="needs name_columns, birth_date_column or sex_column"):
        mapping(ADMISSION.replace('sex_column = "sex"', ""))
    with pytest.raises(RecordError, match=r"needs \[\[values\]\], at least once, unless"):
        mapping(ADMISSION.replace("admission = true", ""))
    with pytest.raises(RecordError, match="with a time"):
        mapping(f'{ADMISSION}formats = ["number"]\n')


# --- one row


def test_a_row_says_who_what_and_when(update: Callable[..., RecordUpdate]) -> None:
    at = datetime(2020, 5, 6, 12, 28, tzinfo=UTC)
    fact = Observation(Code("1988-5", "LN", ""), at, 5.0, unit="mg/L", key="lab/17/value", source="lab")
    patient = Patient(PatientKey("HOSP", "P1"), "DOE^JANE", "19500203", "F")
    assert update() == RecordUpdate(patient, (fact,), "lab", has_demographics=False)


@pytest.mark.parametrize(
    ("cell", "decimal", "value", "comparator"),
    [
        ("<5", ".", 5.0, "<"), ("≤ 0.1", ".", 0.1, "<="), (">=7", ".", 7.0, ">="), ("-1.5e3", ".", -1500.0, ""), ("5,25", ",", 5.25, ""),
        ("=3", ".", 3.0, ""), (Decimal("4.50"), ",", 4.5, ""), (7, ",", 7.0, ""), (0.25, ",", 0.25, ""),
    ],
)  # fmt: skip
def test_a_number_is_read_with_its_comparator(
    update: Callable[..., RecordUpdate], cell: object, decimal: str, value: float, comparator: str
) -> None:
    (fact,) = update(decimal, value=cell).observations
    assert (fact.value, fact.comparator) == (value, comparator)


@pytest.mark.requirement("F10")
@pytest.mark.parametrize(
    ("cell", "decimal"),
    [("1,234", "."), ("1.234", ","), ("1.234,5", ","), ("5 mg", "."), ("NaN", "."), (float("nan"), "."), (Decimal("Infinity"), "."),
     ("~5", "."), ("1e999", "."), (10**200, "."), ("٣", "."), ("=1+1", "."), (b"5", "."), ("5\0", ".")],
)  # fmt: skip
def test_what_is_not_clearly_a_number_is_refused_and_not_repeated(update: Callable[..., RecordUpdate], cell: object, decimal: str) -> None:
    with pytest.raises(RecordError, match="'value'") as caught:
        update(decimal, value=cell)
    if isinstance(cell, str):
        assert cell.strip("\0") not in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "at"),
    [
        ("06.05.2020", "2020-05-06T21:59:59+00:00"),  # by its day alone it may be later than that day's study
        ("2020-05-06 14:28", "2020-05-06T12:28:00+00:00"),
        ("2020-05-06T14:28:09.5Z", "2020-05-06T14:28:09.500000+00:00"),
        ("2020-05-06 14:28:09+02", "2020-05-06T12:28:09+00:00"),
        ("25.10.2020 02:30", "2020-10-25T01:30:00+00:00"),  # the clock shows it twice: the second
        ("2020-05", "2020-05-31T21:59:59+00:00"),
        (datetime(2020, 5, 6, 14, 28), "2020-05-06T12:28:00+00:00"),  # noqa: DTZ001  as a database gives it
        (datetime(2020, 5, 6, 14, 28, tzinfo=timezone(timedelta(hours=-5))), "2020-05-06T19:28:00+00:00"),
        (date(2020, 5, 6), "2020-05-06T21:59:59+00:00"),
    ],
)
def test_a_time_is_the_last_instant_it_may_mean(update: Callable[..., RecordUpdate], cell: object, at: str) -> None:
    assert update(drawn=cell).observations[0].at.isoformat() == at


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ({"drawn": ""}, "Column 'drawn' is empty"),
        ({"drawn": "31.02.2020 10:00"}, "Column 'drawn' is no time"),
        ({"drawn": "0001-01-01T00:00:00+14:00"}, "Column 'drawn' is no time"),
        ({"pid": "  "}, "nobody's"),
        ({"pid": 12345.0}, "floating-point"),
        ({"pid": "9" * 65}, "more than 64"),
        ({"nr": ""}, "key columns are empty"),
        ({"sex": "x"}, "sex_words"),
        ({"born": "1950-02-03"}, "birth_date_formats"),
        ({"state": "perhaps"}, "status"),
        ({"state": ""}, "status"),
        ({"code": ""}, "'code' is empty"),
    ],
)
def test_a_row_that_is_not_understood_is_refused_whole(
    update: Callable[..., RecordUpdate], cells: dict[str, object], sentence: str
) -> None:
    with pytest.raises(RecordError, match=sentence):
        update(**cells)


def test_a_withdrawn_row_says_so_without_a_value_and_an_empty_one_says_nothing(update: Callable[..., RecordUpdate]) -> None:
    (fact,) = update(value="", state="void").observations
    assert (fact.value, fact.status, fact.key) == (None, "W", "lab/17/value")
    assert update(value="").observations == ()


def test_a_text_is_taken_where_there_is_no_number(update: Callable[..., RecordUpdate]) -> None:
    (fact,) = update(value="", words="line one\r\nline two").observations
    assert (fact.kind, fact.value, fact.text, fact.unit) == ("text", None, "line one\nline two", "")


def test_no_key_is_the_beginning_of_another_rows(update: Callable[..., RecordUpdate]) -> None:
    """A withdrawn fact withdraws those whose keys go on after it and a slash."""
    assert not update(nr="17/value/x").observations[0].key.startswith(f"{update(nr='17').observations[0].key}/")


@pytest.mark.requirement("F12")
@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1-1", "@SUM(A1)", "Robert'); DROP TABLE patient;--", "%s%n{0.__class__}", "${x}"])
def test_formulas_and_sql_are_texts(update: Callable[..., RecordUpdate], text: str) -> None:
    made = update(value="", words=text, nr=text)
    assert made.observations[0].text == text
    with pytest.raises(RecordError) as caught:
        update(value=f"{text}{SENTINEL}")
    assert SENTINEL not in str(caught.value)


CELLS = st.one_of(st.text(max_size=12), st.none(), st.floats(), st.integers(), st.binary(max_size=4), st.datetimes(), st.decimals())


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a loaded machine
@given(st.dictionaries(st.integers(0, 11), CELLS, max_size=3))
def test_any_row_is_an_update_or_a_sentence(cells: dict[int, object]) -> None:
    plain = ("17", "P1", "DOE", "JANE", "1950-02-03", "F", "2020-05-06 14:28", "", "5", "", "1988-5", "mg/L")
    reader = RowReader(PLAIN, COLUMNS, Words())
    row = [cells.get(position, cell) for position, cell in enumerate(plain)]
    try:
        made = reader.update(row)
    except RecordError:
        return
    assert made.patient.key.patient_id
    assert all(fact.at.tzinfo is UTC for fact in made.observations)


# --- files


def test_a_wide_table_is_a_fact_for_each_cell_grouped_by_patient(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    applied = Applied()
    path = csv(
        WIDE_HEADER, "P1,HOSP,2020-05-06,5,200", "P2,HOSP,2020-05-06,,300", "P1,OTHER,2020-05-06,7,", "P1,HOSP,2020-05-07,6,", ",,,,", ""
    )
    tally = import_table(path, mapping(WIDE), apply=applied)
    values = {
        (one.patient.key.issuer, one.patient.key.patient_id): [(f.code.meaning, f.value) for f in one.observations] for one in applied
    }
    assert values == {
        ("HOSP", "P1"): [("CRP", 5), ("LDH", 200), ("CRP", 6)],
        ("HOSP", "P2"): [("LDH", 300)],
        ("OTHER", "P1"): [("CRP", 7)],
    }
    assert not any(one.has_demographics for one in applied)
    assert tally.counts == {"row read": 4, "fact read": 5, "fact added": 5}
    assert tally.facts == {"crp (1988-5 LN)": 3, "ldh (2532-0 LN)": 2}


def test_a_dry_run_reads_everything_and_commits_nothing(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    applied = Applied()
    path = csv(WIDE_HEADER, "P1,HOSP,2020-05-06,5,200", "P1,HOSP,2020-05-06,five,200")
    tally = import_table(path, mapping(WIDE), apply=applied, dry_run=True)
    assert applied == []
    assert tally.counts == {"row read": 1, "fact read": 2, "refused": 1}


def refused(tally: Tally) -> list[tuple[int, str]]:
    return [(line, reason) for _, line, reason in tally.errors]


@pytest.mark.requirement("F13")
def test_bad_rows_are_told_by_line_and_never_by_content(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    applied = Applied()
    lines = [
        WIDE_HEADER,
        f"P1,HOSP,2020-05-06,{SENTINEL},1",
        f"P1,HOSP,2020-05-06,5,1,{SENTINEL}",
        f"{SENTINEL},HOSP",
        "P2,HOSP,2020-05-06,5\0,1",
        f'P3,HOSP,"2020-05-06"{SENTINEL},5,1',
        "",
        "P4,HOSP,2020-05-06,8,",
    ]
    tally = import_table(csv(*lines), mapping(WIDE), apply=applied)
    assert [line for line, _ in refused(tally)] == [2, 3, 4, 5, 6]
    assert SENTINEL not in repr(tally)
    assert tally.counts["refused"] == sum(tally.reasons.values()) == 5
    assert [fact.value for fact in applied.facts] == [8]


@pytest.mark.requirement("F13")
def test_an_open_quote_costs_its_own_line_only(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    applied = Applied()
    rows = [f"P{n},HOSP,2020-05-06,{n},1" for n in range(50)]
    rows[3] = 'P3,HOSP,"2020-05-06,3,1'
    rows[9] = 'P9,HOSP,"2020-05-06","9",1'
    tally = import_table(csv(WIDE_HEADER, *rows), mapping(WIDE), apply=applied)
    assert [line for line, _ in refused(tally)] == [5]
    assert [one.patient.key.patient_id for one in applied] == [f"P{n}" for n in range(50) if n != 3]


def test_a_report_of_several_lines_is_one_field_and_the_lines_are_counted(
    mapping: Callable[..., TableMapping], csv: Callable[..., Path]
) -> None:
    applied = Applied()
    row = list(ROW)
    row[8], row[9] = "", '"first ""quoted"" line\nsecond\n"'
    tally = import_table(csv(",".join(COLUMNS), ",".join(row), "bad"), mapping(), apply=applied)
    assert applied.facts[0].text == 'first "quoted" line\nsecond'
    assert [line for line, _ in refused(tally)] == [5]


@pytest.mark.requirement("F13")
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", codecs.BOM_UTF8), ("utf-8", b""), ("cp1252", b""), ("utf-16", b""), ("utf-16-le", codecs.BOM_UTF16_LE), ("gb18030", b"")],
)
def test_encodings_and_byte_order_marks_are_understood(
    mapping: Callable[..., TableMapping], csv: Callable[..., Path], encoding: str, mark: bytes
) -> None:
    applied = Applied()
    text = "pid;born;drawn;crp;né\r\nP1;x;2020-05-06;5,5;1\r\n"
    wide = WIDE.replace('issuer_column = "from"', 'issuer = "HOSP"\nname_columns = ["né"]')
    path = csv(raw=mark + text.encode(encoding))
    import_table(
        path, mapping(wide.replace('[[values]]\ncolumn = "ldh"\ncode = ["2532-0", "LN", "LDH"]\nunit = "U/L"\n', ""),
                      encoding=encoding, delimiter=";", decimal=","), apply=applied
    )  # fmt: skip
    assert [(one.patient.key.patient_id, one.patient.name, one.observations[0].value) for one in applied] == [("P1", "1", 5.5)]


@pytest.mark.requirement("F13")
def test_a_file_of_another_encoding_is_one_clear_error_and_a_bad_line_costs_itself(
    mapping: Callable[..., TableMapping], csv: Callable[..., Path]
) -> None:
    with pytest.raises(RecordError, match="byte order mark of utf-16, the mapping says utf-8"):
        import_table(csv(raw=f"{WIDE_HEADER}\n".encode("utf-16") + b"\n"), mapping(WIDE), apply=Applied())
    with pytest.raises(RecordError, match="NUL bytes"):
        import_table(csv(raw=f"{WIDE_HEADER}\n".encode("utf-16-be")), mapping(WIDE), apply=Applied())
    applied = Applied()
    rows = f"{WIDE_HEADER}\nP1,HOSP,2020-05-06,1,\nM\xfcller,HOSP,2020-05-06,2,\nP3,HOSP,2020-05-06,3,\n".encode("latin-1")
    tally = import_table(csv(raw=rows), mapping(WIDE), apply=applied)
    assert refused(tally) == [(3, "The line is not utf-8, which the mapping says the file is.")]
    assert [fact.value for fact in applied.facts] == [1, 3]


@pytest.mark.requirement("F13")
def test_a_header_that_is_not_the_mappings_is_refused_without_being_repeated(
    mapping: Callable[..., TableMapping], csv: Callable[..., Path]
) -> None:
    with pytest.raises(RecordError, match="Columns 1 and 6 have the same name"):
        import_table(csv(f"{WIDE_HEADER},pid", "a,b,c,d,e,f"), mapping(WIDE), apply=Applied())
    with pytest.raises(RecordError, match="no column 'pid'") as caught:
        import_table(csv(f"{SENTINEL},HOSP,2020-05-06,5,1"), mapping(WIDE), apply=Applied())
    assert SENTINEL not in str(caught.value)


@pytest.mark.requirement("F13")
def test_a_file_that_may_still_be_being_written_is_left_alone(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    applied, row = Applied(), "P1,HOSP,2020-05-06,5,1"
    with pytest.raises(RecordError, match="changed less than 5 s ago"):
        import_table(csv(WIDE_HEADER, row, age_s=0), mapping(WIDE), apply=applied)
    with pytest.raises(RecordError, match="in the future"):
        import_table(csv(WIDE_HEADER, row, age_s=-3600), mapping(WIDE), apply=applied)
    with pytest.raises(RecordError, match="no line end"):
        import_table(csv(raw=f"{WIDE_HEADER}\n{row}".encode()), mapping(WIDE), apply=applied)
    with pytest.raises(RecordError, match="is empty"):
        import_table(csv(raw=b""), mapping(WIDE), apply=applied)
    assert applied == []


@pytest.mark.requirement("F13")
def test_a_file_that_grows_while_it_is_read_is_told(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    path = csv(WIDE_HEADER, *[f"P{n},HOSP,2020-05-06,{n},1" for n in range(BATCH_ROWS)])

    def apply(updates: list[RecordUpdate]) -> int:
        with path.open("a") as file:
            file.write("P1,HO")
        return len(updates)

    tally = import_table(path, mapping(WIDE), apply=apply)
    assert refused(tally)[-1] == (0, "The file changed while it was read; import it again when it is whole.")


def test_a_file_without_line_ends_is_not_read_as_one_line(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    with pytest.raises(RecordError, match="longer than"):
        import_table(csv(raw=b"x" * 3_000_000 + b"\n"), mapping(WIDE), apply=Applied())


@pytest.mark.requirement("F13")
def test_a_large_file_takes_the_memory_of_a_small_one(mapping: Callable[..., TableMapping], csv: Callable[..., Path]) -> None:
    def peak(rows: int) -> int:
        path = csv(WIDE_HEADER, *(f"P{n},HOSP,2020-05-06,{n},{'bad' if n % 2 else 1}" for n in range(rows)))
        read: list[int] = []
        tracemalloc.start()
        tally = import_table(path, mapping(WIDE), apply=lambda _updates: 0, progress=read.append)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (tally.counts["refused"], tally.counts["fact read"]) == (rows / 2, rows)
        assert sum(read) == path.stat().st_size
        return found

    small = peak(2 * BATCH_ROWS)
    assert peak(10 * BATCH_ROWS) < small + 1_000_000
