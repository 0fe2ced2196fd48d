"""A start with a full spool: ready at once, the sweep of it in the background. SPOOL_FILES=100000 `make restart` is the long form."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.conformance.test_store import add, header
from tests.installation import Installation, wait_until
from tests.scu import Scu, slice_of
from worker import sweeps
from worker.config import Assembly, Config, Site
from worker.store import schema, studies
from worker.store.database import Store
from worker.store.spool import Spool, Swept

pytestmark = [pytest.mark.timeout(1800)]

FILES = int(os.environ.get("SPOOL_FILES", "5000"))
#: Every so many files one has no row.
STRAY = 100
#: Only of so many files is the time a requirement: a short form that is slow tells of the machine.
LONG, READY_S = 100_000, 30.0


def fill(data: Path) -> int:
    """Files of last night, all but some with their rows; how many have none."""
    store, spool = Store(f"sqlite:///{data / 'synoptic.db'}"), data / "spool"
    store.migrate()
    Spool(spool, low_water_bytes=0)
    add(store, header(0))
    rows, night = [], time.time() - 43200
    with store.begin() as conn:
        first = dict(conn.execute(sa.select(schema.instance)).mappings().one())
        conn.execute(sa.delete(schema.instance))
        for number in range(FILES):
            content = f"image {number}".encode()
            sha256 = hashlib.sha256(content).hexdigest()
            path = Path(sha256[:2]) / f"{sha256}.dcm"
            (spool / "instances" / path).write_bytes(content)
            os.utime(spool / "instances" / path, (night, night))
            known = {"path": str(path), "sha256": sha256, "size_bytes": len(content), "sop_instance_uid": f"2.25.7.{number}"}
            if number % STRAY:
                rows.append({**first, "id": number + 1, **known})
        conn.execute(sa.insert(schema.instance), rows)
    store.close()
    return FILES - len(rows)


@pytest.mark.requirement("S10")
def test_a_start_with_a_full_spool_is_ready_in_time_and_sweeps_in_the_background(tmp_path: Path) -> None:
    installation = Installation(tmp_path / "worker", bundles=(), ask_sender=False, processes=1)
    (installation.folder / "data").mkdir(parents=True, mode=0o700)
    strays = fill(installation.folder / "data")
    began = time.monotonic()
    with installation:
        ready_s = time.monotonic() - began
        with Scu(("127.0.0.1", installation.port)) as scu:
            scu.associate(called="WORKER", calling="MODALITY")
            assert scu.store(slice_of()) == 0x0000
        stored_s = time.monotonic() - began
        (swept,) = installation.wait_for_event("spool.swept", timeout_s=600)
        swept_s = time.monotonic() - began
        print(json.dumps({"files": FILES, "ready_s": round(ready_s, 1), "stored_s": round(stored_s, 1), "swept_s": round(swept_s, 1)}))
        assert (swept["orphans"], swept["parts"], swept["removed"]) == (strays, 0, 0)
        kept = sum(1 for _ in (installation.folder / "data" / "spool" / "instances").glob("*/*.dcm"))
        assert kept == FILES - strays + 1
    if FILES >= LONG:
        assert ready_s < READY_S


class Endless(Spool):
    """A spool with so many files that its sweep does not end before it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, low_water_bytes=0)
        self.began, self.ends = threading.Event(), threading.Event()

    def sweep(self, known: Callable[[Sequence[str]], Mapping[str, bool]], *, written_before: datetime) -> Swept:
        """Begin, and wait."""
        self.began.set()
        self.ends.wait(60)
        return super().sweep(known, written_before=written_before)


@pytest.mark.requirement("S10")
def test_no_other_sweep_waits_for_that_of_the_spool(tmp_path: Path) -> None:
    """The start least of all: what is received meanwhile is complete after its quiet period."""
    store = Store(f"sqlite:///{tmp_path / 'synoptic.db'}")
    store.migrate()
    spool = Endless(tmp_path / "spool")
    periodic = sweeps.scheduler(Config(site=Site(data=tmp_path), assembly=Assembly(sweep_s=0.1)), store, spool, sweeps.Clock())
    periodic.start()
    try:
        assert spool.began.wait(60)
        add(store, header(1), now=datetime.now(UTC) - timedelta(days=1))

        def is_judged() -> bool:
            with store.read() as conn:
                return not studies.receiving(conn)

        wait_until(is_judged, timeout_s=60, what="the study is judged beside the sweep")
        assert not spool.ends.is_set()
    finally:
        spool.ends.set()
        periodic.stop(wait=True)
    store.close()
