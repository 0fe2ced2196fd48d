"""The lists: worklist, dead letters, throughput; and what an operator does to a study."""

from __future__ import annotations

import hmac
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse

from worker.domain import Patient, PatientKey
from worker.ops import audit
from worker.store import queue, worklist
from worker.store.database import Connection
from worker.store.schema import AnyRow
from worker.web import plots, words
from worker.web.site import ASite, AVisitor, AWatcher, Fields, Site, Visitor, may

router = APIRouter()

#: Seconds between two looks of a list that is left open.
EVERY_S: Final = 10
#: Numbers of rows: SQLite's and PostgreSQL's are of 63 bits.
LAST: Final = 2**63 - 1
Number = Annotated[int, Query(ge=1, le=LAST)]
_FILTERS: Final = ("receiving", "waiting", "analysing", "sending", "failed", "held", "delivered", "excluded")


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list is asked for. `patient` and `order` are the row of a study with that patient ID or accession number."""

    state: str = ""
    urgent: bool = False
    patient: Annotated[int, Query(ge=0, le=LAST)] = 0
    order: Annotated[int, Query(ge=0, le=LAST)] = 0


Asked = Annotated[Filter, Depends()]


@router.get("/")
def list_studies(
    request: Request, site: ASite, who: AVisitor, asked: Asked, after: str = "", paused: bool = False, none: bool = False
) -> Response:
    """The worklist."""
    facts = _list(site, who, asked, after=after, paused=paused)
    with site.store.read() as conn:
        facts["counts"] = site.counts.of(conn)
    query = "&".join(f"{name}={facts['asked'][name]}" for name in facts["asked"])
    audit.searched(who.party, query or "all studies")
    return site.page(request, "worklist.html", is_none=none, **facts)


@router.get("/rows")
def list_again(request: Request, site: ASite, who: AWatcher, asked: Asked, seal: str = "") -> Response:
    """The same list's first page again, by itself. `seal`: the list is one that this session was shown, and the audit trail says so."""
    facts = _list(site, who, asked)
    if not hmac.compare_digest(seal.encode(), who.sealed(urlencode(facts["asked"])).encode()):
        return Response(status_code=204, headers={"HX-Refresh": "true"})  # a tab of an earlier session loads its list anew
    return site.page(request, "_rows.html", **facts)


def _list(site: Site, who: Visitor, given: Filter, *, after: str = "", paused: bool = False) -> dict[str, Any]:
    if given.state and given.state not in worklist.STATES:
        raise HTTPException(404, "There is no such state.")
    wanted = worklist.Wanted(given.state, given.urgent, given.patient or None, given.order or None)
    with site.store.read() as conn:
        lines, more = worklist.page(conn, wanted, after=_cursor(after))
        row = given.patient or given.order
        named = worklist.study_of(conn, row) if row else None
    asked: dict[str, object] = asdict(given) | {"urgent": "true" if given.urgent else ""}
    asked = {name: value for name, value in asked.items() if value}

    def link(**other: object) -> str:
        given = {name: value for name, value in (asked | other).items() if value}
        return f"/?{urlencode(given)}" if given else "/"

    return {
        "lines": lines,
        "filters": _FILTERS,
        "wanted": wanted,
        "named": named,
        "link": link,
        "asked": asked,
        "again": f"/rows?{urlencode(asked | {'seal': who.sealed(urlencode(asked))})}",
        "every_s": 0 if after or paused else EVERY_S,
        "older": link(after=_written(more)) if more else "",
        "is_first": not after,
        "now": site.now(),
    }


def _written(cursor: worklist.Cursor) -> str:
    return f"{cursor[0].astimezone(UTC):%Y%m%dT%H%M%S.%f}-{cursor[1]}"


def _cursor(text: str) -> worklist.Cursor | None:
    if not text:
        return None
    at, _, number = text.partition("-")
    with suppress(ValueError):
        when, row = datetime.strptime(at, "%Y%m%dT%H%M%S.%f").replace(tzinfo=UTC), int(number)
        if 0 <= row <= LAST:
            return when, row
    raise HTTPException(404, "There is no such page of the list.")


@router.post("/search")
def search(site: ASite, fields: Fields, who: Annotated[Visitor, Depends(may("see"))]) -> Response:
    """Find an accession number or a patient ID, exactly. By POST: neither may stand in a URL, which browsers and proxies keep."""
    text = fields.get("wanted", "").strip()
    with site.store.read() as conn:
        found = worklist.search(conn, text)
    audit.searched(who.party, text)
    return RedirectResponse(f"/?{found[0]}={found[1]}" if found else "/?none=true", 303)


@router.get("/dead-letters")
def dead_letters(request: Request, site: ASite, who: AVisitor, before: Number | None = None) -> Response:
    """What was given up, and why."""
    with site.store.read() as conn:
        rows = worklist.dead_letters(conn, before=before)
        reasons = worklist.reasons(conn, limit=10) if before is None else []
    audit.searched(who.party, "dead letters")
    older = rows[-1].id if len(rows) == worklist.PAGE else 0
    return site.page(request, "dead.html", rows=rows, reasons=reasons, older=older, is_first=before is None)


@router.get("/throughput")
def throughput(request: Request, site: ASite, _who: AVisitor, days: Annotated[int, Query(ge=1, le=31)] = 1) -> Response:
    """How much came and went, and how long it took."""
    with site.store.read() as conn:
        told = plots.look(conn, now=site.now(), days=days, zone=site.zone)
    return site.page(request, "throughput.html", told=told, days=days)


# --- what an operator does


@router.post("/studies/{number}/{action}")
def act(number: int, action: str, site: ASite, fields: Fields, who: Annotated[Visitor, Depends(may("act"))]) -> Response:
    """Retry, cancel or move forward a study's jobs; its history and the audit trail say who did."""
    now = site.now()
    with site.store.begin() as conn:
        row = study_row(conn, number)
        if action == "retry":
            jobs = queue.operator_retry(conn, number, now=now, by=who.account.name)
        elif action == "cancel":
            jobs = queue.operator_cancel(conn, number, now=now, by=who.account.name)
        elif action == "prioritize":
            jobs = queue.prioritize(conn, number, now=now, by=who.account.name)
        else:
            raise HTTPException(404, "There is no such action.")
    site.counts.forget()
    done = words.ending(action, {"jobs": jobs})
    audit.accessed(subject_of(row), person=who.party, action="U", reason=f"{action}: {done}")
    back = "/dead-letters" if fields.get("back") == "dead-letters" else f"/studies/{number}"
    return RedirectResponse(f"{back}?did={action}&jobs={jobs}", 303)


def study_row(conn: Connection, number: int) -> AnyRow:
    """The study's row, or a page that says that there is none."""
    row = worklist.study_of(conn, number) if 0 < number <= LAST else None
    if row is None:
        raise HTTPException(404, "There is no study of this number.")
    return row


def subject_of(row: AnyRow) -> audit.Subject:
    """The study as the audit trail names it."""
    patient = Patient(PatientKey(row.issuer, row.patient_id), row.patient_name, row.birth_date, row.sex)
    return audit.Subject(row.study_instance_uid, patient, row.accession_number)
