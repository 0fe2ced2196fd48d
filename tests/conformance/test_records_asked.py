"""A study is given what the whole record would give it, though only what its bundle asks for is read; whose it is, too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from models import spec as bundle_spec
from models.spec import ImageSpec, RecordRule, TextSpec, ValueSpec
from tests.conformance.test_records_machine import CODES, HOUR, KEYS, START, STEPS, Again, Say, Undo, World, often, world
from worker import joining
from worker.domain import Code, Instance, Observation, Patient, PatientKey, PatientRecord, RecordUpdate, Series, Study
from worker.fingerprint import record_digest
from worker.inputs import select_inputs
from worker.store import records, views
from worker.store.database import Store

FILM = Instance("2.25.3", "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.1.2", Path("film.dcm"), "", 1, "AP")
SERIES = Series("2.25.2", "CR", "CHEST", "", (FILM,))
AGE = bundle_spec.Code("30525-0", "LN", "Age")


@dataclass(frozen=True)
class Asked:
    """What a bundle asks for."""

    record: RecordRule
    images: Sequence[ImageSpec] = (ImageSpec("film", "radiograph", ("CR",), (8, 8)),)


CODE = st.sampled_from(
    [*(bundle_spec.Code(one.value, one.scheme, one.meaning) for one in CODES), bundle_spec.Code("718-7", "L", "local"), AGE]
)
SYNONYMS = st.lists(CODE, max_size=1).map(tuple)
VALUES = st.builds(lambda code, synonyms: ValueSpec("value", code, "", (0.0, 2.5), synonyms), CODE, SYNONYMS)
RULES = st.builds(
    RecordRule,
    wait_s=st.just(0.0),
    look_back_h=st.sampled_from([0.0, 2.0, 24.0, 60.0]),
    horizon_h=st.sampled_from([0.0, 6.0]),
    history_h=st.sampled_from([0.0, 12.0, 80.0]),
    values=st.lists(VALUES, max_size=2).map(tuple),
    histories=st.lists(VALUES, max_size=1).map(tuple),
    texts=st.lists(st.builds(TextSpec, st.just("text"), CODE, SYNONYMS), max_size=1).map(tuple),
)
PEOPLE = st.builds(Patient, st.sampled_from(KEYS), st.sampled_from(["", "Test^Ada"]), st.sampled_from(["", "19700101"]))
PARTS = st.sampled_from([(), ("birth_date",), joining.MUST_AGREE])
HOURS = st.sampled_from([0, 6, 30])


def whole(conn: sa.Connection, study: Study, rule: RecordRule, must_agree: Sequence[str]) -> PatientRecord | None:
    """The patient's own record, all of it."""
    found = records.view(conn, study.patient.key, as_of=study.study_at + timedelta(hours=rule.horizon_h))
    return joining.own(found, must_agree) if found else None


def told(conn: sa.Connection, study: Study, record: PatientRecord | None, rule: RecordRule, must_agree: Sequence[str]) -> tuple[Any, ...]:
    """All that a record is asked for on the line."""
    inputs = select_inputs(study, record, Asked(rule))
    doubt = joining.doubt(conn, study, record, must_agree=must_agree)
    return doubt, inputs, record_digest(inputs), record and (record.patient, record.keys, record.stamp)


def check(one: World, rule: RecordRule, patient: Patient, hours: int, must_agree: Sequence[str]) -> None:
    """Both ways tell the same."""
    study = Study("2.25.1", patient, "", START + hours * HOUR, "", 1, (SERIES,))
    part = joining.record_of(one.conn, study, rule, must_agree=must_agree)
    assert told(one.conn, study, part, rule, must_agree) == told(
        one.conn, study, whole(one.conn, study, rule, must_agree), rule, must_agree
    )


@pytest.fixture(scope="module", autouse=True)
def _few_is_none() -> Iterator[None]:
    """Whoever has a fact has many: else these small records would be read whole, and compared with themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "FEW", 0)
        yield


@pytest.fixture(scope="module")
def sqlite() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="records-asked-") as folder:
        made = Store(f"sqlite:///{folder}/r.db")
        made.migrate()
        yield made
        made.close()


@pytest.fixture
def on_postgres(postgres_url: str) -> Iterator[Store]:
    made = Store(postgres_url)
    made.migrate()
    yield made
    made.close()


@pytest.mark.requirement("F3")
@often(300)
@given(steps=STEPS, rules=st.lists(RULES, min_size=2, max_size=4), patient=PEOPLE, hours=HOURS, must_agree=PARTS)
def test_what_is_read_for_a_bundle_tells_what_the_whole_record_tells(
    sqlite: Store, steps: list[Say | Again | Undo], rules: list[RecordRule], patient: Patient, hours: int, must_agree: tuple[str, ...]
) -> None:
    with world(sqlite) as one:
        for step in steps:
            one.step(step)
        for rule in rules:
            check(one, rule, patient, hours, must_agree)


@often(25)
@given(steps=STEPS, rules=st.lists(RULES, min_size=4, max_size=4), patient=PEOPLE, hours=HOURS, must_agree=PARTS)
def test_postgres_reads_the_same(
    on_postgres: Store, steps: list[Say | Again | Undo], rules: list[RecordRule], patient: Patient, hours: int, must_agree: tuple[str, ...]
) -> None:
    with world(on_postgres) as one:
        for step in steps:
            one.step(step)
        for rule in rules:
            check(one, rule, patient, hours, must_agree)


ADA = Patient(PatientKey("SITE", "A"), "Test^Ada", "19700101")
CRP, HB = (Observation(Code(one.value, one.scheme, one.meaning), START - HOUR, 1.0, unit="1") for one in CODES)
WANTED = ValueSpec("value", bundle_spec.Code("1988-5", "LN", "CRP"), "1", (0.0, 2.5))
RULE = RecordRule(wait_s=0.0, look_back_h=24.0, values=(WANTED,))
STUDY = Study("2.25.1", replace(ADA, name="", birth_date=""), "", START, "", 1, (SERIES,))


def say(store: Store, *facts: Observation, of: Patient = ADA, hours: int = 0) -> None:
    with store.begin() as conn:
        records.apply(conn, RecordUpdate(of, facts, "LAB", has_demographics=False), now=START + hours * HOUR)


def test_a_fact_that_no_bundle_asks_for_in_another_name_is_a_doubt(store: Store) -> None:
    """Of two persons under one ID nobody knows which is meant, whatever it is that they were told by."""
    say(store, CRP)
    say(store, HB, of=replace(ADA, name="Other^Eva", birth_date="19800101"))
    with store.read() as conn:
        record = joining.record_of(conn, STUDY, RULE, must_agree=joining.MUST_AGREE)
        assert joining.doubt(conn, STUDY, record, must_agree=joining.MUST_AGREE)


@pytest.mark.parametrize(
    ("hours", "received_h", "cause"),
    [
        (-30, 0, "the latest is 30 h before the study, and the bundle looks back 24 h"),
        (-30, -60, "the latest result is dated after it was received"),
        (30, -1, "the latest result is dated after it was received"),
    ],
)
def test_why_a_value_is_missing_is_told_by_facts_that_are_too_old_for_it(store: Store, hours: int, received_h: int, cause: str) -> None:
    say(store, replace(CRP, at=START + hours * HOUR), HB, hours=received_h)
    with store.read() as conn:
        record = joining.record_of(conn, STUDY, RULE, must_agree=joining.MUST_AGREE)
    assert select_inputs(STUDY, record, Asked(RULE)).missing_causes == (cause,)


def test_only_what_is_asked_for_is_read(store: Store) -> None:
    old = [replace(CRP, at=START - hours * HOUR, key=f"old/{hours}") for hours in range(25, 60)]
    say(store, CRP, HB, *old)
    with store.read() as conn:
        record = joining.record_of(conn, STUDY, RULE, must_agree=joining.MUST_AGREE)
    assert record is not None
    assert [one.at for one in record.observations] == [CRP.at]


@pytest.mark.parametrize(("few", "read"), [(1, {"1988-5"}), (2, {"1988-5", "718-7"})])
def test_a_short_record_is_read_whole(store: Store, monkeypatch: pytest.MonkeyPatch, few: int, read: set[str]) -> None:
    monkeypatch.setattr(views, "FEW", few)
    say(store, CRP, HB)
    with store.read() as conn:
        record = joining.record_of(conn, STUDY, RULE, must_agree=joining.MUST_AGREE)
    assert record is not None
    assert {one.code.value for one in record.observations} == read


@pytest.mark.parametrize(
    "later",
    [
        replace(HB, key="panel", status="W", at=START - 40 * HOUR),
        replace(CRP, key="panel/a", status="C", at=START - 40 * HOUR),
    ],
    ids=["panel withdrawn under another code", "moved out of the look-back"],
)
def test_what_is_not_asked_for_still_says_that_a_result_does_not_stand(store: Store, later: Observation) -> None:
    second = replace(WANTED, code=bundle_spec.Code("none", "LN", "None"))
    rule = replace(RULE, values=(WANTED, second))
    say(store, replace(CRP, key="panel/a"))
    say(store, later, hours=1)
    with store.read() as conn:
        record = joining.record_of(conn, STUDY, rule, must_agree=joining.MUST_AGREE)
        codes, since = [("1988-5", "LN")], START - 24 * HOUR
        part = records.view(conn, STUDY.patient.key, as_of=START, codes=codes, since=since)
    assert part is not None
    assert part.observations == ()
    assert not select_inputs(STUDY, record, Asked(rule)).values
