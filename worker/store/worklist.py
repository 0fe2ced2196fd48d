"""The worklist and one study's documents, as the page shows them. Queries only; nothing here writes.

::

    filter ──candidates, by index──▶ chunk of study rows ──ledger.standing──▶ state of each ──▶ a page, and where the next begins

A state is the ledger's account; of what is in flight the jobs say where it is. Which studies *may* be in a state is asked of an
index; which are, of the ledger, for some at a time. Pages go on from the last row (time, number), not from a count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import STAT
from worker.store import ledger
from worker.store.schema import AnyRow, document, finding, instance, job, series, study

IN_FLIGHT: Final = ("receiving", "waiting", "analysing", "sending")
#: Every state a study may be shown in; the last only if the ledger does not add up.
STATES: Final = (*IN_FLIGHT, "failed", "held", "delivered", "excluded", ledger.LOST)
#: Of these every candidate is one, as jobs and rows say it.
_EXACT: Final = ("", *IN_FLIGHT, "held")
PAGE: Final = 50
#: Of one filter so many studies are looked at for one page: a filter that nothing fits must not read a whole archive.
_CHUNK, _CHUNKS = 200, 10
#: Failed studies are counted up to here.
COUNTED: Final = 200

#: Where a page ends: time of the last image and number of its last study.
Cursor = tuple[datetime, int]


@dataclass(frozen=True, slots=True)
class Line:
    """One study in the list.

    ``reason``: why it waits or failed; ``said``: findings of its last reports that are not negative; ``failure``: why one has none.
    """

    study: AnyRow
    state: str
    reason: str
    is_urgent: bool
    modalities: str
    instances: int
    said: tuple[AnyRow, ...]
    failure: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for; empty fields ask for nothing. ``patient_of``, ``order_of``: a study with the same patient ID, accession number."""

    state: str = ""
    is_urgent: bool = False
    patient_of: int | None = None
    order_of: int | None = None


def _is(column: sa.Column[Any], *values: str) -> sa.ColumnElement[bool]:
    """Word for word, as partial indexes say it."""
    said: list[sa.ColumnElement[str]] = [sa.literal_column(repr(value)) for value in values]
    return column == said[0] if len(said) == 1 else column.in_(said)


_STUDIES_OF: Final = sa.select(job.c.study_id)
_AVAILABLE, _LEASED = _is(job.c.state, "available"), _is(job.c.state, "leased")
_GIVEN_UP: Final = _is(job.c.state, "discarded", "cancelled")
_STAT: Final = job.c.priority <= STAT
# Two selects, for each state has its own index.
_UNFINISHED: Final = study.c.id.in_(sa.union_all(_STUDIES_OF.where(_AVAILABLE), _STUDIES_OF.where(_LEASED)))
_LEASED_INFER: Final = study.c.id.in_(_STUDIES_OF.where(_LEASED, job.c.kind == "infer"))
_WAITING_INFER: Final = study.c.id.in_(_STUDIES_OF.where(_AVAILABLE, job.c.kind == "infer"))
_ANY_JOB: Final = sa.exists().where(job.c.study_id == study.c.id).correlate(study)
_IS_HELD: Final = study.c.hold != sa.literal_column("''")
_IS_DONE: Final = sa.and_(_is(study.c.hold, ""), _is(study.c.state, "complete"))

#: Which studies may be in a state; those of the first five are.
_CANDIDATES: Final[Mapping[str, sa.ColumnElement[bool]]] = {
    "receiving": sa.and_(_is(study.c.hold, ""), _is(study.c.state, "receiving")),
    "analysing": sa.and_(_IS_DONE, _LEASED_INFER),
    "waiting": sa.and_(_IS_DONE, _WAITING_INFER, sa.not_(_LEASED_INFER)),
    "sending": sa.and_(_IS_DONE, _UNFINISHED, sa.not_(_WAITING_INFER), sa.not_(_LEASED_INFER)),
    "held": _IS_HELD,
    "failed": sa.and_(_IS_DONE, study.c.id.in_(_STUDIES_OF.where(_GIVEN_UP))),
    "delivered": sa.and_(_IS_DONE, _ANY_JOB, sa.not_(_UNFINISHED)),
    "excluded": sa.and_(_IS_DONE, sa.not_(_ANY_JOB)),
    ledger.LOST: sa.and_(_IS_DONE, sa.not_(_UNFINISHED)),
}


def page(conn: Connection, wanted: Wanted, *, after: Cursor | None = None, size: int = PAGE) -> tuple[list[Line], Cursor | None]:
    """One page, the study whose image came last first, and where the next begins; None: there is no more.

    A page may be shorter than `size`, even empty, with more to come: so many studies are looked at and no more.
    """
    query = sa.select(study).where(*_conditions(conn, wanted)).order_by(study.c.last_received_at.desc(), study.c.id.desc())
    found: list[AnyRow] = []
    chunk = size + 1
    for _ in range(_CHUNKS):
        rows = conn.execute((query if after is None else query.where(_is_after(after))).limit(chunk)).all()
        found += rows if wanted.state in _EXACT else _standing(conn, rows, wanted.state)
        if len(found) > size:
            return lines(conn, found[:size]), _cursor(found[size - 1])
        if len(rows) < chunk:
            return lines(conn, found), None
        after, chunk = _cursor(rows[-1]), _CHUNK
    return lines(conn, found), after


def _standing(conn: Connection, rows: Sequence[AnyRow], account: str) -> list[AnyRow]:
    """Those that the ledger has in the account."""
    one = ledger.standing([row.id for row in rows])
    numbers = set(conn.scalars(sa.select(one.c.id).where(one.c.account == account))) if rows else set()
    return [row for row in rows if row.id in numbers]


def _is_after(after: Cursor) -> sa.ColumnElement[bool]:
    at, number = after
    # The first condition lets the index begin there.
    return sa.and_(study.c.last_received_at <= at, sa.or_(study.c.last_received_at < at, study.c.id < number))


def _cursor(row: AnyRow) -> Cursor:
    return row.last_received_at, row.id


def _conditions(conn: Connection, wanted: Wanted) -> list[sa.ColumnElement[bool]]:
    found = [_CANDIDATES[wanted.state]] if wanted.state else []
    if wanted.is_urgent:
        found.append(study.c.id.in_(sa.union_all(*(_STUDIES_OF.where(one, _STAT) for one in (_AVAILABLE, _LEASED, _GIVEN_UP)))))
    for number, column in ((wanted.patient_of, study.c.patient_id), (wanted.order_of, study.c.accession_number)):
        if number is not None:
            value = conn.execute(sa.select(column).where(study.c.id == number)).scalar()
            found.append(column == value if value else sa.false())
    return found


def search(conn: Connection, text: str) -> tuple[str, int] | None:
    """Whether `text` is an accession number or a patient ID here, exactly, and a study that has it: ("order", 12) or ("patient", 12)."""
    columns = {"order": study.c.accession_number, "patient": study.c.patient_id}
    for what, column in columns.items() if text else ():
        number = conn.execute(sa.select(sa.func.max(study.c.id)).where(column == text)).scalar()
        if number is not None:
            return what, int(number)
    return None


def lines(conn: Connection, rows: Sequence[AnyRow]) -> list[Line]:
    """What is to be said of these studies, in their order; a few statements, however many they are."""
    ids = [row.id for row in rows]
    if not ids:
        return []
    one = ledger.standing(ids)
    standing = {row.id: row for row in conn.execute(sa.select(one))}
    jobs: dict[int, list[AnyRow]] = {}
    wanted = sa.select(job.c.study_id, job.c.kind, job.c.state, job.c.priority, job.c.reason)
    for row in conn.execute(wanted.where(job.c.study_id.in_(ids)).order_by(job.c.id)):
        jobs.setdefault(row.study_id, []).append(row)
    images = _images(conn, ids)
    said = _said(conn, ids)
    return [_line(row, standing[row.id], jobs.get(row.id, []), images.get(row.id, []), said.get(row.id, [])) for row in rows]


def _line(row: AnyRow, standing: AnyRow, jobs: Sequence[AnyRow], images: Sequence[AnyRow], said: Sequence[AnyRow]) -> Line:
    open_jobs = [one for one in jobs if one.state in ("available", "leased")]
    state, reason = str(standing.account), str(standing.reason or "") if standing.account == "failed" else str(row.hold)
    if state == "in flight":
        state = _where(row, open_jobs)
        reason = next((one.reason for one in open_jobs if one.reason), "")
    return Line(
        study=row,
        state=state,
        reason=reason,
        is_urgent=any(one.priority <= STAT for one in open_jobs or jobs),
        modalities="/".join(sorted({one.modality for one in images})),
        instances=sum(one.instances for one in images),
        said=tuple(one for one in said if one.meaning is not None),
        failure=next((one.failure for one in said if one.failure), ""),
    )


def _where(row: AnyRow, open_jobs: Sequence[AnyRow]) -> str:
    if row.state == "receiving":
        return "receiving"
    infer = [one.state for one in open_jobs if one.kind == "infer"]
    return "analysing" if "leased" in infer else "waiting" if infer else "sending"


def _images(conn: Connection, ids: Sequence[int]) -> dict[int, list[AnyRow]]:
    count = sa.func.count(instance.c.id).label("instances")
    wanted = sa.select(series.c.study_id, series.c.modality, count).outerjoin(instance, instance.c.series_id == series.c.id)
    found: dict[int, list[AnyRow]] = {}
    for row in conn.execute(wanted.where(series.c.study_id.in_(ids)).group_by(series.c.study_id, series.c.modality)):
        found.setdefault(row.study_id, []).append(row)
    return found


def _said(conn: Connection, ids: Sequence[int]) -> dict[int, list[AnyRow]]:
    """Study → what its last report of each bundle calls positive or uncertain, the most probable first; one row where it has none."""
    newest = sa.select(sa.func.max(document.c.id)).where(document.c.study_id.in_(ids), document.c.kind == "sr")
    wanted = (
        sa.select(document.c.study_id, document.c.failure, finding.c.meaning, finding.c.probability, finding.c.verdict)
        .outerjoin(finding, sa.and_(finding.c.document_id == document.c.id, finding.c.verdict != "negative"))
        .where(document.c.id.in_(newest.group_by(document.c.study_id, document.c.bundle)))
        .order_by(finding.c.probability.desc())
    )
    found: dict[int, list[AnyRow]] = {}
    for row in conn.execute(wanted):
        found.setdefault(row.study_id, []).append(row)
    return found


def counts(conn: Connection) -> dict[str, int]:
    """How many studies are in each state that somebody may have to act on; of those that failed at most `COUNTED`."""
    found = {}
    for state in (*IN_FLIGHT, "held"):
        found[state] = conn.execute(sa.select(sa.func.count()).select_from(study).where(_CANDIDATES[state])).scalar_one()
    ids = list(conn.scalars(sa.select(study.c.id).where(_CANDIDATES["failed"]).order_by(study.c.id.desc()).limit(COUNTED)))
    one = ledger.standing(ids)
    found["failed"] = conn.execute(sa.select(sa.func.count()).where(one.c.account == "failed")).scalar_one() if ids else 0
    return found


def dead_letters(conn: Connection, *, before: int | None = None, size: int = PAGE) -> list[AnyRow]:
    """Jobs that were given up, the newest first, with their study; numbers below `before` to go on."""
    columns = (study.c.patient_name, study.c.patient_id, study.c.issuer, study.c.version, document.c.kind.label("document"))
    wanted = sa.select(job, *columns).join(study, study.c.id == job.c.study_id).outerjoin(document, document.c.id == job.c.document_id)
    wanted = wanted.where(_GIVEN_UP, job.c.state == "discarded")
    if before is not None:
        wanted = wanted.where(job.c.id < before)
    return list(conn.execute(wanted.order_by(job.c.id.desc()).limit(size)))


def reasons(conn: Connection, *, limit: int) -> list[AnyRow]:
    """Why dead letters are, and how many of each, the most frequent first."""
    count = sa.func.count().label("jobs")
    of_each = sa.select(job.c.reason, job.c.kind, count).where(_GIVEN_UP, job.c.state == "discarded").group_by(job.c.reason, job.c.kind)
    return list(conn.execute(of_each.order_by(count.desc(), job.c.reason).limit(limit)))


def documents_of(conn: Connection, study_id: int) -> list[AnyRow]:
    """A study's documents without their bytes, oldest first."""
    columns = [column for column in document.c if column is not document.c.data]
    return list(conn.execute(sa.select(*columns).where(document.c.study_id == study_id).order_by(document.c.id)))


def findings_of(conn: Connection, study_id: int) -> dict[int, list[AnyRow]]:
    """Document → its findings without saliency, as the report has them."""
    columns = [column for column in finding.c if column is not finding.c.saliency]
    wanted = sa.select(*columns).join(document).where(document.c.study_id == study_id).order_by(finding.c.id)
    found: dict[int, list[AnyRow]] = {}
    for row in conn.execute(wanted):
        found.setdefault(row.document_id, []).append(row)
    return found


def study_of(conn: Connection, study_id: int) -> AnyRow | None:
    """The study's row."""
    return conn.execute(sa.select(study).where(study.c.id == study_id)).first()
