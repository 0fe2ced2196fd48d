"""The power goes, and the disk forgets what was not synced: what was acknowledged is there, and the daemon starts on what is left."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.files import below
from tests.installation import Installation
from tests.scu import CT, EXPLICIT, Scu, encoded, slice_of
from tests.shim import Shim
from worker import consistency
from worker.store.database import Store
from worker.store.spool import Spool, digest_of, file_meta

pytestmark = [pytest.mark.timeout(300)]

#: Sent, and of each study.
INSTANCES, STUDY = 12, 4


@dataclass(frozen=True)
class Acknowledged:
    """A 0x0000, and how many syncs there had been when it came."""

    sop_instance_uid: str
    sha256: str
    syncs: int
    is_conflict: bool


def sha256_of(ds: Dataset) -> str:
    return hashlib.sha256(file_meta(CT, ds.SOPInstanceUID, EXPLICIT) + encoded(ds)).hexdigest()


def send(scu: Scu, shim: Shim, ds: Dataset, *, is_conflict: bool = False) -> Acknowledged:
    assert scu.store(ds) == 0x0000
    return Acknowledged(ds.SOPInstanceUID, sha256_of(ds), shim.syncs, is_conflict)


@pytest.mark.requirement("S2")
def test_a_power_cut_at_any_sync_loses_nothing_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's own syncs, its database's among them, are recorded; each is then the last that the disk heard of, or half of it."""
    installation = Installation(tmp_path / "worker", bundles=(), quiet_s=0.5, ask_sender=False, processes=1)
    data = installation.folder / "data"
    data.mkdir(parents=True, mode=0o700)  # as a package or systemd makes it, long before
    with monkeypatch.context() as preloaded:
        shim = Shim(tmp_path / "shim", data, preloaded, has_journal=True)
        installation.start()
    first, told = shim.syncs, []
    try:
        with Scu(("127.0.0.1", installation.port)) as scu:
            scu.associate(called="WORKER", calling="MODALITY")
            for number in range(INSTANCES):
                ds = slice_of(f"2.25.{number // STUDY}", InstanceNumber=number)
                told.append(send(scu, shim, ds))
                if number % 6 == 0:
                    ds.ImageComments = "other bytes"
                    told.append(send(scu, shim, ds, is_conflict=True))
        installation.wait_for_event("study.excluded", timeout_s=30, count=INSTANCES // STUDY)
    finally:
        installation.stop()
    chance, last = random.Random(2026), shim.syncs
    cuts = range(first, last + 1)
    assert len(cuts) > 3 * INSTANCES
    at = chance.choice(cuts)
    for cut in cuts:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as made:  # in memory: the disk's own syncs would be waited for at each
            left = Path(made)
            shim.journal.rebuild(left / "data", cut, chance)
            check(left / "data", [one for one in told if one.syncs <= cut])
            if cut == at:
                start(installation, left)
    print(json.dumps({"syncs": last, "cuts": len(cuts), "acknowledged": len(told)}))


def check(data: Path, must_be: list[Acknowledged]) -> None:
    """Files and rows of all that was acknowledged; no row whose file is missing or changed; nothing that is not what it is called."""
    found = {digest_of(path) for path in below(data / "spool")}
    assert {one.sha256 for one in must_be} <= found
    store = Store(f"sqlite:///{data / 'synoptic.db'}")
    try:
        store.check()
        with store.read() as conn:
            assert conn.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            rows = set(conn.exec_driver_sql("SELECT sop_instance_uid, sha256 FROM instance").tuples())
        assert {(one.sop_instance_uid, one.sha256) for one in must_be if not one.is_conflict} <= rows
        spool = Spool(data / "spool", low_water_bytes=0)
        assert consistency.check(store, spool, with_digests=True, now=datetime.now(UTC), progress=lambda _done, _of: None).faults == ()
    finally:
        store.close()


def start(before: Installation, folder: Path) -> None:
    """The daemon is ready on what is left, and takes the next image."""
    with Installation(folder, bundles=(), ask_sender=False, processes=1) as installation:
        assert installation.port != before.port
        with Scu(("127.0.0.1", installation.port)) as scu:
            scu.associate(called="WORKER", calling="MODALITY")
            assert scu.store(slice_of()) == 0x0000


FIRST = """
import sys
from pathlib import Path
from worker.store.spool import Spool
incoming = Spool(Path(sys.argv[1]), low_water_bytes=0).begin(sop_class_uid="1.2", sop_instance_uid="1.2.3", transfer_syntax_uid="1.2.4")
incoming.write(memoryview(b"the first image"))
print(incoming.commit().sha256)
"""


@pytest.mark.requirement("S2")
def test_the_first_image_of_a_new_spool_survives_a_power_cut_whatever_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite syncs the folder that both are in; PostgreSQL is elsewhere."""
    (data := tmp_path / "data").mkdir()
    with monkeypatch.context() as preloaded:
        shim = Shim(tmp_path / "shim", data, preloaded, has_journal=True)
        command = [sys.executable, "-c", FIRST, str(data / "spool")]
        sha256 = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    shim.journal.rebuild(tmp_path / "left", shim.syncs, random.Random(2026))
    assert [digest_of(path) for path in below(tmp_path / "left")] == [sha256]
