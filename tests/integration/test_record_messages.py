"""What a person does about one message: a refused one taken once more, and what one said withdrawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.record_site import Site, installed, line_with
from worker import record_feeds
from worker.domain import Code, Merge, Observation, Patient, PatientKey, RecordUpdate
from worker.intake import mllp
from worker.record_feeds import clock
from worker.store import feeds, records
from worker.store.schema import study

KEY = PatientKey("SITE", "P-1")
NOW = datetime(2024, 1, 2, 11, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
CRP, NOTE = Code("1988-5", "LN", "C reactive protein"), Code("34109-9", "LN", "Note")
WHO = Patient(KEY, "Zyxhuber^Quillon", "19330224", "F")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with installed(tmp_path) as made:
        yield made


def result(control_id: str, value: str = "12", *, who: str = "P-1^^^SITE||Zyxhuber^Quillon", obx_11: str = "F") -> bytes:
    lines = (
        f"MSH|^~\\&|LAB|SITE|||20240102080000+0100||ORU^R01|{control_id}|P|2.5.1",
        f"PID|||{who}||19330224|F",
        f"OBR||O-{control_id}|||||20240102070000+0100",
        f"OBX|1|NM|1988-5^C reactive protein^LN||{value}|mg/L|||||{obx_11}",
    )
    return "\r".join(lines).encode() + b"\r"


def admission(name: str) -> bytes:
    lines = (
        "MSH|^~\\&|ADT|SITE|||20240102060000+0100||ADT^A08|A1|P|2.5.1",
        "EVN||20240102060000+0100",
        f"PID|||P-1^^^SITE||{name}||19330224|F",
    )
    return "\r".join(lines).encode() + b"\r"


def come(site: Site, raw: bytes, name: str = "m.hl7") -> tuple[int, str]:
    (site.folder / name).write_bytes(raw)
    return site.run("import", str(site.folder / name))


def rejected(site: Site) -> dict[int, str]:
    return {one["number"]: one["because"] for one in json.loads(site.run("records", "--json")[1])["rejected"]}


def facts(site: Site, *words: str) -> dict[str, Any]:
    code, said = site.run("patient", "P-1", "--json", *words)
    assert code == 0, said
    return dict(json.loads(said))


def values(site: Site, *words: str) -> list[float]:
    return sorted(one["value"] for one in facts(site, *words)["facts"])


# --- applied again


def test_a_refused_message_is_applied_when_what_was_wrong_is_mended_and_says_so(site: Site) -> None:
    assert come(site, admission("Other^Person"))[0] == 0
    assert come(site, result("R1"))[0] == 1
    (number,) = rejected(site)
    code, said = site.run("records", "--apply", str(number))
    assert (code, "Not applied." in said, "PID-5" in said) == (1, True, True)
    assert "Tried again: refused again." in rejected(site)[number]
    assert come(site, admission("Zyxhuber^Quillon").replace(b"060000", b"063000").replace(b"|A1|", b"|A2|"))[0] == 0
    code, said = site.run("records", "--apply", str(number))
    assert code == 0, said
    assert values(site) == [12.0]
    told = rejected(site)[number]
    assert (told.count("Tried again"), "applied, as No." in told) == (1, True)
    code, said = site.run("records", "--apply", str(number))
    assert (code, "taken already" in said) == (1, True)
    assert values(site) == [12.0]
    assert "Zyxhuber" not in said


def test_a_message_that_was_not_refused_or_is_not_kept_whole_is_not_applied_again(site: Site) -> None:
    come(site, result("R1"))
    code, said = site.run("records", "--apply", "1")
    assert (code, "was applied when it came" in said) == (1, True)
    code, said = site.run("records", "--apply", "77")
    assert (code, "no such message" in said) == (1, True)
    head = (result("R2") + b"NTE|||" + b"x" * mllp.HEAD_BYTES)[: mllp.HEAD_BYTES]
    record_feeds.keep_refused(site.store, "The message has more than 1 bytes.", head)
    code, said = site.run("records", "--apply", str(max(rejected(site))))
    assert (code, "only its first 65536 bytes" in said) == (1, True)
    with site.store.begin() as conn:
        words: dict[str, Any] = {
            "sender": "table",
            "control_id": "",
            "sent_at": "",
            "trigger": "CSV",
            "result": "refused",
            "reason": "2 rows were refused",
        }
        number = feeds.note_message(conn, **words, now=clock())
    code, said = site.run("records", "--apply", str(number))
    assert (code, "not kept" in said) == (1, True)


def test_all_that_were_refused_are_taken_the_first_first_after_a_mapping_was_added(site: Site) -> None:
    unknown = [result(f"R{n}", str(n), who="P-1||Zyxhuber^Quillon") for n in (1, 2, 3)]
    for n, raw in enumerate([*unknown, unknown[0]]):
        assert come(site, raw, f"{n}.hl7")[0] == 1
    assert come(site, b"MSH|^~\\&|LAB|SITE|||x||ORU^R01|BAD|P|2.5.1\r", "bad.hl7")[0] == 1
    toml = site.folder / "synoptic.toml"
    toml.write_text(toml.read_text("utf-8").replace("[records]\n", '[records]\nissuers = { "" = "SITE" }\n'), "utf-8")
    code, said = site.run("records", "--apply", "all")
    assert code == 1, said
    assert "3 of 4 were taken." in said
    assert values(site) == [1.0, 2.0, 3.0]
    assert ["applied, as No." in why for _, why in sorted(rejected(site).items())] == [True, True, True, True, False]
    code, said = site.run("records", "--apply", "all")
    assert (code, said.count("No. ")) == (1, 1)


def test_several_numbers_are_taken_and_words_that_do_not_go_together_are_refused(site: Site) -> None:
    for n in (1, 2):
        come(site, result(f"R{n}", str(n), who="P-1||Zyxhuber^Quillon"), f"{n}.hl7")
    toml = site.folder / "synoptic.toml"
    toml.write_text(toml.read_text("utf-8").replace("[records]\n", '[records]\nissuers = { "" = "SITE" }\n'), "utf-8")
    for words in (("--apply", "x"), ("--apply", "1", "--apply", "all"), ("--apply", "1", "--withdraw", "1", "--because", "x")):
        assert site.run("records", *words)[0] == 2
    for words in (("--withdraw", "1"), ("--because", "x"), ("--withdraw", "1", "--because", " ")):
        assert site.run("records", *words)[0] == 2
    assert site.run("records", "--apply", "2", "--apply", "1")[0] == 0
    assert values(site) == [1.0, 2.0]


# --- withdrawn


def say(site: Site, several: Sequence[Observation], *, control_id: str, at: datetime = NOW) -> None:
    site.say(RecordUpdate(WHO, tuple(several), source="LAB|SITE", has_demographics=False), control_id=control_id, at=at)


def withdraw(site: Site, number: int, *words: str) -> tuple[int, str]:
    return site.run("records", "--withdraw", str(number), "--because", "The tubes were mixed up.", *words)


def test_what_a_message_said_is_withdrawn_with_who_and_why_and_what_was_known_before_stays(site: Site) -> None:
    crp = Observation(CRP, NOW - HOUR, 5.0, unit="mg/L", key="1")
    panel = (crp, replace(crp, value=6.0, key="2"), Observation(NOTE, NOW - HOUR, text="SECRETWORDS are long " * 4, kind="text", key="3"))
    say(site, panel, control_id="ONE")
    say(site, [replace(crp, value=7.0, key="2", status="C"), replace(crp, value=8.0, key="4")], control_id="TWO", at=NOW + HOUR)
    before = facts(site, "--at", "2024-01-03")
    then = clock().isoformat()
    code, said = withdraw(site, 1, "--yes")
    assert (code, "2 facts" in said) == (0, True), said
    assert values(site) == [7.0, 8.0]  # a correction of another message, and another fact, stand
    assert facts(site, "--at", "2024-01-03", "--known", then) == before | {"known_at": then}
    assert before["unusable"] == []
    gone = facts(site)["unusable"]
    assert {one["value"] for one in gone} == {5.0, None}
    assert all(one["because"].startswith("withdrawn by ") and one["because"].endswith(": The tubes were mixed up.") for one in gone)
    _, shown = site.run("patient", "P-1", columns="200")
    assert "The tubes were mixed up." in line_with(shown, " 5 mg/L")
    assert "SECRETWORDS" not in shown  # a withdrawn text is not kept again
    assert "operator" in shown
    assert "operator" in site.run("records")[1]


def test_only_what_stands_is_withdrawn_and_only_once(site: Site) -> None:
    crp = Observation(CRP, NOW - HOUR, 5.0, unit="mg/L", key="1")
    say(site, [crp], control_id="ONE")
    say(site, [replace(crp, value=7.0, status="C")], control_id="TWO", at=NOW + HOUR)
    code, said = withdraw(site, 1, "--yes")
    assert (code, "superseded" in said) == (1, True)
    assert withdraw(site, 2, "--yes")[0] == 0
    assert values(site) == []  # what the correction corrected does not come back
    assert withdraw(site, 2, "--yes")[0] == 1
    assert withdraw(site, 99, "--yes")[0] == 1
    say(site, [replace(crp, value=9.0, said_at=clock())], control_id="THREE", at=clock())
    assert values(site) == []
    say(site, [replace(crp, value=9.5, status="C", said_at=clock())], control_id="FOUR", at=clock())
    assert values(site) == [9.5]


def test_nothing_is_withdrawn_unless_asked_and_sure(site: Site) -> None:
    say(site, [Observation(CRP, NOW - HOUR, 5.0, unit="mg/L", key="1")], control_id="ONE")
    code, _ = site.run("records", "--withdraw", "1", "--because", "x", answer="n\n")
    assert code == 1
    assert values(site) == [5.0]
    with site.store.read() as conn:
        assert feeds.counts(conn) == {"applied": 1}


def test_a_fact_without_a_name_is_withdrawn_by_its_row_and_its_twin_stands(site: Site) -> None:
    crp = Observation(CRP, NOW - HOUR, 5.0, unit="mg/L", said_at=NOW)
    say(site, [crp, replace(crp, at=NOW)], control_id="ONE")
    say(site, [replace(crp, said_at=NOW + HOUR)], control_id="TWO", at=NOW + HOUR)
    assert withdraw(site, 1, "--yes")[0] == 0
    assert values(site) == [5.0]
    with site.store.read() as conn:
        part = records.view(conn, KEY, as_of=clock(), codes=[("1988-5", "LN")], since=NOW)
    assert part is not None
    assert [one.status for one in part.observations] == ["W"]


def test_a_withdrawal_reaches_the_person_after_a_merge_and_marks_the_studies_of_all_keys(site: Site) -> None:
    other = PatientKey("SITE", "P-2")
    say(site, [Observation(CRP, NOW - HOUR, 5.0, unit="mg/L", key="1")], control_id="ONE")
    site.say(RecordUpdate(Patient(other), source="ADT|SITE", merges=(Merge(other, KEY),)), control_id="TWO", at=NOW + HOUR)
    with site.store.begin() as conn:
        rows = [
            {
                "study_instance_uid": f"1.2.{n}",
                "issuer": "SITE",
                "patient_id": f"P-{n}",
                "created_at": NOW,
                "last_received_at": NOW,
                "quiet_until": NOW,
            }
            for n in (1, 2, 3)
        ]
        conn.execute(study.insert(), rows)
    assert withdraw(site, 1, "--yes")[0] == 0
    assert values(site) == []
    with site.store.read() as conn:
        marked = conn.execute(study.select().order_by(study.c.patient_id)).all()
    assert [one.record_changed_at is not None for one in marked] == [True, True, False]
