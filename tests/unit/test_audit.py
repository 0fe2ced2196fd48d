"""The audit trail: each message is what PS3.15 wants, whatever is in it, and the file is bounded whoever writes to it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.atna import details, lines, objects, outcome, trail
from tests.conftest import Captured
from worker import events
from worker.domain import Patient, PatientKey
from worker.errors import PeerUnavailable
from worker.ops import audit, forwarding
from worker.ops.trail import CALLERS, Trail

WHOSE = Patient(PatientKey("HOSPITAL", "0012"), "Müller^Jörg", "19700101", "M")
STUDY = audit.Subject("1.2.3", WHOSE, "A-77", {"1.2.840.10008.5.1.4.1.1.2": 90})
PACS = audit.Party("PACS", "10.0.0.7")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A trail that is being written."""
    audit.begin(tmp_path / "audit", ae_title="SYNOPTIC", limit_bytes=2**20)
    yield tmp_path / "audit"
    audit.end()


def write_each() -> None:
    events.emit("role.started", role="receive", pid=7, seconds=0.1, rss_mb=90)
    audit.transferred(STUDY, source=PACS, action="C", outcome=audit.SUCCESS)
    audit.transferred(None, source=PACS, action="C", outcome=audit.FAILED, reason="The data set cannot be read")
    audit.begun(STUDY, destination=PACS)
    audit.transferred(STUDY, destination=PACS, action="C", outcome=audit.AGAIN, reason="PACS cannot store now: 0xA700.")
    with audit.asking(PACS, b"\x08\x00", of="1.2", syntax="1.2.840.10008.1.2"):
        pass
    with suppress(PeerUnavailable), audit.asking(audit.Party("https://pacs/", is_ae=False), b"?x", of="https://pacs/"):
        raise PeerUnavailable("PACS gives no answer.")
    audit.accessed(STUDY, user="cxr-severity", outcome=audit.SUCCESS)
    audit.record("R", [WHOSE], outcome=audit.SUCCESS, user="cxr-severity")
    audit.record("U", [WHOSE], outcome=audit.SUCCESS, source=audit.Party("LAB|SITE", is_ae=False), message="MSG1")
    events.emit("association.rejected", address="10.1.1.1", calling_ae="EVIL", reason="calling AE title not recognized", is_alert=True)
    events.emit("role.restarted", role="run", code=-9, pause_s=0.5, pid=8)
    events.emit("role.stopped", role="receive")


def test_each_message_is_what_the_standard_wants(folder: Path) -> None:
    write_each()
    found = trail(folder)
    assert [one[0][0].attrib["csd-code"] for one in found] == (
        ["110100", "110104", "110104", "110102", "110104", "110112", "110112", "110103", "110110", "110110", "110113", "110100", "110100"]
    )
    assert [outcome(one) for one in found] == ["0", "0", "8", "0", "4", "0", "4", "0", "0", "0", "4", "12", "0"]
    assert objects(found[1]) == ["1.2.3", "0012^^^HOSPITAL"]
    assert objects(found[2]) == []
    assert "Müller^Jörg" in [one.text for one in found[1].iter("ParticipantObjectName")]
    sender, us = found[1].iter("ActiveParticipant")
    assert (sender.attrib["AlternativeUserID"], sender.attrib["NetworkAccessPointID"]) == ("AETITLES=PACS", "10.0.0.7")
    assert (us.attrib["AlternativeUserID"], us.attrib["UserIsRequestor"]) == ("AETITLES=SYNOPTIC", "false")
    assert details(found[9]) == {"MSH-10": "MSG1"}
    assert details(found[10]) == {"Alert Description": "calling AE title not recognized"}
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.log")} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_people_do_is_told_as_the_standard_wants(folder: Path) -> None:
    person = audit.Party("a.viewer", "10.0.0.9", is_ae=False)
    audit.logged(audit.LOGIN, person)
    audit.logged(audit.LOGIN, audit.Party("unknown", "10.0.0.9", is_ae=False), outcome=audit.AGAIN, reason="name or password is wrong")
    audit.logged(audit.LOGOUT, person)
    audit.searched(person, "A-77")
    audit.accessed(STUDY, person=person)
    audit.accessed(STUDY, person=person, action="U", reason="retry: 2 jobs put back.")
    audit.guarded(audit.RESTRICTED, person, name="a.viewer", reason="refused, for it needs the role operator", outcome=audit.AGAIN)
    audit.guarded(audit.ATTRIBUTES, audit.Party("root", is_ae=False), name="a.viewer", reason="added as viewer")
    found = trail(folder)
    codes = [one[0][0].attrib["csd-code"] for one in found]
    assert codes == ["110114", "110114", "110114", "110112", "110103", "110103", "110113", "110113"]
    assert [outcome(one) for one in found] == ["0", "4", "0", "0", "0", "0", "4", "0"]
    who, us = found[4].iter("ActiveParticipant")
    assert (who.attrib["UserID"], who.attrib["NetworkAccessPointID"], who.attrib["UserIsRequestor"]) == ("a.viewer", "10.0.0.9", "true")
    assert us.attrib["AlternativeUserID"] == "AETITLES=SYNOPTIC"
    assert objects(found[4]) == ["1.2.3", "0012^^^HOSPITAL"]
    assert [one[0][1].attrib["csd-code"] for one in found[:3]] == ["110122", "110122", "110123"]


def test_without_a_trail_nothing_is_written_and_nothing_fails(tmp_path: Path) -> None:
    write_each()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80), st.text(max_size=2000))
def test_no_text_ends_a_line_or_a_message(folder: Path, name: str, identifier: str) -> None:
    before = len(lines(folder))
    whose = Patient(PatientKey(identifier, name), name)
    audit.transferred(
        audit.Subject(identifier or "1", whose, name), source=audit.Party(name, name), action="C", outcome="8", reason=name + "]]>"
    )
    assert len(lines(folder)) == before + 1
    assert len(trail(folder)[before]) == 6


def test_markup_in_a_name_is_text(folder: Path) -> None:
    audit.record("U", [Patient(PatientKey('"/>', "<!--"), "</AuditMessage>\n<&\x00\ud800")], outcome="0")
    (one,) = trail(folder)
    assert objects(one) == ['<!--^^^"/>']
    assert next(one.iter("ParticipantObjectName")).text == "</AuditMessage>\ufffd<&\ufffd\ufffd"


_WRITER = """
import sys
from pathlib import Path
from worker.ops.trail import Trail
trail = Trail(Path(sys.argv[1]), limit_bytes=2**30)
for number in range(500):
    trail.append(b"<85>" + sys.argv[2].encode() * (500 + number) + b"</AuditMessage>")
"""


def test_processes_that_write_at_once_never_mix_their_lines(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), letter]) for letter in "abcd"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    found = lines(tmp_path)
    assert len(found) == 2000
    assert all(len(set(line[4:-15])) == 1 and line.endswith("</AuditMessage>") for line in found)


@pytest.mark.requirement("X11")
def test_a_trail_that_is_full_stops_nobody_says_so_once_and_counts(tmp_path: Path, captured: Captured) -> None:
    audit.begin(tmp_path, ae_title="SYNOPTIC", limit_bytes=5000)
    try:
        for _ in range(20):
            audit.accessed(STUDY, user="b", outcome="0")
        (said,) = captured.named("audit.failed")
        assert "limit_mb" in str(said["reason"])
        written = len(trail(tmp_path))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000
        for path in tmp_path.iterdir():
            path.unlink()  # as an operator does, or the next day
        audit.accessed(STUDY, user="b", outcome="0")
    finally:
        audit.end()
    first, second = trail(tmp_path)
    assert first[0][0].attrib["originalText"] == "DICOM Instances Accessed"
    assert details(second) == {"Alert Description": f"{20 - written} audit messages could not be recorded"}


def test_half_a_line_of_a_full_disk_costs_that_line_alone(tmp_path: Path) -> None:
    (tmp_path / f"{datetime.now(UTC):%Y-%m-%d}.log").write_bytes(b"<85>1 half")
    Trail(tmp_path, limit_bytes=10_000).append(b"<85>1 whole")
    assert lines(tmp_path)[-2:] == ["<85>1 half", "<85>1 whole"]


@pytest.mark.requirement("X11")
def test_an_attacker_cannot_fill_the_trail_and_is_counted(folder: Path) -> None:
    for number in range(10_000):
        events.emit("association.rejected", address=f"10.0.{number % 100}.1", calling_ae="X", reason="stranger", is_alert=True)
    assert len(lines(folder)) == CALLERS
    audit.end()
    found = trail(folder)
    assert len(found) == CALLERS + CALLERS + 1
    counts = [int(details(one)["Alert Description"].rpartition(": ")[2].split()[0]) for one in found[CALLERS:]]
    assert sum(counts) + CALLERS == 10_000


def looked_after(folder: Path, *, limit_bytes: int) -> None:
    one = forwarding.Forwarder(folder, connect=None, limit_bytes=limit_bytes, keep_days=30)
    one.start()
    one.stop()


def day(folder: Path, ago: int, *, messages: int) -> str:
    name = f"{datetime.now(UTC) - timedelta(days=ago):%Y-%m-%d}.log"
    (folder / name).write_bytes(b"<85>1 x</AuditMessage>\n" * messages)
    return name


@pytest.mark.requirement("X11")
def test_days_go_when_they_are_old_or_too_many_and_never_today(tmp_path: Path, captured: Captured) -> None:
    names = [day(tmp_path, ago, messages=100) for ago in (40, 20, 10, 0)]
    looked_after(tmp_path, limit_bytes=2**20)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == names[1:]
    looked_after(tmp_path, limit_bytes=100)
    assert [path.name for path in tmp_path.glob("*.log")] == [names[-1]]
    assert captured.named("audit.dropped")


@pytest.mark.requirement("X11")
def test_while_the_clock_is_doubted_no_day_goes_for_its_age(tmp_path: Path) -> None:
    """Put ahead by a year, it would make the whole trail old."""
    names = [day(tmp_path, ago, messages=100) for ago in (400, 0)]
    forwarder = forwarding.Forwarder(tmp_path, connect=None, limit_bytes=2**20, keep_days=30, is_trusted=lambda: False)
    forwarder.tick()
    assert sorted(path.name for path in tmp_path.glob("*.log")) == names


@pytest.mark.requirement("X11")
@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "removed"])
def test_a_trail_whose_folder_is_taken_away_begins_anew_in_its_place(folder: Path, captured: Captured, *, is_moved: bool) -> None:
    audit.record("U", [WHOSE], outcome="0")
    if is_moved:
        folder.rename(folder.with_name("elsewhere"))
    else:
        shutil.rmtree(folder)
    audit.record("U", [WHOSE], outcome="0")
    assert len(lines(folder)) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not captured.named("audit.failed")
