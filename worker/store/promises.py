"""What senders asked us to commit to: one row a transaction, until its report arrived (PS3.4 Annex J). The answer is made when it is told.

A row is written before the request is answered, so that a report is owed whatever happens to us; it is deleted with the report.
A promise is a line in each study's history. Not here: the messages (intake/commitment.py, deliver/commitment.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import CommitmentRequest
from worker.store import history, queue
from worker.store.database import Store
from worker.store.schema import AnyRow, event, instance, promise, series
from worker.store.spool import digest_of
from worker.store.studies import insert_or_ignore

#: A sender that took no report for so long has the images still, and asks again.
GIVE_UP: Final = timedelta(days=3)
# PS3.3 §C.14.1.1, Failure Reason: other bytes under this UID wait in quarantine; it is not here; it is here as another class.
PROCESSING_FAILURE, NO_SUCH_INSTANCE, CLASS_CONFLICT = 0x0110, 0x0112, 0x0119
_CHUNK: Final = 500


@dataclass(frozen=True, slots=True)
class Standing:
    """What is true of one instance that was asked about: a failure reason, or 0 where its row and every byte of its file are here."""

    sop_class_uid: str
    sop_instance_uid: str
    reason: int
    study_id: int = 0


def ask(conn: Connection, asked: CommitmentRequest, *, calling_ae: str, address: str, now: datetime) -> bool:
    """Note what a sender asks; again where it asks again. False: it asked about something else under this transaction UID."""
    said = {"calling_ae": calling_ae, "transaction_uid": asked.transaction_uid}
    wanted = [list(pair) for pair in asked.instances]
    if insert_or_ignore(conn, promise, {**said, "address": address, "wanted": wanted, "asked_at": now, "not_before": now}) is not None:
        return True
    known = (promise.c.calling_ae == calling_ae, promise.c.transaction_uid == asked.transaction_uid)
    if conn.execute(sa.select(promise.c.wanted).where(*known)).scalar() not in (None, wanted):
        return False
    conn.execute(sa.update(promise).where(*known).values(address=address, not_before=now))
    return True


def due(conn: Connection, *, limit: int, now: datetime) -> list[AnyRow]:
    """The reports that are owed and may be tried now, the longest waiting first."""
    wanted = sa.select(promise).where(promise.c.not_before <= now)
    return list(conn.execute(wanted.order_by(promise.c.not_before, promise.c.id).limit(limit)))


def standing(store: Store, row: AnyRow, instances: Path) -> list[Standing]:
    """Look at each instance's row and read its file, which lies below `instances`."""
    rows: dict[str, AnyRow] = {}
    with store.read() as conn:
        for start in range(0, len(row.wanted), _CHUNK):
            uids = [uid for _, uid in row.wanted[start : start + _CHUNK]]
            wanted = sa.select(instance, series.c.study_id).join(series, series.c.id == instance.c.series_id)
            rows |= {one.sop_instance_uid: one for one in conn.execute(wanted.where(instance.c.sop_instance_uid.in_(uids)))}
        doubted = _doubted(conn, sorted({one.study_id for one in rows.values()}))
    found = []
    for sop_class_uid, uid in row.wanted:
        if (one := rows.get(uid)) is None or one.removed_at is not None or digest_of(instances / one.path) != one.sha256:
            reason = NO_SUCH_INSTANCE
        elif one.sop_class_uid != sop_class_uid:
            reason = CLASS_CONFLICT
        else:
            reason = PROCESSING_FAILURE if one.id in doubted else 0
        found.append(Standing(sop_class_uid, uid, reason, 0 if reason or one is None else one.study_id))
    return found


def _doubted(conn: Connection, study_ids: Sequence[int]) -> set[object]:
    """Rows of instances that came with other bytes, too: whoever sent those may not delete them."""
    noted = sa.select(event.c.facts).where(event.c.name == "instance.quarantined")
    parts = (study_ids[start : start + _CHUNK] for start in range(0, len(study_ids), _CHUNK))
    return {facts.get("instance") for part in parts for facts in conn.scalars(noted.where(event.c.study_id.in_(part)))}


def reported(conn: Connection, row: AnyRow, found: Sequence[Standing], *, now: datetime) -> None:
    """The sender took the report: nothing is owed any more."""
    conn.execute(sa.delete(promise).where(promise.c.id == row.id))
    for study_id, count in Counter(one.study_id for one in found if not one.reason).items():
        history.note(conn, study_id, name="commitment.promised", now=now, instances=count, calling_ae=row.calling_ae)


def postpone(conn: Connection, row: AnyRow, *, now: datetime) -> bool:
    """The sender did not take it: later, or never again; then the answer is True."""
    is_over = bool(now - row.asked_at >= GIVE_UP)
    later = {"attempt": row.attempt + 1, "not_before": now + timedelta(seconds=queue.backoff_s(row.attempt + 1))}
    mine = promise.c.id == row.id
    conn.execute(sa.delete(promise).where(mine) if is_over else sa.update(promise).where(mine).values(**later))
    return is_over
