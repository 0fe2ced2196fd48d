"""Overload: inference stands still, images go on coming until the disk's mark, and everything is analysed and delivered afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from pydicom import FileDataset
from pynetdicom.pdu import A_ASSOCIATE_AC

from tests import factories
from tests.installation import Installation, wait_until
from tests.peers import ScriptedPacs
from tests.scu import CT, EXPLICIT, VERIFICATION, Scu, encoded
from worker.domain import PatientKey
from worker.intake import mllp
from worker.store import measures

#: As many as the phantom bundle wants; 115 kB each.
SLICES, ROWS = 12, 240
#: The spool's file system, what is left of it at first, and the mark (tests/installation.py).
DISK_MB, ROOM_MB, LOW_MB = 96, 16 + 20, 16


def study(number: int) -> list[FileDataset]:
    """Return a CT of its own patient."""
    return factories.make_ct(slices=SLICES, rows=ROWS, columns=ROWS, patient=PatientKey("FACTORY", f"OVER-{number}"), seed=number)


def told(installation: Installation, numbers: Sequence[int]) -> None:
    """Tell of the patients, so that no study waits for its record."""
    text = "MSH|^~\\&|HIS|A|SYNOPTIC|B|20240101||ADT^A01^ADT_A01|{0}|P|2.5.1\rPID|1||OVER-{0}^^^FACTORY^MR||Test^Factory||19700101|O\r"
    assert set(mllp.send(("127.0.0.1", installation.mllp_port), [text.format(number).encode() for number in numbers])) == {"AA"}


def send(installation: Installation, instances: Sequence[FileDataset]) -> list[int]:
    """Store them over one association; return the statuses."""
    with Scu(("127.0.0.1", installation.port), timeout_s=60) as scu:
        assert isinstance(scu.associate([(CT, [EXPLICIT])], called="WORKER", calling="MODALITY"), A_ASSOCIATE_AC)
        statuses = [scu.store(ds, data=encoded(ds)) for ds in instances]
        scu.release()
    return statuses


@contextmanager
def verifying(installation: Installation) -> Iterator[list[float]]:
    """Verify again and again while the block runs, each time by an association of its own; yields the seconds that each took."""
    stop, took = threading.Event(), []

    def verify() -> None:
        while not stop.wait(0.2):
            began = time.monotonic()
            with Scu(("127.0.0.1", installation.port), timeout_s=60) as scu:
                scu.associate([(VERIFICATION, [EXPLICIT])], called="WORKER", calling="MODALITY")
                assert scu.echo(context_id=1) == 0x0000
                scu.release()
            took.append(time.monotonic() - began)

    thread = threading.Thread(target=verify)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join(120)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, so small that a few studies come to the mark."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root; CI has it") if not os.environ.get("CI") else pytest.fail("CI cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def ledger(installation: Installation) -> dict[str, int]:
    """Return the accounts; the command must say that they add up."""
    done = installation.cli("status", "--ledger", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    accounts: dict[str, int] = json.loads(done.stdout)["all"]
    return {name: count for name, count in accounts.items() if count}


@pytest.mark.slow
@pytest.mark.requirement("S5")
@pytest.mark.requirement("R20")
@pytest.mark.timeout(300)
def test_while_inference_stands_still_images_are_taken_to_the_disks_mark_and_all_are_analysed_and_delivered_afterwards(small: Path) -> None:
    with ScriptedPacs() as pacs:
        made = Installation(small, quiet_s=1.0, processes=1, ask_sender=False)
        made.extra = f'[[destinations]]\nname = "pacs"\nae_title = "SCRIPTED"\nhost = "127.0.0.1"\nport = {pacs.peer.port}\n'
        with made:
            roles = {one["role"]: psutil.Process(one["pid"]) for one in made.events("role.started")}
            told(made, range(100))
            assert set(send(made, study(0))) == {0x0000}
            made.wait_idle()
            ballast = small / "ballast"
            ballast.write_bytes(bytes(shutil.disk_usage(small).free - ROOM_MB * 2**20))
            before = {role: roles[role].memory_info().rss for role in ("receive", "supervisor", "deliver")}

            with verifying(made) as took:
                roles["run"].send_signal(signal.SIGSTOP)
                try:
                    refused: list[FileDataset] = []
                    sent = whole = 0
                    while len(refused) < 2 * SLICES:
                        sent += 1
                        instances = study(sent)
                        statuses = send(made, instances)
                        assert set(statuses) <= {0x0000, 0xA700}
                        whole += not any(statuses)
                        refused += [ds for ds, status in zip(instances, statuses, strict=True) if status]
                    assert sent * SLICES - len(refused) > 100, "the images that were taken before the mark"
                    wait_until(lambda: waiting(made) >= whole, timeout_s=60, what="the analyses of what was taken, waiting")
                    assert shutil.disk_usage(small).free > (LOW_MB - 4) * 2**20, "the mark leaves room for the database"
                    grown_mb = {role: round((roles[role].memory_info().rss - rss) / 2**20, 1) for role, rss in before.items()}
                    standing = ledger(made)
                    told(made, [100])  # HL7 goes on
                    ballast.unlink()
                    assert set(send(made, refused)) == {0x0000}
                finally:
                    roles["run"].send_signal(signal.SIGCONT)
                made.wait_idle()
            accounts = ledger(made)
            assert made.events("role.restarted") == []
        reported = {str(ds.StudyInstanceUID) for ds in pacs.kept.values()}
    print(json.dumps({"bench": "overload", "studies": sent + 1, "refused": len(refused), "grown_mb": grown_mb, "at_the_mark": standing}))
    echo = {"n": len(took), "p50_s": round(statistics.median(took), 4), "longest_s": round(max(took), 3)}
    print(json.dumps({"bench": "C-ECHO in overload", **echo}))
    assert reported == {str(study(number)[0].StudyInstanceUID) for number in range(sent + 1)}
    assert accounts == {"received": sent + 1, "delivered": sent + 1}
    assert standing["received"] == standing["delivered"] + standing["in flight"]
    assert standing["delivered"] == 1
    assert max(grown_mb.values()) < 20
    assert len(took) > 10
    assert statistics.quantiles(took, n=20)[-1] < 1.0


def waiting(installation: Installation) -> int:
    """How many analyses are due."""
    store = installation.store
    with store.read() as conn:
        due = measures.counts(conn).get(("infer", "available"), 0)
    store.close()
    return due
