"""Random `kill -9` under load: of each process of the whole line, then of the receiver alone beside Orthanc's.

usage: python -m tests.crash.campaign [--kills 200] [--receive-kills 60] [--seed 1] [--folder DIR]

``make crash KILLS=200`` runs it. It prints figures as JSON lines and a table, and exits 1 where anything acknowledged is missing, delivered
twice or not at all, or in no account of the ledger. Processes are killed, the kernel lives: this says nothing of a power cut.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from pydicom import dcmread

from tests import accept
from tests.crash.senders import Sender, radiographs, ultrasound
from tests.installation import Installation, wait_until
from tests.peers import SHARED, Orthanc, orthanc, require
from worker.store.database import Store

#: What is killed, how often of ten, and during what where it can be had. "all": everything at once, as by the kernel's panic.
VICTIMS: Mapping[str, tuple[int, str]] = {
    "receive": (4, "receiving"),
    "run": (4, "analysing"),
    "decoder": (2, "analysing"),
    "deliver": (4, "delivering"),
    "supervisor": (2, "receiving"),
    "all": (4, ""),
}
PHASES = ("receiving", "analysing", "delivering")
#: So long the moment is waited for that a kill is meant for.
AIM_S = 3.0
#: Radiographs on their way to a report, at most.
BACKLOG = 24


# --- the whole line


@dataclass
class Kill:
    """One kill: whom, when, and what was under way in the whole daemon at that moment."""

    victim: str
    at: float
    during: tuple[str, ...]
    recovered_s: float | None = None


@dataclass
class Line:
    """An installation under load, and who kills it."""

    installation: Installation
    rng: random.Random
    kills: list[Kill] = field(default_factory=list)
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = self.installation.store

    # Everything below looks from outside, as a monitor does: processes, the incoming folder, the job table.

    def under_way(self) -> tuple[str, ...]:
        """Return what the daemon is doing now."""
        incoming = self.installation.folder / "data" / "spool" / "incoming"
        with self.store.read() as conn:
            leased = {kind for (kind,) in conn.exec_driver_sql("SELECT DISTINCT kind FROM job WHERE state = 'leased'")}
        doing = (any(incoming.glob("*.part")), "infer" in leased, "deliver" in leased)
        return tuple(phase for phase, is_so in zip(PHASES, doing, strict=True) if is_so)

    def backlog(self) -> int:
        """Return how many radiographs are on their way."""
        waiting = "SELECT count(DISTINCT study_id) FROM job WHERE state IN ('available', 'leased')"
        with self.store.read() as conn:
            return int(conn.exec_driver_sql(waiting).scalar_one())

    def pids(self, victim: str) -> list[int]:
        """Return the processes of a kind that live now."""
        assert self.installation.process is not None
        supervisor = psutil.Process(self.installation.process.pid)
        if victim == "supervisor":
            return [supervisor.pid]
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in supervisor.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = child.cmdline()
                    role = words[words.index("role") + 1] if "role" in words else "decoder" if "worker.imaging.child" in words else ""
                    found += [child.pid] if role == victim else []
        return found

    def kill_one(self, victim: str) -> None:
        """Wait for the moment that fits the victim, then kill; the supervisor is started again, as systemd does."""
        wanted = VICTIMS[victim][1] or self.rng.choice(PHASES)
        deadline = time.monotonic() + AIM_S
        while wanted not in (during := self.under_way()) and time.monotonic() < deadline:
            time.sleep(0.003)
        time.sleep(self.rng.uniform(0, 0.03))
        alive = self.pids(victim) if victim != "all" else []
        if victim != "all" and not alive:
            return
        self.kills.append(Kill(victim, time.time(), during))
        if victim == "all":
            self.installation.kill()
        else:
            os.kill(self.rng.choice(alive), signal.SIGKILL)
        if victim in ("supervisor", "all"):
            self.start()

    def start(self) -> None:
        """Start the daemon until it stays: children of the one before may hold the port for their last seconds."""
        for _ in range(60):
            with contextlib.suppress(AssertionError):
                self.installation.start()
                return
        raise AssertionError("The daemon did not come up again.")

    def note_recoveries(self) -> None:
        """Find in the log when each role was ready again."""
        started: dict[str, list[float]] = {}
        for one in self.installation.events("role.started"):
            started.setdefault(one["role"], []).append(datetime.fromisoformat(one["at"]).timestamp())
        for kill in self.kills:
            roles = ["receive", "run", "deliver"] if kill.victim in ("supervisor", "all") else [kill.victim]
            ready = [min((at for at in started.get(role, []) if at > kill.at), default=None) for role in roles]
            if None not in ready and kill.victim != "decoder":
                kill.recovered_s = max(at for at in ready if at is not None) - kill.at


def line(folder: Path, shared: Path, *, kills: int, seed: int, pause_s: tuple[float, float] = (1.0, 3.5)) -> dict[str, Any]:
    """Kill so many times over the whole line under load, let it finish, and count; prints and returns the figures."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orthanc").mkdir()
    installation = Installation(folder / "worker", bundles=("cxr-severity",), ask_sender=False, quiet_s=0.5)
    files = accept.cohort(shared)
    with orthanc(folder / "orthanc") as pacs:
        installation.orthanc = pacs
        installation.start()
        began = time.monotonic()
        whole = Line(installation, rng)
        address = ("127.0.0.1", installation.port)
        films = Sender(address, "WORKER", "TESTPACS", radiographs(list(files.values())), may_send=lambda: whole.backlog() < BACKLOG)
        scans = Sender(address, "WORKER", "MODALITY", ultrasound())
        try:
            accept.send_records(installation, shared, files)
            films.start()
            scans.start()
            # Each kind in its share, whatever is drawn: a short run kills every kind too.
            deck: list[str] = []
            while len(whole.kills) < kills:
                if not deck:
                    deck = [name for name, (share, _) in VICTIMS.items() for _ in range(share if kills >= 20 else 1)]
                    rng.shuffle(deck)
                time.sleep(rng.uniform(*pause_s))
                whole.kill_one(deck.pop())
            films.finish()
            scans.finish()
            killed_s = time.monotonic() - began
            installation.wait_idle(timeout_s=600)
            whole.note_recoveries()
            figures = _figures(whole, films, scans, pacs, killed_s=killed_s)
        finally:
            films.stop.set()
            scans.stop.set()
            whole.store.close()
            if installation.process is not None:
                installation.stop()
    print(json.dumps(figures), flush=True)
    return figures


def _figures(whole: Line, films: Sender, scans: Sender, pacs: Orthanc, *, killed_s: float) -> dict[str, Any]:
    installation = whole.installation
    acknowledged = films.acknowledged | scans.acknowledged
    present, without_file = held(installation.folder / "data")
    found = accept.reports(pacs)
    wanted = set(films.acknowledged.values())
    asked = installation.cli("status", "--ledger", "--json")
    said = json.loads(asked.stdout)
    recoveries = sorted(kill.recovered_s for kill in whole.kills if kill.recovered_s is not None)
    return {
        "kills": len(whole.kills),
        "by_process": dict(Counter(kill.victim for kill in whole.kills)),
        "while": {
            name: dict(Counter(phase for kill in whole.kills if kill.victim == name for phase in kill.during or ("idle",)))
            for name in VICTIMS
        },
        "seconds": round(killed_s),
        "acknowledged": len(acknowledged),
        "sent_again": films.again + scans.again,
        "present": len(present),
        "acknowledged_but_absent": len(acknowledged.keys() - present),
        "rows_without_file": without_file,
        "studies_to_report": len(wanted),
        "studies_reported": len(found.keys() & wanted),
        "reported_once": sum(len(found.get(study, ())) == 1 for study in wanted),
        "duplicates": sum(len(uids) - 1 for uids in found.values()),
        "rescued": len(installation.events("job.rescued")),
        "fenced": len(installation.events("job.fenced")),
        "ledger": said["all"],
        "ledger_adds_up": asked.returncode == 0 and said["adds_up"],
        "failed_because": said["failed_because"],
        "recovery_s": {
            "p50": round(statistics.median(recoveries), 2),
            "max": round(recoveries[-1], 2),
            **{name: round(statistics.median(some), 2) for name, some in _by_victim(whole.kills).items()},
        },
    }


def _by_victim(kills: Sequence[Kill]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for kill in kills:
        if kill.recovered_s is not None:
            found.setdefault(kill.victim, []).append(kill.recovered_s)
    return found


def held(data: Path) -> tuple[set[str], int]:
    """Return the SOP Instance UIDs whose row has its file, whole by its digest, and how many rows have none."""
    present, without = set(), 0
    with contextlib.closing(sqlite3.connect(data / "synoptic.db")) as conn:
        rows = conn.execute("SELECT sop_instance_uid, path, sha256 FROM instance").fetchall()
    for uid, path, sha256 in rows:
        file = data / "spool" / "instances" / path
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            present.add(uid)
        else:
            without += 1
    return present, without


def complaints(figures: Mapping[str, Any]) -> list[str]:
    """Say what of the promises was broken."""
    wanted = figures["studies_to_report"]
    rules = {
        "acknowledged images are absent": figures["acknowledged_but_absent"] == 0,
        "rows have no file": figures["rows_without_file"] == 0,
        "studies have no report": figures["studies_reported"] == wanted,
        "studies have not exactly one report": figures["reported_once"] == wanted and figures["duplicates"] == 0,
        "the ledger does not add up": figures["ledger_adds_up"],
        "studies failed": figures["ledger"]["failed"] == 0,
    }
    return [words for words, is_kept in rules.items() if not is_kept]


# --- the receiver alone, beside Orthanc's


@dataclass
class Target:
    """A receiver that can be started and killed, and asked what it holds."""

    name: str
    address: tuple[str, int]
    called: str
    start: Callable[[], None]
    kill: Callable[[], None]
    #: What is held whole, and how many files nothing names.
    holds: Callable[[], tuple[set[str], int]]


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[Target]:
    """Run `synoptic receive`: a supervisor and two receivers."""
    made = Installation(folder, senders=("SENDER1", "SENDER2"), quiet_s=3600.0, ask_sender=False)
    made.write_config()

    def start() -> None:
        ready = len(made.events("role.started"))
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SYNOPTIC_")}
        with made.log.open("ab") as log:
            command = [sys.executable, "-m", "worker", "receive", "--config", str(made.config)]
            made.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
        wait_until(lambda: len(made.events("role.started")) >= ready + 3, timeout_s=60, what="receivers")

    def holds() -> tuple[set[str], int]:
        present, _ = held(folder / "data")
        return present, sum(1 for _ in (folder / "data" / "spool" / "instances").rglob("*.dcm")) - len(present)

    try:
        yield Target("synoptic receive", ("127.0.0.1", made.port), "WORKER", start, made.kill, holds)
    finally:
        made.stop()


@contextlib.contextmanager
def theirs(folder: Path) -> Iterator[Target]:
    """Run Debian's Orthanc with SyncStorageArea."""
    folder.mkdir(parents=True)
    with orthanc(folder, callers={"SENDER1": 1, "SENDER2": 1}, StableAge=60) as server:
        pass  # its configuration is written now; what follows starts the same Orthanc again and again
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with (folder / "orthanc.log").open("ab") as log:
            running.append(subprocess.Popen([require("Orthanc"), "orthanc.json"], cwd=folder, stdout=log, stderr=log))

        def is_ready() -> bool:
            with contextlib.suppress(OSError):
                return bool(server.get("/system"))
            return False

        wait_until(is_ready, timeout_s=60, what="Orthanc", step_s=0.02)

    def kill() -> None:
        running[-1].kill()
        running[-1].wait()

    def holds() -> tuple[set[str], int]:
        present = set()
        for one in server.instances():
            ds = dcmread(io.BytesIO(server.file(one)))
            if len(ds.PixelData) == 2 * ds.Rows * ds.Columns:
                present.add(str(ds.SOPInstanceUID))
        running[-1].terminate()  # it locks its index while it runs
        running[-1].wait(30)
        with contextlib.closing(sqlite3.connect(folder / "index" / "index")) as conn:
            named = {uuid for (uuid,) in conn.execute("SELECT uuid FROM AttachedFiles")}
        files = [path for path in (folder / "storage").rglob("*") if path.is_file()]
        return present, sum(path.name not in named for path in files)

    try:
        yield Target("Orthanc", ("127.0.0.1", server.dicom_port), server.ae_title, start, kill, holds)
    finally:
        if running and running[-1].poll() is None:
            running[-1].terminate()
            running[-1].wait(30)


def receive(target: Target, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill a receiver so many times while two senders store to it, start it again each time, and ask what it holds."""
    rng = random.Random(seed)
    senders = [Sender(target.address, target.called, name, ultrasound()) for name in ("SENDER1", "SENDER2")]
    starts = []

    def start() -> None:
        began = time.monotonic()
        target.start()
        starts.append(time.monotonic() - began)

    start()
    began = time.monotonic()
    try:
        for sender in senders:
            sender.start()
        for _ in range(kills):
            before = sum(len(sender.acknowledged) for sender in senders)
            wait_until(lambda: sum(len(one.acknowledged) for one in senders) > before + 4, timeout_s=60, what="images", step_s=0.01)  # noqa: B023
            time.sleep(rng.uniform(0.0, 0.5))
            target.kill()
            start()
        for sender in senders:
            sender.finish()
        seconds = time.monotonic() - began
        present, strays = target.holds()
    finally:
        for sender in senders:
            sender.stop.set()
    acknowledged = set().union(*(sender.acknowledged for sender in senders))
    figures = {
        "receiver": target.name,
        "kills": kills,
        "seconds": round(seconds),
        "acknowledged": len(acknowledged),
        "sent_again": sum(sender.again for sender in senders),
        "present": len(present & acknowledged),
        "acknowledged_but_absent": len(acknowledged - present),
        "files_nothing_names": strays,
        "ready_s": {"p50": round(statistics.median(starts[1:]), 2), "max": round(max(starts[1:]), 2)},
    }
    print(json.dumps(figures), flush=True)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; the exit code is 1 where a promise of ours was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--receive-kills", type=int, default=60, help="of each receiver alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary folder that goes afterwards")
    given = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-")))
        broken: list[str] = []
        if given.receive_kills:
            with theirs(folder / "theirs") as target:
                other = receive(target, kills=given.receive_kills, seed=given.seed)
            with ours(folder / "ours") as target:
                own = receive(target, kills=given.receive_kills, seed=given.seed)
            for name in own:
                print(f"{name:<26}{own[name]!s:<34}{other[name]}")
            broken += ["acknowledged images are absent of the receiver alone"] if own["acknowledged_but_absent"] else []
        if given.kills:
            figures = line(folder / "line", SHARED, kills=given.kills, seed=given.seed)
            for name, value in figures.items():
                print(f"{name:<26}{value}")
            broken += complaints(figures)
    for words in broken:
        print(f"BROKEN: {words}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
