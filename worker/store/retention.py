"""Which studies' files may go, and the mark that they went. The ledger says where a study stands; nothing else is asked.

::

    due ─▶ some studies ─▶ mark: rows, one transaction ─▶ their files are deleted (spool.py)
                                  └─ killed here: the sweep of the spool deletes the files that the rows have given up

Rows, reports and history stay: an image that comes again is known, and kept as long again (studies.py).
What was not delivered is never due, nor what is held, in flight, lost, waits for a look at its changed record, had no destination,
or has a report that an archive was asked to commit to and did not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

import sqlalchemy as sa

from worker.store import history, ledger
from worker.store.database import Store
from worker.store.schema import AnyRow, commitment, instance, job, series, study

#: Studies of one sweep; the next has the others.
LIMIT: Final = 500
#: Studies of one transaction: SQLite's other writers wait for it.
BATCH: Final = 20


def due(store: Store, before: Mapping[str, datetime], *, committing: Collection[str]) -> Iterator[list[int]]:
    """Numbers of studies whose files may go, the oldest first, `BATCH` by `BATCH`.

    Parameters
    ----------
    before
        Account → nothing of a study of it may have happened since then: no image, no job's end.
    committing
        Destinations whose promise is waited for where they were asked for it.
    """
    if not before:
        return
    with store.read() as conn:
        numbers = [row.id for row in conn.execute(_due(before, committing).limit(LIMIT))]
    for start in range(0, len(numbers), BATCH):
        yield numbers[start : start + BATCH]


def mark(
    store: Store, numbers: Sequence[int], before: Mapping[str, datetime], *, committing: Collection[str], now: datetime
) -> tuple[list[str], int]:
    """Give up the files of these studies, as far as they are still due; their paths below the spool's instances, and how many studies."""
    with store.begin() as conn:
        # An image, a changed record and an operator's retry each change one of these rows: they come before, or wait.
        conn.execute(sa.select(study.c.id).where(study.c.id.in_(numbers)).order_by(study.c.id).with_for_update())
        conn.execute(sa.select(job.c.id).where(job.c.study_id.in_(numbers)).order_by(job.c.id).with_for_update())
        still: Sequence[AnyRow] = conn.execute(_due(before, committing, of=numbers)).all()
        ids = [row.id for row in still]
        of_series = sa.select(series.c.id).where(series.c.study_id.in_(ids))
        kept = sa.and_(instance.c.series_id.in_(of_series), instance.c.removed_at.is_(None))
        paths = list(conn.scalars(sa.update(instance).where(kept).values(removed_at=now).returning(instance.c.path)))
        conn.execute(sa.update(study).where(study.c.id.in_(ids)).values(removed_at=now))
        for row in still:
            history.note(conn, row.id, name="images.removed", now=now, account=row.account)
    return paths, len(ids)


def _due(before: Mapping[str, datetime], committing: Collection[str], *, of: Sequence[int] | None = None) -> sa.Select[tuple[int, str]]:
    one = ledger.standing(of)
    ended = sa.select(sa.func.max(job.c.finished_at)).where(job.c.study_id == study.c.id).correlate(study).scalar_subquery()
    is_over = {account: sa.and_(study.c.last_received_at < at, sa.or_(ended.is_(None), ended < at)) for account, at in before.items()}
    is_old = [sa.and_(one.c.account == account, is_past) for account, is_past in is_over.items()]
    is_sent = sa.or_(one.c.account != "delivered", one.c.is_unsent == 0)
    is_left = sa.and_(study.c.removed_at.is_(None), study.c.record_changed_at.is_(None), ~_is_unpromised(committing))
    wanted = sa.select(study.c.id, one.c.account).join(one, one.c.id == study.c.id).where(is_left, is_sent, sa.or_(*is_old))
    return wanted.order_by(study.c.id)


def _is_unpromised(committing: Collection[str]) -> sa.ColumnElement[bool]:
    """Of a delivery's questions the last counts; a destination that is not asked any more owes no answer."""
    later = commitment.alias("later")
    is_last = ~sa.exists().where(later.c.job_id == commitment.c.job_id, later.c.id > commitment.c.id)
    of_study = (job.c.study_id == study.c.id, job.c.destination.in_(list(committing)), commitment.c.state != "committed")
    return sa.exists().where(commitment.c.job_id == job.c.id, *of_study, is_last).correlate(study)
