"""Instances and what they say of their images: facts ↔ one column, rows → series.

One JSON column, not one for each fact: no query asks for a part of it, all instances of a series share its text, and a new fact needs
no migration. A key that this program does not know is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from worker.domain import ImageFacts, Instance, Series
from worker.store.schema import AnyRow, instance, series

_UNKNOWN: Final = asdict(ImageFacts())


@lru_cache(maxsize=256)
def encoded(facts: ImageFacts) -> str:
    """The column's text; '' where nothing is known. Cached, for the instances of a series say the same."""
    known = {name: value for name, value in asdict(facts).items() if value != _UNKNOWN[name]}
    return json.dumps(known, separators=(",", ":")) if known else ""


@lru_cache(maxsize=4096)
def decoded(text: str) -> ImageFacts:
    """What `encoded` wrote."""
    told: dict[str, Any] = json.loads(text) if text else {}
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items() if name in _UNKNOWN}
    return ImageFacts(**known)


def of_study(conn: Connection, study_id: int, root: Path = Path()) -> Iterator[Series]:
    """The series of a study with their instances, whose files lie below `root`, in the order they came."""
    rows = conn.execute(
        sa.select(
            series.c.series_instance_uid,
            series.c.modality,
            series.c.body_part,
            series.c.description,
            series.c.orientation,
            series.c.slice_mm,
            instance.c.sop_instance_uid,
            instance.c.sop_class_uid,
            instance.c.transfer_syntax_uid,
            instance.c.path,
            instance.c.sha256,
            instance.c.size_bytes,
            instance.c.view,
            instance.c.frames,
            instance.c.facts,
            instance.c.removed_at,
        )
        .join(instance, instance.c.series_id == series.c.id)
        .where(series.c.study_id == study_id)
        .order_by(series.c.id, instance.c.id)
    ).all()
    groups: dict[str, list[AnyRow]] = {}
    for row in rows:
        groups.setdefault(row.series_instance_uid, []).append(row)
    for uid, members in groups.items():
        one = members[0]
        instances = tuple(_instance(row, root) for row in members)
        yield Series(uid, one.modality, one.body_part, one.description, instances, one.orientation, one.slice_mm)


def _instance(row: AnyRow, root: Path) -> Instance:
    return Instance(
        sop_instance_uid=row.sop_instance_uid,
        sop_class_uid=row.sop_class_uid,
        transfer_syntax_uid=row.transfer_syntax_uid,
        path=root / row.path,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        view=row.view,
        frames=row.frames,
        facts=decoded(row.facts),
        is_removed=row.removed_at is not None,
    )


# --- files and rows


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What the row of an instance says of its file, if that is not given up; ``path`` lies below the spool's instances."""

    id: int
    study_id: int
    path: str
    sha256: str
    size_bytes: int


_FILES: Final = (
    sa.select(instance.c.id, series.c.study_id, instance.c.path, instance.c.sha256, instance.c.size_bytes)
    .join(series, series.c.id == instance.c.series_id)
    .where(instance.c.removed_at.is_(None))
    .order_by(instance.c.id)
)


def files(conn: Connection, *, after: int, limit: int) -> list[StoredFile]:
    """The next files by the number of their rows."""
    return [StoredFile(*row) for row in conn.execute(_FILES.where(instance.c.id > after).limit(limit))]


def files_among(conn: Connection, numbers: Sequence[int]) -> list[StoredFile]:
    """Of these rows those that still say that their file is here."""
    return [StoredFile(*row) for row in conn.execute(_FILES.where(instance.c.id.in_(numbers)))]


def count_files(conn: Connection) -> int:
    """How many files there should be."""
    return int(conn.execute(sa.select(sa.func.count()).select_from(instance).where(instance.c.removed_at.is_(None))).scalar_one())
