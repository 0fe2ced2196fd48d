"""What a person asked to see, as plain tables: used by `synoptic show` and the demo."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from pydicom import dcmread
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker.report import tree
from worker.store import commitments, documents, history, queue, reviews, studies
from worker.store.database import Store
from worker.store.schema import AnyRow

#: Why nothing has happened yet. Not here: which sign it waits for, of which the sweep alone knows (intake/assembly.py).
_RECEIVING = (
    "Still being received: until its sender counts as many images or none came for \\[assembly] quiet_s; "
    "with fewer images than a bundle needs, for incomplete_limit_s."
)


def show(out: Console, store: Store, study_id: int, *, with_report: bool) -> None:
    """A study: its history, its jobs, its reports with their findings."""
    with store.read() as conn:
        study = studies.load(conn, study_id)
        entries = history.of_study(conn, study_id)
        jobs = queue.of_study(conn, study_id)
        reports = documents.of_study(conn, study_id)
        promised = {one.id: commitments.of_document(conn, one.id) for one, _ in reports}
        reviewed = reviews.of_study(conn, study_id)
    out.print(
        f"study {study_id}  {study.study_instance_uid}  version {study.version}  {sum(len(s.instances) for s in study.series)} images"
    )
    if study.hold or not study.is_complete:
        out.print(f"[red]On hold:[/red] {escape(study.hold)}" if study.hold else _RECEIVING)
    for entry in entries:
        facts = "  ".join(f"{name}={value}" for name, value in entry.facts.items() if value not in ("", {}, None))
        out.print(f"{entry.at:%Y-%m-%d %H:%M:%S.%f}"[:-3] + f"Z  {entry.name:22s} {escape(facts)}", soft_wrap=True)
    if jobs:
        out.print(_jobs(jobs))
    for document, findings in reports:
        name = "report" if document.kind == "sr" else document.kind
        out.print(f"{name} {document.sop_instance_uid}  version {document.input_version}  {escape(document.failure)}", soft_wrap=True)
        for asked in promised[document.id]:
            out.print(f"  {asked.destination}: {_promise(asked)}", soft_wrap=True, markup=False)
        for one in findings:
            _print_finding(out, one, reviewed.get(one.id, []))
    if with_report and reports:
        print_report(out, bytes(reports[-1][0].data))


def _jobs(jobs: Sequence[AnyRow]) -> Table:
    table = Table("job", "kind", "bundle, or document to", "version", "state", "attempt", "reason")
    for job in jobs:
        whose = f"{job.document} to {job.destination}" if job.destination else job.bundle
        row = (job.id, job.kind, whose, job.input_version, job.state, job.attempt, escape(job.reason))
        table.add_row(*(str(cell) for cell in row))
    return table


def _promise(asked: AnyRow) -> str:
    if asked.answered_at is None:
        return f"asked to commit at {asked.asked_at:%Y-%m-%d %H:%M:%S}Z, no answer yet"
    at = f"{asked.answered_at:%Y-%m-%d %H:%M:%S}Z"
    match asked.state:
        case "committed":
            return f"committed by the PACS at {at}"
        case "found":
            return f"found by a query at {at}, not committed: {asked.reason}"
        case "unproven":
            return f"neither committed nor found, for queries are not answered ({at}): {asked.reason}"
    return f"not kept, as was said or found at {at}: {asked.reason}"


def _print_finding(out: Console, one: AnyRow, opinions: Sequence[AnyRow]) -> None:
    unusual = ", unlike what the network learned from" if one.is_atypical else ""
    out.print(f"  {one.meaning}: {one.probability:.3f} {one.verdict}{unusual} (threshold {one.threshold:g})")
    if one.shapley:
        of_these = f"; of these {_shares(one.attributions)}" if one.attributions else ""
        out.print(f"    log-odds: {_shares(one.shapley)}{of_these}")
    for said in opinions[:1]:
        words = "agrees" if said.verdict == one.verdict else f"says {said.verdict}"
        out.print(f"    {said.author} {words}, {said.at:%Y-%m-%d %H:%M}Z  {said.note}".rstrip(), soft_wrap=True, markup=False)


def _shares(shares: Mapping[str, float]) -> str:
    """The largest first, as in "image +2.1, values -0.4"."""
    return ", ".join(f"{name} {share:+.2f}" for name, share in sorted(shares.items(), key=lambda item: -abs(item[1])))


def print_report(out: Console, data: bytes) -> None:
    """A report as a readable tree."""
    for line in tree.lines(dcmread(io.BytesIO(data))):
        out.print(escape(line), soft_wrap=True)
