"""The audit trail on disk: a file a day of whole syslog lines, appended by every process at once.

::

    audit/2026-11-29.log   <85>1 … <AuditMessage>…</AuditMessage>   one line, one write(2) with O_APPEND

The trail never stops the work: what cannot be written is counted, and the log and later the trail say how many.
Not here: what a line says (audit.py), how long files stay, that they reach the disk and a repository (forwarding.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from worker import events

#: A trail that cannot be written is spoken of once in so long.
ALARM_S: Final = 60.0
#: Rejections are counted together for so long; of so many callers the first is written at once, the others only counted.
WINDOW_S: Final = 60.0
CALLERS: Final = 8
OTHERS: Final = ("", "", "rejected too, from other addresses or under other AE titles")


class Trail:
    """Appends lines; safe for threads, and beside other processes.

    Parameters
    ----------
    limit_bytes
        A day's file grows no further: the disk is for images.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self._limit_bytes = folder, limit_bytes
        self._lock = threading.Lock()
        self._file, self._path = -1, folder
        self._lost, self._alarmed_at = 0, -ALARM_S

    def append(self, line: bytes) -> int:
        """Write one line, without its line feed; returns how many before it could not be written, or 0 where it could not either.

        Emits ``audit.failed`` (lost, reason), once a minute.
        """
        with self._lock:
            try:
                self._append(line + b"\n")
            except OSError as error:
                self._lost += 1
                if (now := time.monotonic()) - self._alarmed_at >= ALARM_S:
                    self._alarmed_at = now
                    events.emit("audit.failed", lost=self._lost, reason=f"The audit trail cannot be written: {error.strerror}.")
                return 0
            lost, self._lost = self._lost, 0
            return lost

    def _append(self, line: bytes) -> None:
        path = self.folder / f"{datetime.now(UTC):%Y-%m-%d}.log"
        if path != self._path or not self._is_at(path):
            self.close()
            self.folder.mkdir(mode=0o700, exist_ok=True)  # taken away under us, with the files: this is a new trail
            self._file, self._path = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), path
        size = os.fstat(self._file).st_size
        if size + len(line) > self._limit_bytes:
            raise OSError(0, f"it has the {self._limit_bytes} bytes that [audit] limit_mb allows")
        # A full disk took half a line, or one is just being written: an empty line harms nobody.
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(self._file, line) != len(line):
            raise OSError(0, "the disk took half a line")

    def _is_at(self, path: Path) -> bool:
        """Whether the open file is still the one of that name: it, or its folder, may have been removed or moved away."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.path.samestat(path.stat(), os.fstat(self._file))
        return False

    def close(self) -> None:
        """Close the day's file; the next line opens it again."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._path = -1, self.folder


class Tally:
    """Bounds what rejected callers may write: each caller's first rejection at once, then how many more came within the minute."""

    def __init__(self, write: Callable[[tuple[str, str, str], str], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._timer: threading.Timer | None = None

    def add(self, address: str, ae_title: str, reason: str) -> None:
        """Count one rejection."""
        key = (address, ae_title, reason)
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(WINDOW_S, self.flush)
                self._timer.daemon = True
                self._timer.start()
            if key not in self._seen and len(self._seen) >= CALLERS:
                key = OTHERS
            self._seen[key] += 1
            if self._seen[key] > 1 or key == OTHERS:
                return
        self._write(key, "")

    def flush(self) -> None:
        """Write the counts; the next rejection begins a new minute."""
        with self._lock:
            seen, self._seen = self._seen, Counter()
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
        for key, count in seen.items():
            if more := count - (key != OTHERS):
                self._write(key, f"{more} more times within {WINDOW_S:g} s")
