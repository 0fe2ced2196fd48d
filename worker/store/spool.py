"""Received files: ``.part`` → fsync → rename → fsync of the folder; then, and only then, a row.

::

    root/incoming/*.part          being received; held by a lock of the receiving process
    root/incoming/*.orphan        taken away for a moment, to be looked at; a kill then leaves it here, and a sweep puts it back
    root/instances/ab/<name>.dcm  durable; name = sha256(SOP Instance UID + sha256 of the file)
    root/quarantine/<name>.dcm    kept for a person, used by nothing

A name never holds a UID, an AE title or a patient's data, and other bytes under a known UID get
another name, so nothing is ever overwritten by anything but itself. Preamble and file meta are a
function of the three UIDs alone (PS3.10 §7.1): the same data set has the same digest whoever sent it.

Not here: what the files mean (studies.py) and when they may go (retention.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from worker import events

#: PS3.7 Annex D.3.3.2. Constant for ever: the digest of every file depends on it.
IMPLEMENTATION_CLASS_UID: Final = "2.25.102073192064933210676502742763369010471"

#: Start writing to disk after so many bytes, while the rest is still on the wire.
#: Measured (512 x 512 x 16, ext4): fsync + rename + fsync takes 0.55 ms with it, 1.10 ms without.
_FLUSH_BYTES: Final = 128 * 1024
#: The same while other files of this process are open: then the disk has work anyway, and each
#: small write costs CPU (4 associations on 2 busy cores: 145 instances/s with 128 KiB, 171 without).
_SHARED_FLUSH_BYTES: Final = 4 * 1024 * 1024
#: No file is dated so far after now by a clock that is right.
_AHEAD_S: Final = 3600.0
_SYNC_FILE_RANGE_WRITE: Final = 2  # <linux/fs.h>

_libc = ctypes.CDLL(None, use_errno=True)
_HAS_SYNC_FILE_RANGE: Final = hasattr(_libc, "sync_file_range")


@dataclass(frozen=True, slots=True)
class Stored:
    """One durable file: its place, the sha256 of all its bytes, and their number."""

    path: Path
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep took away: abandoned parts, files without a row, files that retention had left."""

    parts: int
    orphans: int
    removed: int
    size_bytes: int


class SpoolError(Exception):
    """The spool's folder cannot be used; the sentence says what to do."""


def file_meta(sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Preamble of zeros, prefix and file meta information (PS3.10 §7.1) of these three UIDs."""
    elements = b"\x02\x00\x01\x00OB\x00\x00\x02\x00\x00\x00\x00\x01"
    for element, uid in ((0x02, sop_class_uid), (0x03, sop_instance_uid), (0x10, transfer_syntax_uid), (0x12, IMPLEMENTATION_CLASS_UID)):
        value = uid.encode("ascii")
        value += b"\0" * (len(value) % 2)
        elements += struct.pack("<HH2sH", 0x0002, element, b"UI", len(value)) + value
    return bytes(128) + b"DICM" + struct.pack("<HH2sHL", 0x0002, 0, b"UL", 4, len(elements)) + elements


class Incoming:
    """One file being written. Use: `write` any number of times, then `commit` or `abort`, once."""

    def __init__(self, instances: Path, part: Path, *, sop_instance_uid: str, meta: bytes, open_files: set[Path]) -> None:
        self._instances = instances
        self._part = part
        self._uid = sop_instance_uid
        self._open_files = open_files
        self._flush_bytes = _SHARED_FLUSH_BYTES if open_files else _FLUSH_BYTES
        self._sha256 = hashlib.sha256()
        self._flushed = 0
        self.size_bytes = 0
        #: Where the data set begins in the file.
        self.dataset_offset = len(meta)
        self._fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        open_files.add(part)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(self._fd, 0o600)  # whatever the umask says
            self.write(memoryview(meta))
        except BaseException:
            self.abort()
            raise

    def write(self, data: memoryview) -> None:
        """Append `data`; raises OSError (ENOSPC, EIO, …) as the system does."""
        self._sha256.update(data)
        written = os.write(self._fd, data)
        while written < len(data):
            written += os.write(self._fd, data[written:])
        self.size_bytes += written
        if self.size_bytes - self._flushed >= self._flush_bytes and _HAS_SYNC_FILE_RANGE:
            # A hint only: errors come back from fsync.
            start, self._flushed = self._flushed, self.size_bytes
            _libc.sync_file_range(self._fd, ctypes.c_int64(start), ctypes.c_int64(self._flushed - start), _SYNC_FILE_RANGE_WRITE)

    def view(self) -> mmap.mmap:
        """All bytes written so far, read-only; close it before `commit`."""
        return mmap.mmap(self._fd, self.size_bytes, access=mmap.ACCESS_READ)

    def commit(self) -> Stored:
        """Make the file durable under its name. After an OSError there is no row, and `sweep` removes what is left."""
        sha256 = self._sha256.hexdigest()
        name = hashlib.sha256(f"{self._uid}\0{sha256}".encode()).hexdigest()
        path = self._instances / name[:2] / f"{name}.dcm"
        try:
            os.fsync(self._fd)
            self._part.rename(path)
        except OSError:
            self.abort()
            raise
        self._close()
        _fsync_folder(path.parent)
        return Stored(path, sha256, self.size_bytes)

    def abort(self) -> None:
        """Drop the file. Calling it again does nothing."""
        if self._fd >= 0:
            with suppress(OSError):  # a disk that has become read-only keeps it, and `sweep` comes again
                self._part.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        self._open_files.discard(self._part)
        os.close(self._fd)
        self._fd = -1


class Spool:
    """The spool folder of one host; any number of processes may hold one."""

    def __init__(self, root: Path, *, low_water_bytes: int) -> None:
        self.root = root
        self.low_water_bytes = low_water_bytes
        self._incoming = root / "incoming"
        self._instances = root / "instances"
        self._quarantine = root / "quarantine"
        self._open_files: set[Path] = set()
        _check_root(root)
        for folder in (self._incoming, self._instances, self._quarantine):
            _make_folder(folder)
        for leaf in range(256):
            _make_folder(self._instances / f"{leaf:02x}")
        for folder in (self._instances, root, root.parent):  # a new spool's own entry, too
            _fsync_folder(folder)

    def begin(self, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> Incoming:
        """Open a new file and write its preamble and file meta; raises OSError."""
        part = self._incoming / f"{secrets.token_hex(16)}.part"
        meta = file_meta(sop_class_uid, sop_instance_uid, transfer_syntax_uid)
        return Incoming(self._instances, part, sop_instance_uid=sop_instance_uid, meta=meta, open_files=self._open_files)

    def quarantine(self, stored: Stored, reason: str) -> Path:
        """Move a durable file to where nothing uses it, durably; returns its new path."""
        path = self._quarantine / stored.path.name
        stored.path.rename(path)
        _fsync_folder(self._quarantine)
        _fsync_folder(stored.path.parent)
        events.emit("instance.quarantined", reason=reason, sha256=stored.sha256, size_bytes=stored.size_bytes)
        return path

    @property
    def free_bytes(self) -> int:
        """Bytes that may still be written to the spool's file system."""
        system = os.statvfs(self.root)
        return system.f_bavail * system.f_frsize

    @property
    def is_low(self) -> bool:
        """Whether less than the low-water mark is free: refuse before the disk is full."""
        try:
            return self.free_bytes < self.low_water_bytes
        except OSError:  # the folder is gone: nothing can be written there
            return True

    def sweep(self, known: Callable[[Sequence[str]], Mapping[str, bool]], *, written_before: datetime) -> Swept:
        """Clear away what a crash left: parts no process holds are removed, files no row names go to quarantine.

        Parameters
        ----------
        known
            Given paths (as ``str(Stored.path)``), those that a row names, and whether it says that the file is to be gone
            (retention); called once a folder.
        written_before
            Younger files stay: another process may be between its rename and its row. A quarter
            of an hour before now is ample; rows follow within seconds.
        """
        limit = written_before.timestamp()
        parts = orphans = removed = size_bytes = 0
        for part in self._incoming.iterdir():
            if part.suffix == ".orphan":
                self._put_back(part, limit)
                continue
            freed = _remove_abandoned(part, limit)
            parts += freed is not None
            size_bytes += freed or 0
        for path, is_known in self._unused(known, limit):
            freed = self._take(path, limit, is_kept=not is_known)
            orphans += freed is not None and not is_known
            removed += freed is not None and is_known
            size_bytes += freed or 0
        events.emit("spool.swept", parts=parts, orphans=orphans, removed=removed, size_bytes=size_bytes)
        return Swept(parts, orphans, removed, size_bytes)

    def strays(self, known: Callable[[Sequence[str]], Mapping[str, bool]], *, written_before: datetime) -> int:
        """How many files `sweep` would put into quarantine."""
        return sum(not is_known for _, is_known in self._unused(known, written_before.timestamp()))

    def _unused(self, known: Callable[[Sequence[str]], Mapping[str, bool]], limit: float) -> Iterator[tuple[Path, bool]]:
        """Old files that no row names, or that a row has given up, and whether it is that."""
        for leaf in self._instances.iterdir():
            paths = sorted(entry.path for entry in os.scandir(leaf) if _is_old(entry, limit))
            told = known(paths) if paths else {}
            yield from ((Path(path), path in told) for path in paths if told.get(path, True))

    def restore(self, path: str, sha256: str) -> bool:
        """Put a file back from quarantine, durably, to `path` below the spool's instances, if it is there and is the very one."""
        kept, place = self._quarantine / Path(path).name, self._instances / path
        if digest_of(kept) != sha256:
            return False
        kept.rename(place)
        _fsync_folder(place.parent)
        _fsync_folder(self._quarantine)
        return True

    def remove(self, paths: Iterable[str], *, written_before: datetime) -> tuple[int, int]:
        """Delete files whose rows say that they are to be gone (paths below the spool's instances); their number and bytes.

        A file written since `written_before` stays: it was sent again meanwhile. What a kill leaves, `sweep` deletes.
        """
        freed = [self._take(self._instances / path, written_before.timestamp(), is_kept=False) for path in paths]
        return sum(size is not None for size in freed), sum(size or 0 for size in freed)

    def empty_quarantine(self, *, put_before: datetime) -> tuple[int, int]:
        """Delete the files that were put into quarantine before that time; their number and bytes."""
        limit, files, size_bytes = put_before.timestamp(), 0, 0
        for path in self._quarantine.iterdir():
            found = path.stat()
            if stat.S_ISDIR(found.st_mode):
                continue  # a person's
            if found.st_ctime < limit:  # a rename sets it
                path.unlink(missing_ok=True)
                files, size_bytes = files + 1, size_bytes + found.st_size
        return files, size_bytes

    def _take(self, path: Path, limit: float, *, is_kept: bool) -> int | None:
        """Take a file out of use if it is still the old one, to quarantine or for ever; its size, None if it stays."""
        # A resend may rename a fresh copy to this very name after the rows were asked: take the file
        # away first, then look whether it is still the old one, and put it back if it is not.
        taken = self._incoming / f"{path.stem}.orphan"
        try:
            path.rename(taken)
        except FileNotFoundError:
            return None
        found = taken.stat()
        if _is_fresh(found.st_mtime, limit):
            taken.rename(path)
            return None
        if is_kept:
            # Not deleted: if it is the database that lost its row, a person can still send the file in again.
            taken.rename(self._quarantine / path.name)
        else:
            taken.unlink()
        return found.st_size

    def _put_back(self, taken: Path, limit: float) -> None:
        """A kill came while a file was being looked at: it may be one that was sent again, and acknowledged."""
        try:
            if _is_fresh(taken.stat().st_ctime, limit):
                return
            os.link(taken, self._instances / taken.stem[:2] / f"{taken.stem}.dcm")
        except FileExistsError:
            pass  # the same bytes came again
        except FileNotFoundError:
            return
        taken.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """The sha256 of a whole file, lower hex; '' if there is none, or its disk does not give it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _remove_abandoned(part: Path, limit: float) -> int | None:
    """Remove a part that no live process holds; its size, or None if it stays."""
    try:
        fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(fd)
        # The lock is taken a moment after the file is made: leave the young ones alone.
        if _is_fresh(found.st_mtime, limit):
            return None
        part.unlink(missing_ok=True)
    except BlockingIOError:
        return None
    finally:
        os.close(fd)
    return found.st_size


def _is_fresh(written_at: float, limit: float) -> bool:
    # What is dated well after now was written by a clock that was put back since: waited for, it would stay for as long as that was ahead.
    return limit <= written_at <= max(limit, time.time()) + _AHEAD_S


def _is_old(entry: os.DirEntry[str], limit: float) -> bool:
    try:
        return not _is_fresh(entry.stat().st_mtime, limit)
    except OSError:  # gone meanwhile, or the disk does not say: nothing to be moved
        return False


def _check_root(root: Path) -> None:
    _make_folder(root, parents=True)
    found = root.stat()
    if found.st_uid != os.geteuid():
        raise SpoolError(
            f"The spool {root} belongs to user {found.st_uid}, but this process runs as user {os.geteuid()}: "
            f"run it as the owner, or give the folder away with chown."
        )
    if found.st_mode & stat.S_IWOTH:
        raise SpoolError(f"The spool {root} can be written by every user: run chmod 700 on it, and check what is in it.")
    root.chmod(0o700)


def _make_folder(folder: Path, *, parents: bool = False) -> None:
    try:
        folder.mkdir(mode=0o700, parents=parents)
    except FileExistsError:
        if not folder.is_dir():
            raise SpoolError(f"{folder} is in the way: the spool needs a folder of that name.") from None
        return
    folder.chmod(0o700)  # whatever the umask says


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems cannot sync a folder and need not.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)
