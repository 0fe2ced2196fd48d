"""The roles, built from Config: what each process does until it is told to stop.

::

    run       lease → pipeline.process, a heartbeat beside it    (the only one that loads torch)
    deliver   lease → deliver.send, one thread a destination

The third is in reception.py. Imports are late on purpose: a role loads only what it needs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import psutil

from worker import events
from worker.config import Config, Destination
from worker.domain import Job
from worker.errors import BundleError, DeviceLost
from worker.ops import audit
from worker.ops.log import places
from worker.peers import peer_of, systems_of
from worker.record_feeds import clock
from worker.store import queue
from worker.store.database import DatabaseUnavailable, Store

if TYPE_CHECKING:
    from models.bundle import Bundle


#: So often it is looked for archives that did not say in time whether they commit.
LOOK_S: Final = 1.0
#: What MONAI imports for networks, notebooks and metrics of its own that no bundle has.
_OF_MONAI_ALONE: Final = ("transformers", "matplotlib", "sklearn", "nibabel", "ignite")


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


def record_audit(config: Config) -> None:
    """Begin to write this process's audit messages."""
    if config.audit.enabled:
        audit.begin(config.trail, ae_title=config.receive.ae_title, limit_bytes=config.audit.limit_mb * 2**20)


def say_unloadable(codecs: Mapping[str, str]) -> None:
    """Say which transfer syntaxes no decoder was loaded for, with the decoders' versions given."""
    from worker.imaging.codecs import unloadable

    for sentence in unloadable(codecs):
        events.emit("codec.missing", reason=sentence)


# --- run


def run(config: Config, store: Store, stop: threading.Event) -> None:
    """Lease and process until told to stop; what is in hand is finished first."""
    from worker.fhir_feed import Puller
    from worker.imaging.decoding import DecoderPool

    with _without(*_OF_MONAI_ALONE):
        from worker.infer import Model
    from worker.pipeline import Line, process

    settings = config.run
    loaded = [Model(folder, device=settings.device, threads=settings.threads) for folder in settings.bundles]
    with DecoderPool(
        processes=settings.decoders, memory_bytes=settings.decoder_memory_mb * 2**20, timeout_s=settings.decoder_timeout_s
    ) as pool:
        say_unloadable(pool.warm())
        line = Line(
            store=store,
            models={model.name: model for model in loaded},
            decoders=pool,
            destinations={peer.name: peer.wanted for peer in config.destinations},
            zone=config.zone,
            clock=clock,
            instances=config.spool / "instances",
            must_agree=config.records.must_agree,
            pull=Puller(config, store) if config.fhir.url else None,
        )

        def do(jobs: list[Job]) -> None:
            # The heartbeat would renew the lease of what hangs for ever. This needs no interpreter lock; it prints places, no values.
            faulthandler.dump_traceback_later(settings.study_limit_s * len(jobs), exit=True)
            try:
                cases = process(line, jobs)
            finally:
                faulthandler.cancel_dump_traceback_later()
            if lost := next((case.error for case in cases if isinstance(case.error, DeviceLost)), None):
                raise lost

        started("run", bundles={model.name: model.digest[:12] for model in loaded})
        _work(
            store,
            stop,
            poll_s=settings.poll_s,
            lease_s=settings.lease_s,
            take=_take(store, config, sorted(line.models)),
            do=do,
        )


@contextlib.contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Import as if `packages` were not installed.

    A bundle with a BERT-type encoder imports transformers afterwards (models/text.py).
    """
    absent = [one for one in packages if one not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # documented: None makes its import fail
    try:
        yield
    finally:
        for one in absent:
            del sys.modules[one]


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
                with heartbeat(store, jobs, lease_s=lease_s, stop=stop):
                    do(jobs)
                continue
        except DatabaseUnavailable as exc:
            events.emit("sweep.failed", sweep="lease", reason=str(exc))
            stop.wait(1.0)
        stop.wait(poll_s)


@contextlib.contextmanager
def heartbeat(store: Store, jobs: Sequence[Job], *, lease_s: float, stop: threading.Event) -> Iterator[None]:
    """Renew the leases of `jobs` at each third of their time while the block runs; where that fails for good, `stop` the process."""
    done = threading.Event()

    def beat() -> None:
        try:
            while not done.wait(lease_s / 3):
                # If the database is away the leases run out, and the verdicts are fenced: nothing to do here.
                with contextlib.suppress(DatabaseUnavailable), store.begin() as conn:
                    queue.renew(conn, jobs, lease_s=lease_s, now=clock())
        except BaseException as exc:  # noqa: BLE001  a thread that ends has no other way to say so
            events.emit("heartbeat.died", jobs=[job.id for job in jobs], reason=type(exc).__name__, places=places(exc))
            stop.set()

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
    peer = peer_of(destination, own_ae_title=config.receive.ae_title, systems=systems_of(config))
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
