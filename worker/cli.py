"""The command line: verbs only; what they do lives elsewhere. Exit codes are a table in deploy/README.md."""

from __future__ import annotations

import inspect
import os
import sys
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from worker import __version__, config, host, lab, operate_cli, record_cli, watch_cli, web_cli
from worker.config import Config, ConfigError, config_file
from worker.console import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    ConfigFile,
    StudyArg,
    err,
    fail,
    find,
    installation,
    needed,
    out,
)
from worker.errors import WorkerError
from worker.ops import log
from worker.store.database import DatabaseUnavailable, Store
from worker.store.spool import Spool, SpoolError

if TYPE_CHECKING:
    from worker import importing
    from worker.intake import tables

app = typer.Typer(
    name="synoptic",
    help="A DICOM batch worker: studies in by C-STORE, the patient's record joined, structured reports back to the PACS.\n\n"
    "Start with `synoptic demo`, then `synoptic doctor`, then `synoptic all`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Run the command line; every foreseen error is one sentence and an exit code."""
    os.umask(0o077)
    host.confine()
    log.silence()
    log.on_crash(_crashed)
    try:
        typer.main.get_command(app)()  # app() would put typer's own hook, which prints an exception's words, in place of ours
    except ConfigError as exc:
        fail(f"Configuration: {exc}", EXIT_CONFIG)
    except (DatabaseUnavailable, SpoolError) as exc:
        fail(str(exc), EXIT_UNAVAILABLE)
    except WorkerError as exc:
        fail(str(exc), EXIT_FAILED)
    except OSError as exc:
        advice = ". Say it as the daemon's user: runuser -u synoptic -- synoptic …" if isinstance(exc, PermissionError) else ""
        fail(f"{exc.strerror or exc}: {exc.filename or ''}".rstrip(": ") + advice, EXIT_UNAVAILABLE)
    sys.exit(0)


def _crashed(kind: str, where: list[str]) -> None:
    err.print(
        f"[red]A fault of ours, {kind}, at {escape(' < '.join(reversed(where)))}: tell us, with `synoptic doctor`.[/red]", soft_wrap=True
    )


def _serve(given: Path | None, wanted: tuple[str, ...]) -> None:
    from worker import daemon

    path = needed(given)
    settings = config.read(path)
    log.setup(level=settings.log.level, human=settings.log.format == "human")
    daemon.supervise(settings, path, wanted=wanted)
    _end()


def _end() -> NoReturn:
    """End at once: all is committed and closed, and an interpreter would take torch apart, or wait for a sweep that waits for a peer."""
    sys.stdout.flush()
    os._exit(0)


@app.command(name="all")
def all_roles(given: ConfigFile = None) -> None:
    """Every role in one: receive, HL7 listener, sweeps, inference, delivery; the page, where [web] is enabled. For one host."""
    _serve(given, ("receive", "run", "deliver", "serve"))


@app.command()
def receive(given: ConfigFile = None) -> None:
    """The Storage SCP with the HL7 listener and the sweeps; never loads torch."""
    _serve(given, ("receive",))


@app.command()
def run(given: ConfigFile = None) -> None:
    """Inference: leases studies, writes reports. As many as there are devices."""
    _serve(given, ("run",))


@app.command()
def deliver(given: ConfigFile = None) -> None:
    """Delivery: sends reports and reads them back. One is enough."""
    _serve(given, ("deliver",))


@app.command(hidden=True)
def role(
    name: str,
    parent: Annotated[int, typer.Option()],
    given: ConfigFile = None,
    descriptor: Annotated[int | None, typer.Option()] = None,
    is_check: Annotated[bool, typer.Option("--check")] = False,
) -> None:
    """One child of the supervisor."""
    from worker import daemon

    settings = config.read(given)
    log.setup(level=settings.log.level, human=settings.log.format == "human" and not is_check)
    daemon.role(name, settings, descriptor=descriptor, parent=parent, is_check=is_check)
    if name == "run":
        _end()


@app.command()
def migrate(given: ConfigFile = None) -> None:
    """Bring the database to this program's version; makes it if there is none. Back it up first."""
    from worker import daemon

    daemon.open_store(config.read(needed(given)), migrate=True)
    out.print("The database is at this program's version.")


@app.command()
def studies(
    given: ConfigFile = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many.")] = 20,
    discarded: Annotated[bool, typer.Option("--discarded", help="Only those with a dead letter.")] = False,
) -> None:
    """The studies that changed last, by the ledger's accounts. No patient is named; `synoptic show` has the rest."""
    from worker.store import ledger
    from worker.store import studies as rows

    _, store = installation(given)
    columns = ("No.", "state", "mod.", "images", "last image, UTC", "jobs", "documents")
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    with store.read() as conn:
        lines = rows.recent(conn, limit=limit, is_discarded=discarded)
        accounts = ledger.accounts(conn, [line.id for line in lines])
        for line in lines:
            at = f"{line.last_received_at.astimezone(UTC):%Y-%m-%d %H:%M}"
            # Of what is in flight it is told whether images still come.
            state = line.state if line.state == "receiving" else accounts[line.id]
            table.add_row(str(line.id), state, line.modalities, str(line.instances), at, line.jobs, str(line.reports))
    out.print(table)


@app.command()
def show(
    study: StudyArg, given: ConfigFile = None, report: Annotated[bool, typer.Option("--report", help="Print its last report too.")] = False
) -> None:
    """A study's whole history, one line an event, then its jobs and findings."""
    from worker import view

    _, store = installation(given)
    view.show(out, store, find(store, study), with_report=report)


@app.command()
def select(
    study: StudyArg,
    given: ConfigFile = None,
    bundle: Annotated[str, typer.Option(metavar="NAME", help="Only this bundle; else all that are configured.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For a program, with each series' UID and score.")] = False,
) -> None:
    """Which series each bundle takes of a study, and for every other the rule that decided.

    A bundle's [[images]] hold the rules: modality, Image Type, body part, view, plane, spacing, counts, contrast, descriptions. Of
    several series that fit, the one with most preferences wins, then the one with most images, then the smaller UID. Localizers,
    projections, screen captures and reports are never taken unless the bundle says so. Nothing is changed, no pixel is read.

    Example: synoptic select 12 --bundle phantom
    """
    from worker import selection_view
    from worker.roles import read_bundles

    settings, store = installation(given)
    bundles = read_bundles(settings)
    if bundle and bundle not in {one.name for one in bundles}:
        fail(f"There is no such bundle in [run] bundles; there are: {', '.join(one.name for one in bundles) or 'none'}.", EXIT_NOT_FOUND)
    wanted = [one for one in bundles if bundle in ("", one.name)]
    selection_view.show(out, store, find(store, study), wanted, as_json=as_json)


@app.command(name="import")
def import_(
    paths: Annotated[
        list[Path], typer.Argument(exists=True, help="Files or folders: DICOM, HL7 v2, FHIR R4 (bundles, *.ndjson); tables with --mapping.")
    ],
    given: ConfigFile = None,
    mapping: Annotated[
        Path | None,
        typer.Option(help="The files are tables of delimited text, and this says how to read them: deploy/tables.example.toml."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --mapping: read everything, change nothing.")] = False,
) -> None:
    """Take in files as if they had come over the network. Repeating it changes nothing."""
    from worker import importing

    settings, store = installation(given)
    if mapping is not None:
        _import_tables(paths, mapping, settings, store, dry_run=dry_run)
        return
    if dry_run:
        fail("--dry-run goes with --mapping.", EXIT_USAGE)
    spool = Spool(settings.spool, low_water_bytes=settings.receive.low_water_mb * 2**20)
    todo = list(importing.files(paths))
    with Progress(TextColumn("importing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err) as progress:
        task = progress.add_task("importing", total=len(todo))
        tally = importing.import_files(todo, config=settings, store=store, spool=spool, progress=lambda: progress.advance(task))
    _print_tally(tally)


def _import_tables(paths: list[Path], mapping: Path, settings: Config, store: Store, *, dry_run: bool) -> None:
    from worker import tables_feed

    size = sum(path.stat().st_size for path in tables_feed.files(paths))
    with Progress(TextColumn("importing"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=err) as progress:
        task = progress.add_task("importing", total=size)
        tally = tables_feed.import_tables(
            paths, mapping, config=settings, store=store, dry_run=dry_run, progress=lambda read: progress.advance(task, read)
        )
    for path, line, reason in tally.errors[:20]:
        where = f"{path.name if path else 'table'}{f', line {line}' if line else ''}"
        out.print(escape(f"{where}: {reason}"), soft_wrap=True)
    if dry_run:
        out.print("A dry run: nothing was changed.")
    _print_tally(tally)


def _print_tally(tally: importing.Tally | tables.Tally) -> None:
    table = Table("outcome", "count")
    for name, count in sorted(tally.counts.items(), key=lambda item: (item[0] == "refused", item)):  # its reasons follow it
        table.add_row(name, str(count))
    for reason, count in tally.reasons.most_common(20):
        table.add_row(f"  {escape(reason)}", str(count))
    out.print(table if tally.counts else "There is no file.")
    if tally.counts["refused"]:
        sys.exit(EXIT_FAILED)


@app.command()
def doctor(given: ConfigFile = None) -> None:
    """Check everything an installation needs; paste its output into a bug report. Exit 1 if a check fails."""
    from worker import doctor as checks

    path = config_file(given)
    if not checks.report(out, config.read(path), path):
        sys.exit(EXIT_FAILED)


@app.command(name="support-bundle")
def support_bundle(
    path: Annotated[Path, typer.Argument(help="The zip file to make.")],
    given: ConfigFile = None,
    log_file: Annotated[
        Path | None, typer.Option("--log", exists=True, dir_okay=False, help="The log, as `journalctl -u synoptic -o cat` writes it.")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, max=20_000, help="With --log: so many of its last lines.")] = 5000,
) -> None:
    """Everything a vendor needs to help, in one file that names no patient and no site: look at it, then send it.

    Versions, the configuration with its texts masked, `doctor`, `status`, the ledger's sums, causes of refusal and the log's events.
    """
    from worker import support

    found = config_file(given)
    parts = support.write(path, config.read(found), found, log_file=log_file, lines=lines)
    table = Table("part", "what it is", "bytes")
    for name, meaning, size in parts:
        table.add_row(name, meaning, str(size))
    out.print(table)


lab.register(app)
record_cli.register(app)
watch_cli.register(app)
operate_cli.register(app)
web_cli.register(app, _serve)


@app.command()
def demo(
    cases: Annotated[int, typer.Option("--cases", "-n", min=1, max=200, help="How many phantom patients.")] = 12,
    folder: Annotated[Path, typer.Option(help="For database, spool and reports; if not empty, a new one beside it.")] = Path("var/demo"),
) -> None:
    """The real daemon, a small PACS and phantom patients, on loopback, in a minute. Needs no configuration."""
    from worker.demo import show as demonstration

    if not demonstration.run(out, err, cases=cases, folder=folder):
        sys.exit(EXIT_FAILED)


for _command in app.registered_commands:  # typer keeps a docstring's line ends, and takes [[images]] for markup
    _paragraphs = (inspect.getdoc(_command.callback) or "").split("\n\n")
    _command.help = escape("\n\n".join(" ".join(one.split()) for one in _paragraphs))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
