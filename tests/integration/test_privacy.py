"""One planted patient goes in by every door, well and badly; nothing of him is in a log, a name, a process or a vendor's bundle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
import pydicom
import pytest
from pydicom.dataset import FileDataset

from tests import factories
from tests.fhir_server import FhirServer, Reply, outcome
from tests.installation import BUNDLES, Installation, wait_until
from tests.peers import ScriptedPacs, dcmtk
from tests.scu import CT, EXPLICIT, Scu, encoded, slice_of, with_raw
from worker.config import Config
from worker.domain import PatientKey
from worker.errors import PeerUnavailable
from worker.intake import mllp

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]

NAME, IDENTITY, BIRTH, ACCESSION, NOTE = "Zzyzxplant^Quillon", "PLANTED-77345", "19330224", "ACC-PLANT-9", "Frobnicatedly"
STUDY, SERIES, SOP = "2.25.88776655443322119", "2.25.77665544332211998", "2.25.66554433221199887"
PLANTED: Final = (*NAME.split("^"), IDENTITY, BIRTH, "1933-02-24", "24.02.1933", ACCESSION, NOTE, STUDY, SERIES, SOP)
TABLE: Final = Path(__file__).parents[1] / "golden" / "ps3.15-e.1-1.txt"
#: Many verbs for one start of Python; a form feed ends what each says.
VERBS: Final = """
import json, sys
from worker.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit:
        pass
    print(end="\\f", flush=True)
"""
MAPPING: Final = """
name = "lab"
key_columns = ["nr"]
[patient]
id_column = "pid"
issuer = "SITE"
name_columns = ["name"]
[time]
column = "drawn"
zone = "UTC"
[[values]]
column = "crp"
code = ["CRP", "L", "CRP"]
unit = "mg/L"
"""


@dataclass
class Walked:
    """What all doors left behind."""

    installation: Installation
    folder: Path
    verbs: dict[str, str] = field(default_factory=dict)
    processes: dict[str, str] = field(default_factory=dict)
    listening: set[tuple[str, int]] = field(default_factory=set)
    shared_memory: list[str] = field(default_factory=list)
    sent: list[FileDataset] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What all processes wrote, on standard output and error."""
        return self.installation.log.read_text("utf-8")

    def store(self, number: int, *, study: str = "", patient_id: str = IDENTITY, **values: object) -> None:
        """Send a radiograph of the planted patient by DCMTK."""
        ds = factories.make_radiograph(patient=PatientKey("SITE", patient_id), accession_number=f"{ACCESSION}{number}", seed=number)
        ds.PatientName, ds.PatientBirthDate, ds.SeriesDescription, ds.ImageComments = NAME, BIRTH, NAME, NOTE
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study or f"{STUDY}.{number}", f"{SERIES}.{number}"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(f"{SOP}.{number}")
        for keyword, value in values.items():
            setattr(ds, keyword, value)
        self.sent.append(ds)
        path = factories.write(ds, self.folder / f"{len(self.sent)}.dcm")
        dcmtk("/usr/bin/storescu", "-R", "-aet", "MODALITY", "-aec", "WORKER", "127.0.0.1", str(self.installation.port), str(path))

    def run(self, *verbs: list[str]) -> None:
        """Verbs, one after the other in one process, and all that each said."""
        given = json.dumps([[*words, "--config", str(self.installation.config)] for words in verbs])
        done = subprocess.run(
            [sys.executable, "-c", VERBS, given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=True
        )
        self.verbs |= zip((" ".join(words) for words in verbs), done.stdout.split("\f"), strict=False)

    def look(self) -> None:
        """All processes as `ps` shows them, their environment, their listening sockets, the pixels they hold."""
        assert self.installation.process is not None
        top = psutil.Process(self.installation.process.pid)
        for process in [top, *top.children(recursive=True)]:
            told = Path(f"/proc/{process.pid}")
            name = " ".join(process.cmdline()[2:5])
            self.processes[f"{process.pid} {name}"] = (told / "cmdline").read_text() + (told / "environ").read_text()
            links = [str(one.readlink()) for one in (told / "fd").iterdir() if one.is_symlink()]
            self.shared_memory += [one for one in links if "memfd" in one or "/dev/shm" in one]
            for one in process.net_connections("inet"):
                if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
                    self.listening.add((one.laddr.ip, one.laddr.port))


def _messages() -> list[bytes]:
    head = "MSH|^~\\&|LAB|SITE|X|Y|20240102||ORU^R01^ORU_R01|{}|P|2.5.1\rPID|1||" + f"{IDENTITY}^^^SITE^MR||{NAME}||{BIRTH}|M\r"
    other = head.replace(IDENTITY, f"{IDENTITY}-7").replace(NAME, "Other^Person").replace(BIRTH, "20010101")
    value = "OBX|1|NM|1988-5^CRP^LN||{}|mg/L^mg/L^UCUM|||||F|||20240102060000\r"
    return [
        one.encode()
        for one in (
            head.format(1) + "OBR|1||5|LAB^L^L|||20240102060000\r" + value.format(7),
            head.format(2) + f"OBR|1||6|LAB^L^L|||{NAME}\rOBX|1|NM|1988-5^CRP^LN||{NAME}|mg/L|||||F|||{NAME}\r",
            head.format(3) + f"OBR|1||7|NOTE^N^L|||20240102060000\rOBX|1|TX|NOTE^N^L||{NOTE} {NAME} {BIRTH}||||||F|||20240102060000\r",
            other.format(4) + f"OBR|1||8|{ACCESSION}|||20240102060000\r" + value.format(8),
            f"MSH|^~\\&|LAB|SITE|X|Y|{NAME}||{NAME}|5|P|2.5.1\rPID|1||{IDENTITY}\r",
            f"{NAME}|{IDENTITY}|{BIRTH}\r",
            "MSH|" + f"{NAME}" * 40,
        )
    ]


def _say(port: int, message: bytes) -> None:
    """One message on a connection of its own: garbage gets an answer that answers nothing, or none."""
    with contextlib.suppress(PeerUnavailable):
        mllp.send(("127.0.0.1", port), [message], timeout_s=10)


def _hostile(port: int) -> None:
    """Data sets that parse badly, each with the patient in them."""
    ds = slice_of(f"{STUDY}.90", PatientName=NAME, PatientID=IDENTITY, PatientBirthDate=BIRTH, AccessionNumber=ACCESSION)
    ds.SOPInstanceUID = f"{SOP}.90"
    whole = encoded(ds)
    planted = NAME.encode()
    broken = [
        with_raw(ds, {0x00200011: planted + b" ", 0x00280010: planted + b" "}),
        with_raw(ds, {0x00080018: planted + b"\0" * (len(planted) % 2)}),
        with_raw(ds, {0x0020000D: b"../../" + planted + b"\0" * (len(planted) % 2)}),
        whole[: whole.index(IDENTITY.encode()) + 4],
        planted * 9,
        b"",
    ]
    for data in broken:
        with Scu(("127.0.0.1", port)) as scu:
            scu.associate([(CT, (EXPLICIT,))], called="WORKER", calling="MODALITY")
            scu.store(ds, data=data)


def _tracebacks(walked: Walked) -> None:
    """The database says the patient's name in an error that nobody foresaw, in each of the three places that write."""
    installation = walked.installation
    with sqlite3.connect(installation.folder / "data" / "synoptic.db", timeout=30, isolation_level=None) as conn:
        for table in ("instance", "message", "document"):
            conn.execute(f"CREATE TRIGGER planted_{table} BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, '{NAME} {IDENTITY}'); END")
        walked.store(40)
        _say(installation.mllp_port, _messages()[2].replace(b"|3|P|", b"|33|P|"))
        conn.execute("DROP TRIGGER planted_instance")
        walked.store(41)

        def is_told() -> bool:
            return any(one["kind"] == "infer" and "places" in one for one in installation.events("job.retried"))

        wait_until(is_told, timeout_s=90, what="the report that could not be stored")
        conn.execute("DROP TRIGGER planted_message")
        conn.execute("DROP TRIGGER planted_document")
    conn.close()


def _restart(walked: Walked) -> None:
    """The kernel ends each kind of child once."""
    assert walked.installation.process is not None
    children = psutil.Process(walked.installation.process.pid).children()
    for child in children:
        child.send_signal(signal.SIGABRT if "run" in child.cmdline() else signal.SIGKILL)
    started = len(walked.installation.events("role.started"))
    walked.installation.wait_for_event("role.restarted", timeout_s=60, count=len(children))
    walked.installation.wait_for_event("role.started", timeout_s=90, count=started + len(children))


def _verbs(walked: Walked) -> None:
    folder = walked.folder
    (folder / "lab.toml").write_text(MAPPING, "utf-8")
    (folder / "lab.csv").write_text(f"nr,pid,name,drawn,crp\n1,{IDENTITY},{NAME},{BIRTH},{NAME}\n2,,{NAME},2024-01-01 10:00,5\n", "utf-8")
    (folder / "broken.dcm").write_bytes(bytes(128) + b"DICM" + f"{NAME}{IDENTITY}".encode() * 9)
    files = [["import", str(folder / "lab.csv"), "--mapping", str(folder / "lab.toml")], ["import", str(folder / "broken.dcm")]]
    asked = "doctor|status|status --json|status --ledger|status --ledger --json|studies|studies --discarded|show 1|show 2|select 1"
    more = "select 1 --json|records|check|check --digests --repair|check --pacs|retry 1"
    walked.run(*files, *(words.split() for words in f"{asked}|{more}".split("|")))


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walked]:
    """An installation at DEBUG after all doors, stopped; with a bundle for the vendor."""
    root = tmp_path_factory.mktemp("privacy")
    (root / "temporary").mkdir()
    shutil.copytree(BUNDLES / "cxr-severity", root / "asking")
    bundle = root / "asking" / "bundle.toml"
    bundle.write_text(re.sub(r"(?m)^wait_s = .*", "wait_s = 1\npull = true", bundle.read_text("utf-8")), "utf-8")
    with (
        pytest.MonkeyPatch.context() as patch,
        FhirServer() as fhir,
        ScriptedPacs((0xA700, 0xB000, "abort", 0xC000, 0x0122, 0x0111)) as pacs,
    ):
        patch.setenv("TMPDIR", str(root / "temporary"))
        words = outcome(diagnostics=f"{NAME} {IDENTITY} {BIRTH}")
        for line in ("POST /fhir/Patient/_search", "GET /fhir/Patient"):
            fhir.script(line, Reply(500, words), Reply(400, words), Reply(200, f'{{"{NAME}'.encode()), *[Reply(422, words)] * 20)
        extra = (
            f'[[destinations]]\nname = "pacs"\nae_title = "SCRIPTED"\nhost = "127.0.0.1"\nport = {pacs.peer.port}\n'
            f'[fhir]\nurl = "{fhir.base}"\nissuer_system = "urn:ids"\n[records.issuers]\n"urn:ids" = "SITE"\n[log]\nlevel = "DEBUG"\n'
        )
        one = Walked(Installation(root / "worker", bundles=(str(root / "asking"),), quiet_s=0.5, processes=1, extra=extra), root / "files")
        with one.installation as installation:
            for message in _messages():
                _say(installation.mllp_port, message)
            one.store(1)
            one.store(2, BodyPartExamined="KNEE")
            one.store(1, PixelData=bytes(one.sent[0].Rows * one.sent[0].Columns * 2))  # other bytes under a known UID
            one.store(4, study=f"{STUDY}.2", patient_id=f"{IDENTITY}-2")
            one.store(5, PixelData=bytes(20))
            one.store(6, PatientAge="999Y", Rows=0)
            one.store(7, patient_id=f"{IDENTITY}-7")  # whose results name another person
            _hostile(installation.port)
            installation.wait_for_event("job.completed", timeout_s=40, count=2)
            _tracebacks(one)
            _restart(one)
            one.look()
            _verbs(one)
            installation.wait_for_event("job.retried", timeout_s=60)
            one.run(["support-bundle", str(root / "vendor.zip"), "--log", str(installation.log)])
            wait_until(lambda: len(pacs.received) >= 5, timeout_s=60, what="every scripted status was answered")
            one.shared_memory.clear()
            one.look()
        one.asked = fhir.lines()
        yield one


@pytest.mark.requirement("X1")
def test_every_door_was_walked_through(walked: Walked) -> None:
    """Else the other tests would prove nothing."""
    said = {one["event"] for one in walked.installation.events()}
    wanted = {
        "instance.refused",
        "instance.quarantined",
        "message.refused",
        "job.completed",
        "job.retried",
        "job.discarded",
        "role.restarted",
    }
    assert said >= wanted
    assert any("Patient" in line for line in walked.asked)
    statuses = " ".join(str(one.get("reason")) for one in walked.installation.events() if str(one["event"]).startswith("job."))
    assert [status for status in ("0xA700", "0xC000", "0x0122") if status not in statuses] == []
    assert '"places"' in walked.log
    with sqlite3.connect(walked.installation.folder / "data" / "synoptic.db") as conn:
        assert conn.execute("SELECT count(*) FROM study WHERE patient_id = ?", (IDENTITY,)).fetchone()[0] >= 4
    conn.close()


@pytest.mark.requirement("X1")
@pytest.mark.parametrize("planted", PLANTED)
def test_nothing_of_a_planted_patient_is_in_a_log_line_a_process_or_a_file_name(walked: Walked, planted: str) -> None:
    assert planted not in walked.log
    assert [name for name, told in walked.processes.items() if planted in told] == []
    below = [*(walked.installation.folder).rglob("*"), *(walked.folder.parent / "temporary").rglob("*")]
    assert [path for path in below if planted in str(path.relative_to(walked.folder.parent))] == []


@pytest.mark.requirement("X1")
@pytest.mark.parametrize("planted", [one for one in PLANTED if one not in (STUDY, SERIES, SOP)])
def test_no_verb_for_the_administrator_says_who_the_patient_is(walked: Walked, planted: str) -> None:
    """UIDs name a study where two have one number; a name, a date, a note or an accession number nobody needs."""
    assert [verb for verb, said in walked.verbs.items() if planted in said] == []


@pytest.mark.requirement("X3")
def test_the_daemon_listens_on_its_two_ports_and_on_loopback_unless_told_otherwise(walked: Walked) -> None:
    """There is no port for metrics, for a browser or for a debugger."""
    own = walked.installation
    assert walked.listening == {("127.0.0.1", own.port), ("127.0.0.1", own.mllp_port)}
    assert (Config().receive.host, Config().records.host) == ("127.0.0.1", "127.0.0.1")


@pytest.mark.requirement("X13")
def test_what_jobs_leave_is_files_of_the_owner_alone_no_temporary_file_and_no_pixels_in_memory(walked: Walked) -> None:
    # torch makes an empty folder when it is imported.
    assert [path for path in (walked.folder.parent / "temporary").rglob("*") if not path.is_dir()] == []
    assert walked.shared_memory == []
    found = {path: path.stat().st_mode for path in (walked.installation.folder / "data").rglob("*")}
    assert any(path.suffix == ".dcm" for path in found)
    assert [path for path, mode in found.items() if mode & (stat.S_IRWXG | stat.S_IRWXO)] == []
    assert stat.S_IMODE((walked.installation.folder / "data" / "spool").stat().st_mode) == 0o700


# --- the bundle for the vendor


def _identifying() -> set[int]:
    """The tags of PS3.15 Table E.1-1."""
    rows = [line.split(":") for line in TABLE.read_text("utf-8").splitlines() if not line.startswith("#")]
    return {int(group + element, 16) for group, elements in rows for element in elements.split()}


@pytest.mark.requirement("X4")
def test_a_bundle_for_the_vendor_holds_no_value_of_an_identifying_attribute_of_any_study(walked: Walked) -> None:
    """PS3.15 Table E.1-1: whatever the profile removes, empties or replaces, and the site's own words."""
    path = walked.folder.parent / "vendor.zip"
    with zipfile.ZipFile(path) as made:
        texts = {name: made.read(name).decode() for name in made.namelist()}
    told = "\n".join(texts.values())
    tags, seen = _identifying(), set()
    for ds in walked.sent:
        for element in ds.iterall():
            value = str(element.value)
            # A value of one or two characters ("M", "O") is in every text; and "1" is a series' number, not an identity.
            if int(element.tag) in tags and len(value) > 3:
                seen.add(int(element.tag))
                assert not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", told), element.keyword
    assert {0x00100010, 0x00100020, 0x00100030, 0x00080050, 0x0020000D, 0x00080018, 0x00204000} <= seen
    assert [one for one in PLANTED if one in told] == []
    own = walked.installation
    site = ("TESTPACS", "MODALITY", "SCRIPTED", "WORKER", "urn:ids", str(walked.folder.parent), str(own.port), os.uname().nodename)
    assert [one for one in site if re.search(rf"(?<!\w){re.escape(one)}(?!\w)", told.replace(f'"port": {own.port}', ""))] == []


@pytest.mark.requirement("X4")
def test_a_bundle_says_what_is_in_it_is_small_helps_and_is_its_owners_alone(walked: Walked) -> None:
    path = walked.folder.parent / "vendor.zip"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size < 2**20
    with zipfile.ZipFile(path) as made:
        texts = {name: made.read(name).decode() for name in made.namelist()}
    named = {"versions.json", "configuration.json", "doctor.json", "status.json", "ledger.json", "refused.json", "log.json"}
    assert set(texts) == named | {"README.txt"}
    assert [name for name in named if name not in texts["README.txt"]] == []
    log = json.loads(texts["log.json"])
    assert {"job.completed", "instance.refused", "role.restarted"} <= {one["event"] for one in log["events"]}
    assert "0xC000" in texts["log.json"]
    assert json.loads(texts["versions.json"])["packages"]["pydicom"]
    assert json.loads(texts["refused.json"])
    assert sum(json.loads(texts["ledger.json"])["all"].values()) > 0


@pytest.mark.requirement("X4")
def test_a_bundle_replaces_no_file_and_is_made_where_the_database_is_away(tmp_path: Path) -> None:
    own = Installation(tmp_path / "away", bundles=(), database="postgresql+psycopg://us:plantpw@127.0.0.1:1/none")
    own.write_config()
    made = tmp_path / "one.zip"
    assert own.cli("support-bundle", str(made)).returncode == 0
    with zipfile.ZipFile(made) as file:
        assert "unavailable" in file.read("status.json").decode()
        assert b"plantpw" not in b"".join(map(file.read, file.namelist()))
    again = own.cli("support-bundle", str(made))
    assert again.returncode != 0
    assert "exists" in again.stderr


@pytest.mark.requirement("X1")
def test_a_bundle_that_is_broken_ends_the_start_in_a_sentence_without_words_of_a_file(tmp_path: Path) -> None:
    shutil.copytree(BUNDLES / "cxr-severity", tmp_path / "broken")
    (tmp_path / "broken" / "bundle.toml").write_text(f'name = "{NAME}', "utf-8")
    own = Installation(tmp_path / "worker", bundles=(str(tmp_path / "broken"),))
    own.write_config()
    done: subprocess.CompletedProcess[str] = own.cli("run")
    assert done.returncode != 0
    assert "broken/bundle.toml cannot be read" in done.stderr
    assert "Zzyzxplant" not in done.stdout + done.stderr
