"""What `synoptic patient` and `synoptic records` print at the edges: of the calendar, of the terminal, of what a sender may write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.record_site import Site, installed, line_with
from worker import config as config_file
from worker.domain import Code, Merge, Observation, Patient, PatientKey, RecordUpdate
from worker.intake.hl7 import parse
from worker.record_feeds import apply_message, clock
from worker.store import feeds

KEY = PatientKey("SITE", "P-7731")
STUDY_AT = datetime(2024, 1, 2, 11, 30, tzinfo=UTC)
CRP = Code("1988-5", "LN", "C reactive protein")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with installed(tmp_path) as made:
        yield made


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Kiritimati", "+01:00"])
def test_times_at_the_calendars_edge_are_shown_and_asked_for(tmp_path: Path, zone: str) -> None:
    """In most zones one of them is outside of it."""
    with installed(tmp_path, zone=zone) as site:
        first = Observation(CRP, datetime(1, 1, 1, tzinfo=UTC), 7.5, "", "mg/L", key="1")
        last = replace(first, at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), key="2")
        site.say(RecordUpdate(Patient(KEY, "A"), (first, last)), control_id="1", at=STUDY_AT)
        for words in ((), ("--at", "0001-01-01T00:00"), ("--at", "9999-12-31T23:59"), ("--known", "0001-01-01T00:00"), ("--json",)):
            code, said = site.run("patient", KEY.patient_id, *words)
            assert code == (3 if "--known" in words else 0), said
        assert "date cannot be" in line_with(site.run("patient", KEY.patient_id)[1], "0001-01-01")
        assert "2025" not in line_with(site.run("patient", KEY.patient_id)[1], "0001-01-01")


def test_a_value_beyond_all_numbers_is_shown_and_beside_texts_stands_that_they_are_redacted(site: Site) -> None:
    huge = Observation(CRP, STUDY_AT, text="1e400", kind="text", key="1")
    site.say(RecordUpdate(Patient(KEY, "A"), (huge,)), control_id="1", at=STUDY_AT)
    said = site.run("patient", KEY.patient_id)[1]
    assert "1e400" in line_with(said, "1988-5")
    assert "are redacted; --full" in line_with(said, "Facts that stand")
    assert "redacted" not in site.run("patient", KEY.patient_id, "--full")[1]


@pytest.mark.requirement("F12")
def test_an_id_or_issuer_that_turns_the_line_round_is_shown_plain_wherever_it_is_named(site: Site) -> None:
    bad = "\u202e\x1b[2J\u2066"
    retired, survivor, twin = PatientKey("SITE", f"R{bad}"), PatientKey("SITE", f"S{bad}"), PatientKey(f"E{bad}", f"S{bad}")
    site.say(RecordUpdate(Patient(survivor, "A"), merges=(Merge(survivor, retired),)), control_id="1", at=STUDY_AT)
    words = ("patient", survivor.patient_id)
    unmerge = ("--unmerge", "1", "--because", "Two persons.", "--yes")
    erase = ("--erase", "--receipt", str(site.folder / "receipt.json"))
    several = [site.run(*words, *erase, answer="n\n"), site.run(*words, *unmerge), site.run(*words)]
    assert [code for code, _ in several] == [1, 0, 0]
    site.say(RecordUpdate(Patient(twin, "B")), control_id="2", at=STUDY_AT)
    several.append(site.run(*words))
    assert several[-1][0] == 3
    assert "--issuer" in several[-1][1]
    for _, said in several:
        assert not set("\u202e\x1b\u2066") & set(said)


def test_at_eighty_columns_a_feed_is_oneline_with(site: Site) -> None:
    with site.store.begin() as conn:
        words: dict[str, Any] = {"sender": "LABSYSTEM|ST_ELSEWHERE", "sent_at": "1989-01-01T00:00:00+00:00", "trigger": "ORU^R01"}
        feeds.note_message(conn, **words, control_id="1", result="applied", now=clock() - timedelta(hours=2))
    said = site.run("records", columns="80")[1]
    assert line_with(said, "LABSYSTEM") == "LABSYSTEM|ST_ELSEWHERE 1 0 0 >30 d silent 2.0 h"
    assert max(map(len, said.splitlines())) <= 80


def test_a_patient_who_was_erased_stays_erased_when_old_messages_come_again(site: Site) -> None:
    config = config_file.read(site.folder / "synoptic.toml")

    def send(control_id: str, whom: str, words: str) -> bool:
        lines = (
            f"MSH|^~\\&|LAB|SITE|||20240102110000||ORU^R01|{control_id}|P|2.5",
            f"PID|||{whom}^^^SITE||Zyxhuber^Quillon||19330224|F",
            "OBR|1|P1|F1|34109-9^Note^LN|||20240102100000",
            f"OBX|1|TX|34109-9^Note^LN||{words}||||||F",
        )
        raw = "\r".join(lines).encode()
        return apply_message(config, site.store, parse(raw, zone=UTC, issuers={}), raw)

    assert send("1", "P-7731", "Own words.")
    assert send("2", "P-8000", "Twin of P-7731.")
    assert site.run("patient", "P-7731", "--erase", "--receipt", str(site.folder / "receipt.json"), "--yes")[0] == 0
    assert not send("1", "P-7731", "Own words.")
    assert site.run("patient", "P-7731")[0] == 3
    assert "Twin of P-7731." in site.run("patient", "P-8000", "--full")[1]
    assert send("3", "P-7731", "New words.")
    said = site.run("patient", "P-7731", "--full")[1]
    assert ("New words." in said, "Own words." in said) == (True, False)
