"""Random `kill -9` of each process of the whole line under load: one implementation for the test and for ``make crash``.

What is counted afterwards is counted outside: by the senders' own books, the files of the spool, and what Orthanc holds.
Processes are killed, the kernel lives: this says nothing of a power cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from tests import accept
from tests.crash.senders import Laboratory, Sender, radiographs, ultrasound
from tests.installation import Installation, wait_until
from tests.peers import Orthanc, orthanc
from worker import consistency
from worker.store.database import Store
from worker.store.spool import Spool

#: What is killed, how often of twenty, and during what where it can be had. "all": everything at once, as by the kernel's panic.
VICTIMS: Mapping[str, tuple[int, str]] = {
    "receive": (4, "receiving"),
    "run": (4, "analysing"),
    "decoder": (3, "analysing"),
    "deliver": (5, "delivering"),
    "supervisor": (2, "receiving"),
    "all": (2, ""),
}
PHASES = ("receiving", "analysing", "delivering")
#: Among the victims: wait until all roles are ready. Without it the next kill may fall into a start.
READY = "ready"
#: So long the moment is waited for that a kill is meant for.
AIM_S = 5.0
#: Children of a supervisor that was killed finish what they hold (worker/reception.py, worker/roles.py); none lives longer than this.
ORPHANED_S = 180.0
#: Of the starts after a kill of all or of the supervisor so many are waited for.
WAITS = 0.7
#: Radiographs on their way to a report, at most.
BACKLOG = 24


@dataclass
class Kill:
    """One kill: whom, when, and what was under way in the whole daemon at that moment."""

    victim: str
    at: float
    during: tuple[str, ...]
    recovered_s: float | None = None


@dataclass
class Line:
    """An installation under load, and who kills it. It looks from outside, as a monitor does: processes, files, the job table."""

    installation: Installation
    rng: random.Random
    kills: list[Kill] = field(default_factory=list)
    refused_starts: int = 0
    refused_since: float = 0.0
    #: So many lines of readiness the log has when all roles are ready.
    ready: int = 0
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = self.installation.store

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

    def kill_one(self, victim: str) -> bool:
        """Wait for the moment that fits the victim, then kill; the supervisor is launched again, as by systemd. Whether one lived."""
        self.revive()
        wanted = VICTIMS[victim][1] or self.rng.choice(PHASES)
        deadline = time.monotonic() + AIM_S
        while wanted not in (during := self.under_way()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0, 0.03))
        alive = [] if victim == "all" else self.pids(victim)
        if victim != "all" and not alive:
            return False
        self.kills.append(Kill(victim, time.time(), (*during, *(["starting"] if self.is_starting() else []))))
        if victim == "all":
            self.installation.kill()
        else:
            os.kill(self.rng.choice(alive), signal.SIGKILL)
        if victim in ("supervisor", "all"):
            assert self.installation.process is None or self.installation.process.wait(10)
            self.ready = len(self.installation.events("role.started")) + self.installation.roles
            self.installation.launch()
        return True

    def is_starting(self) -> bool:
        """Whether roles have yet to be ready, after all or the supervisor was killed."""
        return len(self.installation.events("role.started")) < self.ready

    def revive(self) -> None:
        """Launch the daemon again if it has ended: children of the one before may hold its port for their last seconds."""
        if self.installation.process is None or self.installation.process.poll() is not None:
            self.refused_starts += 1
            self.refused_since = self.refused_since or time.monotonic()
            assert time.monotonic() - self.refused_since < ORPHANED_S, (
                "the daemon is refused its port: something of the one before lives on"
            )
            self.installation.launch()
        elif len(self.installation.events("role.started")) >= self.ready:
            self.refused_since = 0.0

    def until(self, is_so: Callable[[], object], what: str) -> None:
        """Wait, and launch the daemon again where it ends."""

        def attempt() -> bool:
            self.revive()
            return bool(is_so())

        wait_until(attempt, timeout_s=600, what=what)

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


def shuffled(kills: int, seed: int) -> list[str]:
    """Return so many victims, each kind in its share, whatever is drawn."""
    rng = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < kills:
        deck = [name for name, (share, _) in VICTIMS.items() for _ in range(share)]
        rng.shuffle(deck)
        drawn += deck
    pairs = [(one, READY) if one in ("supervisor", "all") and rng.random() < WAITS else (one,) for one in drawn[:kills]]
    return [one for pair in pairs for one in pair]


@dataclass
class Campaign:
    """What a campaign found, and the installation and archive it found it in, until the `with` ends."""

    installation: Installation
    pacs: Orthanc
    figures: dict[str, Any]


@contextlib.contextmanager
def killing(
    folder: Path, shared: Path, victims: Sequence[str], *, seed: int, within_s: float = math.inf, pause_s: tuple[float, float] = (1.0, 3.5)
) -> Iterator[Campaign]:
    """Kill `victims` in turn under load, for `within_s` at most; let the line finish, stop it, sweep the spool, and count.

    The figures are printed as a JSON line.
    """
    rng = random.Random(seed)
    (folder / "orthanc").mkdir(parents=True)
    installation = Installation(folder / "worker", bundles=("cxr-severity",), ask_sender=False, quiet_s=0.5)
    files = accept.cohort(shared)
    with orthanc(folder / "orthanc") as pacs:
        installation.orthanc = pacs
        with installation:
            whole = Line(installation, rng)
            films = Sender(
                ("127.0.0.1", installation.port),
                "WORKER",
                "TESTPACS",
                radiographs(list(files.values())),
                may_send=lambda: whole.backlog() < BACKLOG,
            )
            scans = Sender(("127.0.0.1", installation.port), "WORKER", "MODALITY", ultrasound())
            results = Laboratory(("127.0.0.1", installation.mllp_port))
            load = (films, scans, results)
            try:
                accept.send_records(installation, shared, files)
                for sender in load:
                    sender.start()
                began = time.monotonic()
                for victim in victims:
                    if time.monotonic() - began > within_s:
                        break
                    if victim == READY:
                        whole.until(lambda: not whole.is_starting(), "all roles ready again")
                        continue
                    time.sleep(rng.uniform(*pause_s))
                    while not whole.kill_one(victim):
                        time.sleep(0.2)  # it was killed before and is not back yet
                whole.until(lambda: whole.pids("receive"), "receivers")  # it has its port, and stays
                for sender in load:
                    sender.finish()
                seconds = time.monotonic() - began
                installation.wait_idle(timeout_s=600)
            finally:
                for sender in load:
                    sender.stop.set()
            ledger = json.loads(installation.cli("status", "--ledger", "--json").stdout)
            whole.note_recoveries()
        # It has stopped now, and nobody writes: what a kill left is swept whatever its age.
        swept = consistency.sweep(
            whole.store,
            Spool(installation.folder / "data" / "spool", low_water_bytes=0),
            now=datetime.now(UTC) + 2 * consistency.ORPHAN_AGE + timedelta(minutes=1),
        )
        whole.store.close()
        figures = {
            **_kills(whole, seconds),
            **_images(installation, films, scans),
            "swept_parts": swept.parts,
            "swept_orphans": swept.orphans,
            **_results(installation, results),
            **_reports(pacs, films),
            **_ledger(installation, ledger, films, scans),
        }
        print(json.dumps(figures), flush=True)
        yield Campaign(installation, pacs, figures)


def _kills(whole: Line, seconds: float) -> dict[str, Any]:
    by_victim: dict[str, list[float]] = {}
    for kill in whole.kills:
        if kill.recovered_s is not None:
            by_victim.setdefault(kill.victim, []).append(kill.recovered_s)
    ready = sorted(seconds for some in by_victim.values() for seconds in some)
    return {
        "kills": len(whole.kills),
        "by_process": dict(Counter(kill.victim for kill in whole.kills)),
        "by_phase": dict(Counter(phase for kill in whole.kills for phase in kill.during or ("idle",))),
        "by_both": {
            name: dict(Counter(phase for kill in whole.kills if kill.victim == name for phase in kill.during or ("idle",)))
            for name in VICTIMS
        },
        "in_their_phase": sum(VICTIMS[kill.victim][1] in (*kill.during, "") for kill in whole.kills),
        "seconds": round(seconds),
        "recovery_s": {
            "p50": round(statistics.median(ready), 1) if ready else None,
            "max": round(ready[-1], 1) if ready else None,
            **{f"p50 {name}": round(statistics.median(some), 1) for name, some in by_victim.items()},
        },
        "refused_starts": whole.refused_starts,
        "rescued": len(whole.installation.events("job.rescued")),
        "fenced": len(whole.installation.events("job.fenced")),
        "crashed": len(whole.installation.events("crashed")),
    }


def _images(installation: Installation, films: Sender, scans: Sender) -> dict[str, Any]:
    acknowledged = films.acknowledged.keys() | scans.acknowledged.keys()
    present, without_file, without_row = held(installation.folder / "data")
    return {
        "acknowledged": len(acknowledged),
        "sent_again": films.again + scans.again,
        "longest_until_taken_s": round(max(films.longest_s, scans.longest_s), 1),
        "present": len(present & acknowledged),
        "acknowledged_but_absent": len(acknowledged - present),
        "rows_without_file": without_file,
        "files_without_row": without_row,
    }


def _results(installation: Installation, results: Laboratory) -> dict[str, Any]:
    asked = "SELECT m.control_id, count(o.id) FROM message m LEFT JOIN observation o ON o.message_id = m.id GROUP BY m.id"
    with contextlib.closing(sqlite3.connect(installation.folder / "data" / "synoptic.db")) as conn:
        facts = Counter({control_id: count for control_id, count in conn.execute(asked) if control_id in results.acknowledged})
    return {
        "hl7_acknowledged": len(results.acknowledged),
        "hl7_sent_again": results.again,
        "hl7_acknowledged_but_absent": sum(facts[control_id] == 0 for control_id in results.acknowledged),
        "hl7_facts_twice": sum(count > 1 for count in facts.values()),
    }


def _reports(pacs: Orthanc, films: Sender) -> dict[str, Any]:
    found = accept.reports(pacs)
    wanted = set(films.acknowledged.values())
    return {
        "studies_to_report": len(wanted),
        "studies_reported": len(found.keys() & wanted),
        "reported_once": sum(len(found.get(study, ())) == 1 for study in wanted),
        "duplicates": sum(len(uids) - 1 for uids in found.values()),
        "reports_nobody_asked_for": len(found.keys() - wanted),
    }


def _ledger(installation: Installation, said: Mapping[str, Any], films: Sender, scans: Sender) -> dict[str, Any]:
    counted = {"delivered": len(set(films.acknowledged.values())), "excluded": len(set(scans.acknowledged.values()))}
    counted["received"] = counted["delivered"] + counted["excluded"]
    return {
        "ledger": said["all"],
        "ledger_adds_up": bool(said["adds_up"]) and all(said["all"][name] == count for name, count in counted.items()),
        "failed_because": said["failed_because"],
    }


def held(data: Path) -> tuple[set[str], int, int]:
    """Return the SOP Instance UIDs whose row has its file, whole by its digest; how many rows have none; how many files no row names."""
    present, without, root = set(), 0, data / "spool" / "instances"
    with contextlib.closing(sqlite3.connect(data / "synoptic.db")) as conn:
        rows = conn.execute("SELECT sop_instance_uid, path, sha256 FROM instance").fetchall()
    for uid, path, sha256 in rows:
        file = root / path
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            present.add(uid)
        else:
            without += 1
    named = {path for _, path, _ in rows}
    return present, without, sum(str(path.relative_to(root)) not in named for path in root.rglob("*.dcm"))


def complaints(figures: Mapping[str, Any]) -> list[str]:
    """Say what of the promises was broken."""
    wanted = figures["studies_to_report"]
    rules = {
        "acknowledged images are absent": figures["acknowledged_but_absent"] == 0,
        "rows have no file": figures["rows_without_file"] == 0,
        "files without a row outlive the sweep": figures["files_without_row"] == 0,
        "acknowledged HL7 messages are absent": figures["hl7_acknowledged_but_absent"] == 0,
        "facts of an HL7 message are there twice": figures["hl7_facts_twice"] == 0,
        "studies have no report": figures["studies_reported"] == wanted,
        "studies have not exactly one report": figures["reported_once"] == wanted and figures["duplicates"] == 0,
        "reports of studies that nobody sent": figures["reports_nobody_asked_for"] == 0,
        "the ledger does not add up, or not to what was sent": figures["ledger_adds_up"],
        "processes ended with an error of their own": figures["crashed"] == 0,
        "studies failed": figures["ledger"]["failed"] == 0,
    }
    return [words for words, is_kept in rules.items() if not is_kept]
