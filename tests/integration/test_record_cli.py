"""`synoptic patient` and `synoptic records` on a real database: what they show, what they change, what they never say."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import factories
from tests.conftest import Captured
from tests.record_site import Site, installed, line_with
from worker.domain import Code, Merge, Observation, Patient, PatientKey, RecordUpdate
from worker.ops import log
from worker.record_feeds import clock
from worker.store import feeds, records, studies
from worker.store.database import Store

KEY, RETIRED = PatientKey("SITE", "P-7731"), PatientKey("SITE", "P-0042")
STUDY_AT = datetime(2024, 1, 2, 11, 30, tzinfo=UTC)
CRP, NOTE = Code("1988-5", "LN", "C reactive protein"), Code("34109-9", "LN", "Note")
PLANTED = ("Zyxhuber", "Quillon", "P-7731", "P-0042", "19330224", "SECRETWORDS")
WORDS = "Frau Zyxhuber, born 24.02.1933, had 120 mg/dL. SECRETWORDS follow here and there, twice."


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with installed(tmp_path) as made:
        yield made


@pytest.fixture
def told(site: Site) -> Site:
    """A person with a retired key, values, a text, and what cannot be used."""
    who = Patient(KEY, "Zyxhuber^Quillon", "19330224", "F")
    crp = Observation(CRP, STUDY_AT - timedelta(hours=6), 7.5, "<", "mg/L", key="1")
    facts = (
        crp,
        replace(crp, code=Code("6298-4", "LN", "Potassium"), kind="range", value=3.5, high=5.1, comparator="", unit="mmol/L", key="2"),
        replace(crp, code=Code("5048-4", "LN", "ANA titer"), kind="ratio", value=1.0, high=40.0, comparator="", unit="", key="3"),
        replace(crp, code=Code("2160-0", "LN", "Creatinine"), status="P", value=1.25, comparator="", key="4"),
        replace(crp, code=Code("2345-7", "LN", "Glucose"), at=STUDY_AT + timedelta(days=900), value=5.5, comparator="", key="5"),
        Observation(NOTE, STUDY_AT - timedelta(hours=5), text=WORDS, kind="text", key="6"),
    )
    site.say(RecordUpdate(who, facts, source="LAB|SITE"), control_id="CTRL-1", at=STUDY_AT - timedelta(hours=4))
    late = replace(crp, value=99.0, comparator="", status="C")
    site.say(RecordUpdate(who, (late,), source="LAB|SITE", has_demographics=False), control_id="CTRL-2", at=STUDY_AT + timedelta(hours=1))
    old = Patient(RETIRED, "Oldname^Quillon", "19330224", "F")
    moved = replace(crp, code=Code("2744-1", "LN", "pH"), value=7.35, comparator="", unit="[pH]", key="9")
    site.say(RecordUpdate(old, (moved,)), control_id="CTRL-3", at=STUDY_AT - timedelta(hours=3))
    site.say(RecordUpdate(who, merges=(Merge(KEY, RETIRED),)), control_id="CTRL-4", at=STUDY_AT - timedelta(hours=2))
    return site


def test_a_record_is_shown_with_values_ages_status_and_the_message_each_came_from(told: Site) -> None:
    code, said = told.run("patient", KEY.patient_id, "--at", "2024-01-02T12:30", "--known", "2024-01-02T12:30")
    assert code == 0
    assert line_with(said, "1988-5") == "2024-01-02 06:30 1988-5 LN C reactive protein <7.5 mg/L final 6.0 h +2.0 h 1"
    assert "3.5 to 5.1 mmol/L" in line_with(said, "6298-4")
    assert "1 : 40" in line_with(said, "5048-4")
    assert "preliminary" in line_with(said, "2160-0")
    assert "dated after it was received" in line_with(said, "2345-7")
    assert line_with(said, "CTRL-1").startswith("1 2024-01-02 08:30 LAB|SITE ORU^R01")
    assert "Zyxhuber^Quillon, born 19330224, sex F" in said
    assert "P-7731 of SITE; P-0042 of SITE" in said
    assert "Oldname^Quillon" in said


def test_what_was_received_later_is_not_in_what_was_known_then(told: Site) -> None:
    now = json.loads(told.run("patient", KEY.patient_id, "--json")[1])
    then = json.loads(told.run("patient", KEY.patient_id, "--json", "--known", "2024-01-02T12:30+01:00")[1])
    value = {
        name: next(one["value"] for one in facts["facts"] if one["code"]["value"] == "1988-5")
        for name, facts in (("now", now), ("then", then))
    }
    assert value == {"now": 99.0, "then": 7.5}
    before = json.loads(told.run("patient", KEY.patient_id, "--json", "--known", "2024-01-02T09:00")[1])
    assert (before["merges"], len(before["keys"]), len(now["keys"])) == ([], 1, 2)


def test_a_text_is_redacted_unless_asked_for_whole(told: Site) -> None:
    for extra in ((), ("--json",)):
        _, said = told.run("patient", KEY.patient_id, *extra)
        assert "Frau [name], born [date], had 120 mg/dL. SECRETWORDS" in said
        _, said = told.run("patient", KEY.patient_id, "--full", *extra)
        assert WORDS[:40] in said


def test_an_id_of_several_issuers_is_never_guessed(told: Site) -> None:
    other = PatientKey("ELSEWHERE", KEY.patient_id)
    told.say(RecordUpdate(Patient(other, "Other^One"), ()), control_id="X", at=STUDY_AT)
    code, said = told.run("patient", KEY.patient_id)
    assert code == 3
    assert "--issuer: ELSEWHERE, SITE." in said
    code, said = told.run("patient", KEY.patient_id, "--issuer", "ELSEWHERE")
    assert (code, "Other^One" in said, "Zyxhuber" in said) == (0, True, False)


def test_an_id_that_only_another_issuer_knows_is_not_taken_for_the_sites(site: Site) -> None:
    site.say(RecordUpdate(Patient(PatientKey("ELSEWHERE", "E-1"), "Other^One")), control_id="X", at=STUDY_AT)
    code, said = site.run("patient", "E-1")
    assert (code, "Other" in said, "--issuer ELSEWHERE" in said) == (3, False, True)
    assert site.run("patient", "NOBODY")[0] == 3


@pytest.mark.parametrize(
    "words",
    [
        ("--at", "yesterday"),
        ("--at", "2024-01-02", "--study", "1"),
        ("--bundle", "cxr-severity"),
        ("--unmerge", "1"),
        ("--erase",),
        ("--unmerge", "1", "--because", "x", "--erase", "--receipt", "r.json"),
    ],
)
def test_words_that_do_not_go_together_are_refused_before_anything_is_done(told: Site, words: tuple[str, ...]) -> None:
    assert told.run("patient", KEY.patient_id, "--yes", *words)[0] == 2
    with told.store.read() as conn:
        assert len(records.merges_of(conn, KEY)) == 1


def _import_radiograph(site: Site, key: PatientKey) -> None:
    factories.write(factories.make_radiograph(patient=key, study_time="123000"), site.folder / "images" / "one.dcm")
    code, said = site.run("import", str(site.folder / "images"))
    assert code == 0, said


def test_with_a_study_and_a_bundle_it_says_what_the_network_is_given_and_what_is_missing_and_why(told: Site) -> None:
    _import_radiograph(told, KEY)
    words = ("patient", KEY.patient_id, "--study", "A-0002", "--bundle", "cxr-severity")
    code, said = told.run(*words, "--known", "2024-01-02T12:30")
    assert code == 0, said
    facts = json.loads(told.run(*words, "--json", "--known", "2024-01-02T12:30")[1])
    assert "What the network is given" in said
    (crp,) = (one for one in facts["inputs"]["values"] if one["code"]["value"] == "1988-5")
    assert (crp["value"], crp["comparator"], crp["age_h"]) == (7.5, "<", 6.0)
    assert facts["inputs"]["missing"]
    assert all(one["because"] for one in facts["inputs"]["missing"])
    assert facts["inputs"]["missing"][0]["because"] in " ".join(said.split())


def test_a_record_is_not_shown_as_of_a_study_of_another_patient(told: Site) -> None:
    _import_radiograph(told, PatientKey("SITE", "SOMEBODY"))
    code, said = told.run("patient", KEY.patient_id, "--study", "1")
    assert (code, "another patient" in said, "Zyxhuber" in said) == (1, True, False)


@pytest.mark.requirement("F3")
def test_a_merge_is_undone_by_its_number_after_a_yes(told: Site) -> None:
    words = ("patient", KEY.patient_id, "--unmerge", "1", "--because", "Two persons.")
    assert told.run(*words, answer="n\n")[0] == 1
    with told.store.read() as conn:
        assert len(records.merges_of(conn, KEY)) == 1
    code, said = told.run(*words, answer="y\n")
    assert (code, "undone" in said) == (0, True)
    facts = json.loads(told.run("patient", KEY.patient_id, "--json")[1])
    assert (facts["merges"], [one["patient_id"] for one in facts["keys"]]) == ([], [KEY.patient_id])
    assert told.run(*words, "--yes")[0] == 3


def test_a_merge_of_others_is_not_undone_under_this_patient(told: Site) -> None:
    told.say(RecordUpdate(Patient(PatientKey("SITE", "Q-1"), "Q")), control_id="Q", at=STUDY_AT)
    assert told.run("patient", "Q-1", "--unmerge", "1", "--because", "x", "--yes")[0] == 3
    with told.store.read() as conn:
        assert len(records.merges_of(conn, KEY)) == 1


def _complete(site: Site) -> None:
    with site.store.begin() as conn:
        for pending in studies.receiving(conn):
            studies.complete(conn, pending, cause="test", now=clock())


def test_an_erased_patient_is_gone_with_the_files_and_the_receipt_is_its_owners_alone(told: Site) -> None:
    _import_radiograph(told, KEY)
    _complete(told)
    spooled = [path for path in (told.folder / "data" / "spool" / "instances").rglob("*") if path.is_file()]
    receipt = told.folder / "receipt.json"
    assert spooled
    assert told.run("patient", KEY.patient_id, "--erase", "--receipt", str(receipt), answer="n\n")[0] == 1
    assert not receipt.exists()
    code, said = told.run("patient", KEY.patient_id, "--erase", "--receipt", str(receipt), "--yes")
    assert code == 0, said
    assert stat.S_IMODE(receipt.stat().st_mode) == 0o600
    written = json.loads(receipt.read_text("utf-8"))
    assert (len(written["paths"]), written["counts"]["studies"]) == (1, 1)
    assert not any(planted in receipt.read_text("utf-8") for planted in PLANTED)
    assert not any(path.exists() for path in spooled)
    assert told.run("patient", KEY.patient_id)[0] == 3
    with told.store.read() as conn:
        assert records.is_known(conn, RETIRED)


def test_nothing_is_erased_where_the_receipt_cannot_be_written_or_the_rows_may_not_go(told: Site) -> None:
    receipt = told.folder / "receipt.json"
    receipt.write_text("another's")
    code, said = told.run("patient", KEY.patient_id, "--erase", "--receipt", str(receipt), "--yes")
    assert (code, "there already" in said, receipt.read_text()) == (1, True, "another's")
    _import_radiograph(told, KEY)  # still being received: may not go
    code, said = told.run("patient", KEY.patient_id, "--erase", "--receipt", str(told.folder / "new.json"), "--yes")
    assert (code, (told.folder / "new.json").exists()) == (1, False)
    assert told.run("patient", KEY.patient_id)[0] == 0


def _refuse(site: Site, raw: bytes) -> None:
    with site.store.begin() as conn:
        said: dict[str, Any] = {"sender": "", "control_id": "", "sent_at": "", "trigger": "", "result": "refused"}
        feeds.note_message(conn, **said, reason="MSH-9 is empty.", raw=raw, now=clock())


@pytest.mark.requirement("F11")
def test_feeds_are_shown_with_counts_lag_and_silence_and_refused_messages_without_content(told: Site) -> None:
    with told.store.begin() as conn:
        words: dict[str, Any] = {"sender": "ADT|SITE", "control_id": "1", "sent_at": "no time", "trigger": "ADT^A08"}
        feeds.note_message(conn, **words, result="ignored", now=clock() - timedelta(hours=2))
    _refuse(told, b"MSH|Zyxhuber^Quillon")
    facts = json.loads(told.run("records", "--json")[1])
    by_sender = {one["sender"]: one for one in facts["feeds"]}
    assert by_sender["LAB|SITE"]["messages"] == {"applied": 4, "ignored": 0, "refused": 0}
    assert by_sender["LAB|SITE"]["lag_s"] == 90.0
    assert {name: (one["is_silent"], one["lag_s"]) for name, one in by_sender.items() if name != "LAB|SITE"} == {
        "ADT|SITE": (True, None),
        "": (False, None),
    }
    assert not by_sender["LAB|SITE"]["is_silent"], "not heard for years: no feed any more"
    code, said = told.run("records")
    assert code == 0
    assert "silent 2.0 h" in line_with(said, "ADT|SITE")
    assert "MSH-9 is empty." in said
    assert not any(planted in said for planted in PLANTED)
    assert "MSH-9" not in told.run("records", "--rejected", "0")[1]


def test_the_bytes_of_a_message_go_to_a_new_file_of_its_owner_and_never_to_the_terminal(told: Site) -> None:
    raw = b"MSH|^~\\&|\x00\xffZyxhuber^Quillon"
    _refuse(told, raw)
    to = told.folder / "message.bin"
    assert told.run("records", "--message", "5")[0] == 2
    code, said = told.run("records", "--message", "5", "--out", str(to))
    assert (code, to.read_bytes(), stat.S_IMODE(to.stat().st_mode)) == (0, raw, 0o600)
    assert "Zyxhuber" not in said
    assert told.run("records", "--message", "5", "--out", str(to))[0] == 1
    assert told.run("records", "--message", "1", "--out", str(told.folder / "none"))[0] == 3
    assert not (told.folder / "none").exists()


@pytest.mark.requirement("F12")
def test_names_that_are_code_elsewhere_are_text_here(site: Site) -> None:
    """SQL, formats, spreadsheets' formulas, rich's markup, and escapes that would move the cursor or ask the terminal."""
    name = "'; DROP TABLE patient;--^%s{0}%n^=cmd|'/c calc'!A1 [red]x[/red] [/] \x1b]0;title\x07\x1b[2J\r\n"
    key = PatientKey("SITE", "=1+1' OR '1'='1")
    fact = Observation(Code("X", "L", f"[bold]{name}"), STUDY_AT, text=f"[/]\x1b[31m {name * 3}", kind="text", unit="[oz_av]")
    site.say(
        RecordUpdate(Patient(key, name), (fact, replace(fact, kind="number", value=1.0, text=""))), control_id="[/]\x1b[1m", at=STUDY_AT
    )
    for extra in ((), ("--full",)):
        code, said = site.run("patient", key.patient_id, *extra)
        assert code == 0
        assert "'; DROP TABLE patient;--^%s{0}%n^=cmd|'/c calc'!A1 [red]x[/red] [/]" in said
        assert "\x1b" not in said
        assert "\x07" not in said
    code, said = site.run("patient", key.patient_id, "--json")
    assert json.loads(said)["demographics"]["name"] == name
    assert "\x1b" not in said
    assert site.run("records")[0] == 0


@pytest.mark.requirement("X1")
def test_none_of_these_verbs_writes_of_a_patient_to_the_log(told: Site, captured: Captured, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _import_radiograph(told, KEY)
    _complete(told)
    captured.clear()
    caplog.clear()
    for name in ("sqlalchemy", "sqlalchemy.engine"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).propagate = True
    loud = Store(str(told.store.url))
    with loud.read() as conn:
        assert records.is_known(conn, KEY)
        assert records.view(conn, KEY, as_of=STUDY_AT)
    loud.close()
    assert "Zyxhuber" in caplog.text, "the log holds no rows: the test would prove nothing"
    caplog.clear()
    log.silence()  # as `main` does, before any verb
    said = told.run("patient", KEY.patient_id, "--full")[1]
    told.run("patient", KEY.patient_id, "--study", "1", "--bundle", "cxr-severity")
    told.run("patient", KEY.patient_id, "--issuer", "NOBODY")
    told.run("records", "--json")
    told.run("patient", KEY.patient_id, "--unmerge", "1", "--because", "Two persons.", "--yes")
    told.run("patient", KEY.patient_id, "--erase", "--receipt", str(told.folder / "receipt.json"), "--yes")
    assert "Zyxhuber" in said, "the plant never arrived: the test would prove nothing"
    assert [planted for planted in PLANTED if planted in caplog.text] == []
    assert [planted for planted in PLANTED if planted in str(captured)] == []


def test_before_anybody_is_asked_it_is_known_whether_there_is_anything_to_erase_and_where_it_is_told(told: Site) -> None:
    receipt = told.folder / "receipt.json"
    words = ("patient", KEY.patient_id, "--erase", "--receipt", str(receipt))
    code, said = told.run("patient", "NOBODY", "--erase", "--receipt", str(receipt), answer="y\n")
    assert (code, "will be deleted" in said, "Delete it?" in said) == (1, False, False)
    code, said = told.run(*words, answer="n\n")
    assert "7 facts" in said
    assert "will be deleted" in said
    with told.store.read() as conn:
        assert records.is_known(conn, KEY)
        assert len(records.merges_of(conn, KEY)) == 1
    receipt.write_text("another's")
    code, said = told.run(*words, answer="y\n")
    assert (code, "there already" in said, "Delete it?" in said) == (1, True, False)
    code, said = told.run("patient", KEY.patient_id, "--erase", "--receipt", str(told.folder / "none" / "r.json"), answer="y\n")
    assert (code, "folder" in said, "Delete it?" in said) == (1, True, False)
