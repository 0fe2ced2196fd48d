"""What radiologists say of findings: kept with the result, never changed; of several of one finding the last counts."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.store import history
from worker.store.schema import AnyRow, document, finding, review

#: A note is a remark, not a report.
LONGEST_NOTE: Final = 500


def add(conn: Connection, finding_id: int, *, study_id: int, author: str, verdict: str, note: str, now: datetime) -> bool | None:
    """Keep what `author` says of a finding of this study: whether that agrees with it; None where the study has no such finding.

    The study's history says who and what, and nothing of the note.
    """
    of_study = sa.select(finding.c.verdict, finding.c.name).join(document, document.c.id == finding.c.document_id)
    of_study = of_study.where(document.c.study_id == study_id)
    found = conn.execute(of_study.where(finding.c.id == finding_id)).first()
    if found is None:
        return None
    said = {"finding_id": finding_id, "author": author, "verdict": verdict, "note": note.strip()[:LONGEST_NOTE], "at": now}
    conn.execute(sa.insert(review).values(said))
    is_agreed = bool(found.verdict == verdict)
    name = "finding.agreed" if is_agreed else "finding.corrected"
    history.note(conn, study_id, name=name, now=now, by=author, finding=found.name, verdict=verdict)
    return is_agreed


def of_study(conn: Connection, study_id: int) -> dict[int, list[AnyRow]]:
    """Finding → what was said of it, the last first."""
    joined = review.join(finding, finding.c.id == review.c.finding_id).join(document, document.c.id == finding.c.document_id)
    wanted = sa.select(review).select_from(joined).where(document.c.study_id == study_id).order_by(review.c.id.desc())
    found: dict[int, list[AnyRow]] = {}
    for row in conn.execute(wanted):
        found.setdefault(row.finding_id, []).append(row)
    return found
