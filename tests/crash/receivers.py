"""`kill -9` of a receiver alone, again and again while two modalities store to it: ours, and Orthanc's beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread

from tests.crash.line import held
from tests.crash.senders import Sender, ultrasound
from tests.installation import Installation, wait_until
from tests.peers import orthanc, require


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
        present, _, strays = held(folder / "data")
        return present, strays

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


def receive(target: Target, *, for_s: float, seed: int) -> dict[str, Any]:
    """Kill a receiver for so long while two senders store to it, start it again each time, and ask what it holds; prints the figures."""
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
        while time.monotonic() - began < for_s:
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
        "kills": len(starts) - 1,
        "seconds": round(seconds),
        "acknowledged": len(acknowledged),
        "sent_again": sum(sender.again for sender in senders),
        "longest_until_taken_s": round(max(sender.longest_s for sender in senders), 1),
        "present": len(present & acknowledged),
        "acknowledged_but_absent": len(acknowledged - present),
        "files_nothing_names": strays,
        "ready_s": {"p50": round(statistics.median(starts[1:]), 2), "max": round(max(starts[1:]), 2)},
    }
    print(json.dumps(figures), flush=True)
    return figures
