"""The whole line in one process: phantoms imported as files, the real bundle, real decoders, a clock that is wound by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path

import sqlalchemy as sa
from pydicom import dcmread

from tests.installation import BUNDLES
from worker import pipeline
from worker.config import Config, Receive, Run, Site
from worker.demo.phantom import ISSUER, make_case
from worker.domain import Job
from worker.imaging.decoding import DecoderPool
from worker.importing import import_files
from worker.infer import Model
from worker.intake import assembly
from worker.record_feeds import clock
from worker.store import queue, schema
from worker.store.database import Store
from worker.store.spool import Spool

PHANTOM = BUNDLES / "phantom"
ZONE = timezone(timedelta(hours=1))
WANTS = [assembly.Wants("phantom", frozenset({"CT"}))]


@dataclass
class PhantomLine:
    """A store, a spool and decoders; studies come by number and are analysed by whatever model is given."""

    folder: Path
    store: Store
    pool: DecoderPool
    bundles: tuple[Path, ...] = (PHANTOM,)
    now: datetime = field(default_factory=lambda: clock() + timedelta(hours=1))

    @property
    def config(self) -> Config:
        """As the daemon would read it."""
        return Config(
            site=Site(data=self.folder / "data", timezone="+01:00", issuer=ISSUER),
            receive=Receive(low_water_mb=0),
            run=Run(bundles=self.bundles, lease_s=3.0, decoders=1),
        )

    def receive(self, *seeds: int, absent: frozenset[str] = frozenset()) -> list[str]:
        """Take in one study and record a seed, lacking what is `absent`; queue their analyses. Returns the studies' UIDs."""
        uids = []
        for seed in seeds:
            case, files = make_case(seed, absent=absent), self.folder / f"files-{seed}"
            files.mkdir()
            for number, ds in enumerate(case.datasets):
                ds.save_as(files / f"{number:03d}.dcm", enforce_file_format=True)
            (files / "record.hl7").write_bytes("".join(f"{message}\n" for message in case.hl7).encode())
            paths = sorted(files.iterdir())
            tally = import_files(paths, config=self.config, store=self.store, spool=Spool(self.config.spool, low_water_bytes=0))
            assert not tally.reasons, tally.reasons
            uids.append(case.study_instance_uid)
        assembly.sweep(self.store, wants=WANTS, limit_s=1, now=self.now)
        return uids

    def line(self, model: Model) -> pipeline.Line:
        """The line with one model."""
        return pipeline.Line(
            store=self.store,
            models={model.name: model},
            decoders=self.pool,
            destinations={"pacs": ("sr",)},
            zone=ZONE,
            clock=lambda: self.now,
            instances=self.config.spool / "instances",
        )

    def lease(self, *, limit: int = 8) -> list[Job]:
        """Take what is due."""
        with self.store.begin() as conn:
            return queue.lease(conn, "infer", owner="me", limit=limit, lease_s=60, now=self.now)

    def analyse(self, model: Model, *, limit: int = 8) -> list[pipeline.Case]:
        """Lease what is due and take it down the line."""
        return pipeline.process(self.line(model), self.lease(limit=limit))

    def jobs(self, kind: str = "infer") -> list[tuple[str, int, str]]:
        """State, attempts and reason of each job, oldest first."""
        wanted = sa.select(schema.job.c.state, schema.job.c.attempt, schema.job.c.reason).where(schema.job.c.kind == kind)
        with self.store.read() as conn:
            return [tuple(row) for row in conn.execute(wanted.order_by(schema.job.c.id))]

    def reports(self) -> dict[str, bytes]:
        """The bytes of the one report of each study, by the study's UID."""
        both = sa.select(schema.study.c.study_instance_uid, schema.document.c.data).join_from(schema.document, schema.study)
        with self.store.read() as conn:
            rows = list(conn.execute(both))
        found: dict[str, bytes] = dict(rows)
        assert len(found) == len(rows), "two reports of one study"
        return found


def told(report: bytes) -> str:
    """Every value in a report, a line each."""
    return "\n".join(str(element.value) for element in dcmread(BytesIO(report)).iterall() if element.VR != "SQ")


@contextmanager
def phantom_line(folder: Path, pool: DecoderPool, *, bundles: tuple[Path, ...] = (PHANTOM,)) -> Iterator[PhantomLine]:
    """An installation in `folder`, without a daemon."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir()
    store = Store(f"sqlite:///{folder / 'data' / 'synoptic.db'}")
    store.migrate()
    try:
        yield PhantomLine(folder, store, pool, bundles)
    finally:
        store.close()
