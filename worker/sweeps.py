"""Everything periodic, by APScheduler: each sweep is idempotent and never runs twice at once.

Completeness, the senders' own counts, the rescue of jobs whose worker died, retention, and a clean-up of the spool,
the first at the start. The scheduler holds no state of ours: what must survive a restart is a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from worker import consistency, events, reissue, tables_feed, tls
from worker.config import Config, ConfigError, Table
from worker.errors import WorkerError
from worker.ops.log import places
from worker.peers import count_of, peer_to_report, peers_of
from worker.record_feeds import clock
from worker.roles import read_bundles
from worker.selection import takes_captures
from worker.silence import Silence
from worker.store import ahead, erasure, feeds, queue, retention
from worker.store.database import Store
from worker.store.spool import Spool

if TYPE_CHECKING:
    from models.bundle import Bundle
    from worker.periodic import Periodic
    from worker.store.studies import Pending

#: What a crash left is gone within the hour.
SPOOL_SWEEP_S: Final = 1800.0
#: A corrected value waits this long for the report that uses it; several that come together make one.
RENEW_S: Final = 5.0
EXPIRE_S: Final = 3600.0
RETAIN_S: Final = 600.0
PROMISE_S: Final = 1.0
LISTEN_S: Final = 60.0
CERTIFICATES_S: Final = 86400.0
VERIFY_S: Final = 60.0
#: Kinds of sweeps, but for the tables', at most.
MAX_SWEEPS: Final = 16
CLOCK_S: Final = 1.0
#: A clock that is put right by less is slewed, or a leap second.
JUMP: Final = timedelta(minutes=1)
#: For so long after a jump nothing is removed for its age: somebody may put the clock right.
DOUBT_S: Final = 86400.0


def _steady() -> float:
    """Seconds of a clock that nobody sets, and that counts while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Clock:
    """Knows when the wall clock was set, by comparing it with one that only goes forward."""

    def __init__(self, wall: Callable[[], datetime] = clock, steady: Callable[[], float] = _steady) -> None:
        self._wall, self._steady = wall, steady
        self._began = self._origin()
        self._doubted_until = 0.0

    def _origin(self) -> datetime:
        return self._wall() - timedelta(seconds=self._steady())

    @property
    def is_trusted(self) -> bool:
        """Whether ages are what they seem: no jump for a day."""
        return abs(self._origin() - self._began) < JUMP and self._steady() >= self._doubted_until

    def look(self, store: Store, *, lease_s: float) -> bool:
        """Say that the clock jumped, and return whether it did; if back, put back with it what waits."""
        began = self._origin()
        jump = began - self._began
        if has_jumped := abs(jump) >= JUMP:
            if jump < timedelta():
                with store.begin() as conn:
                    ahead.put_back(conn, -jump, lease_s=lease_s, now=self._wall())
            self._doubted_until = self._steady() + DOUBT_S
            events.emit("clock.jumped", seconds=round(jump.total_seconds()))
        self._began = began
        return has_jumped


def scheduler(config: Config, store: Store, spool: Spool, watched: Clock) -> Periodic:
    """Everything periodic, each run idempotent, never two of a kind at once; not started yet. It looks at `watched`."""
    from worker.intake import assembly
    from worker.periodic import Periodic

    bundles = read_bundles(config)
    wants = [
        assembly.Wants(
            bundle.name,
            # One image of any modality makes the study's any, and that is what an empty set says.
            frozenset(modality for image in bundle.images for modality in image.modalities)
            if all(image.modalities for image in bundle.images)
            else frozenset(),
            sum(image.min_instances for image in bundle.images if image.required),
            any(takes_captures(image) for image in bundle.images),
        )
        for bundle in bundles
    ]
    limit_s = config.assembly.incomplete_limit_s

    def complete() -> None:
        assembly.sweep(store, wants=wants, limit_s=limit_s, now=clock())

    def rescue() -> None:
        with store.begin() as conn:
            rescued = queue.rescue(conn, now=clock())
        for job in rescued:
            events.emit("job.rescued", job=job)

    def watch() -> None:
        if watched.look(store, lease_s=max(config.run.lease_s, config.deliver.lease_s)):
            made.begin_anew()

    # A thread for each: a view of a warehouse may take ten minutes, and studies must be completed beside any number of them.
    made = Periodic(_spared(watch), every_s=CLOCK_S, threads=MAX_SWEEPS + len(config.tables))
    made.add(_spared(complete), every_s=config.assembly.sweep_s)
    for sweep, seconds in _of_records(config, store, bundles, watched) + _of_senders(config, store):
        made.add(_spared(sweep), every_s=seconds)
    made.add(_spared(rescue), every_s=max(1.0, config.run.lease_s / 6))
    # At once but in the background: with 100 000 files, or peers that are away, it must not delay the first association.
    made.add(_spared(lambda: _clean(store, spool, watched), name="clean"), every_s=SPOOL_SWEEP_S, is_first_at_once=True)
    made.add(_spared(lambda: _retain(config, store, spool, watched), name="remove"), every_s=RETAIN_S)
    if config.receive.verify_mb_per_h > 0:
        made.add(_spared(verifier(store, spool, mb_per_h=config.receive.verify_mb_per_h)), every_s=VERIFY_S)
    made.add(_spared(_certificates(config)), every_s=CERTIFICATES_S, is_first_at_once=True)
    return made


def _of_records(config: Config, store: Store, bundles: Sequence[Bundle], watched: Clock) -> list[tuple[Callable[[], None], float]]:
    """What is periodic about the patients' records, and every how many seconds."""
    settings = config.records

    def renew() -> None:
        specs = {bundle.name: bundle for bundle in bundles}
        within = timedelta(hours=settings.reissue_within_h)
        reissue.sweep(store, specs, within=within, is_wanted=settings.reissue, must_agree=settings.must_agree, now=clock())

    def expire() -> None:
        if not watched.is_trusted:
            return
        gone = erasure.expire(
            store,
            now=clock(),
            keep_raw_days=settings.keep_raw_days,
            keep_values_days=settings.keep_values_days,
            keep_texts_days=settings.keep_texts_days,
        )
        if any(gone.values()):
            events.emit("record.expired", **gone)

    silence = Silence(after_s=settings.silent_after_s)

    def listen() -> None:
        with store.read() as conn:
            heard = feeds.feeds(conn, counted=False)
        silence.look(heard, now=clock())

    def reader(table: Table) -> Callable[[], None]:
        def read() -> None:
            tables_feed.read_view(table, config=config, store=store)

        return read

    views = [(reader(table), table.every_s) for table in config.tables if table.every_s > 0]
    alarms = [(listen, min(LISTEN_S, settings.silent_after_s / 2))] if settings.silent_after_s > 0 else []
    return [(renew, RENEW_S), (expire, EXPIRE_S), *alarms, *views]


def _of_senders(config: Config, store: Store) -> list[tuple[Callable[[], None], float]]:
    """What senders are asked and told, and every how many seconds."""
    from worker.deliver import commitment
    from worker.intake import assembly

    def ask() -> None:
        assembly.ask_senders(store, ask=lambda one: _expected(config, one), after_s=config.assembly.ask_sender_after_s, now=clock())

    def promise() -> None:
        commitment.report_all(store=store, instances=config.spool / "instances", peer_of=partial(peer_to_report, config), clock=clock)

    asks = [(ask, config.assembly.sweep_s)] if any(sender.query_port for sender in config.senders) else []
    return asks + ([(promise, PROMISE_S)] if any(sender.commitment_port for sender in config.senders) else [])


def _certificates(config: Config) -> Callable[[], None]:
    def certificates() -> None:
        try:
            tls.warn(config, peers_of(config), now=clock())
        except ConfigError as exc:
            events.emit("certificate.unusable", section="destinations, senders", reason=str(exc))

    return certificates


def verifier(store: Store, spool: Spool, *, mb_per_h: float) -> Callable[[], None]:
    """Read stored files again, so many an hour, and tell of each that is not as it came."""
    share = mb_per_h * 2**20 * VERIFY_S / 3600
    left = 0.0

    def verify() -> None:
        nonlocal left
        left += share
        if left <= 0:  # an object of a gigabyte takes the time of several turns
            return
        size_bytes, faults = consistency.verify(store, spool, budget_bytes=left)
        left = min(left - size_bytes, 0.0)
        for one, fault in faults:
            events.emit("file.damaged", study=one.study_id, file=one.path, reason=f"A stored file is {fault}.")

    return verify


def _retain(config: Config, store: Store, spool: Spool, watched: Clock) -> None:
    if not watched.is_trusted:
        return
    kept = config.retention
    days = {"delivered": kept.delivered_days, "excluded": kept.excluded_days, "failed": kept.failed_days}
    committing = [one.name for one in config.destinations if one.commitment]
    retain(store, spool, days=days, quarantine_days=kept.quarantine_days, committing=committing, now=clock())


def _spared(sweep: Callable[[], None], *, name: str = "") -> Callable[[], None]:
    """A sweep that fails says so and comes again; the scheduler would keep it to itself."""

    def run() -> None:
        try:
            sweep()
        except WorkerError as exc:
            events.emit("sweep.failed", sweep=name or sweep.__name__, reason=str(exc))
        except Exception as exc:  # noqa: BLE001  a bug of ours must be seen, and must not end the sweeps
            events.emit("sweep.failed", sweep=name or sweep.__name__, reason=type(exc).__name__, places=places(exc))

    return run


def _expected(config: Config, one: Pending) -> int | None:
    try:
        return count_of(config, one)
    except WorkerError as exc:
        events.emit("sweep.failed", sweep="ask_sender", reason=str(exc))
        return None


def _clean(store: Store, spool: Spool, watched: Clock) -> None:
    # Put ahead, the clock makes a file old whose row is being written this moment: in quarantine, it would be acknowledged and missing.
    if watched.is_trusted:
        sweep_spool(store, spool)


def sweep_spool(store: Store, spool: Spool) -> None:
    """Remove what a crash left half-written or half-removed: parts, and files whose sender was never told Success."""
    consistency.sweep(store, spool, now=clock())


def retain(
    store: Store, spool: Spool, *, days: Mapping[str, int], quarantine_days: int, committing: Collection[str] = (), now: datetime
) -> None:
    """Remove the files that [retention] gives up: `days` by account (store/ledger.py), 0: never. At most `retention.LIMIT` studies.

    `committing` are the destinations that are asked to commit: what they were asked and did not promise keeps its study.
    """
    before = {account: now - timedelta(days=some) for account, some in days.items() if some > 0}
    gone = {"studies": 0, "files": 0, "size_bytes": 0}
    for part in retention.due(store, before, committing=committing):
        # The rows first: what a kill leaves is a file too many, which the sweep of the spool finds, never a row too many.
        paths, marked = retention.mark(store, part, before, committing=committing, now=now)
        files, size_bytes = spool.remove(paths, written_before=now - consistency.ORPHAN_AGE)
        gone = {"studies": gone["studies"] + marked, "files": gone["files"] + files, "size_bytes": gone["size_bytes"] + size_bytes}
    if quarantine_days > 0:
        files, size_bytes = spool.empty_quarantine(put_before=now - timedelta(days=quarantine_days))
        gone = {**gone, "files": gone["files"] + files, "size_bytes": gone["size_bytes"] + size_bytes, "quarantined": files}
    if gone["files"] or gone["studies"]:
        events.emit("images.removed", **gone)
