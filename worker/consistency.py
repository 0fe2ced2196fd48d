"""Do spool and database agree? Each row has its file, each file its row, and its size and digest are those it was received with.

::

    rows ─▶ file missing, of another size, changed ─▶ put back from quarantine, else it must be sent again
    files ─▶ without a row                         ─▶ quarantine
    dead letters for a lost file that is here again ─▶ back into the queue

Sent again, the same bytes come to the same place: a resend mends a missing file and a changed one alike.
The daemon reads the files again too, a few at a time (`verify`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from worker.errors import StoredFileLost
from worker.store import history, images, queue, studies
from worker.store.database import Store
from worker.store.images import StoredFile
from worker.store.spool import Spool, Swept, digest_of

#: A file without a row is a crash's after this long; rows follow files within seconds.
ORPHAN_AGE: Final = timedelta(minutes=15)
#: Rows of one reading.
_PAGE: Final = 1000

MISSING, RESIZED, CHANGED = "missing", "of another size", "changed"


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found: ``faults`` are files and what is wrong with them, ``returned`` the dead letters that could be analysed now.

    ``returned`` holds (study, version) → bundles.
    """

    files: int = 0
    faults: tuple[tuple[StoredFile, str], ...] = ()
    strays: int = 0
    returned: dict[tuple[int, int], list[str]] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether there is nothing to mend."""
        return not (self.faults or self.strays or self.returned)


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was mended, and what only a resend can."""

    restored: int
    quarantined: int
    requeued: int
    left: tuple[tuple[StoredFile, str], ...]


def check(store: Store, spool: Spool, *, with_digests: bool, now: datetime, progress: Callable[[int, int], None]) -> Checked:
    """Compare rows and files; changes nothing, and the daemon may run.

    Parameters
    ----------
    with_digests
        Read every file; else sizes alone are compared.
    progress
        Called with how many rows are done, of how many.
    """
    with store.read() as conn:
        total = images.count_files(conn)
    faults: list[tuple[StoredFile, str]] = []
    done = last = 0
    while page := _page(store, last):
        for one in page:
            if found := _fault(spool, one, with_digests=with_digests):
                faults.append((one, found))
            done += 1
            progress(done, max(done, total))
        last = page[-1].id
    faults = _still(store, spool, faults, with_digests=with_digests)
    strays = spool.strays(_known(store, spool), written_before=now - ORPHAN_AGE)
    return Checked(done, tuple(faults), strays, _returned(store, spool))


def verify(store: Store, spool: Spool, *, budget_bytes: float) -> tuple[int, tuple[tuple[StoredFile, str], ...]]:
    """Read the next files again, until that many bytes are read or the last row is reached; how many were, and what is wrong.

    Each call begins after the file where the last one ended, a restart between them or not: the number of its row is in the spool.
    """
    place = spool.root / "verified"
    try:
        last = int(place.read_text("ascii"))
    except (FileNotFoundError, ValueError):  # none yet, or cut off by a crash: every file is as good a beginning
        last = 0
    faults: list[tuple[StoredFile, str]] = []
    size_bytes = 0
    while size_bytes < budget_bytes:
        page = _page(store, last)
        for one in page:
            if found := _fault(spool, one, with_digests=True):
                faults.append((one, found))
            size_bytes, last = size_bytes + one.size_bytes, one.id
            if size_bytes >= budget_bytes:
                break
        if not page:
            last = 0
            break
    place.write_text(str(last), "ascii")
    return size_bytes, tuple(_still(store, spool, faults, with_digests=True))


def repair(store: Store, spool: Spool, found: Checked, *, now: datetime) -> Repaired:
    """Put back what quarantine has, put away what no row names, and queue again what waited for a file that is here."""
    left = tuple((one, fault) for one, fault in found.faults if not spool.restore(one.path, one.sha256))
    swept = sweep(store, spool, now=now)
    requeued = 0
    for (study_id, version), bundles in _returned(store, spool).items():
        with store.begin() as conn:
            queue.revive(conn, study_id, input_version=version, bundles=bundles, now=now)
        requeued += len(bundles)
    return Repaired(len(found.faults) - len(left), swept.orphans, requeued, left)


def sweep(store: Store, spool: Spool, *, now: datetime) -> Swept:
    """Clear away what a crash left in the spool, as far as it is old enough to be nobody's work."""
    return spool.sweep(_known(store, spool), written_before=now - ORPHAN_AGE)


def _known(store: Store, spool: Spool) -> Callable[[Sequence[str]], dict[str, bool]]:
    root = spool.root / "instances"

    def known(paths: Sequence[str]) -> dict[str, bool]:
        below = {str(Path(path).relative_to(root)): path for path in paths}
        with store.read() as conn:
            return {below[path]: is_removed for path, is_removed in studies.known_paths(conn, list(below)).items()}

    return known


def _page(store: Store, last: int) -> list[StoredFile]:
    with store.read() as conn:
        return images.files(conn, after=last, limit=_PAGE)


def _fault(spool: Spool, one: StoredFile, *, with_digests: bool) -> str:
    path = spool.root / "instances" / one.path
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return MISSING
    if size_bytes != one.size_bytes:
        return RESIZED
    return CHANGED if with_digests and digest_of(path) != one.sha256 else ""


def _still(store: Store, spool: Spool, faults: Sequence[tuple[StoredFile, str]], *, with_digests: bool) -> list[tuple[StoredFile, str]]:
    """Look again at what was wrong: retention or an erasure may have taken row and file between our two looks."""
    left: list[tuple[StoredFile, str]] = []
    for start in range(0, len(faults), _PAGE):
        with store.read() as conn:
            rows = images.files_among(conn, [one.id for one, _ in faults[start : start + _PAGE]])
        left += [(one, fault) for one in rows if (fault := _fault(spool, one, with_digests=with_digests))]
    return left


def _returned(store: Store, spool: Spool) -> dict[tuple[int, int], list[str]]:
    """Analyses that are dead letters for a lost file, of studies whose files are all here, by their digests."""
    lost: dict[tuple[int, int], list[str]] = {}
    with store.read() as conn:
        for (study_id, version), bundles in queue.dead_analyses(conn).items():
            past = history.of_study(conn, study_id)
            if waiting := [one for one in bundles if history.is_discarded_for(past, StoredFileLost, bundle=one, version=version)]:
                lost[study_id, version] = waiting
    return {number: bundles for number, bundles in lost.items() if _is_whole(store, spool, number[0])}


def _is_whole(store: Store, spool: Spool, study_id: int) -> bool:
    with store.read() as conn:
        parts = list(images.of_study(conn, study_id, spool.root / "instances"))
    return not any(one.is_removed or digest_of(one.path) != one.sha256 for part in parts for one in part.instances)
