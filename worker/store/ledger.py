"""The ledger: where every study that was received stands, each in exactly one account.

::

    received = delivered + failed + excluded + held + in flight

    held        for a person to decide whose it is
    in flight   being received, or a job of it is available or leased
    failed      an analysis of its last version, or a delivery of what that said last, is discarded or cancelled: why is told
    excluded    the rule that no bundle takes its modalities was the last word on it
    delivered   of every bundle the last report is at every destination it had; none is owed to anybody

A study in none of them is *lost*: analysed without a report, or complete without a job or a rule. The accounts are tried in this
order, but lost before failed. Retention (retention.py) asks here too. Not here: how it looks (worker/watch_cli.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store.schema import GIVEN_UP, UNFINISHED, document, event, job, study

ACCOUNTS: Final = ("delivered", "failed", "excluded", "held", "in flight")
LOST: Final = "lost"
#: What says of a study's version whether anything is to be analysed.
_WORDS: Final = ("study.completed", "study.renewed", "study.excluded")


@dataclass(frozen=True, slots=True)
class Entry:
    """So many studies of one day in one account; ``day`` counts `entries`' midnights, and their number stands for all that is older.

    ``reason`` is why they failed, '' else; ``is_unsent`` says that their reports had no destination.
    """

    day: int
    account: str
    reason: str
    is_unsent: bool
    studies: int


def standing(of: Sequence[int] | None = None) -> sa.Subquery:
    """Each study's ``id``, ``created_at``, ``account``, ``reason`` and ``is_unsent``, for a query to choose from; `of`: of these alone."""
    asked, sent, root, form = job.alias("asked"), job.alias("sent"), document.alias("root"), document.alias("form")
    last = sa.select(document.c.study_id, document.c.bundle, sa.func.max(document.c.id).label("id")).where(document.c.kind == "sr")
    said = last.where(_among(document.c.study_id, of)).group_by(document.c.study_id, document.c.bundle).subquery("said")
    made_of = sa.select(form.c.input_sha256).where(form.c.id == sent.c.document_id).correlate(sent).scalar_subquery()
    is_of_result = (made_of == root.c.input_sha256, *(sent.c[name] == root.c[name] for name in ("study_id", "bundle", "input_version")))
    is_stopped, is_unsendable = asked.c.state.in_(GIVEN_UP), sent.c.state.in_(GIVEN_UP)
    of_version = (
        sa.select(
            asked.c.study_id,
            _any(sa.or_(is_stopped, is_unsendable)).label("is_failed"),
            # A repeated input says nothing new, and its bundle's earlier report is the last.
            _any(sa.and_(asked.c.state == "completed", said.c.id.is_(None))).label("is_unreported"),
            _any(sa.and_(said.c.id.is_not(None), sent.c.id.is_(None))).label("is_unsent"),
            sa.func.max(sa.case((is_stopped, asked.c.reason), (is_unsendable, sent.c.reason), else_="")).label("reason"),
        )
        .join(study, sa.and_(study.c.id == asked.c.study_id, study.c.version == asked.c.input_version))
        .outerjoin(said, sa.and_(said.c.study_id == asked.c.study_id, said.c.bundle == asked.c.bundle))
        # The root report and the other forms of the same result: one may go where the others do not.
        .outerjoin(root, root.c.id == said.c.id)
        # The study again: jobs are indexed by it.
        .outerjoin(sent, sa.and_(sent.c.study_id == asked.c.study_id, sent.c.kind == "deliver", *is_of_result))
        .where(asked.c.kind == "infer", _among(asked.c.study_id, of))
        .group_by(asked.c.study_id)
        .subquery("of_version")
    )
    is_worked_on = study.c.id.in_(sa.select(job.c.study_id).where(job.c.state.in_(UNFINISHED), _among(job.c.study_id, of)))
    words = sa.select(event.c.name).where(event.c.study_id == study.c.id, event.c.name.in_(_WORDS)).order_by(event.c.id.desc()).limit(1)
    account: sa.ColumnElement[str] = sa.case(
        (study.c.hold != "", "held"),
        (sa.or_(study.c.state == "receiving", is_worked_on), "in flight"),
        (of_version.c.is_unreported == 1, LOST),
        (of_version.c.is_failed == 1, "failed"),
        (of_version.c.study_id.is_not(None), "delivered"),
        (words.correlate(study).scalar_subquery() == "study.excluded", "excluded"),
        else_=LOST,
    )
    told = sa.select(study.c.id, study.c.created_at, account.label("account"), of_version.c.reason, of_version.c.is_unsent)
    return told.outerjoin(of_version, of_version.c.study_id == study.c.id).where(_among(study.c.id, of)).subquery("standing")


def _among(column: sa.ColumnElement[int], of: Sequence[int] | None) -> sa.ColumnElement[bool]:
    return sa.true() if of is None else column.in_(of)


def _any(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.max(sa.case((condition, 1), else_=0))


def accounts(conn: Connection, of: Sequence[int]) -> dict[int, str]:
    """Study → its account."""
    one = standing(of)
    return dict(conn.execute(sa.select(one.c.id, one.c.account)).tuples().all())


def entries(conn: Connection, midnights: Sequence[datetime]) -> list[Entry]:
    """All studies by the day of their first image, account and reason; `midnights` begin the days, the newest first."""
    one = standing()
    days: list[tuple[Any, int]] = [(one.c.created_at >= midnight, day) for day, midnight in enumerate(midnights)]
    by = sa.select(
        (sa.case(*days, else_=len(midnights)) if days else sa.literal(0)).label("day"),
        one.c.account,
        sa.case((one.c.account == "failed", one.c.reason), else_="").label("reason"),
        sa.case((one.c.account == "delivered", one.c.is_unsent), else_=0).label("is_unsent"),
    ).subquery("dated")
    groups = conn.execute(sa.select(*by.c, sa.func.count().label("studies")).group_by(*by.c).order_by(*by.c)).all()
    return [Entry(row.day, row.account, row.reason, bool(row.is_unsent), row.studies) for row in groups]


def lost(conn: Connection, *, limit: int) -> list[int]:
    """The numbers of studies that no account has, oldest first."""
    one = standing()
    return list(conn.scalars(sa.select(one.c.id).where(one.c.account == LOST).order_by(one.c.id).limit(limit)))
