"""The supervisor: starts the roles' processes, restarts what dies, stops them in order.

::

    synoptic all ── this process ──┬── sweeps (APScheduler) and the HL7 listener, in threads
                                   ├── receive × n   one listening socket, shared; no torch
                                   ├── run × n       the only processes with torch
                                   ├── deliver       one thread a destination
                                   └── serve         the page, where [web] is enabled; no torch

A child that dies is started again after a growing pause. On SIGTERM the children finish what they hold
within the grace time, then all exit 0. All state is rows and files: a `kill -9` of everything loses nothing.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from worker import events, host, reception, record_feeds, roles, sweeps, tls
from worker.config import Config, ConfigError
from worker.ops import audit, forwarding
from worker.peers import repository_of
from worker.store.database import DatabaseUnavailable, Store
from worker.store.spool import Spool

#: A child that dies is started again after this long, doubling up to the cap while it keeps dying.
RESTART_S: Final = 0.5
RESTART_CAP_S: Final = 30.0
#: Seconds that children have to finish after SIGTERM; systemd's TimeoutStopSec is longer.
GRACE_S: Final = 20.0
#: Looking after the children this often.
WATCH_S: Final = 0.2
#: How often it is written down who runs.
TELL_S: Final = 3.0
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


@dataclass(slots=True)
class Child:
    """One supervised process and how often it died."""

    role: str
    command: list[str]
    descriptors: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    pause_s: float = RESTART_S
    start_after: float = 0.0


@dataclass(slots=True)
class Supervisor:
    """Keeps a set of children alive until told to stop."""

    children: list[Child] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    #: Where the page reads how many processes of each role run; None: nowhere.
    told: Path | None = None
    _told_at: float = -TELL_S

    def watch(self) -> None:
        """Start children and start them again until `stop` is set; then end them."""
        while not self.stop.is_set():
            for child in self.children:
                self._look_after(child)
            self._tell(time.monotonic())
            self.stop.wait(WATCH_S)
        if self.told is not None:
            self.told.unlink(missing_ok=True)
        self._end()

    def _tell(self, now: float) -> None:
        if self.told is None or now - self._told_at < TELL_S:
            return
        self._told_at = now
        roles = {child.role: 0 for child in self.children}
        for child in self.children:
            roles[child.role] += child.process is not None and child.process.poll() is None
        with suppress(OSError):  # a full disk stops nobody; what is not written is not alive
            self.told.with_suffix(".new").write_text(json.dumps(roles), "utf-8")
            self.told.with_suffix(".new").replace(self.told)

    def _look_after(self, child: Child) -> None:
        now = time.monotonic()
        if child.process is not None:
            code = child.process.poll()
            if code is None:
                return
            self._wait(child, code, now=now)
        if now >= child.start_after:
            child.started_at = now
            try:
                child.process = subprocess.Popen(child.command, pass_fds=child.descriptors)  # noqa: S603  our own interpreter and module
            except OSError as exc:  # no memory, no process left: the other roles go on
                self._wait(child, exc.errno, now=now)

    def _wait(self, child: Child, code: int | None, *, now: float) -> None:
        child.pause_s = RESTART_S if now - child.started_at > RESTART_CAP_S else min(RESTART_CAP_S, child.pause_s * 2)
        child.start_after = now + child.pause_s
        events.emit("role.restarted", role=child.role, code=code, pause_s=child.pause_s, pid=child.process.pid if child.process else None)
        child.process = None

    def _end(self) -> None:
        alive = [child.process for child in self.children if child.process is not None and child.process.poll() is None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command(role: str, config_file: Path | None, *, descriptor: int | None = None, is_check: bool = False) -> list[str]:
    """The command line of one child."""
    line = [sys.executable, "-m", "worker", "role", role, "--parent", str(os.getpid())]
    if config_file is not None:
        line += ["--config", str(config_file)]
    if descriptor is not None:
        line += ["--descriptor", str(descriptor)]
    if is_check:
        line.append("--check")
    return line


def on_signal(stop: threading.Event) -> None:
    """SIGTERM, SIGINT and SIGHUP set `stop`: a closed terminal is an orderly end, too.

    No handler sets it: one runs in the midst of whatever the main thread does, and where that is at the Event's own lock, which it takes
    each time its `wait` runs out, `set` would wait for ever for what it interrupted. So the interpreter writes a byte, whichever thread the
    kernel chose, and a thread that holds nothing reads it.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def listen() -> None:
        while os.read(heard, 1):
            stop.set()

    threading.Thread(target=listen, name="signals", daemon=True).start()
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: None)


def open_store(config: Config, *, migrate: bool = False) -> Store:
    """The database, checked; the embedded one is made at the very first start, and with `migrate` an older one is brought up to date.

    Raises
    ------
    DatabaseUnavailable
        It is away, of another version, or gone while the spool still holds studies: a new and
        empty one would lose sight of them.
    """
    store = Store(config.database_url)
    database = config.site.data / "synoptic.db"
    is_new = not config.site.database and not (database.exists() and database.stat().st_size)
    if is_new and any((config.spool / "instances").glob("*/*.dcm")):
        raise DatabaseUnavailable(
            f"{database} is not there but the spool holds studies: restore it from its backup (deploy/README.md); "
            "or the database is another, and [site] database, or SYNOPTIC_SITE__DATABASE, is not said here."
        )
    if is_new:
        try:
            config.site.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"[site] data: the folder {config.site.data} cannot be made: {exc.strerror}.") from exc
    if is_new or migrate:
        store.migrate()
    store.check()
    return store


def supervise(config: Config, config_file: Path | None, *, wanted: Sequence[str]) -> None:
    """Run the wanted roles until SIGTERM. `receive` brings the sweeps and the HL7 listener; `serve` runs alone, or where it is enabled."""
    wanted = [one for one in wanted if one != "serve" or config.web.enabled or len(wanted) == 1]
    supervisor = Supervisor()
    on_signal(supervisor.stop)
    if refused := host.changeable(config, config_file):
        raise ConfigError(" ".join(refused))
    for reason in host.exposed(config, config_file):
        events.emit("host.exposed", reason=reason)
    tls.check(config, wanted=wanted)
    roles.read_bundles(config)  # a bad bundle is a sentence now, not a child that dies again and again
    store = open_store(config)
    supervisor.told = config.site.data / f"roles.{'-'.join(wanted)}.json"
    watched = sweeps.Clock()
    closers = _audited(config, watched)
    if "receive" in wanted:
        closers += _front(config, config_file, store, supervisor, watched)
    if "run" in wanted and not config.run.bundles and wanted == ["run"]:
        raise ConfigError("[run] bundles is empty: there is nothing to run.")
    if "run" in wanted and config.run.bundles:
        supervisor.children += [Child("run", command("run", config_file)) for _ in range(config.run.processes)]
    if "deliver" in wanted:
        supervisor.children.append(Child("deliver", command("deliver", config_file)))
    closers += _page(config, config_file, supervisor, is_alone=len(wanted) == 1) if "serve" in wanted else []
    roles.started("supervisor", roles=wanted)
    try:
        supervisor.watch()
    finally:
        events.emit("role.stopped", role="supervisor")
        for close in reversed(closers):
            close()
        store.close()


def _audited(config: Config, watched: sweeps.Clock) -> list[Callable[[], object]]:
    roles.record_audit(config)
    if not config.audit.enabled:
        return []
    forwarder = forwarding.Forwarder(
        config.trail,
        connect=repository_of(config),
        limit_bytes=config.audit.limit_mb * 2**20,
        keep_days=config.audit.keep_days,
        is_trusted=lambda: watched.is_trusted,
    )
    forwarder.start()
    return [forwarder.stop, audit.end]  # in reverse: what is only counted so far is sent, too


def _front(
    config: Config, config_file: Path | None, store: Store, supervisor: Supervisor, watched: sweeps.Clock
) -> list[Callable[[], object]]:
    spool = Spool(config.spool, low_water_bytes=config.receive.low_water_mb * 2**20)
    port = listener("receive", config.receive.host, config.receive.port)
    closers: list[Callable[[], object]] = [port.close]
    supervisor.children += [
        Child("receive", command("receive", config_file, descriptor=port.fileno()), (port.fileno(),))
        for _ in range(config.receive.processes)
    ]
    if config.records.enabled:
        server = record_feeds.records_listener(config, store)
        with _bound("records", config.records.host, config.records.port):
            server.start()
        closers.append(server.stop)
    scheduler = sweeps.scheduler(config, store, spool, watched)
    scheduler.start()
    closers.append(scheduler.stop)
    return closers


def _page(config: Config, config_file: Path | None, supervisor: Supervisor, *, is_alone: bool) -> list[Callable[[], object]]:
    try:
        port = listener("web", config.web.host, config.web.port)
    except (OSError, ConfigError):
        if is_alone:
            raise
        # Images are taken even so; the child tries again and again for itself, and its end is told each time.
        supervisor.children.append(Child("serve", command("serve", config_file)))
        return []
    supervisor.children.append(Child("serve", command("serve", config_file, descriptor=port.fileno()), (port.fileno(),)))
    return [port.close]


def listener(section: str, host: str, port: int) -> socket.socket:
    """Listen for children; an OSError or ConfigError says which key is at fault, and what would be right."""
    from worker.intake.scp import listen

    with _bound(section, host, port):
        made = listen((host, port))
    made.set_inheritable(True)
    return made


@contextmanager
def _bound(section: str, host: str, port: int) -> Iterator[None]:
    """Say which key is at fault, and what would be right, where an address cannot be listened on."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise OSError(
                exc.errno, os.strerror(errno.EADDRINUSE), f"{host}:{port}, [{section}] port. Is synoptic running already?"
            ) from exc
        if exc.errno == errno.EACCES:
            raise ConfigError(f"[{section}] port: {port} is for root alone on this host; take one from 1024 up.") from exc
        if exc.errno == errno.EADDRNOTAVAIL or isinstance(exc, socket.gaierror):
            raise ConfigError(f"[{section}] host: {host} is no address of this host; 0.0.0.0 is all of them.") from exc
        raise


def role(name: str, config: Config, *, descriptor: int | None, parent: int, is_check: bool) -> None:
    """One child's life: build the role, serve until SIGTERM or until the supervisor is gone, exit 0.

    With `is_check` it stops as soon as it is ready: `synoptic doctor` reads its first line.
    """
    stop = threading.Event()
    if is_check:
        stop.set()
    on_signal(stop)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return  # the supervisor was gone before prctl could tell us
    store = Store(config.database_url)
    store.check()
    if not is_check:
        roles.record_audit(config)
    try:
        if name == "receive":
            assert descriptor is not None  # noqa: S101  our own command line
            reception.receive(config, store, socket.socket(fileno=descriptor), stop)
        elif name == "serve":
            from worker.web import serve

            web = config.web
            serve(config, store, listener("web", web.host, web.port) if descriptor is None else socket.socket(fileno=descriptor), stop)
        elif name == "run":
            roles.run(config, store, stop)
        else:
            roles.deliver(config, store, stop)
    finally:
        events.emit("role.stopped", role=name)
        audit.end()
        store.close()
