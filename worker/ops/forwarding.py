"""Looks after the audit trail: onto the disk, away when it is old, and to an Audit Record Repository by syslog over TLS (PS3.15 §A.6).

::

    audit/*.log ──▶ fdatasync, each tick ──▶ RFC 5425: LENGTH SP line … ──▶ taken by the peer's system, and still connected a tick later
                                                                                └──▶ audit/forwarded.json: offset by file

The files are the buffer, so a repository may be away for as long as [audit] limit_mb lasts; then whole days go, the oldest first, and are
counted. Syslog has no acknowledgment: what was under way when a connection breaks is sent again, so that a message may come twice.
Several supervisors may share a folder: whoever holds its lock does this. Not here: who writes the files (trail.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from worker import events
from worker.errors import PeerUnreachable, cause_of

TICK_S: Final = 0.5
#: After a failure.
AGAIN_S: Final = 1.0
#: Sent in one tick, and then looked after.
_BATCH_BYTES: Final = 4 * 2**20
#: A peer that does not even take what was sent into its buffers is gone after so long.
_STALLED_S: Final = 30.0
_STATE: Final = "forwarded.json"


def state(folder: Path) -> dict[str, Any]:
    """What is kept and what waits, for `synoptic status`; ``trouble`` is why nothing is sent now, or ''."""
    kept = _read(folder / _STATE)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.log"))}
    waiting = sum(size - kept["offsets"].get(name, 0) for name, size in sizes.items()) if kept["is_forwarding"] else 0
    return {"kept_bytes": sum(sizes.values()), "waiting_bytes": waiting, "dropped": kept["dropped"], "trouble": kept["trouble"]}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"offsets": {}, "dropped": 0, "trouble": "", "is_forwarding": False}
    with suppress(OSError, ValueError):  # none yet, or not ours: everything is sent again
        found |= json.loads(path.read_text("utf-8"))
    return found


class Forwarder:
    """One thread's work: `start`, and in the end `stop`, which sends what is there if that goes at once.

    Emits ``audit.unsent`` (reason, waiting_bytes) when the repository is lost, ``audit.sent`` when it is back, ``audit.dropped``
    (messages, reason) when a day is removed before it was sent.

    Parameters
    ----------
    connect
        Opens the connection, TLS and all; raises PeerUnreachable. None: the files are all there is.
    keep_days
        Files of before go; 0: none. Those not sent yet stay.
    is_trusted
        Whether the clock is: while it is not, nothing goes for its age.
    """

    def __init__(
        self,
        folder: Path,
        *,
        connect: Callable[[], socket.socket] | None,
        limit_bytes: int,
        keep_days: int = 0,
        is_trusted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._folder, self._connect, self._limit_bytes, self._keep_days = folder, connect, limit_bytes, keep_days
        self._is_trusted = is_trusted
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._lock = -1
        self._kept = _read(folder / _STATE) | {"is_forwarding": connect is not None}
        self._synced: dict[str, int] = {}
        self._sock: socket.socket | None = None
        #: Offsets by file of what was sent on this connection; `_kept` is behind until that is known to have arrived.
        self._sent: dict[str, int] = {}
        self._sent_at = 0.0
        self._again_at = 0.0

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Send what is there, wait until it is taken for two ticks, and end."""
        self._is_over.set()
        self._thread.join(4 * _STALLED_S)

    def _run(self) -> None:
        while not self._is_over.wait(TICK_S):
            self._guarded()
        self._guarded()
        time.sleep(TICK_S if self._sock else 0.0)
        self._guarded()
        if self._sock:
            self._sock.close()
        if self._lock >= 0:
            os.close(self._lock)

    def _guarded(self) -> None:
        try:
            self.tick()
        except OSError as error:  # a full disk, a file that went: everything is looked at again
            self._trouble(f"The audit trail cannot be looked after: {error.strerror}.")

    def tick(self) -> None:
        """Do everything once."""
        if self._lock < 0 and not self._locked():
            return
        sizes = {path.name: path.stat().st_size for path in sorted(self._folder.glob("*.log"))}
        for name, size in sizes.items():
            if self._synced.get(name) != size:
                with (self._folder / name).open("rb") as file:
                    os.fdatasync(file.fileno())  # of whatever process's writes
                self._synced[name] = size
        self._forget(sizes)
        if self._connect is not None:
            self._forward(sizes)
        self._trim(sizes)

    def _locked(self) -> bool:
        lock = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    def _forget(self, sizes: dict[str, int]) -> None:
        """A file that was removed or cut short, and began again under its name, is sent from its beginning."""
        stale = {name for name, offset in self._kept["offsets"].items() if offset > sizes.get(name, -1)}
        stale |= {name for name, offset in self._sent.items() if offset > sizes.get(name, -1)}
        if stale:
            self._sent = {name: offset for name, offset in self._sent.items() if name not in stale}
            self._keep(offsets={name: offset for name, offset in self._kept["offsets"].items() if name not in stale})

    # --- to the repository

    def _forward(self, sizes: dict[str, int]) -> None:
        is_all_sent = all(self._kept["offsets"].get(name, 0) >= size for name, size in sizes.items())
        if time.monotonic() < self._again_at or (self._sock is None and is_all_sent):
            return
        try:
            if self._sock is None:
                assert self._connect is not None  # noqa: S101  asked by the caller
                self._sock, self._sent = self._connect(), dict(self._kept["offsets"])
                self._sent_at = time.monotonic()  # the end of the handshake is under way
            if self._has_arrived(self._sock):
                if self._kept["trouble"]:
                    events.emit("audit.sent")
                if self._kept["trouble"] or self._sent != self._kept["offsets"]:
                    self._keep(offsets={name: offset for name, offset in self._sent.items() if name in sizes}, trouble="")
                self._send(self._sock, sizes)
        except PeerUnreachable as error:
            self._trouble(str(error))
        except OSError as error:
            self._trouble(f"The audit repository broke the connection: {cause_of(error)}.")

    def _has_arrived(self, sock: socket.socket) -> bool:
        """Whether the peer's system has everything sent so far, and is still there."""
        sock.settimeout(0)
        try:
            if not sock.recv(4096):  # it has nothing to say; TLS's own messages are taken in here
                raise ConnectionResetError("closed there")
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        (waiting,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        if waiting and time.monotonic() - self._sent_at > _STALLED_S:
            raise TimeoutError("nothing was taken")
        return not waiting

    def _send(self, sock: socket.socket, sizes: dict[str, int]) -> None:
        room = _BATCH_BYTES
        for name, size in sizes.items():
            offset = self._sent.get(name, 0)
            if offset >= size or room <= 0:
                continue
            with (self._folder / name).open("rb") as file:
                file.seek(offset)
                data = file.read(min(room, size - offset))
            # Half a line of a full disk, or the zeros of a power cut, is no message; today's last line may be one that is being written,
            # and any other one that the batch has no room for.
            is_no_line = len(data) == _BATCH_BYTES or (name != max(sizes) and offset + len(data) == size)
            data = data[: data.rfind(b"\n") + 1] or (data if is_no_line else b"")
            lines = [line for line in data.split(b"\n") if line.startswith(b"<") and line.endswith(b"</AuditMessage>")]
            sock.settimeout(_STALLED_S)
            self._sent_at = time.monotonic()
            sock.sendall(b"".join(b"%d %s" % (len(line), line) for line in lines))  # RFC 5425 §4.3
            self._sent[name], room = offset + len(data), room - len(data)

    def _trouble(self, reason: str) -> None:
        """Begin again from what is known to have arrived, after a while; said once."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._again_at = time.monotonic() + AGAIN_S
        if not self._kept["trouble"]:
            events.emit("audit.unsent", reason=reason)
        with suppress(OSError):
            self._keep(trouble=reason)

    def _keep(self, **facts: object) -> None:
        self._kept |= facts
        part = self._folder / f"{_STATE}.part"
        part.write_text(json.dumps(self._kept), "utf-8")
        part.replace(self._folder / _STATE)

    # --- within its bounds

    def _trim(self, sizes: dict[str, int]) -> None:
        total, *rest = sum(sizes.values()), *list(sizes)[:-1]
        oldest = f"{datetime.now(UTC) - timedelta(days=self._keep_days):%Y-%m-%d}.log" if self._keep_days and self._is_trusted() else ""
        for name in rest:
            unsent = sizes[name] - self._kept["offsets"].get(name, 0) if self._connect else 0
            if total <= self._limit_bytes and (name >= oldest or unsent):
                continue
            path = self._folder / name
            lost = path.read_bytes()[-unsent:].count(b"\n") if unsent else 0
            path.unlink()
            total -= sizes[name]
            offsets = {known: offset for known, offset in self._kept["offsets"].items() if known != name}
            self._keep(offsets=offsets, dropped=self._kept["dropped"] + lost)
            if lost or total > self._limit_bytes:
                events.emit("audit.dropped", messages=lost, reason="The audit trail has more bytes than [audit] limit_mb allows.")
