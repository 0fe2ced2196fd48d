"""A receiver of ours on a free port, with the store's part in memory."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Final

from tests.scu import Heard, Scu, hearing
from worker import record_feeds
from worker.config import Config, Records
from worker.domain import Header, Received
from worker.intake import mllp
from worker.intake.dataphase import Reports
from worker.intake.negotiation import Peer, Policy
from worker.intake.scp import Limits, StorageScp, listen
from worker.store.database import Store
from worker.store.spool import Spool, Stored

QUICK: Final = Limits(associations=20, request_s=1.0, pdu_s=1.0, idle_s=5.0)


@dataclass(frozen=True)
class Kept:
    """A row: what the store was told of an instance."""

    header: Header
    stored: Stored


@dataclass
class FakeStore:
    """The store's part of receiving, in memory. Each of `fails` is raised once; `gate` holds the answer back."""

    rows: dict[str, Kept] = field(default_factory=dict)
    answers: list[Received] = field(default_factory=list)
    fails: list[Exception] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.gate.set()

    def sink(self, header: Header, stored: Stored, peer: Peer) -> Received:
        """Keep one row a SOP Instance UID; the whole file must be there before it."""
        if hashlib.sha256(stored.path.read_bytes()).hexdigest() != stored.sha256:
            raise AssertionError("The file is not whole before its row.")
        self.entered.set()
        self.gate.wait(15)
        with self.lock:
            if self.fails:
                raise self.fails.pop(0)
            known = self.rows.get(header.sop_instance_uid)
            if known is None:
                self.rows[header.sop_instance_uid] = Kept(header, stored)
                answer = Received.STORED
            else:
                answer = Received.DUPLICATE if known.stored.sha256 == stored.sha256 else Received.CONFLICT
            self.answers.append(answer)
        return answer


@dataclass
class Receiver:
    """A running receiver, what it keeps and what it says."""

    scp: StorageScp
    spool: Spool
    store: FakeStore
    heard: Heard

    def scu(self) -> Scu:
        """Connect."""
        return Scu(self.scp.address)

    def files(self) -> list[Path]:
        """Every file under the spool."""
        return sorted(path for path in self.spool.root.rglob("*") if path.is_file())


@contextmanager
def receiving(
    root: Path,
    *,
    limits: Limits = QUICK,
    calling: Mapping[str, Sequence[str]] | None = None,
    spool: Spool | None = None,
    ssl_context: Callable[[], ssl.SSLContext] | None = None,
    accepts_unknown: bool = False,
    reports: Reports | None = None,
    tls_names: Mapping[str, Sequence[str]] | None = None,
    commits_to: Sequence[str] = (),
    address: tuple[str, int] = ("127.0.0.1", 0),
) -> Iterator[Receiver]:
    """Run a receiver called SYNOPTIC, which SENDER may call, while the block runs."""
    spool = spool or Spool(root, low_water_bytes=0)
    store = FakeStore()
    policy = Policy(
        ae_title="SYNOPTIC",
        calling=calling or {"SENDER": ["127.0.0.1"]},
        max_pdu=limits.max_pdu,
        accepts_unknown=accepts_unknown,
        takes_commitments=reports is not None,
        tls_names=tls_names,
        commits_to=commits_to,
    )
    scp = StorageScp(listen(address), policy=policy, spool=spool, sink=store.sink, limits=limits, ssl_context=ssl_context, reports=reports)
    with hearing() as heard:
        scp.start()
        try:
            yield Receiver(scp, spool, store, heard)
        finally:
            store.gate.set()
            scp.stop(0.0)


@contextmanager
def hl7_listener(store: Store) -> Iterator[tuple[str, int]]:
    """Our HL7 listener on a real store; gives its address."""
    config = Config(records=Records())
    server = mllp.MllpServer(
        ("127.0.0.1", 0),
        apply=lambda one, raw: record_feeds.apply_message(config, store, one, raw),
        reject=lambda reason, raw: record_feeds.keep_refused(store, reason, raw),
        zone=UTC,
        issuers={},
        allowed_addresses=("127.0.0.0/8",),
    )
    server.start()
    try:
        yield ("127.0.0.1", server.port)
    finally:
        server.stop()
