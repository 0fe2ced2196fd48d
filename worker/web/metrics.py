"""`/metrics` for Prometheus, `/live` and `/ready` for whoever restarts and routes. No patient, no UID, no name of a person.

::

    scrape ─▶ gauges: few rows by their index ─────────────────────┐
              counters: what ended since the last scrape ──────────┼─▶ text
              ledger: counted beside, and seldom; the last one ────┘

Bounded: a scrape never waits for the ledger, reads rows that are open or new, and is answered from the last one within `FRESH_S`.
Counters begin when this process does, as Prometheus expects; what ends while it is down is not in them.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from worker import __version__, tls
from worker.config import Config, ConfigError
from worker.ops import forwarding
from worker.record_feeds import clock
from worker.store import measures
from worker.store.database import DatabaseUnavailable, Store
from worker.web.site import address_of, site_of

router = APIRouter()

#: Two scrapes within this get the same answer.
FRESH_S: Final = 5.0
#: A verdict is dated before its transaction ends: so long is waited for it to be seen.
_SETTLED: Final = timedelta(seconds=15)
#: The ledger's share of the time, at most, and how often at most.
_LEDGER_SHARE, _LEDGER_S = 20, 60.0
#: A supervisor that wrote nothing for so long is gone.
ALIVE_S: Final = 15.0
_SECONDS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)
_LAG_SECONDS: Final = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400)


class Numbers(Collector):
    """What a scrape is told; safe for threads."""

    def __init__(self, config: Config, store: Store) -> None:
        self._config, self._store = config, store
        self._lock = threading.Lock()
        self._text, self._made_at = b"", -FRESH_S
        self._ledger: dict[str, int] = {}
        self._ledger_next, self._ledger_at = 0.0, 0.0
        self._seen: datetime | None = None
        self._last_instance = -1
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._instances = Counter("synoptic_instances_received", "Images stored since the page's process began.", registry=self.registry)
        self._bytes = Counter("synoptic_received_bytes", "Bytes of these images.", registry=self.registry)
        labels = ("kind", "state", "bundle", "destination")
        self._finished = Counter(
            "synoptic_jobs_finished", "Jobs that ended since the page's process began.", labels, registry=self.registry
        )
        self._took = Histogram(
            "synoptic_job_seconds", "From a job's first start to its completion.", labels[:1], buckets=_SECONDS, registry=self.registry
        )
        self._lag = Histogram(
            "synoptic_report_lag_seconds",
            "From a study's last image to its report's delivery.",
            labels[3:],
            buckets=_LAG_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Everything, as Prometheus reads it (DatabaseUnavailable)."""
        with self._lock:
            if time.monotonic() - self._made_at >= FRESH_S:
                self._count()
                self._text, self._made_at = generate_latest(self.registry), time.monotonic()
            return self._text

    def troubles(self) -> list[str]:
        """Why this installation is not ready, in sentences; none where it is."""
        found = []
        try:
            self._store.check()
        except DatabaseUnavailable as exc:
            found.append(str(exc))
        if free_bytes(self._config) < self._config.receive.low_water_mb * 2**20:
            found.append("The spool has less free space than [receive] low_water_mb: C-STORE is answered 0xA700.")
        found += [f"No process of role {role} runs." for role, count in sorted(alive(self._config).items()) if not count]
        return found

    def _count(self) -> None:
        """Add what ended since the last time."""
        until = clock() - _SETTLED
        with self._store.read() as conn:
            if self._last_instance < 0:
                self._last_instance = measures.last_instance(conn)
            count, size, self._last_instance = measures.instances_after(conn, self._last_instance)
            # A clock that was put back: what ends from now on is new.
            rows = measures.finished(conn, min(self._seen, until), until) if self._seen else []
        self._seen = until
        self._instances.inc(count)
        self._bytes.inc(size)
        for row in rows:
            self._finished.labels(row.kind, row.state, row.bundle, row.destination).inc()
            if row.state == "completed" and row.started_at is not None:
                self._took.labels(row.kind).observe(max(0.0, (row.finished_at - row.started_at).total_seconds()))
            if row.state == "completed" and row.document == "sr" and row.input_version == row.version:
                self._lag.labels(row.destination).observe(max(0.0, (row.finished_at - row.last_received_at).total_seconds()))

    def collect(self) -> Iterator[Metric]:
        """The gauges."""
        now = clock()
        with self._store.read() as conn:
            jobs, standing = measures.open_jobs(conn), measures.standing(conn)
            promises, oldest = measures.commitments(conn), measures.open_studies(conn)
        labels = ("kind", "state", "bundle", "destination")
        yield _gauge(
            "jobs",
            "Jobs that wait, are in hand, or were given up.",
            labels,
            {(row.kind, row.state, row.bundle, row.destination): row.jobs for row in jobs},
        )
        waits: dict[tuple[str, ...], float] = {("infer",): 0.0, ("deliver",): 0.0}
        for row in jobs:
            if row.state == "available":
                waits[row.kind,] = max(waits[row.kind,], (now - row.due_at).total_seconds())
        yield _gauge("oldest_due_job_seconds", "How long the longest waiting due job has been due.", ("kind",), waits)
        yield _gauge("studies_receiving", "Studies that are being received.", (), {(): standing["receiving"]})
        yield _gauge("studies_held", "Studies that a person must decide about.", (), {(): standing["held"]})
        since = (now - oldest).total_seconds() if oldest else 0.0
        yield _gauge(
            "receiving_silent_seconds", "Since the last image of the study that has waited longest to be complete.", (), {(): since}
        )
        yield _gauge("commitments_waiting", "Reports that an archive was asked to keep and has not answered.", (), {(): promises})
        self._look_at_ledger()
        if self._ledger:
            told = {(account,): count for account, count in self._ledger.items()}
            yield _gauge("studies", "All studies by the ledger's account; lost must be 0.", ("account",), told)
            yield _gauge("ledger_age_seconds", "When the ledger was last counted.", (), {(): time.monotonic() - self._ledger_at})
        yield from self._host()

    def _host(self) -> Iterator[Metric]:
        """What is not in the database."""
        config = self._config
        free = free_bytes(config)
        yield _gauge("spool_free_bytes", "Free on the spool's file system.", (), {(): free})
        yield _gauge("spool_low_water_bytes", "Below this C-STORE is answered 0xA700.", (), {(): config.receive.low_water_mb * 2**20})
        trail = forwarding.state(config.trail)
        yield _gauge("audit_kept_bytes", "The audit trail.", (), {(): trail["kept_bytes"]})
        yield _gauge("audit_unsent_bytes", "Of it what the repository has not got yet.", (), {(): trail["waiting_bytes"]})
        yield _gauge("audit_dropped_messages", "Of it what went before it was sent.", (), {(): trail["dropped"]})
        yield _gauge(
            "certificate_days", "Until a certificate of ours, or an authority's, ends.", ("certificate",), dict(_certificates(config))
        )
        yield _gauge("role_processes", "Processes of each role that run here.", ("role",), {(r,): n for r, n in alive(config).items()})
        yield _gauge("build_info", "The program.", ("version",), {(__version__,): 1})

    def _look_at_ledger(self) -> None:
        """Count it anew where it is time, beside: a scrape does not wait."""
        if time.monotonic() < self._ledger_next:
            return
        self._ledger_next = float("inf")
        threading.Thread(target=self._count_ledger, name="ledger", daemon=True).start()

    def _count_ledger(self) -> None:
        began = time.monotonic()
        try:
            with self._store.read() as conn:
                self._ledger = measures.accounts(conn)
            self._ledger_at = time.monotonic()
        except DatabaseUnavailable:
            self._ledger = {}  # an old count beside new numbers would say that all is well
        finally:
            took = time.monotonic() - began
            self._ledger_next = time.monotonic() + max(_LEDGER_S, _LEDGER_SHARE * took)


def _gauge(name: str, words: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"synoptic_{name}", words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _certificates(config: Config) -> Iterator[tuple[tuple[str, ...], float]]:
    for what, end_of in tls.ends(config, []):
        try:
            yield (what,), (end_of() - clock()) / timedelta(days=1)
        except ConfigError:
            yield (what,), float("nan")  # the file cannot be read: certificate.unusable says so


def free_bytes(config: Config) -> float:
    """Free bytes of the spool's file system; 0 where the folder is gone."""
    try:
        system = os.statvfs(config.spool)
    except OSError:
        return 0.0
    return float(system.f_bavail * system.f_frsize)


def alive(config: Config) -> dict[str, int]:
    """Role → its processes that run, by what the supervisors of this host say; one that fell silent has none."""
    found: dict[str, int] = {}
    for path in config.site.data.glob("roles.*.json"):
        try:
            said = json.loads(path.read_text("utf-8"))
            is_fresh = abs(time.time() - path.stat().st_mtime) < ALIVE_S
            for role, count in said.items():
                found[str(role)] = found.get(str(role), 0) + (int(count) if is_fresh else 0)
        except (OSError, ValueError, AttributeError):
            continue  # it is just being ended
    return found


# --- routes


def _is_monitor(request: Request) -> bool:
    try:
        address = ipaddress.ip_address(address_of(request))
    except ValueError:
        return False
    # A socket of both families names the older one so (RFC 4291 §2.5.5.2).
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in ipaddress.ip_network(one, strict=False) for one in site_of(request).web.monitors)


def _only_monitors(request: Request) -> None:
    if not _is_monitor(request):
        raise HTTPException(403, "Only addresses in [web] monitors may ask this.")


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """The numbers."""
    _only_monitors(request)
    numbers: Numbers = request.app.state.numbers
    return Response(numbers.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/live")
def live(request: Request) -> Response:
    """Whether this process answers."""
    _only_monitors(request)
    return PlainTextResponse("alive\n")


@router.get("/ready")
def ready(request: Request) -> Response:
    """Whether studies can be taken, analysed and delivered here: 200, or 503 and why not."""
    _only_monitors(request)
    numbers: Numbers = request.app.state.numbers
    reasons = numbers.troubles()
    return PlainTextResponse("\n".join(reasons or ["ready"]) + "\n", 503 if reasons else 200)
