"""The verbs for the patient's record: `patient` shows, unmerges and erases one; `records` shows the feeds.

Nothing here is logged and no event is emitted: what these verbs print is for the person at the terminal alone. How it looks is in
record_tables.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from worker import record_messages, record_tables, record_view
from worker.console import EXIT_NOT_FOUND, AsJson, ConfigFile, err, installation, out
from worker.domain import PatientKey, Study
from worker.errors import Reject
from worker.record_feeds import apply_again, clock, comparable
from worker.record_tables import plain
from worker.store import records, studies
from worker.store.database import Connection, Store

if TYPE_CHECKING:
    from models.bundle import Bundle


@dataclass(frozen=True, slots=True)
class _Installed:
    """What of the installation these verbs need."""

    store: Store
    issuer: str
    zone: tzinfo
    silent_after_s: float
    must_agree: tuple[str, ...]
    instances: Path
    comparable: Callable[[str], str]
    apply_again: Callable[[int], str]
    bundles: Callable[[], Sequence[Bundle]]


def _installed(given: Path | None) -> _Installed:
    from worker.roles import read_bundles

    config, store = installation(given)
    return _Installed(
        store,
        issuer=config.site.issuer,
        zone=config.zone,
        silent_after_s=config.records.silent_after_s,
        must_agree=config.records.must_agree,
        instances=config.spool / "instances",
        comparable=lambda patient_id: comparable(config, patient_id),
        apply_again=lambda number: apply_again(config, store, number),
        bundles=lambda: read_bundles(config),
    )


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    panel = "For the patient's record"

    @app.command(rich_help_panel=panel)
    def patient(
        patient_id: Annotated[str, typer.Argument(metavar="ID", help="The patient ID.")],
        issuer: Annotated[str, typer.Option(help="Who issued the ID; else the site's issuer.")] = "",
        at: Annotated[str, typer.Option(help="The record as of this time (2026-03-04T12:00, the site's zone); else now.")] = "",
        known: Annotated[str, typer.Option(help="Only what had been received by this time.")] = "",
        study: Annotated[str, typer.Option(help="The record as of this study: its number, accession number or UID.")] = "",
        bundle: Annotated[str, typer.Option(help="With --study: what this bundle would be given, and what is missing.")] = "",
        full: Annotated[bool, typer.Option("--full", help="Free texts as they are, not redacted.")] = False,
        as_json: AsJson = False,
        unmerge: Annotated[int, typer.Option(metavar="NUMBER", help="Undo this merge; needs --because.")] = 0,
        because: Annotated[
            str, typer.Option(metavar="WORDS", help="Required with --unmerge: why. Kept with the merge; name no patient.")
        ] = "",
        erase: Annotated[
            bool, typer.Option("--erase", help="Delete all that is here of exactly this issuer and ID; needs --receipt.")
        ] = False,
        receipt: Annotated[Path | None, typer.Option(help="Required with --erase: the new file to write what was deleted to.")] = None,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
        given: ConfigFile = None,
    ) -> None:
        """A patient's record as the network sees it at a time, and where each fact came from. Prints patient data."""
        _check_options(at=at, study=study, bundle=bundle, unmerge=unmerge, because=because, is_erase=erase, receipt=receipt)
        here = _installed(given)
        with here.store.read() as conn:
            key = _key_of(conn, here, patient_id, issuer)
        if unmerge:
            _unmerge(here.store, key, unmerge, because, is_sure=yes)
        elif receipt is not None:
            _erase(here, key, receipt, is_sure=yes)
        else:
            asked = _Asked(_moment(at, here.zone, "--at"), _moment(known, here.zone, "--known"), study, bundle, full)
            _show(here, key, asked, as_json=as_json)

    @app.command(name="records", rich_help_panel=panel)
    def records_(
        rejected: Annotated[int, typer.Option(min=0, help="How many refused messages to list.")] = 10,
        message: Annotated[int, typer.Option(metavar="NUMBER", help="Write this message's bytes to --out. They are patient data.")] = 0,
        to: Annotated[Path | None, typer.Option("--out", "-o", help="With --message: the file, which must be new.")] = None,
        apply: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NUMBER",
                help="Take this refused message once more, as when it came: after a mapping was added, the right A08 came, the program was "
                "upgraded. May be given several times; `all` is every one that is kept. Exit 1 if one is refused again.",
            ),
        ] = None,
        withdraw: Annotated[
            int,
            typer.Option(
                metavar="NUMBER",
                help="Withdraw the results and texts that this message said (`synoptic patient ID` has its number); needs --because. "
                "Nothing is deleted; reports are made anew as after the sender withdrew them; only a correction (OBX-11 C) stands again. "
                "Whom it named, its merges and orders stay: send an A08, or use `synoptic patient ID --unmerge`.",
            ),
        ] = 0,
        because: Annotated[
            str, typer.Option(metavar="WORDS", help="Required with --withdraw: why. Kept with your login, shown for ever; name no patient.")
        ] = "",
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
        as_json: AsJson = False,
        given: ConfigFile = None,
    ) -> None:
        """The feeds: what came of their messages, when they were last heard, how late; or a deed on one message. Names no patient."""
        _check_message_options(message=message, to=to, again=apply or (), withdraw=withdraw, because=because)
        here = _installed(given)
        if withdraw:
            record_messages.withdraw(out, here.store, withdraw, because.strip(), is_sure=yes)
        elif to is not None:
            _keep(here.store, message, to)
        elif apply:
            _apply(here, apply)
        else:
            _show_feeds(here, rejected=rejected, as_json=as_json)


def _check_message_options(*, message: int, to: Path | None, again: Sequence[str], withdraw: int, because: str) -> None:
    _refuse_words(
        {
            "--message NUMBER and --out FILE belong together.": bool(message) != (to is not None),
            "--withdraw NUMBER and --because WORDS belong together.": bool(withdraw) != bool(because.strip()),
            "--message, --apply and --withdraw are different things: give one.": sum(map(bool, (message, again, withdraw))) > 1,
        }
    )


def _check_options(*, at: str, study: str, bundle: str, unmerge: int, because: str, is_erase: bool, receipt: Path | None) -> None:
    wrong = {
        "--at and --study both say a time: give one.": bool(at and study),
        "--bundle needs --study.": bool(bundle and not study),
        "--unmerge NUMBER and --because WORDS belong together.": bool(unmerge) != bool(because.strip()),
        "--erase and --receipt FILE belong together.": is_erase != (receipt is not None),
        "--unmerge and --erase are two things: give one.": bool(unmerge and is_erase),
    }
    _refuse_words(wrong)


def _refuse_words(wrong: Mapping[str, bool]) -> None:
    """Refuse what does not go together: of each sentence whether it holds."""
    for sentence, holds in wrong.items():
        if holds:
            raise typer.BadParameter(sentence)


def _moment(text: str, zone: tzinfo, option: str) -> datetime | None:
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise typer.BadParameter(f"{option} is no time: write it as 2026-03-04T12:00 or 2026-03-04T12:00+01:00.") from exc
    at = at if at.tzinfo else at.replace(tzinfo=zone)
    try:
        at.astimezone(UTC)
    except OverflowError:  # the calendar's first or last day: in UTC it is within the calendar
        return at.replace(tzinfo=UTC)
    return at


def _missing(sentence: str) -> NoReturn:
    err.print(f"[red]{plain(sentence)}[/red]", soft_wrap=True)
    raise typer.Exit(EXIT_NOT_FOUND)


def _key_of(conn: Connection, here: _Installed, patient_id: str, issuer: str) -> PatientKey:
    """The key that is meant; an ID alone names nobody, so never a guess."""
    patient_id = here.comparable(patient_id.strip())
    if issuer:
        return PatientKey(issuer, patient_id)
    known = records.issuers_of(conn, patient_id)
    if len(known) > 1:
        _missing(f"{len(known)} issuers know this ID: choose one with --issuer: {', '.join(known)}.")
    if known and known != [here.issuer]:
        _missing(f"The site's issuer does not know this ID; another does: say --issuer {known[0]} if that is the patient.")
    if not here.issuer:
        _missing("Say the ID's issuer with --issuer, or set [site] issuer: an ID alone names nobody.")
    return PatientKey(here.issuer, patient_id)


# --- show


@dataclass(frozen=True, slots=True)
class _Asked:
    at: datetime | None
    known_at: datetime | None
    study: str
    bundle: str
    is_full: bool


def _show(here: _Installed, key: PatientKey, asked: _Asked, *, as_json: bool) -> None:
    with here.store.read() as conn:
        study = _study(conn, key, asked.study) if asked.study else None
        spec = _bundle(here, asked.bundle) if asked.bundle else None
        as_of = study.study_at if study else asked.at or clock()
        if spec is not None:
            as_of = record_view.later(as_of, spec.record.horizon_h)
        known_at, is_full, must_agree = asked.known_at, asked.is_full, here.must_agree
        facts = record_view.gather_patient(conn, key, as_of=as_of, known_at=known_at, is_full=is_full, must_agree=must_agree)
        inputs = None
        if study is not None and spec is not None:
            inputs = record_view.gather_inputs(conn, study, key, spec, known_at=known_at, is_full=is_full, must_agree=must_agree)
    if facts is None:
        by_then = " by then" if asked.known_at else ""
        _missing(f"No feed has named a patient of this issuer and ID{by_then}. `synoptic records` shows the feeds.")
    if inputs is not None:
        facts["inputs"] = inputs
    if as_json:
        _print_json(facts)
    else:
        record_tables.print_patient(out, facts, zone=here.zone)


def _show_feeds(here: _Installed, *, rejected: int, as_json: bool) -> None:
    with here.store.read() as conn:
        facts = record_view.gather_feeds(conn, rejected=rejected, silent_after_s=here.silent_after_s, now=clock())
    if as_json:
        _print_json(facts)
    else:
        record_tables.print_feeds(out, facts, zone=here.zone)


def _study(conn: Connection, key: PatientKey, wanted: str) -> Study:
    found = [study for _, study in studies.find(conn, wanted)]
    if not found:
        _missing("There is no such study here. `synoptic studies` lists those there are.")
    own = [study for study in found if study.patient.key in records.keys_of(conn, key)]
    if not own:
        raise Reject("The study is of another patient: a record is only shown as of a study of its own.")
    if len(own) > 1:
        _missing(f"{len(own)} studies of the patient have this accession number: say which one by its Study Instance UID.")
    return own[0]


def _bundle(here: _Installed, name: str) -> Bundle:
    bundles = here.bundles()
    for one in bundles:
        if one.name == name:
            return one
    _missing(f"There is no such bundle in [run] bundles; there are: {', '.join(one.name for one in bundles) or 'none'}.")


def _print_json(facts: dict[str, Any]) -> None:
    # Plain, not rich's: what senders wrote must come through unwrapped and unstyled.
    out.file.write(json.dumps(facts, ensure_ascii=True, indent=2, default=lambda at: at.isoformat()) + "\n")


# --- change


def _unmerge(store: Store, key: PatientKey, number: int, because: str, *, is_sure: bool) -> None:
    with store.read() as conn:
        found = next((one for one in records.merges_of(conn, key) if one[0] == number), None)
    if found is None:
        _missing("The patient has no merge of this number that stands. `synoptic patient ID` lists them.")
    survivor, retired = (f"{one.patient_id} of {one.issuer}" for one in found[1:3])
    out.print(plain(f"Merge {number}: {retired} went into {survivor}. Undone, each has its own facts again, as if it had never been."))
    if not is_sure:
        typer.confirm("Undo it?", abort=True)
    with store.begin() as conn:
        is_undone = records.unmerge(conn, number, reason=because.strip(), now=clock())
    if not is_undone:
        _missing("Somebody else undid the merge meanwhile.")
    out.print(f"Merge {number} is undone. Studies of both are looked at again.")


def _erase(here: _Installed, key: PatientKey, receipt: Path, *, is_sure: bool) -> None:
    """Rows, then the receipt on disk, then the commit, then the files: a receipt never says less than was deleted."""
    from worker.store import erasure

    _check_new(receipt)
    found = _rehearsed(here.store, key)
    out.print(f"Of {plain(key.patient_id)} of {plain(key.issuer)} will be deleted: {_counted(found)}. It cannot be undone.", soft_wrap=True)
    out.print("Reports that were delivered stay in the PACS; backups stay as they are.")
    if not is_sure:
        typer.confirm("Delete it?", abort=True)
    is_written = False
    with os.fdopen(record_messages.new_file(receipt), "w", encoding="utf-8") as file:
        try:
            with here.store.begin() as conn:
                told = erasure.erase(conn, key, now=clock())
                json.dump(told, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
                is_written = True
        except BaseException as exc:
            if is_written:  # a commit whose answer was lost may have been one
                raise Reject("The database failed at the commit: the receipt counts only if `synoptic patient` has nothing more.") from exc
            receipt.unlink()
            raise
    left = _delete(here.instances, told["paths"])
    erasure.purge(here.store)
    gone = {"counts": told["counts"], "paths": told["paths"][left:]}
    out.print(f"Deleted: {_counted(gone)}. {plain(str(receipt))} says so.", soft_wrap=True)
    if left:
        raise Reject(f'{left} of the files could not be deleted: the receipt names them under "paths"; delete them by hand.')


class _Rehearsed(Exception):
    """What would be erased is known; nothing is."""


def _rehearsed(store: Store, key: PatientKey) -> Mapping[str, Any]:
    """What erasing would delete, or why it may not: by doing it, and taking it back. Counts made another way might not be the same."""
    from worker.store import erasure

    found: Mapping[str, Any] = {}
    with suppress(_Rehearsed), store.begin() as conn:
        found = erasure.erase(conn, key, now=clock())
        raise _Rehearsed
    return found


def _counted(told: Mapping[str, Any]) -> str:
    counts = [f"{count} {name.replace('_', ' ')}" for name, count in told["counts"].items() if count]
    return f"{', '.join(counts) or 'no rows'}, {len(told['paths'])} files"


def _delete(folder: Path, paths: Sequence[str]) -> int:
    """Delete files below the spool; returns how many are still there."""
    left = 0
    for path in paths:
        file = folder / path
        try:
            if not file.resolve().is_relative_to(folder.resolve()):
                left += 1
                continue
            file.unlink(missing_ok=True)
        except OSError:
            left += 1
    return left


def _apply(here: _Installed, words: Sequence[str]) -> None:
    if not record_messages.apply(out, here.store, record_messages.numbers_of(words), here.apply_again):
        raise typer.Exit(1)


def _keep(store: Store, number: int, to: Path) -> None:
    if not record_messages.keep(out, store, number, to):
        _missing("No bytes of such a message are kept: only of those that nothing was made of, and not for ever.")


def _check_new(path: Path) -> None:
    """Say what is wrong with the name of a new file before anybody is asked anything."""
    if os.path.lexists(path):
        raise Reject(record_messages.THERE)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise Reject("The receipt's folder is not there, or may not be written to: name another, nothing was deleted.")
