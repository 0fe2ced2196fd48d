"""A folder for patient data that outlives neither its use nor, for long, its process, however that ends.

SIGTERM (torchrun, systemd, a batch system) and SIGHUP (a closed terminal) become SystemExit while the folder is there, so that it is
removed. After a SIGKILL or a power cut, the next process removes it: a folder is named with the process that made it, which holds a lock on
it, for in a container a number of a process may mean another one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

PREFIX: Final = "synoptic-cohort-"


@contextmanager
def scratch() -> Iterator[Path]:
    """Make an empty folder that is removed at the end; for the main thread, where signals arrive."""
    _remove_orphans()
    usual = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in usual:
        signal.signal(number, _end)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-") as folder:
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield Path(folder)
            finally:
                os.close(lock)
    finally:
        for number in usual:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: a second one would break the cleaning off
    raise SystemExit(128 + number)


def _remove_orphans() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        process = folder.name.removeprefix(PREFIX).partition("-")[0]
        if process.isdecimal() and not Path("/proc", process).exists() and _is_free(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_free(folder: Path) -> bool:
    """Whether a folder of this user's is locked by nobody."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(lock).st_uid == os.getuid()
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
