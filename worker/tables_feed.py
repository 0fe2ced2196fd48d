"""Tables as feeds: files of delimited text, imported or dropped, and views of the site's warehouse, read again from where they ended.

::

    files ─▶ intake/tables.py ──┐
                                ├─▶ localized ─▶ one transaction a batch: a message row, its facts
    view ──▶ store/warehouse.py ┘

A batch that was committed before, word for word, is passed by: a file imported twice adds nothing, and one whose import was cut
off goes on where it ended. Not here: the command line, the schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from worker import events, record_feeds
from worker.config import Config, Table
from worker.domain import RecordUpdate
from worker.errors import RecordError, WorkerError
from worker.intake.delimited import Unfinished, unfinished
from worker.intake.table_mapping import TableMapping, read_mapping
from worker.intake.table_rows import Row, RowReader, Words
from worker.intake.tables import QUIET_S, Apply, Tally, import_table, take
from worker.store import feeds, records, warehouse
from worker.store.database import Store
from worker.store.warehouse import Watermark


def files(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and of folders the *.csv, *.tsv and *.txt directly in them, the first written first."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = (one for one in path.iterdir() if one.suffix.lower() in {".csv", ".tsv", ".txt"} and one.is_file())
            found += sorted(inside, key=lambda one: (one.stat().st_mtime, one.name))
        else:
            found.append(path)
    return found


def import_tables(
    paths: Iterable[Path],
    mapping_path: Path,
    *,
    config: Config,
    store: Store,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _bytes: None,
    quiet_s: float = QUIET_S,
) -> Tally:
    """Import files of one table. A dry run reads everything and commits nothing.

    A folder is one that files are dropped into: what may still be being written there is left for the next time, not refused.

    Parameters
    ----------
    progress
        Called with the number of bytes read since the last call; the sizes of `files(paths)` add up to the total.

    Raises
    ------
    RecordError
        The mapping file is wrong.
    DatabaseUnavailable
        The database went away; what was committed stays, and importing again goes on from there.
    """
    mapping = read_mapping(mapping_path)
    tally = Tally()
    for path, is_dropped in ((path, root.is_dir()) for root in paths for path in files([root])):
        try:
            if is_dropped and unfinished(path, encoding=mapping.encoding, quiet_s=quiet_s):
                tally.counts["file left for the next time"] += 1
                continue
            apply = _apply(config, store, sender=mapping.name, trigger="CSV")
            one = import_table(path, mapping, apply=apply, dry_run=dry_run, progress=progress, words=_words(config), quiet_s=quiet_s)
        except Unfinished as exc:
            one = Tally()
            one.leave(path, str(exc))
        except RecordError as exc:
            one = Tally()
            one.refuse(path, 0, str(exc))
        except OSError as exc:
            one = Tally()
            one.refuse(path, 0, f"The file cannot be read: {exc.strerror}.")
        if one.is_unfinished:  # no content of the feed: whoever counts refused messages must not look for it there
            events.emit("message.refused", sender=mapping.name, trigger="CSV", result="left out", reason=one.errors[-1][2])
        elif not dry_run:
            _note_refused(store, one, sender=mapping.name, trigger="CSV")
        tally.add(one)
    return tally


def _words(config: Config) -> Words:
    return Words(config.zone, config.records.issuers, config.records.schemes)


def _apply(config: Config, store: Store, *, sender: str, trigger: str) -> Apply:
    """Commit 3 for one batch of rows: remembered and applied in one transaction.

    Rows without [changed] say nothing of when they were said: of two versions the one that came later stands. A file's own time
    would make every row of a daily export a new fact.
    """

    def apply(updates: list[RecordUpdate]) -> int:
        # Writers that name patients in one order cannot wait for each other.
        several = sorted((record_feeds.localized(config, one) for one in updates), key=_order)
        digest = _digest(several)
        with store.begin() as conn:
            if not several or feeds.row_of(conn, sender=sender, digest=digest) is not None:
                return 0
            now = record_feeds.clock()
            held, are_of_others = record_feeds.check_persons(config, conn, several, now=now)
            right = [one for one, is_of_another in zip(several, are_of_others, strict=True) if not is_of_another]
            if len(right) < len(several):
                said = f"{len(several) - len(right)} patients of a batch of rows were refused: {record_feeds.OF_ANOTHER}"
                warehouse.note_refused(conn, sender=sender, trigger=trigger, reason=said, digest=digest, now=now)
                events.emit("message.refused", sender=sender, trigger=trigger, result="refused", reason=said)
                # Of what was taken: the same rows come again when the patient has been corrected.
                digest = _digest(right)
            number = feeds.note_message(
                conn, sender=sender, control_id="", sent_at="", trigger=trigger, result="applied", digest=digest, now=now
            )
            return 0 if number is None else records.apply_all(conn, right, now=now, message_id=number, held=held)

    return apply


def _digest(updates: Sequence[RecordUpdate]) -> str:
    return hashlib.sha256(repr(updates).encode("utf-8", "surrogatepass")).hexdigest()


def _order(update: RecordUpdate) -> tuple[str, str]:
    return update.patient.key.issuer, update.patient.key.patient_id


def _summary(tally: Tally) -> str:
    reasons = "; ".join(f"{reason} ({count})" for reason, count in tally.reasons.most_common(5))
    return f"{tally.counts['refused']} rows were refused, the first at row {tally.errors[0][1]}: {reasons}"


def _note_refused(store: Store, tally: Tally, *, sender: str, trigger: str) -> None:
    """Rows that were refused are counted and shown with the messages; their content stays where it is."""
    if not tally.errors:
        return
    told = repr([(line, reason) for _, line, reason in tally.errors])
    with store.begin() as conn:
        warehouse.note_refused(
            conn,
            sender=sender,
            trigger=trigger,
            reason=_summary(tally),
            digest=hashlib.sha256(told.encode()).hexdigest(),
            now=record_feeds.clock(),
        )


# --- views


def read_view(table: Table, *, config: Config, store: Store, since: Watermark | None = None) -> Watermark | None:
    """Read what a view has had since the last time; return how far it was read.

    For a sweep: an error is one event with its reason, what was committed stays, and the watermark stays where it was.

    Parameters
    ----------
    since
        From where to read; None for where the last reading ended, or the mapping's start.
    """
    reached = since
    try:
        mapping = read_mapping(table.mapping)
        reached = since if since is not None else _remembered(store, table, mapping)
        return _read(table, mapping, reached, config=config, store=store)
    except WorkerError as exc:
        events.emit("sweep.failed", sweep=f"table {table.name}", reason=str(exc))
        return reached


def _remembered(store: Store, table: Table, mapping: TableMapping) -> Watermark | None:
    if mapping.changed is None or mapping.changed.start is None:
        return None
    with store.read() as conn:
        found = warehouse.watermark(conn, table.name)
    return mapping.changed.start if found is None else found


def _read(table: Table, mapping: TableMapping, since: Watermark | None, *, config: Config, store: Store) -> Watermark | None:
    column = mapping.changed.column if mapping.changed and since is not None else ""
    tally, high = Tally(), _High(since)
    with warehouse.reading(table.database, table.query, since=_overlapped(since, mapping)) as (columns, rows):
        reader = RowReader(mapping, columns, _words(config))
        apply = _apply(config, store, sender=table.name, trigger="SQL")
        take(_numbered(rows, high, reader.position(column) if column else None), reader, tally, apply=apply)
    _note_refused(store, tally, sender=table.name, trigger="SQL")
    if high.reached is not None and high.reached != since:
        with store.begin() as conn:
            warehouse.note_watermark(conn, table.name, high.reached, now=record_feeds.clock())
    if tally.errors:
        events.emit("sweep.failed", sweep=f"table {table.name}", reason=_summary(tally))
    return high.reached


class _High:
    """The highest watermark seen."""

    def __init__(self, since: Watermark | None) -> None:
        self.reached = since

    def see(self, cell: object) -> None:
        """Take a cell of the watermark's column.

        Raises
        ------
        RecordError
            It cannot be compared with the mapping's start.
        """
        if cell is None or self.reached is None:
            return
        try:
            value: Any = int(cell) if isinstance(cell, (float, Decimal)) else cell  # Oracle counts in Decimal
            self.reached = max(self.reached, value)
        except (TypeError, ValueError, OverflowError):
            raise RecordError(
                "The column of the mapping's [changed] has another type than its start: write start as the database gives the column "
                "(a time with or without offset, a whole number, a text)."
            ) from None


def _numbered(rows: Iterator[Sequence[object]], high: _High, position: int | None) -> Iterator[tuple[int, Row | RecordError]]:
    for number, row in enumerate(rows, start=1):
        if position is not None:
            high.see(row[position])
        yield number, row


def _overlapped(since: Watermark | None, mapping: TableMapping) -> Watermark | None:
    """Where to read from: a little before the watermark, by the mapping's overlap."""
    overlap = mapping.changed.overlap if mapping.changed else 0.0
    if not overlap or since is None or isinstance(since, str):
        return since
    return since - timedelta(seconds=overlap) if isinstance(since, date) else since - int(overlap)
