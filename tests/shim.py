"""A disk that fails or forgets, and a clock that jumps, below a real daemon: LD_PRELOAD of shim.c.

Everything that the daemon's processes do goes through the C library (SQLite's files, too), so that the daemon under test is the one that
is installed. A power cut is rebuilt from what was synced: see `Journal`.
"""

from __future__ import annotations

import mmap
import random
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from tests.peers import require

#: `struct orders` of shim.c: syncs so far, seconds that the clock is wrong, error number, calls that fail, part of their path.
_ORDERS: Final = struct.Struct("=qqii232s")
ON_OPEN, ON_WRITE, ON_SYNC = 1, 2, 4
#: What a disk writes whole or not at all.
_SECTOR: Final = 512


class Shim:
    """Compiles the shim and preloads it into the processes that are started from now on, until the test's end.

    Parameters
    ----------
    folder
        For its own files.
    root
        The folder whose files it is about.
    """

    def __init__(self, folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch, *, has_journal: bool = False) -> None:
        folder.mkdir()
        library, source, orders = folder / "shim.so", Path(__file__).with_name("shim.c"), folder / "orders"
        command = [require("gcc"), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        orders.write_bytes(bytes(_ORDERS.size))
        with orders.open("r+b") as file:
            self._orders = mmap.mmap(file.fileno(), _ORDERS.size)
        self.journal = Journal(folder / "journal", root)
        self.journal.folder.mkdir()
        environ = {"LD_PRELOAD": library, "SHIM_ORDERS": orders, "SHIM_ROOT": root}
        for name, value in {**environ, **({"SHIM_JOURNAL": self.journal.folder} if has_journal else {})}.items():
            monkeypatch.setenv(name, str(value))

    def fail(self, error: int, *, calls: int, part: str) -> None:
        """From now on `calls` fail with `error` where the path holds `part`."""
        clock_s = _ORDERS.unpack(self._orders[:])[1]
        self._orders[8:] = _ORDERS.pack(0, clock_s, error, calls, part.encode())[8:]

    def heal(self) -> None:
        """The disk is well again."""
        self.fail(0, calls=0, part="")

    def jump(self, seconds: int) -> None:
        """The wall clock is wrong by so many seconds from now on; the monotonic one is not."""
        self._orders[8:16] = struct.pack("=q", seconds)

    @property
    def syncs(self) -> int:
        """How many files and folders were synced so far; with a journal only."""
        return int(_ORDERS.unpack(self._orders[:])[0])


#: Name → type, "d" or "f", and inode.
_Entries = dict[str, tuple[str, int]]


@dataclass
class _Left:
    """A disk: bytes by inode, entries by folder."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[Path, _Entries] = field(default_factory=dict)


@dataclass
class Journal:
    """What was synced, in order, and the folder that a power cut leaves of it.

    The strictest of disks: a folder's entry is there once the folder was synced, a file's bytes once the file was. A journaling file
    system keeps more: its renames are whole, and no entry is older than one that was synced.
    """

    folder: Path
    root: Path
    _left: _Left = field(default_factory=_Left)
    _applied: int = 0

    def rebuild(self, target: Path, cut: int, chance: random.Random) -> None:
        """Make `target` what is left of `root` when the power goes before sync number `cut` + 1 ends; cuts in order.

        Of what that sync was to write nothing is there, or each sector and each entry is or not, as it happens.
        """
        for number in range(self._applied + 1, cut + 1):
            self._apply(number, self._left, None)
        self._applied = cut
        left = _Left(dict(self._left.files), dict(self._left.folders))
        if chance.random() < 0.7 and (self.folder / f"{cut + 1:08}").exists():
            self._apply(cut + 1, left, chance)
        _make(target, self.root, left)

    def _apply(self, number: int, left: _Left, chance: random.Random | None) -> None:
        """One sync, the whole of it or some."""
        head, _, new = (self.folder / f"{number:08}").read_bytes().partition(b"\n")
        kind, _, whom = head.decode().partition(" ")
        if kind == "file":
            left.files[int(whom)] = _torn(left.files.get(int(whom), b""), new, chance) if chance else new
            return
        before, after = left.folders.get(Path(whom), {}), _entries(new)
        if chance:
            chosen = {name: chance.choice((before.get(name), after.get(name))) for name in sorted({*before, *after})}
            after = {name: entry for name, entry in chosen.items() if entry is not None}
        left.folders[Path(whom)] = after


def _entries(listing: bytes) -> _Entries:
    lines = (line.split(" ", 2) for line in listing.decode().splitlines())
    return {name: (what, int(inode)) for what, inode, name in lines}


def _torn(old: bytes, new: bytes, chance: random.Random) -> bytes:
    size = chance.choice((len(old), len(new)))
    sectors = [chance.choice((old, new))[at : at + _SECTOR].ljust(_SECTOR, b"\0") for at in range(0, size, _SECTOR)]
    return b"".join(sectors)[:size]


def _make(target: Path, source: Path, left: _Left) -> None:
    target.mkdir(mode=0o700)
    for name, (what, inode) in left.folders.get(source, {}).items():
        if what == "d":
            _make(target / name, source / name, left)
        else:
            (target / name).write_bytes(left.files.get(inode, b""))
