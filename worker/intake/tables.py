"""Rows of a table → what they say of each patient, through a mapping. The third door beside hl7.py and fhir.py.

::

    file ─delimited.py─▶ (line, cells) ─┐
                                        ├─▶ RowReader ─▶ RecordUpdate ─▶ batches of rows, grouped by patient ─▶ apply
    SQL view ─────────▶ (row, cells) ───┘

A row is one fact for each of the mapping's [[values]] that has something in it; an empty cell says nothing. The fact's key is the
row's key and the column, so that a row read twice is one fact and a changed row supersedes, for the patient it was of.
What cannot be understood is refused by its line, with a reason that never repeats it; the rows beside it are taken.
Not here: one row (table_rows.py), rows of our own database, the site's codes and patient IDs (worker/tables_feed.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from worker.domain import Observation, Patient, RecordUpdate
from worker.errors import RecordError
from worker.intake import delimited
from worker.intake.table_mapping import TableMapping
from worker.intake.table_rows import Row, RowReader, Words

#: Commits what some rows say and returns how many facts that added.
Apply = Callable[[list[RecordUpdate]], int]

#: Rows in one transaction: the writer's lock is held for some tenths of a second.
BATCH_ROWS: Final = 500
#: A file that has been still for so long is written; copies over a network pause for less.
QUIET_S: Final = 5.0
#: Refused rows that are told one by one; all are counted.
TOLD_ERRORS: Final = 1000


@dataclass(slots=True)
class Tally:
    """What came of a table: counts by outcome, refused rows by reason and by line, facts by the mapping's [[values]].

    ``is_unfinished``: the file was still being written: it is taken the next time, and what was refused of it may be right by then.
    """

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    errors: list[tuple[Path | None, int, str]] = field(default_factory=list)
    facts: Counter[str] = field(default_factory=Counter)
    is_unfinished: bool = False

    def refuse(self, path: Path | None, line: int, reason: str) -> None:
        """Count a row, or with line 0 a whole file, that was not taken."""
        self.counts["refused"] += 1
        self.reasons[reason] += 1
        if len(self.errors) < TOLD_ERRORS:
            self.errors.append((path, line, reason))

    def leave(self, path: Path, reason: str) -> None:
        """Count a file that is still being written: refused now, taken the next time."""
        self.is_unfinished = True
        self.refuse(path, 0, reason)

    def add(self, other: Tally) -> None:
        """Add what came of another file."""
        self.counts.update(other.counts)
        self.reasons.update(other.reasons)
        self.facts.update(other.facts)
        self.errors.extend(other.errors[: TOLD_ERRORS - len(self.errors)])


def take(
    rows: Iterable[tuple[int, Row | RecordError]],
    reader: RowReader,
    tally: Tally,
    *,
    apply: Apply,
    path: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Read numbered rows and commit them batch by batch; what one batch says of a patient is one update. A dry run commits nothing."""
    batch: dict[tuple[Patient, datetime | None, bool], list[Observation]] = {}

    def commit() -> None:
        name = reader.mapping.name
        updates = [
            RecordUpdate(patient, tuple(facts), name, has_demographics, at=at) for (patient, at, has_demographics), facts in batch.items()
        ]
        if updates and not dry_run:
            tally.counts["fact added"] += apply(updates)
        batch.clear()

    for line, row in rows:
        try:
            if isinstance(row, RecordError):
                raise row
            update = reader.update(row)
        except RecordError as exc:
            tally.refuse(path, line, str(exc))
            continue
        batch.setdefault((update.patient, update.at, update.has_demographics), []).extend(update.observations)
        tally.counts["row read"] += 1
        tally.counts["fact read"] += len(update.observations)
        tally.facts.update(reader.label(fact) for fact in update.observations)
        if tally.counts["row read"] % BATCH_ROWS == 0:
            commit()
    commit()


def import_table(
    path: Path,
    mapping: TableMapping,
    *,
    apply: Apply,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _bytes: None,
    words: Words | None = None,
    quiet_s: float = QUIET_S,
) -> Tally:
    """Read a file of delimited text, whatever its size, in the memory of one batch.

    Parameters
    ----------
    apply
        Commits what one batch of rows says; never called in a dry run.
    progress
        Called with the number of bytes read since the last call.

    Raises
    ------
    Unfinished
        Nothing was read: the file may still be being written.
    RecordError
        Nothing was read: its header is not the mapping's.
    OSError
        The file cannot be read.
    """
    if reason := delimited.unfinished(path, encoding=mapping.encoding, quiet_s=quiet_s):
        raise delimited.Unfinished(reason)
    before = path.stat()
    rows = delimited.rows(path, delimiter=mapping.delimiter, quote=mapping.quote, encoding=mapping.encoding, progress=progress)
    _, header = next(rows, (0, RecordError("The file has no header.")))
    if isinstance(header, RecordError):
        raise header
    tally = Tally()
    take(rows, RowReader(mapping, header, words or Words()), tally, apply=apply, path=path, dry_run=dry_run)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        tally.leave(path, "The file changed while it was read; import it again when it is whole.")
    return tally
