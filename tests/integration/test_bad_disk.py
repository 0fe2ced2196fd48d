"""A disk that answers EIO, or turns read-only, below a running daemon: told to come again, said, and well again when the disk is."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.installation import Installation
from tests.peers import unavailable
from tests.scu import Scu, slice_of
from tests.shim import ON_OPEN, ON_SYNC, ON_WRITE, Shim
from worker import consistency
from worker.store.spool import Spool

pytestmark = [pytest.mark.timeout(300)]

FAULTS = {
    "an error while an image is written": (errno.EIO, ON_WRITE, "/spool/incoming/"),
    "an error when an image is synced": (errno.EIO, ON_SYNC, "/spool/incoming/"),
    "an error when its folder is synced": (errno.EIO, ON_SYNC, "/spool/instances/"),
    "an error when the database is written": (errno.EIO, ON_WRITE, "synoptic.db"),
    "an error when the database is synced": (errno.EIO, ON_SYNC, "synoptic.db"),
    "a spool that was turned read-only": (errno.EROFS, ON_OPEN | ON_WRITE, "/spool/"),
    "a database that was turned read-only": (errno.EROFS, ON_OPEN | ON_WRITE, "synoptic.db"),
}


@pytest.fixture
def on_its_own_disk(tmp_path: Path) -> Iterator[Path]:
    """An installation's folder whose spool is a file system of its own."""
    spool = tmp_path / "worker" / "data" / "spool"
    spool.mkdir(parents=True, mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(spool)], check=False).returncode:
        unavailable("Mounting a tmpfs needs root.")
    yield tmp_path / "worker"
    subprocess.run(["umount", "--lazy", str(spool)], check=True)


def store(installation: Installation, ds: Dataset) -> tuple[int, str]:
    """Send one image on an association of its own; its status, and the comment beside it."""
    with Scu(("127.0.0.1", installation.port), timeout_s=60) as scu:
        scu.associate(called="WORKER", calling="MODALITY")
        return scu.store(ds), scu.comment.strip()


def doctor_says(installation: Installation) -> str:
    """What `synoptic doctor` finds of the spool, in a process of its own, where the disk fails too."""
    program = "import sys; from pathlib import Path; from worker import config, doctor; path = Path(sys.argv[1]); " + (
        "print(next(found for what, found, is_well in doctor.checks(config.read(path), path) if what == 'spool' and not is_well))"
    )
    return subprocess.run([sys.executable, "-c", program, str(installation.config)], capture_output=True, text=True, check=True).stdout


@pytest.mark.requirement("S4")
def test_a_failing_disk_is_answered_a700_and_said_and_all_is_well_when_it_is(
    on_its_own_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image that was refused is sent again afterwards, as senders do; the same daemon takes it."""
    shim = Shim(tmp_path / "shim", on_its_own_disk / "data", monkeypatch)
    spool, took = on_its_own_disk / "data" / "spool", 1
    with Installation(on_its_own_disk, bundles=(), ask_sender=False, processes=1) as installation:
        assert store(installation, slice_of()) == (0x0000, "")
        for what, (error, calls, part) in FAULTS.items():
            ds = slice_of()
            shim.fail(error, calls=calls, part=part)
            status, comment = store(installation, ds)
            assert (status, comment.endswith("send again later")) == (0xA700, True), what
            assert f"errno {error}" in comment or "database" in comment
            if what == "an error when an image is synced":
                assert "cannot be written (errno 5)" in doctor_says(installation)
            shim.heal()
            assert store(installation, ds) == (0x0000, ""), what
            took += 1
        ds = slice_of()
        subprocess.run(["mount", "-o", "remount,ro", str(spool)], check=True)
        assert store(installation, ds)[0] == 0xA700
        with pytest.raises(OSError, match="Read-only"):  # a start, and `synoptic doctor`
            Spool(spool, low_water_bytes=0)
        subprocess.run(["mount", "-o", "remount,rw", str(spool)], check=True)
        assert store(installation, ds) == (0x0000, "")
        took += 1
        assert [one["status"] for one in installation.events("instance.refused")] == ["0xA700"] * (len(FAULTS) + 1)
        assert installation.events("role.restarted") == []
        assert "Traceback" not in installation.log.read_text("utf-8")
        rows = installation.store
        found = consistency.check(
            rows, Spool(spool, low_water_bytes=0), with_digests=True, now=datetime.now(UTC), progress=lambda _done, _of: None
        )
        rows.close()
        assert (found.files, found.faults) == (took, ())
        assert list((spool / "incoming").iterdir()) == []


WHILE_READ_ONLY = """
import sys
from worker.errors import Retry
from worker.store.database import Store
store = Store(sys.argv[1])
store.migrate()
with store.read():
    print("break", flush=True), input()
    with store.read():
        pass
    print("heal", flush=True), input()
for _ in range(4):
    try:
        with store.begin() as conn:
            conn.exec_driver_sql("UPDATE study SET hold = hold")
        print("written", flush=True)
    except Retry:
        print("refused", flush=True)
"""


@pytest.mark.requirement("S4")
def test_a_connection_that_was_opened_while_the_disk_was_read_only_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite falls back to reading: of the pool's connections each such one would refuse its share of images until the next start."""
    (tmp_path / "data").mkdir()
    with monkeypatch.context() as preloaded:
        shim = Shim(tmp_path / "shim", tmp_path / "data", preloaded)
        command = [sys.executable, "-c", WHILE_READ_ONLY, f"sqlite:///{tmp_path / 'data' / 'synoptic.db'}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "break\n"
        shim.fail(errno.EROFS, calls=ON_OPEN | ON_WRITE, part="synoptic.db")
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "heal\n"
        shim.heal()
        print(file=process.stdin, flush=True)
        answers = process.stdout.read().split()
    assert answers[1:] == ["written"] * 3
