"""The verbs of an operator: `retry` and `cancel` a study's jobs, `withdraw` what nobody is to get any more.

A study's history says who did, and of the first two, which the page has too (web/pages.py), the audit trail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from worker import host, progress, reissue
from worker.config import Config
from worker.console import EXIT_NOT_FOUND, ConfigFile, StudyArg, err, find, installation, out
from worker.ops import audit
from worker.record_feeds import clock
from worker.roles import read_bundles, record_audit
from worker.store import documents, queue, withdrawal
from worker.store.database import Store


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""

    @app.command()
    def retry(
        study: StudyArg,
        given: ConfigFile = None,
        stat: Annotated[bool, typer.Option("--stat", help="Before everything else.")] = False,
        anew: Annotated[bool, typer.Option("--anew", help="Those that are done, too: after a new version of a bundle.")] = False,
    ) -> None:
        """Put a study's failed, cancelled or waiting jobs back to the front of their wait.

        With --anew every bundle that analysed it does so again, and a report that says something new names the one that it replaces.
        """
        settings, store = installation(given)
        study_id, who, now = find(store, study), host.caller(), clock()
        bundles = {one.name for one in read_bundles(settings)} if anew else set()
        with store.begin() as conn:
            again = (
                reissue.anew(conn, study_id, bundles=bundles, now=now) if anew else queue.operator_retry(conn, study_id, now=now, by=who)
            )
            if stat:
                queue.prioritize(conn, study_id, now=now, by=who)
        nothing = "no bundle that is configured has analysed it" if anew else "no job is discarded, cancelled or waiting"
        _tell(settings, store, study_id, "retry", f"{_jobs(again)} put back." if again else f"Nothing to retry: {nothing}.")

    @app.command()
    def cancel(study: StudyArg, given: ConfigFile = None) -> None:
        """Cancel a study's unfinished jobs. What was delivered stays delivered."""
        settings, store = installation(given)
        study_id = find(store, study)
        with store.begin() as conn:
            ended = queue.operator_cancel(conn, study_id, now=clock(), by=host.caller())
        _tell(settings, store, study_id, "cancel", f"{_jobs(ended)} cancelled." if ended else "Nothing to cancel: no job is unfinished.")

    @app.command()
    def withdraw(
        destination: Annotated[str, typer.Argument(help="Its name in the configuration, now or once; else all are listed.")] = "",
        given: ConfigFile = None,
        is_sure: Annotated[bool, typer.Option("--yes", help="Do it.")] = False,
    ) -> None:
        """What is still owed to a destination, and the configuration names no more; with --yes it is owed to nobody.

        These are deliveries, waiting or given up, of kinds that the destination's `documents` do not name, or to a destination that is not
        there. A form that a PACS will never take leaves a dead letter a study, and the study counts as failed: take the kind out of
        `documents`, start again, then say this. What was delivered stays; each study's history keeps what was withdrawn. To name the kind
        again brings nothing back.
        """
        settings, store = installation(given)
        _withdraw(store, {one.name: one.wanted for one in settings.destinations}, destination, is_sure=is_sure)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


def _tell(settings: Config, store: Store, study_id: int, verb: str, said: str) -> None:
    out.print(said)
    with store.read() as conn:
        subject = audit.Subject(*documents.owner(conn, study_id))
    record_audit(settings)
    audit.accessed(subject, person=audit.Party(host.caller(), is_ae=False), action="U", reason=f"{verb}: {said}")
    audit.end()


def _withdraw(store: Store, wanted: Mapping[str, Sequence[str]], destination: str, *, is_sure: bool) -> None:
    with store.read() as conn:
        found = [row for row in withdrawal.unnamed(conn, wanted) if destination in ("", row.destination)]
    if not found:
        if destination and destination not in wanted:
            err.print(f"Nothing is owed to a destination {destination}, and the configuration names none.", markup=False, style="red")
            raise typer.Exit(EXIT_NOT_FOUND)
        out.print("Nothing is owed that the configuration does not name.")
    elif destination and is_sure:
        done, count = 0, sum(row.available + row.discarded + row.cancelled for row in found)
        with progress.bars(err) as bar:
            task = bar.add_task("withdrawing", total=count)
            for several in withdrawal.take_back(store, destination, kinds=wanted.get(destination, ()), now=clock(), by=host.caller()):
                done += several
                bar.update(task, completed=done)
        out.print(f"Withdrawn, to {destination}: {done}.", markup=False)
    else:
        table = Table("destination", "document", "waiting", "given up", "cancelled", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for row in found:
            table.add_row(escape(row.destination), row.kind, str(row.available), str(row.discarded), str(row.cancelled))
        out.print(table)
        out.print(f"Nothing was changed. `synoptic withdraw {destination or 'DESTINATION'} --yes`: they are owed to nobody.", markup=False)
