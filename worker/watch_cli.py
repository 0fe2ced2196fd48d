"""The verbs that watch an installation: `status` counts, `check` compares spool, database and archives, `audit` reads the trail.

Not here: what is counted (worker/store/), what is compared (consistency.py, deliver/cstore.py).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from worker import __version__, consistency, peers, progress
from worker.config import Config
from worker.console import ConfigFile, err, installation, out
from worker.domain import Document
from worker.errors import PeerUnavailable
from worker.ops import audit, forwarding
from worker.record_feeds import clock
from worker.roles import record_audit
from worker.store import documents, feeds, ledger, measures, queue, studies
from worker.store.database import Store
from worker.store.images import StoredFile
from worker.store.spool import Spool

if TYPE_CHECKING:
    from worker.deliver.cstore import Peer

#: Of studies that no account has, and of reasons, so many are named.
_NAMED: Final = 20
#: Sentences stand in lines of their own.
_SEPARATOR: Final = {"waiting_because": "\n"}
#: Between two questions to an archive, which serves radiologists meanwhile.
PAUSE_S: Final = 0.1


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""

    @app.command()
    def status(
        given: ConfigFile = None,
        as_json: Annotated[bool, typer.Option("--json", help="For a monitoring system.")] = False,
        by_account: Annotated[bool, typer.Option("--ledger", help="Where every study stands; exit 1 if one is in no account.")] = False,
        days: Annotated[int, typer.Option(min=1, max=366, help="With --ledger: so many days one by one, the older ones together.")] = 14,
    ) -> None:
        """How many studies, jobs, reports and messages are where, and how much disk is left.

        With --ledger: received = delivered + failed + excluded + held + in flight, by the day of a study's first image in the site's time
        zone. Each study is in exactly one. Delivered: of every bundle the last report is at all its destinations. Failed: somebody must
        look, `synoptic studies --discarded`. Excluded: no bundle takes its modalities. In flight: being received, analysed or sent.
        """
        settings, store = installation(given)
        if by_account:
            _ledger(store, settings.zone, days=days, as_json=as_json)
        else:
            spool = Spool(settings.spool, low_water_bytes=settings.receive.low_water_mb * 2**20)
            _status(store, spool, settings.trail, as_json=as_json)

    @app.command()
    def check(
        given: ConfigFile = None,
        with_digests: Annotated[bool, typer.Option("--digests", help="Read every file and compare its sha256, not its size.")] = False,
        is_repair: Annotated[bool, typer.Option("--repair", help="Put back what can be put back.")] = False,
        with_archives: Annotated[bool, typer.Option("--pacs", help="Ask destinations for our reports, senders for counts.")] = False,
        days: Annotated[int, typer.Option(min=1, max=36600, help="With --pacs: what was delivered or came in so many days.")] = 7,
    ) -> None:
        """Do spool, database and archives agree? Exit 1 if something is wrong, with --repair if something is left.

        Each image in the database must have its file, of the size and, with --digests, the sha256 it came with; each file must be an
        image's. --repair takes missing and changed files from quarantine if they are there, puts files that nobody knows into quarantine,
        and queues analyses again that failed for a file that is here now. The daemon may run meanwhile.

        With --pacs each destination is asked by C-FIND or QIDO-RS, ten times a second, for every report that it took: what it does not
        find, --repair sends again, the same bytes under the same UIDs. Senders with a query_port are asked how many images their studies
        have; what they have more than came here is named. It is no fault: archives keep objects that they do not send.
        """
        settings, store = installation(given)
        spool = Spool(settings.spool, low_water_bytes=settings.receive.low_water_mb * 2**20)
        is_well = _check(store, spool, with_digests=with_digests, is_repair=is_repair)
        if with_archives:
            is_well &= _check_archives(settings, store, since=clock() - timedelta(days=days), is_repair=is_repair)
        if not is_well:
            raise typer.Exit(1)

    @app.command(name="audit")
    def audit_(
        given: ConfigFile = None,
        since: Annotated[datetime | None, typer.Option(help="UTC; else all that is kept.", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"])] = None,
        study: Annotated[int, typer.Option(min=0, help="Its number in `synoptic studies`; 0: all.")] = 0,
    ) -> None:
        """The audit trail, a line a message: when, what, who > whom, which study and patient, and why.

        What is not well is "not done" (it may be tried again), "failed" or "died". It names patients: whoever may run this may know them.
        """
        _tell_audit(*installation(given), since=since, study=study)


# --- status


def status_facts(store: Store, spool: Spool, trail: Path) -> dict[str, Any]:
    """What `synoptic status --json` says."""
    with store.read() as conn:
        facts: dict[str, Any] = {
            "version": __version__,
            "studies": studies.counts(conn),
            "jobs": {f"{kind} {state}": count for (kind, state), count in sorted(measures.counts(conn).items())},
            "waiting_because": measures.waiting(conn),
            "messages": feeds.counts(conn),
            "oldest_due_job_s": measures.oldest_due_s(conn, now=clock()),
        }
    facts["spool_free_gb"] = round(spool.free_bytes / 2**30, 1)
    facts["spool_low"] = spool.is_low
    facts["audit"] = forwarding.state(trail)
    facts["audit_trouble"] = facts["audit"].pop("trouble")
    return facts


def _status(store: Store, spool: Spool, trail: Path, *, as_json: bool) -> None:
    facts = status_facts(store, spool, trail)
    if as_json:
        out.print_json(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        text = (
            _SEPARATOR.get(name, ", ").join(f"{count} {key}" for key, count in value.items()) or "none"
            if isinstance(value, dict)
            else str(value) or "none"
        )
        table.add_row(name.replace("_", " "), text)
    out.print(table)
    if facts["jobs"].get("infer discarded") or facts["jobs"].get("deliver discarded"):
        out.print("There are dead letters: `synoptic studies --discarded`, then `synoptic show STUDY`, then `synoptic retry STUDY`.")


def ledger_facts(store: Store, zone: tzinfo, *, days: int) -> dict[str, Any]:
    """What `synoptic status --ledger --json` says, of so many days one by one."""
    today = clock().astimezone(zone).date()
    midnights = [datetime.combine(today - timedelta(days=ago), datetime.min.time(), tzinfo=zone) for ago in range(days)]
    with store.read() as conn:
        found = ledger.entries(conn, midnights)
        lost = ledger.lost(conn, limit=_NAMED) if any(one.account == ledger.LOST for one in found) else []
    names = [*(f"{midnight:%Y-%m-%d}" for midnight in midnights), "older"]
    rows = {name: _summed([one for one in found if one.day == day]) for day, name in enumerate(names)}
    return {
        "days": {name: row for name, row in rows.items() if row["received"]},
        "all": _summed(found),
        "failed_because": _reasons(found),
        "adds_up": not any(one.account == ledger.LOST for one in found),
        "lost_studies": lost,
    }


def _ledger(store: Store, zone: tzinfo, *, days: int, as_json: bool) -> None:
    facts = ledger_facts(store, zone, days=days)
    if as_json:
        out.print_json(json.dumps(facts))
    else:
        _print_ledger(facts, zone)
    if not facts["adds_up"]:
        raise typer.Exit(1)


def _summed(found: Sequence[ledger.Entry]) -> dict[str, int]:
    counts = {account: sum(one.studies for one in found if one.account == account) for account in (*ledger.ACCOUNTS, ledger.LOST)}
    unsent = sum(one.studies for one in found if one.is_unsent)
    return {"received": sum(one.studies for one in found), **counts, "delivered_without_destination": unsent}


def _reasons(found: Sequence[ledger.Entry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in found:
        if one.account == "failed":
            reason = one.reason or "No reason is known."
            counts[reason] = counts.get(reason, 0) + one.studies
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:_NAMED])


def _print_ledger(facts: Mapping[str, Any], zone: tzinfo) -> None:
    accounts = [*ledger.ACCOUNTS, *([] if facts["adds_up"] else [ledger.LOST])]
    table = Table("day", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("received", *accounts):
        table.add_column(name, justify="right")
    for day, row in facts["days"].items():
        table.add_row(day, str(row["received"]), *(str(row[account]) for account in accounts))
    table.add_section()
    table.add_row("all", str(facts["all"]["received"]), *(str(facts["all"][account]) for account in accounts))
    out.print(table)
    out.print(f"By the day of the first image; days are those of {zone}.")
    if unsent := facts["all"]["delivered_without_destination"]:
        out.print(f"Of those delivered {unsent} had a report that no destination was configured for.")
    for reason, count in facts["failed_because"].items():
        out.print(f"{count} failed: {escape(reason)}", soft_wrap=True)
    if not facts["adds_up"]:
        numbers = ", ".join(map(str, facts["lost_studies"]))
        out.print(
            f"[red]{facts['all'][ledger.LOST]} studies are in no account:[/red] {numbers}. `synoptic show STUDY` says what became of one."
        )


# --- audit


def _tell_audit(settings: Config, store: Store, *, since: datetime | None, study: int) -> None:
    with store.read() as conn:
        found = studies.find(conn, str(study)) if study else []
    uid = next((one.study_instance_uid for number, one in found if number == study), "-" if study else "")
    for words in audit.told(settings.trail, since=f"{since:%Y-%m-%dT%H:%M}" if since else "", study_instance_uid=uid):
        out.print(escape(words), soft_wrap=True)


# --- check


def _check(store: Store, spool: Spool, *, with_digests: bool, is_repair: bool) -> bool:
    """Say what is wrong and what was done; whether all is well now."""
    with progress.bars(err) as bar:
        task = bar.add_task("checking files", total=None)
        found = consistency.check(
            store, spool, with_digests=with_digests, now=clock(), progress=lambda done, of: bar.update(task, completed=done, total=of)
        )
    how = "size and sha256" if with_digests else "size; --digests reads them too"
    out.print(f"{found.files - len(found.faults)} of {found.files} files are as they came (by {how}).")
    _print_faults(found.faults)
    if found.strays:
        out.print(f"{found.strays} files are no image's in the database.")
    for (study, _), bundles in found.returned.items():
        out.print(f"Study {study}: its files are here again, {len(bundles)} of its analyses failed without them.")
    if found.is_sound or not is_repair:
        out.print("Nothing is wrong." if found.is_sound else "Nothing was changed: `synoptic check --repair` mends what can be mended.")
        return found.is_sound
    done = consistency.repair(store, spool, found, now=clock())
    put = f"{done.restored} files put back from quarantine, {done.quarantined} put into quarantine"
    out.print(f"Repaired: {put}, {done.requeued} analyses queued again.", soft_wrap=True)
    if done.left:
        out.print(
            f"{len(done.left)} files are nowhere: have these studies sent again, then `synoptic check --repair` once more: "
            f"{_numbers(one.study_id for one, _ in done.left)}.",
            soft_wrap=True,
        )
    return not done.left


def _print_faults(faults: Sequence[tuple[StoredFile, str]]) -> None:
    counts = Counter((one.study_id, fault) for one, fault in faults)
    for (study, fault), count in sorted(counts.items())[:_NAMED]:
        out.print(f"Study {study}: {count} files are {fault}.")
    if len(counts) > _NAMED:
        out.print(f"… and of {len(counts) - _NAMED} more.")


# --- check --pacs


def _check_archives(settings: Config, store: Store, *, since: datetime, is_repair: bool) -> bool:
    """Ask destinations for what they took, and senders for what they have; whether all is there, or will be sent again."""
    is_well = True
    record_audit(settings)
    for destination in filter(lambda one: one.is_archive, settings.destinations):
        if destination.read_back:
            peer = peers.peer_of(destination, own_ae_title=settings.receive.ae_title)
            is_well &= _check_archive(store, peer, since=since, is_repair=is_repair)
        else:
            out.print(f"{destination.name}: not asked, its read_back is off.", markup=False)
    _count_at_senders(settings, store, since=since)
    audit.end()
    return is_well


def _check_archive(store: Store, peer: Peer, *, since: datetime, is_repair: bool) -> bool:
    """Ask a destination for each report that it took; whether it has all, or will be sent what it has not."""
    from worker.deliver import cstore, stow

    ask: Callable[..., Iterator[bool | None]] = stow.find_documents if peer.stow_url else cstore.find_documents
    with store.read() as conn:
        given = documents.delivered(conn, destination=peer.name, since=since)
    absent: list[Any] = []
    count, reason = 0, ""
    try:
        with progress.bars(err) as bar:
            found = ask(peer, _loaded(store, given)) if given else ()
            for one, is_found in zip(given, bar.track(found, len(given), description=f"asking {peer.name}"), strict=True):
                if is_found is None:
                    reason = f"{peer.name} does not answer such a query."
                    break
                count += 1
                absent += [] if is_found else [one]
    except PeerUnavailable as exc:
        reason = str(exc)
    out.print(f"{peer.name}: {count - len(absent)} of {count} reports are there.", markup=False, soft_wrap=True)
    if reason:
        out.print(f"{len(given) - count} reports were not asked for: {reason}", markup=False, soft_wrap=True)
    if absent:
        out.print(f"Not found are reports of the studies {_numbers(one.study_id for one in absent)}.", soft_wrap=True)
    if absent and is_repair:
        why = f"{peer.name} does not find the document that it took."
        with store.begin() as conn:
            done = [queue.reopen(conn, one.id, reason=why, delay_s=0, now=clock()) for one in absent]
        out.print(f"{sum(done)} reports are queued again, the same bytes under the same UIDs.")
    return not reason and (is_repair or not absent)


def _loaded(store: Store, given: Sequence[Any]) -> Iterator[Document]:
    for one in given:
        with store.read() as conn:
            document = documents.load(conn, one.document_id)
        yield document
        time.sleep(PAUSE_S)


def _count_at_senders(settings: Config, store: Store, *, since: datetime) -> None:
    """Name the studies of which a sender has more than came here and than we reported."""
    titles = {sender.ae_title for sender in settings.senders if sender.query_port}
    with store.read() as conn:
        recent = [one for one in studies.recent(conn, limit=None, since=since) if one.state == "complete" and one.calling_ae in titles]
    silent = 0
    with progress.bars(err) as bar:
        for one in bar.track(recent, description="asking senders"):
            try:
                count = peers.count_of(settings, one) if one.calling_ae in titles else None
            except PeerUnavailable:
                count, titles = None, titles - {one.calling_ae}  # away: each try would take as long again
            silent += count is None
            if count is not None and (more := count - one.instances - one.reports) > 0:
                out.print(f"Study {one.id}: its sender counts {more} objects more than the {one.instances} that came.")
            time.sleep(PAUSE_S)
    if silent:
        out.print(f"Of {silent} studies the sender gave no count.")


def _numbers(several: Iterable[int]) -> str:
    numbers = sorted(set(several))
    return ", ".join(map(str, numbers[:_NAMED])) + (f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else "")
