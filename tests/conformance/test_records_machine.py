"""Whatever feeds say, in whatever order, twice and late: the record is what a plain reading of everything said so far gives.

The reference below keeps a log and reads it from the start for each question. What was known at a time is the log up to it;
the store answers the same with conditions on times, chains of merges and one pass over rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker import joining
from worker.domain import Code, Merge, Observation, Patient, PatientKey, PatientRecord, RecordUpdate
from worker.identity import disagreement
from worker.store import records
from worker.store.database import Store

START = datetime(2026, 1, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
A, B, C, D = (PatientKey("SITE", name) for name in "ABCD")
STRANGER = PatientKey("OTHER", "A")  # the same ID from another issuer, in no merge
KEYS = (A, B, C, D, STRANGER)
IN_PASSING = datetime(1900, 1, 1, tzinfo=UTC)
CODES = (Code("1988-5", "LN", "CRP"), Code("718-7", "LN", "Hb"))
RANK = {"P": 0, "F": 1, "C": 2, "D": 2, "W": 2, "X": 2}


# --- what may happen


@dataclass(frozen=True)
class Say:
    """One message; `late_h` is how long before its arrival it was said, None if it does not tell."""

    update: RecordUpdate
    late_h: int | None


@dataclass(frozen=True)
class Again:
    """A message that came before comes once more."""

    number: int


@dataclass(frozen=True)
class Undo:
    """A person undoes a merge that stands."""

    number: int


def _said(key: PatientKey, facts: Sequence[Observation], told: tuple[str, str, str], merges: Sequence[Merge], late_h: int | None) -> Say:
    # The text says whose fact it is, so that a fact of somebody else can be told.
    mine = tuple(replace(fact, text=f"{key.issuer}/{key.patient_id}", source="LAB") for fact in facts)
    # Those who know a birth date are no admission, so that both are told.
    return Say(RecordUpdate(Patient(key, *told), mine, "LAB", has_demographics=not told[1], merges=tuple(merges)), late_h)


FACTS = st.builds(
    lambda code, key, status, value, hours: Observation(code, START + hours * HOUR, value, status=status, key=key),
    st.sampled_from([CODES[0], *CODES]),
    st.sampled_from(["", "panel", "panel/a", "panels", "other"]),
    st.sampled_from(["F", "P", "C", "W", "D", "X"]),
    st.sampled_from([1.0, 2.0, 3.0]),
    st.sampled_from([-30, -1, 0, 5, 23, 40, 90]),
)
MERGES = st.tuples(st.sampled_from([A, B, C, D]), st.sampled_from([A, B, C, D])).map(lambda pair: Merge(*pair))
SAYS = st.builds(
    _said,
    st.sampled_from(KEYS),
    st.lists(FACTS, max_size=3),
    st.tuples(st.sampled_from(["", "Test^Ada", "Trauma^Alpha"]), st.sampled_from(["", "19700101", "19710101"]), st.sampled_from(["", "F"])),
    st.lists(MERGES, max_size=2),
    st.sampled_from([None, 0, 1, 3, 40]),
)
STEPS = st.lists(st.one_of(SAYS, SAYS, st.builds(Again, st.integers(0, 9)), st.builds(Undo, st.integers(0, 3))), min_size=1, max_size=10)

Entry = tuple[datetime, RecordUpdate | Merge]  # when it came, and what was said or undone


# --- the reference


def standing_merges(log: Sequence[Entry]) -> list[Merge]:
    """The merges that stand at the log's end, the last said last; one that a person undid comes back only by what is said afterwards."""
    standing: dict[Merge, tuple[datetime, int]] = {}
    undone: dict[frozenset[PatientKey], datetime] = {}
    for n, (at, what) in enumerate(log):
        if isinstance(what, Merge):
            del standing[what]
            undone[frozenset((what.survivor, what.retired))] = at
            continue
        for m, one in enumerate(what.merges):
            undone_at = undone.get(frozenset((one.survivor, one.retired)))
            is_news = undone_at is None or (what.at or undone_at) > undone_at
            if one.survivor != one.retired and is_news:
                standing.setdefault(one, (what.at or at, 10 * n + m))
    return sorted(standing, key=lambda one: standing[one])


def person(key: PatientKey, merges: Sequence[Merge]) -> set[PatientKey]:
    """The connected component of a key."""
    found = {key}
    for _ in merges:
        for one in merges:
            if one.survivor in found or one.retired in found:
                found |= {one.survivor, one.retired}
    return found


def is_same(
    told: tuple[datetime | None, PatientKey, Observation], known: tuple[datetime, datetime | None, PatientKey, Observation]
) -> bool:
    """Whether a fact is a repetition; one known without its time was said before it came."""
    return told[1:] == known[2:] and (
        told[0] == known[1] or (known[1] is None and (not known[3].key or (told[0] is not None and told[0] <= known[0])))
    )


def what_stands(says: Sequence[tuple[datetime, RecordUpdate]], group: set[PatientKey]) -> list[tuple[datetime, Observation]]:
    """Of each key the best statement, repetitions and components of withdrawn panels aside; with its arrival."""
    heard: list[tuple[datetime, datetime | None, PatientKey, Observation]] = []
    for at, what in says:
        for fact in what.observations:
            if not any(is_same((what.at, what.patient.key, fact), known) for known in heard):
                heard.append((at, what.at, what.patient.key, fact))
    mine = [(at, said or at, fact) for at, said, whose, fact in heard if whose in group]
    standing = [(at, fact) for at, _, fact in mine if not fact.key]
    for name in {fact.key for _, _, fact in mine if fact.key}:
        of_name = [(RANK[fact.status], said, n) for n, (_, said, fact) in enumerate(mine) if fact.key == name]
        at, _, fact = mine[max(of_name)[2]]
        standing.append((at, fact))
    gone = [fact.key for _, fact in standing if fact.key and fact.status in "DWX"]
    return [(at, fact) for at, fact in standing if not any(fact.key.startswith(name + "/") for name in gone)]


def what_was_told(says: Sequence[tuple[datetime, RecordUpdate]], group: set[PatientKey], survivor: PatientKey) -> dict[str, str]:
    """Of each part of the demographics the last said of the survivor, else of the others."""
    lines: list[tuple[datetime, datetime | None, Patient]] = []
    for at, what in says:
        said_at = what.at if what.has_demographics else IN_PASSING
        if any((what.patient.name, what.patient.birth_date, what.patient.sex)) and (said_at, what.patient) not in [x[1:] for x in lines]:
            lines.append((at, said_at, what.patient))
    of_person = [(said_at != IN_PASSING, said.key == survivor, said_at or at, said) for at, said_at, said in lines if said.key in group]
    told = {"name": "", "birth_date": "", "sex": ""}
    for *_, said in sorted(of_person, key=lambda one: one[:3]):
        told |= {part: value for part in told if (value := getattr(said, part))}
    return told


def reference(log: Sequence[Entry], key: PatientKey, *, as_of: datetime) -> PatientRecord | None:
    """The record after all of the log, read plainly; the keys but the first and the facts are in no order, there is no stamp."""
    says = [(at, what) for at, what in log if isinstance(what, RecordUpdate)]
    if not any(key in {what.patient.key} | {k for one in what.merges for k in (one.survivor, one.retired)} for _, what in says):
        return None
    merges = standing_merges(log)
    group = person(key, merges)
    of_group = [one for one in merges if one.survivor in group]
    retired = {one.retired for one in of_group}
    survivor = next((one.survivor for one in reversed(of_group) if one.survivor not in retired), of_group[-1].survivor if of_group else key)
    standing = what_stands(says, group)
    return PatientRecord(
        patient=Patient(key, **what_was_told(says, group, survivor)),
        as_of=as_of,
        observations=tuple(fact for at, fact in standing if fact.at <= as_of and fact.at <= at + 24 * HOUR),
        keys=(survivor, *(group - {survivor})),
        unusable=tuple(fact for at, fact in standing if fact.at > at + 24 * HOUR),
    )


# --- the store, told the same


class World:
    """One connection, its log and its clock: an hour and a bit passes with each step."""

    def __init__(self, conn: sa.Connection) -> None:
        self.conn = conn
        self.log: list[Entry] = []
        self.now = START
        self.added = 0

    def say(self, update: RecordUpdate) -> None:
        self.now += HOUR
        self.log.append((self.now, update))
        self.added += records.apply(self.conn, update, now=self.now)

    def undo(self, one: Merge) -> None:
        self.now += HOUR
        self.log.append((self.now, one))
        (number,) = {row[0] for row in records.merges_of(self.conn, one.survivor) if row[1:3] == (one.survivor, one.retired)}
        assert records.unmerge(self.conn, number, reason="a test", now=self.now)

    def step(self, one: Say | Again | Undo) -> None:
        said = [what for _, what in self.log if isinstance(what, RecordUpdate)]
        standing = standing_merges(self.log)
        if isinstance(one, Say):
            at = None if one.late_h is None else self.now + HOUR - timedelta(hours=one.late_h, minutes=1)
            self.say(replace(one.update, at=at))
        elif isinstance(one, Again) and said:
            self.say(said[one.number % len(said)])
        elif isinstance(one, Undo) and standing:
            self.undo(standing[one.number % len(standing)])

    def view(self, key: PatientKey, *, as_of: datetime, known_at: datetime | None = None) -> PatientRecord | None:
        return records.view(self.conn, key, as_of=as_of, known_at=known_at)

    def views(self, keys: Sequence[PatientKey] = KEYS) -> list[str]:
        """What is known of everybody, with times of arrival, order and stamp, bit for bit."""
        found = [self.view(key, as_of=START + 60 * HOUR) for key in keys]
        return [repr((one, one and joining.own(one, joining.MUST_AGREE))) for one in found]


@contextmanager
def world(store: Store) -> Iterator[World]:
    """An empty world, forgotten afterwards: a new database each time would take long."""
    with store.engine.connect() as conn, conn.begin() as transaction:
        if store.is_sqlite:
            conn.exec_driver_sql("BEGIN IMMEDIATE")
        yield World(conn)
        transaction.rollback()


def assert_same(found: PatientRecord | None, wanted: PatientRecord | None) -> None:
    """Equal but for the stamp and for orders that mean nothing."""
    if found is None or wanted is None:
        assert found is wanted
        return
    assert found.patient == wanted.patient
    assert found.keys[0] == wanted.keys[0]
    for part in ("keys", "observations", "unusable"):
        assert sorted(getattr(found, part), key=repr_of) == sorted(getattr(wanted, part), key=repr_of), part


def repr_of(one: object) -> str:
    return repr(replace(one, received_at=None, message_id=None, said_at=None, told=None) if isinstance(one, Observation) else one)


def check_the_stream(store: Store, steps: Sequence[Say | Again | Undo]) -> None:
    """The view equals the reference, now and as known after each step; and nothing in it is of another or from after `as_of`."""
    with world(store) as one:
        before: list[tuple[datetime, PatientKey, str]] = []
        for step, key in zip(steps, KEYS * 2, strict=False):
            one.step(step)
            before.append((one.now, key, repr(one.view(key, as_of=START + 60 * HOUR))))
        for key in KEYS:
            for as_of in (START, START + 60 * HOUR):
                found = one.view(key, as_of=as_of)
                assert_same(found, reference(one.log, key, as_of=as_of))
                whose = {f"{mine.issuer}/{mine.patient_id}" for mine in found.keys} if found else set()
                for fact in found.observations if found else ():
                    assert fact.at <= as_of
                    assert fact.text in whose
                    assert (key == STRANGER) == (fact.text == "OTHER/A")
            check_whose(found)
            check_the_part(one, key, known_at=before[len(before) // 2][0])
        for at, key, was in before:
            assert repr(one.view(key, as_of=START + 60 * HOUR, known_at=at)) == was
            half = [entry for entry in one.log if entry[0] <= at]
            assert_same(one.view(A, as_of=START, known_at=at), reference(half, A, as_of=START))


def check_whose(record: PatientRecord | None) -> None:
    """Facts told in another name are kept apart; but of merged patients those in the name that an admission gave one of them."""
    if record is None:
        return
    named = {said.name for _, said in record.admissions if said.name} if len(record.keys) > 1 else set()
    for fact in joining.own(record, joining.MUST_AGREE).observations:
        contradicts = fact.told and disagreement(fact.told, record.patient, must_agree=joining.MUST_AGREE)
        assert not contradicts or (fact.told and fact.told.name in named)


def check_the_part(one: World, key: PatientKey, *, known_at: datetime) -> None:
    """The facts of some codes and times are those of the whole view."""
    crp = (CODES[0].value, CODES[0].scheme)
    for codes, since, known in (([crp], None, None), (None, START, known_at), ([crp], START, None), ([], None, known_at)):
        whole = records.view(one.conn, key, as_of=START + 60 * HOUR, known_at=known)
        part = records.view(one.conn, key, as_of=START + 60 * HOUR, known_at=known, codes=codes, since=since)

        def is_wanted(fact: Observation, codes: Sequence[tuple[str, str]] | None = codes, since: datetime | None = since) -> bool:
            return (codes is None or (fact.code.value, fact.code.scheme) in codes) and (since is None or fact.at >= since)

        wanted = whole and replace(
            whole, observations=tuple(filter(is_wanted, whole.observations)), unusable=tuple(filter(is_wanted, whole.unusable))
        )
        assert repr(part) == repr(wanted)


def check_twice(store: Store, steps: Sequence[Say | Again | Undo]) -> None:
    """A replayed day changes nothing, whatever of it was undone meanwhile."""
    with world(store) as one:
        for step in steps:
            one.step(step)
        views, added = one.views(), one.added
        for update in [what for _, what in one.log if isinstance(what, RecordUpdate)]:
            one.say(update)
            assert one.views() == views
        assert one.added == added


def check_the_undoing(store: Store, steps: Sequence[Say | Again | Undo], since: Sequence[Say], merge: Merge) -> None:
    """A merge that is undone leaves what was before it; what came meanwhile is where it would be had there been no merge."""
    with world(store) as one:
        for step in steps:
            one.step(step)
        known = [key for key in KEYS if one.view(key, as_of=START)]
        pair, undone = {merge.survivor, merge.retired}, [what for _, what in one.log if isinstance(what, Merge)]
        if len(pair) == 1 or merge in standing_merges(one.log) or any({what.survivor, what.retired} == pair for what in undone):
            return
        views = one.views(known)
        update = RecordUpdate(Patient(merge.survivor), has_demographics=False, merges=(merge,), at=one.now + HOUR)
        start = len(one.log)
        one.say(update)
        for step in since:
            merges = tuple(m for m in step.update.merges if {m.survivor, m.retired} != pair)
            one.step(replace(step, update=replace(step.update, merges=merges)))
        one.undo(merge)
        assert since or one.views(known) == views
        without = [entry for n, entry in enumerate(one.log) if n != start and entry[1] != merge]
        for key in known:
            assert_same(one.view(key, as_of=START + 60 * HOUR), reference(without, key, as_of=START + 60 * HOUR))
        for again in (update, replace(update, at=None), replace(update, at=one.now + HOUR, source="FHIR x")):
            one.say(again)
            assert all(row[1:3] != (merge.survivor, merge.retired) for row in records.merges_of(one.conn, merge.survivor))


def check_any_order(store: Store, says: Sequence[Say], order: Sequence[int]) -> None:
    """Messages that tell when they were said give the same facts in whatever order they come, but for those dated after they came."""
    updates = [replace(say.update, at=START - (n + 1) * HOUR) for n, say in enumerate(says)]
    past = [replace(one, observations=tuple(fact for fact in one.observations if fact.at <= START)) for one in updates]
    found = []
    for arranged in (past, [past[n % len(past)] for n in order] + past):
        with world(store) as one:
            for update in arranged:
                one.say(update)
            found.append([(record := one.view(key, as_of=START)) and sorted(map(repr_of, record.observations)) for key in KEYS])
    assert found[0] == found[1]


# --- the tests


@pytest.fixture(scope="module")
def sqlite() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="records-machine-") as folder:
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


def often(examples: int) -> settings:
    """The same examples each time, so that a red build is red again."""
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


SINCE = st.lists(SAYS, max_size=2)
ORDER = st.lists(st.integers(0, 9), max_size=8)


@pytest.mark.requirement("F3")
@pytest.mark.requirement("F6")
@often(80)
@given(steps=STEPS)
def test_the_view_is_what_a_plain_reading_gives_now_and_as_known_before(sqlite: Store, steps: list[Say | Again | Undo]) -> None:
    check_the_stream(sqlite, steps)


@pytest.mark.requirement("F6")
@often(40)
@given(steps=STEPS)
def test_a_stream_applied_twice_changes_nothing(sqlite: Store, steps: list[Say | Again | Undo]) -> None:
    check_twice(sqlite, steps)


@pytest.mark.requirement("F3")
@often(40)
@given(steps=STEPS, since=SINCE, merge=MERGES)
def test_undoing_a_merge_restores_the_view_bit_for_bit(
    sqlite: Store, steps: list[Say | Again | Undo], since: list[Say], merge: Merge
) -> None:
    check_the_undoing(sqlite, steps, since, merge)


@pytest.mark.requirement("F6")
@often(40)
@given(says=st.lists(SAYS, min_size=1, max_size=6), order=ORDER)
def test_the_order_of_arrival_does_not_matter(sqlite: Store, says: list[Say], order: list[int]) -> None:
    check_any_order(sqlite, says, order)


@often(10)
@given(steps=STEPS, since=SINCE, merge=MERGES)
def test_postgres_says_the_same(on_postgres: Store, steps: list[Say | Again | Undo], since: list[Say], merge: Merge) -> None:
    check_the_stream(on_postgres, steps)
    check_twice(on_postgres, steps)
    check_the_undoing(on_postgres, steps, since, merge)
