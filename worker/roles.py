"""The roles, built from Config: what each process does until it is told to stop.

::

    receive   StorageScp → spool → studies.add_instance          (n processes, one listening socket)
    run       lease → pipeline.process, a heartbeat beside it    (the only one that loads torch)
    deliver   lease → deliver.send, one thread a destination

Imports are late on purpose: a role loads only what it needs, the receiver never torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from worker import events
from worker.config import Config, Destination
from worker.domain import CommitmentReport, CommitmentRequest, Header, Job, Received
from worker.errors import BundleError, DecoderDied
from worker.peers import peer_of, peer_to_report
from worker.record_feeds import clock, identified
from worker.store import commitments, promises, queue, studies
from worker.store.database import Connection, DatabaseUnavailable, Store
from worker.store.group import GroupCommit
from worker.store.spool import Spool, Stored
from worker.tls import server_context

if TYPE_CHECKING:
    from models.bundle import Bundle
    from worker.intake.negotiation import Peer as Caller


#: Seconds that transfers under way have to finish after SIGTERM.
RECEIVE_GRACE_S: Final = 10.0
#: So often it is looked for archives that did not say in time whether they commit.
LOOK_S: Final = 1.0


def owner() -> str:
    """Who holds a lease: for a person who reads the job table; the generation is what fences."""
    return f"{socket.gethostname()}/{os.getpid()}"


def started(role: str, **facts: object) -> None:
    """Say that a role is ready, how long that took and how large it is."""
    process = psutil.Process()
    seconds = round(time.time() - process.create_time(), 2)
    rss_mb = round(process.memory_info().rss / 2**20)
    events.emit("role.started", role=role, pid=process.pid, seconds=seconds, rss_mb=rss_mb, **facts)


def read_bundles(config: Config) -> list[Bundle]:
    """The configured bundles' metadata, their weights checked by sha256; needs no torch.

    Raises
    ------
    BundleError
        Naming the bundle, the file and the key.
    """
    from models.bundle import Bundle, InvalidBundleError

    try:
        return [Bundle.read(folder) for folder in config.run.bundles]
    except InvalidBundleError as exc:
        raise BundleError(str(exc)) from exc


# --- receive


#: No image is older; a date of before it is a device's idea of "unknown".
FIRST_XRAY: Final = 1895


def study_time(header: Header, zone: tzinfo) -> datetime | None:
    """When a study was made: its date and time in its own offset, else the site's zone; None without a date that can be."""
    text = header.study_date + (header.study_time.split(".")[0] + "000000")[:6]
    with contextlib.suppress(ValueError, OverflowError):  # 0001-01-01 east of Greenwich is before the calendar
        naive = datetime.strptime(text, "%Y%m%d%H%M%S")  # noqa: DTZ007  the zone is put on in the next line
        if naive.year < FIRST_XRAY:
            return None
        return naive.replace(tzinfo=_offset(header.timezone_offset) or zone).astimezone(UTC)
    return None


def _offset(text: str) -> tzinfo | None:
    """PS3.3 §C.12.1.1.8: ±HHMM."""
    if len(text) != 5 or text[0] not in "+-" or not text[1:].isdecimal():
        return None
    delta = timedelta(hours=int(text[1:3]), minutes=int(text[3:5]))
    return timezone(-delta if text[0] == "-" else delta)


def add_instance(conn: Connection, config: Config, header: Header, stored: Stored, *, calling_ae: str, address: str) -> Received:
    """Commit 1: the row of a file that is durable already."""
    return studies.add_instance(
        conn,
        identified(header, config),
        # Below the spool, not absolute: a spool that was moved or restored elsewhere is still ours.
        path=Path(stored.path.parent.name) / stored.path.name,
        sha256=stored.sha256,
        size_bytes=stored.size_bytes,
        calling_ae=calling_ae,
        address=address,
        study_at=study_time(header, config.zone),
        quiet_s=config.assembly.quiet_by_modality.get(header.modality, config.assembly.quiet_s),
        now=clock(),
    )


def receive(config: Config, store: Store, listener: socket.socket, stop: threading.Event) -> None:
    """Serve C-ECHO, C-STORE and reports on storage commitment on a listening socket until told to stop; what is under way is finished."""
    from worker.imaging.codecs import decodable_transfer_syntaxes
    from worker.intake.negotiation import Policy
    from worker.intake.scp import Limits, StorageScp

    settings = config.receive
    spool = Spool(config.spool, low_water_bytes=settings.low_water_mb * 2**20)
    policy = Policy(
        ae_title=settings.ae_title,
        calling={sender.ae_title: sender.addresses for sender in config.senders},
        max_pdu=settings.max_pdu_bytes,
        accepts_unknown=settings.accept_unknown_sop_classes,
        takes_commitments=any(destination.commitment for destination in config.destinations),
        commits_to=[sender.ae_title for sender in config.senders if sender.commitment_port],
        transfer_syntaxes=decodable_transfer_syntaxes(_loadable_codecs()),
    )
    limits = Limits(
        max_pdu=settings.max_pdu_bytes,
        associations=settings.max_associations,
        per_address=settings.max_per_address,
        pdu_s=settings.pdu_deadline_s,
        idle_s=settings.idle_s,
    )

    def add(conn: Connection, item: tuple[Header, Stored, Caller]) -> Received:
        header, stored, sender = item
        return add_instance(conn, config, header, stored, calling_ae=sender.calling_ae, address=sender.address)

    def report(said: CommitmentReport | CommitmentRequest, caller: Caller) -> str:
        return (take_request if isinstance(said, CommitmentRequest) else take_report)(config, store, said, caller)

    commit = GroupCommit(store.begin, add, order=lambda item: item[0].study_instance_uid)

    def sink(header: Header, stored: Stored, sender: Caller) -> Received:
        return commit((header, stored, sender))

    scp = StorageScp(
        listener,
        policy=policy,
        spool=spool,
        sink=sink,
        limits=limits,
        ssl_context=server_context(config.receive, section="receive"),
        reports=report,
    )
    scp.start()
    started("receive", port=scp.address[1])
    stop.wait()
    scp.stop(RECEIVE_GRACE_S)


def take_report(config: Config, store: Store, said: CommitmentReport, archive: Caller) -> str:
    """Take in what an archive says of storage commitment; returns why it changes nothing, or ''."""
    asked = [peer.name for peer in config.destinations if peer.commitment and peer.ae_title == archive.calling_ae]
    with store.begin() as conn:
        changes = commitments.report(conn, said, destinations=asked, now=clock())
    if changes is None:
        return "The transaction was not asked of this AE title"
    for change in changes:
        commitments.say(change)
    return ""


def take_request(config: Config, store: Store, asked: CommitmentRequest, sender: Caller) -> str:
    """Note what a sender asks us to commit to, for a sweep to look at and report; returns why not, or ''."""
    if peer_to_report(config, sender.calling_ae, sender.address) is None:
        return "This AE title may not ask for commitment"
    with store.begin() as conn:
        is_noted = promises.ask(conn, asked, calling_ae=sender.calling_ae, address=sender.address, now=clock())
    return "" if is_noted else "The transaction UID was used for other instances"


def _loadable_codecs() -> Mapping[str, str] | None:
    """Return the versions of the decoders; None if they cannot be asked, for images must be received all the same."""
    from worker.imaging.decoding import codec_versions

    try:
        versions = codec_versions()
    except DecoderDied as exc:
        events.emit("codec.missing", reason=f"It is not known which decoders can be loaded. {exc}")
        return None
    _say_unloadable(versions)
    return versions


def _say_unloadable(codecs: Mapping[str, str]) -> None:
    from worker.imaging.codecs import unloadable

    for sentence in unloadable(codecs):
        events.emit("codec.missing", reason=sentence)


# --- run


def run(config: Config, store: Store, stop: threading.Event) -> None:
    """Lease and process until told to stop; what is in hand is finished first."""
    from worker.fhir_feed import Puller
    from worker.imaging.decoding import DecoderPool

    with _without("transformers"):
        from worker.infer import Model
        from worker.pipeline import Line, process

    settings = config.run
    loaded = [Model(folder, device=settings.device, threads=settings.threads) for folder in settings.bundles]
    with DecoderPool(
        processes=settings.decoders, memory_bytes=settings.decoder_memory_mb * 2**20, timeout_s=settings.decoder_timeout_s
    ) as pool:
        _say_unloadable(pool.warm())
        line = Line(
            store=store,
            models={model.name: model for model in loaded},
            decoders=pool,
            destinations=tuple(peer.name for peer in config.destinations),
            zone=config.zone,
            clock=clock,
            instances=config.spool / "instances",
            must_agree=config.records.must_agree,
            pull=Puller(config, store) if config.fhir.url else None,
        )
        started("run", bundles={model.name: model.digest[:12] for model in loaded})
        _work(
            store,
            stop,
            poll_s=settings.poll_s,
            lease_s=settings.lease_s,
            take=_take(store, config, sorted(line.models)),
            do=lambda jobs: process(line, jobs),
        )


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Import as if `package` were not installed.

    MONAI imports all of transformers for a network of its own that no bundle has: a quarter of a start's imports.
    A bundle with a BERT-type encoder imports it afterwards (models/text.py).
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # documented: None makes its import fail
    try:
        yield
    finally:
        del sys.modules[package]


def _take(store: Store, config: Config, names: Sequence[str]) -> Callable[[], list[Job]]:
    def take() -> list[Job]:
        with store.begin() as conn:
            return queue.lease(conn, "infer", owner=owner(), limit=config.run.batch, lease_s=config.run.lease_s, now=clock(), bundles=names)

    return take


def _work(
    store: Store, stop: threading.Event, *, poll_s: float, lease_s: float, take: Callable[[], list[Job]], do: Callable[[list[Job]], object]
) -> None:
    """Take and do until told to stop, renewing leases beside; a database that is away is waited for."""
    while not stop.is_set():
        try:
            jobs = take()
            if jobs:
                with heartbeat(store, jobs, lease_s=lease_s):
                    do(jobs)
                continue
        except DatabaseUnavailable as exc:
            events.emit("sweep.failed", sweep="lease", reason=str(exc))
            stop.wait(1.0)
        stop.wait(poll_s)


@contextlib.contextmanager
def heartbeat(store: Store, jobs: Sequence[Job], *, lease_s: float) -> Iterator[None]:
    """Renew the leases of `jobs` at each third of their time while the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(lease_s / 3):
            # If the database is away the leases run out, and the verdicts are fenced: nothing to do here.
            with contextlib.suppress(DatabaseUnavailable), store.begin() as conn:
                queue.renew(conn, jobs, lease_s=lease_s, now=clock())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- deliver


def _now_and_then(do: Callable[[], object], every_s: float) -> Callable[[], None]:
    """`do`, at most once in `every_s`, however often it is called."""
    done_at = -every_s

    def call() -> None:
        nonlocal done_at
        if time.monotonic() - done_at > every_s:
            do()
            done_at = time.monotonic()

    return call


def _serve(config: Config, store: Store, stop: threading.Event, destination: Destination) -> None:
    """Deliver to one destination until told to stop."""
    from worker.deliver import commitment
    from worker.deliver.breaker import Breaker, judge
    from worker.deliver.send import deliver as send

    settings = config.deliver
    peer = peer_of(destination, own_ae_title=config.receive.ae_title)
    wait_s = destination.commitment_wait_s if destination.commitment else None
    breaker = Breaker()
    look = _now_and_then(lambda: commitment.look(store=store, peer=peer, clock=clock), LOOK_S)

    def take() -> list[Job]:
        if wait_s is not None:
            look()
        if breaker.wait_s > 0:
            return []
        with store.begin() as conn:
            return queue.lease(
                conn,
                "deliver",
                owner=owner(),
                limit=1 if breaker.failures else settings.batch,
                lease_s=settings.lease_s,
                now=clock(),
                destination=destination.name,
            )

    _work(
        store,
        stop,
        poll_s=settings.poll_s,
        lease_s=settings.lease_s,
        take=take,
        do=lambda jobs: judge(
            breaker,
            send(jobs, store=store, peer=peer, clock=clock, commitment_wait_s=wait_s),
            store=store,
            destination=destination.name,
            now=clock(),
        ),
    )


def deliver(config: Config, store: Store, stop: threading.Event) -> None:
    """One thread a destination, so that one PACS that is down or slow holds up no other."""
    from worker.deliver import breaker, commitment, send  # noqa: F401  here, so that it has not started before they are there

    threads = [threading.Thread(target=_serve, args=(config, store, stop, one), name=f"deliver-{one.name}") for one in config.destinations]
    for thread in threads:
        thread.start()
    started("deliver", destinations=[peer.name for peer in config.destinations])
    while not stop.wait(1.0):
        if not all(thread.is_alive() for thread in threads):
            # Its own words are in the log; the supervisor starts all destinations again.
            stop.set()
            raise RuntimeError("A destination's thread ended.")
    for thread in threads:
        thread.join()
