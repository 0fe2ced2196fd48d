"""Both doors of the patient's record on real data: HL7 v2 and FHIR say the same, and nothing real breaks either."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import hl7 as python_hl7
import pytest
import sqlalchemy as sa

from tests.conftest import SHARED
from worker import importing, sweeps
from worker.config import Config, Records, Site
from worker.domain import Observation, PatientKey, RecordUpdate
from worker.errors import RecordError
from worker.intake import fhir, hl7
from worker.intake.mllp import MllpServer, send, split_messages
from worker.store import feeds, records, schema
from worker.store.database import Store
from worker.store.spool import Spool

#: The data's HL7 names no offset, its FHIR +01:00; its FHIR has a URI where its HL7 says "L".
ZONE = timezone(timedelta(hours=1))
SCHEMES = {"urn:mhh:lab": "L"}
DATA = SHARED / "data"
SEVERITY = DATA / "cxr-severity"


def files(folder: Path, pattern: str) -> list[Path]:
    """Return the files to run a test on; without the data one that is not there, so that the test skips and says so."""
    return sorted(folder.rglob(pattern)) or [folder / pattern]


def name(path: Path) -> str:
    return path.name


def fact(one: Observation) -> tuple[object, ...]:
    """Everything but the key and the source, which are each door's own."""
    return (one.code, one.at, one.value, one.comparator, one.unit, one.text, one.status)


def hl7_updates(path: Path) -> list[RecordUpdate]:
    parsed = [hl7.parse(raw, zone=ZONE, issuers={}, schemes=SCHEMES) for raw in split_messages(path.read_bytes())]
    assert all(one.update and not one.skipped for one in parsed)
    return [one.update for one in parsed if one.update]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("path", files(SEVERITY / "fhir", "*.json"), ids=name)
def test_hl7_and_fhir_say_the_same_of_a_patient(path: Path) -> None:
    """A network that sees other numbers by another door is another network."""
    (by_fhir,) = fhir.parse(path.read_bytes(), zone=ZONE, issuers={}, schemes=SCHEMES)
    admission, *results = hl7_updates(SEVERITY / "hl7" / f"{path.stem}.hl7")
    assert by_fhir.patient == admission.patient
    assert {one.patient.key for one in results} <= {by_fhir.patient.key}
    by_hl7 = [one for result in results for one in result.observations]
    assert Counter(map(fact, by_fhir.observations)) == Counter(map(fact, by_hl7))
    assert len({one.key for one in by_hl7}) == len({one.key for one in by_fhir.observations}) == len(by_hl7)


def test_every_value_of_the_real_patients_is_there(shared: Path) -> None:
    """The counts are those of `grep -c` on the data, not of this parser."""
    updates = [update for path in (shared / "data/cxr-severity/hl7").glob("*.hl7") for update in hl7_updates(path)]
    facts = [one for update in updates for one in update.observations]
    assert (len(updates), len(facts)) == (238, 635)
    assert Counter(one.comparator for one in facts) == {"": 628, "<": 3, ">": 4}
    assert Counter(one.code.scheme for one in facts) == {"LN": 611, "L": 24}
    assert {one.unit for one in facts} == {"mg/L", "U/L", "%", "10*3/uL", "mm[Hg]"}


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("path", files(SEVERITY / "hl7", "*.hl7"), ids=name)
def test_the_fields_are_those_that_python_hl7_finds(path: Path) -> None:
    """A parser written by others, as the judge of ours."""
    for raw, update in zip(split_messages(path.read_bytes()), hl7_updates(path), strict=True):
        theirs = python_hl7.parse(raw.decode())
        identifier = theirs.segment("PID")[3][0]
        assert (update.patient.key.patient_id, update.patient.key.issuer) == (str(identifier[0]), str(identifier[3]))
        segments = [one for one in theirs if str(one[0]) == "OBX"]
        for ours, segment in zip(update.observations, segments, strict=True):
            expected = "".join(map(str, segment[5][0])) if str(segment[2]) == "SN" else str(segment[5])
            code = segment[3][0]
            assert (ours.code.value, ours.code.meaning, ours.code.scheme) == tuple(str(part) for part in code)
            assert (ours.comparator, ours.value) == (expected.rstrip("0123456789."), float(expected.lstrip("<>")))
            assert ours.unit == str(segment[6][0][0])


def real_messages() -> list[tuple[str, bytes]]:
    """Every message of the data, with the name of its file."""
    return [(path.name, raw) for path in sorted((DATA / "hl7").rglob("*.hl7")) for raw in split_messages(path.read_bytes())]


def test_every_real_message_is_understood_or_refused_with_a_reason(shared: Path) -> None:
    """Anything else that is raised would be answered AE, and its sender would send it for ever."""
    outcomes: Counter[tuple[str, str]] = Counter()
    refused: dict[str, str] = {}
    for path, raw in real_messages():
        try:
            parsed = hl7.parse(raw, zone=ZONE, issuers={})
        except RecordError as exc:
            refused[path] = str(exc)
            continue
        assert parsed.control_id
        assert (parsed.update is None) == bool(parsed.note)
        outcomes[parsed.trigger, "used" if parsed.update else parsed.note] += 1
    print(*(f"{trigger} {outcome}: {count}" for (trigger, outcome), count in sorted(outcomes.items())), sep="\n")
    assert refused == {
        # The site has to say whose numbers these are: the next test does.
        **dict.fromkeys(["ADT04-23.hl7", "ADT04-251.hl7", "ORU-R01-RMGEAD.hl7"], "PID-3.4 has no assigning authority."),
        **dict.fromkeys(["MDM-T02-02.hl7", "MDM-T06-02.hl7", "MDM-T10-02.hl7"], "PID-3.4 has no assigning authority."),
        # The escape character is doubled in MSH-2, as in the source of a program.
        **dict.fromkeys(["sample_unix.hl7", "sample_win.hl7"], "MSH-1 and MSH-2 do not name five different separators."),
    }
    used = {trigger: count for (trigger, outcome), count in outcomes.items() if outcome == "used"}
    counted = "ADT^A01 5, ADT^A04 3, ADT^A05 2, ADT^A08 2, ADT^A28 2, ADT^A31 2, ADT^A40 2, ADT^A47 2, MDM^T02 1, ORU^R01 6"
    assert ", ".join(f"{trigger} {count}" for trigger, count in sorted(used.items())) == counted
    explained = {trigger: count for (trigger, outcome), count in outcomes.items() if outcome.startswith(("The ", "No "))}
    assert explained == {"ADT^A11": 2, "ADT^A13": 2, "MDM^T02": 1, "MDM^T06": 1, "MDM^T10": 1, "OMG^O19": 2, "ORM^O01": 8}
    assert sum(outcomes.values()) + len(refused) == len(real_messages())


def test_a_site_that_names_its_authority_has_those_messages_too(shared: Path) -> None:
    refused: Counter[str] = Counter()
    documents: list[str] = []
    for _, raw in real_messages():
        try:
            parsed = hl7.parse(raw, zone=ZONE, issuers={"": "HOSP"})
        except RecordError as exc:
            refused[str(exc)] += 1
            continue
        if parsed.update and parsed.trigger in hl7.DOCUMENTS:
            documents += [one.text for one in parsed.update.observations if one.text]  # a replaced one has none
    assert refused == {"MSH-1 and MSH-2 do not name five different separators.": 2}
    # `grep -c TX` of the six: two lines each in three, one of 29 lines.
    assert sorted(text.count("\n") + 1 for text in documents) == [2, 2, 2, 29]


def test_the_real_merges_name_who_survives(shared: Path) -> None:
    found = {path: hl7.parse(raw, zone=ZONE, issuers={}).update for path, raw in real_messages() if path.startswith(("ADT-A40", "ADT-A47"))}
    assert {
        path: [(one.survivor.patient_id, one.retired.patient_id) for one in update.merges] for path, update in found.items() if update
    } == {
        "ADT-A40-01.hl7": [("12345", "56789")],
        "ADT-A40-02.hl7": [("12345", "56789"), ("145", "569")],
        "ADT-A47-01.hl7": [("MR101", "MR102")],
        "ADT-A47-02.hl7": [("MR101", "MR102"), ("145", "569")],
    }


def damaged(chance: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """One message after one to four accidents: bytes lost, doubled, changed, a separator put in, lines of another message."""
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(raw) + 1)
        end = min(len(raw), start + chance.choice((1, 2, 8, 40, 400)))
        other = chance.choice(others)
        lines = other.replace(b"\n", b"\r").split(b"\r")
        put = chance.choice(
            (
                b"",
                raw[start:end] * 2,
                chance.randbytes(3),
                chance.choice((b"|", b"^", b"~", b"&", b"\\", b"\r", b'""', b"\x1b$B")),
                other[start:end],
            )
        )
        raw = raw[:start] + put + raw[end:] if chance.random() < 0.7 else raw + b"\r" + chance.choice(lines)
    return raw


@pytest.mark.requirement("F8")
def test_no_damage_to_a_real_message_gives_anything_but_a_message_or_a_refusal(shared: Path) -> None:
    """The triggers are exchanged too: each reader sees the segments of every other."""
    chance = random.Random(20200506)
    raws = [raw for _, raw in real_messages()]
    triggers = sorted(hl7.READ)
    read = refused = 0
    for _ in range(8000):
        raw = re.sub(rb"(?<=\|)[A-Z]{3}\^[A-Z][0-9]{2}", chance.choice(triggers).encode(), chance.choice(raws), count=1)
        began = time.process_time()
        try:
            parsed = hl7.parse(damaged(chance, raw, raws), zone=ZONE, issuers={"": "HOSP"})
        except RecordError as exc:
            refused += str(exc).endswith(".")
        else:
            read += bool(parsed.control_id)
            facts = parsed.update.observations if parsed.update else ()
            assert all(one.at.tzinfo is UTC and one.code.value and "\0" not in one.text for one in facts)
        assert time.process_time() - began < 1
    assert read + refused == 8000
    assert min(read, refused) > 800


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("path", files(DATA / "fhir", "*.json"), ids=name)
def test_a_real_bundle_gives_one_patient_and_every_value(path: Path) -> None:
    (update,) = fhir.parse(path.read_bytes(), zone=ZONE, issuers={"http://hospital.smarthealthit.org": "SYNTHEA"})
    assert update.patient.key.issuer == "SYNTHEA"
    assert update.observations
    assert all(one.at.tzinfo is UTC and one.code.value and one.key for one in update.observations)
    assert len({one.key for one in update.observations}) == len(update.observations)
    assert all(one.value is not None or one.text for one in update.observations)


def test_the_real_feed_is_accepted_over_mllp_in_order(shared: Path) -> None:
    """MSH-15 AL and MSH-16 NE ask for a commit acknowledgment: CA."""
    messages = [raw for path in sorted((shared / "data/cxr-severity/hl7").glob("*.hl7")) for raw in split_messages(path.read_bytes())]
    applied: list[bytes] = []
    refused: list[str] = []

    def apply(_: hl7.ParsedMessage, raw: bytes) -> bool:
        applied.append(raw)
        return True

    server = MllpServer(
        ("127.0.0.1", 0),
        apply=apply,
        reject=lambda reason, _: refused.append(reason),
        zone=ZONE,
        issuers={},
        allowed_addresses=["127.0.0.1"],
    )
    server.start()
    try:
        assert send(("127.0.0.1", server.port), messages, timeout_s=60) == ["CA"] * 238
    finally:
        server.stop()
    assert applied == messages
    assert not refused


# --- rows of what came


def test_a_message_refused_again_and_again_is_counted_each_time_and_kept_once_a_day(store: Store) -> None:
    """A sender that takes AR for AE sends it every second; the disk is not its to fill."""
    start = datetime(2026, 3, 1, tzinfo=UTC)

    def refuse(raw: bytes, hours: float) -> int:
        with store.begin() as conn:
            words = {"sender": "", "control_id": "", "sent_at": "", "trigger": "", "result": "refused"}
            number = feeds.note_message(conn, **words, reason="MSH-9 is empty.", raw=raw, now=start + timedelta(hours=hours))
            assert number is not None
            return number

    first, *_, other, later = refuse(b"MSH|1", 0), refuse(b"MSH|1", 1), refuse(b"MSH|2", 2), refuse(b"MSH|1", 30)
    with store.read() as conn:
        held = conn.scalars(sa.select(schema.message.c.id).where(schema.message.c.raw.is_not(None)).order_by(schema.message.c.id)).all()
        assert feeds.counts(conn) == {"refused": 4}
        assert [feeds.raw(conn, number) for number in range(first, later + 1)] == [b"MSH|1", b"MSH|1", b"MSH|2", b"MSH|1"]
    assert held == [first, other, later]


def test_the_last_word_of_every_sender_is_found_without_counting(store: Store) -> None:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    for hours, sender in enumerate(("LAB|B", "", "HIS|A", "LAB|B", "Zürich|1")):
        with store.begin() as conn:
            at = start + timedelta(hours=hours)
            feeds.note_message(conn, sender=sender, control_id=str(hours), sent_at="", trigger="ADT^A01", result="applied", now=at)
    with store.read() as conn:
        found, counted = feeds.feeds(conn, counted=False), feeds.feeds(conn)
    assert [(one.sender, one.last_received_at.hour) for one in found] == [("Zürich|1", 4), ("LAB|B", 3), ("HIS|A", 2), ("", 1)]
    assert [one.counts for one in found] == [{}] * 4
    assert counted[1].counts == {"applied": 2}


@pytest.mark.parametrize(("silent_after_s", "is_asked"), [(0.0, False), (60.0, True)])
def test_nobody_listens_for_silence_where_no_alarm_is_wanted(store: Store, *, silent_after_s: float, is_asked: bool) -> None:
    config = Config(records=Records(silent_after_s=silent_after_s))
    assert ("listen" in [sweep.__name__ for sweep, _ in sweeps._of_records(config, store, [], sweeps.Clock())]) == is_asked


def test_a_large_bundle_is_committed_in_parts_in_one_order_and_goes_on_where_it_was_cut_off(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transaction of a whole hospital locks every feed out; two imports in different order would wait for each other."""
    config = Config(site=Site(data=tmp_path, timezone="+01:00"))
    people = [
        {"resource": {"resourceType": "Patient", "id": f"p{n}", "gender": "female", "identifier": [{"system": "HOSP", "value": f"{n}"}]}}
        for n in (4, 0, 3, 1, 2)
    ]
    path = tmp_path / "bundle.json"
    path.write_text(json.dumps({"resourceType": "Bundle", "type": "collection", "entry": people}), "utf-8")
    named: list[str] = []
    apply = records.apply

    def failing(conn: sa.Connection, update: RecordUpdate, **how: Any) -> int:
        if update.patient.key.patient_id == "3" and len(named) < 5:
            raise RecordError("Cut off.")
        named.append(update.patient.key.patient_id)
        return apply(conn, update, **how)

    def run() -> importing.Tally:
        return importing.import_files([path], config=config, store=store, spool=Spool(tmp_path / "spool", low_water_bytes=0))

    def known() -> list[bool]:
        with store.read() as conn:
            return [records.is_known(conn, PatientKey("HOSP", str(n))) for n in range(5)]

    monkeypatch.setattr(importing, "BATCH", 2)
    monkeypatch.setattr(records, "apply", failing)
    assert run().counts == {"patient updated": 2, "fact added": 0, "refused": 1}
    assert named == ["0", "1", "2"]
    assert known() == [True, True, False, False, False]
    named += ["", ""]
    assert run().counts["patient updated"] == 5
    assert known() == [True] * 5
    with store.read() as conn:
        assert conn.scalars(sa.select(schema.demographics.c.message_id).distinct()).all() == [1]
