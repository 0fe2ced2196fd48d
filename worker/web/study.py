"""One study: who it is of, what was found and from what, every report and attempt, from the first image to the committed report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse

from worker.ops import audit
from worker.report import codes, tree
from worker.store import commitments, documents, history, queue, reviews, worklist
from worker.store.database import Connection
from worker.store.people import VERDICTS
from worker.store.schema import AnyRow
from worker.web import words
from worker.web.pages import LAST, study_row, subject_of
from worker.web.site import ASite, AVisitor, AWatcher, Fields, Site, Visitor, may

router = APIRouter()

#: Seconds between two looks at a study that something happens to.
EVERY_S: Final = 4
#: Of a history so many steps, the first and the last: days of attempts are thousands, and are asked for again and again.
_FIRST, _LAST = 100, 300
#: PS3.3 §A.8: what a browser is shown as an image.
_IMAGE: Final = "summary"


@dataclass(frozen=True, slots=True)
class Report:
    """One report: its row, its findings, the documents made with it, and whether another has taken its place.

    ``successor``: row of the report that replaced it; None: it is the bundle's current one.
    """

    row: AnyRow
    findings: Sequence[AnyRow]
    companions: Sequence[AnyRow]
    successor: int | None

    @property
    def image(self) -> int | None:
        """The row of its summary image."""
        return next((one.id for one in self.companions if one.kind == _IMAGE and one.sop_class_uid), None)  # else it could not be written


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the timeline."""

    at: datetime
    text: str
    tone: str
    beside: str


def reports_of(conn: Connection, study_id: int) -> list[Report]:
    """Every report of a study, the newest first."""
    rows = worklist.documents_of(conn, study_id)
    findings = worklist.findings_of(conn, study_id)
    roots = [row for row in rows if row.kind == "sr"]
    found = []
    for number, root in enumerate(roots):
        later = next((one.id for one in roots[number + 1 :] if one.bundle == root.bundle), None)
        with_it = [one for one in rows if (one.bundle, one.input_version) == (root.bundle, root.input_version)]
        found.append(Report(root, findings.get(root.id, ()), with_it, later))
    return found[::-1]


def timeline(conn: Connection, study_id: int) -> list[Step]:
    """From the first image to what the archive promised, oldest first: the study's history, and questions not answered yet."""
    steps = [Step(one.at, *words.event(one.name, one.facts)) for one in history.of_study(conn, study_id)]
    asked = commitments.of_study(conn, study_id)
    steps += [Step(row.asked_at, f"{row.destination} was asked to promise that it keeps the report", "", "") for row in asked]
    steps.sort(key=lambda step: step.at)
    between = len(steps) - _FIRST - _LAST
    if between > 0:
        left = Step(steps[_FIRST].at, f"{words.plural(between, 'step')} in between; synoptic show tells each", "", "")
        steps[_FIRST : _FIRST + between] = [left]
    return steps


def _facts(site: Site, number: int) -> dict[str, Any]:
    """What the parts say that are asked for again and again."""
    with site.store.read() as conn:
        row = study_row(conn, number)
        line = worklist.lines(conn, [row])[0]
        jobs, reports = queue.of_study(conn, number), reports_of(conn, number)
        return {
            "study": row,
            "line": line,
            "jobs": jobs,
            "steps": timeline(conn, number),
            "reports": reports,
            "sent": _sent(jobs),
            "kinds": {one.id: one.kind for report in reports for one in report.companions},
            "every_s": EVERY_S if line.state in worklist.IN_FLIGHT else 0,
            "now": site.now(),
        }


@router.get("/studies/{number}")
def show(
    request: Request,
    number: int,
    site: ASite,
    who: AVisitor,
    report: Annotated[int, Query(ge=0, le=LAST)] = 0,
    did: str = "",
    jobs: Annotated[int, Query(ge=0, le=10_000)] = 0,
) -> Response:
    """The study's page; `report`: the row of one that was replaced."""
    facts = _facts(site, number)
    with site.store.read() as conn:
        shown = [one for one in facts["reports"] if (one.row.id == report if report else one.successor is None)]
        if report and not shown:
            raise HTTPException(404, "This study has no such report.")
        said = {one.row.id: _said(conn, one.row.id) for one in shown}
        reviewed = reviews.of_study(conn, number)
    audit.accessed(subject_of(facts["study"]), person=who.party)
    return site.page(
        request,
        "study.html",
        **facts,
        shown=shown,
        said=said,
        reviewed=reviewed,
        verdicts=VERDICTS,
        did=words.ending(did, {"jobs": jobs}),
        longest=reviews.LONGEST_NOTE,
        is_new=False,
        is_oob=False,
        sentences=SENTENCES,
    )


def _sent(jobs: Sequence[AnyRow]) -> Mapping[int, list[AnyRow]]:
    """Document → its deliveries."""
    found: dict[int, list[AnyRow]] = {}
    for one in jobs:
        if one.document_id is not None:
            found.setdefault(one.document_id, []).append(one)
    return found


def _said(conn: Connection, document_id: int) -> dict[str, Any]:
    """What a report says in words and of the record, read from its bytes: the page says what the PACS was sent, and nothing else."""
    from pydicom import dcmread

    document = documents.load(conn, document_id)
    if not document.is_whole:
        return {"text": ["The stored report is not as it was written, and is not shown."], "said": tree.Said()}
    ds = dcmread(io.BytesIO(document.data))
    return {"text": tree.lines(ds), "said": tree.said(ds)}


@router.get("/studies/{number}/live")
def show_again(request: Request, number: int, site: ASite, _who: AWatcher, had: int = 0) -> Response:
    """What changes while one looks, by itself; `had`: how many reports the page knows."""
    facts = _facts(site, number)
    return site.page(request, "_again.html", **facts, is_new=len(facts["reports"]) != had, is_oob=True)


@router.get("/studies/{number}/documents/{document}.png")
def image(number: int, document: int, site: ASite, who: AVisitor) -> Response:
    """A summary image for a browser."""
    with site.store.read() as conn:
        study = study_row(conn, number)
        shown = (one for one in worklist.documents_of(conn, number) if one.id == document and one.kind == _IMAGE and one.sop_class_uid)
        row = next(shown, None)
        if row is None:
            raise HTTPException(404, "This study has no such image.")
        whole = documents.load(conn, document)
    if not whole.is_whole:
        raise HTTPException(404, "The stored image is not as it was written, and is not shown.")
    audit.accessed(subject_of(study), person=who.party, reason="summary image")
    return Response(png(whole.data), media_type="image/png")


def png(data: bytes) -> bytes:
    """The pixels of a Secondary Capture of ours, 8 bits gray or RGB."""
    from PIL import Image
    from pydicom import dcmread

    out = io.BytesIO()
    Image.fromarray(dcmread(io.BytesIO(data)).pixel_array).save(out, "PNG")
    return out.getvalue()


@router.post("/studies/{number}/findings/{finding}")
def review(number: int, finding: int, site: ASite, fields: Fields, who: Annotated[Visitor, Depends(may("review"))]) -> Response:
    """A radiologist says whether a finding is right."""
    verdict = fields.get("verdict", "")
    if verdict not in VERDICTS:
        raise HTTPException(400, "A finding is positive, negative or uncertain.")
    with site.store.begin() as conn:
        row = study_row(conn, number)
        author = who.account.name
        said = {"author": author, "verdict": verdict, "note": fields.get("note", "")}
        agreed = reviews.add(conn, finding, study_id=number, now=site.now(), **said) if 0 < finding <= LAST else None
    if agreed is None:
        raise HTTPException(404, "This study has no such finding.")
    audit.accessed(subject_of(row), person=who.party, action="U", reason=f"finding {finding} {'agreed' if agreed else 'corrected'}")
    return RedirectResponse(f"/studies/{number}#finding-{finding}", 303)


#: Codes of sentences that stand beside the findings.
SENTENCES: Final = {"summary": codes.SUMMARY.value, "use": codes.INTENDED_USE.value, "quality": codes.QUALITY.value}
